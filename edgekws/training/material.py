"""What the base network hears in training: clean streams with the teacher's word on each hop, then the same in rooms and noise.

A clean stream is a minute of text-to-speech in ever-changing voices, or a piece of real speech. Its targets are computed once, on the
clean signal; the network hears disturbed copies and must still say the same. That is where its robustness comes from.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr

from edgekws.audio import read_recording
from edgekws.errors import EdgekwsError
from edgekws.frontend import HOP_FRAMES, log_mel
from edgekws.training import synthesis
from edgekws.training.teacher import DIM, Teacher
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ

STREAM_S = 60
LEVEL_DBFS = -25.0
LEXICON_WORDS = 500
COLOUR_TAPS = 1024
WORKERS = 2
# So much faster the corpus' speech is played as well, pitch and formants with it: as other people, where there are 71 of them.
PACES = (0.76, 0.82, 0.9, 1.0, 1.1, 1.2, 1.28)

# The corpus' negatives and noise serve training and evaluation: these go to training, all others are for evaluation only.
# By source and speaker: nathalie (one Dutch voice) and 70 LibriSpeech readers train, kathleen and 61 other readers evaluate.
TRAIN_NEGATIVES = ("neg/nathalie/", "neg/librispeech/librispeech_000", "neg/librispeech/librispeech_001", "neg/librispeech/librispeech_002")
TRAIN_NOISE_FOLDS = ("fold1", "fold2")


@dataclass(frozen=True)
class Word:
    """One spoken item of the lexicon inside a stream."""

    text: str
    speaker: str
    end_step: int
    """The first hop that has heard the whole word."""


@dataclass
class Stream:
    """Clean audio and what the teacher says of it."""

    samples: np.ndarray
    """int16, shape (n,)."""
    targets: np.ndarray
    """float32, shape (n // 1280, 96); NaN where the teacher had not heard enough."""
    words: list[Word] = field(default_factory=list)
    source: str = ""
    """Which recordings it is of; "" = text-to-speech."""


def say(line: str) -> None:
    """How far `edgekws pretrain` is."""
    print(f"pretrain: {line}", file=sys.stderr, flush=True)


def train_files(corpus: Path) -> tuple[list[Path], list[Path]]:
    """Negatives and noise of the corpus that training may hear."""
    with open(corpus / "manifest.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    speech = [corpus / r["path"] for r in rows if r["kind"] == "negative" and r["path"].startswith(TRAIN_NEGATIVES)]
    noise = [corpus / r["path"] for r in rows if r["kind"] == "noise" and r["split"] in TRAIN_NOISE_FOLDS]
    return speech, noise


def sha256_16(paths: Iterable[Path]) -> list[str]:
    """First 16 hex digits of each file's sha256: how a model card names what it was trained on."""
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths)


def read_audio(path: Path) -> np.ndarray:
    """int16, mono, 16 kHz.

    What is so already comes as libsndfile has it, as it was trained on. Of Opus `read_recording` rounds otherwise, by 1, and clips where
    this wraps round: 448 of the 75 million samples of the shared corpus' training side.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            if (file.samplerate, file.channels) == (SAMPLE_RATE_HZ, 1):
                return np.asarray(file.read(dtype="int16"))
    except soundfile.SoundFileError as error:
        raise EdgekwsError(f"cannot read {path}: {error}") from error
    return read_recording(path)


def active_rms(samples: np.ndarray) -> float:
    """Root mean square over the 20 ms frames within 30 dB of the loudest: the level while speech is active."""
    frames = samples[: len(samples) // 320 * 320].astype(np.float32).reshape(-1, 320)
    power = (frames**2).mean(1)
    if not len(power) or power.max() <= 0:
        return 1.0
    return float(np.sqrt(power[power > power.max() * 1e-3].mean()))


def at_level(samples: np.ndarray, dbfs: float) -> np.ndarray:
    """float32, scaled so that the active level is `dbfs`."""
    return samples.astype(np.float32) * np.float32(32768 * 10 ** (dbfs / 20) / active_rms(samples))


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Rounded and clipped."""
    return np.clip(np.round(samples), -32768, 32767).astype(np.int16)


def listen(samples: np.ndarray, teacher: Teacher | None) -> np.ndarray:
    """The teacher's targets; all NaN without one."""
    return np.full((len(samples) // HOP_SAMPLES, DIM), np.nan, np.float32) if teacher is None else teacher.embed(samples)


def spoken_stream(seed: int, teacher: Teacher | None) -> Stream:
    """A minute of text-to-speech: sentences, random words, and words of a small lexicon that many voices share."""
    rng = np.random.default_rng(seed)
    lexicon = np.random.default_rng(7).choice(np.array([w for w in synthesis.words() if len(w) >= 5]), LEXICON_WORDS * 2, replace=False)
    pieces: list[np.ndarray] = []
    words: list[Word] = []
    total = 0
    while total < STREAM_S * SAMPLE_RATE_HZ:
        kind = rng.random()
        if kind < 0.35:
            text, english = str(rng.choice(synthesis.sentences())), rng.random() < 0.85
        elif kind < 0.6:
            text, english = " ".join(rng.choice(synthesis.words(), rng.integers(2, 7))), rng.random() < 0.85
        else:
            at = int(rng.integers(LEXICON_WORDS))
            text, english = str(lexicon[at]) if at % 2 else f"{lexicon[at]} {lexicon[at + LEXICON_WORDS]}", True
        voice = synthesis.random_voice(rng, english=english)
        try:
            said = synthesis.say(text, voice)
        except synthesis.Missing:
            raise
        except EdgekwsError:
            continue  # a few espeak-ng variants refuse a few texts
        loud = np.flatnonzero(np.abs(said.astype(np.int32)) > 0.02 * max(1, np.abs(said.astype(np.int32)).max()))
        if len(loud) < SAMPLE_RATE_HZ // 10:
            continue
        said = said[loud[0] : loud[-1] + 1]
        pause = np.zeros(int(rng.uniform(0.15, 0.8) * SAMPLE_RATE_HZ), np.float32)
        if kind >= 0.6:
            words.append(Word(text, voice.speaker, -(-(total + len(said)) // HOP_SAMPLES)))
        pieces += [at_level(said, LEVEL_DBFS + rng.uniform(-3, 3)), pause]
        total += len(said) + len(pause)
    samples = np.concatenate(pieces)
    samples = to_int16(samples + rng.standard_normal(len(samples)) * 3)
    return Stream(samples, listen(samples, teacher), words)


def real_streams(paths: Sequence[Path], teacher: Teacher | None) -> Iterator[Stream]:
    """Real speech in pieces of a minute, at each of `PACES`."""
    for path in paths:
        recording = at_level(read_audio(path), LEVEL_DBFS)
        for pace in PACES:
            samples = to_int16(soxr.resample(recording, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / pace))
            for start in range(0, len(samples) - 10 * SAMPLE_RATE_HZ, STREAM_S * SAMPLE_RATE_HZ):
                piece = samples[start : start + STREAM_S * SAMPLE_RATE_HZ]
                yield Stream(piece, listen(piece, teacher), source=path.parent.name)


def room_response(rng: np.random.Generator, rt60_s: float) -> np.ndarray:
    """A synthetic room: the direct sound, then noise that decays by 60 dB in rt60_s. float32, unit direct path."""
    n = int(rt60_s * SAMPLE_RATE_HZ)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    tail[: int(0.002 * SAMPLE_RATE_HZ)] = 0
    direct_to_tail_db = rng.uniform(-2, 12)
    tail *= 10 ** (-direct_to_tail_db / 20) / np.sqrt((tail**2).sum())
    tail[0] = 1
    return tail.astype(np.float32)


def coloured(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As some microphone would colour it: a random smooth curve of some decibels, at times the narrow band of a cheap or old one."""
    import scipy.signal  # of the extra train

    octave = np.log2(np.maximum(np.fft.rfftfreq(COLOUR_TAPS, 1 / SAMPLE_RATE_HZ), 30))
    gain_db = np.interp(octave, np.linspace(np.log2(60), 13, 7), rng.normal(0, 5, 7))
    if rng.random() < 0.25:
        gain_db -= np.maximum(0, octave - np.log2(rng.uniform(2500, 6500))) * rng.uniform(20, 90)
    if rng.random() < 0.3:
        gain_db -= np.maximum(0, np.log2(rng.uniform(80, 350)) - octave) * 18
    taps = np.roll(np.fft.irfft(10 ** (gain_db / 20)), COLOUR_TAPS // 2) * np.hanning(COLOUR_TAPS)
    return scipy.signal.oaconvolve(samples, taps.astype(np.float32), "same").astype(np.float32)


def made_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """Coloured noise, mains hum or a slowly moving chord, float32 of about unit power."""
    kind = rng.integers(4)
    if kind == 3:
        t = np.arange(n) / SAMPLE_RATE_HZ
        base = rng.uniform(50, 400)
        tones = [np.sin(2 * np.pi * base * k * t + rng.uniform(0, 6.3)) * rng.uniform(0.2, 1) / k for k in range(1, 9)]
        wave = np.sum(tones, 0) * (1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.1, 4) * t))
    else:
        spectrum = np.fft.rfft(rng.standard_normal(n))
        wave = np.fft.irfft(spectrum / np.maximum(1, np.arange(len(spectrum)) / 50) ** (rng.uniform(0, 2.2) / 2), n)
    return (wave / np.sqrt((wave**2).mean() + 1e-9)).astype(np.float32)


def disturbed(
    stream: Stream, others: Sequence[Stream], noises: Sequence[np.ndarray], rng: np.random.Generator, *, mild: bool
) -> np.ndarray:
    """A copy of the stream as some room and microphone would hear it.

    Returns:
        float16 log-mel frames, shape (4 · steps, 40).
    """
    import scipy.signal

    speech = stream.samples.astype(np.float32)
    n = len(speech)
    level = active_rms(stream.samples)
    if rng.random() < (0.25 if mild else 0.6):
        speech = scipy.signal.oaconvolve(speech, room_response(rng, rng.uniform(0.08, 0.7)))[:n].astype(np.float32)
    if rng.random() < 0.7:
        speech = coloured(speech, rng)
    noise = np.zeros(n, np.float32)
    at = 0
    while at < n:  # the noise changes every few seconds
        length = min(n - at, int(rng.uniform(3, 15) * SAMPLE_RATE_HZ))
        snr_db = rng.uniform(18, 45) if mild else rng.uniform(-3, 22)
        kind = rng.random()
        if kind < 0.55 and noises:
            source = noises[int(rng.integers(len(noises)))].astype(np.float32)
            wave = np.roll(np.resize(source, length), rng.integers(length))
            if rng.random() < 0.3:
                other = noises[int(rng.integers(len(noises)))].astype(np.float32)
                wave = wave + np.resize(other, length) * np.float32(np.sqrt((wave**2).mean() / ((other**2).mean() + 1)))
        elif kind < 0.75:
            wave = np.zeros(length, np.float32)  # babble
            for _ in range(rng.integers(1, 6)):
                other = others[int(rng.integers(len(others)))].samples
                start = rng.integers(max(1, len(other) - length))
                wave[: len(other[start : start + length])] += other[start : start + length]
            snr_db = max(snr_db, 3.0)
        else:
            wave = made_noise(rng, length)
        power = np.sqrt((wave**2).mean() + 1e-6)
        noise[at : at + length] = wave * np.float32(level / power * 10 ** (-snr_db / 20))
        at += length
    mixed = speech + noise
    if rng.random() < 0.3:
        mixed = coloured(mixed, rng)
    gain_db = rng.uniform(-24, 8)  # from LEVEL_DBFS: microphones differ by more than 30 dB
    mixed = mixed * np.float32(10 ** (gain_db / 20))
    if rng.random() < 0.05:
        mixed = mixed * 4  # clipped
    mixed = mixed + rng.standard_normal(n).astype(np.float32) * np.float32(10 ** rng.uniform(-0.3, 0.9))
    return log_mel(to_int16(mixed))[: n // HOP_SAMPLES * HOP_FRAMES].astype(np.float16)


def _make_spoken(job: tuple[int, str | None]) -> Stream:
    seed, wheel = job
    global _teacher
    if _teacher is None and wheel is not None:
        _teacher = Teacher(Path(wheel))
    return spoken_stream(seed, _teacher)


_teacher: Teacher | None = None


def make_streams(corpus: Path | None, wheel: Path | None, spoken_minutes: int, seed: int) -> list[Stream]:
    """All clean streams. Progress goes to stderr."""
    streams: list[Stream] = []
    start = time.monotonic()
    with ProcessPoolExecutor(WORKERS) as pool:
        jobs = [(seed * 1_000_003 + i, None if wheel is None else str(wheel)) for i in range(spoken_minutes)]
        for i, stream in enumerate(pool.map(_make_spoken, jobs, chunksize=4), 1):
            streams.append(stream)
            if i % 20 == 0:
                left_s = (time.monotonic() - start) / i * (spoken_minutes - i)
                say(f"{i} of {spoken_minutes} minutes spoken, {left_s:.0f} s left")
    if corpus is not None:
        streams += real_streams(train_files(corpus)[0], Teacher(wheel) if wheel else None)
    return streams


def save_streams(path: Path, streams: Sequence[Stream]) -> None:
    """One npz without pickle."""
    lengths = np.array([[len(s.samples), len(s.targets), len(s.words)] for s in streams])
    words = [w for s in streams for w in s.words]
    np.savez(
        path,
        lengths=lengths,
        source=np.array([s.source for s in streams]),
        samples=np.concatenate([s.samples for s in streams]),
        targets=np.concatenate([s.targets for s in streams]).astype(np.float16),
        word_text=np.array([w.text for w in words]),
        word_speaker=np.array([w.speaker for w in words]),
        word_end_step=np.array([w.end_step for w in words], np.int64),
    )


def load_streams(path: Path) -> list[Stream]:
    """What `save_streams` wrote."""
    with np.load(path, allow_pickle=False) as data:
        samples, targets = data["samples"], data["targets"].astype(np.float32)
        text, speaker, end_step = data["word_text"], data["word_speaker"], data["word_end_step"]
        lengths, source = data["lengths"], data["source"]
    streams = []
    a = b = c = 0
    for (n, m, k), of in zip(lengths, source, strict=True):
        words = [Word(str(text[i]), str(speaker[i]), int(end_step[i])) for i in range(c, c + k)]
        streams.append(Stream(samples[a : a + n], targets[b : b + m], words, str(of)))
        a, b, c = a + n, b + m, c + k
    return streams


@dataclass(frozen=True)
class Material:
    """Everything a training run reads, copy beside copy, streams laid end to end."""

    frames: np.ndarray
    """float16, shape (copies, 4 · hops, 40)."""
    targets: np.ndarray
    """float16, shape (hops, 96): the teacher on the clean stream, NaN where it had not heard enough."""
    starts: np.ndarray
    """First hop of each stream, and the number of hops at the end: shape (streams + 1,)."""
    source: np.ndarray
    """int64, shape (streams,): 0 is text-to-speech, each other number one source of recordings."""
    words: np.ndarray
    """int64, shape (words, 3): the word's number, the speaker's number, and the first hop that has heard the whole word."""


def _copy(job: tuple[int, int, int]) -> np.ndarray:
    at, copy, seed = job
    streams, noises = _shared
    return disturbed(streams[at], streams, noises, np.random.default_rng([seed, at, copy]), mild=copy == 0)


_shared: tuple[Sequence[Stream], Sequence[np.ndarray]] = ((), ())


def make_material(streams: Sequence[Stream], noise: Sequence[Path], copies: int, seed: int, workers: int = WORKERS) -> Material:
    """Disturb every stream `copies` times; the first copy only mildly. Progress goes to stderr."""
    global _shared
    _shared = (streams, [read_audio(path) for path in noise])  # the workers inherit it by fork
    hops = [min(len(s.targets), len(s.samples) // HOP_SAMPLES) for s in streams]
    starts = np.concatenate([[0], np.cumsum(hops)])
    frames = np.zeros((copies, starts[-1] * HOP_FRAMES, 40), np.float16)
    jobs = [(at, copy, seed) for at in range(len(streams)) for copy in range(copies)]
    start = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        for i, (job, made) in enumerate(zip(jobs, pool.map(_copy, jobs, chunksize=8), strict=True), 1):
            first = starts[job[0]] * HOP_FRAMES
            frames[job[1], first : first + len(made)] = made
            if i % 200 == 0:
                say(f"{i} of {len(jobs)} copies disturbed, {(time.monotonic() - start) / i * (len(jobs) - i):.0f} s left")
    _shared = ((), ())
    source = np.unique(["", *(s.source for s in streams)], return_inverse=True)[1][1:]
    targets = np.concatenate([s.targets[:n] for s, n in zip(streams, hops, strict=True)]).astype(np.float16)
    return Material(frames, targets, starts, source, _number_words(streams, starts))


def _number_words(streams: Sequence[Stream], starts: np.ndarray) -> np.ndarray:
    texts: dict[str, int] = {}
    speakers: dict[str, int] = {}
    rows = [
        (texts.setdefault(w.text, len(texts)), speakers.setdefault(w.speaker, len(speakers)), first + w.end_step)
        for stream, first, end in zip(streams, starts[:-1], starts[1:], strict=True)
        for w in stream.words
        if first + w.end_step + 4 < end
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def check_made_from(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """What an earlier run left at `path` is gone on from only where it was made from the same, so that a manifest states what was heard.

    Raises:
        EdgekwsError: it was made from anything else.
    """
    other = [f"{name} {found.get(name, 'not noted')}, now {value}" for name, value in wanted.items() if found.get(name, "") != value]
    if other:
        raise EdgekwsError(f"{path}: made with other settings ({'; '.join(other)}). Give the same again, remove it or give another --out")
