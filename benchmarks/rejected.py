"""What "that was wrong" does at once: the same sound once more, other sounds, the keyword's words, and a word that is called wrong.

    python benchmarks/rejected.py --corpus CORPUS [--model edge] [--keywords alexa computer jarvis] [--offset -1.2] [--save]

Each user hears speech without the keyword, in quiet and in a room at 10 dB, and calls each false wake wrong, up to the 20 that a listener
compares with. Then the same speech comes again, 40 ms later in the hops' raster and under another stretch of the room's noise, and all of
the user's test takes, in quiet and in the room. Counted are the wakes of that second time that are no more: where it woke the first time
("again"), and elsewhere ("elsewhere"); words that are lost; and words that are lost to one word that was called wrong by mistake, of each
condition `MISTAKES` drawn by chance. As there are few false wakes at the usual threshold, a lower one is asked for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench, enrolment
from edgekws.detector import scores
from edgekws.engines import load_engine
from edgekws.evaluation import QUIET_HOPS, events, quiet
from edgekws.model import find_model, load_model
from edgekws.store import MOST_WRONG
from edgekws.training.lives import LEVEL_DBFS, Person, Room, corpus_people, test_speech
from edgekws.training.material import at_level, to_int16
from edgekws.training.trial import write_jsonl
from edgekws.values import HOP_MS, HOP_SAMPLES, Enrolled

ROOM, SNR_DB = 991, 10.0
SAME_HOPS = 6  # a wake no further from one of the first time is that sound again
MISTAKES = 5
RESULTS = Path(__file__).parent / "results" / "rejected.jsonl"

Rows = dict[tuple[str, str], list[np.ndarray]]
"""(quiet or room, first or second time) → the embeddings of each piece."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", default="edge")
    parser.add_argument("--keywords", nargs="+", default=["alexa", "computer", "jarvis"])
    parser.add_argument("--offset", type=float, default=-1.2, help="of the threshold, as the operator's threshold_offset")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/rejected.jsonl")
    arguments = parser.parse_args()
    model = load_model(find_model(arguments.model))
    engine = load_engine(model)
    room = Room(arguments.corpus, ROOM, SNR_DB)

    def embed(samples: np.ndarray) -> np.ndarray:
        return enrolment.embed(samples, engine)

    rows = []
    for keyword in arguments.keywords:
        speech = heard([to_int16(one) for one in test_speech(arguments.corpus, keyword)], room, embed)
        found: Counter[str] = Counter()
        for person in (people := corpus_people(arguments.corpus, [keyword], least=1)):
            one = enrolment.enrol(keyword, person.speaker, person.enrol, engine, model, strict=False)
            found += user(enrolment.moved(one, arguments.offset), person, speech, room, embed, np.random.default_rng(0))
        hours = sum(map(len, speech["quiet", "second"])) * HOP_MS / 3_600_000
        facts = {"model": model.id, "keyword": keyword, "users": len(people), "hours": round(hours, 2), "offset": arguments.offset}
        rows.append({"benchmark": "rejected", **facts, **found, "host": bench.host()})
        print(told(rows[-1]), flush=True)
    if len(rows) > 1:
        counts = [{name: value for name, value in row.items() if isinstance(value, int)} for row in rows]
        print(told({"keyword": "all", **sum(map(Counter, counts), Counter())}))
    if arguments.save:
        write_jsonl(RESULTS, rows)


def heard(speech: list[np.ndarray], room: Room, embed: Any) -> Rows:
    """All of it, twice, in quiet and in the room."""
    rows: Rows = {}
    for i, samples in enumerate(speech):
        for time, part in (("first", "live"), ("second", "test")):
            moved = np.concatenate([quiet(), samples])[HOP_SAMPLES // 2 * (time == "second") :]
            rows.setdefault(("quiet", time), []).append(embed(moved)[QUIET_HOPS:])
            rows.setdefault(("room", time), []).append(embed(room.hear(moved, part, 7000 + i))[QUIET_HOPS:])
    return rows


def user(one: Enrolled, person: Person, speech: Rows, room: Room, embed: Any, rng: np.random.Generator) -> Counter[str]:
    """The counts of one user."""
    padded = [enrolment.pad(to_int16(at_level(take, LEVEL_DBFS))) for take in person.takes]
    takes = {"quiet": [embed(take) for take in padded], "room": [embed(room.hear(t, "test", i)) for i, t in enumerate(padded)]}
    found: Counter[str] = Counter()
    for where in takes:
        woke = [(piece, hop, rows) for piece, rows in enumerate(speech[where, "first"]) for hop in wakes(rows, one)][-MOST_WRONG:]
        told = enrolment.avoiding(one, [enrolment.around(rows, hop) for _, hop, rows in woke])
        found["rejected"] += len(woke)
        for then in takes if woke else ():
            for piece, rows in enumerate(speech[then, "second"]):
                still = wakes(rows, told)
                for hop in wakes(rows, one):
                    again = any(p == piece and abs(h - hop) <= SAME_HOPS for p, h, _ in woke)
                    kind = "elsewhere" if not again else "again" if then == where else "again_otherwise"
                    found[kind] += 1
                    found[f"{kind}_stopped"] += not any(abs(h - hop) <= SAME_HOPS for h in still)
            words = [rows for rows in takes[then] if len(wakes(rows, one))]
            found["words"] += len(words)
            found["words_lost"] += sum(not len(wakes(rows, told)) for rows in words)
        right = [i for i, rows in enumerate(takes[where]) if len(wakes(rows, one))]
        for i in rng.permutation(right)[:MISTAKES]:
            mistaken = enrolment.avoiding(one, [enrolment.around(takes[where][i], int(wakes(takes[where][i], one)[0]))])
            words = [rows for then in takes for j, rows in enumerate(takes[then]) if j != i and len(wakes(rows, one))]
            found["words_after_mistake"] += len(words)
            found["words_lost_to_mistake"] += sum(not len(wakes(rows, mistaken)) for rows in words)
    return found


def wakes(rows: np.ndarray, one: Enrolled) -> np.ndarray:
    """The hops at which a stream of embeddings wakes it."""
    return events(scores(rows, one), one.threshold)


def told(row: dict[str, Any]) -> str:
    """For people."""

    def of(lost: str, every: str) -> str:
        return f"{row.get(lost, 0)} of {row.get(every, 0)}"

    return (
        f"{row['keyword']}: {row.get('rejected', 0)} false wakes of {row['users']} users called wrong; of those that come again"
        f" {of('again_stopped', 'again')} wake no more, from quiet in the room or the other way"
        f" {of('again_otherwise_stopped', 'again_otherwise')}, of others {of('elsewhere_stopped', 'elsewhere')};"
        f" {of('words_lost', 'words')} words are lost, to one word called wrong by mistake"
        f" {of('words_lost_to_mistake', 'words_after_mistake')}"
    )


if __name__ == "__main__":
    main()
