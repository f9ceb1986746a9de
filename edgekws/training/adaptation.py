"""`edgekws adapt`: from the clips in the state directory to a version that listens, or to a reason why not.

A round is a process of its own. Whatever happens to it, the listener goes on with the version it has: nothing under the state directory
changes but one folder that the next round clears, the states of clips, and at the very end two links. Each round leaves an event.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.config import KeywordSettings
from edgekws.errors import (
    EdgekwsError,
    EngineUnavailable,
    EnrolmentError,
    ModelError,
    NotInstalled,
    StoreError,
    UsageError,
    install_command,
)
from edgekws.evaluation import WORSE, sign_test
from edgekws.model import Model, builtin_models, find_model, load_model
from edgekws.power import SYSFS, NoMeter, Recording, load_meter
from edgekws.power.conditions import free_memory_mb, hottest_c, on_battery
from edgekws.promotion import model_event, trial_ends_s
from edgekws.store import ADAPTED, GOING, Store
from edgekws.training.round import MANY, Moment, Outcome, Snapshot, Target, Voice, adapt, criterion_of, told_apart
from edgekws.values import Clip, Event, befell

# Networks of one embedding space, since they learned from one teacher: any of them can give a second opinion, and pruning may start from a
# small one. ResNet15 does not ship, and is here for benchmarks: an opinion is a score, whatever the space.
JUDGE = {"edge": "ds-cnn-l", "edge-small": "ds-cnn-l", "edge-tiny": "ds-cnn-l", "ds-cnn-l": "edge", "resnet15": "edge"}
STARTS = {"edge": ("edge-small", "edge-tiny")}
MOST = {"positive": 200, "ambience": 360, "near": 200, "doubtful": 200}  # the latest; an hour of ambience

MOST_LOOKED_AT = 400  # the latest clips: about 13 s of CPU time
# Over the week in which the version before listens along: who is as well off with either loses nothing by going back, so the new one must
# have heard about as much. Set after a life that got worse had lost 11 words and gained 5 of 70, which chance does in 0.11 of cases
# (6 and 1 by what is taken for a word now, 0.06).
WORSE_AT_LAST = 0.2

NEW_POSITIVES = MANY  # since the last round
AMBIENCE_PIECES = 30  # five minutes
BETWEEN_ROUNDS_S = 20 * 3600.0
REJECTED = 2  # wakes that the owner called wrong
MISSED = 0.5  # as many moments that nearly woke as half the wakes: it may be missing some
DRIFT = 0.3  # that the median score of a voice's wakes fell by: a threshold so much lower gives twice as many false wakes
BUSY_LOAD = 0.7  # of each core, in the last five minutes
PURGED = 0.2  # of the wakes that a round learned from: its owner wants them gone
HOT_C = 75.0
LEAST_FREE_MB, LEAST_FREE_UNTRAINED_MB = 1500.0, 400.0  # training takes under 1 GB, prototypes alone 190 MB
ONCE_MORE = {"onda1": "", "weights-only": "without pruning", "prototypes": "without training"}  # what is tried, one after the other
WRONG = ("negative", "confirmed")  # label and state of a wake that the owner called wrong
# As NumPy, the kernel, PyTorch, ONNX Runtime and oneDNN say it. Where OpenBLAS meets it first the process ends, and the next round tells.
NO_MEMORY = ("Unable to allocate", "allocate memory", "bad_alloc", "could not create a primitive")


@dataclass(frozen=True)
class Board:
    """How the machine is doing; None = cannot be read."""

    load: float | None
    """Processes that want to run, of each core, over five minutes."""
    hottest_c: float | None
    free_mb: float | None
    on_battery: bool = False

    @classmethod
    def now(cls, sysfs: Path = SYSFS) -> Board:
        return cls(os.getloadavg()[1] / (os.cpu_count() or 1), hottest_c(sysfs), free_memory_mb(), on_battery(sysfs))


def why_not(store: Store, board: Board, now_s: float, keywords: Mapping[str, KeywordSettings] | None = None) -> tuple[str | None, str]:
    """Why there should be no round now, None if there should be; and what speaks for one."""
    listened_for = {one.keyword for one in store.enrolments() if _chosen(one.keyword, keywords).enabled}
    if not listened_for:
        return "nothing that is listened for is enrolled: there is no voice to learn", ""
    # A clock that was set back must not stop rounds for good: one that was in its future does not count.
    ends = ("promoted", "refused")
    rounds = [e for e in _events(store, "round") if e.extra.get("what") in ends and e.time_s <= now_s]
    # One that was overtaken said nothing of what it had heard: who was enrolled meanwhile would wait for new wakes.
    rounds = [e for e in rounds if not (e.extra.get("dry_run") or e.extra.get("overtaken"))]
    last_s = rounds[-1].time_s if rounds else 0.0
    clips = [clip for clip in store.clips() if clip.state != "rejected" and clip.keyword in ("", *listened_for)]
    new = [clip for clip in clips if clip.label == "positive" and clip.time_s > last_s]
    room = [clip for clip in clips if clip.label == "negative" and not clip.keyword]
    if now_s - last_s < BETWEEN_ROUNDS_S:
        return f"the last round was {(now_s - last_s) / 3600:.1f} h ago, the next is due after {BETWEEN_ROUNDS_S / 3600:.0f} h", ""
    if len(new) < NEW_POSITIVES:
        return f"{len(new)} wakes were kept since the last round, {NEW_POSITIVES} are enough", ""
    if len(room) < AMBIENCE_PIECES:
        return f"{len(room)} pieces of the room were kept, {AMBIENCE_PIECES} are enough", ""
    reason = _asked_for(clips, new, any(e.extra["what"] == "promoted" for e in rounds), last_s)
    if reason is None:
        return "nothing asks for it: wakes score as they did, few are near misses, and none was called wrong", ""
    if board.load is not None and board.load > BUSY_LOAD:
        return f"the machine is busy (load {board.load:.1f} a core, accepted {BUSY_LOAD})", reason
    if board.hottest_c is not None and board.hottest_c > HOT_C:
        return f"the machine is hot ({board.hottest_c:.0f} °C, accepted {HOT_C:.0f})", reason
    least_mb = LEAST_FREE_MB if importlib.util.find_spec("torch") else LEAST_FREE_UNTRAINED_MB
    if board.free_mb is not None and board.free_mb < least_mb:
        return f"memory is short ({board.free_mb:.0f} MB free, wanted {least_mb:.0f})", reason
    if board.on_battery:
        return "the machine runs on its battery", reason
    return None, reason


def _asked_for(clips: Sequence[Clip], new: Sequence[Clip], adapted: bool, last_s: float) -> str | None:
    if not adapted:
        return "it was never adapted to this room"
    wrong = [c for c in clips if (c.label, c.state) == WRONG and c.keyword and c.time_s > last_s]
    if len(wrong) >= REJECTED:
        return f"{len(wrong)} wakes were called wrong"
    missed = [c for c in clips if c.label == "between" and c.time_s > last_s]
    if len(missed) >= MISSED * len(new):
        return f"{len(missed)} moments nearly woke, beside {len(new)} wakes"
    # Of the version that listens, and each voice by itself: another's scores are others, and so is the mean of two where one is used more.
    heard: dict[tuple[str, str], list[float]] = {}
    for clip in clips:
        if clip.label == "positive" and clip.model == new[-1].model:
            heard.setdefault((clip.keyword, clip.speaker), []).append(clip.score)
    for voice, scores in heard.items():
        half = len(scores) // 2
        if half >= NEW_POSITIVES and (fell := float(np.median(scores[:half]) - np.median(scores[half:]))) > DRIFT:
            return f"the later half of the wakes of {_who(*voice)} scores {fell:.1f} lower than the earlier half"
    before = sum(clip.label == "positive" for clip in clips) - len(new)
    if len(new) >= before:
        return f"{len(new)} wakes were kept since the last round, and {before} before it"
    return None


def _events(store: Store, kind: str) -> list[Event]:
    found: list[Event] = []
    after = 0
    while events := store.events(after=after):
        after = events[-1].id
        found += [event for event in events if event.kind == kind]
    return found


def snapshot(
    store: Store,
    say: Callable[[str], object] = lambda line: None,
    keywords: Mapping[str, KeywordSettings] | None = None,
    threshold_offset: float = 0.0,
) -> tuple[Snapshot, dict[int, Clip]]:
    """What a round learns from, and the clips by id. A clip that cannot be read is said and left out.

    Clips of what is not enrolled or listened for (any more) are left out too: nothing could judge them.
    """
    voices = _voices(store, keywords, threshold_offset, say)
    known_as = {("", ""), *((one.keyword, one.speaker) for one in voices)}
    clips = [clip for clip in store.clips() if clip.state != "rejected" and (clip.keyword, clip.speaker) in known_as]
    parts: dict[str, list[Clip]] = {"positive": [], "ambience": [], "near": [], "doubtful": []}
    for clip in clips:
        if clip.label == "negative":
            parts["near" if clip.keyword else "ambience"].append(clip)
        else:
            parts["positive" if clip.label == "positive" or clip.state == "confirmed" else "doubtful"].append(clip)
    known: dict[int, Clip] = {}

    def moments(part: str) -> list[Moment]:
        found = _moments(store, parts[part], MOST[part], say)
        known.update((clip.id, clip) for clip, _ in found)
        return [moment for _, moment in found]

    ambience = [one.samples for one in moments("ambience")]
    return Snapshot(voices, moments("positive"), ambience, moments("near"), moments("doubtful")), known


def _voices(
    store: Store,
    keywords: Mapping[str, KeywordSettings] | None = None,
    threshold_offset: float = 0.0,
    say: Callable[[str], object] = lambda line: None,
) -> list[Voice]:
    """Whoever is listened for, as the listener has them: by the enrolment, and by the configuration where that says otherwise.

    One whose recordings cannot be read is said and left out, as the listener does.
    """
    found = []
    for one in store.enrolments():
        chosen = _chosen(one.keyword, keywords)
        if not chosen.enabled:
            continue
        try:
            takes = one.recordings()
        except StoreError as error:
            say(f"left out: {error}")
            continue
        offset = threshold_offset + chosen.threshold_offset
        found.append(Voice(one.keyword, one.speaker, takes, chosen.for_enrolled(one.only_enrolled), one.id, offset))
    return found


def _chosen(keyword: str, keywords: Mapping[str, KeywordSettings] | None) -> KeywordSettings:
    return (keywords or {}).get(keyword, KeywordSettings())


def _moments(store: Store, clips: Sequence[Clip], most: int, say: Callable[[str], object]) -> list[tuple[Clip, Moment]]:
    """The latest of these clips with their audio, oldest first. One that cannot be read is said and left out."""
    found = []
    for clip in sorted(clips, key=lambda one: one.time_s)[-most:]:
        try:
            samples = store.clip_samples(clip)
        except StoreError as error:
            say(f"left out: {error}")
            continue
        found.append((clip, Moment(samples, clip.decided_sample, clip.keyword, clip.speaker, clip.state == "confirmed", clip.id)))
    return found


def look_back(
    store: Store,
    model: str,
    *,
    keywords: Mapping[str, KeywordSettings] | None = None,
    threshold_offset: float = 0.0,
    say: Callable[[str], object] = lambda line: None,
    rest: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.time,
) -> str | None:
    """Go back from the version that listens where it hears less of its owner than the one before it would have. Why; None = it stays.

    Both are run on the clips of the week in which the one before listened along, which neither has learned from: what woke either, and
    what nearly woke. The gate had but what was heard before the round, and for one owner of twenty that did not tell. Each voice is looked
    at by itself, and once the week is over a last time.

    Args:
        model: the configured factory network, by name or path.
        keywords, threshold_offset: the operator's choices, by keyword, and for all.
    """
    current, factory = store.current_model(), load_model(find_model(model))
    family = _family(factory)
    if current is None or family is None:
        return None
    try:
        live, previous, voices = load_model(current), store.previous_model(), _voices(store, keywords, threshold_offset, say)
        if ADAPTED not in live.raw["files"]:  # promoted by hand, and not a round's
            return None
        known_as, since_s = {(one.keyword, one.speaker) for one in voices}, store.promoted_s()
        until_s = trial_ends_s(store, live.id)
        if any(e.model == live.id and e.extra.get("what") == "kept" and e.time_s >= since_s for e in _events(store, "model")):
            return None
        # Also wakes that a later round rejected: it asked the factory network, which may be the version before.
        clips = [clip for clip in store.clips() if clip.model == live.id and since_s < clip.time_s < until_s]
        clips = [clip for clip in clips if (clip.keyword, clip.speaker) in known_as and (clip.label, clip.state) != WRONG]
        # Other speech that was not near crowds out no word.
        clips.sort(key=lambda clip: (clip.label != "negative", clip.time_s))
        moments = [moment for _, moment in _moments(store, clips[-MOST_LOOKED_AT:], MOST_LOOKED_AT, say)]
        before = load_model(previous) if previous else factory
        found = told_apart(live, before, load_model(find_model(family)), voices, moments, rest) if moments else {}
    except (ModelError, EngineUnavailable, EnrolmentError) as error:
        say(f"not looked back on: {error}")
        return None
    voice, (lost, gained) = min(found.items(), key=lambda one: sign_test(*one[1]), default=(("what was heard", ""), (0, 0)))
    differ = [pair for pair in found.values() if any(pair)]
    reason = f"of {_who(*voice)} since then the version before alone hears {lost}, it alone {gained}"
    with store.unchanged():
        if store.current_model() != current:
            return None
        over = now() >= until_s
        if not fell(lost, gained, len(differ), at_last=over):
            if over:  # else chance would be asked again, night after night, while its clips are dropped one by one
                _add_event(store, model_event(live.id, "kept", now(), reason=reason))
            return None
        back = store.rollback()
    name = back.name if back else "the configured model"
    _add_event(store, model_event(live.id, "rolled back", now(), back_to=name, reason=reason))
    return f"{name} listens again, since {live.id} hears less of its owner: {reason}"


def on_trial(store: Store, live: Model, now_s: float) -> bool:
    """Whether a round made the version that listens, and its week is not over."""
    return ADAPTED in live.raw["files"] and now_s < trial_ends_s(store, live.id)


def _came_back(store: Store, name: str) -> bool:
    """Whether this version listens since one promoted after it was gone back from."""
    told = [event for kind in ("model", "round") for event in _events(store, kind)]
    told = [event for event in told if "back_to" in event.extra or event.extra.get("what") == "promoted"]
    return bool(told) and max(told, key=lambda event: event.id).extra.get("back_to") == name


def fell(lost: int, gained: int, voices: int = 1, *, at_last: bool = False) -> bool:
    """Whether a version hears less of its owner than the one before, by the words that only one of the two hears: five and none, or more.

    Looked at night after night, chance passes this more often than once. Who is as well off with either version loses little then, and
    whom a round has helped has far more words gained than lost.

    Args:
        voices: so many were asked, and this one has lost most: of several by chance one looks worse than one alone would.
        at_last: the week is over. Three and none are enough then.
    """
    return sign_test(lost, gained) < (WORSE_AT_LAST if at_last else WORSE) / max(1, voices)


def _who(keyword: str, speaker: str) -> str:
    return f"{keyword} ({speaker})" if speaker else keyword


def _family(factory: Model) -> str | None:
    """The network that gives a second opinion beside a packaged one."""
    return JUDGE.get(factory.network) if factory.path == builtin_models().get(factory.network) else None


def run(
    store: Store,
    model: str,
    *,
    keywords: Mapping[str, KeywordSettings] | None = None,
    threshold_offset: float = 0.0,
    recipe: str | None = None,
    criterion: str | None = None,
    target: Target | None = None,
    promote: bool = True,
    seed: int = 0,
    steps: int | None = None,
    asked_by: str = "by hand",
    recording: Recording | None = None,
    say: Callable[[str], object] = lambda line: None,
    step_done: Callable[[int, int], object] = lambda done, total: None,
    rest: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.time,
) -> tuple[Outcome, Model | None]:
    """A round: the gate's verdict, and the version that listens from now on, None if it is the one that did.

    Args:
        model: the configured factory network, by name or path.
        keywords, threshold_offset: the operator's choices, by keyword, and for all.
        recipe: None = prototypes where PyTorch is not installed, else onda1, as far as `adapt` prunes; where the gate refuses that and
            nothing else was asked for, weights-only too, and prototypes, unless a pruned version listens, beside which those are too slow.
        promote: False leaves everything as it is, whatever the gate says.
        steps: of training, None = the recipe's.
        recording, rest: as `adapt` has them.

    Raises:
        NotInstalled: what was asked for trains, and what that needs is not there.
        UsageError: no such recipe or criterion, one of them or a target with a recipe that prunes nothing, or a target out of reach.
        StoreError: another round is under way, or the state directory cannot be read or written.
        EdgekwsError: nothing is enrolled, or training failed. Nothing was changed.
    """
    asked = recipe is not None or criterion is not None or target is not None
    recipes = [recipe or "onda1"] if asked else list(ONCE_MORE)
    if recipe in ("weights-only", "prototypes") and (criterion or target):
        raise UsageError(
            f"--{'target' if target else 'criterion'} goes with a recipe that prunes, and {recipe} does not. Try: --recipe onda1"
        )
    if (missing := lacks()) and recipe != "prototypes":
        if asked:
            raise NotInstalled(f"to train needs {missing}, which", "train")
        recipes = ["prototypes"]
        say(f"{missing} is not installed ({install_command('train')}), so nothing is trained: prototypes alone move")
    criterion_of(recipes[0], criterion)
    if target and target.kind == "energy_mj":  # told by now, and not after minutes
        with contextlib.closing(load_meter()) as meter:
            if isinstance(meter, NoMeter):
                raise UsageError(f"no target in energy_mj here: {meter.why}. Give params=… or latency_ms=…")
    factory = load_model(find_model(model))
    family = _family(factory)
    if family is None:
        say(f"no second opinion, and no looking back: {model} is not one of the networks that ship. All wakes that were kept are learned")
    going_live = ""
    with store.round_folder() as folder:
        current = store.current_model()
        _tell_of_the_killed(store, now)
        _note(store, "started", now(), reason=asked_by)
        try:
            known = {one.id for one in store.enrolments()}
            heard, clips = snapshot(store, say, keywords, threshold_offset)
            if not asked and not missing and current is not None and load_model(current).parameters < factory.parameters:
                recipes = ["onda1"]
            while recipes:
                one = recipes.pop(0)
                outcome = adapt(
                    factory,
                    heard,
                    folder / one,
                    id=_id(store, heard),
                    recipe=one,
                    criterion=criterion,
                    target=target,
                    starts=[load_model(find_model(name)) for name in STARTS.get(factory.network, ())] if family else (),
                    incumbent=load_model(current) if current else None,
                    judge=load_model(find_model(family)) if family else None,
                    seed=seed,
                    steps=steps,
                    recording=recording,
                    say=say,
                    step_done=step_done,
                    rest=rest,
                )
                if family and promote:
                    _mark(store, clips, outcome)
                cost = outcome.facts["cost"]
                went = outcome.facts["recipe"]["name"]
                facts: dict[str, Any] = {"recipe": went, "parameters": outcome.model.parameters, "round_s": cost["round_s"]}
                facts["energy_j"] = cost["energy_j"]
                if not promote:
                    facts["dry_run"] = True  # counts as no round
                recipes = [other for other in recipes if other != went]
                if outcome.passed or not recipes:
                    break
                say(f"the gate refuses it: {outcome.reason}. Once more {ONCE_MORE[recipes[0]]}")
                _note(store, "refused", now(), reason=outcome.reason, **facts)
                _note(store, "started", now(), reason=f"once more, {ONCE_MORE[recipes[0]]}")
            with store.unchanged():  # from the last look to the promotion: what is removed meanwhile would go live unseen
                if outcome.passed and (why := _overtaken(store, current, heard, outcome, known, keywords)):
                    outcome = replace(outcome, passed=False, reason=why)
                    facts["overtaken"] = True  # counts as no round
                if not outcome.passed or not promote:
                    _note(store, "refused" if not outcome.passed else "tried", now(), reason=outcome.reason, **facts)
                    return outcome, None
                # What takes the place of a version on trial is on trial against the same one before: else each of a row of rounds could
                # lose a little. One that was gone back to has had its trial, and is what one would go back to.
                instead = current is not None and on_trial(store, load_model(current), now()) and not _came_back(store, current.name)
                going_live = outcome.model.id
                live = load_model(store.promote(outcome.model.path, outcome.model.id, keeps_previous=instead))
        except BaseException as error:  # Ctrl-C and a full disk too: the log says so, if it can
            if going_live and _listens(store, going_live):  # the links were exchanged before it
                _note(store, "promoted", now(), model=going_live, reason=outcome.reason, **facts)
                raise
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            if no_memory := any(words in reason for words in NO_MEMORY):
                reason = f"memory ran out ({reason.splitlines()[0]}). A round needs 1 to 2 GB"
            _note(store, "failed", now(), reason=reason)
            if no_memory:
                raise EdgekwsError(f"the round failed, and nothing was changed: {reason}") from error
            raise
        _note(store, "promoted", now(), model=live.id, reason=outcome.reason, **facts)
        return outcome, live


def lacks() -> str:
    """What training needs and this installation does not have; "" if it has everything.

    Raises:
        EdgekwsError: it is there and cannot be loaded, as where a library of CUDA is missing.
    """
    for name in ("torch", "torch_pruning", "onnx"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return error.name or name
        except (ImportError, OSError) as error:
            raise EdgekwsError(f"adapt needs {name}, which is installed and cannot be loaded: {error}. Try: edgekws doctor") from error
    return ""


def _id(store: Store, heard: Snapshot) -> str:
    numbers = [int(name[:4]) for name in store.models() if name[:4].isdigit()]
    return f"{max(numbers, default=0) + 1:04d}-{heard.sha256()[:6]}"


def _listens(store: Store, version: str) -> bool:
    with contextlib.suppress(StoreError):
        current = store.current_model()
        return current is not None and current.name == version
    return False


def _overtaken(
    store: Store,
    current: Path | None,
    heard: Snapshot,
    outcome: Outcome,
    known: Collection[str],
    keywords: Mapping[str, KeywordSettings] | None = None,
) -> str | None:
    """Why a version that is good must not listen: what happened while it was made.

    Args:
        known: ids of the enrolments before that, of voices that could not be read too.
    """
    if store.current_model() != current:
        return "another version listens since it was begun, and it was compared with the one before"
    enrolled = {one.id: one for one in store.enrolments()}
    if gone := [voice for voice in heard.voices if voice.id not in enrolled]:
        return f"{_who(gone[0].keyword, gone[0].speaker)}, whom it learned from, was removed or enrolled anew since it was begun"
    known = {*known, *(voice.id for voice in heard.voices)}
    if new := [one for id, one in enrolled.items() if id not in known and _chosen(one.keyword, keywords).enabled]:
        return f"{_who(new[0].keyword, new[0].speaker)} was enrolled since it was begun, and it was not tried on that voice"
    clips = {clip.id: clip for clip in store.clips()}
    purged = sum(one.id not in clips or clips[one.id].reason == GOING for one in outcome.admitted)
    if purged > PURGED * len(outcome.admitted):  # the caps on age and size take a few of them too
        return f"{purged} of the {len(outcome.admitted)} wakes that it learned from were purged since it was begun"
    wrong = {clip.id for clip in clips.values() if (clip.label, clip.state) == WRONG}
    if count := sum(one.id in wrong for one in outcome.admitted):
        return f"{count} of the wakes that it learned from were called wrong since it was begun"
    return None


def _mark(store: Store, clips: dict[int, Clip], outcome: Outcome) -> None:
    """What two networks said of each clip that nobody had looked at, nor has meanwhile."""
    for moments, state, reason in (
        (outcome.admitted, "admitted", "two networks together hear it"),
        (outcome.rejected, "rejected", "two networks together do not hear it as they hear the others"),
    ):
        for moment in moments:
            if moment.id in clips:
                with contextlib.suppress(StoreError):  # a full disk: the round is worth more than its notes
                    store.settle_clip(moment.id, state, reason)


def _note(store: Store, what: str, now_s: float, *, model: str = "", **facts: Any) -> None:
    """An event; a log that cannot be written stops no round."""
    _add_event(store, befell("round", model, now_s, what=what, **facts))


def _add_event(store: Store, event: Event) -> None:
    with contextlib.suppress(StoreError):
        store.add_event(event)


def _tell_of_the_killed(store: Store, now: Callable[[], float]) -> None:
    """A round that began and never said how it ended was killed, or the power went."""
    rounds = [event for event in _events(store, "round") if event.extra.get("what") != "skipped"]
    if rounds and rounds[-1].extra.get("what") == "started":
        current = store.current_model()  # a round may be killed right after the promotion
        listens = current.name if current else "the configured model"
        _note(store, "cut short", now(), reason=f"it was killed, or the power went; {listens} goes on listening")


def report(outcome: Outcome, live: Model | None) -> dict[str, Any]:
    """For scripts."""
    held = outcome.facts["metrics"]["held_out"]
    return {
        "promoted": live is not None,
        "passed": outcome.passed,
        "reason": outcome.reason,
        "model": outcome.model.id,
        "parameters": outcome.model.parameters,
        "admitted": len(outcome.admitted),
        "rejected": len(outcome.rejected),
        "held_out": held,
        **outcome.facts["cost"],
    }
