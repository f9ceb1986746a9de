"""The values that flow from microphone to event. Frozen; units in the names."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SAMPLE_RATE_HZ = 16_000
HOP_MS = 80
HOP_SAMPLES = SAMPLE_RATE_HZ * HOP_MS // 1000  # 1280 samples: one step of the network


@dataclass(frozen=True)
class AudioChunk:
    """Consecutive samples of one stream."""

    samples: np.ndarray
    """int16, shape (n,), mono at 16 kHz. n may be anything from 1 up."""
    first_sample: int
    """Index of samples[0] in the stream, lost samples counted."""
    gap_samples: int = 0
    """Samples lost right before this chunk. 0 = it continues the last one."""


@dataclass(frozen=True)
class Enrolled:
    """One keyword as one speaker says it, ready for the detector."""

    keyword: str
    speaker: str
    """Who recorded it; "" for a bundled keyword that belongs to nobody."""
    prototypes: np.ndarray
    """float32, shape (n, dim), rows of unit length: embeddings, or what sets them apart from other speech."""
    threshold: float
    """A score at or above it is a wake."""
    scale: float = 1.0
    """score = (similarity - what the cohort has of it - offset) * scale, so that scores of different keywords compare."""
    offset: float = 0.0
    cohort: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32, shape (m, dim): unit embeddings of other sounds, the same for all keywords of a model; m = 0 takes nothing off."""
    only_enrolled: bool = False
    """True: only this speaker may wake it. False: anyone may."""
    voice: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (50,), of unit length: how the speaker sounds (`edgekws.voice`); shape (0,) where that is not known."""
    word_samples: int = 0
    """How long the word is as they say it; 0 where no voice is known."""
    per_offset: float = 1.0
    """By how much the threshold moves for each 1 of the operator's `threshold_offset`."""
    takes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32, shape (k, dim): unit embeddings of the recordings, or what stands for them; k = 0 where nothing is compared with them."""
    rivals: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32, shape (r, dim): unit embeddings of what is no keyword and most like it; r = 0 takes nothing off."""
    wrong: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32, shape (w, dim): unit embeddings of what the user called no keyword; w = 0 takes nothing off."""


@dataclass(frozen=True)
class Detection:
    """A keyword was heard."""

    keyword: str
    speaker: str
    """Who spoke: of several who enrolled the keyword whose voice is nearest, else whose prototype is; "" if nobody's."""
    score: float
    threshold: float
    end_sample: int
    """Samples of the stream heard when the detector decided."""


@dataclass(frozen=True)
class Event:
    """A detection as it is remembered and told to others."""

    keyword: str
    speaker: str
    score: float
    threshold: float
    time_s: float
    """Seconds since the epoch, UTC."""
    stream_s: float
    """Seconds of audio heard when the detector decided."""
    latency_ms: float
    """From the last sample's arrival to the decision: computing only."""
    model: str
    """Id of the model version that heard it."""
    kind: str = "wake"
    id: int = 0
    """Row in the store; 0 = not stored."""
    extra: dict[str, object] = field(default_factory=dict)


def befell(kind: str, model: str, time_s: float, stream_s: float = 0.0, **extra: object) -> Event:
    """An event that is no wake; `extra` is what there is to know of it."""
    return Event("", "", 0.0, 0.0, time_s, stream_s, 0.0, model, kind, extra=extra)


@dataclass(frozen=True)
class Clip:
    """A piece of audio that was kept to learn from; the store has its samples."""

    label: str
    """positive: the keyword. between: near it, for a second opinion, never trained on as it is. negative: not the keyword."""
    keyword: str
    """Whose score decided; "" in a negative that is far from every keyword: the room."""
    speaker: str
    score: float
    """The highest of the moment, -log10 of false wakes an hour."""
    decided_sample: int
    """Index in the clip of the end of the hop whose score decided, a whole number of hops; in a clip of the room its length."""
    duration_s: float
    reason: str
    state: str = "quarantined"
    """quarantined: as it came. admitted: after a second opinion. confirmed: by a person. rejected: not to be used."""
    model: str = ""
    """Id of the model version that heard it."""
    time_s: float = 0.0
    """Of the decision, seconds since the epoch, UTC; of a wake that of its event, to the bit."""
    event: int = 0
    """Id of the wake that it was; 0 = none."""
    id: int = 0
    """Row in the store; 0 = not stored."""
    file: str = ""
    """Its name in the store."""
    threshold: float = 0.0
    """What the score was short of or reached; 0 in a clip of the room."""
