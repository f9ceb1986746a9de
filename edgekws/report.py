"""`edgekws report`: what a listener heard, lost, learned and cost, out of its state directory, as one page that needs nothing outside it.

`History` is what was read, `summary` what it comes to (and what `--json` prints), `page` shows both. Nothing is written to the store.
"""

from __future__ import annotations

import math
import platform
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from edgekws.store import CLOCK_SET_S, DAY_S, Store
from edgekws.values import HOP_MS, Clip, Event

EVENTS, CLIPS = 100_000, 20_000  # the newest ones: read and drawn in seconds
DOTS = 2000  # in a picture, and a tenth of a rare kind: beyond that they cover each other, and a page grows by 100 bytes each
ROWS = 40  # of a table
SOME = 20  # wakes on either side, before a drift is told
UNITS = (Path("/etc/systemd/system"), Path("/usr/local/lib/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
LEAST = 6  # values, of which the least and the most hold the median in 95 of 100 cases
LISTENER = ("start", "stop", "wake", "gap", "deaf", "model")  # kinds of events that say what it was at
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
    earlier: Sequence[Event] = ()
    """The listener's last run before these, where only those since a moment are asked for."""

    @property
    def wakes(self) -> list[Event]:
        return [event for event in self.events if event.kind == "wake"]

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def own(self, *kinds: str) -> list[Event]:
        """The listener's: the wake service's clients have streams of their own, and say nothing of its microphone."""
        return [event for event in self.of(*kinds) if "client" not in event.extra]

    def runs(self) -> list[list[Event]]:
        """The listener's events, by run: see `_runs_of`. One that began earlier is looked at from `from_s` on."""
        begin = [replace(event, time_s=self.from_s) for event in self.earlier[-1:] if event.kind != "stop"]
        return _runs_of([*begin, *self.own(*LISTENER)])

    def began_earlier(self, run: Sequence[Event]) -> bool:
        return bool(self.earlier) and run[0].id == self.earlier[-1].id

    def begins(self, run: Sequence[Event]) -> bool:
        """Whether its start is kept; else it may be many runs: starts and stops are forgotten before wakes are. One may wait for its
        microphone before its start."""
        first = self.earlier[0] if self.began_earlier(run) else run[0]
        return first.kind == "start" or (first.kind == "deaf" and not first.stream_s)


def history(store: Store, now_s: float, since_s: float = 0.0) -> History:
    """At most the newest `EVENTS` events and `CLIPS` clips since then (epoch).

    Raises:
        StoreError: the database cannot be read.
    """
    first = max(0, store.last_event() - EVENTS)
    events: list[Event] = []
    before: list[Event] = []
    after, oldest_s = first, now_s
    while found := store.events(after=after, limit=10_000):
        for event in found:
            if event.time_s >= since_s:
                events.append(event)
            elif not events and event.kind in LISTENER and "client" not in event.extra and event.time_s >= CLOCK_SET_S:
                before.append(event)
        oldest_s = found[0].time_s if after == first else oldest_s
        after = found[-1].id
    dated = [event for event in events if CLOCK_SET_S <= event.time_s <= now_s + DAY_S]
    earlier = (_runs_of(before) or [[]])[-1]
    wrong = frozenset(
        int(str(event.extra["wake"])) for event in dated if event.kind == "reject" and str(event.extra.get("wake", "")).isdigit()
    )
    from_s = since_s if earlier else max(since_s, min((event.time_s for event in dated), default=now_s))
    near = [
        clip
        for clip in store.clips(newest=CLIPS)
        if clip.keyword and clip.score < clip.threshold and from_s <= clip.time_s <= now_s + DAY_S
    ]
    to_s = max([now_s, *(event.time_s for event in dated[-1:])])
    return History(dated, near, wrong, from_s, to_s, first if oldest_s >= since_s else 0, len(events) - len(dated), earlier)


def _runs_of(events: Sequence[Event]) -> list[list[Event]]:
    """By run of the listener; the last one may go on. What came before the first start is a run whose beginning is not known.

    By the order that they came in: a clock may be set back. What listeners to files tell is marked and stands between the others' events;
    such a run that was killed beside another is left out.
    """
    own = _one_by_one([event for event in events if "file" not in event.extra])
    files = [
        run
        for run in _one_by_one([event for event in events if "file" in event.extra])
        if run[-1].kind == "stop" or not any(other[0].id < run[0].id < other[-1].id for other in own)
    ]
    goes_on = [own.pop()] if own and own[-1][-1].kind != "stop" else []
    return [*sorted([*own, *files], key=lambda run: run[-1].id), *goes_on]


def _one_by_one(events: Sequence[Event]) -> list[list[Event]]:
    runs: list[list[Event]] = []
    run: list[Event] = []
    beside: list[Event] = []  # of a file that is listened to beside a microphone, in a log of before these were marked
    for event in events:
        if event.kind == "model" and event.extra.get("what") != "live":
            continue
        if event.kind == "start" and _is_file(event) and run and not _is_file(run[0]) and "before" not in event.extra:
            beside = [event]
        elif beside and event.kind in ("wake", "stop"):
            beside.append(event)
            if event.kind == "stop":
                runs.append(beside)
                beside = []
        elif event.kind == "start" or (event.kind == "deaf" and run and event.stream_s < run[-1].stream_s):
            if not all(one.kind == "deaf" and not one.stream_s for one in run):  # else it waited for its microphone
                runs.append(run)
            run, beside = [event], []
        else:
            run.append(event)
            if event.kind == "stop":
                runs.append(run)
                run = []
    return [*runs, run] if run else runs


def _is_file(event: Event) -> bool:
    source = str(event.extra.get("source", ""))
    return bool(source) and not source.startswith(("mic:", "stdin:"))  # a path alone is a file too


def _heard(seen: History, run: Sequence[Event]) -> list[tuple[str, float]]:
    """The version that listened, and seconds of audio, between each event of a run and the next. A place in the stream counts what gaps
    took."""
    first, last = run[0], run[-1]
    whole = first.kind == "start" and last.kind == "stop" and not seen.began_earlier(run)  # as what a stop tells is of
    told_s = _number(last.extra.get("audio_s")) if whole else None
    steps = []
    for before, event in pairwise(run):
        step_s = event.stream_s - before.stream_s
        if told_s is None:  # No audio lasts longer than it took: else two listeners wrote in turns.
            step_s = min(step_s, event.time_s - before.time_s)
        steps.append((before.model, max(0.0, step_s - _lost_s(event))))
    all_s = sum(step_s for _, step_s in steps)
    share = max(0.0, told_s) / all_s if told_s is not None and all_s else 1.0
    return [(model, step_s * share) for model, step_s in steps]


def _lost_s(event: Event) -> float:
    return (_number(event.extra.get("lost_ms")) or 0.0) / 1000 if event.kind == "gap" else 0.0


# What it comes to.


def summary(seen: History, store: Store, configured: Path) -> dict[str, Any]:
    """Facts for people and scripts; times are seconds since the epoch.

    configured: the directory of the model that listens where none was promoted.
    """
    runs = seen.runs()
    state = _state(seen, runs, store.listens())
    spans = list(_spans(seen, runs))
    begun = [(run, span) for run, span in zip(runs, spans, strict=True) if seen.begins(run)]
    untold = [span for _, span in begun if span.ended is None and (span is not spans[-1] or state["state"] == "gone")]
    # A listener has nothing to tell for hours, and hears them all the same.
    goes_on = state["state"] == "listens" and bool(runs) and runs[-1][-1].kind != "stop"
    since_last_s = max(0.0, seen.to_s - runs[-1][-1].time_s) if goes_on else 0.0
    # One with a reason took nothing: a microphone was unmuted.
    wakes, gaps = seen.wakes, [event for event in seen.of("gap") if "reason" not in event.extra]
    hours = (sum(span.audio_s for span in spans) + since_last_s) / 3600
    begun_s = sum(span.audio_s for _, span in begun) + (since_last_s if runs and seen.begins(runs[-1]) else 0.0)
    begun_wakes = sum(event.kind == "wake" for run, _ in begun for event in run[1:])
    lost_s = sum(map(_lost_s, gaps), 0.0)
    facts: dict[str, Any] = {
        "made_s": seen.to_s,
        "from_s": seen.from_s,
        "host": platform.node(),
        "edgekws": __version__,
        "events": len(seen.events),
        "older_left_out": seen.left_out,
        "unset_clock": seen.unset_clock,
        "listening": {
            **state,
            "hours": round(hours, 3),
            "starts": len(begun),
            "ended_untold": len(untold),
            "broke": sum(bool(span.ended) for span in spans),
            "deaf": len(seen.of("deaf")),
            "gaps": len(gaps),
            "lost_s": round(lost_s, 2),
            "lost_share": lost_s / (hours * 3600 + lost_s) if lost_s else 0.0,
        },
        "wakes": {
            "count": len(wakes),
            "per_hour": float(f"{begun_wakes / begun_s * 3600:.3g}") if begun_s else None,
            "wrong": sum(event.id in seen.wrong for event in wakes),
            "near_misses": len(seen.near),
            "likely_missed": sum(_missed(clip) for clip in seen.near),
            "last_s": wakes[-1].time_s if wakes else None,
        },
        "keywords": _keywords(seen, store),
        "models": _models(seen, store, configured, _hours(seen, runs, since_last_s)),
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


def _spans(seen: History, runs: Sequence[Sequence[Event]]) -> Iterator[Span]:
    for run in runs:
        first, last = run[0], run[-1]
        ended = str(last.extra.get("error", "")) if last.kind == "stop" else None
        yield Span(first.time_s, last.time_s, sum(step_s for _, step_s in _heard(seen, run)), ended)


def _state(seen: History, runs: Sequence[Sequence[Event]], alive: bool) -> dict[str, Any]:
    """How it is now: "never" started, "stopped", "broke", "gone" without a word, "deaf", or it "listens"."""
    run = runs[-1] if runs else []
    if not run or seen.began_earlier(run):
        run = [*seen.earlier, *run[1:]]
    if alive:
        told = [event for event in run if event.kind != "model"][-1:]
        if told and told[0].kind == "deaf":
            return {"state": "deaf", "since_s": told[0].time_s, "why": str(told[0].extra.get("reason", ""))}
        return {"state": "listens", "since_s": run[0].time_s if run else seen.from_s, "why": ""}
    if not run:
        return {"state": "never", "since_s": None, "why": ""}
    last = run[-1]
    if last.kind != "stop":
        return {"state": "gone", "since_s": last.time_s, "why": ""}
    error = str(last.extra.get("error", ""))
    return {"state": "broke" if error else "stopped", "since_s": last.time_s, "why": error}


def _keywords(seen: History, store: Store) -> list[dict[str, Any]]:
    """By keyword and speaker: the enrolled ones, then whatever else woke, or nearly did."""
    enrolled = {(one.keyword, one.speaker): one for one in store.enrolments()}
    heard: dict[tuple[str, str], list[Event]] = {}
    for event in seen.wakes:
        heard.setdefault((event.keyword, event.speaker), []).append(event)
    near = Counter((clip.keyword, clip.speaker) for clip in seen.near)
    missed = Counter((clip.keyword, clip.speaker) for clip in seen.near if _missed(clip))
    told = [event for event in seen.own(*LISTENER) if event.kind != "model" or event.extra.get("what") == "live"]
    listens = [event.model for event in told or seen.wakes][-1:]
    rows = []
    for key in [*enrolled, *sorted((heard.keys() | near.keys()) - enrolled.keys())][:ROWS]:
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
                # Of the version that listens: another's scores and thresholds are others, and how far apart says nothing of the voice.
                "drift": _drift([event.score - event.threshold for event in wakes if event.model in listens]),
            }
        )
    return rows


def _missed(clip: Clip) -> bool:
    """Whether a second opinion, or a person, says that this near miss was the keyword."""
    return clip.label != "negative" and clip.state in ("admitted", "confirmed")


def _median(values: Sequence[float]) -> dict[str, Any] | None:
    """With its interval of 95 %, by order statistics, where there are enough values for one; None where there is no value."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    lowest = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    low, high = (round(ordered[lowest], 3), round(ordered[n - 1 - lowest], 3)) if n >= LEAST else (None, None)
    return {"median": round(middle, 3), "low": low, "high": high, "n": n}


def _drift(margins: Sequence[float]) -> dict[str, Any] | None:
    """The last quarter of the wakes against those before; None where there are too few. It moved where the intervals do not meet."""
    new = max(SOME, len(margins) // 4)
    before, now = _median(margins[:-new]), _median(margins[-new:])
    if before is None or now is None or before["n"] < SOME:
        return None
    moved = "down" if now["high"] < before["low"] else "up" if now["low"] > before["high"] else ""
    return {"before": before, "now": now, "moved": moved}


def _models(seen: History, store: Store, configured: Path, hours: Mapping[str, float]) -> list[dict[str, Any]]:
    """The versions that listened, that are here to listen, and what these came from; the eldest first."""
    folders = {**builtin_models(), configured.name: configured, **store.models()}
    known = manifests(folders.values())
    current, previous = store.current_model() or configured, store.previous_model()
    wanted = [id for id, (path, _) in known.items() if path in (current, previous, configured) or path in store.models().values()]
    wakes = Counter(event.model for event in seen.own("wake"))
    wrong = Counter(event.model for event in seen.own("wake") if event.id in seen.wrong)
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


def _hours(seen: History, runs: Sequence[Sequence[Event]], since_last_s: float) -> dict[str, float]:
    """Hours of audio of each version that listened."""
    hours = {event.model: 0.0 for run in runs for event in run if event.model}
    for model, step_s in [*(step for run in runs for step in _heard(seen, run)), *((run[-1].model, since_last_s) for run in runs[-1:])]:
        if model:
            hours[model] += step_s / 3600
    return hours


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
    """What `edgekws bench` measured last, by model and engine; the newest at the end."""
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
        for (model, engine), event in sorted(newest.items(), key=lambda item: item[1].time_s)
    ]


def _attention(facts: dict[str, Any], seen: History) -> Iterator[dict[str, str]]:
    """What somebody should look at, and what to do; the worst first. Nothing = it is well."""
    heard = facts["listening"]
    by_systemd = any((folder / "edgekws.service").exists() for folder in UNITS)
    start, journal = ("systemctl start edgekws", "journalctl -u edgekws") if by_systemd else ("edgekws run", "edgekws run")

    def one(level: str, text: str, todo: str) -> dict[str, str]:
        return {"level": level, "text": text, "todo": todo}

    if heard["state"] == "deaf":
        yield one("bad", f"Deaf since {_when(heard['since_s'])}: {heard['why']}", "edgekws doctor")
    if heard["state"] == "gone":
        text = f"Not listening: after {_when(heard['since_s'])} it ended without a word: killed, crashed, or the power went"
        yield one("bad", text, "systemctl status edgekws" if by_systemd else start)
    if heard["state"] == "broke":
        yield one("bad", f"Ended by an error at {_when(heard['since_s'])}: {heard['why']}", journal)
    if heard["state"] == "stopped":
        yield one("warn", f"Not listening: it was ended at {_when(heard['since_s'])}", start)
    if heard["state"] == "never":
        yield one("warn", "It has never listened with this state directory", "edgekws run")
    if heard["ended_untold"] > (heard["state"] == "gone"):  # that one is told above
        count = heard["ended_untold"]
        text = f"{count} of {heard['starts']} runs ended without a word: killed, crashed, or the power went"
        yield one("warn", text, journal if by_systemd else "edgekws log --kind start stop")
    if heard["lost_share"] > 0.001:
        text = f"{heard['lost_s']:.1f} s of audio were lost in {heard['gaps']} gaps, {heard['lost_share']:.2%} of all"
        yield one("warn", text, "edgekws doctor")
    for event in seen.of("model"):
        asked = event.extra.get("reason") == "by hand"
        if event.extra.get("what") in ("rolled back", "refused") and not asked and event.time_s > seen.to_s - 7 * DAY_S:
            yield one("warn", f"{_when(event.time_s)} {words(event)}", "edgekws models list")
    for event in [event for event in seen.of("round") if event.extra.get("what") not in ("started", "skipped")][-1:]:
        if event.extra.get("what") in ("failed", "cut short"):
            yield one("warn", f"{_when(event.time_s)} {words(event)}", "edgekws adapt")
    # What an earlier version missed is what the one that listens learned from.
    begun_s = max([0.0, *(time_s for time_s, _ in _changes(seen))])
    woke = [event for event in seen.wakes if event.time_s >= begun_s]
    wrong = sum(event.id in seen.wrong for event in woke)
    missed = sum(_missed(clip) and clip.time_s >= begun_s for clip in seen.near)
    if wrong >= 3 and wrong > 0.1 * len(woke):
        text = f"{wrong} of the {len(woke)} wakes of the version that listens were marked as wrong"
        yield one("warn", text, "edgekws adapt learns from them; a higher threshold_offset wakes less")
    if missed >= 3 and missed > 0.2 * len(woke):
        text = f"{missed} near misses of the version that listens were the keyword, two networks or a person say,"
        text += f" and it woke {len(woke)} times"
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
        spans = list(_spans(seen, seen.runs()))
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
    at = _bins(seen.from_s, seen.to_s)
    widths = [(end - begin) * 0.86 for begin, end in pairwise(at)]
    below = [0] * len(widths)
    for name, marker, size, points in kinds:
        share = len(points) / max(1, sum(len(others) for *_, others in kinds))
        some = _some(points, max(DOTS // 10, round(share * DOTS / (3 if narrow else 1))))
        dots.plot(
            [_local(time_s) for time_s, _ in some], [margin for _, margin in some], marker, color=COLOURS[name], markersize=size, alpha=0.75
        )
        if name in ("wake", "wrong"):
            counts = Counter(bisect_right(at, _local(time_s)) - 1 for time_s, _ in points)
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
    bars.set_ylabel(f"wakes\na {_width((at[1] - at[0]).total_seconds())}")
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


def _bins(from_s: float, to_s: float) -> list[datetime]:
    """Edges of bars that begin at a whole minute, hour or day here, whatever the clocks do: an hour that comes twice has its bars once."""
    span_s = max(60.0, to_s - from_s)
    width_s = next((one for one in BINS_S if span_s / one <= BINS), math.ceil(span_s / BINS / DAY_S) * DAY_S)
    # Not the ends alone: where clocks are set back between them, what lies between is earlier or later here.
    here = [_local(from_s + min(i * width_s, span_s)) for i in range(math.ceil(span_s / width_s) + 1)]
    width, origin = timedelta(seconds=width_s), datetime(1970, 1, 1)
    first, last = ((end - origin) // width for end in (min(here), max(here)))
    return [origin + i * width for i in range(first, last + 2)]


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
