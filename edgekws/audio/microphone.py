"""Microphones, through PortAudio (sounddevice). The only module that knows it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as TooLate  # the same as TimeoutError from Python 3.11
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from edgekws.audio.resampling import To16k
from edgekws.audio.source import RATE, Option, Source, did_you_mean, split_options
from edgekws.errors import AudioError
from edgekws.values import HOP_MS, SAMPLE_RATE_HZ, AudioChunk

log = logging.getLogger(__name__)

OPTIONS = {"host_api": Option(str, "a part of its name, such as ALSA"), "rate": RATE}
DRIVER_BUFFER_S = 0.2  # At 0.04 s three of five captures through PulseAudio were damaged, at 0.1 and 0.2 s none (measured).
STALL_S = 3.0  # A working stream calls every 80 ms; the first call may take 2 s.
# Opened on a source that is suspended in PulseAudio, PortAudio asks without a pause whether anything came: nearly a whole core, for as long
# as the stream is open. Of the time in which a first block is waited for, its threads take hardly any otherwise; but a source may be slow
# to wake up (Bluetooth), so the first stream, and each fourth that is opened in vain, is waited for all the same.
SPINS, PATIENT_EACH = 0.3, 4
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 2.0  # between attempts to reopen: doubled each time
GIVE_UP_S = 20.0  # without a sample. Below the 30 s after which a service manager's watchdog would kill us and give no reason.
OPEN_S, CLOSE_S = 10.0, 2.0  # A working sound system takes less than 1 s.
MOST_AGE_S = 200.0  # of a block, after this process was stopped: PulseAudio keeps 4 MB, which are 131 s. Beyond it, no time was given.
QUEUE_BLOCKS = 60_000 // HOP_MS  # a minute: longer than any pause of the reader that is not a hang
INVALID_SAMPLE_RATE, DEVICE_UNAVAILABLE = -9997, -9985  # PortAudio's error numbers


@dataclass(frozen=True)
class InputDevice:
    """A device that samples can be captured from."""

    name: str
    host_api: str
    channels: int
    default_rate_hz: int
    is_default: bool


def input_devices() -> list[InputDevice]:
    """All of them, as PortAudio found them when this process first asked.

    Raises:
        AudioError: PortAudio is not installed, or does not start, or the sound server hangs.
    """
    return [device for _, device in _answered(lambda: _devices(_portaudio()))]


def find_input(uri: str) -> InputDevice:
    """The one that `mic:…` names, without opening it.

    Raises:
        AudioError: as `input_devices`, or it names none.
        UsageError: an unknown option, or a value that it does not accept.
    """
    name, host_api, _ = wanted(uri, uri.partition(":")[2])
    return _answered(lambda: _choose(_portaudio(), uri, name, host_api))[1]


def play(samples: np.ndarray) -> None:
    """Through the default output, to the end: int16, shape (n,), mono at 16 kHz.

    Raises:
        AudioError: there is no such output, or it cannot be opened.
    """
    sd = _portaudio()
    try:
        sd.play(samples, SAMPLE_RATE_HZ, blocking=True)
    except (sd.PortAudioError, ValueError) as error:
        raise AudioError(
            f"cannot play: no output of sound works here ({error}). Write it to a file: edgekws clips play ID --out FILE"
        ) from error


class MicSource(Source):
    """A microphone, chosen by its name. `mic:` and `mic:default` are the system's default input.

    A stream that dies is reopened, what was missed is counted as a gap, and both are logged.
    After 20 s without a sample `chunks()` raises AudioError.
    """

    live = True

    def __init__(self, uri: str, rest: str) -> None:
        self.uri = uri
        self._name, self._host_api, self._wanted_rate_hz = wanted(uri, rest)
        self._closing = threading.Event()
        self._begun = False  # a block came since it was opened
        self._in_vain = 0  # streams that were opened since the last block

        def attempt() -> _Capture:
            try:
                return self._open(_portaudio())
            except AudioError:
                _stop_portaudio()  # Whoever tries again sees the devices that are there by then.
                raise

        self._queue, self._stream, self._rate_hz, self._threads = _answered(attempt, f"cannot open {uri}: ", late=_shut)

    def chunks(self) -> Iterator[AudioChunk]:
        to_16k = To16k(self._rate_hz)
        first = gap = 0
        for data, lost_s in self._captured():
            if lost_s:
                tail = to_16k.flush()
                if len(tail):
                    yield AudioChunk(tail, first, 0)
                    first += len(tail)
                to_16k = To16k(self._rate_hz)
                gap = max(1, round(lost_s * SAMPLE_RATE_HZ))
            samples = to_16k.feed(np.frombuffer(data, np.int16).astype(np.float32) / np.float32(32768))
            if len(samples):
                first += gap
                yield AudioChunk(samples, first, gap)
                first += len(samples)
                gap = 0

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        _close(self._stream)

    def _captured(self) -> Iterator[tuple[bytes, float]]:
        """(int16 samples at the device's rate, seconds lost before them)."""
        heard_s = time.monotonic()  # until when sound was heard
        clock = SampleClock(self._rate_hz)
        reopened = False
        since_s = heard_s
        while True:
            block = self._next_block()
            if self._closing.is_set():
                _close(self._stream)  # which may have been opened after close() was called
                return
            if block is None:
                if not reopened:
                    # A stall is noticed after STALL_S: before that this process was itself stopped, when it could not try.
                    since_s = max(heard_s, time.monotonic() - STALL_S)
                    self.on_deaf(self._why())
                self._reopen(heard_s, since_s)
                clock = SampleClock(self._rate_hz)
                reopened = True
                continue
            self._begun, self._in_vain = True, 0
            lost_s = clock.lost_s(block.frames, block.captured_s, block.overflow)
            if reopened:
                lost_s = max(block.captured_s - heard_s, 1 / SAMPLE_RATE_HZ)
                log.warning("%s: listening again, %.1f s lost", self.uri, lost_s)
                reopened = False
            elif lost_s:
                log.warning("%s: %.0f ms lost: an overrun, or this machine was too busy", self.uri, lost_s * 1000)
            heard_s = block.captured_s + block.frames / self._rate_hz
            yield block.data, lost_s

    def _next_block(self) -> _Block | None:
        """None: the stream stopped, stalled or spins."""
        hasty = self._in_vain % PATIENT_EACH != 0
        parts = 10 if hasty else 2  # After this process itself was stopped, one is over at once and the others give it time.
        for _ in range(parts):
            used_s = _cpu_s(self._threads) if hasty else 0.0
            try:
                return self._queue.get(timeout=STALL_S / parts)
            except Empty:
                if hasty and _cpu_s(self._threads) - used_s > SPINS * STALL_S / parts:
                    return None
        return None

    def _open(self, sd: Any) -> _Capture:
        """Start capturing into a new queue.

        Raises:
            AudioError: no such device, or it cannot be opened.
        """
        index, device = _choose(sd, self.uri, self._name, self._host_api)
        queue: SimpleQueue[_Block | None] = SimpleQueue()
        missed = False

        def callback(data: Any, frames: int, times: Any, status: Any) -> None:
            nonlocal missed
            if queue.qsize() >= QUEUE_BLOCKS:
                missed = True
                return
            # Only the age comes from PortAudio: its clock may be that of the wall, which is set now and then.
            age_s = times.currentTime - times.inputBufferAdcTime
            captured_s = time.monotonic() - (age_s if 0 <= age_s < MOST_AGE_S else 0)
            queue.put(_Block(bytes(data), frames, captured_s, missed or status.input_overflow))
            missed = False

        rates_hz = [self._wanted_rate_hz] if self._wanted_rate_hz else [SAMPLE_RATE_HZ, device.default_rate_hz]
        for rate_hz in rates_hz:
            stream: Any = None
            others = _threads()
            try:
                stream = sd.RawInputStream(
                    device=index,
                    samplerate=rate_hz,
                    blocksize=rate_hz * HOP_MS // 1000,
                    channels=1,
                    dtype="int16",
                    latency=DRIVER_BUFFER_S,
                    callback=callback,
                    finished_callback=lambda: queue.put(None),
                )
                stream.start()
                break
            except sd.PortAudioError as error:
                if stream is not None:
                    _close(stream)
                number = error.args[1] if len(error.args) > 1 else 0
                if number == INVALID_SAMPLE_RATE and rate_hz != rates_hz[-1]:
                    continue
                raise AudioError(f'cannot open {self.uri}: "{device.name}" {_reason(error, number, rate_hz, device)}') from error
        return _Capture(queue, stream, rate_hz, _threads() - others)

    def _why(self) -> str:
        if not self._stream.active:
            return "the stream stopped (unplugged, or the sound server ended)"
        return "the stream stalled" if self._begun else "it opens and gives nothing (suspended? pactl suspend-source @DEFAULT_SOURCE@ 0)"

    def _reopen(self, heard_s: float, since_s: float) -> None:
        """Start again with the devices that are there now, sooner or later.

        Args:
            heard_s: until when sound was heard (monotonic).
            since_s: from when on that it is not counts.

        Raises:
            AudioError: that was for too long.
        """
        why = self._why()
        log.warning("%s: %s; reopening it", self.uri, why)
        _close(self._stream)
        sd = _portaudio()

        def attempt() -> _Capture:
            restart_portaudio()
            return self._open(sd)

        pause_s, failure = min(FIRST_PAUSE_S * 2**self._in_vain, LAST_PAUSE_S), ""
        while (left_s := since_s + GIVE_UP_S - time.monotonic()) > 0:
            if self._closing.wait(min(pause_s, left_s)):
                return
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            try:
                self._queue, self._stream, self._rate_hz, self._threads = _limited(max(left_s, CLOSE_S), attempt, late=_shut)
                self._begun, self._in_vain = False, self._in_vain + 1
                return
            except TooLate:
                failure = ": the sound system does not answer"
            except (AudioError, sd.PortAudioError) as error:
                failure = f": {error}"
        raise AudioError(f"{self.uri}: {why}; nothing was heard for {time.monotonic() - heard_s:.0f} s{failure}")


class SampleClock:
    """Finds lost samples by comparing how many came with how much time went by.

    A single late block says nothing (the driver may have kept it); a delay that all blocks of the last second share is a loss. The two
    clocks may drift apart by up to 0.1 %.
    """

    JUMP_S = 0.1  # Blocks carry a time that is true to about 50 ms (measured).

    def __init__(self, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._heard_s = 0.0
        self._baseline_s: float | None = None
        self._lags_s: deque[float] = deque(maxlen=1000 // HOP_MS + 1)

    def lost_s(self, frames: int, captured_s: float, overflow: bool) -> float:
        """Seconds lost before a block, 0.0 if none.

        Args:
            frames: samples in it.
            captured_s: when its first sample was captured (any steady clock).
            overflow: the driver says that it lost some.
        """
        lag_s = captured_s - self._heard_s
        self._lags_s.append(lag_s)
        self._heard_s += frames / self._rate_hz
        least_s = min(self._lags_s)
        if self._baseline_s is None:
            if len(self._lags_s) == self._lags_s.maxlen:
                self._baseline_s = least_s
            return 1 / self._rate_hz if overflow else 0.0
        jump_s = (lag_s if overflow else least_s) - self._baseline_s
        whole = len(self._lags_s) == self._lags_s.maxlen  # a second: right after a loss it may be one late block
        if overflow or (whole and jump_s > self.JUMP_S):
            jump_s = max(jump_s, 1 / self._rate_hz)
            self._heard_s += jump_s
            self._lags_s.clear()
            return jump_s
        if whole:
            self._baseline_s += 0.01 * jump_s
        return 0.0


class _Block(NamedTuple):
    data: bytes  # int16 samples
    frames: int
    captured_s: float  # its first sample, monotonic
    overflow: bool  # samples were lost before it


class _Capture(NamedTuple):
    queue: SimpleQueue[_Block | None]
    stream: Any
    rate_hz: int
    threads: frozenset[str]  # that came with it


def _threads() -> frozenset[str]:
    """Ids of this process's threads, those of libraries too."""
    try:
        return frozenset(os.listdir("/proc/self/task"))
    except OSError:  # /proc is hidden from us
        return frozenset()


def _cpu_s(threads: frozenset[str]) -> float:
    """CPU time of those that still run."""
    ticks = 0
    for one in threads:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/self/task/{one}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _portaudio() -> Any:
    """The module sounddevice, with PortAudio started."""
    if not os.path.exists(os.path.expanduser("~/.config/pulse/client.conf")):  # the user's own would not be read then
        os.environ.setdefault("PULSE_CLIENTCONFIG", str(Path(__file__).with_name("pulse.conf")))
    alsa = str(Path(__file__).with_name("alsa.conf"))
    if os.path.exists("/usr/share/alsa/alsa.conf") and not {" ", ":"} & set(alsa):  # these part one path from the next
        os.environ.setdefault("ALSA_CONFIG_PATH", alsa)
    try:
        with _starting():
            _load_sounddevice()
            import sounddevice

            if not sounddevice._initialized:
                sounddevice._initialize()
    except ImportError as error:
        raise AudioError("no microphone can be opened: the package sounddevice is not installed (pip install sounddevice)") from error
    except OSError as error:
        raise AudioError("no microphone can be opened: PortAudio is not installed (sudo apt-get install libportaudio2)") from error
    except Exception as error:
        raise _not_started(error) from error
    return sounddevice


def _load_sounddevice() -> None:
    """What `import` does, but the module stays where PortAudio does not start, which is its last act.

    Else each attempt would leave a module of its own behind, as it registers itself with atexit: 245 kB (measured), and a service that
    waits for its sound server tries every 4 s.
    """
    with _importing:
        if "sounddevice" not in sys.modules:
            spec = importlib.util.find_spec("sounddevice")
            if spec is None or spec.loader is None:
                raise ImportError("sounddevice")
            module: Any = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                if not isinstance(error, getattr(module, "PortAudioError", ())):
                    raise
            sys.modules["sounddevice"] = module


def _not_started(error: Exception) -> AudioError:
    return AudioError(
        f"no microphone can be opened: PortAudio does not start here ({error}). Is the sound server reachable by this user? "
        "Try: edgekws doctor"
    )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Around what starts PortAudio: meanwhile, which may be for ever, sounddevice has this process's stderr at /dev/null."""
    global _starts, _stderr
    with _of_stderr:
        if not _starts:
            with contextlib.suppress(OSError):  # it is closed
                _stderr = os.dup(2)
        _starts += 1
    try:
        yield
    finally:
        with _of_stderr:
            _give_stderr_back()  # a start beside another puts back what it found, which may be /dev/null
            _starts -= 1
            if not _starts and _stderr is not None:
                os.close(_stderr)
                _stderr = None


def _give_stderr_back() -> None:
    with _of_stderr:
        if _stderr is not None:
            os.dup2(_stderr, 2)


def wanted(uri: str, rest: str) -> tuple[str, str, int]:
    """(name, host API, rate in Hz or 0) of a URI."""
    name, options = split_options(uri, rest, OPTIONS)
    return name, str(options.get("host_api", "")), int(options.get("rate", 0))


def _devices(sd: Any) -> list[tuple[int, InputDevice]]:
    """Inputs with their index, which is good until PortAudio starts anew."""
    devices = []
    try:
        default = sd.default.device[0]
        host_apis = sd.query_hostapis()
        for index in (index for host_api in host_apis for index in host_api["devices"]):
            try:
                devices.append((index, sd.query_devices(index)))
            except UnicodeDecodeError as error:  # sounddevice cannot open it either
                _leave_out(error.object)
    except sd.PortAudioError as error:
        raise _not_started(error) from error
    return [
        (
            index,
            InputDevice(
                name=device["name"],
                host_api=host_apis[device["hostapi"]]["name"],
                channels=device["max_input_channels"],
                default_rate_hz=round(device["default_samplerate"]),
                is_default=index == default,
            ),
        )
        for index, device in devices
        if device["max_input_channels"] > 0
    ]


@functools.cache
def _leave_out(name: bytes) -> None:
    """Say it, once."""
    log.warning("the sound device %s is left out: its name is not UTF-8. Rename it, as in ~/.asoundrc", name)


def _choose(sd: Any, uri: str, name: str, host_api: str) -> tuple[int, InputDevice]:
    """The one input whose name is `name`, or else has it in it. Case does not matter."""
    everything = _devices(sd)
    if not everything:
        raise AudioError(
            f"cannot open {uri}: there is no microphone here. Plug one in; check that its user is in the group audio and that no other "
            "program holds it (PipeWire and PulseAudio do); or name another source: file:PATH or stdin:. Try: edgekws doctor"
        )
    here = "Inputs here: " + ", ".join(f'"{device.name}" ({device.host_api})' for _, device in everything)
    devices = [each for each in everything if host_api.lower() in each[1].host_api.lower()]
    if not devices:
        raise AudioError(f'cannot open {uri}: no input belongs to the host API "{host_api}". {here}')
    if name in ("", "default"):
        return next((each for each in devices if each[1].is_default), devices[0])
    exact = [each for each in devices if each[1].name.lower() == name.lower()]
    found = exact or [each for each in devices if name.lower() in each[1].name.lower()]
    if not found:
        hint = did_you_mean(name, [device.name for _, device in devices])
        raise AudioError(f'cannot open {uri}: no input has "{name}" in its name{hint}. {here}')
    if len({(device.name, device.host_api) for _, device in found}) > 1:
        several = ", ".join(f'"{device.name}" ({device.host_api})' for _, device in found)
        raise AudioError(f'cannot open {uri}: "{name}" fits several inputs: {several}. Give more of the name, or ?host_api=')
    return found[0]


def _reason(error: Exception, number: int, rate_hz: int, device: InputDevice) -> str:
    if number == INVALID_SAMPLE_RATE:
        return f"refuses {rate_hz} Hz. Leave ?rate out, or give its own: ?rate={device.default_rate_hz}"
    if number == DEVICE_UNAVAILABLE:
        return "is held by another program, or was unplugged. End that program (PipeWire and PulseAudio are such), or use mic:pulse"
    return f"does not open ({error}). Try: edgekws doctor"


def restart_portaudio() -> None:
    """Have it look for devices again, which it does only when it starts. All its streams must have been closed."""
    _stop_portaudio()
    _portaudio()


def _stop_portaudio() -> None:
    sd = sys.modules.get("sounddevice")
    if sd is not None and not any(thread.is_alive() for thread in _hanging):  # else it would wait for them, and an open stream does without
        while sd._initialized:
            sd._terminate()


def _close(stream: Any) -> None:
    """Whatever state it is in."""

    def close() -> None:
        stream.abort(ignore_errors=True)
        stream.close(ignore_errors=True)

    with contextlib.suppress(TooLate, AudioError):
        _limited(CLOSE_S, close)


def _shut(made: _Capture) -> None:
    """A stream that nobody waits for any more: it would capture for ever, into a queue that nobody reads."""
    _close(made.stream)


_importing = threading.Lock()
_of_stderr = threading.RLock()  # again in a signal handler
_starts = 0  # of PortAudio, that have not ended
_stderr: int | None = None  # while there are any: a copy of what it was before them
_hanging: list[threading.Thread] = []
Made = TypeVar("Made")


def _limited(limit_s: float, action: Callable[[], Made], late: Callable[[Made], object] = lambda made: None) -> Made:
    """Run it, or leave it alone after some time. Calls into the sound system may never return: libpulse waits for a server that
    hangs, and for ever for one that was killed while it had a lock on memory that they share (which pulse.conf forbids).

    Args:
        late: given what came of it where nobody waits any more.

    Raises:
        TooLate: it is still running, in a thread that nobody waits for.
        AudioError: no thread can be had.
    """
    call: Future[Made] = Future()

    def run() -> None:
        try:
            made = action()
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                call.set_exception(error)
            return
        try:
            call.set_result(made)
        except InvalidStateError:  # cancelled
            late(made)

    thread = threading.Thread(target=run, name="sound system", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise AudioError(f"the sound system cannot be asked: {error}. Raise the unit's TasksMax=, or end other programs") from error
    try:
        return call.result(limit_s)
    except TooLate:
        if not call.cancel():  # it ended just now
            return call.result()
        _hanging[:] = [one for one in _hanging if one.is_alive()] + [thread]
        _give_stderr_back()
        if "sounddevice" in sys.modules:
            atexit.unregister(sys.modules["sounddevice"]._exit_handler)  # It would hang too.
        raise


def _answered(action: Callable[[], Made], doing: str = "", late: Callable[[Made], object] = lambda made: None) -> Made:
    """What the sound system answers in time.

    Raises:
        AudioError: nothing, or what `action` raises.
    """
    try:
        return _limited(OPEN_S, action, late)
    except TooLate:
        raise AudioError(f"{doing}PulseAudio or PipeWire did not answer for {OPEN_S:.0f} s. Restart it") from None
