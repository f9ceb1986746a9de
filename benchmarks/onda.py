"""What adaptation is worth over whole lives of users in rooms, beside what OnDA (arXiv:2603.02247) published.

    edgekws bench adaptation --corpus DIR --save benchmarks/results/onda.jsonl       # an hour on two cores
    python benchmarks/onda.py benchmarks/results/onda.jsonl [MORE.jsonl] --out benchmarks/results/onda
    python benchmarks/onda.py --short --out /tmp/onda                                # a few minutes, to see that it works

The second computes from rows that were measured and writes NAME.md, NAME.svg and NAME.png. A licensee of HeySnips and HeySnapdragon makes
the rows with --corpus HEYSNIPS, or --corpus HEYSNAPDRAGON --corpus HEYSNIPS, as they were published. --short lives two lives itself and
needs the `dev` extra and the Debian packages `espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts wamerican`;
without --corpus it makes one of synthetic speech and noise, whose figures say little.

Intervals are percentiles of 2000 bootstraps over users: a user's seeds and takes stay together. What is asked is judged by the mean for
recall and false accepts (most users lose or gain nothing at all, so a median hides the others), by the median for ratios of time.

0.5 false accepts an hour are 0.89 in the test's 1.77 hours. Rows that hold the recall at each number of false accepts give the one in
between, on the straight line from none to one; with older rows among them all are taken at the lower number, a stricter point.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.errors import install_command
from edgekws.evaluation import WORSE, chance_of_fall, people_of
from edgekws.pictures import new_figure, save

Row = Mapping[str, Any]
Pair = tuple[Row, Row]

HYBRID, HYBRID_INT8 = "onda1-hap", "onda1-hap-int8"
CONDITIONS = ("room", "clean")
ADAPTS_TO = 8.0  # the compression of `edgekws adapt`, where nothing else is asked for
POINT = 0.01  # of recall: what counts as equal
LOW_START = 0.8
CEILING = 0.95
FEW_POSITIVES = 20
TELLING = 5  # takes lost and none gained that chance does not explain
BOOTSTRAPS = 2000
# OnDA: sizes at equal accuracy from its full-paper digests, its baselines' parameters from the published code.
DS_CNN_L, RESNET15 = 413_448, 479_808
PUBLISHED = (
    ("OnDA 9.63x (DS-CNN-L)", DS_CNN_L / 9.63),
    ("OnDA 3.33x (ResNet15)", RESNET15 / 3.33),
    ("OnDA 1.7x (ResNet15)", RESNET15 / 1.7),
)
PUBLISHED_CPU = 1.93  # of inference, against weights-only


def user_of(row: Row) -> tuple[str, str]:
    """Whom a bootstrap draws."""
    return row["user"], row["keyword"]


def life_of(row: Row) -> tuple[Any, ...]:
    """Which user in which room, how loud; the same whatever the network is, but not in a run with other `--users` or `--keyword`."""
    return row["user"], row["keyword"], row["seed"], row["snr_db"]


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows with figures, and `recall` at 0.5 false accepts an hour, by one measure for all of them.

    Others are of users whose recordings cannot be enrolled, or of what listens after several rounds (`weeks`).
    """
    found = [row for row in rows if "condition" in row and "week" not in row]
    counted = all("recall_by_false_accepts" in row for row in found)
    return [{**row, "recall": between(row) if counted else row["recall_at_0.5"]} for row in found]


def between(row: Row) -> float:
    """Recall at 0.5 false accepts an hour, on the line between those at the whole numbers of them around it."""
    by_count, wanted = row["recall_by_false_accepts"], 0.5 * row["hours"]
    return float(np.interp(wanted, range(len(by_count)), by_count))


def chosen(rows: Iterable[Row], condition: str, **wanted: Any) -> list[Row]:
    """Those of one condition with all of what is wanted."""
    return [row for row in rows if row["condition"] == condition and all(row[name] == value for name, value in wanted.items())]


def pairs(first: Iterable[Row], second: Iterable[Row]) -> list[Pair]:
    """Rows of the same life in the same condition."""
    known = {(life_of(row), row["condition"]): row for row in second}
    return [(row, known[key]) for row in first if (key := (life_of(row), row["condition"])) in known]


def live(row: Row, before: Row) -> Row:
    """What goes on listening: the candidate where the gate let it through, else the version before."""
    return row if row["gate"] == "promoted" else before


def takes_heard(row: Row) -> int:
    """At the deployed threshold."""
    return round(row["deployed_recall"] * row["takes"])


def gain(row: Row, other: Row) -> float:
    """Of recall at 0.5 false accepts an hour."""
    return float(row["recall"] - other["recall"])


def strict_gain(row: Row, other: Row) -> float:
    """Of recall at the whole number of false accepts below that."""
    return float(row["recall_at_0.5"] - other["recall_at_0.5"])


def by_user(found: Iterable[Pair], value: Callable[[Row, Row], float]) -> np.ndarray:
    """One value a user, the mean over seeds."""
    users: dict[tuple[str, str], list[float]] = {}
    for first, second in found:
        users.setdefault(user_of(first), []).append(value(first, second))
    return np.array([np.mean(values) for values in users.values()])


def interval(values: np.ndarray, of: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """95 % of a statistic, drawing users again."""
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(BOOTSTRAPS, len(values)))]
    low, high = np.percentile(of(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _points(values: np.ndarray) -> str:
    (low, high), (lower, higher) = (100 * np.array(interval(values, of)) for of in (np.mean, np.median))
    mean, median = 100 * values.mean(), 100 * np.median(values)
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f}), median {median:+.1f} ({lower:+.1f} to {higher:+.1f}), {len(values)} users"


def _times(values: np.ndarray) -> str:
    low, high = interval(values, np.median)
    return f"{np.median(values):.2f}x ({low:.2f} to {high:.2f}), {len(values)} users"


def _verdict(met: bool, falls_short: str, *, sure: bool = True) -> str:
    """`sure`: the whole interval meets it too."""
    return f"**falls short**: {falls_short}" if not met else "met" if sure else "met, though not by all of its interval"


def claims(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """What it must show: (what, OnDA, asked, measured, whether it is met)."""
    rows = measured(rows)
    if not chosen(rows, "room", arm=HYBRID):
        return [("everything", "-", "-", f"no row of {HYBRID}", "not measured")]
    out = [
        *_compression(rows, "ds-cnn-l", "9.63x", 10.0),
        *_compression(rows, "resnet15", "3.33x / 1.7x", 3.5),
        *_in_int8(rows),
        *_each_pruned(rows),
    ]
    for condition in CONDITIONS:
        for group, mine in _groups(rows, condition).items():
            before, enrol_only, whole = (
                chosen(rows, condition, arm=arm, network=group[0]) for arm in ("before", "enrol-only", "weights-only")
            )
            out += _recall(group, condition, pairs(mine, before), pairs(mine, enrol_only), pairs(whole, enrol_only))
    for group, mine in _groups(rows, "room").items():
        out += _ratios(group, mine, chosen(rows, "room", arm="weights-only"))
    for condition in CONDITIONS:
        for group, mine in _groups(rows, condition).items():
            out += _harm(group, condition, pairs(mine, chosen(rows, condition, arm="before", network=group[0])))
    for arm in ("random", "scratch", "onda2-l1"):
        for condition in CONDITIONS:
            for (network, compression), mine in _groups(rows, condition).items():
                other = pairs(mine, chosen(rows, condition, arm=arm, network=network, compression=compression))
                if other:
                    gained = by_user(other, gain)
                    what = f"recall against {arm} at the same target, {condition}, {network} {compression:g}x"
                    out.append((what, "-", "reported", _points(gained), "-"))
    return out


def _groups(rows: Iterable[Row], condition: str) -> dict[tuple[str, float], list[Row]]:
    found: dict[tuple[str, float], list[Row]] = {}
    for row in chosen(rows, condition, arm=HYBRID):
        found.setdefault((row["network"], row["compression"]), []).append(row)
    return found


def _compression(rows: Sequence[Row], baseline: str, published: str, asked: float) -> list[tuple[str, str, str, str, str]]:
    """The smallest hybrid whose recall is within a point of the baseline's, weights-only; if none is, the one that comes nearest."""
    out = []
    for condition in CONDITIONS:
        what = f"parameters against weights-only {baseline} at equal recall, {condition}"
        whole = chosen(rows, condition, arm="weights-only", network=baseline)
        tried = []
        for (network, compression), mine in _groups(rows, condition).items():
            if found := pairs(mine, whole):
                lost = by_user(found, gain)
                smaller = float(np.median([b["parameters"] / a["parameters"] for a, b in found]))
                bytes_ = float(np.median([b["file_kb"] / a["file_kb"] for a, b in found]))
                strictly = by_user(found, strict_gain)
                tried.append((bool(lost.mean() >= -POINT), smaller, lost, bytes_, f"{network} {compression:g}x", strictly))
        if not tried:
            out.append((what, published, f"≥ {asked:g}x", f"no lives of {HYBRID} beside weights-only {baseline}", "not measured"))
            continue
        equal, smaller, lost, bytes_, name, strictly = max(tried, key=lambda one: (one[0], one[1] if one[0] else one[2].mean()))
        text = f"{smaller:.1f}x ({name}; {bytes_:.1f}x in bytes), recall {_points(lost)}"
        if (strictly != lost).any():
            text += f"; at the whole number of false accepts below {_points(strictly)}"
        short = "no size is within a point of recall" if not equal else f"{smaller:.1f}x"
        sure = interval(lost)[0] >= -POINT
        out.append((what, published, f"≥ {asked:g}x", text, _verdict(equal and smaller >= asked, short, sure=sure)))
    return out


def _in_int8(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Bytes of the graph against weights-only DS-CNN-L in float32, and what INT8 takes from the recall of the same candidates."""
    out = []
    for condition in CONDITIONS:
        mine = chosen(rows, condition, arm=HYBRID_INT8)
        if found := pairs(mine, chosen(rows, condition, arm="weights-only", network="ds-cnn-l")):
            lost = by_user(found, gain)
            smaller = float(np.median([b["file_kb"] / a["file_kb"] for a, b in found]))
            same = {name: mine[0][name] for name in ("network", "compression")}
            whole = pairs(mine, chosen(rows, condition, arm=HYBRID, **same))
            text = f"{smaller:.1f}x, recall {_points(lost)}"
            if whole:
                text += f"; against itself in float32 {_points(by_user(whole, gain))}"
            equal = bool(lost.mean() >= -POINT)
            verdict = _verdict(equal and smaller >= 20, f"{smaller:.1f}x" if equal else "recall", sure=interval(lost)[0] >= -POINT)
            out.append((f"bytes in INT8 against weights-only ds-cnn-l at equal recall, {condition}", "-", "goal: 20x", text, verdict))
    return out


def _each_pruned(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Each size against weights-only, of itself as OnDA compares and of DS-CNN-L; against the next larger one; and ours against another
    network that is pruned in the round too.
    """
    out = []
    for condition in CONDITIONS:
        groups = _groups(rows, condition)
        for (network, compression), mine in groups.items():
            name = f"{network} {compression:g}x"
            for other in dict.fromkeys((network, "ds-cnn-l")):
                if found := pairs(mine, chosen(rows, condition, arm="weights-only", network=other)):
                    smaller = float(np.median([b["parameters"] / a["parameters"] for a, b in found]))
                    text = f"{smaller:.1f}x fewer parameters, {_points(by_user(found, gain))}"
                    whom = "itself" if other == network else other
                    out.append((f"recall of {name} against {whom} by weights only, {condition}", "-", "reported", text, "-"))
            larger = max((size for of, size in groups if of == network and size < compression), default=0.0)
            beside = [(f"{network} {larger:g}x", groups.get((network, larger), []), mine)]
            if network != "edge":
                beside.append((name, mine, groups.get(("edge", compression), [])))
            for whom, others, ours in beside:
                if found := pairs(ours, others):
                    what = f"recall of {ours[0]['network']} {compression:g}x against {whom}, both pruned in the round, {condition}"
                    out.append((what, "-", "reported", _points(by_user(found, gain)), "-"))
    return out


def _recall(
    group: tuple[str, float], condition: str, start: Sequence[Pair], enrol_only: Sequence[Pair], unpruned: Sequence[Pair]
) -> list[tuple[str, str, str, str, str]]:
    name = f"{condition}, {group[0]} {group[1]:g}x"
    out = []

    low = [pair for pair in start if pair[1]["recall"] < LOW_START]
    what = f"recall gained where the start is below {LOW_START}, {name}"
    if low:
        values = by_user(low, gain)
        stays = by_user(low, lambda a, b: gain(live(a, b), b))
        text = f"{_points(values)}; with what the gate refused left as it was {100 * stays.mean():+.1f}"
        sure = interval(values)[0] >= 0.15
        out.append((what, "up to +19.2", "≥ +15 points", text, _verdict(values.mean() >= 0.15, f"{100 * values.mean():+.1f}", sure=sure)))
    else:
        out.append((what, "up to +19.2", "≥ +15 points", "nobody starts below", "not measured"))
    what = f"recall gained by pseudo-labels against enrolment-only, {name}"
    if enrol_only:
        values = by_user(enrol_only, gain)
        met, sure = values.mean() >= 0.05, interval(values)[0] >= 0.05
        text = _points(values) + (f"; without pruning {_points(by_user(unpruned, gain))}" if unpruned else "")
        open_ended = values[by_user(enrol_only, lambda a, b: b["recall"]) < CEILING]
        if 0 < len(open_ended) < len(values):  # whom enrolment alone leaves nothing to gain hides the others in a median
            text += f"; of those whom enrolment alone leaves below {CEILING:g} {_points(open_ended)}"
        out.append((what, "-", "≥ +5 points", text, _verdict(met, f"{100 * values.mean():+.1f}", sure=sure)))
    else:
        out.append((what, "-", "≥ +5 points", "no enrolment-only beside it", "not measured"))
    return out


def _ratios(group: tuple[str, float], mine: Sequence[Row], whole: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Of CPU time, but where wall time is said; against weights-only of the same network, and of DS-CNN-L where there is one."""
    out = []
    for other in dict.fromkeys((group[0], "ds-cnn-l")):
        found = pairs(mine, [row for row in whole if row["network"] == other])
        for what, key, published, asked in (
            ("training time per step", "train_ms_per_step", "1.52x", 2.0),
            ("whole round", "round_cpu_s", "-", 1.2),
            ("whole round, wall time", "round_s", "-", 1.2),
            ("network time per hop", "network_us_per_hop", "1.93x", 2.0),
        ):
            if not found:
                continue
            values = by_user(found, lambda a, b, key=key: b[key] / a[key])
            middle = float(np.median(values))
            out.append(
                (f"{what}, weights-only {other} over {group[0]} {group[1]:g}x", published, f"≥ {asked:g}x", _times(values))
                + (_verdict(middle >= asked, f"{middle:.2f}x", sure=interval(values, np.median)[0] >= asked),)
            )
    return out


def _harm(group: tuple[str, float], condition: str, found: Sequence[Pair]) -> list[tuple[str, str, str, str, str]]:
    name = f"{condition}, {group[0]} {group[1]:g}x"
    if not found:
        return [(f"what a round may break, {name}", "-", "-", "no version before beside it", "not measured")]
    promoted = [pair for pair in found if pair[0]["gate"] == "promoted"]
    each = [pair for a, b in promoted for pair in zip(people_of(a), people_of(b), strict=True)]
    worse = [pair for pair in each if chance_of_fall(*pair) < WORSE]
    falls = "; ".join(f"{a['user']} {b['deployed_recall']:.2f} → {a['deployed_recall']:.2f} of {a['takes']}" for a, b in worse)
    several = f", {len(each)} people" if len(each) > len(promoted) else ""
    text = f"{len(worse)} of {len(promoted)} promoted lives{several} ({len(found) - len(promoted)} refused)"
    if worse:  # so many tests find something now and then where nothing is
        least = min(chance_of_fall(*pair) for pair in worse)
        able = sum(0.5 ** takes_heard(b) <= least for _, b in each)
        by_chance = 1 - (1 - least) ** able
        text += f": {falls}; chance alone makes one of the {able} that can look as bad do so in {100 * by_chance:.0f} % of cases"
    text += f"; {sum(takes_heard(b) < TELLING for _, b in each)} of {len(each)} heard fewer than {TELLING} takes before, too few to tell"
    out = [(f"lives worse after promotion, {name}", "3 of 10", "none", text, _verdict(not worse, str(len(worse))) if promoted else "-")]
    for who, some in (("promoted", promoted), ("as before where refused", found)):
        if some:
            rates = by_user(some, lambda a, b: live(a, b)["fa_per_hour"])
            above = int((rates > 2).sum())
            low, high = interval(rates)
            text = f"{rates.mean():.2f} ({low:.2f} to {high:.2f}), highest {rates.max():.1f}, {above} of {len(rates)} users above 2"
            short = f"{rates.mean():.2f}, {above} above 2"
            what = f"false accepts an hour, deployed threshold, {who}, {name}"
            out.append((what, "median 31", "≤ 0.5, no user above 2", text, _verdict(rates.mean() <= 0.5 and not above, short)))
    few = [pair for pair in found if pair[0]["pseudo_positives"] < FEW_POSITIVES]
    if few:
        values = by_user(few, lambda a, b: live(a, b)["deployed_recall"] - b["deployed_recall"])
        harmed = sum(
            any(chance_of_fall(*one) < WORSE for one in zip(*map(people_of, pair), strict=True)) for pair in few if pair in promoted
        )
        let = sum(pair[0]["gate"] == "promoted" for pair in few)
        text = f"{let} of {len(few)} lives promoted, {harmed} worse; deployed recall {_points(values)}"
        what = f"fewer than {FEW_POSITIVES} pseudo-positives, {name}"
        out.append((what, "skipped", "helped or left, never harmed", text, _verdict(not harmed, f"{harmed} harmed")))
    return out


def arms(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each network, arm and compression."""
    lines = [["network", "arm", "compression", "users", "lives", "parameters", "file kB", "µs a hop", "ms a step", "round CPU s"]]
    lines[0] += [f"recall at 0.5 FA/h, {condition}" for condition in CONDITIONS] + ["promoted"]
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in measured(rows):
        groups.setdefault((row["network"], row["arm"], row["compression"]), []).append(row)
    for (network, arm, compression), found in sorted(groups.items()):
        room = [row for row in found if row["condition"] == "room"]

        def middle(key: str, places: int, room: Sequence[Row] = room) -> str:
            values = [row[key] for row in room if row.get(key) is not None]
            return f"{np.median(values):,.{places}f}".replace(",", " ") if values else "-"

        line = [network, arm, f"{compression:g}", str(len({user_of(row) for row in room})), str(len(room)), middle("parameters", 0)]
        line += [middle("file_kb", 0), middle("network_us_per_hop", 1), middle("train_ms_per_step", 1), middle("round_cpu_s", 1)]
        for condition in CONDITIONS:
            values = by_user([(row, row) for row in found if row["condition"] == condition], lambda a, b: a["recall"])
            line.append("{:.3f} ({:.3f} to {:.3f})".format(values.mean(), *interval(values)))
        line.append("-" if arm == "before" else str(sum(row["gate"] == "promoted" for row in room)))
        lines.append(line)
    return lines


def outcomes(rows: Sequence[Row]) -> list[list[str]]:
    """What `edgekws adapt` leaves a user with: the pruned version where the gate lets it, else one with all its weights, else, where lives
    have that arm, prototypes that moved, else as it was.
    """
    lines = [["condition", "network", "lives", "changed", "worse", "deployed recall before → after", "points, who began below 0.8"]]
    lines[0] += ["false accepts an hour before → after", "above 2 before → after", "parameters after, median"]
    found = measured(rows)
    moved = all("false_accepts_by_offset" in row for row in found)
    lines[0] += ["false accepts at a threshold_offset of -0.3, 0, 0.3"] if moved else []
    for condition in CONDITIONS:
        for network in dict.fromkeys(row["network"] for row in found):
            tried = [chosen(found, condition, network=network, arm=arm) for arm in ("before", "onda1-hap", "weights-only", "prototypes")]
            sizes = {row["compression"] for row in tried[1]}
            size = ADAPTS_TO if ADAPTS_TO in sizes else min(sizes, default=1.0)
            pruned = {life_of(row): row for row in tried[1] if row["compression"] == size}
            whole, untrained = ({life_of(row): row for row in rows} for rows in tried[2:])
            both = [row for row in tried[0] if life_of(row) in pruned and life_of(row) in whole]
            if not both:
                continue
            left = {life_of(row): live(untrained[life_of(row)], row) if life_of(row) in untrained else row for row in both}
            after = [live(pruned[life_of(row)], live(whole[life_of(row)], left[life_of(row)])) for row in both]
            lives = list(zip(after, both, strict=True))
            line = [condition, network, str(len(lives)), str(sum(a is not b for a, b in lives)), *_left(lives)]
            line.append(f"{np.median([row['parameters'] for row in after]):,.0f}".replace(",", " "))
            line += [" → ".join(_by_offset([pair[i] for pair in lives]) for i in (1, 0))] if moved else []
            lines.append(line)
    return lines


def _left(lives: Sequence[Pair]) -> list[str]:
    """Who is worse, deployed recall, the gain of who began low, false accepts and who has too many: after and before."""
    low = [pair for pair in lives if pair[1]["deployed_recall"] < LOW_START]
    gain = f"{100 * np.mean([a['deployed_recall'] - b['deployed_recall'] for a, b in low]):+.1f} ({len(low)} lives)" if low else "-"
    recall, false_accepts = ([np.mean([pair[i][key] for pair in lives]) for i in (1, 0)] for key in ("deployed_recall", "fa_per_hour"))
    above = [sum(pair[i]["fa_per_hour"] > 2 for pair in lives) for i in (1, 0)]
    each = [pair for a, b in lives for pair in zip(people_of(a), people_of(b), strict=True)]
    line = [str(sum(chance_of_fall(a, b) < WORSE for a, b in each)), f"{recall[0]:.3f} → {recall[1]:.3f}", gain]
    return [*line, f"{false_accepts[0]:.2f} → {false_accepts[1]:.2f}", f"{above[0]} → {above[1]}"]


def weeks(rows: Sequence[Row]) -> list[list[str]]:
    """What listens after each of several rounds, a week of hearing before each; beside it what the enrolment alone would make, ungated."""
    lines = [["condition", "rounds", "lives", "changed (pruned)", "worse", "deployed recall before → after", "points, who began below 0.8"]]
    lines[0] += ["false accepts an hour before → after", "above 2 before → after", "most an hour", "wakes kept (right)"]
    lines[0] += ["deployed recall over the enrolment alone"]
    later = [row for row in rows if "week" in row]
    for condition in CONDITIONS:
        before, enrol_only = (
            {(*life_of(row), row["network"]): row for row in chosen(measured(rows), condition, arm=arm)} for arm in ("before", "enrol-only")
        )
        changed: set[tuple[Any, ...]] = set()
        for week in sorted({row["week"] for row in later}):
            after = {(*life_of(row), row["network"]): row for row in chosen(later, condition, week=week)}
            changed |= {life for life, row in after.items() if row["gate"] == "promoted"}
            lives = [(row, before[life]) for life, row in after.items() if life in before]
            if not lives:
                continue
            smaller = sum(a["parameters"] < b["parameters"] for a, b in lives)
            kept, right = (sum(row[key] for row in after.values()) for key in ("pseudo_positives", "pseudo_true"))
            line = [condition, str(week), str(len(lives)), f"{len(changed & set(before))} ({smaller})", *_left(lives)]
            line += [f"{max(a['fa_per_hour'] for a, _ in lives):.1f}", f"{kept} ({right})"]
            beside = [(row, enrol_only[life]) for life, row in after.items() if life in enrol_only]
            lines.append([*line, _points(by_user(beside, lambda a, b: a["deployed_recall"] - b["deployed_recall"])) if beside else "-"])
    return lines


def _by_offset(rows: Sequence[Row]) -> str:
    lower, higher = (sum(row["false_accepts_by_offset"][offset] for row in rows) for offset in ("-0.3", "+0.3"))
    return f"{lower}, {sum(row['false_accepts'] for row in rows)}, {higher}"


def households(rows: Sequence[Row]) -> list[list[str]]:
    """The same where several live together, for each person; a guest enrolled and did not speak before the test."""
    lines = [["condition", "who", "households", "changed (pruned)", "people", "worse", "deployed recall before → after"]]
    lines[0] += ["false accepts an hour before → after", "above 2 before → after"]
    found = [row for row in measured(rows) if "takes_of" in row]
    for condition in CONDITIONS:
        before, pruned, whole = (chosen(found, condition, arm=arm) for arm in ("before", HYBRID, "weights-only"))
        after = {life_of(row): row for row in before}
        for row in [*whole, *pruned]:  # the pruned one where the gate lets it
            if life_of(row) in after:
                after[life_of(row)] = live(row, after[life_of(row)])
        for who, guests, all_of_them in (
            ("all of whom speak", False, True),
            ("with a guest", True, True),
            ("the guests of these", True, False),
        ):
            some = [(after[life_of(row)], row) for row in before if any(one["guest"] for one in people_of(row)) == guests]
            each = [pair for a, b in some for pair in zip(people_of(a), people_of(b), strict=True) if all_of_them or pair[0]["guest"]]
            if not each:
                continue
            rates, recall = (
                np.array([[one[key] for one in pair[::-1]] for pair in over]).T
                for over, key in ((some, "fa_per_hour"), (each, "deployed_recall"))
            )
            changed, smaller = sum(a is not b for a, b in some), sum(a["parameters"] < b["parameters"] for a, b in some)
            worse = sum(chance_of_fall(a, b) < WORSE for a, b in each)
            line = [condition, who, str(len(some)), f"{changed} ({smaller})", str(len(each)), str(worse)]
            line += [" → ".join(f"{values.mean():.3f}" for values in recall), " → ".join(f"{values.mean():.2f}" for values in rates)]
            lines.append([*line, " → ".join(str((values > 2).sum()) for values in rates)])
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def _at_half(rows: Sequence[Row]) -> str:
    if all("recall_by_false_accepts" in row for row in rows):
        return "on the line between the recall at the two whole numbers of false accepts in the test's hours around it"
    return "at the whole number of false accepts in the test's hours below it, which in less than two hours is none"


def report(rows: Sequence[Row]) -> str:
    """All of it as Markdown."""
    found = measured(rows)
    lives = {(*life_of(row), row["network"]) for row in found}
    refused = {(*life_of(row), row["network"]) for row in rows if "refused" in row}
    return "\n\n".join(
        [
            "# Whole lives of users in rooms",
            f"{len(lives)} lives (user, room, network) of {len({user_of(row) for row in found})} users;"
            f" keywords: {', '.join(sorted({row['keyword'] for row in found}))}."
            f" {len(refused)} lives ended at enrolment, since the recordings were refused."
            " Recall is that of the candidate, whatever the gate said, where nothing else is written. Brackets: 95 % over users."
            f" At 0.5 false accepts an hour means {_at_half(found)}.",
            "## What it must show",
            _markdown([["what", "OnDA", "asked", "measured", ""], *claims(rows)]),
            "## What `edgekws adapt` leaves",
            _markdown(outcomes(rows)),
            *([_markdown(together)] if len(together := households(rows)) > 1 else []),
            *([_markdown(later)] if len(later := weeks(rows)) > 1 else []),
            "## Each arm over all its lives",
            _markdown(arms(rows)),
            "Arms that lived other lives than their neighbours cannot be compared line by line; the table above pairs them."
            f" Who starts below {LOW_START} is told by the takes that the gain is measured on, which flatters it.",
        ]
    )


def plot(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Recall at 0.5 false accepts an hour against parameters and against CPU time of a hop, over the lives that all arms shared."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in measured(rows):
        groups.setdefault((row["network"], row["arm"], row["compression"]), []).append(row)
    shared = set.intersection(*({life_of(row) for row in found} for found in groups.values()))
    figure = new_figure(13, 9)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    networks, names = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    for (network, arm, compression), found in groups.items():
        for i, condition in enumerate(CONDITIONS):
            some = [row for row in found if row["condition"] == condition and (not shared or life_of(row) in shared)]
            recall = by_user([(row, row) for row in some], lambda a, b: a["recall"])
            low, high = interval(recall)
            for j, key in enumerate(("parameters", "network_us_per_hop")):
                x = float(np.median([row[key] for row in some]))
                panels[i, j].errorbar(
                    [x],
                    [recall.mean()],
                    [[recall.mean() - low], [high - recall.mean()]],
                    fmt="osDv^PX<>h"[names.index(arm) % 10],
                    color=f"C{networks.index(network)}",
                    capsize=2,
                    elinewidth=0.8,
                    label=f"{network} {arm}" + (f" {compression:g}x" if compression > 1 else "") if i == j == 0 else None,
                )
    for i, condition in enumerate(CONDITIONS):
        panels[i, 0].set_ylabel(f"recall at 0.5 false accepts an hour, {condition}")
        for j in range(2):
            panels[i, j].set_xscale("log")
            panels[i, j].grid(alpha=0.3, which="both")
        for name, x in PUBLISHED:
            panels[i, 0].axvline(x, color="0.5", linestyle=":", linewidth=1)
            panels[i, 0].annotate(name, (x, 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right", color="0.35")
        whole = [row["network_us_per_hop"] for row in chosen(measured(rows), condition, arm="weights-only", network="ds-cnn-l")]
        if whole:
            x = float(np.median(whole)) / PUBLISHED_CPU
            panels[i, 1].axvline(x, color="0.5", linestyle=":", linewidth=1)
            text = f"OnDA {PUBLISHED_CPU}x (CPU)"
            panels[i, 1].annotate(text, (x, 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right", color="0.35")
    panels[1, 0].set_xlabel("parameters (dotted: sizes that OnDA published at equal accuracy on HeySnips and HeySnapdragon)")
    panels[1, 1].set_xlabel("CPU time of a network step of 80 ms, µs")
    lives = f"the {len(shared)} lives that all arms shared" if shared else "all lives; no life was shared by all arms"
    figure.suptitle(f"{lives}; bars: 95 % over users", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for path in paths:
        save(figure, path)


def made_corpus(folder: Path, minutes: int = 8) -> Path:
    """Synthetic speech for the stream and for the test, and noise, as a corpus; its users are those of text-to-speech."""
    from edgekws.store import write_wav
    from edgekws.training import material

    rows = [["path", "kind", "label", "speaker", "split"]]

    def add(path: str, kind: str, label: str, split: str, samples: np.ndarray) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_wav(folder / path, material.to_int16(samples))
        rows.append([path, kind, label, "made", split])

    for i in range(2 * minutes):
        side = material.TRAIN_NEGATIVES[0] if i % 2 else "neg/test/"
        add(f"{side}{i}.wav", "negative", "", "negative", material.spoken_stream(90_000 + i, None).samples)
    rng = np.random.default_rng(43)
    for i in range(8):
        add(f"noise/{i}.wav", "noise", "made", "fold3", 2000 * material.made_noise(rng, 20 * 16_000))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def short(corpus: Path | None) -> list[Row]:
    """Two lives."""
    from edgekws.training import lives, trial

    with tempfile.TemporaryDirectory() as folder:
        where = corpus or made_corpus(Path(folder))
        found = trial.run(
            where,
            arms=("before", "enrol-only", "weights-only", HYBRID),
            compressions=(9.0,),
            keywords=None if corpus else lives.SPOKEN_KEYWORDS,
            users=2,
            say=lambda line: print(line, file=sys.stderr),
        )
        return [row for life in found for row in life]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", type=Path, metavar="FILE", help="from `edgekws bench adaptation --save`")
    parser.add_argument("--short", action="store_true", help="live two lives now instead, a few minutes")
    parser.add_argument("--corpus", type=Path, help="for --short; without one it is made of synthetic speech")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="writes NAME.md, NAME.svg and NAME.png")
    options = parser.parse_args()
    if options.short == bool(options.rows):
        parser.error("give files of rows, or --short")
    if options.short:
        rows = short(options.corpus)
    else:
        rows = [json.loads(line) for path in options.rows for line in path.read_text(encoding="utf-8").splitlines()]
    if not measured(rows):
        raise SystemExit("there is no life in these rows")
    text = report(rows)
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{options.out}.svg and .png are not drawn: {install_command('plot')}", file=sys.stderr)
        return
    plot(rows, [options.out.with_suffix(".svg"), options.out.with_suffix(".png")])


if __name__ == "__main__":
    main()
