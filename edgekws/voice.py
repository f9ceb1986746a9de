"""Whose voice said the word: it names the speaker where several enrolled one keyword. It turns nobody away, and is no lock.

The embedding tells words and not voices. So of the word's log-mel are taken, as a recogniser of speakers did before networks, the mean and
spread of its cepstra, the mean of its louder frames, the spread of what changes from frame to frame, and the pitch. A linear discriminant
(Fisher, 1936; shrunk) learnt from readers who say other words keeps what differs between people and not within one. Whose recordings' mean
has the highest cosine with it is who spoke. Told in deviations from readers' voices (Z-norm) it named the same on the digits: not done.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources

import numpy as np

from edgekws.frontend import N_MELS, log_mel
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, Enrolled

TAIL_HOPS = 2  # from the end of a word to the hop that decides
HEARD_HOPS = 25  # 2 s before a wake, in which its word lies
# How far from there and how long, for its usual length, what seems to be the word may be. Digits in quiet, noise at 10 dB and that room,
# equal error rates: with this 11, 20 and 24 %; only where it seems to end 6, 35 and 31; never there 20, 19 and 30.
NEAR_HOPS, LENGTH = 4, (0.6, 1.5)
MARGIN_SAMPLES = SAMPLE_RATE_HZ // 20  # that are taken on either side of a word
CEPSTRA = 20
FEATURES = 4 * CEPSTRA - 2 + 1
LOUDER = 40  # percentile: the frames from it up count as louder
# Of the pitch: frames of 40 ms each 20 ms, and lags from 400 Hz down to 60. The FFT holds a frame and the longest lag.
PITCH_FRAME, PITCH_STEP, PITCH_FFT = 640, 320, 1024
PITCH_LAGS = slice(SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 60 + 1)
VOICED = 0.6  # normalised autocorrelation
OCTAVE = 0.05  # that a lag loses to half of it, which as a rule is nearly as high: without it 220 Hz were told as 73, names stayed the same
# White and pink noise and hum stay within it of their tenth percentile (not a rumble below 100 Hz), takes of the corpus rise 5.9 or more.
STANDS_OUT_DB = 3.0
_DCT = np.cos(np.pi / N_MELS * (np.arange(N_MELS)[:, None] + 0.5) * np.arange(CEPSTRA)) * np.sqrt(2 / N_MELS)
_WINDOW = np.hanning(PITCH_FRAME)


def speech_span(samples: np.ndarray) -> tuple[int, int]:
    """First sample of the word and the one after its last, in int16 (n,); (0, 0) if nothing stands out.

    Frames of 20 ms within 18 dB of the loudest, and above the recording's floor, make stretches; those less than 0.3 s apart are one word;
    the word with the most energy above the limit counts, so that a door or another voice at the clip's end does not.
    """
    frames = centred(samples[: len(samples) // 320 * 320]).reshape(-1, 320)
    if len(frames) < 3:
        return 0, 0
    power = np.convolve((frames**2).mean(1), np.ones(3) / 3, "same")
    level_db = 10 * np.log10(power + 1e-3)
    if level_db.max() - np.percentile(level_db, 10) < STANDS_OUT_DB:
        return 0, 0
    limit_db = max(level_db.max() - 18, min(np.percentile(level_db, 10) + 6, level_db.max() - 6))
    over = np.flatnonzero(level_db > limit_db)
    stretches = np.split(over, np.flatnonzero(np.diff(over) > 15) + 1)
    word = max(stretches, key=lambda part: float((level_db[part] - limit_db).sum()))
    return (int(word[0]) * 320, int(word[-1] + 1) * 320) if len(word) else (0, 0)


def centred(samples: np.ndarray) -> np.ndarray:
    """Without the offset that cheap microphones have: the front-end does not hear it, and 3 % of full scale hid a word in its energy."""
    found = samples.astype(np.float32)
    return np.asarray(found - (found.mean() if len(found) else 0))


def word_at(samples: np.ndarray, start: int, end: int) -> np.ndarray:
    """The word with 50 ms on either side, of 2 s at most: int16 (n,) → int16 (m,)."""
    end = min(len(samples), end + MARGIN_SAMPLES)
    return samples[max(0, start - MARGIN_SAMPLES, end - HEARD_HOPS * HOP_SAMPLES) : end]


def said(heard: np.ndarray, word_samples: int) -> np.ndarray:
    """The word of a wake, as long as it was enrolled: int16 (n,), the last 2 s up to the end of the hop that decided → int16 (m,).

    It ends where it seems to, if that is near where a wake's word ends and the word has about its length; else, as in noise, just there.
    """
    start, end = speech_span(heard)
    usual = max(0, len(heard) - TAIL_HOPS * HOP_SAMPLES)
    if abs(end - usual) > NEAR_HOPS * HOP_SAMPLES or not LENGTH[0] <= (end - start) / max(1, word_samples) <= LENGTH[1]:
        end = usual
    return word_at(heard, end - word_samples, end)


def pitch(word: np.ndarray) -> float:
    """log2 of its fundamental frequency in Hz, the median over voiced frames; 7 where there is none. int16 (n,)."""
    count = max(0, len(word) - PITCH_FRAME) // PITCH_STEP
    if not count:
        return 7.0
    frames = np.lib.stride_tricks.sliding_window_view(word, PITCH_FRAME)[: count * PITCH_STEP : PITCH_STEP].astype(np.float64)
    frames -= frames.mean(1, keepdims=True)
    energy = (frames**2).sum(1)
    frames, energy = frames[energy >= 1e3], energy[energy >= 1e3]
    if not len(frames):
        return 7.0
    # Autocorrelation over that of the window, and the cost of an octave, after Boersma (1993).
    found, window = (np.fft.irfft(np.abs(np.fft.rfft(one, PITCH_FFT)) ** 2)[..., : PITCH_LAGS.stop] for one in (frames * _WINDOW, _WINDOW))
    found = found[:, PITCH_LAGS] / found[:, :1] / (window[PITCH_LAGS] / window[0])
    lags = np.arange(PITCH_LAGS.start, PITCH_LAGS.stop)
    best = (found - OCTAVE * np.log2(lags)).argmax(1)
    lags, height = lags[best], found[np.arange(len(found)), best]
    voiced = (height > VOICED) & (energy > 0.02 * energy.max())
    if voiced.sum() < 3:
        voiced = height >= np.sort(height)[-3:][0]
    return float(np.median(np.log2(SAMPLE_RATE_HZ / lags[voiced])))


def features(word: np.ndarray) -> np.ndarray:
    """What is taken of a word's sound: int16 (n,) → float64 (79,)."""
    frames = 4 * log_mel(word)  # natural logarithm of power
    frames = frames[2:] if len(frames) > 8 else frames  # the first look back before the word
    if not len(frames):
        return np.zeros(FEATURES)
    cepstra = frames @ _DCT
    level = frames.mean(1)
    louder = cepstra[level >= np.percentile(level, LOUDER)]
    change = np.diff(cepstra, axis=0).std(0) if len(cepstra) > 2 else np.zeros(CEPSTRA)
    return np.concatenate([cepstra.mean(0)[1:], cepstra.std(0), louder.mean(0)[1:], change, [pitch(word)]])


@functools.cache
def _discriminant() -> tuple[np.ndarray, np.ndarray]:
    """The shipped one: float32, the mean of the readers' features (79,), and directions (79, 50) of features less that."""
    with resources.as_file(resources.files("edgekws") / "models" / "voices.npz") as path, np.load(path, allow_pickle=False) as data:
        return data["mean"], data["matrix"]


def profile(words: Sequence[np.ndarray]) -> np.ndarray:
    """A voice by its words, int16 (n,) each: unit float32 (50,)."""
    mean, matrix = _discriminant()
    found = np.array([(features(word) - mean) @ matrix for word in words])
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    total = found.sum(0)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-9), np.float32)


def who(heard: np.ndarray, enrolled: Sequence[Enrolled]) -> Enrolled:
    """Whose voice is most like that of the word that ends these samples.

    Args:
        heard: int16, shape (n,): the last 2 s, up to the end of the hop that decided.
        enrolled: of one keyword, with a voice each.
    """
    word = said(heard, int(np.median([one.word_samples for one in enrolled])))
    return enrolled[int(np.argmax(np.array([one.voice for one in enrolled]) @ profile([word])))]
