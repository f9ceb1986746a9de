"""The lives on which a round's constants are chosen: ten users in rooms that `edgekws bench adaptation` does not measure.

    python benchmarks/development_lives.py CORPUS [--arms weights-only onda1-hap] [--seeds 2] [--lives 10]

Real people are those of the corpus whom the benchmark's twenty left out, but amelia's only speaker. Those twenty are others since: of these
people fsdd-theo and pv035 are among them too, in other rooms (docs/measured.md has the figures without the three). The others here speak
text-to-speech, words and voices of their own. Each life is lived once, then learned from with each seed of training: what a
seed changes (0.88 and 0.83 recall of the same lives) is more than most constants do. Printed are recall at 0.5 false accepts an hour, at
the deployed threshold, and false accepts in 1.8 hours, each in the room and in quiet, whatever the gate said.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekws.frontend import log_mel
from edgekws.model import find_model, load_model
from edgekws.training.adaptation import JUDGE, STARTS
from edgekws.training.lives import Person, corpus_people, lead, spoken_person, test_speech
from edgekws.training.material import to_int16
from edgekws.training.trial import ARMS, live

NETWORK, COMPRESSION = "edge", 8.0
# Keyword, who, noise below speech in dB, seed of the life.
LIVES = (
    ("digit-zero", "fsdd-theo", 5.0, 101),
    ("digit-zero", "fsdd-theo", 10.0, 102),
    ("digit-seven", "fsdd-theo", 5.0, 103),
    ("computer", "pv035", 10.0, 104),
    ("computer", "pv001", 5.0, 105),
    ("jarvis", "pv001", 5.0, 106),
    ("hey mycroft", "espeak-ng:en-gb-x-rp+Gene", 5.0, 107),
    ("hey nabu", "espeak-ng:en-us+Alicia", 0.0, 108),
    ("hey mycroft", "festival:kal_diphone", 10.0, 109),
    ("amelia", "my-jodynickel", 5.0, 110),
)
FIGURES = ("recall_at_0.5", "deployed_recall", "false_accepts")


def person(corpus: Path, keyword: str, who: str, seed: int) -> Person:
    program, _, name = who.partition(":")
    if name:
        return spoken_person(keyword, program, name, 40, np.random.default_rng([77, seed]))
    return next(one for one in corpus_people(corpus, [keyword]) if one.speaker == who)


def shown(facts: dict[str, dict[str, Any]]) -> str:
    return "  ".join(f"{name} {facts['room'][name]:.2f} {facts['clean'][name]:.2f}" for name in FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["before", "weights-only", "onda1-hap"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lives", type=int, default=len(LIVES), help="the first so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    factory, judge, *starts = (load_model(find_model(name)) for name in (NETWORK, JUDGE[NETWORK], *STARTS[NETWORK]))
    found: dict[tuple[str, int], list[dict[str, dict[str, Any]]]] = {}
    for keyword, who, snr_db, seed in LIVES[: arguments.lives]:
        one = person(arguments.corpus, keyword, who, seed)
        clean = [log_mel(to_int16(samples)) for samples in test_speech(arguments.corpus, keyword)]
        life = lead([one], arguments.corpus, factory, seed=seed, snr_db=snr_db, clean_negatives=clean)
        for arm in arguments.arms:
            for training in range(1 if arm == "before" else arguments.seeds):
                facts = live(life, arm, COMPRESSION, factory, judge, starts, training, False)
                found.setdefault((arm, training), []).append(facts)
                print(f"{keyword} by {who}, {snr_db:g} dB  {arm}, seed {training}  {shown(facts)}  {facts['room']['gate']}", flush=True)
    for (arm, training), lives in found.items():
        means = {where: {name: np.mean([one[where][name] for one in lives]) for name in FIGURES} for where in ("room", "clean")}
        promoted = sum(one["room"]["gate"] == "promoted" for one in lives)
        print(f"mean of {len(lives)}  {arm}, seed {training}  {shown(means)}  {promoted} promoted")


if __name__ == "__main__":
    main()
