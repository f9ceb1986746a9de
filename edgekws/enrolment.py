"""Three recordings → a keyword: prototype, and a score whose threshold is a promised rate of false wakes.

The recipe, chosen on development words (amelia, ey ordenador, digits, text-to-speech words), never on alexa, computer or jarvis:

1. Each recording keeps the silence around its word. The prototype is the mean of the embeddings `TAIL_HOPS` after the word's end.
2. The prototype listens to the model's bundled negatives. The peaks' upper tail is exponential: rate(similarity) = r0 · exp(-(similarity - s0) / b).
3. score = -log10(rate): at score 0.7 one expects 0.2 false wakes an hour, for any keyword and any speaker. So one threshold serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekws.engines import Engine
from edgekws.errors import EnrolmentError
from edgekws.frontend import LogMel
from edgekws.model import Model
from edgekws.values import HOP_MS, HOP_SAMPLES, SAMPLE_RATE_HZ, Enrolled

FALSE_ACCEPTS_PER_HOUR = 0.2
TAIL_HOPS = 2
TAIL_PEAKS = 20  # the tail is fitted to this many of the highest peaks
PEAK_GAP_HOPS = 25  # 2 s, as the refractory time
MIN_SPEECH_S = 0.2
MAX_CLIPPED = 0.15  # real recordings of a loud speaker reach 0.1 and still enrol well
SILENT_DBFS = -60.0


def pad(samples: np.ndarray) -> np.ndarray:
    """1.5 s of noise at -70 dBFS before and 1 s after, always the same: int16 (n,) → int16 (n + 40000,)."""
    noise = np.random.default_rng(0).standard_normal(5 * SAMPLE_RATE_HZ // 2) * 32768 * 10 ** (-70 / 20)
    noise = np.round(noise).astype(np.int16)
    cut = 3 * SAMPLE_RATE_HZ // 2
    return np.concatenate([noise[:cut], samples, noise[cut:]])


def embed(samples: np.ndarray, engine: Engine) -> np.ndarray:
    """The engine's embedding at each hop of a recording, from a fresh stream: int16 (n,) → float32 (n // 1280, dim)."""
    engine.reset()
    frontend = LogMel()
    hops = [samples[i : i + HOP_SAMPLES] for i in range(0, len(samples) - HOP_SAMPLES + 1, HOP_SAMPLES)]
    return np.stack([engine.step(frontend.hop(hop)) for hop in hops]) if hops else np.zeros((0, engine.dim), np.float32)


def speech_span(samples: np.ndarray) -> tuple[int, int]:
    """First sample of the word and the one after its last: where 20 ms frames are within 30 dB of the loudest and above the floor.

    (0, 0) if nothing stands out.
    """
    frames = samples[: len(samples) // 320 * 320].astype(np.float32).reshape(-1, 320)
    if not len(frames):
        return 0, 0
    power_db = 10 * np.log10((frames**2).mean(1) + 1e-3)
    floor_db = np.percentile(power_db, 10)
    over = np.flatnonzero(power_db > max(power_db.max() - 30, min(floor_db + 8, power_db.max() - 6)))
    # A lone frame is a click, not a word: keep runs that have a neighbour.
    over = over[[bool(np.any(np.abs(over - frame) == 1)) for frame in over]] if len(over) else over
    return (int(over[0]) * 320, int(over[-1] + 1) * 320) if len(over) else (0, 0)


def check(samples: np.ndarray, name: str) -> tuple[int, int]:
    """The word's span in a recording that can be enrolled.

    Raises:
        EnrolmentError: silent, clipped or too short.
    """
    again = "Record it again, at arm's length, in one breath, with half a second of quiet around it"
    if len(samples) < MIN_SPEECH_S * SAMPLE_RATE_HZ:
        raise EnrolmentError(f"{name}: {len(samples) / SAMPLE_RATE_HZ:.2f} s long, a keyword takes at least {MIN_SPEECH_S} s. {again}")
    peak_dbfs = 20 * np.log10(max(1, int(np.abs(samples.astype(np.int32)).max())) / 32768)
    start, end = speech_span(samples)
    rms = np.sqrt((samples[start:end].astype(np.float64) ** 2).mean()) if end > start else 0.0
    level_dbfs = 20 * np.log10(max(rms, 1e-3) / 32768)
    if level_dbfs < SILENT_DBFS:
        raise EnrolmentError(
            f"{name}: silent (peak {peak_dbfs:.0f} dBFS; speech must be above {SILENT_DBFS:.0f} dBFS). Check the microphone: edgekws watch"
        )
    if end - start < MIN_SPEECH_S * SAMPLE_RATE_HZ:
        raise EnrolmentError(
            f"{name}: only {(end - start) / SAMPLE_RATE_HZ:.2f} s of sound stand out, a keyword takes at least {MIN_SPEECH_S} s. {again}"
        )
    clipped = float((np.abs(samples[start:end].astype(np.int32)) >= 32700).mean())
    if clipped > MAX_CLIPPED:
        raise EnrolmentError(
            f"{name}: clipped ({100 * clipped:.0f} % of its samples at full scale, accepted {100 * MAX_CLIPPED:.0f} %)."
            " Lower the microphone's gain (alsamixer) or step back"
        )
    return start, end


@dataclass(frozen=True)
class Negatives:
    """The model's bundled negatives: what it said, hop by hop, of hours without any keyword."""

    steps: np.ndarray
    """int8, shape (hops, step_dim); times `scale`."""
    scale: float
    starts: np.ndarray
    """First hop of each stream, and the number of hops at the end."""
    window_steps: int
    segments: int

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return len(self.steps) * HOP_MS / 3_600_000

    def similarities(self, prototypes: np.ndarray) -> list[np.ndarray]:
        """Largest cosine with any prototype (n, dim), hop by hop, one array a stream."""
        length, segments = self.window_steps, self.segments
        parts = prototypes.reshape(len(prototypes), segments, -1)  # (n, segments, step_dim)
        found = []
        for first, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            steps = self.steps[first:end].astype(np.float32) * self.scale
            share = length // segments
            means = np.lib.stride_tricks.sliding_window_view(steps, share, 0).mean(2) if share > 1 else steps
            count = len(steps) - length + 1
            if count <= 0:
                continue
            dots = np.zeros((count, len(prototypes)), np.float32)
            power = np.zeros(count, np.float32)
            for k in range(segments):
                piece = means[k * share : k * share + count]
                dots += piece @ parts[:, k].T
                power += (piece**2).sum(1)
            found.append((dots / np.sqrt(np.maximum(power, 1e-12))[:, None]).max(1))
        return found


def load_negatives(model: Model) -> Negatives:
    """The model's negatives.npz. Raises EnrolmentError if the model carries none."""
    path = model.path / "negatives.npz"
    if not path.exists():
        raise EnrolmentError(f"{path}: missing, and without negatives no threshold can be promised. Use a complete model: edgekws models list")
    spec = model.raw["spec"]
    with np.load(path, allow_pickle=False) as data:
        return Negatives(data["steps"], float(data["scale"]), data["starts"], int(spec["window_steps"]), int(spec["segments"]))


def peaks(values: np.ndarray, count: int, gap_hops: int = PEAK_GAP_HOPS) -> np.ndarray:
    """The `count` highest values that lie at least `gap_hops` apart, highest first."""
    left = values.copy()
    found = []
    while len(found) < count and len(left):
        at = int(left.argmax())
        if not np.isfinite(left[at]):
            break
        found.append(left[at])
        left[max(0, at - gap_hops) : at + gap_hops] = -np.inf
    return np.array(found, np.float32)


def calibrate(prototypes: np.ndarray, negatives: Negatives) -> tuple[float, float]:
    """(scale, offset) that turn a similarity into -log10 of the false accepts an hour that a threshold there would give."""
    highest = np.sort(np.concatenate([peaks(one, TAIL_PEAKS) for one in negatives.similarities(prototypes)]))[::-1][: TAIL_PEAKS + 1]
    base = highest[-1]
    spread = max(float((highest[:-1] - base).mean()), 0.005)  # maximum likelihood of the exponential's mean
    rate_at_base = TAIL_PEAKS / negatives.hours
    # rate(s) = rate_at_base · exp(-(s - base) / spread);  -log10 rate = (s - base) / (spread ln 10) - log10(rate_at_base)
    scale = 1 / (spread * np.log(10))
    return float(scale), float(base + np.log10(rate_at_base) / scale)


def enrol(
    keyword: str, speaker: str, recordings: Sequence[np.ndarray], engine: Engine, model: Model, *, only_enrolled: bool = False
) -> Enrolled:
    """A keyword from recordings (int16, mono, 16 kHz) of one speaker, three as a rule. Leaves the engine reset.

    Raises:
        EnrolmentError: a recording is silent, clipped or too short, or they are not the same word.
    """
    if not recordings:
        raise EnrolmentError(f'"{keyword}": no recording given; three are best')
    rows = []
    for i, samples in enumerate(recordings, 1):
        _, end = check(samples, f'"{keyword}", recording {i}')
        padded = pad(samples)
        hop = -(-(3 * SAMPLE_RATE_HZ // 2 + end) // HOP_SAMPLES) - 1 + TAIL_HOPS
        embeddings = embed(padded, engine)
        rows.append(embeddings[min(hop, len(embeddings) - 1)])
    engine.reset()
    mean = np.sum(rows, 0)
    prototypes = (mean / max(float(np.linalg.norm(mean)), 1e-6))[None].astype(np.float32)
    scale, offset = calibrate(prototypes, load_negatives(model))
    return Enrolled(keyword, speaker, prototypes, -float(np.log10(FALSE_ACCEPTS_PER_HOUR)), scale, offset, only_enrolled)


def bundled(model: Model) -> list[Enrolled]:
    """The keywords that are ready to use in this model, without any enrolment; none if it carries none."""
    path = model.path / "prototypes.npz"
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as data:
        return [
            Enrolled(str(k), "", data[f"prototypes_{i}"], float(data["threshold"][i]), float(data["scale"][i]), float(data["offset"][i]))
            for i, k in enumerate(data["keyword"])
        ]
