"""How well a model hears the people of a corpus: the only definition of accuracy in the project.

A corpus is a folder with a manifest.csv (path, kind, label, speaker, take, split, duration_s). Each user, a keyword and a speaker, is
enrolled from the takes marked `enrol`; those marked `test` are listened to by the user's own model, everything of kind `negative` by
every user's. Splits may carry a prefix ("seenkw-test"). What the model was trained on is left out, and of a keyword's negatives the
utterances in which the reader says it (`SAID`, by segments.csv).

protocol stream     As deployed: hop by hop, a score at or above the threshold is an event, none in the 2 s after one. A take lies between
                    1.5 s and 1 s of noise at -70 dBFS, and is recognised by an event between its start and 0.5 s after its end. Other
                    events beside it are `stray_events`; false accepts are the events in the negatives, each behind 2 s of such noise that
                    count for nothing: a listener hears on from file to file, and starts anew with none. One threshold serves all users
                    of a keyword: the lowest at which their mean false accepts an hour stay within the rate. Recall is over pooled takes.
protocol paper      As published: takes and single utterances (segments.csv; else pieces of 10 s) between 1 s of zeros on each side, at most
                    one false accept an utterance, a threshold for each user, recall averaged over users, no delay.

clean               As recorded.
noise10, 5, 0       The corpus' noise under takes and negatives. dB between the mean power of speech in its active 20 ms frames and the
                    mean power of the noise. A file's noise is the same in all three.
follow              Other speech, cut from the negatives at an onset, 0.15 s behind the end of the word, as loud as the word; the negatives
                    are those of clean.
room                Takes and negatives through a room: direct sound, then noise that decays with an RT60 of 0.3 to 0.6 s and is 0 to 6 dB
                    weaker in all, both drawn for each file; then the corpus' noise at 15 dB.
others              The same word by the keyword's other users, at the thresholds of clean: a rate, neither good nor bad.

A frame is active within 30 dB of the file's level (97th percentile) and in the upper two thirds of the way to it from its floor (10th). The
word is the stretch of active frames, gaps up to 0.3 s closed, that holds the most energy; the delay counts from its end. Randomness is
seeded by each file's path in the corpus, so the same command gives the same figures.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.audio import duration_s, read_recording
from edgekws.detector import REFRACTORY_S, background, scores
from edgekws.engines import Engine, load_engine
from edgekws.enrolment import copy_of, embed, enrol
from edgekws.errors import AudioError, EdgekwsError, EnrolmentError, UsageError
from edgekws.model import Model
from edgekws.pictures import new_figure, save
from edgekws.values import HOP_MS, HOP_SAMPLES, SAMPLE_RATE_HZ, Enrolled
from edgekws.voice import centred

PROTOCOLS = ("stream", "paper")
SNR_DB = {"noise10": 10.0, "noise5": 5.0, "noise0": 0.0, "room": 15.0}
CONDITIONS = ("clean", "noise10", "noise5", "noise0", "follow", "room", "others")
RATES = (0.1, 0.5, 1.0)  # false accepts an hour
HIGHEST_RATE = 2.0  # of the average viable recall
REFRACTORY_HOPS = -(-round(REFRACTORY_S * SAMPLE_RATE_HZ) // HOP_SAMPLES)  # 25
BEFORE_S, AFTER_S, TAIL_S, PAD_DBFS = 1.5, 1.0, 0.5, -70.0
QUIET_HOPS = 25  # 2 s, the networks hear 1.9: what a negative's first hops score is its own, not a fresh stream's
FOLLOW_S = 0.15
PAPER_PAD_S, PAPER_PIECE_S = 1.0, 10.0
FRAME = SAMPLE_RATE_HZ // 50  # 20 ms
WORD_GAP_FRAMES = 15  # 0.3 s
SNIPPET_S, SNIPPET_EVERY_S = 6, 30  # other speech for `follow`
LONG_TAKE_S = 6.0  # no single word
SHOWN = 5  # of files that cannot be read
OTHER_LENGTH_S = 0.5  # than the manifest says: no rounding and no codec's delay
PINK_BLOCK = 1 << 20  # samples, 66 s
OFFSET_SHARE = 0.01
LEAST_NOISE = SAMPLE_RATE_HZ // 10  # samples that can be heard: a recording with fewer is none
CACHED_HOURS = 4.0  # of decoded negatives kept in memory between conditions, the first ones: 115 MB an hour


# Counting.


def events(values: np.ndarray, threshold: float) -> np.ndarray:
    """The hops at which a `Detector` would report a wake.

    Args:
        values: float32, shape (T,), the score of each hop of one stream.

    Returns:
        int, shape (events,), rising.
    """
    over = np.flatnonzero(values >= _float32_at_or_above(threshold))
    found = []
    i = 0
    while i < len(over):
        found.append(over[i])
        i = int(np.searchsorted(over, over[i] + REFRACTORY_HOPS))
    return np.array(found, np.int64)


def _float32_at_or_above(threshold: float) -> np.float32:
    """So that comparing float32 scores with it gives what comparing them with the double would, in any version of NumPy."""
    rounded = np.float32(threshold)
    return rounded if float(rounded) >= threshold else np.nextafter(rounded, np.float32(np.inf))


def false_accept_steps(streams: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The thresholds at which one more event comes, all streams together: the `count` highest, highest first, float32.

    The number of events never falls as the threshold does: taking the earliest possible ones fits in as many as can be.
    """
    # Of any 25 hops in a row at least every other stretch whose peak is high enough has an event of its own.
    blocks = [np.pad(s, (0, -len(s) % REFRACTORY_HOPS), constant_values=-np.inf).reshape(-1, REFRACTORY_HOPS).max(1) for s in streams]
    peaks = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    floor = np.partition(peaks, -2 * count)[-2 * count] if len(peaks) > 2 * count else -np.inf
    steps: list[np.float32] = []
    for stream, block in zip(streams, blocks, strict=True):
        if not len(block) or block.max() < floor:
            continue
        before = 0
        for threshold in np.unique(stream[stream >= floor])[::-1]:
            now = len(events(stream, float(threshold)))
            steps += [threshold] * (now - before)
            before = now
    return np.sort(np.array(steps, np.float32))[::-1][:count]


def wilson(share: float, n: float) -> list[float]:
    """95 % interval of a share of n trials."""
    if n == 0:
        return [0.0, 1.0]
    z2 = 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def effective_takes(heard: Sequence[Sequence[bool]]) -> float:
    """So many independent takes tell as much as these, one sequence a person: takes of one person are alike.

    Their number over the design effect, the variance of the share over people beside that of independent takes (Kish 1965), at least 1.
    """
    people = [one for one in heard if len(one)]
    takes, share = sum(map(len, people)), sum(map(sum, people)) / max(1, sum(map(len, people)))
    if len(people) < 2 or share in (0.0, 1.0):
        return float(takes)
    over_people = len(people) / (len(people) - 1) * sum((sum(one) - share * len(one)) ** 2 for one in people) / takes**2
    return takes / max(1.0, over_people / (share * (1 - share) / takes))


WORSE = 0.05  # what chance alone does this seldom is harm


def chance_of_fall(now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """How likely chance alone takes so much from the recall of a life: rows of `bench adaptation` of the same takes, one side.

    McNemar's exact test on the takes that only one of the two heard. Older rows do not tell which were heard: two proportions.
    """
    if "heard" in now and "heard" in before:
        lost, gained = (
            sum(a == "1" != b for a, b in zip(*two, strict=True))
            for two in ((before["heard"], now["heard"]), (now["heard"], before["heard"]))
        )
        return sign_test(lost, gained)
    share = (now["deployed_recall"] + before["deployed_recall"]) / 2
    spread = math.sqrt(max(2 * share * (1 - share) / now["takes"], 1e-12))
    return 0.5 * math.erfc((before["deployed_recall"] - now["deployed_recall"]) / spread / math.sqrt(2))


def household_name(living: Sequence[str], guests: Sequence[str]) -> str:
    """As rows of `bench adaptation` have it: "ann+bob", with cy as a guest "ann+bob (cy)"."""
    return "+".join(living) + (f" ({'+'.join(guests)})" if guests else "")


def people_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A household's row of `bench adaptation` for each person by themselves: their takes, which were heard, and whether they are a guest.

    Somebody who lives alone has one.
    """
    if "takes_of" not in row:
        return [{**row, "guest": False}]
    found = []
    at = 0
    names = list(row["takes_of"])
    guests = next(names[i:] for i in range(1, len(names) + 1) if row["user"] == household_name(names[:i], names[i:]))
    for speaker, takes in row["takes_of"].items():
        heard = row["heard"][at : at + takes]
        at += takes
        recall = heard.count("1") / takes
        found.append({**row, "user": speaker, "guest": speaker in guests, "takes": takes, "heard": heard, "deployed_recall": recall})
    return found


def sign_test(lost: int, gained: int) -> float:
    """How likely chance alone loses so many of as many pairs, or more."""
    return sum(math.comb(lost + gained, k) for k in range(lost, lost + gained + 1)) / 2 ** (lost + gained)


def poisson(count: int, hours: float) -> list[float]:
    """Exact 95 % interval of the rate an hour after `count` events in so many hours (Garwood)."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])  # log k!

    def at_most(k: int, mean: float) -> float:
        return float(np.exp(np.arange(k + 1) * math.log(mean) - mean - logs[: k + 1]).sum())

    def mean_where(k: int, probability: float) -> float:
        low, high = 1e-9, count + 10 * math.sqrt(count + 1) + 10
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > probability else (low, middle)
        return high

    return [mean_where(count - 1, 0.975) / hours if count else 0.0, mean_where(count, 0.025) / hours]


# Sound.


def active(samples: np.ndarray) -> np.ndarray:
    """Where speech is active: bool, shape (n // 320,), one for each 20 ms; all of them if nothing stands out."""
    frames = centred(samples[: len(samples) // FRAME * FRAME]).reshape(-1, FRAME)
    if not len(frames):
        return np.zeros(0, bool)
    level_db = 10 * np.log10((frames**2).mean(1) + 1e-3)
    floor, level = np.percentile(level_db, (10, 97))
    return np.asarray(level_db >= max(level - 30, level - (level - floor) * 2 / 3))


def word_end(samples: np.ndarray) -> int:
    """The sample at which the energy of the word in a take ends."""
    on = active(samples)
    hot = np.flatnonzero(on)
    if not len(hot):
        return len(samples)
    energy = (centred(samples[: len(on) * FRAME]).astype(np.float64).reshape(-1, FRAME) ** 2).sum(1) * on
    stretches = np.split(hot, np.flatnonzero(np.diff(hot) > WORD_GAP_FRAMES + 1) + 1)
    word = max(stretches, key=lambda frames: float(energy[frames].sum()))
    return int(word[-1] + 1) * FRAME


def speech_power(samples: np.ndarray, on: np.ndarray) -> float:
    """Mean power in the active frames."""
    speech = centred(samples[: len(on) * FRAME]).reshape(-1, FRAME)[on].ravel()
    return float(np.dot(speech, speech)) / max(len(speech), 1)


def add_noise(samples: np.ndarray, power: float, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """`noise` under `samples`, its mean power `snr_db` below `power`."""
    own = max(float(np.dot(noise, noise)) / max(len(noise), 1), 1e-9)
    return np.asarray(samples + noise * np.float32(math.sqrt(power / own * 10 ** (-snr_db / 10))))


def room_response(rng: np.random.Generator) -> np.ndarray:
    """A synthetic room: direct sound, then decaying noise. float32, shape (0.3 to 0.6 s,), of unit energy."""
    rt60_s, direct_db = rng.uniform(0.3, 0.6), rng.uniform(0.0, 6.0)
    t = np.arange(round(rt60_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    response = rng.standard_normal(len(t)) * 10 ** (-3 * t / rt60_s)
    response[t < 0.002] = 0
    response *= math.sqrt(10 ** (-direct_db / 10) / float((response**2).sum()))
    response[0] = 1.0
    return (response / math.sqrt(float((response**2).sum()))).astype(np.float32)


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolved by overlap-add, cut to the same length: float32, shape (n,)."""
    size = 1 << 16
    step = size - len(response) + 1
    spectrum = np.fft.rfft(response, size)
    out = np.zeros(len(samples) + size, np.float32)
    for first in range(0, len(samples), step):
        out[first : first + size] += np.fft.irfft(np.fft.rfft(samples[first : first + step], size) * spectrum, size).astype(np.float32)
    return out[: len(samples)]


def _random(path: str, what: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{what}:{path}".encode()).digest()[:8], "little"))


def _pcm(samples: np.ndarray) -> np.ndarray:
    """To int16; a mixture that is too loud is turned down, not clipped."""
    if samples.dtype == np.int16:
        return samples
    peak = float(np.abs(samples).max()) if len(samples) else 0.0
    return np.round(samples * min(1.0, 32767 / max(peak, 1.0))).astype(np.int16)


def pink(rng: np.random.Generator, count: int) -> np.ndarray:
    """Made noise: float32, shape (count,).

    In blocks of a power of two, 66 s at most: one transform of as many samples as it takes took minutes and gigabytes for some numbers.
    """
    size = min(PINK_BLOCK, 1 << max(count - 1, 1).bit_length())
    blocks = []
    for _ in range(-(-count // size)):
        spectrum = np.fft.rfft(rng.standard_normal(size)) / np.sqrt(np.arange(size // 2 + 1) + 1.0)
        spectrum[: 1 + 20 * size // SAMPLE_RATE_HZ] = 0  # nobody hears that half of the power: noise was 3 dB softer than asked
        blocks.append(np.fft.irfft(spectrum, size).astype(np.float32))
    return np.concatenate(blocks)[:count] if blocks else np.zeros(0, np.float32)


def noise_of(recordings: Sequence[np.ndarray], rng: np.random.Generator, count: int) -> np.ndarray:
    """One recording after the other, made noise where there is none: float32, shape (count,)."""
    if not recordings:
        return pink(rng, count)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < count:
        one = recordings[int(rng.integers(len(recordings)))]
        parts.append(np.roll(one, -int(rng.integers(len(one)))))
    return np.concatenate(parts)[:count] if parts else np.zeros(0, np.float32)


def without_offset(samples: np.ndarray) -> np.ndarray:
    """float32, centred where the offset of a recording is more than 1 % of its power, and as it is elsewhere.

    Noise of -41 dBFS with an offset of 1 % of full scale was 3.4 dB softer than asked for. In the shared corpus the most is 0.02 %: what
    was measured there stays.
    """
    samples = np.asarray(samples, np.float32)
    if not len(samples):
        return samples
    offset = float(samples.mean(dtype=np.float64))
    power = float(np.square(samples, dtype=np.float64).mean())
    return samples - np.float32(offset) if offset**2 > OFFSET_SHARE * power else samples


class _Noise:
    """Noise of any length, one recording of the corpus after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.silent = False
        """There are recordings, and none can be heard."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """float32, shape (count,)."""
        return noise_of(self._recordings, rng, count)

    @functools.cached_property
    def _recordings(self) -> list[np.ndarray]:
        """Those that can be heard, of unit power, without the silence that fills a short one up."""
        found = []
        for path in self._paths:
            samples = without_offset(read_recording(path))
            loud = np.flatnonzero(np.abs(samples) > 0.01 * np.sqrt((samples**2).mean()))
            samples = samples[int(loud[0]) : int(loud[-1]) + 1] if len(loud) else samples[:0]
            if len(samples) >= LEAST_NOISE and np.abs(samples).max() > 1:
                found.append(samples / np.float32(np.sqrt((samples**2).mean())))
        self.silent = bool(self._paths) and not found
        return found


# One user against takes and negatives, as scores.


@dataclass(frozen=True)
class Take:
    """What one model says to one take."""

    scores: np.ndarray
    """float32, shape (T,)."""
    first_sample: int
    last_sample: int
    """An event in here recognises it."""
    word_end: int | None = None
    again: bool = False
    """A recording that its user enrolled with, once more: hearing it says little of hearing the user."""

    def heard(self, threshold: float) -> tuple[int | None, int]:
        """The sample of the event that recognises it, if one does; and the number of other events."""
        at = (events(self.scores, threshold) + 1) * HOP_SAMPLES
        inside = at[(at >= self.first_sample) & (at <= self.last_sample)]
        return (int(inside[0]), len(at) - 1) if len(inside) else (None, len(at))


@dataclass
class User:
    """One keyword of one speaker."""

    keyword: str
    speaker: str
    enrolled: Enrolled | None
    """None: the enrolment was refused, and every take is missed."""
    negatives: list[np.ndarray] = field(default_factory=list)
    """Scores of each stream without keywords."""
    takes: list[Take] = field(default_factory=list)
    strangers: list[Take] = field(default_factory=list)
    """Other users' takes, for the condition `others`."""
    recordings: Sequence[np.ndarray] = ()
    """What it was enrolled with."""


def measure(users: Sequence[User], hours: float, protocol: str = "stream") -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of one keyword, and those of the condition `others`.

    Args:
        hours: of each user's negatives.
    """
    groups = [list(users)] if protocol == "stream" else [[user] for user in users]
    user_hours = hours * max(1, sum(user.enrolled is not None for user in users)) if protocol == "stream" else hours
    count = int(HIGHEST_RATE * user_hours + 1e-9) + 1  # thresholds of a group for 0, 1, 2 … events
    curves, thresholds, false = [], [], []
    for group in groups:
        steps = false_accept_steps([stream for user in group for stream in user.negatives], count)
        lowest = float(steps[-1]) if len(steps) else 0.0
        thresholds.append([float(np.nextafter(steps[k], np.float32(np.inf))) if k < len(steps) else lowest for k in range(count)])
        false.append([int((steps >= threshold).sum()) for threshold in thresholds[-1]])
        curves.append([_recall([(take, threshold) for user in group for take in user.takes]) for threshold in thresholds[-1]])
    allowed = [min(int(rate * user_hours + 1e-9), count - 1) for rate in RATES]
    curve = np.mean(curves, 0)
    takes = sum(len(user.takes) for user in users)
    telling = [
        effective_takes([_heard(user, levels[k]) for levels, members in zip(thresholds, groups, strict=True) for user in members])
        for k in allowed
    ]
    recall = {str(rate): float(curve[k]) for rate, k in zip(RATES, allowed, strict=True)}
    edges = np.minimum(np.arange(count + 1) / user_hours, HIGHEST_RATE)
    at_half = [(user, group[allowed[1]]) for group, members in zip(thresholds, groups, strict=True) for user in members]
    false_at = [sum(group[k] for group in false) for k in allowed]
    entry = {
        "users": len(users),
        "takes": takes,
        "recall_at_fa_per_hour": recall,
        "recall_interval": {rate: wilson(share, n) for (rate, share), n in zip(recall.items(), telling, strict=True)},
        "frr_at_fa_per_hour": {rate: 1 - share for rate, share in recall.items()},
        "false_accepts": {str(rate): n for rate, n in zip(RATES, false_at, strict=True)},
        "fa_interval": {str(rate): _rate_interval(n, users, hours) for rate, n in zip(RATES, false_at, strict=True)},
        "threshold": {str(rate): thresholds[0][k] for rate, k in zip(RATES, allowed, strict=True)} if len(groups) == 1 else None,
        "without_copies": _without_copies(groups, [levels[allowed[1]] for levels in thresholds]),
        "average_viable_recall": float((curve * np.diff(edges)).sum() / edges[-1]) if edges[-1] else float(curve[0]),
        **_beside([(take, threshold) for user, threshold in at_half for take in user.takes]),
        "deployed": _deployed(users, groups, hours, recall["0.5"]),
        "curve": [[float(k / user_hours), float(share)] for k, share in enumerate(curve) if k == 0 or share != curve[k - 1]],
    }
    return entry, {
        "users": len(users),
        "takes": sum(len(user.strangers) for user in users),
        "rate_at_fa_per_hour": {
            str(rate): _recall(
                [(t, levels[k]) for levels, members in zip(thresholds, groups, strict=True) for user in members for t in user.strangers],
                None,
            )
            for rate, k in zip(RATES, allowed, strict=True)
        },
        "deployed": {"rate": _recall([(t, user.enrolled.threshold) for user in users if user.enrolled for t in user.strangers], None)},
    }


def _without_copies(groups: Sequence[Sequence[User]], at_half: Sequence[float]) -> dict[str, Any]:
    """At 0.5 false accepts an hour and at the deployed thresholds, less the takes that are enrolment recordings once more."""
    kept = [[(user, take) for user in group for take in user.takes if not take.again] for group in groups]

    def recall(pairs: Sequence[Sequence[tuple[Take, float]]]) -> float | None:
        found = [_recall(group) for group in pairs if group]
        return float(np.mean(found)) if found else None

    half = [[(take, threshold) for _, take in group] for group, threshold in zip(kept, at_half, strict=True)]
    own = [[(take, user.enrolled.threshold if user.enrolled else math.inf) for user, take in group] for group in kept]
    return {
        "takes": sum(map(len, kept)),
        "recall_at_fa_per_hour": {"0.5": recall(half)},
        "delay_ms": _beside([pair for group in half for pair in group])["delay_ms"],
        "deployed": {"recall": recall(own)},
    }


def _deployed(users: Sequence[User], groups: Sequence[Sequence[User]], hours: float, oracle: float) -> dict[str, Any]:
    """Each user's own threshold, as enrolment set it."""
    false = {user.speaker: sum(len(events(s, user.enrolled.threshold)) for s in user.negatives) for user in users if user.enrolled}
    by_user = {speaker: count / hours for speaker, count in false.items()}
    pairs = [[(take, user.enrolled.threshold if user.enrolled else math.inf) for user in group for take in user.takes] for group in groups]
    recall = float(np.mean([_recall(group) for group in pairs]))
    return {
        "recall": recall,
        "recall_interval": wilson(recall, effective_takes([_heard(u, u.enrolled.threshold if u.enrolled else math.inf) for u in users])),
        "recall_below_oracle": oracle - recall,
        "fa_per_hour": sum(by_user.values()) / len(by_user) if by_user else None,
        "fa_interval": _rate_interval(sum(false.values()), users, hours),
        "false_accepts": sum(false.values()),
        "worst_user_fa_per_hour": max(by_user.values(), default=None),
        "users_above_2": sum(rate > 2 for rate in by_user.values()),
        "fa_per_hour_by_user": by_user,
        **_beside([pair for group in pairs for pair in group]),
    }


def _rate_interval(count: int, users: Sequence[User], hours: float) -> list[float] | None:
    listeners = sum(user.enrolled is not None for user in users)
    return poisson(count, hours * listeners) if listeners else None


def _heard(user: User, threshold: float) -> list[bool]:
    return [take.heard(threshold)[0] is not None for take in user.takes]


def _recall(pairs: Sequence[tuple[Take, float]], empty: float | None = 0.0) -> Any:
    """Share of the takes that are recognised at their thresholds."""
    return sum(take.heard(threshold)[0] is not None for take, threshold in pairs) / len(pairs) if pairs else empty


def _beside(pairs: Sequence[tuple[Take, float]]) -> dict[str, Any]:
    """From the end of the word to the event, and the events that recognise nothing."""
    heard = [(take, *take.heard(threshold)) for take, threshold in pairs]
    delays_ms = [(at - take.word_end) * 1000 / SAMPLE_RATE_HZ for take, at, _ in heard if at is not None and take.word_end is not None]
    p50, p95 = np.percentile(delays_ms, (50, 95)) if delays_ms else (None, None)
    return {
        "delay_ms": {"p50": None if p50 is None else float(p50), "p95": None if p95 is None else float(p95)},
        "stray_events": sum(stray for *_, stray in heard),
    }


def _mean(keywords: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Over keywords, each counting the same; the interval of a mean of recalls from theirs (MOVER)."""
    entries = list(keywords.values())

    def of(*names: str) -> float | None:
        found = [value for entry in entries if (value := _at(entry, names)) is not None]
        return sum(found) / len(found) if found else None

    if not entries:
        return {}
    if "rate_at_fa_per_hour" in entries[0]:
        rates = {str(r): of("rate_at_fa_per_hour", str(r)) for r in RATES}
        return {"rate_at_fa_per_hour": rates, "deployed": {"rate": of("deployed", "rate")}}

    def interval(share: tuple[str, ...], limits: tuple[str, ...]) -> list[float]:
        gaps = [[_at(entry, share) - limit for limit in _at(entry, limits)] for entry in entries]
        low, high = (math.sqrt(sum(gap[side] ** 2 for gap in gaps)) / len(gaps) for side in (0, 1))
        return [max(0.0, (of(*share) or 0.0) - low), min(1.0, (of(*share) or 0.0) + high)]

    by_user = [rate for entry in entries for rate in entry["deployed"]["fa_per_hour_by_user"].values()]
    return {
        "users": sum(entry["users"] for entry in entries),
        "takes": sum(entry["takes"] for entry in entries),
        "recall_at_fa_per_hour": {str(r): of("recall_at_fa_per_hour", str(r)) for r in RATES},
        "recall_interval": {str(r): interval(("recall_at_fa_per_hour", str(r)), ("recall_interval", str(r))) for r in RATES},
        "frr_at_fa_per_hour": {str(r): of("frr_at_fa_per_hour", str(r)) for r in RATES},
        "without_copies": {
            "takes": sum(entry["without_copies"]["takes"] for entry in entries),
            "recall_at_fa_per_hour": {"0.5": of("without_copies", "recall_at_fa_per_hour", "0.5")},
            "delay_ms": {p: of("without_copies", "delay_ms", p) for p in ("p50", "p95")},
            "deployed": {"recall": of("without_copies", "deployed", "recall")},
        },
        "average_viable_recall": of("average_viable_recall"),
        "delay_ms": {p: of("delay_ms", p) for p in ("p50", "p95")},
        "deployed": {
            "recall": of("deployed", "recall"),
            "recall_interval": interval(("deployed", "recall"), ("deployed", "recall_interval")),
            "recall_below_oracle": of("deployed", "recall_below_oracle"),
            "fa_per_hour": of("deployed", "fa_per_hour"),
            "fa_per_hour_over_users": sum(by_user) / len(by_user) if by_user else None,
            "worst_user_fa_per_hour": max(by_user, default=None),
            "users_above_2": sum(rate > 2 for rate in by_user),
            "delay_ms": {p: of("deployed", "delay_ms", p) for p in ("p50", "p95")},
        },
    }


def _at(entry: Any, names: Sequence[str]) -> Any:
    for name in names:
        entry = entry[name]
    return entry


# The corpus.

# Readers of the shared corpus' negatives say these keywords themselves, and "seventeen", which begins with one: such an utterance is no
# negative of it. By the texts of the CMU ARCTIC prompts; in the 61 LibriSpeech utterances that evaluate as far as pocketsphinx 5.1.1
# transcribes them.
SAID = {"digit-zero": ("arctic_b0358",), "digit-seven": ("arctic_a0342", "arctic_a0348", "arctic_b0391", "5393-19218", "6147-34605")}


@dataclass(frozen=True)
class Segment:
    """An utterance inside a negative: one line of segments.csv."""

    path: str
    first: int
    """Samples."""
    end: int
    source: str


def read_segments(corpus: Path) -> list[Segment]:
    """[] where there is no segments.csv. Raises EdgekwsError: it cannot be read."""
    table = corpus / "segments.csv"
    found: list[Segment] = []
    if table.exists():
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                for line in csv.DictReader(file):
                    first = round(float(line["start_s"]) * SAMPLE_RATE_HZ)
                    end = first + round(float(line["duration_s"]) * SAMPLE_RATE_HZ)
                    found.append(Segment(line["path"], first, end, line.get("source_path") or ""))
        except (OSError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
            raise EdgekwsError(f"{table}: {type(error).__name__} {error}. Its columns are path, start_s, duration_s") from error
    return found


def said_in(segments: Sequence[Segment], path: str, keyword: str) -> list[tuple[int, int]]:
    """The samples of a negative's utterances that hold the keyword; where there is no segments.csv, nothing is known to."""
    names = SAID.get(keyword, ())
    return [(one.first, one.end) for one in segments if one.path == path and any(name in one.source for name in names)]


@dataclass(frozen=True)
class Row:
    """One line of the manifest."""

    path: str
    kind: str
    label: str
    speaker: str
    take: str
    split: str
    """Without its prefix: "seenkw-test" is "test"."""
    duration_s: float
    source: str


def read_manifest(corpus: Path) -> list[Row]:
    """Raises EdgekwsError: it cannot be read, or lacks columns."""
    table = corpus / "manifest.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ()
            if missing := sorted({"path", "kind", "label", "speaker", "split"} - set(header)):
                raise EdgekwsError(f"{table}: no column {', '.join(missing)}. Its first line has {', '.join(header) or 'nothing'}")
            return [_row(line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EdgekwsError(f"{table}: cannot be read ({error}). A corpus is a folder with a manifest.csv, in UTF-8") from error


def _row(line: Mapping[str, str | None]) -> Row:
    columns = ("path", "kind", "label", "speaker", "take", "split", "duration_s", "source_repo")
    cell = {name: (line.get(name) or "").strip() for name in columns}
    try:
        duration_s = float(cell["duration_s"])
    except ValueError:
        duration_s = 0.0  # only a note rests on it
    split = cell["split"].rpartition("-")[2]
    return Row(cell["path"], cell["kind"], cell["label"], cell["speaker"], cell["take"], split, duration_s, cell["source_repo"])


def durations_s(corpus: Path, rows: Iterable[Row]) -> dict[str, float]:
    """How long each file is by its header, so that a bad one is said before hours of work.

    Raises:
        EdgekwsError: some cannot be opened or have no samples; all of them are named.
    """
    return _of_each(corpus, rows, lambda row: duration_s(corpus / row.path))


def _of_each(corpus: Path, rows: Iterable[Row], look: Callable[[Row], float]) -> dict[str, float]:
    """What `look` gives, by path. Raises EdgekwsError: it could not read some; all of them are named."""
    found, bad = {}, []
    for row in rows:
        try:
            found[row.path] = look(row)
        except AudioError as error:
            bad.append(str(error))
    if bad:
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise EdgekwsError(f"{corpus}: {len(bad)} files of its manifest.csv. {'; '.join(bad[:SHOWN])}{more}. Unpack the whole corpus")
    return found


def note_long(takes_s: Iterable[float]) -> list[str]:
    """A note if some takes are longer than a word is."""
    count = sum(seconds > LONG_TAKE_S for seconds in takes_s)
    return [f"{count} takes are longer than {LONG_TAKE_S:g} s: any event inside one counts as its keyword"] if count else []


def _negative_matches(row: Row, name: str) -> bool:
    """By label, by the name of its folder, or by how its path or source begins."""
    return name in (row.label, Path(row.path).parent.name) or row.path.startswith(name) or row.source.startswith(name)


class _Corpus:
    """What is listened to: the manifest, less what the model was trained on."""

    def __init__(self, root: Path, model: Model, keywords: Sequence[str] | None, negatives: Sequence[str] | None, protocol: str) -> None:
        table = read_manifest(root)
        rows = list({(row.path, row.kind, row.label, row.speaker, row.split): row for row in table}.values())
        self.root = root
        self.notes: list[str] = []
        if len(rows) < len(table):
            self.notes.append(f"{len(table) - len(rows)} rows of manifest.csv say what another one says, and were left out")
        known = list(dict.fromkeys(row.label for row in rows if row.kind == "keyword"))
        if wrong := [keyword for keyword in keywords or () if keyword not in known]:
            raise UsageError(f'no keyword "{wrong[0]}" in {root / "manifest.csv"}. There are: {", ".join(known) or "none"}')
        self.keywords = [keyword for keyword in known if not keywords or keyword in keywords]
        spoken = [row for row in rows if row.kind == "keyword" and row.label in self.keywords]
        self.splits = list(dict.fromkeys(row.split for row in spoken))
        self.speakers = {(row.label, row.speaker) for row in spoken}
        self.enrol = [row for row in spoken if row.split == "enrol"]
        wanted = [row for row in rows if row.kind == "negative"]
        for name in negatives or ():
            if not any(_negative_matches(row, name) for row in wanted):
                labels = ", ".join(dict.fromkeys(row.label for row in wanted)) or "none"
                raise UsageError(f'no negatives "{name}" in {root}. Labels: {labels}; a folder or the start of a path will do too')
        wanted = [row for row in wanted if not negatives or any(_negative_matches(row, name) for name in negatives)]
        every_noise = [row for row in rows if row.kind == "noise"]
        test = [row for row in spoken if row.split == "test"]
        self.lasts_s = durations_s(root, [*self.enrol, *test, *wanted, *every_noise])
        self.negatives, left_out = self._unseen(wanted, model)
        self.left_out_hours = sum(self.lasts_s[row.path] for row in left_out) / 3600
        self.test, seen = self._unseen(test, model)
        self.notes += note_long(self.lasts_s[row.path] for row in self.test)
        if seen:
            self.notes.append(f"{len(seen)} test takes left out: the model was trained on them")
        self.noise, noise_left_out = self._unseen(every_noise, model)
        if not every_noise:
            self.notes.append("the corpus has no noise: pink noise was generated in its place")
        elif not self.noise:
            self.notes.append("the model was trained on all of the corpus' noise: the noise conditions use it all the same")
            self.noise, noise_left_out = every_noise, []
        self.noise_left_out = len(noise_left_out)
        if left_out:
            self.notes.append(f"{len(left_out)} negative files ({self.left_out_hours:.2f} h) left out: the model was trained on them")
        if not self.negatives:
            raise EdgekwsError(
                f"{root}: no negatives to count false accepts on ({len(wanted)} wanted, {len(left_out)} of them trained on)."
                " Give a corpus with rows of kind negative that the model has not seen"
            )
        self.segments = read_segments(root) if protocol == "paper" or SAID.keys() & set(self.keywords) else []  # nobody else wants them
        self._decoded: dict[str, np.ndarray] = {}
        self._room = round(CACHED_HOURS * 3600 * SAMPLE_RATE_HZ)  # samples that may be kept still

    def read(self, row: Row) -> np.ndarray:
        """A file that is listened to: int16, shape (n,); the first hours of negatives are kept. Raises AudioError."""
        if row.path in self._decoded:
            return self._decoded[row.path]
        samples = read_recording(self.root / row.path)
        if row.kind == "negative" and len(samples) <= self._room:
            self._decoded[row.path] = samples
            self._room -= len(samples)
        return samples

    def enrolment(self, keyword: str, speaker: str) -> list[Row]:
        """In the order of the takes."""
        rows = [row for row in self.enrol if (row.label, row.speaker) == (keyword, speaker)]
        return sorted(rows, key=lambda row: (int(row.take) if row.take.isdecimal() else 0, row.path))

    def read_all(self, shots: int, noise: bool, say: Callable[[str], object] | None) -> None:
        """Read once what will be listened to: of a FLAC file that was cut off, the header is whole.

        Raises:
            EdgekwsError: some are damaged; all of them are named.
        """
        users = dict.fromkeys((row.label, row.speaker) for row in self.test)
        enrolments = [row for user in users for row in self.enrolment(*user)[:shots]]
        rows = [*enrolments, *self.test, *self.negatives, *(self.noise if noise else ())]
        progress = _Progress(say, sum(self.lasts_s[row.path] for row in rows))

        def seconds(row: Row) -> float:
            with _enough_memory(self, row):
                lasts_s = len(self.read(row)) / SAMPLE_RATE_HZ
            progress.add(self.lasts_s[row.path], f"reading {row.path}")
            return lasts_s

        found = _of_each(self.root, rows, seconds)
        if off := [row for row in rows if row.duration_s and abs(found[row.path] - row.duration_s) > OTHER_LENGTH_S]:
            first = f"{off[0].path} lasts {found[off[0].path]:.1f} s, not {off[0].duration_s:.1f}"
            self.notes.append(f"{len(off)} files are longer or shorter than duration_s of manifest.csv: {first}. Were they cut off?")

    def _unseen(self, rows: Sequence[Row], model: Model) -> tuple[list[Row], list[Row]]:
        """Those that the model was not trained on, and those that it was."""
        unseen: list[Row] = []
        seen: list[Row] = []
        for row in rows:
            trained = bool(model.trained_on_sha256) and self._sha256(row) in model.trained_on_sha256
            (seen if trained else unseen).append(row)
        return unseen, seen

    def _sha256(self, row: Row) -> str:
        try:
            return hashlib.sha256((self.root / row.path).read_bytes()).hexdigest()[:16]
        except OSError as error:
            path = self.root / row.path
            raise EdgekwsError(f"{path}: {error.strerror}, though manifest.csv lists it. Unpack the whole corpus") from error

    def pieces(self, row: Row, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The utterances of a negative and where they begin, or pieces of 10 s where segments.csv does not name it."""
        step = round(PAPER_PIECE_S * SAMPLE_RATE_HZ)
        even = [(first, first + step) for first in range(0, len(samples), step)]
        for first, end in [(one.first, one.end) for one in self.segments if one.path == row.path] or even:
            if len(piece := samples[first:end]):
                yield first, piece


@contextmanager
def _enough_memory(corpus: _Corpus, row: Row) -> Iterator[None]:
    """Raises EdgekwsError: what goes on with this file had not."""
    try:
        yield
    except MemoryError as error:
        path, hours = corpus.root / row.path, corpus.lasts_s[row.path] / 3600
        raise EdgekwsError(f"{path}, {hours:.2f} h: there is not enough memory. Split long files, or close other programs") from error


class _Progress:
    """A line now and then, with how long it will still take."""

    def __init__(self, say: Callable[[str], object] | None, total_s: float, every_s: float = 10.0) -> None:
        self._say, self._total_s, self._every_s = say, max(total_s, 1.0), every_s
        self._done_s = 0.0
        self._start = self._last = time.monotonic()

    def add(self, audio_s: float, what: str) -> None:
        self._done_s += audio_s
        now = time.monotonic()
        if self._say and now - self._last >= self._every_s:
            self._last = now
            share = min(self._done_s / self._total_s, 1.0)
            left_s = (now - self._start) / share * (1 - share) if share else 0.0
            self._say(f"{what}: {100 * share:.0f} % done, about {left_s:.0f} s left")


@functools.cache
def quiet() -> np.ndarray:
    """What lies before a negative, always the same: int16, shape (QUIET_HOPS * 1280,)."""
    noise = np.random.default_rng(0).standard_normal(QUIET_HOPS * HOP_SAMPLES) * 32768 * 10 ** (PAD_DBFS / 20)
    return np.round(noise).astype(np.int16)


def _unsaid(hops: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """The hops at which an event would not be one of the words in the spans: bool, shape (hops,)."""
    at = (np.arange(hops) + 1) * HOP_SAMPLES
    return ~np.any([(at >= first) & (at <= end + round(TAIL_S * SAMPLE_RATE_HZ)) for first, end in spans], 0)


def _runs(values: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
    """The stretches that are kept, each a stream of its own."""
    edges = np.flatnonzero(np.diff(kept)) + 1
    return [run for run, whole in zip(np.split(values, edges), np.split(kept, edges), strict=True) if whole.any()]


class _Listener:
    """The real engine on the corpus, condition by condition."""

    def __init__(
        self, corpus: _Corpus, users: Mapping[str, list[User]], engine: Engine, protocol: str, progress: _Progress, *, follow: bool
    ) -> None:
        self.corpus, self.users, self.engine, self.protocol, self.progress = corpus, users, engine, protocol, progress
        self._follow = follow
        self.hours = 0.0
        self._said_hours: dict[str, float] = {}
        self._said_count: dict[str, int] = {}
        self._noise = _Noise([corpus.root / row.path for row in corpus.noise])
        self.other_speech: list[np.ndarray] = []
        self._again: dict[str, bool] = {}

    @property
    def silent_noise(self) -> bool:
        """The corpus' noise was wanted, and cannot be heard."""
        return self._noise.silent

    def hours_of(self, keyword: str) -> float:
        """Of the negatives, less those utterances in which the reader says the keyword."""
        return self.hours - self._said_hours.get(keyword, 0.0)

    def left_out_notes(self) -> list[str]:
        """Of which negatives' utterances a keyword is said in."""
        return [
            f"{keyword} is said in {count} of the utterances of the negatives: these are no negatives of it"
            for keyword, count in self._said_count.items()
        ]

    def listen(self, condition: str, strangers: bool) -> None:
        """Fill each user's scores. `clean` comes first: it finds the other speech for `follow`, whose negatives are its own."""
        everyone = [user for members in self.users.values() for user in members]
        if condition != "follow":
            self.hours, self._said_hours, self._said_count = 0.0, {}, {}
            for user in everyone:
                user.negatives = []
            for row in self.corpus.negatives:
                with _enough_memory(self.corpus, row):
                    self._listen_negative(row, condition, everyone)
        for user in everyone:
            user.takes, user.strangers = [], []
        for row in self.corpus.test:
            self._listen_take(row, condition, strangers)

    def _listen_negative(self, row: Row, condition: str, everyone: Sequence[User]) -> None:
        samples = self.corpus.read(row)
        if condition == "clean" and self._follow:
            self._keep_other_speech(row, samples)
        samples = self._heard_as(samples, samples, row, condition)
        said = {keyword: spans for keyword in self.users if (spans := said_in(self.corpus.segments, row.path, keyword))}
        for keyword, spans in said.items():
            self._said_count[keyword] = self._said_count.get(keyword, 0) + len(spans)
        if self.protocol == "stream":
            if len(samples) >= HOP_SAMPLES:  # in less no event can come
                self.hours += len(samples) / SAMPLE_RATE_HZ / 3600
            kept = {keyword: _unsaid(len(samples) // HOP_SAMPLES, spans) for keyword, spans in said.items()}
            for keyword, hops in kept.items():
                self._leave_out(keyword, int((~hops).sum()) * HOP_SAMPLES)
            for user, values in self._score(embed(np.concatenate([quiet(), samples]), self.engine)[QUIET_HOPS:], everyone):
                user.negatives += _runs(values, kept[user.keyword]) if user.keyword in kept else [values]
        else:
            for first, piece in self.corpus.pieces(row, samples):
                self.hours += len(piece) / SAMPLE_RATE_HZ / 3600
                out = [keyword for keyword, spans in said.items() if any(a < first + len(piece) and first < b for a, b in spans)]
                for keyword in out:
                    self._leave_out(keyword, len(piece))
                listeners = [user for user in everyone if user.keyword not in out]
                for user, values in self._score(embed(np.pad(piece, round(PAPER_PAD_S * SAMPLE_RATE_HZ)), self.engine), listeners):
                    user.negatives.append(values)
        self.progress.add(self.corpus.lasts_s[row.path], f"{condition}, {row.path}")

    def _leave_out(self, keyword: str, samples: int) -> None:
        self._said_hours[keyword] = self._said_hours.get(keyword, 0.0) + samples / SAMPLE_RATE_HZ / 3600

    def _score(self, embeddings: np.ndarray, users: Sequence[User]) -> Iterator[tuple[User, np.ndarray]]:
        """The scores of each user who is enrolled; in the protocol `paper` only the highest, so that it is one event at most."""
        common: dict[int, np.ndarray] = {}  # of each cohort once: as a rule all users have the same one, and it is most of the work
        for user in users:
            if user.enrolled is None:
                continue
            if not len(embeddings):
                yield user, np.zeros(0, np.float32)
                continue
            cohort = user.enrolled.cohort
            values = scores(embeddings, replace(user.enrolled, cohort=cohort[:0]))
            if len(cohort):
                if id(cohort) not in common:
                    common[id(cohort)] = background(embeddings @ cohort.T)
                values = values - common[id(cohort)] * np.float32(user.enrolled.scale)
            yield user, values if self.protocol == "stream" else values.max(keepdims=True)

    def _listen_take(self, row: Row, condition: str, strangers: bool) -> None:
        members = self.users.get(row.label, [])
        own = next((user for user in members if user.speaker == row.speaker), None)
        if own is None:
            return
        clip = read_recording(self.corpus.root / row.path)
        if self.protocol == "stream":
            rng = _random(row.path, "pad")
            level = 32768 * 10 ** (PAD_DBFS / 20)
            before, after = (rng.standard_normal(round(s * SAMPLE_RATE_HZ)) * level for s in (BEFORE_S, AFTER_S))
        else:
            before = after = np.zeros(round(PAPER_PAD_S * SAMPLE_RATE_HZ))
        stream = np.concatenate([before, clip, after]).astype(np.float32)
        end_of_word = len(before) + word_end(clip)
        embeddings = embed(self._heard_as(stream, clip, row, condition, len(before), end_of_word), self.engine)
        if row.path not in self._again:
            self._again[row.path] = bool(copy_of(clip, own.recordings))
        window: tuple[int, int, int | None] = (len(before), len(before) + len(clip) + round(TAIL_S * SAMPLE_RATE_HZ), end_of_word)
        if self.protocol == "paper":
            window = (0, HOP_SAMPLES, None)
        again = self._again[row.path]
        if own.enrolled is None:
            own.takes.append(Take(np.zeros(0, np.float32), *window, again))
        for user, values in self._score(embeddings, members if strangers else [own]):
            (user.takes if user is own else user.strangers).append(Take(values, *window, again))
        self.progress.add(self.corpus.lasts_s[row.path] + BEFORE_S + AFTER_S, f"{condition}, {row.path}")

    def _heard_as(
        self, stream: np.ndarray, speech: np.ndarray, row: Row, condition: str, offset: int = 0, end_of_word: int = 0
    ) -> np.ndarray:
        """A stream as the condition has it, int16; `speech` lies in it from `offset`."""
        if condition == "clean":
            return _pcm(stream)
        mixed = stream.astype(np.float32)
        on = active(speech)
        if condition == "follow":
            rng = _random(row.path, "follow")
            other = self.other_speech[int(rng.integers(len(self.other_speech)))]
            first = end_of_word + round(FOLLOW_S * SAMPLE_RATE_HZ)
            other = np.resize(other, max(0, len(mixed) - first)).astype(np.float32)
            gain = math.sqrt(speech_power(speech, on) / max(speech_power(other, active(other)), 1e-3))
            mixed[first:] += np.float32(gain) * other
            return _pcm(mixed)
        if condition == "room":
            mixed = reverberate(mixed, room_response(_random(row.path, "room")))
        power = speech_power(mixed[offset : offset + len(speech)], on)
        noise = self._noise.draw(_random(row.path, "noise"), len(mixed))
        return _pcm(add_noise(mixed, power, noise, SNR_DB[condition]))

    def _keep_other_speech(self, row: Row, samples: np.ndarray) -> None:
        on = active(samples)
        onsets = np.flatnonzero(on & ~np.concatenate([[False], on[:-1]])) * FRAME
        if not len(onsets):
            return
        count = -(-len(samples) // (SNIPPET_EVERY_S * SAMPLE_RATE_HZ))
        for first in _random(row.path, "other speech").choice(onsets, min(count, len(onsets)), replace=False):
            self.other_speech.append(samples[first : first + SNIPPET_S * SAMPLE_RATE_HZ].copy())


# The command.


def evaluate(
    corpus: Path,
    model: Model,
    *,
    keywords: Sequence[str] | None = None,
    shots: int = 3,
    only_enrolled: bool = False,
    protocol: str = "stream",
    conditions: Sequence[str] | None = None,
    negatives: Sequence[str] | None = None,
    progress: Callable[[str], object] | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """The report of `edgekws eval --json`.

    Args:
        keywords: labels in the manifest; None is all.
        shots: recordings that each user is enrolled from, the first ones; fewer where there are fewer.
        only_enrolled: users enrol for themselves alone, which raises their thresholds.
        conditions: of CONDITIONS; clean is always among them. None is all, in the protocol `paper` clean alone.
        negatives: labels, folders, or how a path or source begins; None is all.
        progress: is given a line now and then.

    Raises:
        UsageError: no such keyword, condition, protocol or negatives; too few shots.
        EdgekwsError: the corpus cannot be read, or leaves nothing to measure.
        EnrolmentError: nobody can be enrolled.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f'no protocol "{protocol}". Accepted: {", ".join(PROTOCOLS)}')
    if wrong := [condition for condition in conditions or () if condition not in CONDITIONS]:
        raise UsageError(f'no condition "{wrong[0]}". Accepted: {", ".join(CONDITIONS)}')
    if shots < 1:
        raise UsageError(f"{shots} shots: a user is enrolled from at least 1 recording, 3 as a rule")
    wanted = conditions or (CONDITIONS if protocol == "stream" else ("clean",))
    chosen = [condition for condition in CONDITIONS if condition in wanted or condition == "clean"]
    heard = [condition for condition in chosen if condition != "others"]
    if only_enrolled and shots < 2:
        raise UsageError("only_enrolled takes at least 2 shots, 3 as a rule: the threshold is what they reach among themselves")
    material = _Corpus(corpus, model, keywords, negatives, protocol)
    material.read_all(shots, bool(SNR_DB.keys() & set(heard)), progress)
    engine = load_engine(model, backend)
    if progress:
        both = ({(row.label, row.speaker) for row in rows} for rows in (material.test, material.enrol))
        progress(f"enrolling {len(set.intersection(*both))} users")
    users, refused, copies = _enrol(material, engine, model, shots, only_enrolled)
    clips_s = sum(material.lasts_s[row.path] + BEFORE_S + AFTER_S for row in material.test)
    negatives_s = sum(material.lasts_s[row.path] for row in material.negatives)
    total_s = len(heard) * clips_s + (len(heard) - ("follow" in heard)) * negatives_s
    listener = _Listener(material, users, engine, protocol, _Progress(progress, total_s), follow="follow" in heard)
    report: dict[str, dict[str, Any]] = {condition: {"keywords": {}, "mean": {}} for condition in chosen}
    # After clean, so that it finds clean's scores of the negatives.
    for condition in sorted(heard, key=("clean", "follow").__contains__, reverse=True):
        listener.listen(condition, strangers=condition == "clean" and "others" in chosen)
        if min(map(listener.hours_of, users)) * 3_600_000 < HOP_MS or ("follow" in heard and not listener.other_speech):
            raise EdgekwsError(f"{corpus}: the negatives are too short to count false accepts on. Give some of a second or more")
        for keyword, members in users.items():
            entry, others = measure(members, listener.hours_of(keyword), protocol)
            report[condition]["keywords"][keyword] = entry
            if condition == "clean" and "others" in chosen:
                report["others"]["keywords"][keyword] = others
    engine.close()
    for part in report.values():
        part["mean"] = _mean(part["keywords"])
    if listener.silent_noise:
        material.notes.append("the corpus has no noise that can be heard: pink noise was generated in its place")
    material.notes += listener.left_out_notes()
    if refused:
        lost = sum(user.enrolled is None for members in users.values() for user in members)
        material.notes.append(
            f"{len(refused)} enrolments were refused: {lost} cannot be used, and those users' takes count as missed;"
            f" {len(refused) - lost} were measured all the same"
        )
    if copies:
        material.notes.append(
            f"{len(copies)} users' enrolments hold the same recording twice, which `edgekws enroll` refuses: measured all the same"
        )
    material.notes += _copies_note(report)
    material.notes.append(
        f"{listener.hours:.2f} h of negatives: no event at all would bound the rate below {3 / listener.hours:.2f} an hour (95 %)."
        " Users of a keyword listen to the same hours, so pooling them makes the intervals of false accepts narrower than they are"
    )
    return {
        "model": model.id,
        "network": model.network,
        "protocol": protocol,
        "shots": shots,
        "only_enrolled": only_enrolled,
        "hop_ms": HOP_MS,
        "negative_hours": listener.hours,
        "negative_files": len(material.negatives),
        "negatives_left_out_hours": material.left_out_hours,
        "zero_events_bound_fa_per_hour": 3 / listener.hours,
        "noise_files": len(material.noise),
        "noise_left_out_files": material.noise_left_out,
        "refused": refused,
        "copies": copies,
        "notes": material.notes,
        "keywords": report["clean"]["keywords"],
        "mean": report["clean"]["mean"],
        "conditions": report,
    }


def _enrol(
    corpus: _Corpus, engine: Engine, model: Model, shots: int, only_enrolled: bool
) -> tuple[dict[str, list[User]], list[dict[str, str]], list[dict[str, str]]]:
    """Those with test takes, by keyword; whose enrolment was refused and why; and those who enrol with a recording twice."""
    users: dict[str, list[User]] = {}
    refused, copies = [], []
    refusal: EnrolmentError | None = None
    without = fewer = 0
    for keyword, speaker in dict.fromkeys((row.label, row.speaker) for row in corpus.test):
        rows = corpus.enrolment(keyword, speaker)
        if not rows:
            without += 1
            continue
        fewer += len(rows) < shots
        recordings = [read_recording(corpus.root / row.path) for row in rows[:shots]]
        enrolled: Enrolled | None = None
        try:
            enrolled = enrol(keyword, speaker, recordings, engine, model, only_enrolled=only_enrolled)
        except EnrolmentError as error:
            refusal = error
            refused.append({"keyword": keyword, "speaker": speaker, "reason": str(error)})
            # Recordings that are only unlike each other are what this user has: to leave them out would flatter the figures.
            with suppress(EnrolmentError):
                enrolled = enrol(keyword, speaker, recordings, engine, model, only_enrolled=only_enrolled, strict=False)
        else:
            again = [(i + 1, of) for i, one in enumerate(recordings) if (of := copy_of(one, recordings[:i]))]
            if again:
                reason = ", ".join(f"recording {i} is recording {of} again" for i, of in again)
                copies.append({"keyword": keyword, "speaker": speaker, "reason": reason})
        users.setdefault(keyword, []).append(User(keyword, speaker, enrolled, recordings=recordings))
    if without:
        corpus.notes.append(f"{without} speakers with test takes but nothing to enrol them from were left out")
    if untested := len(corpus.speakers - {(row.label, row.speaker) for row in corpus.test}):
        corpus.notes.append(f"{untested} speakers have no test takes and were left out")
    if nobodys := [keyword for keyword in corpus.keywords if keyword not in users]:
        corpus.notes.append(f"{', '.join(nobodys)}: nobody has takes both to enrol from and to test, so it is in no row and no mean")
    if fewer:
        corpus.notes.append(f"{fewer} users were enrolled from fewer than {shots} recordings: they have no more")
    if not users:
        splits = ", ".join(f'"{split}"' for split in corpus.splits)
        raise EdgekwsError(
            f"{corpus.root}: nobody has both a take marked enrol and one marked test, so there is nothing to measure."
            " Accepted kinds are keyword, negative and noise; splits of a keyword enrol and test."
            f" The splits of its keywords: {splits or 'none'}"
        )
    if refusal and not any(user.enrolled for members in users.values() for user in members):
        raise refusal
    return users, refused, copies


def _copies_note(report: Mapping[str, dict[str, Any]]) -> list[str]:
    means = {condition: part["mean"] for condition, part in report.items() if condition != "others"}
    takes, kept = means["clean"]["takes"], means["clean"]["without_copies"]["takes"]
    if kept == takes:
        return []
    found = {condition: mean["without_copies"]["recall_at_fa_per_hour"]["0.5"] for condition, mean in means.items()}
    told = ", ".join(f"{condition} {100 * recall:.1f}" for condition, recall in found.items() if recall is not None)
    return [
        f"{takes - kept} of {takes} test takes are a recording once more that their user was enrolled with; the figures above have them."
        f" Without them, recall in % at 0.5 false accepts an hour, mean of the keywords: {told or 'no take is left'}"
    ]


# For people.


def report_table(report: Mapping[str, Any]) -> str:
    """The report for people: a row for each condition and keyword."""

    def percent(value: float | None, places: int = 1) -> str:
        return "-" if value is None else f"{100 * value:.{places}f}"

    def number(value: float | None, places: int = 2) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    header = "condition keyword users takes 0.1/h 0.5/h 95% 1.0/h AVR deployed FA/h worst >2/h p50 p95"
    rows = [tuple(header.split())]
    for condition, part in report["conditions"].items():
        for keyword, entry in [*part["keywords"].items(), ("mean", part["mean"])]:
            deployed = entry["deployed"]
            if "rate_at_fa_per_hour" in entry:
                rate = [percent(entry["rate_at_fa_per_hour"][str(r)]) for r in RATES]
                counts = [str(entry.get(name, "")) for name in ("users", "takes")]
                rows.append((condition, keyword, *counts, rate[0], rate[1], "", rate[2], "", percent(deployed["rate"]), *[""] * 5))
                continue
            recall = [percent(entry["recall_at_fa_per_hour"][str(r)]) for r in RATES]
            interval = "–".join(percent(limit, 0) for limit in entry["recall_interval"]["0.5"])
            rows.append(
                (
                    *(condition, keyword, str(entry["users"]), str(entry["takes"]), recall[0], recall[1], interval, recall[2]),
                    *(percent(entry["average_viable_recall"]), percent(deployed["recall"]), number(deployed["fa_per_hour"])),
                    *(number(deployed["worst_user_fa_per_hour"]), str(deployed["users_above_2"])),
                    *(number(entry["delay_ms"]["p50"], 0), number(entry["delay_ms"]["p95"], 0)),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    lines = [
        f"{report['model']} ({report['network']}), protocol {report['protocol']}, {report['shots']} shots,"
        f" {report['negative_hours']:.2f} h of negatives",
        "recall in % at so many false accepts an hour (95%: of that at 0.5, over people; AVR: average over 0 to 2);"
        " deployed: at each user's own threshold, with false accepts an hour, of the worst user, and users above 2;"
        " ms from the end of the word to the event, at 0.5/h",
        "",
        *map(line, rows),
        "",
        *(f"{one['keyword']}, {one['speaker']}: {one['reason']}" for one in [*report["refused"], *report["copies"]]),
        *report["notes"],
    ]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """A picture of misses against false accepts, a panel for each condition; circles: oracle thresholds, crosses: the deployed ones.

    Raises:
        EdgekwsError: matplotlib is not installed, or the file cannot be written (PNG, SVG and PDF can).
    """
    parts = {condition: part for condition, part in report["conditions"].items() if condition != "others"}
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = new_figure(5 * columns, 4 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for panel, (condition, part) in zip(panels, parts.items(), strict=False):
        for i, (keyword, entry) in enumerate(part["keywords"].items()):
            colour = f"C{i % 10}"
            rate, recall = zip(*entry["curve"], (HIGHEST_RATE, entry["curve"][-1][1]), strict=True)
            panel.step(rate, [100 * (1 - share) for share in recall], where="post", color=colour, linewidth=1.3, label=keyword)
            panel.plot(RATES, [100 * entry["frr_at_fa_per_hour"][str(r)] for r in RATES], "o", color=colour, markersize=4)
            deployed = entry["deployed"]
            if deployed["fa_per_hour"] is not None:
                x, y = min(deployed["fa_per_hour"], HIGHEST_RATE), 100 * (1 - deployed["recall"])
                panel.plot([x], [y], "X", color=colour, markersize=9, markeredgecolor="black", clip_on=False)
                if x < deployed["fa_per_hour"]:
                    panel.annotate(f"{deployed['fa_per_hour']:.1f}/h ", (x, y), ha="right", va="center", fontsize=8)
        panel.set_title(condition)
        panel.set_xlim(0, HIGHEST_RATE)
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.set_axis_off()
    figure.supxlabel("false accepts an hour (mean over users)")
    figure.supylabel("misses, %")
    first = figure.axes[0]
    first.set_ylim(bottom=0)  # of all, once everything is drawn: setting it stops the scaling
    first.plot([], [], "ko", markersize=4, label="oracle threshold")
    first.plot([], [], "X", color="white", markersize=9, markeredgecolor="black", label="deployed threshold")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=min(6, len(report["keywords"]) + 2), frameon=False)
    save(figure, path)
