"""Whole lives of users in rooms: what adaptation is worth, on takes that nothing has heard.

A user enrols with three recordings as they were made. Then the deployed listener hears a stream in the user's room: half of the other takes
among read speech, through a room response and under one kind of noise, 10, 5 or 0 dB below the speech. It keeps clips as it would on a
device; a round learns from them. Tested is on the other half of the takes, in that room under other recordings of that noise, and in quiet;
false accepts on speech that no network and no stream has had.

Several people may enrol one keyword and live together. Guests are enrolled and tested as they are, but never speak in the stream.

The corpus' training side (see training/material.py) speaks in the stream, its evaluation side in the test; of a corpus without such sides
half of what training never had speaks in each. No keyword was ever trained on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import enrolment
from edgekws.audio import read_recording
from edgekws.detector import Detector, scores
from edgekws.engines import Engine, load_engine
from edgekws.errors import EdgekwsError
from edgekws.evaluation import (
    HIGHEST_RATE,
    LEAST_NOISE,
    QUIET_HOPS,
    Row,
    Take,
    add_noise,
    durations_s,
    events,
    false_accept_steps,
    noise_of,
    quiet,
    read_manifest,
    read_segments,
    reverberate,
    room_response,
    said_in,
    wilson,
    without_offset,
)
from edgekws.frontend import log_mel
from edgekws.model import Model, builtin_models, find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.pseudo_labels import PER_HOUR, Cut, PseudoLabels
from edgekws.training import synthesis
from edgekws.training.material import LEVEL_DBFS, TRAIN_NEGATIVES, TRAIN_NOISE_FOLDS, at_level, sha256_16, to_int16
from edgekws.training.round import Embed, Moment, Snapshot, Voice
from edgekws.values import HOP_MS, SAMPLE_RATE_HZ, AudioChunk, Enrolled

LEAST_TAKES = 5  # beside the enrolment: fewer cannot be halved
MOST_TAKES = 70
LEAST_NEGATIVE_S = 1.0  # a shorter one holds no wake
LIVE_MINUTES = 40.0
MOST_HOURS = 4.0  # of negatives in the streams, and in the test
ROOMS_DB = (10.0, 5.0, 0.0)
SPOKEN_KEYWORDS = ("hey snips", "hey snapdragon")
# Text-to-speech users; none of these voices' recordings of the keywords was ever trained on (synthesis.HELD_OUT).
SPOKEN_VOICES = (
    ("espeak-ng", "en-us+steph"),
    ("flite", "slt"),
    ("espeak-ng", "en-gb-scotland+Michael"),
    ("flite", "rms"),
    ("espeak-ng", "en-gb+linda"),
    ("flite", "awb"),
    ("espeak-ng", "en-us+robert"),
    ("flite", "kal16"),
)
SPOKEN_TAKES = 48
CONFUSABLE = (
    "hey snap",
    "hey dragon",
    "hey snipes",
    "he snaps",
    "hay sniffs",
    "hey nap dragon",
    "snips",
    "snapdragon",
    "hey clips",
    "hey wagon",
)
NOTHING: frozenset[str] = frozenset()
OFFSETS = (-0.3, 0.3)  # of the threshold: twice and half as many false accepts
PER_LIFE = dict.fromkeys(PER_HOUR, 1000)  # a life is a week in forty minutes, so a day's caps do not hold


@dataclass(frozen=True)
class Person:
    """A user: three recordings to enrol, and other takes."""

    keyword: str
    speaker: str
    enrol: Sequence[np.ndarray]
    takes: Sequence[np.ndarray]


def corpus_people(
    corpus: Path, keywords: Sequence[str] | None = None, least: int = LEAST_TAKES, seen: frozenset[str] = NOTHING
) -> list[Person]:
    """Those with so many takes beside their enrolment, none of them `seen`; most takes first within a keyword."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in _rows(corpus):
        if row.kind == "keyword" and (not keywords or row.label in keywords) and row.split in ("enrol", "test"):
            if seen and _sha256(corpus / row.path) in seen:
                continue
            found.setdefault((row.label, row.speaker), {"enrol": [], "test": []})[row.split].append(row)
    people = []
    for (keyword, speaker), parts in found.items():
        if len(parts["enrol"]) >= 3 and len(parts["test"]) >= least:
            enrol, takes = ([_read(corpus / row.path) for row in parts[split]] for split in ("enrol", "test"))
            people.append(Person(keyword, speaker, enrol[:3], takes[:MOST_TAKES]))
    return sorted(people, key=lambda one: (one.keyword, -len(one.takes), one.speaker))


def spoken_people() -> list[Person]:
    """Text-to-speech users, whose rate and pitch vary from take to take."""
    keywords = itertools.cycle(SPOKEN_KEYWORDS)
    voices = enumerate(zip(keywords, SPOKEN_VOICES, strict=False))
    return [spoken_person(keyword, *voice, SPOKEN_TAKES, np.random.default_rng([29, i])) for i, (keyword, voice) in voices]


def spoken_person(keyword: str, program: str, name: str, takes: int, rng: np.random.Generator) -> Person:
    """A text-to-speech user with so many takes beside the enrolment."""
    said = []
    for _ in range(3 + takes):
        voice = synthesis.Voice(program, name, float(np.exp(rng.normal(0, 0.08))), float(np.exp(rng.normal(0, 0.06))))
        quiet = np.zeros(round(rng.uniform(0.3, 0.6) * SAMPLE_RATE_HZ), np.int16)
        take = at_level(np.concatenate([quiet, synthesis.say(keyword, voice), quiet]), LEVEL_DBFS + rng.uniform(-3, 3))
        said.append(to_int16(take + rng.standard_normal(len(take)) * 8))
    return Person(keyword, f"{program}:{name}", said[:3], said[3:])


@functools.lru_cache(maxsize=512)
def _read(path: Path) -> np.ndarray:
    """Decoded once: it was most of a life's time."""
    return read_recording(path)


_rows = functools.cache(read_manifest)
_segments = functools.cache(read_segments)


def look_over(corpus: Path, seen: frozenset[str] = NOTHING) -> list[str]:
    """What its lives will lack, for people.

    Args:
        seen: what the networks that are tried were trained on, as their manifests have it (`trained_on_sha256`).

    Raises:
        EdgekwsError: files that cannot be read, or nobody to live among or to be tested on.
    """
    durations_s(corpus, [row for row in _rows(corpus) if row.kind in ("negative", "noise") or row.split in ("enrol", "test")])
    return [note for note in (_sides(corpus, seen)[2], _noises(corpus, seen)[1], _left_out(corpus, seen)) if note]


def _left_out(corpus: Path, seen: frozenset[str]) -> str:
    """What `seen` alone takes from lives, for people; the training side serves as it does for the packaged networks."""
    new = seen - _packaged()
    used = [row for row in _rows(corpus) if row.kind in ("negative", "noise") or row.split in ("enrol", "test")]
    used = [row for row in used if row.split not in TRAIN_NOISE_FOLDS and not row.path.startswith(TRAIN_NEGATIVES)]
    count = sum(_sha256(corpus / row.path) in new for row in used) if new else 0
    return f"{count} files of the corpus left out: a network that is tried was trained on them" if count else ""


@functools.cache
def _sha256(path: Path) -> str:
    return sha256_16([path])[0]


def _packaged() -> frozenset[str]:
    """What the packaged networks were trained on."""
    return frozenset[str]().union(*(load_model(find_model(name)).trained_on_sha256 for name in builtin_models()))


@functools.cache
def _sides(corpus: Path, seen: frozenset[str] = NOTHING) -> tuple[list[str], list[str], str]:
    """Paths of the negatives that speak in the stream and of those in the test, and a note; of one that is both, half of its time is."""
    rows = [row for row in _rows(corpus) if row.kind == "negative"]
    lasts_s = durations_s(corpus, rows)
    paths = [row.path for row in rows if lasts_s[row.path] >= LEAST_NEGATIVE_S]
    trained = seen | _packaged()
    unseen = [path for path in paths if _sha256(corpus / path) not in trained]
    live = [path for path in paths if path.startswith(TRAIN_NEGATIVES) and path not in unseen]  # another corpus may have such names
    if live and unseen:
        return _some_hours(live, lasts_s), _some_hours(unseen, lasts_s), ""
    if not unseen:
        raise EdgekwsError(
            f"{corpus}: no negatives to live among and to be tested on: {len(rows)} there, {len(paths)} of a second or more,"
            " 0 that no network was trained on. Give some"
        )
    drawn = sorted(unseen, key=lambda path: hashlib.sha256(path.encode()).digest())
    live, test = (
        _some_hours([path for path in unseen if path in some], lasts_s) for some in (set(drawn[half::2] or drawn) for half in (1, 0))
    )
    share = 0.5 if live == test else 1.0
    live_min, test_min = (share * sum(lasts_s[path] for path in side) / 60 for side in (live, test))
    note = f"negatives without a training side are shared: {live_min:.1f} min speak in the stream, {test_min:.1f} min in the test"
    return live, test, note


def _some_hours(paths: list[str], lasts_s: Mapping[str, float]) -> list[str]:
    """At most `MOST_HOURS` of these, wherever they lie among them: published corpora have tens of hours, and each life hears all of it."""
    if sum(lasts_s[path] for path in paths) <= 3600 * MOST_HOURS:
        return paths
    drawn = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
    total_s = np.cumsum([lasts_s[path] for path in drawn])
    kept = set(drawn[: int(np.searchsorted(total_s, 3600 * MOST_HOURS)) + 1])
    return [path for path in paths if path in kept]


@functools.cache
def _noises(corpus: Path, seen: frozenset[str] = NOTHING) -> tuple[dict[str, list[Path]], str]:
    """The kinds of noise to live under, those with two recordings if there are any; and a note."""
    every = [row for row in _rows(corpus) if row.kind == "noise"]
    outside = [row for row in every if row.split not in TRAIN_NOISE_FOLDS and not (seen and _sha256(corpus / row.path) in seen)]
    folds = " and ".join(TRAIN_NOISE_FOLDS)
    for rows, least, note in (
        (outside, 2, ""),
        (every, 2, f"no kind of noise has two recordings outside of {folds}: all of the noise is lived under"),
        (every, 1, "no kind of noise has two recordings: half the time of one is lived under, the other half is in the test"),
    ):
        kinds: dict[str, list[Path]] = {}
        for row in rows:
            if len(_loud(_read(corpus / row.path))) >= LEAST_NOISE:
                kinds.setdefault(row.label, []).append(corpus / row.path)
        if found := {kind: paths for kind, paths in kinds.items() if len(paths) >= least}:
            return found, note
    return {}, "the corpus has no noise that can be heard: pink noise is made in its place"


class Room:
    """Where a user lives: a response, one kind of noise, and how loud that is."""

    def __init__(self, corpus: Path, seed: int, snr_db: float | None, seen: frozenset[str] = NOTHING) -> None:
        rng = np.random.default_rng([31, seed])
        kinds = _noises(corpus, seen)[0]
        self.noise = sorted(kinds)[int(rng.integers(len(kinds)))] if kinds else "pink"
        paths = sorted(kinds.get(self.noise, []))
        self.snr_db = snr_db
        self._response = room_response(rng)
        self._parts = {"live": paths[: len(paths) // 2], "test": paths[len(paths) // 2 :]}
        if len(paths) == 1:
            self._parts["live"] = paths
        self._read: dict[str, list[np.ndarray]] = {}

    def hear(self, speech: np.ndarray, part: str, seed: int) -> np.ndarray:
        """Speech at `LEVEL_DBFS` as the microphone gets it: int16, the same length.

        Args:
            part: live or test: other recordings of the same kind of noise.
        """
        mixed = reverberate(speech.astype(np.float32), self._response)
        if self.snr_db is not None:
            noise = self._noise(part, len(mixed), np.random.default_rng([seed]))
            mixed = add_noise(mixed, (32768 * 10 ** (LEVEL_DBFS / 20)) ** 2, noise, self.snr_db)
        return to_int16(mixed)

    def _noise(self, part: str, count: int, rng: np.random.Generator) -> np.ndarray:
        if part not in self._read:
            self._read[part] = [_unit(_read(path)) for path in self._parts[part]]
            if self._parts["live"] == self._parts["test"]:
                self._read[part] = [_half(one, part) for one in self._read[part]]
        return noise_of(self._read[part], rng, count)


def _unit(samples: np.ndarray) -> np.ndarray:
    """Of unit power, without the digital silence that fills a short recording up."""
    kept = _loud(samples)
    return np.asarray(kept / np.sqrt((kept**2).mean()), np.float32)


def _loud(samples: np.ndarray) -> np.ndarray:
    samples = without_offset(samples)
    loud = np.flatnonzero(np.abs(samples) > 1)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]


def _half(samples: np.ndarray, part: str) -> np.ndarray:
    """Of what both the stream and the test need."""
    return samples[: len(samples) // 2] if part == "live" else samples[len(samples) // 2 :]


@dataclass
class Life:
    """What a device has heard, and what it will be tested on."""

    people: Sequence[Person]
    room: Room
    snapshot: Snapshot
    live: Sequence[np.ndarray]
    """The takes in the stream."""
    test: Sequence[np.ndarray]
    """The takes of the test as they were recorded, by person after person."""
    takes_of: dict[str, int]
    """How many of them each speaker said."""
    takes: dict[str, list[tuple[np.ndarray, int]]]
    """room and clean: their frames, and the sample at which the take ends."""
    negatives: dict[str, list[np.ndarray]]
    """room and clean: frames of speech without the keyword."""


def lead(
    people: Sequence[Person],
    corpus: Path,
    factory: Model,
    *,
    seed: int,
    snr_db: float | None,
    clean_negatives: list[np.ndarray],
    guests: int = 0,
    seen: frozenset[str] = NOTHING,
) -> Life:
    """Let the deployed listener live with people of one keyword, so many of whom, the last, are guests; then make the test.

    Args:
        seen: as in `look_over`, and `clean_negatives` made with it.
    """
    rng = np.random.default_rng([37, seed])
    room = Room(corpus, seed, snr_db, seen)
    live: list[np.ndarray] = []
    test: list[np.ndarray] = []
    takes_of = {}
    for number, person in enumerate(people):
        order = rng.permutation(len(person.takes))
        said, heard = ([person.takes[i] for i in order[half::2]] for half in (0, 1))
        live += said if number < len(people) - guests else []
        test += heard
        takes_of[person.speaker] = len(heard)
    if len(people) - guests > 1:
        live = [live[i] for i in rng.permutation(len(live))]
    with closing(load_engine(factory)) as engine:
        enrolled = enrolled_as(people, engine, factory)
        snapshot = hear(people, live, corpus, engine, enrolled, room, rng, seed, seen=seen)
    takes: dict[str, list[tuple[np.ndarray, int]]] = {"room": [], "clean": []}
    for i, take in enumerate(test):
        padded = enrolment.pad(to_int16(at_level(take, LEVEL_DBFS)))
        end = enrolment.PAD_BEFORE + len(take)
        takes["clean"].append((log_mel(padded), end))
        takes["room"].append((log_mel(room.hear(padded, "test", 1000 * seed + i)), end))
    noisy = [log_mel(room.hear(samples, "test", 500_000 + i)) for i, samples in enumerate(test_speech(corpus, people[0].keyword, seen))]
    return Life(people, room, snapshot, live, test, takes_of, takes, {"room": noisy, "clean": clean_negatives})


def go_on(
    life: Life,
    corpus: Path,
    engine: Engine,
    enrolled: Sequence[Enrolled],
    *,
    seed: int,
    week: int,
    seen: frozenset[str] = NOTHING,
) -> Snapshot:
    """What a listener keeps of a later week: the same takes once more, at other moments of other speech and of that room's noise.

    Args:
        seed: of the life.
        week: from 1 on; that of `lead` is 0.
    """
    rng = np.random.default_rng([37, seed, week])
    return hear(life.people, life.live, corpus, engine, enrolled, life.room, rng, seed + 1_000_000 * week, seen=seen)


def enrolled_as(people: Sequence[Person], engine: Engine, model: Model) -> list[Enrolled]:
    """What listens for these people, as `edgekws enroll` leaves it."""
    return enrolment.together([enrolment.enrol(one.keyword, one.speaker, one.enrol, engine, model, strict=False) for one in people])


def hear(
    people: Sequence[Person],
    takes: Sequence[np.ndarray],
    corpus: Path,
    engine: Engine,
    enrolled: Sequence[Enrolled],
    room: Room | None,
    rng: np.random.Generator,
    seed: int,
    witness: tuple[Engine, Sequence[Enrolled]] | None = None,
    seen: frozenset[str] = NOTHING,
) -> Snapshot:
    """What a listener keeps of these takes among read speech; without a room in quiet.

    The id of a moment is 1 where it is the keyword, else 0: nobody who learns looks at it.
    """
    stream, spans = _stream(takes, corpus, rng, seen)
    cuts = cuts_of(room.hear(stream, "live", seed) if room else to_int16(stream), engine, enrolled, witness)

    def kept(label: str, *, room: bool = False) -> list[Cut]:
        return [cut for cut in cuts if cut.clip.label == label and room != bool(cut.clip.keyword)]

    def moment(cut: Cut) -> Moment:
        true = any(a <= cut.end_sample <= b + SAMPLE_RATE_HZ // 2 for a, b in spans)
        return Moment(cut.samples, cut.clip.decided_sample, cut.clip.keyword, cut.clip.speaker, id=int(true))

    return Snapshot(
        [Voice(one.keyword, one.speaker, one.enrol, id=hashlib.sha256(one.speaker.encode()).hexdigest()[:16]) for one in people],
        [moment(cut) for cut in kept("positive")],
        [cut.samples for cut in kept("negative", room=True)],
        [moment(cut) for cut in kept("negative")],
        [moment(cut) for cut in kept("between")],
    )


def cuts_of(
    heard: np.ndarray, engine: Engine, enrolled: Sequence[Enrolled], witness: tuple[Engine, Sequence[Enrolled]] | None = None
) -> list[Cut]:
    """The clips that a listener keeps of int16 samples."""
    labels = PseudoLabels(enrolled, per_hour=PER_LIFE, per_day=PER_LIFE, room_growth=1.0)
    pipeline = Pipeline(engine, Detector(enrolled), labels)
    if witness:
        pipeline.witness = witness[0], Detector(witness[1])
    for first in range(0, len(heard), SAMPLE_RATE_HZ):
        pipeline.feed(AudioChunk(heard[first : first + SAMPLE_RATE_HZ], first))
    return pipeline.cuts


def _stream(
    live: Sequence[np.ndarray], corpus: Path, rng: np.random.Generator, seen: frozenset[str] = NOTHING
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Takes among read speech at `LEVEL_DBFS`, and where they are."""
    pieces: list[np.ndarray] = []
    paths, test, _ = _sides(corpus, seen)
    for path in paths:
        samples = at_level(_read(corpus / path), LEVEL_DBFS)
        samples = _half(samples, "live") if paths == test else samples
        step = round(rng.uniform(15, 40) * SAMPLE_RATE_HZ)
        pieces += [samples[first : first + step] for first in range(0, len(samples), step)]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    total = np.cumsum([len(piece) for piece in pieces])
    pieces = pieces[: int(np.searchsorted(total, LIVE_MINUTES * 60 * SAMPLE_RATE_HZ)) + 1]
    after = sorted(int(i) for i in rng.integers(len(pieces), size=len(live)))
    out: list[np.ndarray] = []
    spans, at, told = [], 0, 0
    for i, piece in enumerate(pieces):
        out.append(piece)
        at += len(piece)
        while told < len(live) and after[told] == i:
            quiet = np.zeros(round(rng.uniform(0.6, 1.5) * SAMPLE_RATE_HZ), np.float32)
            said = at_level(live[told], LEVEL_DBFS)
            spans.append((at + len(quiet), at + len(quiet) + len(said)))
            out += [quiet, said, quiet]
            at += len(said) + 2 * len(quiet)
            told += 1
    return np.concatenate(out), spans


def test_speech(corpus: Path, keyword: str, seen: frozenset[str] = NOTHING) -> Iterator[np.ndarray]:
    """Speech without the keyword that no network and no stream had, at `LEVEL_DBFS`; for text-to-speech keywords with phrases like them."""
    live, paths, _ = _sides(corpus, seen)
    for path in paths:
        samples = at_level(_read(corpus / path), LEVEL_DBFS)
        kept = np.ones(len(samples), bool)
        for first, end in said_in(_segments(corpus), path, keyword):
            kept[first:end] = False
        yield _half(samples, "test")[_half(kept, "test")] if paths == live else samples[kept]
    if keyword in SPOKEN_KEYWORDS:
        yield confusable()


def confusable() -> np.ndarray:
    """Phrases like the text-to-speech keywords, by voices that are not the users'."""
    rng = np.random.default_rng(41)
    pieces = []
    for phrase in CONFUSABLE:
        for name in ("en-us+Andy", "en-gb-x-rp+f4", "en-029+m5"):
            said = at_level(synthesis.say(phrase, synthesis.Voice("espeak-ng", name, float(rng.uniform(0.85, 1.15)))), LEVEL_DBFS)
            pieces += [said, np.zeros(round(rng.uniform(0.8, 2.5) * SAMPLE_RATE_HZ), np.float32)]
    return np.concatenate(pieces)


def measure(life: Life, embed: Embed, enrolled: Sequence[Enrolled]) -> dict[str, dict[str, Any]]:
    """room and clean: recall with thresholds chosen on the test, as the papers do, and what the deployed threshold gives.

    `recall_by_false_accepts` is that of the lowest thresholds with 0, 1, 2 … false accepts, to beyond `HIGHEST_RATE` an hour;
    `recall_at_0.5` the one of most false accepts that are no more than 0.5 an hour. `false_accepts_by_offset` is what an operator has who
    asks for twice and for half as many as deployed.
    """
    first = enrolled[0].threshold
    before = log_mel(quiet())

    def heard_as(frames: np.ndarray) -> np.ndarray:
        """The score of each hop by whoever it is most like, as if all had the threshold of the first."""
        embeddings = embed(frames)
        return np.max([scores(embeddings, one) + (first - one.threshold) for one in enrolled], 0)

    found = {}
    for where in ("room", "clean"):
        heard = [heard_as(np.concatenate([before, frames]))[QUIET_HOPS:] for frames in life.negatives[where]]
        hours = sum(map(len, heard)) * HOP_MS / 3_600_000
        takes = [Take(heard_as(frames), enrolment.PAD_BEFORE, end + SAMPLE_RATE_HZ // 2) for frames, end in life.takes[where]]
        most = int(HIGHEST_RATE * hours) + 2
        thresholds = [float(np.nextafter(step, np.float32(np.inf))) for step in false_accept_steps(heard, most)]
        thresholds += [-math.inf] * (most - len(thresholds))  # however low, there are no more

        def share(at: float, takes: Sequence[Take] = takes) -> float:
            return sum(take.heard(at)[0] is not None for take in takes) / len(takes)

        recalls = [share(threshold) for threshold in thresholds]
        recall = recalls[int(0.5 * hours + 1e-9)]
        deployed = [take.heard(first)[0] is not None for take in takes]
        false_accepts = sum(len(events(one, first)) for one in heard)
        found[where] = {
            "recall_at_0.5": recall,
            "recall_interval": wilson(recall, len(takes)),
            "recall_by_false_accepts": recalls,
            "takes": len(takes),
            "deployed_recall": sum(deployed) / len(takes),
            "heard": "".join(str(int(yes)) for yes in deployed),
            "false_accepts": false_accepts,
            "hours": round(hours, 3),
            "fa_per_hour": false_accepts / hours,
            "false_accepts_by_offset": {
                f"{offset:+}": sum(len(events(one, enrolment.moved(enrolled[0], offset).threshold)) for one in heard) for offset in OFFSETS
            },
        }
    return found
