"""From a URI to an open source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgekws.audio.files import FileSource
from edgekws.audio.microphone import MicSource
from edgekws.audio.source import Source, did_you_mean
from edgekws.audio.stdin import StdinSource
from edgekws.errors import AudioError, SoundLost, UsageError
from edgekws.values import SAMPLE_RATE_HZ

SCHEMES: dict[str, Callable[[str, str], Source]] = {"mic": MicSource, "file": FileSource, "stdin": StdinSource}
ACCEPTED = "mic:NAME (mic:default), file:PATH or a path, stdin:"


def open_source(uri: str) -> Source:
    """The source that a URI names, open and running.

    mic:NAME     a microphone by its name or a part of it. ?host_api=ALSA ?rate=48000
    file:PATH    WAV, FLAC or Opus, any rate and number of channels. ?paced=1 in real time, ?chunk=N samples a chunk.
                 Of Ogg or FLAC files that were joined into one the first is read (libsndfile)
    stdin:       raw s16le samples, or a WAV stream. ?rate=16000 ?channels=1
    PATH         as file:PATH

    Raises:
        UsageError: no kind of source, or no option or value of an option, that there is.
        AudioError: no such source, or it cannot be opened.
    """
    scheme, colon, rest = uri.partition(":")
    if colon and scheme in SCHEMES:
        return SCHEMES[scheme](uri, rest)
    if not uri:
        raise UsageError(f"no source of audio was named. Accepted: {ACCEPTED}")
    if not Path(uri).exists():
        if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            raise UsageError(f'cannot open {uri}: unknown kind of source "{scheme}:"{_did_you_mean(scheme)}. Accepted: {ACCEPTED}')
        if uri in SCHEMES:
            raise UsageError(f'cannot open {uri}: no such file (did you mean "{uri}:"?). Accepted: {ACCEPTED}')
        if not colon and not Path(uri).suffix:
            raise AudioError(f'cannot open {uri}: no such file. Is it a microphone, "mic:{uri}"? Accepted: {ACCEPTED}')
    return FileSource(uri, uri)


def record(uri: str, seconds: float) -> np.ndarray:
    """The next seconds of a source.

    Returns:
        int16, shape (seconds * 16000,), mono; shorter where the source ends earlier.

    Raises:
        AudioError: it cannot be opened or read.
        SoundLost: samples were lost within the recording.
    """
    wanted = round(seconds * SAMPLE_RATE_HZ)
    if wanted < 1:
        raise AudioError(f"cannot record {seconds} s from {uri}: the time must be above 0 s")
    parts: list[np.ndarray] = []
    count = 0
    with open_source(uri) as source:
        for chunk in source.chunks():
            if chunk.gap_samples and parts:
                lost_ms = max(1, chunk.gap_samples * 1000 // SAMPLE_RATE_HZ)
                raise SoundLost(f"{uri} lost {lost_ms} ms of sound while recording; record again")
            parts.append(chunk.samples)
            count += len(chunk.samples)
            if count >= wanted:
                break
    return np.concatenate(parts)[:wanted]


def _did_you_mean(scheme: str) -> str:
    return did_you_mean(f"{scheme}:", [f"{known}:" for known in SCHEMES])
