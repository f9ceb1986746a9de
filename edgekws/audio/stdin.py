"""Raw samples on standard input: `arecord -t raw -f S16_LE -r 16000 | edgekws run --source stdin:`"""

from __future__ import annotations

import logging
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np

from edgekws.audio.resampling import To16k, mono
from edgekws.audio.source import RATE, Source, split_options, whole_number
from edgekws.errors import AudioError, UsageError
from edgekws.values import SAMPLE_RATE_HZ, AudioChunk

log = logging.getLogger(__name__)

STALL_S = 3.0  # without a sample, as with a microphone
POLL_S = 0.2
LATE_S = 0.1  # less is none lost
CATCH_UP_S = 1.0  # what waits in a pipe comes at once; who gives no more than real time never catches up
MOST_STALL_S = 60.0  # that a writer may let pass between what it gives
READ_BYTES = 1 << 16  # 2 s at 16 kHz: what waits in a full pipe
OPTIONS = {"rate": RATE, "channels": whole_number(1, 64)}
# WAV files cannot be raw samples by chance; the others are here for a clear error.
NOT_RAW = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b".snd": "AU", b"FORM": "AIFF"}
UNKNOWN_LENGTH = 0x7FFF_0000  # a WAV header in a pipe claims 0 or at least this many bytes (arecord, sox, ffmpeg)


class StdinSource(Source):
    """s16le samples, 16 kHz mono unless ?rate and ?channels say otherwise. A WAV header is read and taken off: arecord writes one.

    Where nothing comes for 3 s it is waited for, said, and counted as a gap. So is what was lost while this process itself did not read.

    Args:
        descriptor: read instead of standard input.
        stall_s: how long nothing must come, in steps of 0.2 s.
        clock: one that only goes forward.
    """

    def __init__(
        self, uri: str, rest: str, descriptor: int = 0, *, stall_s: float = STALL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        options = wanted(uri, rest)
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError as error:
            raise AudioError(f"cannot open {uri}: standard input is closed") from error
        if os.isatty(descriptor):
            raise AudioError(f"cannot open {uri}: standard input is a terminal; pipe samples into it (arecord -f S16_LE -r 16000 | ...)")
        self.uri = uri
        self.live = not stat.S_ISREG(mode)  # a file waits for whoever reads it
        self._descriptor = descriptor
        self._rate_hz, self._channels = int(options.get("rate", SAMPLE_RATE_HZ)), int(options.get("channels", 1))
        self._options = options
        self._closed = False
        self._stall_polls, self._clock = round(stall_s / POLL_S), clock
        self._heard_s = clock()
        self._begun = False  # a byte came
        self._behind = False  # nothing was read for long, and what comes now may be later than what the pipe held
        self._lost_s = 0.0  # before what was read last

    def chunks(self) -> Iterator[AudioChunk]:
        self._heard_s = self._clock()
        data, left = self._header()
        frame_bytes = 2 * self._channels
        resampler = To16k(self._rate_hz)
        first = gap = 0

        def chunk(samples: np.ndarray) -> AudioChunk:
            nonlocal first, gap
            made = AudioChunk(samples, first + gap, gap)
            first, gap = first + gap + len(samples), 0
            return made

        while True:
            if self._lost_s:
                if len(tail := resampler.flush()):
                    yield chunk(tail)
                resampler = To16k(self._rate_hz)
                gap, self._lost_s = gap + max(1, round(self._lost_s * SAMPLE_RATE_HZ)), 0.0
            data = data[:left]
            whole = len(data) // frame_bytes * frame_bytes
            samples = np.frombuffer(data[:whole], "<i2")
            if self._channels == 1 and self._rate_hz == SAMPLE_RATE_HZ:
                converted = samples.astype(np.int16)
            else:
                converted = resampler.feed(mono(samples.reshape(-1, self._channels).astype(np.float32) / np.float32(32768)))
            if len(converted):
                yield chunk(converted)
            left -= whole
            data = data[whole:]
            more = self._read() if left >= frame_bytes else b""
            if not more:
                break
            data += more
        if len(last := resampler.flush()):
            yield chunk(last)
        if self._closed:
            return
        if data:
            log.warning("%s: the last %d bytes are only a part of a sample and were left out", self.uri, len(data))
        if not first:
            raise AudioError(f"{self.uri} ended without a sample; is the program before the pipe running?")

    def close(self) -> None:
        self._closed = True

    def _read(self) -> bytes:
        """What is there, or b"" at the end."""
        polls = 0  # Counted, and not timed: where this process itself was stopped, that was one of them.
        while not self._closed:
            # With a timeout, because a signal handler or another thread that calls close() cannot end a read.
            if select.select([self._descriptor], [], [], POLL_S)[0]:
                try:
                    data = os.read(self._descriptor, READ_BYTES)
                except OSError as error:
                    raise AudioError(f"cannot read {self.uri}: {error.strerror}") from error
                unread_s = self._clock() - self._heard_s - polls * POLL_S
                if data and (self._behind or polls >= self._stall_polls):
                    data = self._after_a_stall(data, polls)
                elif self.live and self._begun and unread_s >= STALL_S:  # What the pipe held follows what came before.
                    self._heard_s, self._behind = self._heard_s + len(data) / self._bytes_per_s(), True
                    return data
                self._heard_s, self._begun, self._behind = self._clock(), True, False
                return data
            polls += 1
            if polls == self._stall_polls:
                why = "no samples come on standard input"
                log.warning("%s: %s", self.uri, why)
                self.on_deaf(why)
        return b""

    def _after_a_stall(self, data: bytes, polls: int) -> bytes:
        """What came late and all that waits behind it; what is missing then was lost. Before the first byte nothing is."""
        per_s = self._bytes_per_s()
        pieces, size, until_s = [data], len(data), self._clock() + CATCH_UP_S
        while not self._closed and size < (self._clock() - self._heard_s) * per_s and self._clock() < until_s:
            if not select.select([self._descriptor], [], [], POLL_S / 2)[0]:
                break
            try:
                more = os.read(self._descriptor, READ_BYTES)
            except OSError:  # the next read tells
                break
            if not more:
                break
            pieces.append(more)
            size += len(more)
        lost_s = self._clock() - self._heard_s - size / per_s
        if polls < self._stall_polls:  # It was not told that it is deaf.
            if lost_s >= LATE_S:
                self._lost_s += lost_s
                log.warning("%s: %.1f s lost: edgekws was stopped, or this machine was too busy", self.uri, lost_s)
            return b"".join(pieces)
        if lost_s < LATE_S:  # whoever writes gives much at a time, and seldom
            self._stall_polls = max(self._stall_polls, min(2 * polls, round(MOST_STALL_S / POLL_S)))
        lost_s = max(0.0, lost_s) if self._begun else 0.0
        self._lost_s += max(1 / SAMPLE_RATE_HZ, lost_s)  # that it listens again is told by a gap
        log.warning("%s: listening again, %.1f s lost", self.uri, lost_s)
        return b"".join(pieces)

    def _bytes_per_s(self) -> int:
        return self._rate_hz * 2 * self._channels

    def _header(self) -> tuple[bytes, int]:
        """(first samples, how many bytes of samples there are) behind a WAV header, if there is one."""
        data = self._at_least(b"", 12)
        for magic, kind in NOT_RAW.items():
            if data.startswith(magic):
                raise AudioError(f"cannot read {self.uri}: this is {kind}, not raw samples; save it and use file:PATH, or sox - -t raw -")
        if not (data.startswith(b"RIFF") and data[8:12] == b"WAVE"):
            return data, 1 << 62
        data = data[12:]
        while True:
            data = self._at_least(data, 8)
            if len(data) < 8:
                raise AudioError(f"{self.uri} ended within its WAV header")
            name, size = struct.unpack("<4sI", data[:8])
            data = data[8:]
            if name == b"data":
                return data, size if 0 < size < UNKNOWN_LENGTH else 1 << 62
            if size > READ_BYTES:
                raise AudioError(f"cannot read {self.uri}: the WAV header is damaged")
            size += size % 2  # chunks are padded to whole words
            data = self._at_least(data, size)
            if name == b"fmt ":
                self._take_format(data[:size])
            data = data[size:]

    def _take_format(self, fmt: bytes) -> None:
        if len(fmt) < 16:
            raise AudioError(f"cannot read {self.uri}: the WAV header is damaged")
        kind, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", fmt[:16])
        if kind not in (1, 0xFFFE) or bits != 16 or not channels or not rate_hz:
            raise AudioError(f"cannot read {self.uri}: {bits}-bit samples in WAV format {kind}; accepted: 16-bit PCM (arecord -f S16_LE)")
        for option, given in (("rate", rate_hz), ("channels", channels)):
            if self._options.get(option, given) != given:
                raise AudioError(f"cannot read {self.uri}: its WAV header says {option} {given}; leave ?{option} out")
        self._rate_hz, self._channels = rate_hz, channels

    def _at_least(self, data: bytes, count: int) -> bytes:
        """`data` and what must be read to have `count` bytes; fewer at the end."""
        while len(data) < count and (more := self._read()):
            data += more
        return data


def wanted(uri: str, rest: str) -> dict[str, int | str]:
    """The options of a URI. Raises UsageError: it is none of standard input."""
    name, options = split_options(uri, rest, OPTIONS)
    if name:
        raise UsageError(f'cannot open {uri}: standard input has no name, but here is "{name}". Accepted: stdin: or stdin:?rate=48000')
    return options
