"""The listener: samples through the pipeline, events to the sinks, and the service manager told that it lives."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from edgekws.audio import Source, open_source
from edgekws.errors import AudioError, EdgekwsError
from edgekws.pipeline import Pipeline
from edgekws.promotion import Updates
from edgekws.pseudo_labels import Cut
from edgekws.sinks import Complaints, Delivery
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Event, befell

log = logging.getLogger(__name__)

STATUS_S = 10.0  # between two status lines to the service manager
DEAF_S = 5.0  # without a sample
MUTE_S = 300.0  # of samples that are all the same: a muted switch, a null source, a chip that is stuck. A microphone has noise of its own,
# but where a gate takes it
MUTED = (
    f"only digital silence for {MUTE_S:.0f} s: is it muted? Unmute it (alsamixer, or pactl set-source-mute @DEFAULT_SOURCE@ 0), "
    "or name another: edgekws devices"
)
AGAIN = "sound again"  # why there is a gap that took nothing
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 4.0  # between attempts to open a microphone that is not there: doubled each time
SETTLE_S = 5.0  # at the end, for clips to be written: a disk that hangs must not keep the stop from being told
WOKE = 100  # wakes whose clips are waited for: some never come, and none where no clips are kept


@dataclass(frozen=True)
class Heard:
    """What came of listening."""

    audio_s: float
    wakes: int
    gaps: int
    lost_s: float
    """Seconds of audio that the gaps took."""


class Status:
    """What a listener is at, for whoever asks from another thread: it costs the listener a few attribute stores a hop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time) -> None:
        self.source = self.model = ""
        self.hops = self.wakes = self.gaps = 0
        self.audio_s = self.lost_s = 0.0
        self.busy_s = 0.0
        """Time spent on the samples, of all hops."""
        self.last_wake: Event | None = None
        self.delivery: Delivery | None = None
        """Whose losses are told."""
        self.silent = 0
        """Samples in a row, up to the last one, that are all the same, as zeros are: digital silence."""
        self.muted = False
        """For so long that it counts as deaf."""
        self._clock, self._now = clock, now
        self._heard_s = float("-inf")
        self._last = np.int16(0)
        self._recent: deque[np.ndarray] = deque()
        self._recent_samples = 0

    def heard(self, samples: np.ndarray) -> None:
        """int16, at most one hop."""
        self._heard_s = self._clock()
        self._recent.append(samples)
        self._recent_samples += len(samples)
        while self._recent_samples > SAMPLE_RATE_HZ:
            self._recent_samples -= len(self._recent.popleft())
        self.silent = self.silent + len(samples) if (samples == self._last).all() else 0
        self._last = samples[-1]

    def listening(self) -> bool:
        """Whether samples came in the last seconds, and sound in the last minutes."""
        return not self.muted and self._clock() - self._heard_s < DEAF_S

    def level_dbfs(self) -> float | None:
        """Of the last second; None where there is no sample or digital silence."""
        recent = list(self._recent) if self._clock() - self._heard_s < DEAF_S else []
        samples = np.concatenate(recent) if recent else np.zeros(1, np.int16)
        rms = float(samples.std())  # without a constant offset, which nobody hears
        return round(float(20 * np.log10(rms / 32768)), 1) if rms else None

    def dropped(self) -> dict[str, int]:
        """Events that did not arrive, by where: "queue" is the one before all sinks."""
        return self.delivery.drops() if self.delivery else {"queue": 0}

    def line(self) -> str:
        """For people, as `systemctl status` shows it."""
        level = self.level_dbfs()
        last = self.last_wake
        woke = f', the last "{last.keyword}" at {self._when(last.time_s)}' if last else ""
        heard = f"level {'silence' if level is None else f'{level} dBFS'}, {self.wakes} wakes{woke}"
        drops = {name: count for name, count in self.dropped().items() if count}
        where = f" ({', '.join(f'{name} {count}' for name, count in drops.items())})" if drops else ""
        lost = f"{self.gaps} gaps of {self.lost_s:.2f} s in all, {sum(drops.values())} events dropped{where}"
        return f"{'deaf on' if self.muted else 'listening to'} {self.source} with {self.model}, {heard}, {lost}"

    def _when(self, time_s: float) -> str:
        """Here, with the date unless that is today's."""
        then, today = time.localtime(time_s), time.localtime(self._now())
        return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)

    def report(self) -> dict[str, object]:
        """As the control socket tells it."""
        last, drops = self.last_wake, self.dropped()
        return {
            "listening": self.listening(),
            "source": self.source,
            "level_dbfs": self.level_dbfs(),
            "model": self.model,
            "last_wake": last and {"keyword": last.keyword, "speaker": last.speaker, "time_s": round(last.time_s, 3)},
            "audio_s": round(self.audio_s, 1),
            "wakes": self.wakes,
            "gaps": self.gaps,
            "lost_s": round(self.lost_s, 3),
            "dropped": sum(drops.values()),
            "dropped_by": drops,
            "clips_dropped": self.delivery.clips_dropped if self.delivery else 0,
            "hops": self.hops,
            "busy_s": round(self.busy_s, 3),
        }


def listen(
    source: Source,
    pipeline: Pipeline,
    delivery: Delivery,
    model: str,
    *,
    updates: Updates | None = None,
    status: Status | None = None,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.perf_counter,
) -> Heard:
    """Listen until the source ends or is closed; each wake and each gap becomes an event.

    Args:
        delivery: stays open.
        model: id that the events carry.
        updates: asked after each hop; a version that it switches to is the events' model from then on.
        status: kept up to date for others.

    Raises:
        AudioError: the source broke.
    """
    manager = ServiceManager()
    wakes = gaps = lost = audio = 0
    woke: dict[tuple[str, int], float] = {}  # (keyword, where in the stream) → when; clips come half a second after their wakes

    def keep(cuts: list[Cut], heard: int) -> None:
        for cut in cuts:
            time_s = woke.pop((cut.clip.keyword, cut.end_sample), None) if cut.clip.label == "positive" else None
            if time_s is None:
                # Of a file that is read faster than it was spoken it would be before the run.
                time_s = now() - ((heard - cut.end_sample) / SAMPLE_RATE_HZ if source.live else 0.0)
            delivery.put_clip(replace(cut.clip, time_s=time_s, model=model), cut.samples, wait=not source.live)
        cuts.clear()

    def tell(kind: str, at_sample: int, **extra: object) -> None:
        delivery.put(befell(kind, model, now(), at_sample / SAMPLE_RATE_HZ, **extra), wait=not source.live)

    def deaf(why: str) -> None:
        tell("deaf", at, reason=why)
        # Always with the date: nothing tells it anew tomorrow.
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now()))
        # The attempt to hear again feeds the watchdog, as progress may have done so half its time ago; one that hangs does not again.
        manager.tell("WATCHDOG=1", f"STATUS=deaf since {since}: {why}")

    status = status or Status(now=now)
    status.source, status.model, status.delivery = source.uri, model, delivery
    may_be_muted = source.uri.startswith(("mic:", "stdin:"))  # what a file holds is no fault
    at = 0
    source.on_deaf = deaf
    tell("start", at, source=source.uri)
    manager.tell("READY=1", f"STATUS=listening to {source.uri}")
    try:
        for chunk in source.chunks():
            arrived = clock()
            if chunk.gap_samples:
                gaps += 1
                lost += chunk.gap_samples
                status.gaps, status.lost_s = gaps, lost / SAMPLE_RATE_HZ
                status.muted = False  # the event tells that it hears: where that is silence as before, it is told anew
                tell("gap", chunk.first_sample, lost_ms=round(chunk.gap_samples * 1000 / SAMPLE_RATE_HZ))
            # A long chunk goes in hop by hop, so that nobody waits for its end to hear of its beginning.
            for piece in _pieces(chunk):
                status.heard(piece.samples)
                if may_be_muted and status.muted != (status.silent >= MUTE_S * SAMPLE_RATE_HZ):
                    status.muted = not status.muted
                    log.warning("%s: %s", source.uri, MUTED if status.muted else AGAIN)
                    if status.muted:
                        tell("deaf", piece.first_sample, reason=MUTED)
                    else:
                        tell("gap", piece.first_sample, lost_ms=0, reason=AGAIN)  # as a microphone that comes back tells it
                    manager.tell(f"STATUS={status.line()}")
                for found in pipeline.feed(piece):
                    wakes += 1
                    stream_s, latency_ms = found.end_sample / SAMPLE_RATE_HZ, (clock() - arrived) * 1000
                    event = Event(found.keyword, found.speaker, found.score, found.threshold, now(), stream_s, latency_ms, model)
                    delivery.put(event, wait=not source.live)
                    status.wakes, status.last_wake = wakes, event
                    woke[found.keyword, found.end_sample] = event.time_s
                    while len(woke) > WOKE:
                        del woke[next(iter(woke))]
                keep(pipeline.cuts, piece.first_sample + len(piece.samples))
                if updates is not None:
                    for event in updates.step(pipeline, (piece.first_sample + len(piece.samples)) / SAMPLE_RATE_HZ):
                        delivery.put(event, wait=not source.live)
                        model = updates.model
                        status.model = model
                        manager.tell(f"STATUS={status.line()}")
            if chunk.gap_samples:  # by now there is a level to be told
                manager.tell(f"STATUS={status.line()}")
            audio += len(chunk.samples)
            at = chunk.first_sample + len(chunk.samples)
            status.hops, status.audio_s = pipeline.hops, audio / SAMPLE_RATE_HZ
            status.busy_s += clock() - arrived
            manager.progress(pipeline.hops, status.line)
        if pipeline.labels is not None:
            keep(pipeline.labels.end(), at)
            delivery.settle(SETTLE_S)  # else clips that the disk is about to refuse were told as kept
    except EdgekwsError as error:
        tell("stop", at, error=str(error))
        raise
    learned = {} if pipeline.labels is None else {"clips": {**pipeline.labels.counts, "lost": delivery.clips_dropped}}
    tell("stop", at, audio_s=round(audio / SAMPLE_RATE_HZ, 2), wakes=wakes, **learned)
    manager.tell("STOPPING=1")
    return Heard(audio / SAMPLE_RATE_HZ, wakes, gaps, lost / SAMPLE_RATE_HZ)


def _pieces(chunk: AudioChunk) -> Iterator[AudioChunk]:
    if len(chunk.samples) <= HOP_SAMPLES:
        yield chunk
        return
    for i in range(0, len(chunk.samples), HOP_SAMPLES):
        yield AudioChunk(chunk.samples[i : i + HOP_SAMPLES], chunk.first_sample + i, 0 if i else chunk.gap_samples)


def open_patiently(uri: str, ended: threading.Event | None = None, on_deaf: Callable[[str], object] = lambda why: None) -> Source | None:
    """The source, open. A microphone that is not there is waited for where a service manager started us, which would do so again and again.

    Args:
        ended: set from elsewhere, it ends the waiting, and None comes of it.
        on_deaf: called when the waiting begins.

    Raises:
        AudioError: it cannot be opened.
        UsageError: it is no URI of audio, so waiting would not help.
    """
    manager = ServiceManager()
    complaints = Complaints()
    ended = ended or threading.Event()
    pause_s = 0.0
    while not ended.wait(pause_s):
        try:
            return open_source(uri)
        except AudioError as error:
            if not manager.present or not uri.startswith("mic:"):
                raise
            if not pause_s:
                on_deaf(str(error))
            complaints.say(f"deaf: {error}. Trying again every {LAST_PAUSE_S:.0f} s", kind=str(error))
            manager.tell("READY=1", "WATCHDOG=1", f"STATUS=deaf: {error}")  # the watchdog is fed by what was tried, not by a timer
        pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LAST_PAUSE_S)
    return None


@contextlib.contextmanager
def closed_by_signals(end: Callable[[], object], reload: Callable[[], object] | None = None) -> Iterator[None]:
    """SIGTERM and SIGINT call `end`, such as a source's `close`: listening ends as at a file's end. A second one does what it always does.

    SIGHUP calls `reload`, except at a terminal: there it says that the terminal has gone.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def close(number: int, frame: object) -> None:
        restore()
        end()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in before:
        signal.signal(number, close)
    if reload is not None and not (sys.stdin is not None and sys.stdin.isatty()):
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda number, frame: reload())
    try:
        yield
    finally:
        restore()


def one_heap() -> None:
    """Let all threads take their memory from one place, and large pieces from the system, for as long as this process lives; with glibc.

    Else each thread has a place of its own, where what other threads let go of is never used again: that was 3 MB more after some exchanges
    of versions. And once a large piece was let go of, glibc takes such pieces from between the small ones, where they leave holes.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX of malloc.h
        libc.mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD: what it is at first, and now stays


class ServiceManager:
    """systemd's notification socket (sd_notify(3)); without one nothing happens."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # Twice as often as asked for. The pipeline's progress feeds it, never a timer, so that a hang is noticed.
        self._watchdog_s = int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6
        self._fed_s = self._said_s = time.monotonic()
        self._hops = 0

    @property
    def present(self) -> bool:
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                data = "\n".join(lines).encode(errors="backslashreplace")
                out.sendto(data, socket.MSG_DONTWAIT, self._address)  # a busy manager must not stop us

    def progress(self, hops: int, status: Callable[[], str]) -> None:
        """The network has done so many steps in all."""
        if not self._address or hops == self._hops:
            return
        now_s = time.monotonic()
        if self._watchdog_s and now_s - self._fed_s >= self._watchdog_s:
            self._fed_s, self._hops = now_s, hops
            self.tell("WATCHDOG=1")
        if now_s - self._said_s >= STATUS_S:
            self._said_s = now_s
            self.tell(f"STATUS={status()}")
