"""`edgekws bench adaptation`: arms, networks and compressions over whole lives, one row each."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import enrolment
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError, EnrolmentError, UsageError
from edgekws.evaluation import SNR_DB, WORSE, chance_of_fall, household_name, note_long, people_of, read_manifest
from edgekws.frontend import log_mel
from edgekws.model import Model, builtin_models, find_model, graph, load_model
from edgekws.power import NoMeter, Recording, load_meter
from edgekws.store import ADAPTED, load_enrolled
from edgekws.training.adaptation import JUDGE, MOST, ONCE_MORE, STARTS
from edgekws.training.export import load_network
from edgekws.training.lives import (
    LEAST_TAKES,
    NOTHING,
    ROOMS_DB,
    SPOKEN_KEYWORDS,
    Life,
    Person,
    corpus_people,
    enrolled_as,
    go_on,
    lead,
    look_over,
    measure,
    spoken_people,
    test_speech,
)
from edgekws.training.material import to_int16
from edgekws.training.round import GAP_S, Snapshot, Target, adapt, by_engine, by_network, step_cpu_s
from edgekws.values import SAMPLE_RATE_HZ

ARMS = ("before", "prototypes", "enrol-only", "weights-only", "onda1-hap", "onda2-l1", "random", "scratch")
IN_INT8 = "onda1-hap-int8"  # measured where it is asked for: what it keeps of onda1-hap and how small it is, whatever it costs on this host
MOST_COMPRESSED = 1000
REFUSED = ("", 0.0)  # in place of arm and compression: nobody lives who could not enrol
WEEKS, COUNT_OF_WEEKS = "weeks", 3  # through the gate, as `edgekws adapt` tries one recipe after the other, a round a week
PRUNED = ("onda1-hap", "onda2-l1", "random", "scratch", IN_INT8, WEEKS)
ACCEPTED = (*ARMS, IN_INT8, WEEKS)


def arm_options(arm: str) -> dict[str, Any]:
    """What `adapt` is told for an arm; `before` adapts nothing."""
    options: dict[str, dict[str, Any]] = {
        "enrol-only": {"recipe": "weights-only", "pseudo": False},
        "weights-only": {"recipe": "weights-only"},
        "prototypes": {"recipe": "prototypes"},
        "onda1-hap": {"recipe": "onda1", "criterion": "hap"},
        "onda2-l1": {"recipe": "onda2", "criterion": "l1"},
        "random": {"recipe": "onda1", "criterion": "random"},
        "scratch": {"recipe": "onda1", "criterion": "hap", "scratch": True},
        IN_INT8: {"recipe": "onda1", "criterion": "hap", "int8": "always"},
    }
    return {"int8": "never", **options[arm]}


def room_db(condition: str) -> float:
    """noise10 → 10. Raises UsageError."""
    if condition not in SNR_DB or not condition.startswith("noise"):
        raise UsageError(
            f'no condition "{condition}" to live in. Accepted: {", ".join(name for name in SNR_DB if name.startswith("noise"))}'
        )
    return SNR_DB[condition]


def people(
    corpus: Path,
    keywords: Sequence[str] | None,
    count: int | None,
    say: Callable[[str], object] = lambda line: None,
    seen: frozenset[str] = NOTHING,
) -> list[Person]:
    """Users of the corpus and of text-to-speech in turns over the keywords, so that a few are already a mixture.

    Raises:
        UsageError: no such keyword.
        EdgekwsError: no user of the corpus has enough takes, and no keyword of text-to-speech was asked for.
    """
    spoken = {(row.label, row.speaker) for row in read_manifest(corpus) if row.kind == "keyword"}
    everyone = corpus_people(corpus, seen=seen)
    wanted = f"3 takes of split enrol and {LEAST_TAKES} of split test"
    if not everyone and not set(keywords or ()) & set(SPOKEN_KEYWORDS):
        more = f"Record more (`edgekws eval` does with fewer), or name a keyword of text-to-speech: {', '.join(SPOKEN_KEYWORDS)}"
        raise EdgekwsError(f"{corpus}: none of its {len(spoken)} users has {wanted}. {more}")
    if not keywords or set(keywords) & set(SPOKEN_KEYWORDS):
        real = {one.keyword for one in everyone}
        everyone += [one for one in spoken_people() if one.keyword not in real]
    known = list(dict.fromkeys([*(one.keyword for one in everyone), *SPOKEN_KEYWORDS]))
    if wrong := [keyword for keyword in keywords or () if keyword not in known]:
        raise UsageError(f'nobody says "{wrong[0]}" often enough. There are: {", ".join(known)}')
    everyone = [one for one in everyone if not keywords or one.keyword in keywords]
    living = sum((one.keyword, one.speaker) in spoken for one in everyone)
    left_out = sum(not keywords or keyword in keywords for keyword, _ in spoken) - living
    say(f"{living} users of the corpus can live, {left_out} cannot ({wanted}); {len(everyone) - living} of text-to-speech are added")
    mixed = [one for (one,) in households(everyone, 1)]
    for note in note_long(len(take) / SAMPLE_RATE_HZ for one in mixed[:count] for take in one.takes):
        say(note)
    return mixed[:count]


def households(everyone: Sequence[Person], size: int, say: Callable[[str], object] = lambda line: None) -> list[list[Person]]:
    """So many of each keyword's people live together, nobody twice; the keywords in turns. With 1 everybody lives alone.

    Raises:
        UsageError: no keyword has so many.
    """
    by_keyword: dict[str, list[Person]] = {}
    for one in everyone:
        by_keyword.setdefault(one.keyword, []).append(one)
    queues = [[found[i : i + size] for i in range(0, len(found) - size + 1, size)] for found in by_keyword.values()]
    most = max(map(len, queues))
    if not most:
        most = max(map(len, by_keyword.values()))
        raise UsageError(f"--household and --guests: no keyword has {size} users who can live; the most is {most}")
    mixed = [queue[i] for i in range(most) for queue in queues if i < len(queue)]
    if size > 1:
        say(f"households of {size}: {len(mixed)}")
    return mixed


def run(
    corpus: Path,
    *,
    arms: Sequence[str] = ARMS,
    networks: Sequence[str] = ("edge",),
    compressions: Sequence[float] = (4.0,),
    keywords: Sequence[str] | None = None,
    users: int | None = None,
    household: int = 1,
    guests: int = 0,
    seeds: int = 1,
    first_seed: int = 0,
    rooms_db: Sequence[float] = ROOMS_DB,
    workers: int = 1,
    done: Collection[tuple[Any, ...]] = (),
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one life after the other, as they come.

    Args:
        networks: names of packaged ones, or directories of models of such a network.
        compressions: the factory network's parameters over those that are left, for the arms that prune.
        users: the first of the mixture, or the first households; None = all.
        household: so many enrol the keyword and live together.
        guests: so many more enrol, and do not speak before the test.
        seeds: so many from `first_seed` on; each is another room, another order of the stream, other batches.
        rooms_db: users live at these in turns.
        done: what `life_of` names of earlier rows, which need not be run again.

    Raises:
        UsageError: no such arm, network or keyword, or a compression below 1.
        EdgekwsError: a corpus that nobody can live in.
    """
    if wrong := [arm for arm in arms if arm not in ACCEPTED]:
        raise UsageError(f'no arm "{wrong[0]}". Accepted: {", ".join(ACCEPTED)}')
    factories = {
        name: load_model(find_model(name)) for name in networks if name in builtin_models() or Path(name, "manifest.json").exists()
    }
    if wrong := [name for name in networks if name not in factories or factories[name].network not in JUDGE]:
        raise UsageError(f'no network "{wrong[0]}" to adapt. Accepted: {", ".join(JUDGE)}; of one that is not packaged, its directory')
    if wrong := [f"{one:g}" for one in compressions if not 1 <= one <= MOST_COMPRESSED]:
        raise UsageError(f"no compression {wrong[0]}. Accepted: 1 to {MOST_COMPRESSED}, parameters before over parameters after")
    if wrong := [
        f"--{name} {count}"
        for name, count in (("users", users), ("household", household), ("seeds", seeds), ("workers", workers))
        if count is not None and count < 1
    ]:
        raise UsageError(f"{wrong[0]}: accepted is a whole number from 1 on")
    if guests < 0:
        raise UsageError(f"--guests {guests}: accepted is a whole number from 0 on")
    seen = NOTHING.union(*(factory.trained_on_sha256 for factory in factories.values()))
    for note in look_over(corpus, seen):
        say(note)
    together = household + guests
    chosen = households(people(corpus, keywords, users if together == 1 else None, say, seen), together, say)[:users]
    tried = list(dict.fromkeys((arm, compression) for arm in arms for compression in (compressions if arm in PRUNED else (1.0,))))
    jobs = []
    for seed in range(first_seed, first_seed + seeds):
        for number, living in enumerate(chosen):
            for factory in factories.values():
                snr_db = rooms_db[(number + seed) % len(rooms_db)]
                life = (*named(living, guests), factory.network, seed, snr_db)
                left = tuple(each for each in tried if (*life, *each) not in done)
                if left and (*life, *REFUSED) not in done:
                    jobs.append((corpus, living, seed, snr_db, factory, left, workers == 1, guests, seen))
    start_s = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for i, rows in enumerate(pool.map(_life, jobs), 1):
                left_s = (time.monotonic() - start_s) / i * (len(jobs) - i)
                say(f"life {i} of {len(jobs)}: {rows[0]['keyword']}, {rows[0]['network']}, {rows[0]['snr_db']:g} dB; {left_s:.0f} s left")
                yield rows
        except BrokenProcessPool as error:
            hint = "A life takes up to 2 GB: fewer --workers; with --save the same command goes on from the lives that are done"
            raise EdgekwsError(f"a life's process was ended from outside, most likely as memory ran out. {hint}") from error


# Frames of the test speech as it was recorded, the same for all users of a keyword.
_clean: dict[tuple[Path, str, frozenset[str]], list[Any]] = {}


def named(people: Sequence[Person], guests: int) -> tuple[str, str]:
    """Who lives, and the keyword, as rows have them."""
    names = [one.speaker for one in people]
    return household_name(names[: len(names) - guests], names[len(names) - guests :]), people[0].keyword


Job = tuple[Path, Sequence[Person], int, float, Model, tuple[tuple[str, float], ...], bool, int, frozenset[str]]


def _life(job: Job) -> list[dict[str, Any]]:
    corpus, people, seed, snr_db, factory, tried, alone, guests, seen = job
    name = factory.network
    judge = load_model(find_model(JUDGE[name]))
    starts = [load_model(find_model(other)) for other in STARTS.get(name, ())]
    user, keyword = named(people, guests)
    if (corpus, keyword, seen) not in _clean:
        _clean[corpus, keyword, seen] = [log_mel(to_int16(samples)) for samples in test_speech(corpus, keyword, seen)]
    clean = _clean[corpus, keyword, seen]
    common = {"user": user, "keyword": keyword, "network": name, "seed": seed, "snr_db": snr_db}
    number = number_of(people[0], seed)
    try:
        life = lead(people, corpus, factory, seed=number, snr_db=snr_db, clean_negatives=clean, guests=guests, seen=seen)
    except EnrolmentError as error:
        return [{**common, "arm": "before", "refused": str(error)}]
    positives = life.snapshot.positives
    common |= {
        "noise": life.room.noise,
        "spoken": len(life.live),
        "pseudo_positives": len(positives),
        "pseudo_true": sum(one.id for one in positives),
        "ambience_pieces": len(life.snapshot.ambience),
    }
    if len(people) > 1:
        common["takes_of"] = life.takes_of
    rows = []
    for arm, compression in tried:
        each: Iterable[dict[str, dict[str, Any]]] = (
            weeks(life, corpus, compression, factory, judge, starts, seed, number, seen)
            if arm == WEEKS
            else [live(life, arm, compression, factory, judge, starts, seed, alone)]
        )
        for tested in each:
            rows += [{**common, "arm": arm, "compression": compression, "condition": where, **facts} for where, facts in tested.items()]
    return rows


def number_of(person: Person, seed: int) -> int:
    """Of a life, the same whatever the network is: the room and the order depend on the person and the seed alone."""
    return int.from_bytes(person.speaker.encode()[-6:], "little") % 100_000 + 100_000 * seed


def live(
    life: Life, arm: str, compression: float, factory: Any, judge: Any, starts: Sequence[Any], seed: int, alone: bool
) -> dict[str, dict[str, Any]]:
    """What an arm makes of a life: the facts of each condition.

    `energy_j` is all that the machine drew for the round, if no other ran beside it (`alone`).
    """
    start_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if arm == "before":
            with closing(load_engine(factory)) as engine:
                enrolled = enrolled_as(life.people, engine, factory)
            model, gate, cost = factory, None, {}
        else:
            options = arm_options(arm)
            meter = load_meter() if alone else NoMeter("other lives ran beside it (--workers 1 runs them one by one)")
            with closing(meter), Recording(meter, gap_s=GAP_S) as recording:
                outcome = adapt(
                    factory,
                    life.snapshot,
                    Path(folder) / "candidate",
                    id="candidate",
                    target=Target("params", round(factory.parameters / compression)),
                    starts=starts,
                    judge=judge,
                    seed=seed,
                    recording=recording,
                    **options,
                )
            model, cost = outcome.model, outcome.facts["cost"]
            gate = "promoted" if outcome.passed else outcome.reason
            enrolled = enrolment.together(list(load_enrolled(model.path / ADAPTED).values()))
        facts = _cost(model, gate, cost, time.process_time() - start_s)
        if arm == IN_INT8:
            with closing(load_engine(model)) as engine:
                tested = measure(life, by_engine(engine), enrolled)
        else:
            tested = measure(life, by_network(load_network(model)), enrolled)
        return {where: {**found, **facts} for where, found in tested.items()}


def _cost(model: Model, gate: str | None, cost: Mapping[str, Any], round_cpu_s: float) -> dict[str, Any]:
    """What a row says of a version beside how it hears: its size and speed, and the round that made it."""
    step_s = step_cpu_s([model])[0]
    return {
        "parameters": model.parameters,
        "file_kb": round(graph(model, gpu=False)[0].stat().st_size / 1000, 1),
        "gate": gate,
        "train_ms_per_step": cost.get("train_ms_per_step"),
        "round_s": cost.get("round_s"),
        "round_cpu_s": round(round_cpu_s, 1) if cost else None,
        "network_us_per_hop": round(step_s * 1e6, 1),
        "cpu_s_per_audio_hour": round(step_s * 45_000, 3),
        "energy_j": cost.get("energy_j"),
        "why_no_energy": cost.get("why_no_energy") if cost else "nothing was trained",
    }


def weeks(
    life: Life,
    corpus: Path,
    compression: float,
    factory: Model,
    judge: Model,
    starts: Sequence[Model],
    seed: int,
    number: int,
    seen: frozenset[str],
) -> Iterator[dict[str, dict[str, Any]]]:
    """What listens after each of `COUNT_OF_WEEKS` weeks, with a round at the end of each: the facts of each condition.

    The version that a week begins with hears it, and each round learns from all weeks so far. `gate` says how the week's round ended; where
    it was refused the rest of a row is of the version that goes on.

    Args:
        number: of the life, as in `lead`.
    """
    heard, listens, version = life.snapshot, factory, None
    with closing(load_engine(factory)) as engine:
        enrolled = enrolled_as(life.people, engine, factory)
    with tempfile.TemporaryDirectory() as folder:
        for week in range(COUNT_OF_WEEKS):
            if week:
                with closing(load_engine(listens)) as engine:
                    new = go_on(life, corpus, engine, enrolled, seed=number, week=week, seen=seen)
                heard = Snapshot(
                    heard.voices,
                    [*heard.positives, *new.positives][-MOST["positive"] :],
                    [*heard.ambience, *new.ambience][-MOST["ambience"] :],
                    [*heard.near_misses, *new.near_misses][-MOST["near"] :],
                    [*heard.doubtful, *new.doubtful][-MOST["doubtful"] :],
                )
            start_s = time.process_time()
            for recipe in ("onda1",) if listens.parameters < factory.parameters else ONCE_MORE:
                outcome = adapt(
                    factory,
                    heard,
                    Path(folder) / f"{week}-{recipe}",
                    id=f"{week}-{recipe}",
                    recipe=recipe,
                    target=Target("params", round(factory.parameters / compression)),
                    starts=starts,
                    incumbent=version,
                    judge=judge,
                    int8="never",
                    seed=seed,
                )
                if outcome.passed:
                    listens = version = outcome.model
                    enrolled = enrolment.together(list(load_enrolled(version.path / ADAPTED).values()))
                    break
            gate = "promoted" if outcome.passed else outcome.reason
            cost = {**outcome.facts["cost"], "energy_j": None, "why_no_energy": "not measured over weeks"}
            facts = _cost(listens, gate, cost, time.process_time() - start_s)
            facts |= {
                "week": week + 1,
                "pseudo_positives": len(heard.positives),
                "pseudo_true": sum(one.id for one in heard.positives),
                "ambience_pieces": len(heard.ambience),
            }
            tested = measure(life, by_network(load_network(listens)), enrolled)
            yield {where: {**found, **facts} for where, found in tested.items()}


def life_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which life a row is of (the room's noise comes from the place among those who live in a run), and which arm and compression of it."""
    tried = REFUSED if "refused" in row else (row.get("arm"), row.get("compression"))
    return row["user"], row["keyword"], row["network"], row["seed"], row["snr_db"], *tried


def saved(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; [] if there is no such file. Raises EdgekwsError for a file of something else."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        list(map(life_of, rows))
    except (ValueError, TypeError, KeyError) as error:
        raise EdgekwsError(f"{path}: not rows of bench adaptation, or cut short. Mend its last line, or give another --save") from error
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people: each arm, over all lives."""
    header = ["network", "arm", "compression", "lives", "parameters", "condition", "recall@0.5", "deployed", "FA/h"]
    header += [">2/h", "refused", "worse", "ms/step", "round_s", "J", "us/hop"]
    lines = [header]
    before = {(*life_of(row)[:5], row["condition"]): row for row in rows if row["arm"] == "before" and "condition" in row}
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "condition" in row:
            arm = f"{row['arm']}, {row['week']}" if "week" in row else row["arm"]
            groups.setdefault((row["network"], arm, row["compression"], row["condition"]), []).append(row)
    for (network, arm, compression, condition), found in groups.items():

        def mean(name: str, found: Sequence[Mapping[str, Any]] = found, places: int = 3) -> str:
            values = [row[name] for row in found if row[name] is not None]
            return f"{np.mean(values):.{places}f}" if values else "-"

        refused = [row for row in found if row["gate"] not in (None, "promoted")]
        listens = [row for row in found if row["gate"] == "promoted" or "week" in row]
        worse = [row for row in listens if significantly_worse(row, before.get((*life_of(row)[:5], condition)))]
        lines.append(
            [network, arm, f"{compression:g}", str(len(found)), mean("parameters", places=0), condition, mean("recall_at_0.5")]
            + [mean("deployed_recall"), mean("fa_per_hour", places=2), str(sum(row["fa_per_hour"] > 2 for row in found)), str(len(refused))]
            + [str(len(worse)), mean("train_ms_per_step", places=1), mean("round_s", places=0), mean("energy_j", places=0)]
            + [mean("network_us_per_hop", places=1)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    refused_lives = [row for row in rows if "refused" in row]
    shown += [f"{row['keyword']}, {row['user']}, {row['network']}, seed {row['seed']}: {row['refused']}" for row in refused_lives]
    return "\n".join(shown)


def significantly_worse(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether of somebody fewer takes are heard at the deployed threshold than chance explains (95 %, one side)."""
    if before is None:
        return False
    return any(chance_of_fall(*pair) < WORSE for pair in zip(people_of(row), people_of(before), strict=True))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Added to the file at once, so that a run that is interrupted can go on."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
