"""What tells voices apart (`edgekws.voice`), learnt from the readers of a corpus."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import scipy.signal

from edgekws.evaluation import active, add_noise, reverberate, room_response, speech_power
from edgekws.training.datasets import load_corpus
from edgekws.training.material import coloured, made_noise, read_audio, to_int16, train_files
from edgekws.values import SAMPLE_RATE_HZ
from edgekws.voice import features, word_at

# Every reader three times, as other people: as recorded, and played an eighth slower and faster, pitch and formants with it.
RESAMPLED = ((1, 1), (9, 8), (8, 9))
FRAGMENTS = 16  # of each, cut out of what they read as if they were words
FRAGMENT_S = (0.45, 1.0)
BEFORE, AFTER = SAMPLE_RATE_HZ // 2, SAMPLE_RATE_HZ // 4  # samples of the surroundings that a disturbance is given
SPOKEN = 0.75  # of a fragment, at least
DIM = 50
SHRINK = 0.3  # of the mean variance within a voice, added to each direction's
FEWEST = 20  # readers


def write_voices(path: Path, corpus: Path) -> bool:
    """Learn from the corpus' readers that are for training, and write the npz. False, and nothing written, where they are too few."""
    files = set(train_files(corpus)[0])
    readers: dict[str, list[tuple[Path, float, float]]] = {}
    for one in load_corpus(corpus):
        if one.path in files and one.speaker and one.duration_s and one.duration_s > 2 * FRAGMENT_S[1]:
            readers.setdefault(one.speaker, []).append((one.path, one.start_s, one.duration_s))
    if len(readers) < FEWEST:
        return False
    rng = np.random.default_rng(6)
    read = functools.cache(read_audio)
    rows = []
    for parts in readers.values():
        some = [parts[i] for i in rng.permutation(len(parts))[:FRAGMENTS]]
        said = [read(file)[round(at_s * SAMPLE_RATE_HZ) : round((at_s + lasts_s) * SAMPLE_RATE_HZ)] for file, at_s, lasts_s in some]
        for up, down in RESAMPLED:
            voice = [to_int16(scipy.signal.resample_poly(one.astype(np.float32), up, down)) for one in said]
            rows.append([features(fragment(voice[k % len(voice)], k % 4, rng)) for k in range(FRAGMENTS)])
    mean, matrix = discriminant(np.array(rows))
    np.savez_compressed(path, mean=mean.astype(np.float32), matrix=matrix.astype(np.float32))
    return True


def fragment(samples: np.ndarray, how: int, rng: np.random.Generator) -> np.ndarray:
    """A word's length of speech, int16, as `how` has it: 0 as it is, 1 in noise, 2 by another microphone in a room, 3 both."""
    spoken = active(samples)
    for _ in range(20):
        length = round(rng.uniform(*FRAGMENT_S) * SAMPLE_RATE_HZ)
        start = int(rng.integers(max(1, len(samples) - length)))
        if spoken[start // 320 : (start + length) // 320].mean() > SPOKEN:
            break
    first = max(0, start - BEFORE)
    around = samples[first : start + length + AFTER].astype(np.float32)
    if how >= 2:
        around = reverberate(coloured(around, rng), room_response(rng)) * np.float32(10 ** (rng.uniform(-10, 6) / 20))
    if how % 2:
        below_db = rng.uniform(5, 22) if how == 1 else rng.uniform(10, 30)
        around = add_noise(around, speech_power(around, active(around)), made_noise(rng, len(around)), below_db)
    return word_at(to_int16(around), start - first, start - first + length)


def discriminant(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of features (voices, words, d) the mean (d,), and the directions that differ most between voices beside within one (d, DIM)."""
    mean, spread = rows.mean((0, 1)), rows.std((0, 1)) + 1e-6
    rows = (rows - mean) / spread
    within = rows - rows.mean(1, keepdims=True)
    covariance = np.einsum("vwi,vwj->ij", within, within) / (rows.shape[0] * rows.shape[1])
    covariance += SHRINK * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    white = vectors / np.sqrt(values)
    _, turned = np.linalg.eigh(white.T @ np.cov(rows.mean(1).T) @ white)
    return mean, (white @ turned[:, ::-1][:, :DIM]) / spread[:, None]
