"""Promotion as the listener sees it. A new version is noticed, loaded off the hot path, compared with the one in use, and switched to
between two hops; or it is refused, and the listener goes on with what it has. Later it may be gone back from. So is the engine that was
asked for, where another one listens until it is prepared.

The newcomer needs no time to warm up: the pipeline keeps the frames of the last seconds, and an engine that has stepped through its
receptive field of them is in the same state as if it had always listened. So both versions judge the same audio, and only one acts.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekws.detector import Detector
from edgekws.engines import Engine, Preparation
from edgekws.errors import ConfigError, EdgekwsError, EngineUnavailable, ModelError, ModelUnreadable, StoreError
from edgekws.frontend import LogMel
from edgekws.model import Model, golden
from edgekws.pipeline import Hop, Pipeline
from edgekws.store import ADAPTED, Store, Tally
from edgekws.values import HOP_SAMPLES, Event, befell

log = logging.getLogger(__name__)

LOOK_S = 0.05  # between two looks for a promotion, at most one a hop
LOOK_AROUND_S = 1.0  # between two looks at the enrolments
REMOVAL_S = 60.0  # from the first clip that a removal deletes to the enrolment itself, at most
COMPARED_HOPS = 25  # 2 s, the receptive field of every network here: with fewer since the start or a gap nothing is compared yet
# A word is above the threshold for some hops, and two versions may differ by a few in where. The switch waits until the newcomer was
# below its threshold for so long, so that no word falls between the end of the one's hops and the beginning of the other's.
CALM_HOPS = 6
PATIENCE_HOPS = 125  # 10 s without such a moment
AMBIENCE_DBFS = (-70, -50)  # a quiet room, a fan
AMBIENCE_HOPS = 50
RESTLESS = 0.25  # of the compared hops above the threshold where the version in use is below: a word takes less
COLLAPSED = 0.95  # mean cosine of a model's own golden embeddings; the packaged models have 0.1

FAILED_STARTS = 3  # within one boot of the machine
FAILED_BOOTS = 6  # more: who pulls the plug a few times, or a brown-out, ends a start as well
STEADY_S = 60.0  # of listening, after which a start has not failed
CHECK_S = 60.0  # between two looks at how a new version does, later a twentieth of the time that it has listened
WATCHED_S = 7 * 86400.0  # a new version is watched for so long, and compared with so long before it
LEAST_HEARD_H = 24.0  # in which; else the board was off for most of it, and the week goes on
LONGEST_TRIAL_S = 4 * WATCHED_S
# A better model wakes more often too: from a recall of one half to all of it is twice as often. Beyond that it is worse.
MORE = 2.0
WAKES, WAKES_P = 5, 0.001  # looked at again and again for a week, so a strict level
OF_ONE_KEYWORD = 20  # wakes of one by itself: from five on an owner who comes back, or only now uses it, would cost the version
REJECTS, REJECTS_P = 3, 0.01  # the user said so: less is enough


@dataclass(frozen=True)
class Version:
    """What listens: a model, its engine, and a detector for what is enrolled."""

    model: Model
    engine: Engine
    detector: Detector


def model_event(model: str, what: str, now_s: float, stream_s: float = 0.0, **facts: object) -> Event:
    """Something that befell a model version; `what` is live, refused, rolled back, kept, promoted, reloaded or engine."""
    return befell("model", model, now_s, stream_s, what=what, **facts)


# Judging.


def flaw(version: Version) -> str | None:
    """What is wrong with a version whatever it hears, in words; None = nothing."""
    _, wanted = golden(version.model)
    count = len(wanted)
    alike = (float(np.square(wanted.sum(0)).sum()) - count) / max(1, count * (count - 1))  # of unit rows
    if count > 1 and alike > COLLAPSED:
        return f"its embedding hardly depends on the audio (mean cosine {alike:.3f} between different sounds, accepted up to {COLLAPSED})"
    noise = np.random.default_rng(0).standard_normal(AMBIENCE_HOPS * HOP_SAMPLES)
    for level_dbfs in AMBIENCE_DBFS:
        frontend = LogMel()
        version.engine.reset()
        quiet = np.round(noise * 32768 * 10 ** (level_dbfs / 20)).astype(np.int16).reshape(-1, HOP_SAMPLES)
        for i, samples in enumerate(quiet):
            embedding = version.engine.step(frontend.hop(samples))
            if not np.isfinite(embedding).all():
                return f"its embedding of noise at {level_dbfs} dBFS is not a number"
            version.detector.step(embedding, i)
            if version.detector.margin >= 0:
                return f"it wakes at noise of {level_dbfs} dBFS"
    version.engine.reset()
    version.detector.reset()
    return None


class Newcomer:
    """A version that steps through what the one in use hears, and does not act yet."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.calm_hops = 0
        """Last hops in a row that were below the threshold."""
        self.flaw: str | None = None
        self.margins: list[float] = []
        self._at = 0  # number of the last hop

    def follow(self, recent: Sequence[Hop]) -> None:
        """Step through what is new in the pipeline's recent hops."""
        if not recent:
            return
        if recent[0].number <= self._at <= recent[-1].number:
            todo = recent[self._at - recent[0].number + 1 :]
        else:  # a gap, or far behind: these hops alone give the right state
            self.version.engine.reset()
            self.calm_hops = 0
            todo = recent
        detector = self.version.detector
        for hop in todo:
            try:
                embedding = self.version.engine.step(hop.frames)
            except Exception as error:  # the version in use must not fall with it
                self.flaw = f"its engine failed ({type(error).__name__}: {error})"
                return
            if not np.isfinite(embedding).all():
                self.flaw = "its embedding is not a number"
                return
            detector.step(embedding, 0)
            self.margins.append(detector.margin)
            self.calm_hops = self.calm_hops + 1 if detector.margin < 0 else 0
        self._at = recent[-1].number

    def compare(self, recent: Sequence[Hop]) -> dict[str, object]:
        """How the scores over these hops stand to those of the version in use. Sets `flaw` where they may not."""
        own, other = np.array(self.margins[-len(recent) :]), np.array([hop.margin for hop in recent])
        restless = float(((own >= 0) & (other < 0)).mean())
        if restless > RESTLESS:
            self.flaw = f"it is above its threshold in {restless:.0%} of {len(own)} hops where the version in use is not"
        both = np.isfinite(own) & np.isfinite(other)  # else one of them listened for nothing
        difference = own[both] - other[both]
        if not len(difference):
            return {}
        return {
            "hops": len(difference),
            "score_difference": round(float(difference.mean()), 3),
            "score_difference_max": round(float(np.abs(difference).max()), 3),
        }


class Awaited:
    """The engine that was asked for, prepared beside the one that listens for want of that; once for each version."""

    def __init__(self, prepare: Callable[[Model, str], Preparation] = Preparation) -> None:
        self._prepare = prepare
        self._preparation: Preparation | None = None
        self._tried: set[tuple[Path, str]] = set()

    def look(self, version: Version) -> str | None:
        """Call now and then: None = nothing new, "" = it can be loaded now, else why it cannot."""
        backend = version.engine.awaited
        wanted = version.model.path, backend
        if self._preparation is not None and wanted != (self._preparation.model.path, self._preparation.backend):
            self.close()  # of a version that does not listen any more
        if not backend or wanted in self._tried:
            return None
        if self._preparation is None:
            log.info("engine %s is made ready for %s in a process of its own", backend, version.model.id)
            try:
                self._preparation = self._prepare(version.model, backend)
            except OSError as error:  # no room for its output, or for one more process
                self._tried.add(wanted)
                return str(error)
        if not self._preparation.done():
            return None
        self._tried.add(wanted)
        why_not = self._preparation.why_not()
        self.close()
        return why_not

    def again(self) -> None:
        """What was tried may be tried again."""
        self._tried.clear()

    def close(self) -> None:
        """End what is under way."""
        if self._preparation is not None:
            self._preparation.close()
            self._preparation = None


# The exchange.


@dataclass(frozen=True)
class _Ready:
    newcomer: Newcomer
    before: float
    stamp: tuple[object, object]
    facts: dict[str, object] = field(default_factory=dict)


class Updates:
    """What the listener asks after each hop. All but the look and the switch is done by one thread beside it."""

    def __init__(
        self,
        version: Version,
        load: Callable[[bool], Version],
        store: Store,
        around: object,
        *,
        follows_promotion: bool = True,
        counted: bool = True,
        version_of: Callable[[Path | None], Version] | None = None,
        worker: Executor | None = None,
        prepare: Callable[[Model, str], Preparation] = Preparation,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`load` gives what should listen by now, with True from settings that are read again. `store` is for this object alone.

        Args:
            version: what the pipeline has.
            around: `Store.enrolment_stamp` from before it was loaded.
            worker: where the rest is done; else a thread.
            prepare: begins to make ready the engine that was asked for.
            follows_promotion: False where the model was named on the command line.
            counted: `boot` counted this start. A listener to a file, whose starts are not, judges no version either.
            version_of: a promoted one by its directory, None = the configured model. Where clips are kept the one before a round's listens
                along for a week, so that what it alone wakes at is among them, for `training.adaptation.look_back` to judge.
        """
        self._live = version
        self._version_of = version_of
        self._before: Version | None = None
        self._before_until_s = 0.0
        self._load = load
        self._store = store
        self._follows, self._counted = follows_promotion, counted
        self._clock, self._now = clock, now
        self._around = around
        self._live_stamp = self._seen = (store.model_stamp() if follows_promotion else None, self._around)
        here = version.model.path if version.model.path.parent == store.root / "models" else None
        if follows_promotion and store.current_model() != here:  # promoted while this one was loaded
            self._live_stamp = self._seen = (object(), self._seen[1])
        self._refused: set[object] = set()  # stamps of versions that are not tried again until they change
        self._reload = False
        self._worker = worker or ThreadPoolExecutor(1, "updates")
        self._awaited = Awaited(prepare)
        self._work: Future[_Ready | Event | Version | None] | None = None
        self._ready: _Ready | None = None
        self._touched = -1  # so that the first look is a whole one
        self._ready_at = 0  # number of the hop
        self._stream_s = 0.0
        started_s = clock()
        self._look_s = self._look_around_s = started_s
        self._steady_s: float | None = started_s + STEADY_S
        self._check_s = started_s + CHECK_S
        self._check_pause_s = CHECK_S
        self._checked_event = -1

    @property
    def model(self) -> str:
        """Id of the version that listens."""
        return self._live.model.id

    def reload(self) -> None:
        """Read settings, enrolments and model again at the next hop; from a signal handler too."""
        self._reload = True

    def step(self, pipeline: Pipeline, stream_s: float) -> list[Event]:
        """Call after each hop: looks, switches, and tells what happened."""
        self._stream_s = stream_s
        if self._ready is not None:
            return self._switch(pipeline, stream_s)
        if self._work is not None:
            return self._finish(pipeline, stream_s) if self._work.done() else []
        now_s = self._clock()
        if self._steady_s is not None and now_s >= self._steady_s:
            self._steady_s = None
            self._work = self._worker.submit(self._steady, pipeline.labels is not None)
            return []
        if self._before is not None and now_s >= self._before_until_s:
            self._dismiss(pipeline)
        if not self._reload and now_s - self._look_s < LOOK_S:
            return []
        self._look_s = now_s
        touched = self._store.models_touched() if self._follows else 0
        around = now_s - self._look_around_s >= LOOK_AROUND_S
        if touched == self._touched and not around and not self._reload:
            return []
        if len(pipeline.recent) >= COMPARED_HOPS:
            self._touched = touched
        if around:
            self._look_around_s = now_s
        stamp = self._stamp(around)
        prepared = False
        if around and len(pipeline.recent) >= COMPARED_HOPS and (why_not := self._awaited.look(self._live)) is not None:
            if why_not:
                return [self._stay(why_not)]
            prepared = True
        if (stamp != self._seen or self._reload or prepared) and len(pipeline.recent) >= COMPARED_HOPS:
            reread, self._reload, self._seen = self._reload, False, stamp
            other = stamp[0] != self._live_stamp[0] and stamp[0] not in self._refused
            if other or reread or prepared or stamp[1] != self._live_stamp[1]:
                if reread:
                    self._awaited.again()
                self._work = self._worker.submit(self._prepare, pipeline, stamp, reread, prepared, now_s)
        elif self._follows and self._counted and now_s >= self._check_s:
            self._check_s = now_s + self._check_pause_s
            self._work = self._worker.submit(self._check, stream_s)
        return []

    def close(self) -> None:
        """The listener has ended. Its engine stays open."""
        self._worker.shutdown(wait=True)
        found = self._work.result() if self._work is not None and not self._work.exception() else None
        for other in (found, self._ready, self._before):
            if isinstance(other, _Ready):
                other.newcomer.version.engine.close()
            elif isinstance(other, Version):
                other.engine.close()
        self._awaited.close()
        self._store.close()

    def _stamp(self, around: bool) -> tuple[object, object]:
        """Differs when the promoted version or an enrolment does.

        Enrolments count once they stay as they are for a look, because `edgekws enroll` makes the prototypes after the recordings.
        """
        enrolments = self._seen[1]
        if around:
            last, self._around = self._around, self._store.enrolment_stamp()
            enrolments = last if last == self._around else enrolments
        return (self._store.model_stamp() if self._follows else None, enrolments)

    def _finish(self, pipeline: Pipeline, stream_s: float) -> list[Event]:
        assert self._work is not None
        work, self._work = self._work, None
        if (error := work.exception()) is not None:  # a fault of ours must not end the listening
            log.error("updates: %s", error, exc_info=error)
            return []
        found = work.result()
        if isinstance(found, _Ready):
            self._ready, self._ready_at = found, pipeline.hops
            return self._switch(pipeline, stream_s)
        if isinstance(found, Version):
            self._before, pipeline.witness = found, (found.engine, found.detector)
            log.info("%s listens along, and does not act", found.model.id)
            return []
        return [found] if found is not None else []

    def _dismiss(self, pipeline: Pipeline) -> None:
        """The version before does not listen along any more."""
        pipeline.witness = None
        if self._before is not None:
            self._worker.submit(_let_go, self._before.engine)
            self._before = None

    def _switch(self, pipeline: Pipeline, stream_s: float) -> list[Event]:
        assert self._ready is not None
        ready = self._ready
        newcomer, version, old = ready.newcomer, ready.newcomer.version, self._live
        newcomer.follow(list(pipeline.recent))
        if newcomer.flaw is None and pipeline.hops - self._ready_at > PATIENCE_HOPS:
            newcomer.flaw = f"it was not below its threshold for {CALM_HOPS} hops in a row within {PATIENCE_HOPS}"
        if newcomer.flaw is not None:
            self._ready = None
            self._work = self._worker.submit(self._refuse, version.model.id, newcomer.flaw, ready.stamp, version.engine)
            return []
        if newcomer.calm_hops < CALM_HOPS or not pipeline.recent:
            return []
        pipeline.replace(version.engine, version.detector)
        engine_before = old.engine.name
        self._worker.submit(_let_go, old.engine)
        if ready.stamp[1] != self._live_stamp[1]:
            left = {(one.keyword, one.speaker) for one in version.detector.enrolled}
            self._worker.submit(self._forget, {(one.keyword, one.speaker) for one in old.detector.enrolled} - left, ready.stamp[1])
        self._dismiss(pipeline)
        self._steady_s = self._clock() + STEADY_S
        self._ready, self._live, self._live_stamp = None, version, ready.stamp
        self._check_s, self._check_pause_s, self._checked_event = self._clock() + CHECK_S, CHECK_S, -1
        heard = ", ".join(sorted({f'"{one.keyword}"' for one in version.detector.enrolled}))
        facts = {**ready.facts, "keywords": heard, "took_ms": round((self._clock() - ready.before) * 1000)}
        what, told = "reloaded", ", with what was read again"
        if version.engine.name != engine_before:
            what, told = "engine", f" on {version.engine.name} now, before on {engine_before}"
            facts |= {"engine": version.engine.name, "engine_before": engine_before}
        if version.model.id != old.model.id:
            what, told = "live", f" now, before it {old.model.id}"
            facts |= {"before": old.model.id}
        if not heard:
            facts |= {"reason": "there is nothing to listen for"}
            told += ": there is nothing to listen for, so nothing wakes it"
        log.warning("%s listens%s", version.model.id, told)
        return [model_event(version.model.id, what, self._now(), stream_s, **facts)]

    # On the thread.

    def _prepare(self, pipeline: Pipeline, stamp: tuple[object, object], reread: bool, prepared: bool, before: float) -> _Ready | Event:
        """A newcomer that is warm and may go live, or why there is none."""
        path = self._store.current_model()
        # Of what is loaded now, not of what was noticed: a version is not to blame that it does not hear who was removed a moment ago.
        stamp = (self._store.model_stamp() if self._follows else None, self._store.enrolment_stamp())
        engine: Engine | None = None
        try:
            try:
                version = self._load(reread)
            except ModelUnreadable:  # but who was removed, or is new, is so for the version that listens too
                if self._version_of is None or (not reread and stamp[1] == self._live_stamp[1]):
                    raise
                here = self._live.model.path
                version = self._version_of(here if here.parent == self._store.root / "models" else None)
            engine = version.engine
            other = version.model.path != self._live.model.path
            reason = flaw(version) if other else None
            missing = {one.keyword for one in self._live.detector.enrolled} - {one.keyword for one in version.detector.enrolled}
            if other and missing and not reread and stamp[1] == self._live_stamp[1]:
                reason = reason or f"""it cannot hear "{'", "'.join(sorted(missing))}" any more"""
            nothing_else = not other and not reread and stamp[1] == self._live_stamp[1]
            if prepared and nothing_else and version.engine.name == self._live.engine.name:
                _let_go(engine)
                return self._stay(engine.refused)
            facts: dict[str, object] = {}
            if reason is None:
                newcomer = Newcomer(version)
                recent = pipeline.snapshot()
                newcomer.follow(recent)
                if other and newcomer.flaw is None and recent:
                    facts = newcomer.compare(recent)
                reason = newcomer.flaw
                if reason is None:
                    return _Ready(newcomer, before, stamp, facts)
            return self._refuse(version.model.id, reason, stamp, engine)
        except Exception as error:  # whatever a damaged file makes NumPy, zipfile or a vendor's library raise
            known = isinstance(error, EdgekwsError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            if not known:
                log.exception("a new version could not be loaded")
            of_model = stamp[0] != self._live_stamp[0] and not isinstance(error, (ConfigError, StoreError))
            name = path.name if of_model and path else self.model
            return self._refuse(name, reason, stamp, engine, back=not isinstance(error, ModelUnreadable))

    def _refuse(self, name: str, reason: str, stamp: tuple[object, object], engine: Engine | None, *, back: bool = True) -> Event:
        """Let go of it; where the promoted version is to blame go back from it as well, but not from one that cannot be read now."""
        facts: dict[str, object] = {"version": name, "reason": reason}
        if engine is not None:
            _let_go(engine)
        if stamp[0] != self._live_stamp[0] and name != self.model:
            self._refused.add(stamp[0])
            if stamp[0] is not None and back:
                facts |= self._go_back(stamp[0])
        log.error("%s is refused, %s goes on: %s", name, self.model, reason)
        return model_event(self.model, "refused", self._now(), self._stream_s, **facts)

    def _stay(self, reason: str) -> Event:
        backend = self._live.engine.awaited
        log.error("engine %s cannot be had, %s goes on with %s: %s", backend, self.model, self._live.engine.name, reason)
        return model_event(self.model, "refused", self._now(), self._stream_s, version=f"engine {backend}", reason=reason)

    def _forget(self, gone: set[tuple[str, str]], removed_ns: object) -> None:
        """Delete what woke for them after their removal, which deleted all clips of theirs, until the switch."""
        try:
            if not isinstance(removed_ns, int):  # the directory cannot be read: nobody was removed
                return
            enrolled = {(one.keyword, one.speaker) for one in self._store.enrolments()}
            for keyword, speaker in gone - enrolled:
                self._store.forget_voice(keyword, speaker, since_s=removed_ns / 1e9 - REMOVAL_S)
        except StoreError as error:
            log.error("clips of a removed voice may be left: %s", error)

    def _go_back(self, stamp: object) -> dict[str, object]:
        try:
            with self._store.unchanged():
                if self._store.model_stamp() != stamp:  # somebody was quicker
                    return {}
                back = self._store.rollback()
        except StoreError as error:
            log.error("%s", error)
            return {"still_current": str(error)}
        return {"back_to": back.name if back else "the configured model"}

    def _steady(self, keeps_clips: bool) -> Version | None:
        """The start has not failed. The version that may listen along from now on."""
        if self._counted:
            with contextlib.suppress(StoreError):
                self._store.clear_starts()
        if self._version_of is None or not keeps_clips or ADAPTED not in self._live.model.raw["files"]:
            return None
        try:
            if self._store.current_model() != self._live.model.path:
                return None
            left_s = trial_ends_s(self._store, self.model) - self._now()
            if left_s <= 0:
                return None
            before = self._version_of(self._store.previous_model())
        except EdgekwsError as error:
            log.warning("the version before cannot listen along: %s", error)
            return None
        finally:
            self._store.close()
        self._before_until_s = self._clock() + min(left_s, WATCHED_S)  # the wall's clock may be years behind
        return before

    def _check(self, stream_s: float) -> Event | None:
        """Whether the version in use turned out worse than the one before; then back to that."""
        try:
            stamp = self._store.model_stamp()  # first, so that what is gone back from is what was judged
            path, last = self._store.current_model(), self._store.last_event()
            age_s = self._now() - self._store.promoted_s()
            own = path is not None and path == self._live.model.path
            self._check_pause_s = max(CHECK_S, min(age_s, WATCHED_S) / 20)
            over = age_s > WATCHED_S and self._now() > trial_ends_s(self._store, self.model)
            if over:
                self._before_until_s = 0.0  # the clock was behind, and was set; or it was not known that a day would be heard so soon
            if not own or last == self._checked_event or over:
                return None
            self._checked_event = last
            tally = self._store.tally(self.model, WATCHED_S)
            enrolled_s: dict[str, float] = {}
            for one in self._store.enrolments():  # a keyword's newest speaker
                enrolled_s[one.keyword] = max(one.time_s, enrolled_s.get(one.keyword, 0.0))
            reason = worse(tally, stream_s, enrolled_s) if tally else None
            if reason is None:
                return None
            if not (gone_back := self._go_back(stamp)):
                return None
            self._refused.add(stamp)
            log.error("%s is gone back from: %s", self.model, reason)
            return model_event(self.model, "rolled back", self._now(), stream_s, reason=reason, **gone_back)
        except StoreError as error:
            log.warning("%s", error)
            return None
        finally:
            self._store.close()


def _let_go(engine: Engine) -> None:
    """Of an engine, and of the memory that it had, which glibc would keep."""
    with contextlib.suppress(Exception):
        engine.close()
    with contextlib.suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)  # 0.4 ms


# Going back.


def boot(store: Store, load: Callable[[Path | None], Version], *, counted: bool = True) -> Version:
    """The promoted version; after three failed starts with it, or six boots of failed ones, or where it cannot be loaded, the one before
    it, and at last the default.

    Of one that cannot be read, or is of a later edgekws, another takes the place this once: that may pass.

    Args:
        load: takes the directory of a promoted version, or None for the configured model.
        counted: this start counts as failed until `Store.clear_starts`.

    Raises:
        ModelError, EngineUnavailable: none can be loaded.
    """

    def go_back(bad: Path, reason: str) -> Path | None:
        """What is current then. Where that was another by now nothing is gone back from: two services start at once, and both load it."""
        try:
            with store.unchanged():
                if store.current_model() != bad:
                    return store.current_model()
                back = store.rollback()
            log.error("%s is gone back from: %s", bad.name, reason)
            to = back.name if back else "the configured model"
            store.add_event(model_event(bad.name, "rolled back", time.time(), back_to=to, reason=reason))
        except StoreError as error:
            log.warning("%s", error)
        return store.current_model()

    current = store.current_model()
    if current is not None and counted:
        try:
            failed, boots = store.count_start(), store.failed_boots()
            if failed >= FAILED_STARTS or boots >= FAILED_BOOTS:
                which = f"{failed} starts in a row" if failed >= FAILED_STARTS else f"all starts in {boots} boots of the machine in a row"
                current = go_back(current, f"{which} with it ended within {STEADY_S:.0f} s")
        except StoreError as error:
            log.warning("%s", error)
    errors: list[tuple[Path, EdgekwsError]] = []
    for path in dict.fromkeys((current, store.previous_model() if current else None, None)):
        try:
            version = load(path)
        except (ModelError, EngineUnavailable) as error:
            if path is None:
                raise errors[0][1] if errors else error from None
            errors.append((path, error))
            continue
        for bad, reason in errors:
            if isinstance(reason, ModelUnreadable):
                log.error("%s stays the promoted version, and another listens until the next start: %s", bad.name, reason)
                break
            go_back(bad, str(reason))
        return version
    raise AssertionError("the configured model is always tried")


@contextlib.contextmanager
def start_counted(store: Store) -> Iterator[None]:
    """A start that ends in order, or by a fault that is not the model's, has not failed."""
    try:
        yield
    except (ModelError, EngineUnavailable) as error:
        if isinstance(error, ModelUnreadable):
            with contextlib.suppress(StoreError):
                store.clear_starts()
        raise
    except (EdgekwsError, KeyboardInterrupt, OSError):
        with contextlib.suppress(StoreError):
            store.clear_starts()
        raise
    with contextlib.suppress(StoreError):
        store.clear_starts()


def trial_ends_s(store: Store, model: str) -> float:
    """When the week on trial of the version that listens ends, seconds since the epoch.

    Later where it has listened for less than a day by then, after four weeks at the latest: a board that is off shows nothing.
    """
    since_s = store.promoted_s()
    heard_s = store.listened_s(model, LEAST_HEARD_H)
    return since_s + (LONGEST_TRIAL_S if heard_s is None else min(max(heard_s - since_s, WATCHED_S), LONGEST_TRIAL_S))


def worse(tally: Tally, stream_s: float, enrolled_s: Mapping[str, float]) -> str | None:
    """Why a version should give way to the one before it; None = it should not, or nothing is known.

    Its wakes, and the user's rejections, an hour of audio against those before it, by the exact test of two Poisson rates: given all of
    them, those of the newcomer are binomial with its share of the hours.

    Args:
        tally: of the version, `WATCHED_S` back.
        stream_s: seconds of the stream heard by now.
        enrolled_s: when each keyword was enrolled; the wakes of one that is newer than the version say nothing about it.
    """
    hours_before, hours = tally.hours
    hours += max(0.0, stream_s - tally.stream_s) / 3600
    if hours_before <= 0 or not 0 < hours <= WATCHED_S / 3600:
        return None
    wakes = {keyword: pair for keyword, pair in tally.wakes.items() if enrolled_s.get(keyword, 0.0) < tally.since_s}
    # All together, then each keyword by itself: a rare one that wakes at everything drowns beside a busy one.
    looks = [("wakes", list(wakes.values()), WAKES, WAKES_P), ("rejections by the user", list(tally.rejects.values()), REJECTS, REJECTS_P)]
    looks += [(f'wakes of "{keyword}"', [pair], OF_ONE_KEYWORD, WAKES_P / len(wakes)) for keyword, pair in wakes.items() if len(wakes) > 1]
    for name, pairs, least, level in looks:
        before, since = (sum(counts) for counts in zip((0, 0), *pairs, strict=True))
        if since >= least and more_often(before, hours_before, since, hours) < level:
            return f"{since} {name} in {hours:.1f} h, before it {before} in {hours_before:.1f} h"
    return None


def more_often(before: int, before_hours: float, after: int, after_hours: float) -> float:
    """Chance of so many events after, or more, if the rate had at most grown `MORE` times."""
    total = before + after
    share = MORE * after_hours / (before_hours + MORE * after_hours)

    def log_chance(k: int) -> float:
        ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return ways + k * math.log(share) + (total - k) * math.log1p(-share)

    return min(1.0, math.fsum(math.exp(log_chance(k)) for k in range(after, total + 1)))
