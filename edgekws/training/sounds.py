"""What is learned from and tested on: recordings of a keyword and other sounds, under one another, and as they might be said again.

Mixing happens on mel power: frames are logarithms of power, and the power of independent sounds adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekws.frontend import HOP_FRAMES, N_MELS

WARM_HOPS = 24  # convolutions' second, then the window's: from here on an embedding heard only the crop
NOISE_DB = (-6.0, 3.0)  # gain of the ambience under a clean recording; as loud as it is in the room, and around
GAIN = 0.2  # in the frames' unit: ±3.5 dB
SPEED, PITCH = 0.1, 0.04  # standard deviations of the logarithm, between takes of one speaker


@dataclass(frozen=True)
class Example:
    """A recording that holds the keyword."""

    frames: np.ndarray
    """(T, 40) log-mel."""
    word_hop: int
    """The hop at which the word has been heard."""


@dataclass(frozen=True)
class Sound:
    """Something that is no keyword."""

    frames: np.ndarray
    """(T, 40) log-mel."""
    taught: np.ndarray
    """What the teacher says of it, hop by hop: (T // 4, step_dim)."""
    hop: int | None = None
    """Where it is most like a keyword; None = nowhere in particular."""
    but: tuple[int, ...] = ()
    """Lessons that it is nothing against: what is no "jarvis" may be somebody's "computer"."""


@dataclass(frozen=True)
class Lesson:
    """One keyword of one speaker."""

    prototype: np.ndarray
    """float32, (dim,), of unit length."""
    threshold: float
    """As a similarity, what the cohort has in common taken off."""
    own: Sequence[Example]
    pseudo: Sequence[Example] = ()


@dataclass(frozen=True)
class Lessons:
    """What a network is to learn."""

    keywords: Sequence[Lesson]
    cohort: np.ndarray
    """float32, (cohort, dim)."""
    ambience: Sequence[Sound]
    """The room without the keyword."""
    replay: Sequence[Sound]
    """Clean speech: shipped, the same for all."""
    hard: Sequence[Sound] = ()
    """Near misses, which are no keyword."""


def mix(frames: np.ndarray, under: np.ndarray, gain_db: float) -> np.ndarray:
    """Log-mel frames of two sounds at once, the second `gain_db` louder than it was: float32, same shape."""
    # log(a + b) = max + log1p(exp(min - max)); a frame is (log power - 7) / 4
    other = under + np.float32(gain_db * np.log(10) / 40)
    high, low = np.maximum(frames, other), np.minimum(frames, other)
    return np.asarray(high + 0.25 * np.log1p(np.exp((low - high) * 4)), np.float32)


def crop(frames: np.ndarray, last_hop: int, hops: int) -> np.ndarray:
    """`hops` hops that end with `last_hop`; what lies outside repeats the recording's edge. float32 (4 · hops, 40)."""
    rows = np.arange((last_hop + 1 - hops) * HOP_FRAMES, (last_hop + 1) * HOP_FRAMES)
    return np.asarray(frames[np.clip(rows, 0, len(frames) - 1)], np.float32)


def said_again(one: Example, rng: np.random.Generator) -> Example:
    """As the same person might say it another time: slower or faster, higher or lower.

    In training: of a speaker's unseen takes in quiet a network of 34 000 parameters heard 1.00 and 0.96 with it, 0.70 and 0.61 without
    (two development lives, at 0.5 false accepts an hour); a third life 0.60 either way.
    """
    slower, higher = np.exp(rng.normal(0, (SPEED, PITCH)))
    return Example(warped(one.frames, np.arange(0, len(one.frames) - 1, 1 / slower), higher), later(one.word_hop, slower))


def elsewhere(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sound of the room as another time or place would have it: twice as far away as a take said again, and of another colour."""
    slower, higher = np.exp(rng.normal(0, (2 * SPEED, 2 * PITCH)))
    sound = warped(frames, np.arange(0, len(frames) - 1, 1 / slower), higher)
    return sound + np.linspace(-1, 1, N_MELS, dtype=np.float32) * np.float32(rng.normal(0, GAIN))


def later(hop: int, slower: float) -> int:
    """Where a hop is in what is so much slower."""
    return round((hop + 1) * float(slower)) - 1


def warped(frames: np.ndarray, rows: np.ndarray, higher: float) -> np.ndarray:
    """These rows, at fractions of an index, `higher` than they were."""
    bands = np.clip(np.arange(N_MELS) / higher, 0, N_MELS - 1)
    return np.ascontiguousarray(_between(_between(np.asarray(frames, np.float32), rows).T, bands).T)


def _between(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows at fractions of an index, by linear interpolation."""
    low = np.minimum(at.astype(int), len(rows) - 2)
    share = (at - low).astype(np.float32)[:, None]
    return np.asarray(rows[low] * (1 - share) + rows[low + 1] * share, np.float32)
