"""Whose name stands in a wake, where three people enrolled one keyword: by the word, and by the voice.

    python benchmarks/voices.py --corpus CORPUS [--model edge] [--keywords alexa computer jarvis] [--save]

A keyword's users are dealt into households of three, `DEALS` times anew. Each take is a stream of its own through the pipeline: in quiet,
under noise 10 dB below it that no network was trained on, and in a room with such noise. Of those that wake is told how many have the
right name: as the nearest prototype has it ("word"), and as the listener names them ("voice"). Chance has a third of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench, enrolment
from edgekws.audio import read_recording
from edgekws.detector import Detector, scores
from edgekws.engines import Engine, load_engine
from edgekws.evaluation import active, add_noise, read_manifest, speech_power, wilson
from edgekws.model import find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.training.lives import Room, corpus_people
from edgekws.training.material import LEVEL_DBFS, TRAIN_NOISE_FOLDS, at_level, to_int16
from edgekws.training.trial import write_jsonl
from edgekws.values import AudioChunk

SNR_DB = 10.0
TAKES = 12  # of each person, at most
PEOPLE, DEALS = 3, 5
RESULTS = Path(__file__).parent / "results" / "voices.jsonl"


class Known(Engine):
    """Says again what an engine said of a stream."""

    def __init__(self, said: np.ndarray) -> None:
        self.said, self.at = said, 0

    def step(self, frames: np.ndarray) -> np.ndarray:
        self.at += 1
        return self.said[self.at - 1]

    def reset(self) -> None:
        self.at = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", default="edge")
    parser.add_argument("--keywords", nargs="+", default=["alexa", "computer", "jarvis", "digit-zero", "digit-seven"])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/voices.jsonl")
    arguments = parser.parse_args()
    rows = []
    for keyword in arguments.keywords:
        for row in measured(arguments.corpus, keyword, arguments.model):
            rows.append({"benchmark": "voices", **row, "host": bench.host()})
            print(told(rows[-1]), flush=True)
    if arguments.save:
        write_jsonl(RESULTS, rows)


def heard_where(corpus: Path, take: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """The stream of a take in each condition: int16."""
    spoken = at_level(take, LEVEL_DBFS)
    padded = enrolment.pad(to_int16(spoken))
    yield "quiet", padded
    rng = np.random.default_rng([41, seed])
    files = [row.path for row in read_manifest(corpus) if row.kind == "noise" and row.split not in TRAIN_NOISE_FOLDS]
    noise = read_recording(corpus / files[int(rng.integers(len(files)))]).astype(np.float32)
    noise = np.resize(np.roll(noise, int(rng.integers(len(noise)))), len(padded))
    yield "noise", to_int16(add_noise(padded.astype(np.float32), speech_power(spoken, active(spoken)), noise, SNR_DB))
    yield "room", Room(corpus, seed, SNR_DB).hear(padded, "test", seed)


def measured(corpus: Path, keyword: str, name: str) -> Iterator[dict[str, Any]]:
    """A row for each condition."""
    model = load_model(find_model(name))
    engine = load_engine(model)
    people = corpus_people(corpus, [keyword], least=1)
    users = [enrolment.enrol(keyword, one.speaker, one.enrol, engine, model, strict=False) for one in people]
    streams: dict[str, list[list[tuple[np.ndarray, np.ndarray]]]] = {}
    for owner, person in enumerate(people):
        for i, take in enumerate(person.takes[:TAKES]):
            for where, samples in heard_where(corpus, take, 100 * owner + i):
                of_each = streams.setdefault(where, [[] for _ in people])
                of_each[owner].append((samples, enrolment.embed(samples, engine)))
    engine.close()
    rng = np.random.default_rng(1)
    deals = [rng.permutation(len(users)) for _ in range(DEALS if len(users) > PEOPLE else 1)]
    households = [deal[first : first + PEOPLE] for deal in deals for first in range(0, len(deal) - PEOPLE + 1, PEOPLE)]
    for where, of_each in streams.items():
        counts = {"takes": 0, "wakes": 0, "word": 0, "voice": 0}
        woke = set()
        for group in households:
            by_voice = enrolment.together([users[i] for i in group])
            by_word = [replace(one, voice=one.voice[:0]) for one in by_voice]
            for owner in map(int, group):
                for i, (samples, said) in enumerate(of_each[owner]):
                    counts["takes"] += 1
                    if not any((scores(said, one) >= one.threshold).any() for one in by_voice):
                        continue
                    counts["wakes"] += 1
                    woke.add((owner, i))
                    for how, several in (("word", by_word), ("voice", by_voice)):
                        first = Pipeline(Known(said), Detector(several)).feed(AudioChunk(samples, 0))[0]
                        counts[how] += first.speaker == users[owner].speaker
        row = {"model": model.id, "keyword": keyword, "where": where, "people": len(users), "households": len(households)}
        yield {**row, **counts, "takes_that_woke": len(woke)}


def told(row: dict[str, Any]) -> str:
    """For people. The interval is of as many trials as there are takes, not of each household that heard one again."""
    parts = []
    for how in ("word", "voice"):
        share = row[how] / max(1, row["wakes"])
        low, high = wilson(share, row["takes_that_woke"])
        parts.append(f"by the {how} {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})")
    heard = f"of {row['takes_that_woke']} takes, {row['wakes']} wakes"
    return f"{row['keyword']}, {row['where']}: {heard}, the right name of {PEOPLE} {', '.join(parts)}"


if __name__ == "__main__":
    main()
