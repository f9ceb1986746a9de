"""DELIVER: events to the store, to a stream of lines, to a command; on one thread, so that listening never waits for a disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from queue import Empty, Full, Queue
from typing import Protocol, TextIO, cast

import numpy as np

from edgekws.errors import EdgekwsError, StoreError, printable
from edgekws.store import Store
from edgekws.values import Clip, Event

log = logging.getLogger(__name__)

QUEUE_EVENTS = 1000
QUEUE_CLIPS = 12  # at most 4 MB
FILES = 1000  # names of clips that a later one may be like: of twenty keywords
COMMANDS = 4  # of the operator's that may run at once
CUT_SHORT = "ended without a word: it was killed, or the power went"
UNREAD_CHARACTERS = 200_000  # wait at most for whoever reads the output: several hundred wakes as JSON
UNREAD_S = 1.0  # that output waits for its reader; from then on nobody waits, until it is read again
QUIET_S = 60.0  # between two complaints of one kind


class Sink(Protocol):
    """Where events go. Called on the delivery's thread only."""

    def deliver(self, event: Event) -> None:
        """Raises EdgekwsError when it cannot; the next event is tried again."""

    def close(self) -> None:
        """The last event was delivered."""


class Delivery:
    """One thread and a bounded queue between the listener and its sinks."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        on_failure: Callable[[], object] = lambda: None,
        queue_events: int = QUEUE_EVENTS,
        *,
        keep: Callable[[Clip, np.ndarray], object] | None = None,
        tidy: Callable[[], bool] = lambda: False,
        tidy_s: float = 3600.0,
    ) -> None:
        """
        Args:
            on_failure: called, on the delivery's thread, when a sink broke for good: the listener should end and call `close()`.
            keep: takes clips, on the delivery's thread; one that it raises for is lost. None: clips are not wanted.
            tidy: called, on the delivery's thread, where nothing came for `tidy_s`, and again as long as it says so and nothing comes.
        """
        self.dropped = 0
        """Events that found the queue full."""
        self.clips_dropped = 0
        """Clips that found it full, or that could not be kept."""
        self._keep = keep
        self._tidy, self._tidy_s = tidy, tidy_s
        self._clips = threading.Semaphore(QUEUE_CLIPS)
        self._sinks = list(sinks)
        self._lost = {_name(sink): 0 for sink in sinks}
        self._on_failure = on_failure
        self._queue: Queue[Event | tuple[Clip, np.ndarray] | threading.Event | None] = Queue(queue_events)
        self._failure: BaseException | None = None
        self._complaints = Complaints()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def put(self, event: Event, *, wait: bool = False) -> None:
        """Hand an event over. When the queue is full it is counted as dropped, or waited for where time does not press."""
        try:
            self._queue.put(event, block=wait)
        except Full:
            self.dropped += 1
            self._complaints.say(f"the sinks are too slow: {self.dropped} events dropped", kind="dropped")

    def put_clip(self, clip: Clip, samples: np.ndarray, *, wait: bool = False) -> None:
        """Hand a clip over, behind the events so far. At most `QUEUE_CLIPS` wait, so that a stalled disk costs clips and not memory."""
        if self._keep is None:
            return
        if self._clips.acquire(blocking=wait):
            try:
                self._queue.put((clip, samples), block=wait)
                return
            except Full:
                self._clips.release()
        self.clips_dropped += 1
        self._complaints.say(f"the disk is too slow: {self.clips_dropped} clips were not kept", kind="clips")

    def settle(self, timeout_s: float) -> None:
        """Wait until what was handed over so far was delivered or lost, but no longer than that."""
        settled = threading.Event()
        with contextlib.suppress(Full):
            self._queue.put(settled, timeout=timeout_s)
            settled.wait(timeout_s)

    def drops(self) -> dict[str, int]:
        """Events that did not arrive, by where: in the queue before all sinks, or in a sink that was full or broken. For any thread."""
        return {"queue": self.dropped, **self._lost}

    def close(self) -> None:
        """Deliver what waits, close the sinks; raise what broke one of them."""
        self._queue.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _next(self) -> Event | tuple[Clip, np.ndarray] | threading.Event | None:
        pause_s = self._tidy_s
        while True:
            try:
                return self._queue.get(timeout=pause_s)
            except Empty:
                pause_s = self._tidy_s
            try:
                if self._tidy():
                    pause_s = 0.0
            except EdgekwsError as error:
                self._complaints.say(str(error), kind=StoreSink.__name__)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Event):
                for sink in list(self._sinks):
                    self._try(sink, sink.deliver, item)
            elif isinstance(item, threading.Event):
                item.set()
            elif self._keep is not None:
                try:
                    self._keep(*item)
                except EdgekwsError as error:
                    self.clips_dropped += 1
                    self._complaints.say(str(error), kind=StoreSink.__name__)  # which said it of its events, if these were lost too
                except Exception:  # events go on
                    self.clips_dropped += 1
                    log.exception("a clip was not kept")
                finally:
                    self._clips.release()
        for sink in list(self._sinks):
            self._try(sink, sink.close)

    def _try(self, sink: Sink, call: Callable[..., None], *event: Event) -> None:
        """One that breaks is left out from then on, and the others go on."""
        try:
            call(*event)
        except EdgekwsError as error:
            self._lost[_name(sink)] += len(event)
            self._complaints.say(str(error), kind=type(sink).__name__)
        except BaseException as error:
            if not isinstance(error, OSError):  # a closed pipe, a full disk behind stdout
                log.exception("%s broke", type(sink).__name__)
            self._sinks.remove(sink)
            self._failure = error
            self._on_failure()


def _name(sink: Sink) -> str:
    """mqtt, command, store ..."""
    return re.sub("Sink|Socket", "", type(sink).__name__).lower()


class Complaints:
    """Says each kind of trouble at once, then at most once a minute, with how often it came in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def say(self, text: str, kind: str) -> None:
        last_s, missed = self._last.get(kind, (float("-inf"), 0))
        if self._clock() - last_s < QUIET_S:
            self._last[kind] = last_s, missed + 1
            return
        self._last[kind] = self._clock(), 0
        log.error("%s%s", text, f" (and {missed} times more since the last such line)" if missed else "")


def as_json(event: Event) -> str:
    """One line. The keys are what scripts rely on."""
    extra = {name: value for name, value in event.extra.items() if name != "file"}  # the store's: the log reads back what was printed
    fields = {
        "kind": event.kind,
        "time": _utc(event.time_s).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "time_s": round(event.time_s, 3),
        "stream_s": round(event.stream_s, 3),
        "keyword": event.keyword,
        "speaker": event.speaker,
        "score": round(event.score, 4),
        "threshold": round(event.threshold, 4),
        "latency_ms": round(event.latency_ms, 3),
        "model": event.model,
        **({"id": event.id} if event.id else {}),
        **({"extra": extra} if extra else {}),
    }
    return json.dumps(fields, ensure_ascii=False)


def as_line(event: Event, *, date: bool = False) -> str:
    """For people: time in the stream, or with `date` the local date and time."""
    when = f"{_utc(event.time_s).astimezone():%Y-%m-%d %H:%M:%S}" if date else f"{event.stream_s:9.2f} s"
    return f"{when}  {words(event)}"


def words(event: Event) -> str:
    """What happened, for people, in one printable line."""
    return printable(_words(event))


def _words(event: Event) -> str:
    facts = event.extra
    who = f"{event.keyword} ({event.speaker})" if event.speaker else event.keyword
    if event.kind == "wake":
        return f"{who}  score {event.score:.2f} / {event.threshold:.2f}  latency {event.latency_ms:.2f} ms"
    if event.kind == "model":
        return _model_line(event)
    if event.kind == "round":
        return _round_line(event)
    if event.kind == "gap" and not facts.get("lost_ms") and "reason" in facts:
        return f"gap: {facts['reason']}"
    if event.kind == "gap" and facts.keys() == {"lost_ms"}:
        return f"gap: {facts['lost_ms'] or 'less than 1'} ms of audio were lost"
    if event.kind == "reject" and "wake" in facts:
        return f"reject: {who} was no wake, the user says (event {facts['wake']})"
    if event.kind == "start" and "source" in facts:
        before = f"; the listener before it {facts['before']}" if "before" in facts else ""
        return f"start: listening to {facts['source']} with {event.model}{before}"
    if event.kind == "stop" and "audio_s" in facts:
        clips = facts.get("clips")
        kept = f", {_kept(clips)}" if isinstance(clips, dict) else ""
        return f"stop: after {facts['audio_s']} s of audio, {facts.get('wakes')} wakes{kept}"
    if event.kind == "bench" and "backend" in facts:
        energy = facts.get("energy_mj_per_hop")
        drawn = "energy not measured" if energy is None else f"{energy} mJ a hop"
        return f"bench: {event.model} on {facts['backend']} takes {facts.get('cpu_s_per_audio_hour')} s of CPU time for an hour, {drawn}"
    told = ", ".join(str(value) if name in ("reason", "error") else f"{name} {value}" for name, value in facts.items() if name != "file")
    return f"{event.kind}: {told}".rstrip(": ")


def _kept(clips: Mapping[str, object]) -> str:
    cut, lost = (value if isinstance(value := clips.get(name), int) else 0 for name in ("cut", "lost"))
    return f"{max(0, cut - lost)} clips kept to learn from" + (f", {lost} lost" if lost else "")


def _model_line(event: Event) -> str:
    """What befell a model version (`promotion.model_event`), in words."""
    facts = event.extra
    before = f", before it {facts['before']}" if "before" in facts else ""
    back = f"; back to {facts['back_to']}" if "back_to" in facts else ""
    reason = f": {facts['reason']}" if "reason" in facts else ""
    words = {
        "live": f"{event.model} listens{before}{reason}",
        "reloaded": f"{event.model} listens, with enrolments and settings read again" + (reason or f", for {facts.get('keywords')}"),
        "refused": f"{facts.get('version')} is refused, {event.model} goes on{reason}{back}",
        "rolled back": f"{event.model} is gone back from{reason}{back}",
        "kept": f"the week on trial of {event.model} is over, and it stays{reason}",
        "promoted": f"{event.model} is promoted{before}",
        "engine": f"{event.model} listens on {facts.get('engine')}, before on {facts.get('engine_before')}",
    }
    line = words.get(str(facts.get("what")), f"{event.model}: {facts}")
    if "score_difference" in facts:
        line += f" (scores differ by {facts['score_difference']} on average over {facts['hops']} hops)"
    return f"model: {line}"


def _round_line(event: Event) -> str:
    """How a round of adaptation went (`edgekws adapt`), in words."""
    facts = event.extra
    drawn = f" and {facts['energy_j']} J" if facts.get("energy_j") is not None else ""
    made = f"{facts.get('parameters')} parameters in {facts.get('round_s')} s{drawn}"
    words = {
        "started": f"adaptation begins: {facts.get('reason')}",
        "promoted": f"adaptation made {event.model}, {made}, and it listens from now on: {facts.get('reason')}",
        "refused": f"adaptation came to nothing, {made}: {facts.get('reason')}",
        "tried": f"adaptation would go live, {made}, but this was a dry run",
        "failed": f"adaptation failed, and nothing was changed: {facts.get('reason')}",
        "cut short": f"the adaptation before this was cut short: {facts.get('reason')}",
        "skipped": f"no adaptation: {facts.get('reason')}",
    }
    return words.get(str(facts.get("what")), f"adaptation: {facts}")


def _utc(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, timezone.utc)


class Outlet:
    """Text to a stream by a thread of its own, so that a reader that hangs holds up nobody: a terminal at Ctrl-S, a program behind a pipe.

    It can stand in for a text stream. What finds `UNREAD_CHARACTERS` waiting is lost.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.broke: OSError | None = None
        """Why nothing can be written any more: a closed pipe, a full disk."""
        self._stream = stream
        self._file: int | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or none of the system's
            stream.flush()  # type: ignore[union-attr]
            # Its own: PortAudio's start has the one of stderr at /dev/null. And no buffer, whose lock a thread that hangs would keep.
            self._file = os.dup(stream.fileno())  # type: ignore[union-attr]
        self._waiting = ""
        self._under_way = b""
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """How much was taken: all of it or nothing."""
        with self._changed:
            if len(self._waiting) >= UNREAD_CHARACTERS:
                return 0
            self._waiting += text
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nobody waits."""

    def written(self, timeout_s: float) -> bool:
        """Whether nothing waits any more, at once or soon."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._under_way, timeout_s)

    def close(self, timeout_s: float) -> int:
        """How many lines were not written after so long; they are lost if the process ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return self._under_way.count(b"\n") + self._waiting.count("\n")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                text, self._waiting = self._waiting, ""
                self._under_way = text.encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
                self._changed.notify_all()
            try:
                self._put(text)
            except OSError as error:
                self.broke = error
            with self._changed:
                self._under_way = b""
                self._changed.notify_all()
        if self._file is not None:
            os.close(self._file)

    def _put(self, text: str) -> None:
        if self._file is None:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
            return
        while self._under_way:
            try:
                self._under_way = self._under_way[os.write(self._file, self._under_way[:4096]) :]
            except BlockingIOError:  # another program that has this terminal made it so
                select.select([], [self._file], [])


@contextlib.contextmanager
def without_waiting_for_stderr() -> Iterator[None]:
    """Meanwhile nobody who says something on stderr, by the log or not, waits for who reads it."""
    stderr, outlet = sys.stderr, Outlet(sys.stderr)

    def turn(old: object, new: TextIO) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
        sys.stderr = new

    turn(stderr, cast(TextIO, outlet))
    try:
        yield
    finally:
        turn(outlet, stderr)
        outlet.close(UNREAD_S)


class LineSink:
    """Each wake as a line on a stream: stdout, or stderr for the journal. One that nobody reads loses lines, and holds up no other sink."""

    def __init__(self, stream: TextIO | None, *, json: bool = False) -> None:
        self.wait = False
        """For the reader, instead of losing a line: where what is listened to waits too, until somebody wants it to end."""
        self._outlet = Outlet(stream)
        self._json = json
        self._hangs = False

    def deliver(self, event: Event) -> None:
        if event.kind != "wake":
            return
        line = (as_json(event) if self._json else as_line(event)) + "\n"
        while not self._outlet.write(line):
            if not self.wait:
                raise EdgekwsError("the output is not read, so a wake was not printed. Read it, or run edgekws without a pipe")
            self._outlet.written(UNREAD_S)
        self._hangs = not self._outlet.written(0 if self._hangs else UNREAD_S)  # as a rule at once, so that a closed pipe is told at once
        if self._outlet.broke:
            raise self._outlet.broke

    def close(self) -> None:
        """The stream is not ours, and stays open."""
        while (lost := self._outlet.close(0 if self._hangs and not self.wait else UNREAD_S)) and self.wait:
            pass  # another second
        if self._outlet.broke:
            raise self._outlet.broke
        if lost:
            raise EdgekwsError(f"the output is not read: the last {lost} wakes were not printed; edgekws log has them")


class StoreSink:
    """Every event into the database, and with `keep` each clip beside the wake that it was."""

    def __init__(self, store: Store, *, live: bool = True) -> None:
        """`store` is for this sink alone. live: what is listened to is no file, which takes no other listener's place and whose events are
        marked, as its wakes and its hours say nothing of the microphone's."""
        self._store, self._live = store, live
        self._listens = self._died = False
        self._wakes: list[Event] = []
        self._files: dict[str, str] = {}  # of the clips, by the names that they came with

    def deliver(self, event: Event) -> None:
        if event.kind in ("start", "deaf"):
            self._listens = self._live
            self._begin()
        elif event.kind != "stop":
            self._take_over()
        if event.kind == "start" and self._died:
            event, self._died = replace(event, extra={**event.extra, "before": CUT_SHORT}), False
        if not self._live:
            event = replace(event, extra={**event.extra, "file": True})
        stored = self._store.add_event(event)
        if event.kind == "stop":
            self._listens = False
            self._store.end_listening()
        if event.kind == "wake":
            self._wakes = [*self._wakes[-20:], stored]

    def keep(self, clip: Clip, samples: np.ndarray) -> None:
        self._take_over()
        wakes = [one for one in reversed(self._wakes) if one.keyword == clip.keyword]
        if clip.label == "alike":
            for wake in [one for one in wakes if one.score == clip.score][:1]:
                self._store.note_alike(wake.id, self._files.get(clip.file, clip.file))
            return
        event = next((one.id for one in wakes if one.time_s == clip.time_s), 0)
        stored = self._store.add_clip(replace(clip, event=event), samples)
        self._files = {**dict(list(self._files.items())[-FILES:]), clip.file: stored.file}

    def tidy(self) -> bool:
        """Clips grow too old where nothing wakes, too. Whether there is more to do."""
        return self._store.drop_old_clips()

    def _begin(self) -> None:
        if self._store.begin_listening():
            log.warning("the listener before this one %s", CUT_SHORT)
            self._died = True

    def _take_over(self) -> None:
        """Once nobody listens beside this one, whom it found when it began, it is the one that does. An event is worth more than that."""
        if self._listens and not self._store.listens():
            with contextlib.suppress(StoreError):
                self._begin()

    def close(self) -> None:
        self._store.close()


class CommandSink:
    """A program at each wake: without a shell, the event as one line of JSON on its stdin, its output on our stderr.

    Nobody waits for it: at most `COMMANDS` run at once, a wake beyond that is not told, and each is killed after `timeout_s`. One that is
    not there is looked for again at each wake: its disk may be mounted after the start.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        if shutil.which(command[0]) is None:
            log.warning(
                'sinks.command: "%s" is no program here; each wake looks again. Give the full path of one that may be executed, or []',
                command[0],
            )
        self._command = list(command)
        self._timeout_s = timeout_s
        self._waiting: list[threading.Thread] = []
        self._complaints = Complaints()

    def deliver(self, event: Event) -> None:
        if event.kind != "wake":
            return
        self._waiting = [thread for thread in self._waiting if thread.is_alive()]
        if len(self._waiting) >= COMMANDS:
            raise EdgekwsError(f"{self._command[0]}: {COMMANDS} of it are still running, so it was not told of a wake")
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        except OSError as error:
            raise EdgekwsError(f"{self._command[0]}: cannot be run ({error.strerror})") from error
        thread = threading.Thread(target=self._wait, args=(process, as_json(event) + "\n"), name="command", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the unit's TasksMax=
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise EdgekwsError(f"{self._command[0]}: nobody could wait for it, so it was killed ({error})") from error
        self._waiting.append(thread)

    def close(self) -> None:
        """Waits for those that run, as long as they may."""
        for thread in self._waiting:
            thread.join()

    def _wait(self, process: subprocess.Popen[bytes], line: str) -> None:
        try:
            process.communicate(line.encode(), self._timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its children: it leads a session of its own
            process.communicate()
            self._complaints.say(f"{self._command[0]}: killed after {self._timeout_s:g} s ([sinks] command_timeout_s)", kind="timeout")
            return
        if process.returncode:
            self._complaints.say(f"{self._command[0]}: ended with {process.returncode}", kind="status")
