"""What looking back is worth: lives in which a version was promoted, and goes on among takes that nobody has heard.

    python benchmarks/look_back.py CORPUS [--keywords amelia …] [--users 20] [--seeds 3] [--first-seed 5] [--workers 2] [--save FILE]

The lives of `edgekws bench adaptation`, with onda1 by HAP to an eighth of the parameters. Where the gate promotes the pruned version, it
listens to half of the test's takes among forty minutes of speech in the room, and to the same in quiet; the version before listens along,
clips are kept as always, and these are looked back on. The other half tells what that was worth: takes heard at the deployed threshold,
before the round, after it, and in the version that listens once the week is over. Then the halves change places, so that a life counts
twice. What both halves together say is printed too, without a measure: no take is left that had no part in it; and what they say together
with the test's speech, in which nobody says the keyword: a version that only wakes at less of that has lost no word.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekws import enrolment
from edgekws.detector import scores
from edgekws.engines import load_engine
from edgekws.evaluation import WORSE, Take, chance_of_fall
from edgekws.model import Model, find_model, load_model
from edgekws.pseudo_labels import Cut
from edgekws.training import lives
from edgekws.training.adaptation import JUDGE, STARTS, fell
from edgekws.training.lives import ROOMS_DB, Life, Person, lead
from edgekws.training.material import to_int16
from edgekws.training.round import Moment, Target, adapt, by_engine, listened_for, told_apart
from edgekws.training.trial import number_of, people, write_jsonl
from edgekws.values import SAMPLE_RATE_HZ

CONDITIONS = ("room", "clean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--keywords", nargs="+")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    everyone = list(enumerate(people(arguments.corpus, None, arguments.users)))
    chosen = [(i, one) for i, one in everyone if not arguments.keywords or one.keyword in arguments.keywords]
    jobs = [
        (arguments.corpus, one, seed, ROOMS_DB[(i + seed) % len(ROOMS_DB)])
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        for i, one in chosen
    ]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the workers, as edgekws has it
    rows = []
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(look_back, jobs):
            rows.append(row)
            if arguments.save:
                write_jsonl(arguments.save, [row])
            print(told(row), flush=True)
    print(summary(rows))


def look_back(job: tuple[Path, Person, int, float]) -> dict[str, Any]:
    """One life."""
    corpus, person, seed, snr_db = job
    torch.set_num_threads(1)
    factory, *starts = (load_model(find_model(name)) for name in ("edge", *STARTS["edge"]))
    judge = load_model(find_model(JUDGE["edge"]))
    number = number_of(person, seed)
    life = lead([person], corpus, factory, seed=number, snr_db=snr_db, clean_negatives=[])
    row: dict[str, Any] = {"user": person.speaker, "keyword": person.keyword, "seed": seed, "snr_db": snr_db, "noise": life.room.noise}
    with tempfile.TemporaryDirectory() as folder:
        target = Target("params", 1 / 8)
        made = adapt(factory, life.snapshot, Path(folder) / "v", id="v", target=target, starts=starts, judge=judge, int8="never", seed=seed)
        row["promoted"] = made.passed
        if made.passed:
            row |= {"said": len(life.test) * len(CONDITIONS), "halves": []}
            heard = [keeps(life, made.model, factory, corpus, half, number) for half in (0, 1)]
            words = heard[0] + heard[1]
            for moments in (*heard, words, words + overhears(life, made.model, factory, corpus)):
                ((lost, gained),) = told_apart(made.model, factory, judge, life.snapshot.voices, moments).values()
                row["halves"].append({"clips": len(moments), "lost": lost, "gained": gained})
            *row["halves"], row["together"], row["beside_speech"] = row["halves"]
            for when, model in (("before", factory), ("after", made.model)):
                row[when] = hears(model, life)
    return row


def keeps(life: Life, now: Model, before: Model, corpus: Path, half: int, number: int) -> list[Moment]:
    """Clips of half of the test's takes, in the room and in quiet."""
    moments: list[Moment] = []
    enrolled, enrolled_before = (listened_for(model, life.snapshot.voices) for model in (now, before))
    for i, room in enumerate((life.room, None)):
        with closing(load_engine(now)) as engine, closing(load_engine(before)) as engine_before:
            witness = engine_before, enrolled_before
            rng = np.random.default_rng([47, number, i, half])
            heard = lives.hear(life.people, life.test[half::2], corpus, engine, enrolled, room, rng, number + 1 + half, witness)
        moments += [*heard.positives, *heard.doubtful, *heard.near_misses]
    return moments


def overhears(life: Life, now: Model, before: Model, corpus: Path) -> list[Moment]:
    """Clips of speech without the keyword, in the room and in quiet."""
    (person,) = life.people
    enrolled, enrolled_before = (listened_for(model, life.snapshot.voices) for model in (now, before))
    cuts: list[Cut] = []
    for room in (life.room, None):
        speech = np.concatenate(list(lives.test_speech(corpus, person.keyword)))
        with closing(load_engine(now)) as engine, closing(load_engine(before)) as engine_before:
            heard = room.hear(speech, "test", 0) if room else to_int16(speech)
            cuts += lives.cuts_of(heard, engine, enrolled, (engine_before, enrolled_before))
    return [Moment(cut.samples, cut.clip.decided_sample, cut.clip.keyword, cut.clip.speaker) for cut in cuts if cut.clip.keyword]


def hears(model: Model, life: Life) -> dict[str, str]:
    """1 for each take of the test that is heard, else 0."""
    (one,) = listened_for(model, life.snapshot.voices)
    found = {}
    with closing(load_engine(model)) as engine:
        embed = by_engine(engine)
        for where in CONDITIONS:
            takes = [Take(scores(embed(frames), one), enrolment.PAD_BEFORE, end + SAMPLE_RATE_HZ // 2) for frames, end in life.takes[where]]
            found[where] = "".join(str(int(take.heard(one.threshold)[0] is not None)) for take in takes)
    return found


def told(row: Mapping[str, Any]) -> str:
    """For people."""
    who = f"{row['keyword']}, {row['user']}, seed {row['seed']}, {row['snr_db']:g} dB"
    if not row["promoted"]:
        return f"{who}: refused by the gate"
    looks = ", ".join(f"{one['lost']}:{one['gained']} {_end(one)}" for one in (*row["halves"], row["together"], row["beside_speech"]))
    recall = "; ".join(f"{where} {_share(row['before'][where]):.2f} → {_share(row['after'][where]):.2f}" for where in CONDITIONS)
    return f"{who}: {row['said']} words; only the version before : only the new one, each half, both, and beside speech: {looks}; {recall}"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Over all lives."""
    promoted = [row for row in rows if row["promoted"]]
    together = [row["together"] for row in promoted]
    halves = [one for row in promoted for one in row["halves"]]
    lines = [
        f"{len(promoted)} of {len(rows)} lives promoted. Of {sum(row['said'] for row in promoted)} words only the version before hears "
        f"{sum(one['lost'] for one in together)}, only the new one {sum(one['gained'] for one in together)}"
    ]
    beside = [row["beside_speech"] for row in promoted]
    for what, looks in (("half of the words", halves), ("all", together), ("all and speech without the keyword", beside)):
        soon = sum(fell(one["lost"], one["gained"]) for one in looks)
        lines.append(f"gone back from after {what}: {soon} of {len(looks)} in the week, {sum(map(_back, looks))} by its end")
    for where in CONDITIONS:
        tests = [
            ({when: row[when][where][1 - half :: 2] for when in ("before", "after")}, _back(row["halves"][half]))
            for row in promoted
            for half in (0, 1)
        ]
        used = [heard["before" if back else "after"] for heard, back in tests]
        before, after = ([heard[when] for heard, _ in tests] for when in ("before", "after"))
        means = [np.mean([_share(heard) for heard in one]) for one in (before, after, used)]
        worse = [row for row in promoted if chance_of_fall({"heard": row["after"][where]}, {"heard": row["before"][where]}) < WORSE]
        lines.append(
            f"{where}, the other half: {means[0]:.3f} before, {means[1]:.3f} after, {means[2]:.3f} in the end; lives worse on all takes "
            f"{len(worse)}, of these gone back from after all words {sum(_back(row['together']) for row in worse)}"
        )
    return "\n".join(lines)


def _back(look: Mapping[str, int]) -> bool:
    return fell(look["lost"], look["gained"], at_last=True)


def _end(look: Mapping[str, int]) -> str:
    if fell(look["lost"], look["gained"]):
        return "gone back from in the week"
    return "gone back from at its end" if _back(look) else "kept"


def _share(heard: str) -> float:
    return heard.count("1") / max(1, len(heard))


if __name__ == "__main__":
    main()
