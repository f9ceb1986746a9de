"""`edgekws report`: what a listener heard, lost, learned and cost, out of its state directory, as one page that needs nothing outside it.

`History` is what was read, `summary` what it comes to (and what `--json` prints), `page` shows both. Nothing is written to the store.
"""

from __future__ import annotations

import math
import platform
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgekws import __version__
from edgekws.errors import EdgekwsError
from edgekws.model import builtin_models, manifests
from edgekws.pictures import svg, time_axis
from edgekws.sinks import words
from edgekws.store import CLOCK_SET_S, Store
from edgekws.values import HOP_MS, Clip, Event

EVENTS, CLIPS = 100_000, 20_000  # the newest ones: read and drawn in seconds
DOTS = 2000  # in a picture, and a tenth of a rare kind: beyond that they cover each other, and a page grows by 100 bytes each
ROWS = 40  # of a table
SOME = 20  # wakes on either side, before a drift is told
DAY_S = 86_400
BINS_S = (60, 300, 900, 3600, 6 * 3600, DAY_S, 7 * DAY_S, 28 * DAY_S)  # widths of a bar, of which the first that gives at most `BINS` holds
BINS = 60
PICTURES = ("timeline", "timeline_narrow", "scores", "drift")
# What stands for a colour while a picture is drawn: the page's style has a light and a dark one for each.
COLOURS = {
    "ink": "#000001",
    "faint": "#000002",
    "wake": "#000003",
    "near": "#000004",
    "missed": "#000005",
    "wrong": "#000006",
    "ok": "#000007",
}


@dataclass(frozen=True)
class Span:
    """One run of a listener."""

    start_s: float
    end_s: float
    audio_s: float
    ended: str | None
    """"" = as asked. Else why. None: it goes on, or its end was not told."""


@dataclass(frozen=True)
class History:
    """What the store remembers, in the order it came."""

    events: Sequence[Event]
    near: Sequence[Clip]
    """What nearly woke and was kept."""
    wrong: frozenset[int]
    """Ids of wakes that the user rejected."""
    from_s: float
    to_s: float
    left_out: int
    """Events that are older than `EVENTS`."""
    unset_clock: int
    """Events from before the clock was set."""

    @property
    def wakes(self) -> list[Event]:
        return [event for event in self.events if event.kind == "wake"]

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def own(self, *kinds: str) -> list[Event]:
        """The listener's: the wake service's clients have streams of their own, and say nothing of its microphone."""
        return [event for event in self.of(*kinds) if "client" not in event.extra]


def history(store: Store, now_s: float, since_s: float = 0.0) -> History:
    """At most the newest `EVENTS` events and `CLIPS` clips since then (epoch).

    Raises:
        StoreError: the database cannot be read.
    """
    first = max(0, store.last_event() - EVENTS)
    events: list[Event] = []
    after = first
    while found := store.events(since_s=since_s, after=after, limit=10_000):
        events += found
        after = found[-1].id
    dated = [event for event in events if CLOCK_SET_S <= event.time_s <= now_s + DAY_S]
    wrong = frozenset(
        int(str(event.extra["wake"])) for event in dated if event.kind == "reject" and str(event.extra.get("wake", "")).isdigit()
    )
    from_s = max(since_s, min((event.time_s for event in dated), default=now_s))
    near = [
        clip
        for clip in store.clips(newest=CLIPS)
        if clip.keyword and clip.score < clip.threshold and from_s <= clip.time_s <= now_s + DAY_S
    ]
    to_s = max([now_s, *(event.time_s for event in dated[-1:])])
    return History(dated, near, wrong, from_s, to_s, first if not since_s else 0, len(events) - len(dated))


# What it comes to.


def summary(seen: History, store: Store, configured: Path) -> dict[str, Any]:
    """Facts for people and scripts; times are seconds since the epoch.

    configured: the directory of the model that listens where none was promoted.
    """
    spans = list(_spans(seen))
    wakes, lost_ms = seen.wakes, [_number(event.extra.get("lost_ms")) or 0.0 for event in seen.of("gap")]
    hours = sum(span.audio_s for span in spans) / 3600
    lost_s = sum(lost_ms) / 1000
    facts: dict[str, Any] = {
        "made_s": seen.to_s,
        "from_s": seen.from_s,
        "host": platform.node(),
        "edgekws": __version__,
        "events": len(seen.events),
        "older_left_out": seen.left_out,
        "unset_clock": seen.unset_clock,
        "listening": {
            **_state(seen, spans, store.listens()),
            "hours": round(hours, 3),
            "starts": len(seen.of("start")),
            "ended_untold": sum(span.ended is None for span in spans[:-1]),
            "broke": sum(bool(span.ended) for span in spans),
            "deaf": len(seen.of("deaf")),
            "gaps": len(lost_ms),
            "lost_s": round(lost_s, 2),
            "lost_share": lost_s / (hours * 3600 + lost_s) if lost_s else 0.0,
        },
        "wakes": {
            "count": len(wakes),
            "per_hour": round(len(seen.own("wake")) / hours, 3) if hours else None,
            "wrong": sum(event.id in seen.wrong for event in wakes),
            "near_misses": len(seen.near),
            "likely_missed": sum(_missed(clip) for clip in seen.near),
            "last_s": wakes[-1].time_s if wakes else None,
        },
        "keywords": _keywords(seen, store),
        "models": _models(seen, store, configured),
        "rounds": [
            {"time_s": event.time_s, "what": str(event.extra.get("what")), "model": event.model, "words": words(event)}
            for event in seen.of("round")
            if event.extra.get("what") != "started"
        ][-ROWS:],
        "energy": _energy(seen),
        "hearing": [
            {"time_s": event.time_s, "kind": event.kind, "words": words(event)} for event in seen.of("gap", "deaf", "stop", "start")
        ][-ROWS:],
    }
    facts["attention"] = list(_attention(facts, seen))
    return facts


def _spans(seen: History) -> Iterator[Span]:
    """The runs of the listener. What came before the first start is a run whose beginning is not known."""
    first: Event | None = None
    last: Event | None = None
    for event in seen.own("start", "stop", "wake", "gap", "deaf"):
        if event.kind == "start":
            if first is not None and last is not None:
                yield Span(first.time_s, last.time_s, max(0.0, last.stream_s - first.stream_s), None)
            first = last = event
        elif event.kind == "stop":
            first = first or event
            audio_s = _number(event.extra.get("audio_s"))
            audio_s = max(0.0, event.stream_s - first.stream_s) if audio_s is None or first.kind != "start" else audio_s
            yield Span(first.time_s, event.time_s, audio_s, str(event.extra.get("error", "")))
            first = last = None
        else:
            first, last = first or event, event
    if first is not None and last is not None:
        yield Span(first.time_s, last.time_s, max(0.0, last.stream_s - first.stream_s), None)


def _state(seen: History, spans: Sequence[Span], alive: bool) -> dict[str, Any]:
    """How it is now: "never" started, "stopped", "broke", "gone" without a word, "deaf", or it "listens"."""
    if not spans:
        return {"state": "never", "since_s": None, "why": ""}
    last = spans[-1]
    if last.ended is not None:
        return {"state": "broke" if last.ended else "stopped", "since_s": last.end_s, "why": last.ended}
    if seen.of("start") and not alive:
        return {"state": "gone", "since_s": last.end_s, "why": ""}
    heard = [event for event in seen.own("start", "wake", "gap", "deaf") if event.time_s >= last.start_s]
    if heard and heard[-1].kind == "deaf":
        return {"state": "deaf", "since_s": heard[-1].time_s, "why": str(heard[-1].extra.get("reason", ""))}
    return {"state": "listens", "since_s": last.start_s, "why": ""}


def _keywords(seen: History, store: Store) -> list[dict[str, Any]]:
    """By keyword and speaker: the enrolled ones, then whatever else woke."""
    enrolled = {(one.keyword, one.speaker): one for one in store.enrolments()}
    heard: dict[tuple[str, str], list[Event]] = {}
    for event in seen.wakes:
        heard.setdefault((event.keyword, event.speaker), []).append(event)
    near = Counter((clip.keyword, clip.speaker) for clip in seen.near)
    missed = Counter((clip.keyword, clip.speaker) for clip in seen.near if _missed(clip))
    rows = []
    for key in [*enrolled, *sorted(heard.keys() - enrolled.keys())][:ROWS]:
        wakes = heard.get(key, [])
        margins = [event.score - event.threshold for event in wakes]
        rows.append(
            {
                "keyword": key[0],
                "speaker": key[1],
                "enrolled": key in enrolled,
                "recordings": len(enrolled[key].takes) if key in enrolled else 0,
                "threshold": wakes[-1].threshold if wakes else None,
                "wakes": len(wakes),
                "wrong": sum(event.id in seen.wrong for event in wakes),
                "near_misses": near[key],
                "likely_missed": missed[key],
                "last_s": wakes[-1].time_s if wakes else None,
                "margin": _median(margins),
                "drift": _drift(margins),
            }
        )
    return rows


def _missed(clip: Clip) -> bool:
    """Whether a second opinion, or a person, says that this near miss was the keyword."""
    return clip.label != "negative" and clip.state in ("admitted", "confirmed")


def _median(values: Sequence[float]) -> dict[str, Any] | None:
    """With its interval of 95 %, by order statistics; None where there is no value."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    lowest = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return {"median": round(middle, 3), "low": round(ordered[lowest], 3), "high": round(ordered[n - 1 - lowest], 3), "n": n}


def _drift(margins: Sequence[float]) -> dict[str, Any] | None:
    """The last quarter of the wakes against those before; None where there are too few. It moved where the intervals do not meet."""
    new = max(SOME, len(margins) // 4)
    before, now = _median(margins[:-new]), _median(margins[-new:])
    if before is None or now is None or before["n"] < SOME:
        return None
    moved = "down" if now["high"] < before["low"] else "up" if now["low"] > before["high"] else ""
    return {"before": before, "now": now, "moved": moved}


def _models(seen: History, store: Store, configured: Path) -> list[dict[str, Any]]:
    """The versions that listened, that are here to listen, and what these came from; the eldest first."""
    folders = {**builtin_models(), configured.name: configured, **store.models()}
    known = manifests(folders.values())
    current, previous = store.current_model() or configured, store.previous_model()
    wanted = [id for id, (path, _) in known.items() if path in (current, previous, configured) or path in store.models().values()]
    hours, wakes, wrong = _by_model(seen)
    wanted += [id for id in hours if id not in wanted]
    for id in wanted:  # grows while it is walked through
        parent = str(known[id][1].get("parent") or "") if id in known else ""
        if parent and parent not in wanted:
            wanted.append(parent)
    rows = []
    for id in wanted[:ROWS]:
        path, raw = known.get(id, (None, {}))
        file = path / ("model_int8.onnx" if raw.get("precision") == "int8" else "model.onnx") if path else None
        cost = _dict(raw.get("cost"))
        held_out = _dict(_dict(raw.get("metrics")).get("held_out"))
        rows.append(
            {
                "id": id,
                "here": path is not None,
                "listens": path == current if path else False,
                "previous": path is not None and path == previous,
                "parent": str(raw.get("parent") or ""),
                "network": str(raw.get("network") or ""),
                "recipe": _recipe(raw.get("recipe")),
                "created_s": _number(raw.get("created_s")),
                "parameters": _number(raw.get("parameters")),
                "file_kb": round(file.stat().st_size / 1000) if file and file.exists() else None,
                "held_out": _held_out(held_out.get("new")),
                "held_out_before": _held_out(held_out.get("old")),
                "cpu_us_per_hop": _number(cost.get("cpu_us_per_hop")),
                "cpu_us_per_hop_before": _number(cost.get("cpu_us_per_hop_before")),
                "round_s": _number(cost.get("round_s")),
                "energy_j": _number(cost.get("energy_j")),
                "gate": [str(one) for one in reasons] if isinstance(reasons := _dict(raw.get("gate")).get("reasons"), list) else None,
                "hours": round(hours.get(id, 0.0), 3),
                "wakes": wakes[id],
                "wrong": wrong[id],
            }
        )
    return sorted(rows, key=lambda row: (row["created_s"] or 0.0, row["parent"] != "", str(row["id"])))


def _by_model(seen: History) -> tuple[dict[str, float], Counter[str], Counter[str]]:
    """Hours of audio, wakes, and wrong wakes of each version."""
    hours: dict[str, float] = {}
    listens, at_s, time_s = "", 0.0, 0.0
    for event in seen.own("start", "stop", "wake", "gap", "deaf", "model"):
        if event.kind == "model" and event.extra.get("what") != "live":
            continue
        if event.kind != "start" and listens:  # no audio lasts longer than it took: else two listeners wrote in turns
            step_s = min(event.stream_s - at_s, event.time_s - time_s)
            hours[listens] = hours.get(listens, 0.0) + max(0.0, step_s) / 3600
        listens, at_s, time_s = "" if event.kind == "stop" else event.model, event.stream_s, event.time_s
        if event.model:
            hours.setdefault(event.model, 0.0)
    wakes = seen.own("wake")
    return hours, Counter(event.model for event in wakes), Counter(event.model for event in wakes if event.id in seen.wrong)


def _held_out(part: object) -> dict[str, Any] | None:
    """What a gate found on sound that was held out, all kinds of it together."""
    counts = [(_number(one.get("heard")), _number(one.get("of"))) for one in map(_dict, _dict(_dict(part).get("recall")).values())]
    heard, of = (sum(one[i] or 0 for one in counts) for i in (0, 1))
    if not of:
        return None
    return {
        "heard": int(heard),
        "of": int(of),
        "false_accepts": _number(_dict(part).get("false_accepts")),
        "hours": _number(_dict(part).get("hours")),
    }


def _recipe(value: object) -> str:
    """Of an adapted version its name and criterion; a factory network's says more than a cell can hold."""
    recipe = _dict(value)
    return " ".join(str(recipe[name]) for name in ("name", "criterion") if recipe.get(name))


def _energy(seen: History) -> list[dict[str, Any]]:
    """What `edgekws bench` measured last, by model and engine."""
    newest = {(event.model, str(event.extra.get("backend"))): event for event in seen.of("bench")}
    return [
        {
            "time_s": event.time_s,
            "model": model,
            "engine": engine,
            "mj_per_hop": _number(event.extra.get("energy_mj_per_hop")),
            "why_none": str(event.extra.get("why_no_energy") or ""),
            "cpu_s_per_audio_hour": _number(event.extra.get("cpu_s_per_audio_hour")),
            "p99_ms": _number(event.extra.get("p99_ms")),
            "rss_mb": _number(event.extra.get("rss_mb")),
        }
        for (model, engine), event in newest.items()
    ]


def _attention(facts: dict[str, Any], seen: History) -> Iterator[dict[str, str]]:
    """What somebody should look at, and what to do; the worst first. Nothing = it is well."""
    heard = facts["listening"]

    def one(level: str, text: str, todo: str) -> dict[str, str]:
        return {"level": level, "text": text, "todo": todo}

    if heard["state"] == "deaf":
        yield one("bad", f"Deaf since {_when(heard['since_s'])}: {heard['why']}", "edgekws doctor")
    if heard["state"] == "gone":
        text = f"Not listening: after {_when(heard['since_s'])} it ended without a word: killed, crashed, or the power went"
        yield one("bad", text, "systemctl status edgekws")
    if heard["state"] == "broke":
        yield one("bad", f"Ended by an error at {_when(heard['since_s'])}: {heard['why']}", "journalctl -u edgekws")
    if heard["state"] == "stopped":
        yield one("warn", f"Not listening: it was ended at {_when(heard['since_s'])}", "systemctl start edgekws")
    if heard["state"] == "never":
        yield one("warn", "It has never listened with this state directory", "edgekws run")
    if heard["ended_untold"]:
        count = heard["ended_untold"]
        yield one(
            "warn", f"{count} of {heard['starts']} runs ended without a word: killed, crashed, or the power went", "journalctl -u edgekws"
        )
    if heard["lost_share"] > 0.001:
        text = f"{heard['lost_s']:.1f} s of audio were lost in {heard['gaps']} gaps, {heard['lost_share']:.2%} of all"
        yield one("warn", text, "edgekws doctor")
    for event in seen.of("model"):
        if event.extra.get("what") in ("rolled back", "refused") and event.time_s > seen.to_s - 7 * DAY_S:
            yield one("warn", f"{_when(event.time_s)} {words(event)}", "edgekws models list")
    if facts["rounds"] and facts["rounds"][-1]["what"] in ("failed", "cut short"):
        yield one("warn", f"{_when(facts['rounds'][-1]['time_s'])} {facts['rounds'][-1]['words']}", "edgekws adapt")
    # What an earlier version missed is what the one that listens learned from.
    begun_s = max([0.0, *(time_s for time_s, _ in _changes(seen))])
    woke = [event for event in seen.wakes if event.time_s >= begun_s]
    wrong = sum(event.id in seen.wrong for event in woke)
    missed = sum(_missed(clip) and clip.time_s >= begun_s for clip in seen.near)
    if wrong >= 3 and wrong > 0.1 * len(woke):
        text = f"{wrong} of the {len(woke)} wakes of the version that listens were marked as wrong"
        yield one("warn", text, "edgekws adapt learns from them; a higher threshold_offset wakes less")
    if missed >= 3 and missed > 0.2 * len(woke):
        text = f"{missed} near misses of the version that listens were the keyword, two networks say, and it woke {len(woke)} times"
        yield one("warn", text, "edgekws adapt learns from them; a lower threshold_offset wakes more")
    for row in facts["keywords"]:
        if row["drift"] and row["drift"]["moved"] == "down":
            now, before = row["drift"]["now"], row["drift"]["before"]
            who = f"{row['keyword']} ({row['speaker']})" if row["speaker"] else row["keyword"]
            text = (
                f"Scores of {who} fell: the last {now['n']} wakes {now['median']:+.2f} from the threshold, before {before['median']:+.2f}"
            )
            yield one("warn", text, "edgekws watch shows level and scores")


# The page.


def page(facts: dict[str, Any], seen: History) -> str:
    """HTML, with its style and pictures in it. Whatever comes from users, recordings or files is escaped.

    Where pictures cannot be drawn the page says so, and has all the rest.
    """
    import jinja2

    no_pictures = ""
    try:
        pictures = _pictures(seen)
    except EdgekwsError as error:
        pictures, no_pictures = dict.fromkeys(PICTURES, ""), str(error)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("edgekws", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters["when"] = _when
    environment.filters["short"] = _short
    return environment.get_template("report.html").render(**facts, pictures=pictures, no_pictures=no_pictures, hop_ms=HOP_MS, dots=DOTS)


def _pictures(seen: History) -> dict[str, str]:
    """SVG by name; "" where there is nothing to draw."""
    found = dict.fromkeys(PICTURES, "")

    def add(name: str, size: tuple[int, int], text: str, draw: Callable[[Any], None]) -> None:
        found[name] = svg(name, text, size, COLOURS, draw)

    if seen.wakes or seen.near or seen.of("start"):
        text = f"{len(seen.wakes)} wakes and {len(seen.near)} near misses over time, by their distance from the threshold;"
        text += " the wakes in each stretch of time; and when it listened"
        spans = list(_spans(seen))
        add("timeline", (1040, 420), text, partial(_draw_time, seen=seen, spans=spans, narrow=False))
        add("timeline_narrow", (360, 440), text, partial(_draw_time, seen=seen, spans=spans, narrow=True))
    if seen.wakes or seen.near:
        text = "Histogram of how far wakes and near misses were from the threshold"
        add("scores", (420, 260), text, partial(_draw_scores, seen=seen))
    if len(seen.wakes) >= 2:
        text = "Median distance of the wakes from the threshold over time, and their middle half"
        add("drift", (420, 260), text, partial(_draw_drift, seen=seen))
    return found


def _draw_time(figure: Any, seen: History, spans: Sequence[Span], narrow: bool) -> None:
    dots, bars, strip = figure.subplots(3, 1, sharex=True, height_ratios=(6, 3, 0.5))
    wakes = seen.wakes
    kinds: tuple[tuple[str, str, float, list[tuple[float, float]]], ...] = (
        ("near", "_", 6, [(one.time_s, one.score - one.threshold) for one in seen.near if not _missed(one)]),
        ("missed", "^", 5, [(one.time_s, one.score - one.threshold) for one in seen.near if _missed(one)]),
        ("wake", "o", 4, [(one.time_s, one.score - one.threshold) for one in wakes if one.id not in seen.wrong]),
        ("wrong", "X", 7, [(one.time_s, one.score - one.threshold) for one in wakes if one.id in seen.wrong]),
    )
    edges = _bins(seen.from_s, seen.to_s)
    at = [_local(edge) for edge in edges]
    widths = [(end - begin) * 0.86 for begin, end in pairwise(at)]
    below = [0] * len(widths)
    for name, marker, size, points in kinds:
        share = len(points) / max(1, sum(len(others) for *_, others in kinds))
        some = _some(points, max(DOTS // 10, round(share * DOTS / (3 if narrow else 1))))
        dots.plot(
            [_local(time_s) for time_s, _ in some], [margin for _, margin in some], marker, color=COLOURS[name], markersize=size, alpha=0.75
        )
        if name in ("wake", "wrong"):
            counts = Counter(bisect_right(edges, time_s) - 1 for time_s, _ in points)
            heights = [counts[i] for i in range(len(widths))]
            bars.bar(at[:-1], heights, widths, below, color=COLOURS[name], align="edge")
            below = [one + more for one, more in zip(below, heights, strict=True)]
    dots.axhline(0, color=COLOURS["ink"], linewidth=1)
    dots.set_ylabel("above threshold")
    dots.grid(axis="y", linewidth=0.6)
    changes = _changes(seen)
    for time_s, model in changes:
        dots.axvline(_local(time_s), color=COLOURS["ok"], linewidth=1.2, linestyle=(0, (4, 3)))
        if len(changes) <= (3 if narrow else 8):
            dots.annotate(model[:20], (_local(time_s), 1.01), xycoords=("data", "axes fraction"), color=COLOURS["ok"], fontsize=11)
    bars.set_ylabel(f"wakes\na {_width(edges[1] - edges[0])}")
    bars.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    runs = [(_local(begin), _local(end) - _local(begin)) for begin, end in _runs(spans, seen)]
    strip.broken_barh(runs, (0, 1), color=COLOURS["ok"], alpha=0.45)
    for event in _some(seen.of("gap", "deaf")):
        strip.axvline(_local(event.time_s), color=COLOURS["wrong"], linewidth=2)
    strip.set_ylim(0, 1)
    strip.set_yticks([0.5], ["listened" if not narrow else "on"])
    strip.tick_params(left=False)
    strip.spines[["left"]].set_visible(False)
    time_axis(strip, 5 if narrow else 10)
    strip.set_xlim(at[0], at[-1])
    figure.align_ylabels()


def _draw_scores(figure: Any, seen: History) -> None:
    panel = figure.subplots()
    wakes = [one.score - one.threshold for one in seen.wakes if one.id not in seen.wrong]
    wrong = [one.score - one.threshold for one in seen.wakes if one.id in seen.wrong]
    near = [one.score - one.threshold for one in seen.near]
    low, high = max(-3.0, min([*near, 0.0])), min(8.0, max([*wakes, *wrong, 1.0]))
    step = 0.25
    edges = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    inside = [[min(max(one, edges[0]), edges[-1]) for one in values] for values in (near, wakes, wrong)]
    panel.hist(inside, edges, stacked=True, color=[COLOURS[name] for name in ("near", "wake", "wrong")], rwidth=0.9)
    panel.axvline(0, color=COLOURS["ink"], linewidth=1)
    panel.annotate("threshold", (0, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=11)
    panel.set_xlabel("above threshold: +1 is ten times rarer by chance")
    panel.set_ylabel("how many")
    panel.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    panel.grid(axis="y", linewidth=0.6)
    panel.set_axisbelow(True)


def _draw_drift(figure: Any, seen: History) -> None:
    """Each point is a twelfth of the wakes, so that each is as sure as the others."""
    panel = figure.subplots()
    wakes = sorted(seen.wakes, key=lambda one: one.time_s)
    size = max(5, math.ceil(len(wakes) / 12))
    groups = [wakes[i : i + size] for i in range(0, len(wakes), size)]
    if len(groups) > 1 and len(groups[-1]) < size / 2:
        groups[-2:] = [groups[-2] + groups[-1]]
    times, rows = [], []
    for group in groups:
        margins = sorted(one.score - one.threshold for one in group)
        times.append(_local(group[len(group) // 2].time_s))
        rows.append([margins[min(len(margins) - 1, int(share * len(margins)))] for share in (0.25, 0.5, 0.75)])
    lows, medians, highs = zip(*rows, strict=True)
    panel.vlines(times, lows, highs, color=COLOURS["wake"], linewidth=5, alpha=0.3)
    panel.plot(times, medians, "o-", color=COLOURS["wake"], markersize=5)
    panel.axhline(0, color=COLOURS["ink"], linewidth=1)
    for time_s, _ in _changes(seen):
        panel.axvline(_local(time_s), color=COLOURS["ok"], linewidth=1.2, linestyle=(0, (4, 3)))
    panel.set_ylim(bottom=min(-0.2, min(lows)), top=max(1.0, max(highs)) * 1.1)
    panel.set_xlim(_local(seen.from_s), _local(seen.to_s))
    panel.set_ylabel("above threshold")
    panel.grid(axis="y", linewidth=0.6)
    time_axis(panel, 6)


def _changes(seen: History) -> list[tuple[float, str]]:
    """When another version began to listen."""
    found: list[tuple[float, str]] = []
    for event in seen.own("start", "wake", "model"):
        if event.kind == "model" and event.extra.get("what") != "live":
            continue
        if not found or found[-1][1] != event.model:
            found.append((event.time_s, event.model))
    return found[1:][-ROWS:]


def _runs(spans: Sequence[Span], seen: History) -> list[tuple[float, float]]:
    """Begin and end of each, wide enough to be seen; what cannot be told apart is one. The last goes on, for all one knows."""
    least_s = (seen.to_s - seen.from_s) / 500
    found: list[tuple[float, float]] = []
    for span in spans:
        end_s = seen.to_s if span.ended is None and span is spans[-1] else span.end_s
        begin_s, end_s = span.start_s, max(end_s, span.start_s + least_s)
        if found and begin_s - found[-1][1] < least_s:
            begin_s, end_s = found[-1][0], max(end_s, found.pop()[1])
        found.append((begin_s, end_s))
    return found


def _bins(from_s: float, to_s: float) -> list[float]:
    """Edges of bars that begin at a whole minute, hour or day here."""
    span_s = max(60.0, to_s - from_s)
    width_s = next((one for one in BINS_S if span_s / one <= BINS), span_s / BINS)
    offset_s = datetime.fromtimestamp(from_s).astimezone().utcoffset() or timedelta()
    first = math.floor((from_s + offset_s.total_seconds()) / width_s) * width_s - offset_s.total_seconds()
    return [first + i * width_s for i in range(math.floor((from_s + span_s - first) / width_s) + 2)]


def _width(width_s: float) -> str:
    names = {60: "minute", 300: "5 minutes", 900: "15 minutes", 3600: "hour", 6 * 3600: "6 hours", DAY_S: "day", 7 * DAY_S: "week"}
    return names.get(round(width_s), f"{width_s / DAY_S:.0f} days")


def _some(found: Sequence[Any], most: int = DOTS) -> list[Any]:
    """At most so many, evenly taken."""
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else list(found)


def _local(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s)


def _when(time_s: float | None) -> str:
    return "never" if time_s is None else f"{_local(time_s):%Y-%m-%d %H:%M}"


def _short(value: float | None, digits: int = 3) -> str:
    """A number for a cell."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.{digits}g}"


def _number(value: object) -> float | None:
    """What a manifest or an event has for a number, if it is one."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
