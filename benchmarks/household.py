"""Several people enrol one keyword: what the household's false wakes and recall are, beside each of them alone.

    python benchmarks/household.py --corpus CORPUS [--model edge] [--keywords alexa computer jarvis] [--save]

Each household is so many of the keyword's users, drawn by chance; the keyword wakes by whoever it is most like, as the listener does it.
Their test takes (at most `TAKES` each) are heard in quiet and in noise at 10 and 5 dB in a room; false accepts are counted in quiet on
speech that no network was trained on. "shared" is as deployed (`enrolment.together`), "each" as if everybody were alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench, enrolment
from edgekws.detector import scores
from edgekws.engines import load_engine
from edgekws.evaluation import QUIET_HOPS, events, quiet
from edgekws.model import find_model, load_model
from edgekws.training.lives import Room, corpus_people, test_speech
from edgekws.training.material import LEVEL_DBFS, at_level, to_int16
from edgekws.training.trial import write_jsonl
from edgekws.values import HOP_MS

SIZES = (1, 2, 3, 4, 6)
HOUSEHOLDS = 40  # of each size above one
TAKES = 4
ROOMS = {"quiet": None, "noise10": 10.0, "noise5": 5.0}
RESULTS = Path(__file__).parent / "results" / "household.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", default="edge")
    parser.add_argument("--keywords", nargs="+", default=["alexa", "computer", "jarvis"])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/household.jsonl")
    arguments = parser.parse_args()
    rows = []
    for keyword in arguments.keywords:
        for row in measured(arguments.corpus, keyword, arguments.model):
            rows.append({"benchmark": "household", **row, "host": bench.host()})
            print(told(rows[-1]), flush=True)
    if arguments.save:
        write_jsonl(RESULTS, rows)


def measured(corpus: Path, keyword: str, name: str) -> list[dict[str, Any]]:
    """A row for each size of household, as deployed and as if each were alone."""
    model = load_model(find_model(name))
    engine = load_engine(model)
    people = corpus_people(corpus, [keyword], least=1)
    users = [enrolment.enrol(keyword, one.speaker, one.enrol, engine, model, strict=False) for one in people]
    speech = [enrolment.embed(np.concatenate([quiet(), to_int16(one)]), engine)[QUIET_HOPS:] for one in test_speech(corpus, keyword)]
    hours = sum(map(len, speech)) * HOP_MS / 3_600_000
    # How far above the threshold of each user: at each hop of the speech, and at best in each take of each user.
    above = [[scores(rows, one) - one.threshold for rows in speech] for one in users]
    best: dict[str, list[np.ndarray]] = {where: [] for where in ROOMS}
    for number, person in enumerate(people):
        for where, snr_db in ROOMS.items():
            heard = []
            for i, take in enumerate(person.takes[:TAKES]):
                samples = enrolment.pad(to_int16(at_level(take, LEVEL_DBFS)))
                if snr_db is not None:
                    samples = Room(corpus, 100 * number + i, snr_db).hear(samples, "test", i)
                rows = enrolment.embed(samples, engine)
                heard.append([float((scores(rows, one) - one.threshold).max()) for one in users])
            best[where].append(np.array(heard))  # (takes, users)
    engine.close()
    rng = np.random.default_rng(1)
    found = []
    for size in [one for one in SIZES if one <= len(users)]:
        groups = [rng.choice(len(users), size, replace=False) for _ in range(HOUSEHOLDS)] if size > 1 else [[i] for i in range(len(users))]
        for how in ("shared", "each") if size > 1 else ("each",):
            together = enrolment.together([users[i] for i in groups[0]])[0].threshold - users[groups[0][0]].threshold
            higher = together if how == "shared" else 0.0
            rates = [
                sum(len(events(np.max([above[i][k] for i in group], 0), higher)) for k in range(len(speech))) / hours for group in groups
            ]
            recall = {
                where: float(np.mean([yes for group in groups for i in group for yes in takes[i][:, group].max(1) >= higher]))
                for where, takes in best.items()
            }
            found.append(
                {
                    "model": model.id,
                    "keyword": keyword,
                    "people": size,
                    "thresholds": how,
                    "households": len(groups),
                    "hours": round(hours, 2),
                    "fa_per_hour": round(float(np.mean(rates)), 3),
                    "fa_per_hour_max": round(max(rates), 2),
                    "above_2": sum(rate > 2 for rate in rates),
                    "recall": {where: round(value, 3) for where, value in recall.items()},
                }
            )
    return found


def told(row: dict[str, Any]) -> str:
    """For people."""
    recall = ", ".join(f"{where} {value:.3f}" for where, value in row["recall"].items())
    who = f"{row['keyword']}, {row['people']} {'people' if row['people'] > 1 else 'person'}, thresholds {row['thresholds']}"
    rate = f"{row['fa_per_hour']:.2f} false accepts an hour, highest {row['fa_per_hour_max']:.1f}, {row['above_2']} above 2"
    return f"{who}: {row['households']} households, {rate}; recall {recall}"


if __name__ == "__main__":
    main()
