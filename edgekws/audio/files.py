"""WAV, FLAC and Opus files (libsndfile)."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.audio.resampling import To16k, mono
from edgekws.audio.source import SWITCH, Source, did_you_mean, split_options, whole_number
from edgekws.errors import AudioError
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk

BLOCK_S = 1  # read at a time; always the same, so that ?chunk never changes a sample
OPTIONS = {"paced": SWITCH, "chunk": whole_number(1, 3600 * SAMPLE_RATE_HZ)}


class FileSource(Source):
    """A recording, as fast as it is read or at the pace of a microphone (?paced=1)."""

    def __init__(self, uri: str, rest: str) -> None:
        path, options = split_options(uri, rest, OPTIONS)
        self.uri = uri
        self.live = bool(options.get("paced", 0))
        self._chunk_samples = int(options.get("chunk", HOP_SAMPLES))
        self._path = Path(path)
        self._file = _open(self._path)
        self._closing = threading.Event()

    def chunks(self) -> Iterator[AudioChunk]:
        start_s = time.monotonic()
        first = 0
        with self._file:
            for samples in self._rechunked():
                if self.live:  # A microphone hands a chunk over once its last sample was spoken.
                    self._closing.wait(max(0.0, start_s + (first + len(samples)) / SAMPLE_RATE_HZ - time.monotonic()))
                if self._closing.is_set():
                    return
                yield AudioChunk(samples, first)
                first += len(samples)

    def close(self) -> None:
        self._closing.set()  # whoever reads closes the file: libsndfile crashes where another thread closes it under a read

    def _rechunked(self) -> Iterator[np.ndarray]:
        size = self._chunk_samples
        pending = np.zeros(0, np.int16)
        for block in _blocks(self._path, self._file, self._closing):
            samples = np.concatenate([pending, block]) if len(pending) else block
            whole = len(samples) // size * size
            for start in range(0, whole, size):
                yield samples[start : start + size]
            pending = samples[whole:]
        if len(pending):
            yield pending


def read_recording(path: Path) -> np.ndarray:
    """A whole recording: WAV, FLAC or Opus, any rate; channels are mixed down.

    Returns:
        int16, shape (n,), n > 0, mono at 16 kHz.

    Raises:
        AudioError: missing, not audio, damaged or empty.
    """
    path = Path(path)
    with _open(path) as file:
        return np.concatenate(list(_blocks(path, file)))


def duration_s(path: Path) -> float:
    """How long a recording is by its header. Raises AudioError: missing, not audio, or empty."""
    with _open(path) as file:
        if not file.frames:
            raise AudioError(f"cannot read {path}: there are no samples in it{_unfinished(path)}")
        return float(file.frames / file.samplerate)


def _open(path: Path) -> Any:
    """An open soundfile.SoundFile."""
    try:
        if not path.exists():
            beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
            near = did_you_mean(path.name, (name for name in beside if name != path.name))  # a link to nothing is there itself
            raise AudioError(f"cannot read {path}: no such file{near}")
        if path.is_dir():
            raise AudioError(f"cannot read {path}: it is a directory, not a file. Accepted: WAV, FLAC, Opus")
        if not path.is_file():
            pipe = f"; a pipe is read as stdin: (edgekws run --source stdin: < {path})" if path.is_fifo() else ". Accepted: WAV, FLAC, Opus"
            raise AudioError(f"cannot read {path}: not a file{pipe}")
        with path.open("rb") as probe:
            if not probe.read(1):
                raise AudioError(f"cannot read {path}: the file is empty")
    except OSError as error:
        raise AudioError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix.lower() in (".raw", ".pcm"):
        raise AudioError(f"cannot read {path}: raw samples have no header; read them as stdin: (edgekws run --source stdin: < {path})")
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise AudioError(f"cannot read {path}: the package soundfile does not work here ({error}); pip install soundfile") from error
    try:
        return soundfile.SoundFile(os.fsencode(path))  # of a str it takes UTF-8 alone
    except soundfile.SoundFileError as error:
        raise AudioError(f"cannot read {path}: not audio that is known here ({_reason(error)}). Accepted: WAV, FLAC, Opus") from error


def _blocks(path: Path, file: Any, closing: threading.Event | None = None) -> Iterator[np.ndarray]:
    """The recording in pieces of about a second: int16, shape (n,), n > 0, mono at 16 kHz."""
    import soundfile

    resampler = To16k(file.samplerate)
    got_any = False
    while closing is None or not closing.is_set():
        try:
            block = file.read(BLOCK_S * file.samplerate, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, ValueError) as error:
            raise AudioError(f"cannot read {path} any further: the file is damaged ({_reason(error)})") from error
        samples = resampler.feed(mono(block)) if len(block) else resampler.flush()
        if len(samples):
            got_any = True
            yield samples
        if not len(block):
            if not got_any:
                raise AudioError(f"cannot read {path}: there are no samples in it{_unfinished(path)}")
            return


def _unfinished(path: Path) -> str:
    """What helps where a recorder was killed before it wrote how long the recording is; "" elsewhere."""
    with path.open("rb") as file:
        magic, size = struct.unpack("<4sI", file.read(8).ljust(8))
    if magic != b"RIFF" or size + 1000 > path.stat().st_size:
        return ""
    return f" by its header, which was never finished. This reads what is behind it: edgekws run --source stdin: < {path}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")
