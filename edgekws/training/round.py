"""One round of adaptation: what was heard → lessons → fine-tune and prune → a model directory → the gate's verdict.

    weights-only   fine-tune
    onda1          prune by a data-aware score on the pseudo-labels, then fine-tune what is left          (OnDA-1, arXiv:2603.02247)
    onda2          fine-tune, prune by magnitude, fine-tune again with the unpruned one as the teacher    (OnDA-2)

Always from the factory network, never from the last round's, so that errors do not add up. Of everything heard a part is held out: a third
of the pseudo-positives, half of the ambience and half of the shipped speech are never trained on. The threshold is calibrated on them, and
the gate compares candidate and incumbent on them.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekws import enrolment
from edgekws.detector import background, scores
from edgekws.engines import Engine, load_engine
from edgekws.errors import EdgekwsError, EnrolmentError, UsageError
from edgekws.evaluation import events
from edgekws.frontend import HOP_FRAMES, N_MELS, log_mel
from edgekws.model import Model, load_model, write_manifest
from edgekws.training.export import load_network, save_model
from edgekws.training.finetune import Batches, Example, Lesson, Lessons, Loss, Sound, crop, finetune, mix, steps_of, windows_of
from edgekws.training.networks import Network
from edgekws.training.prune import DATA_AWARE, channel_scores, choose_widths, parameter_cost, prune
from edgekws.values import HOP_SAMPLES, Enrolled

RECIPES = ("weights-only", "onda1", "onda2")
STEPS = {"weights-only": 120, "onda1": 400, "onda2": 400}
LR_FULL, LR_PRUNED = 1e-3, 3e-3
NEAR_HOPS = (-3, 4)  # where, around the decision, a clip is most like its keyword
SECOND_OPINION = 0.0  # score that a second network must give: as often as once an hour
HELD_POSITIVES, HELD_AMBIENCE = 3, 2  # each third, each second
COLLAPSED = 0.95  # mean cosine of an embedding with any other
NEAR_MISS = 2.0  # below the threshold: what is trained on as most like a keyword
AUGMENTED = 8  # copies of each held-out recording under held-out ambience, in the gate


@dataclass(frozen=True)
class Voice:
    """One keyword as one speaker recorded it."""

    keyword: str
    speaker: str
    recordings: Sequence[np.ndarray]
    """int16, mono, 16 kHz."""
    only_enrolled: bool = False
    id: str = ""


@dataclass(frozen=True)
class Moment:
    """A piece of audio with a decision in it."""

    samples: np.ndarray
    """int16, mono, 16 kHz."""
    decided_sample: int
    keyword: str = ""
    speaker: str = ""
    sure: bool = False
    """A person said so: no second opinion is asked."""
    id: int = 0


@dataclass(frozen=True)
class Snapshot:
    """All that a round learns from."""

    voices: Sequence[Voice]
    positives: Sequence[Moment] = ()
    ambience: Sequence[np.ndarray] = ()
    """int16 pieces of the room without a keyword."""
    near_misses: Sequence[Moment] = ()
    """What was like a keyword and is none."""

    def sha256(self) -> str:
        """Of all audio."""
        digest = hashlib.sha256()
        for samples in [r for v in self.voices for r in v.recordings] + [m.samples for m in (*self.positives, *self.near_misses)]:
            digest.update(samples.tobytes())
        for samples in self.ambience:
            digest.update(samples.tobytes())
        return digest.hexdigest()


@functools.cache
def replay() -> tuple[np.ndarray, ...]:
    """Shipped speech: an hour from text-to-speech as log-mel frames, float16 (T, 40) each. `edgekws pretrain` made it."""
    with resources.as_file(resources.files("edgekws") / "models" / "replay.npz") as path, np.load(path, allow_pickle=False) as data:
        frames = np.cumsum(data["differences"], 0, dtype=np.int8).astype(np.float16) * np.float16(data["step"])
        return tuple(np.split(frames, data["starts"][1:-1]))


@dataclass(frozen=True)
class Trial:
    """How a network hears one recording of a keyword."""

    margin: float
    """Highest score around the decision, less the threshold."""
    kind: str
    """pseudo: a held-out clip; room: an enrolment recording under held-out ambience; clean: as it was recorded."""


@dataclass(frozen=True)
class Heard:
    """What a version does on everything that was held out."""

    trials: tuple[Trial, ...]
    false_accepts: int
    hours: float

    def recall(self, kind: str | None = None) -> float | None:
        """Share of the trials above the threshold; None if there are none."""
        chosen = [one.margin >= 0 for one in self.trials if kind in (None, one.kind)]
        return sum(chosen) / len(chosen) if chosen else None


@dataclass(frozen=True)
class Outcome:
    """What a round came to."""

    promoted: bool
    """The gate lets it pass."""
    reason: str
    model: Model
    admitted: tuple[int, ...] = ()
    """Ids of pseudo-positives that a second opinion confirmed."""
    rejected: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def second_opinion(judge: Model, voices: Sequence[Voice], moments: Sequence[Moment]) -> list[float]:
    """The score that another network gives each moment, by the prototypes of its keyword and speaker: -inf where it cannot say."""
    engine = load_engine(judge)
    known: dict[tuple[str, str], Enrolled] = {}
    for voice in voices:
        try:
            known[voice.keyword, voice.speaker] = enrolment.enrol(voice.keyword, voice.speaker, voice.recordings, engine, judge, strict=False)
        except EnrolmentError:
            continue
    found = []
    for moment in moments:
        one = known.get((moment.keyword, moment.speaker))
        found.append(-np.inf if one is None else _peak(enrolment.embed(moment.samples, engine), moment.decided_sample, one)[1])
    engine.close()
    return found


def _peak(embeddings: np.ndarray, decided_sample: int, enrolled: Enrolled) -> tuple[int, float]:
    """The hop around a decision that is most like the keyword, and its score."""
    hop = decided_sample // HOP_SAMPLES - 1
    first, end = max(0, hop + NEAR_HOPS[0]), min(len(embeddings), hop + NEAR_HOPS[1] + 1)
    if first >= end:
        return max(0, min(hop, len(embeddings) - 1)), -np.inf
    values = scores(embeddings[first:end], enrolled)
    return first + int(values.argmax()), float(values.max())


class _Round:
    """The parts of a round that share what was heard."""

    def __init__(self, factory: Model, snapshot: Snapshot, admitted: Sequence[Moment], say: Callable[[str], object]) -> None:
        self.factory, self.snapshot, self.say = factory, snapshot, say
        self.network = load_network(factory)
        engine = load_engine(factory)
        self.enrolled = []
        self.voices = []
        for voice in snapshot.voices:
            try:
                self.enrolled.append(
                    enrolment.enrol(voice.keyword, voice.speaker, voice.recordings, engine, factory, only_enrolled=voice.only_enrolled, strict=False)
                )
                self.voices.append(voice)
            except EnrolmentError as error:
                say(f"left out: {error}")
        engine.close()
        if not self.voices:
            raise EnrolmentError("nothing usable is enrolled, so there is nothing to adapt to. Try: edgekws enroll KEYWORD")
        numbers = {(v.keyword, v.speaker): i for i, v in enumerate(self.voices)}
        mine = [m for m in admitted if (m.keyword, m.speaker) in numbers]
        self.train_positives = [m for i, m in enumerate(mine) if i % HELD_POSITIVES != HELD_POSITIVES - 1]
        self.held_positives = [m for i, m in enumerate(mine) if i % HELD_POSITIVES == HELD_POSITIVES - 1]
        self.number = numbers
        pieces = [log_mel(piece) for piece in snapshot.ambience if len(piece) >= 5 * 16000]
        self.train_ambience, self.held_ambience = pieces[::HELD_AMBIENCE], pieces[1::HELD_AMBIENCE]
        shipped = replay()
        self.train_replay, self.held_replay = shipped[::2], shipped[1::2]
        self.own = [[self._own(voice, i) for i in range(len(voice.recordings))] for voice in self.voices]

    def _own(self, voice: Voice, i: int) -> Example:
        """An enrolment recording with quiet around it; the word's hop is where the factory network hears it best."""
        samples = voice.recordings[i]
        one = self.enrolled[self.voices.index(voice)]
        frames = log_mel(enrolment.pad(samples))
        _, end = enrolment.speech_span(samples)
        embeddings = windows_of(self.network, steps_of(self.network, frames))
        hop = -(-(enrolment.PAD_BEFORE + end) // HOP_SAMPLES) - 1 + enrolment.TAIL_HOPS
        low, high = enrolment.ALIGN_HOPS
        places = np.arange(max(0, hop + low), min(len(embeddings), hop + high + 1))
        return Example(frames, int(places[scores(embeddings[places], one).argmax()]))

    def _pseudo(self, network: Network, moment: Moment, one: Enrolled) -> Example:
        frames = log_mel(moment.samples)
        return Example(frames, _peak(windows_of(network, steps_of(network, frames)), moment.decided_sample, one)[0])

    def lessons(self, teacher: Network, *, pseudo: bool = True) -> Lessons:
        """What the training side teaches, in the words of this teacher."""
        keywords = []
        for k, one in enumerate(self.enrolled):
            threshold = one.threshold / one.scale + one.offset
            mine = [m for m in self.train_positives if self.number[m.keyword, m.speaker] == k] if pseudo else []
            keywords.append(Lesson(one.prototypes[0], threshold, self.own[k], [self._pseudo(self.network, m, one) for m in mine]))

        def sound(frames: np.ndarray) -> Sound:
            return Sound(frames, steps_of(teacher, frames))

        ambience, shipped = [sound(f) for f in self.train_ambience], [sound(f) for f in self.train_replay]
        hard = [replace(sound(log_mel(m.samples)), hop=m.decided_sample // HOP_SAMPLES - 1) for m in self.snapshot.near_misses[::2]]
        for one in (*ambience, *shipped):  # what of all this is most like a keyword
            embeddings = windows_of(teacher, one.taught)
            for enrolled in self.enrolled:
                values = scores(embeddings, enrolled)
                hard += [replace(one, hop=int(hop)) for hop in events(values, enrolled.threshold - NEAR_MISS)]
        return Lessons(keywords, self.enrolled[0].cohort, ambience, shipped, hard)

    # The candidate.

    def held_sounds(self) -> list[np.ndarray]:
        """Frames of what was never trained on and holds no keyword: speech in quiet, the same in the room, the room alone."""
        rng = np.random.default_rng(5)
        in_room = []
        for frames in self.held_replay if self.held_ambience else ():
            under = np.concatenate([self.held_ambience[int(i)] for i in rng.permutation(len(self.held_ambience))])
            in_room.append(mix(np.asarray(frames, np.float32), np.resize(under, frames.shape), float(rng.uniform(*NOISE_DB))))
        return [*(np.asarray(f, np.float32) for f in self.held_replay), *in_room, *self.held_ambience]

    def write(self, network: Network, out: Path, id: str, facts: Mapping[str, Any]) -> tuple[Model, list[Enrolled]]:
        """The model directory with its negatives, and what it listens for."""
        golden = np.asarray(self.held_replay[0][: 160], np.float32).reshape(-1, HOP_FRAMES, N_MELS)
        save_model(network, out, id=id, name=self.factory.network, golden_frames=golden, facts=facts)
        write_negatives(out, [steps_of(network, frames) for frames in self.held])
        model = load_model(out)
        enrolled = []
        for k, (voice, factory) in enumerate(zip(self.voices, self.enrolled, strict=True)):
            rows = [windows_of(network, steps_of(network, one.frames))[one.word_hop] for one in self.own[k]]
            for moment in self.train_positives:
                if self.number[moment.keyword, moment.speaker] == k:
                    frames = log_mel(moment.samples)
                    embeddings = windows_of(network, steps_of(network, frames))
                    rows.append(embeddings[_peak(embeddings, moment.decided_sample, factory)[0]])
            mean = np.sum(rows, 0)
            prototypes = (mean / max(float(np.linalg.norm(mean)), 1e-6))[None].astype(np.float32)
            scale, offset, cohort = enrolment.calibrate(prototypes, model)
            enrolled.append(replace(factory, prototypes=prototypes, scale=scale, offset=offset + self.shift[k], cohort=cohort))
        enrolment.save_enrolled(model.path, enrolled, [voice.id for voice in self.voices])
        return load_model(out), enrolled
