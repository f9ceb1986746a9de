"""The page that `edgekws report` writes: of a real short run, of nothing, of much, of hostile names; and as a browser shows it."""

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.dates import num2date

import edgekws
from edgekws import report
from edgekws.model import find_model
from edgekws.pictures import new_figure, time_axis
from edgekws.store import Store
from edgekws.values import Clip, Event

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
DAY_S = 86_400
NOW_S = 1_790_000_000.0  # in September 2026
WAKE = Event("open sesame", "ann", 1.5, 0.5, NOW_S - DAY_S, 60.0, 0.3, "edge-3")


def edgekws_command(root, *arguments, **how):
    env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "edgekws", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **how)


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """The state directory of somebody who enrolled, listened to a minute and rejected a wake."""
    root = tmp_path_factory.mktemp("lived") / "state"
    for arguments in (
        ("enroll", TRUTH["keyword"], "--speaker", "ann", *sorted(DEMO.glob("enrol-*.flac"))),
        ("run", "--source", f"file:{DEMO / 'stream.flac'}"),
        ("clips", "reject", "--last"),
    ):
        done = edgekws_command(root, *arguments)
        assert done.returncode == 0, done.stderr
    return root


class Page(HTMLParser):
    """Its text, and whatever could fetch or run something."""

    def __init__(self, markup):
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset") or name.startswith("on"):
                self.links.append((tag, name, value))

    def handle_data(self, data):
        self.text += f" {data}"


def found(store, since_s=0.0, now_s=NOW_S):
    return report.summary(report.history(store, now_s, since_s), store, find_model("edge"))


def made(store, now_s=NOW_S):
    seen = report.history(store, now_s)
    facts = report.summary(seen, store, find_model("edge"))
    return facts, report.page(facts, seen)


def levels(facts):
    return [(one["level"], one["text"]) for one in facts["attention"]]


def test_a_short_run_is_told_as_the_store_has_it_and_the_store_is_as_before(lived, tmp_path):
    before = {path: path.read_bytes() for path in lived.rglob("*") if path.is_file() and path.suffix != ".db-shm"}
    done = edgekws_command(lived, "report", "--html", tmp_path / "page.html", "--json")
    facts = json.loads(done.stdout)
    page = Page((tmp_path / "page.html").read_text())

    assert facts["wakes"]["count"] == len(TRUTH["spoken"])
    assert facts["wakes"]["wrong"] == 1
    (keyword,) = facts["keywords"]
    assert (keyword["keyword"], keyword["speaker"], keyword["recordings"]) == (TRUTH["keyword"], "ann", 3)
    assert [(row["id"], row["parameters"], row["listens"], row["wakes"]) for row in facts["models"]] == [("edge-3", 325312, True, 5)]
    assert facts["listening"]["hours"] == pytest.approx(31 / 3600, abs=0.001)
    assert levels(facts)[0][0] == "warn" and "Not listening" in levels(facts)[0][1]
    assert "not measured" in page.text and "None yet" in page.text
    assert {path: path.read_bytes() for path in before} == before


def test_the_page_needs_nothing_beside_it(lived):
    facts, markup = made(Store(lived, read_only=True), now_s=time.time())
    page = Page(markup)

    assert all(value.startswith(("#", "data:,")) for _, _, value in page.links)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", markup)
    assert page.tags.count("svg") == 4
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20,}"', markup)) == 4
    ids = re.findall(r'\bid="([^"]+)"', markup)
    assert len(ids) == len(set(ids))
    assert facts["wakes"]["count"] == 5


def test_without_matplotlib_the_page_has_all_but_the_pictures(lived, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(made(Store(lived, read_only=True), now_s=time.time())[1])

    assert "pip install 'edgekws[plot]'" in page.text
    assert "open sesame" in page.text and "svg" not in page.tags


def test_an_empty_store_has_a_page_that_says_how_to_begin_and_stays_empty(tmp_path):
    facts, markup = made(Store(tmp_path / "state", read_only=True))

    assert "edgekws enroll KEYWORD" in Page(markup).text
    assert levels(facts) == [("warn", "It has never listened with this state directory")]
    assert not (tmp_path / "state").exists()


@pytest.fixture
def filled(tmp_path):
    """A store that takes events by the thousand, without a sync after each."""
    store = Store(tmp_path / "state", events_max=10_000_000)

    def fill(events):
        store.last_event()
        names = ["kind", "time_s", "stream_s", "keyword", "speaker", "score", "threshold", "latency_ms", "model"]
        rows = [(*(getattr(event, name) for name in names), json.dumps(event.extra)) for event in events]
        store._db.execute("BEGIN")
        store._db.executemany(f"INSERT INTO events ({', '.join(names)}, extra) VALUES ({', '.join('?' * 10)})", rows)
        store._db.execute("COMMIT")
        return store

    return fill


def test_of_a_huge_store_the_newest_events_are_shown_and_the_page_stays_small(filled):
    store = filled(replace(WAKE, time_s=NOW_S - 400 * DAY_S + i * 320, stream_s=i * 320.0, score=0.6 + i % 7 / 5) for i in range(105_000))
    facts, markup = made(store)

    assert facts["events"] == report.EVENTS
    assert facts["older_left_out"] == 5000
    assert "Older events were left out" in markup
    assert len(markup) < 1_000_000


@pytest.mark.parametrize(("days", "left_out"), [(399.5, 5000), (300, 0)])
def test_since_a_moment_it_is_told_whether_older_events_were_left_out(filled, days, left_out):
    store = filled(replace(WAKE, time_s=NOW_S - 400 * DAY_S + i * 320, stream_s=i * 320.0) for i in range(105_000))
    seen = report.history(store, NOW_S, NOW_S - days * DAY_S)

    assert seen.left_out == left_out
    assert (seen.from_s > NOW_S - days * DAY_S + DAY_S) == bool(left_out)


HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> \"'&{{ 7 * 7 }} $x^2$"


def test_whatever_users_and_files_are_called_is_text(filled):
    events = [replace(WAKE, keyword=HOSTILE, speaker=HOSTILE, model=HOSTILE, time_s=NOW_S - 5000 + i) for i in range(3)]
    plain = Event("", "", 0.0, 0.0, NOW_S - 4000, 90.0, 0.0, HOSTILE)
    for kind, extra in (
        ("start", {"source": f"file:{HOSTILE}"}),
        ("deaf", {"reason": HOSTILE}),
        ("model", {"what": "refused", "version": HOSTILE, "reason": HOSTILE}),
        ("model", {"what": "live", "before": HOSTILE}),
        ("round", {"what": HOSTILE, "reason": HOSTILE}),
        ("bench", {"backend": HOSTILE, "why_no_energy": HOSTILE, "energy_mj_per_hop": HOSTILE}),
        ("gap", {"lost_ms": HOSTILE}),
        ("reject", {"wake": HOSTILE}),
    ):
        events.append(replace(plain, kind=kind, extra=extra, model="edge-3" if extra.get("what") == "live" else HOSTILE))
    facts, markup = made(filled(events))
    page = Page(markup)

    assert "script" not in page.tags and "img" not in page.tags
    assert all(value.startswith(("#", "data:,")) for _, _, value in page.links)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7 * 7 }}" in page.text
    assert facts["keywords"][0]["keyword"] == HOSTILE


def test_nothing_needs_a_look_while_it_listens_and_says_so(filled):
    start = replace(WAKE, kind="start", keyword="", time_s=NOW_S - DAY_S, stream_s=0.0, extra={"source": "mic:default"})
    wakes = [replace(WAKE, time_s=NOW_S - DAY_S + 600 * i, stream_s=600.0 * i, score=1.5 + i % 5 / 10) for i in range(1, 100)]
    listener = filled([start, *wakes])
    listener.begin_listening()
    facts, markup = made(Store(listener.root, read_only=True))

    assert facts["attention"] == []
    assert "Nothing needs a look" in markup
    assert facts["keywords"][0]["drift"]["moved"] == ""


def test_what_needs_a_look_is_said_worst_first(filled):
    start = replace(WAKE, kind="start", keyword="", time_s=NOW_S - 2 * DAY_S, stream_s=0.0, extra={"source": "mic:default"})
    again = replace(start, time_s=NOW_S - DAY_S)
    wakes = [
        replace(WAKE, time_s=again.time_s + 60 * i, stream_s=60.0 * i, score=(2.5 if i < 80 else 0.7) + i % 5 / 10) for i in range(1, 110)
    ]
    gap = replace(start, kind="gap", time_s=NOW_S - 900, stream_s=7000.0, extra={"lost_ms": 60_000})
    failed = replace(start, kind="round", time_s=NOW_S - 800, extra={"what": "failed", "reason": "the disk is full"})
    deaf = replace(start, kind="deaf", time_s=NOW_S - 700, stream_s=7100.0, extra={"reason": "no samples for 5 s"})
    listener = filled([start, again, *wakes, gap, failed, deaf])
    listener.begin_listening()
    told = levels(found(listener))

    assert [level for level, _ in told] == ["bad", "warn", "warn", "warn", "warn"]
    for (_, text), wanted in zip(
        told, ("Deaf since", "1 of 2 runs ended without", "60.0 s of audio were lost", "the disk is full", "fell"), strict=True
    ):
        assert wanted in text


def test_another_version_s_scores_are_no_drift(filled):
    """Only those of the version that listens are compared, whatever the threshold of the one before."""
    start = replace(WAKE, kind="start", keyword="", time_s=NOW_S - 2 * DAY_S, stream_s=0.0, extra={"source": "mic:default"})
    wakes = [replace(WAKE, time_s=start.time_s + 60 * i, stream_s=60.0 * i, score=2.5 + i % 5 / 10) for i in range(1, 80)]
    later = [replace(one, time_s=one.time_s + DAY_S, stream_s=one.stream_s + DAY_S, score=one.score - 1.5, model="1") for one in wakes]
    live = replace(later[0], kind="model", keyword="", extra={"what": "live", "before": "edge-3"})
    listener = filled([start, *wakes, live, *later])
    listener.begin_listening()
    facts = found(Store(listener.root, read_only=True))

    assert facts["attention"] == []
    assert facts["keywords"][0]["drift"]["moved"] == ""


@pytest.mark.parametrize(("unit", "todo"), [(True, "systemctl start edgekws"), (False, "edgekws run")])
def test_the_advice_is_for_what_started_it(told, monkeypatch, tmp_path, unit, todo):
    (tmp_path / "units").mkdir()
    if unit:
        (tmp_path / "units" / "edgekws.service").touch()
    monkeypatch.setattr(report, "UNITS", (tmp_path / "units",))

    for last in (at(-1, "stop", 4), at(-1, place=4), at(-1, "stop", 4, error="x")):
        (one,) = told([at(-5, "start"), last], alive=False)["attention"]
        assert ("systemctl" in one["todo"] or "journalctl" in one["todo"]) == unit
    assert told([at(-5, "start"), at(-1, "stop", 4)], alive=False)["attention"][0]["todo"] == todo
    (one,) = told([at(-9, "start"), at(-5, "start"), at(-4, place=1)])["attention"]
    assert one["todo"] == ("journalctl -u edgekws" if unit else "edgekws log --kind start stop")


def test_a_version_that_was_gone_back_from_by_hand_needs_no_look(told):
    back = at(-1, "model", 4, what="rolled back", back_to="edge-3", reason="by hand")

    assert told([at(-5, "start"), back])["attention"] == []
    assert len(told([at(-5, "start"), replace(back, extra={**back.extra, "reason": "20 wakes in an hour"})])["attention"]) == 1


def test_a_listener_that_was_killed_is_not_said_to_listen(filled):
    start = replace(WAKE, kind="start", keyword="", time_s=NOW_S - DAY_S, stream_s=0.0, extra={"source": "mic:default"})
    facts = found(filled([start, replace(WAKE, time_s=NOW_S - 3600)]))

    assert facts["listening"]["state"] == "gone"
    ((level, text),) = levels(facts)
    assert level == "bad" and "ended without a word" in text


HOUR_S = 3600
START = Event("", "", 0.0, 0.0, NOW_S, 0.0, 0.0, "edge-3", "start", extra={"source": "mic:default"})


def at(hours, kind="wake", place=None, **extra):
    """An event so many hours from now, and so many into its stream."""
    extra = extra or (START.extra if kind == "start" else {})
    what = replace(WAKE, extra=extra) if kind == "wake" else replace(START, kind=kind, extra=extra)
    return replace(what, time_s=NOW_S + hours * HOUR_S, stream_s=(place or 0.0) * HOUR_S)


@pytest.fixture
def told(tmp_path):
    """What is found where these events are stored, and the listener is alive or not."""

    def tell(events, alive=True, since_h=None):
        store = Store(tmp_path / str(len(list(tmp_path.iterdir()))))
        if alive:
            store.begin_listening()
        for event in events:
            store.add_event(event)
        facts = found(Store(store.root, read_only=True), 0.0 if since_h is None else NOW_S + since_h * HOUR_S)
        store.close()
        return facts

    return tell


def test_hours_go_on_after_the_last_event_while_it_listens(told):
    facts = told([at(-100, "start"), at(-99, place=1)])

    assert facts["listening"]["hours"] == pytest.approx(100)
    assert facts["wakes"]["per_hour"] == pytest.approx(0.01)
    assert [(row["id"], row["hours"]) for row in facts["models"] if row["hours"]] == [("edge-3", pytest.approx(100))]


def test_hours_since_a_moment_begin_at_that_moment_and_not_at_the_first_event_after_it(told):
    events = [at(-100, "start"), at(-99, place=1), at(-3, place=97)]

    assert told(events[:2], since_h=-24)["listening"]["hours"] == pytest.approx(24)
    facts = told(events, since_h=-24)
    assert (facts["listening"]["hours"], facts["from_s"]) == (pytest.approx(24), NOW_S - DAY_S)
    assert [row["hours"] for row in facts["models"] if row["hours"]] == [pytest.approx(24)]
    assert told([*events, at(-1, "stop", 99, audio_s=99 * HOUR_S)], alive=False, since_h=-24)["listening"]["hours"] == pytest.approx(23)


def test_what_gaps_took_was_not_heard(told):
    events = [at(-10, "start"), at(-9, "deaf", 1, reason="unplugged"), at(-2, "gap", 8, lost_ms=7 * HOUR_S * 1000), at(-1, place=9)]
    facts = told(events)

    assert (facts["listening"]["hours"], facts["listening"]["lost_share"]) == (pytest.approx(3), pytest.approx(0.7))
    assert [row["hours"] for row in facts["models"] if row["hours"]] == [pytest.approx(3)]
    assert told(events, alive=False)["listening"]["hours"] == pytest.approx(2)
    assert told([*events, at(-1, "stop", 9, audio_s=2 * HOUR_S)], alive=False)["listening"]["hours"] == pytest.approx(2)
    assert told(events, since_h=-5)["listening"]["hours"] == pytest.approx(2)  # within the gap


def test_a_boot_whose_microphone_comes_late_is_no_crash_and_costs_the_run_before_it_no_hours(told):
    before, boot = [at(-48, "start"), at(-38, place=10)], at(-20, "deaf", 0, reason="no microphone")
    begin = at(-19.9, "start", 0, source="mic:default", before="ended without a word")

    fresh = told([boot, begin, at(-9.9, place=10)])["listening"]
    assert (fresh["starts"], fresh["ended_untold"], fresh["hours"]) == (1, 0, pytest.approx(19.9))
    stopped = told([*before, at(-37, "stop", 11, audio_s=11 * HOUR_S), boot, begin])["listening"]
    assert (stopped["ended_untold"], stopped["hours"]) == (0, pytest.approx(11 + 19.9))
    killed = told([*before, boot, begin, at(-9.9, place=10)])["listening"]
    assert (killed["ended_untold"], killed["hours"]) == (1, pytest.approx(10 + 19.9))
    assert told([*before, boot])["listening"]["state"] == "deaf"


def test_a_listener_that_began_before_the_stretch_looked_at_and_was_killed_is_gone(told):
    assert told([at(-24, "start"), at(-0.5, place=23.5)], alive=False, since_h=-1)["listening"]["state"] == "gone"
    assert told([at(-24, "start")], alive=False, since_h=-1)["listening"]["state"] == "gone"


def test_where_nothing_happened_lately_the_state_is_what_came_of_what_was_before(told):
    assert told([at(-24, "start")], since_h=-1)["listening"]["state"] == "listens"
    assert told([at(-24, "start"), at(-5, "deaf", 19, reason="unplugged")], since_h=-1)["listening"]["state"] == "deaf"
    facts = told([at(-24, "start"), at(-5, "stop", 19, audio_s=19 * HOUR_S)], alive=False, since_h=-1)
    assert (facts["listening"]["state"], facts["listening"]["since_s"]) == ("stopped", NOW_S - 5 * HOUR_S)
    assert facts["listening"]["hours"] == 0


def test_a_file_that_was_listened_to_beside_the_microphone_ends_nothing(told):
    file = [at(-2, "start", 0, source="file:a.wav"), replace(at(-1.99), stream_s=30.0), at(-1.9, "stop", 0.1, audio_s=360.0, wakes=1)]
    facts = told([at(-10, "start"), *file])

    assert (facts["listening"]["state"], facts["attention"]) == ("listens", [])
    assert facts["listening"]["hours"] == pytest.approx(10.1)
    assert told([at(-10, "start"), *file, at(-1, "deaf", 9, reason="unplugged")])["listening"]["state"] == "deaf"
    assert told([at(-10, "start"), *file, at(-1, "stop", 9, audio_s=9 * HOUR_S)], alive=False)["listening"]["state"] == "stopped"
    assert told([at(-10, "start"), *file], since_h=-1)["listening"]["hours"] == pytest.approx(1)


def test_a_file_run_that_was_killed_beside_the_microphone_takes_none_of_its_events(told):
    file = [at(-8, "start", 0, source="file:a.wav", file=True), replace(at(-7.9, place=0.05), extra={"file": True})]
    stopped = told([at(-10, "start"), *file, at(-3, place=7), at(-1, "stop", 9, audio_s=9 * HOUR_S)], alive=False)["listening"]

    assert (stopped["state"], stopped["starts"], stopped["ended_untold"], stopped["hours"]) == ("stopped", 1, 0, pytest.approx(9))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_microphone_that_is_opened_while_a_file_is_listened_to_has_all_its_hours(told, restarted):
    heard = replace(at(-9.5, place=0.5), extra={"file": True})
    file = [at(-10, "start", 0, source="file:a.wav?paced=1", file=True), heard, at(-9, "stop", 1, audio_s=HOUR_S, wakes=1, file=True)]
    before = [at(-12, "start"), at(-9.9, "stop", 2.1, audio_s=2.1 * HOUR_S)] if restarted else []
    events = sorted([*before, *file, at(-9.8, "start"), at(-5, place=4.8), at(-1, place=8.8)], key=lambda event: event.time_s)
    facts = told(events, alive=True)["listening"]

    assert (facts["state"], facts["starts"], facts["ended_untold"]) == ("listens", 2 + restarted, 0)
    assert facts["hours"] == pytest.approx(1 + 9.8 + 2.1 * restarted)


def test_a_version_has_the_hours_of_a_file_that_was_read_faster_than_it_was_spoken(told):
    """Three hours of it in three minutes, of which another version heard the last."""
    run = [at(-2, "start", 0, source="file:a.wav", file=True), replace(at(-1.96, "model", 2, what="live", file=True), model="edge-2")]
    run += [replace(at(-1.95, "stop", 3, audio_s=3 * HOUR_S, wakes=0, file=True), model="edge-2")]
    facts = told(run, alive=False)

    assert facts["listening"]["hours"] == pytest.approx(3)
    assert {row["id"]: row["hours"] for row in facts["models"] if row["hours"]} == {"edge-3": pytest.approx(2), "edge-2": pytest.approx(1)}


def test_wakes_that_outlived_the_starts_of_their_runs_are_in_no_rate_and_no_crash(tmp_path):
    """Starts and stops have a quarter of the room in the log."""
    store, few = Store(tmp_path / "all"), Store(tmp_path / "few", 40)
    for day in range(-30, 0):
        for event in (at(day, "start"), at(day + 0.5, place=0.5), at(day + 0.9, "stop", 0.9, audio_s=0.9 * HOUR_S)):
            store.add_event(event), few.add_event(event)
    facts, pruned = found(store), found(few)
    only_wakes = Store(tmp_path / "wakes")
    only_wakes.add_event(WAKE)

    assert (facts["listening"]["starts"], pruned["wakes"]["count"] > 2 * pruned["listening"]["starts"]) == (30, True)
    assert facts["wakes"]["per_hour"] == pruned["wakes"]["per_hour"] == pytest.approx(1.11)
    assert pruned["listening"]["ended_untold"] == 0 == found(only_wakes)["listening"]["starts"]
    assert found(only_wakes)["wakes"]["per_hour"] is None


def test_the_last_run_that_died_is_one_that_ended_without_a_word(told):
    gone = told([at(-9, "start"), at(-5, "start"), at(-4, place=1)], alive=False)

    assert (gone["listening"]["ended_untold"], gone["listening"]["state"]) == (2, "gone")
    assert "2 of 2 runs ended without a word" in levels(gone)[1][1]
    assert told([at(-5, "start"), at(-4, place=1)])["listening"]["ended_untold"] == 0


def test_a_clock_that_was_set_back_hides_no_deafness(told):
    """The order of events is theirs, whatever times they bear."""
    facts = told([at(-1, "start"), at(-0.9, place=0.1), at(-26, "deaf", 0.5, reason="unplugged")])

    assert facts["listening"]["state"] == "deaf"


def test_a_microphone_that_is_unmuted_is_no_gap(told):
    muted = [at(-5, "deaf", 5, reason="only digital silence"), at(-4, "gap", 6, lost_ms=0, reason="sound again")]
    facts = told([at(-10, "start"), *muted, at(-3, "gap", 7, lost_ms=0)])

    assert (facts["listening"]["gaps"], facts["listening"]["deaf"], facts["listening"]["state"]) == (1, 1, "listens")
    assert [one["words"] for one in facts["hearing"]][2:] == ["gap: sound again", "gap: less than 1 ms of audio were lost"]


def test_a_round_that_failed_needs_a_look_though_later_ones_were_skipped(told):
    rounds = [at(-90, "round", what="failed", reason="the disk is full")]
    rounds += [at(i - 80, "round", what="skipped", reason="on battery") for i in range(60)]  # more than the page has rows for
    facts = told([at(-48, "start"), *rounds])

    assert ["the disk is full" in text for _, text in levels(facts)] == [True]
    assert levels(told([at(-48, "start"), *rounds, at(-1, "round", what="promoted", reason="better")])) == []


def test_a_rate_of_a_rare_wake_is_not_rounded_away(told):
    assert told([at(-3000, "start"), at(-2999, place=1)])["wakes"]["per_hour"] == pytest.approx(0.000333)


def test_a_satellite_s_wakes_are_not_the_microphone_s(tmp_path):
    """They come with the place in a stream of their own."""
    own = [replace(WAKE, kind="start", stream_s=0.0)]
    own += [replace(WAKE, time_s=WAKE.time_s + 60 * i, stream_s=60.0 * i) for i in range(1, 11)]
    own += [replace(WAKE, kind="deaf", time_s=WAKE.time_s + 660, stream_s=660.0)]
    others = [replace(WAKE, time_s=WAKE.time_s + 60 * i + 30, stream_s=90_000.0, extra={"client": "10.0.0.2:1"}) for i in range(1, 12)]
    wanted, got = [], []
    for name, events, facts in (("alone", own, wanted), ("both", sorted(own + others, key=lambda event: event.time_s), got)):
        store = Store(tmp_path / name)
        store.begin_listening()
        for event in events:
            store.add_event(event)
        facts.append(found(store))
        store.close()
    (wanted,), (got,) = wanted, got

    assert got["wakes"]["count"] == 21 and got["wakes"]["per_hour"] == wanted["wakes"]["per_hour"]
    assert got["listening"] == wanted["listening"] and got["listening"]["state"] == "deaf"
    assert [(row["hours"], row["wakes"]) for row in got["models"]] == [(row["hours"], row["wakes"]) for row in wanted["models"]]


def test_since_leaves_out_what_came_before(filled):
    store = filled(replace(WAKE, time_s=NOW_S - i * DAY_S) for i in range(30, 0, -1))

    assert found(store, since_s=NOW_S - 7.5 * DAY_S)["wakes"]["count"] == 7


def test_a_clock_that_was_not_set_does_not_stretch_the_page_to_1970(filled):
    facts, markup = made(filled([replace(WAKE, time_s=100.0), WAKE]))

    assert (facts["unset_clock"], facts["wakes"]["count"], facts["from_s"]) == (1, 1, WAKE.time_s)
    assert "clock was not set" in markup


@pytest.mark.parametrize("ticks", [5, 6, 10])
@pytest.mark.filterwarnings("error")
def test_any_stretch_of_time_has_ticks_that_tell_it(ticks):
    begin = datetime(2026, 9, 21, 14, 7)
    for minutes in np.geomspace(1, 10 * 365 * 24 * 60, 60):
        panel = new_figure(5, 3).subplots()
        panel.set_xlim(begin, begin + timedelta(minutes=float(minutes)))
        time_axis(panel, ticks)
        low, high = panel.get_xlim()
        shown = [tick for tick in panel.get_xticks() if low <= tick <= high]

        assert 1 <= len(shown) <= ticks


@pytest.fixture
def berlin(monkeypatch):
    """In 2026 the clocks go from 2 to 3 on 29 March, and from 3 back to 2 on 25 October."""
    with monkeypatch.context() as here:
        here.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("begin", "end", "hours"),
    [
        (datetime(2026, 10, 5, 9), datetime(2026, 11, 29, 22), 24),
        (datetime(2026, 3, 5, 9), datetime(2026, 4, 20), 24),
        (datetime(2020, 1, 1), datetime(2026, 11, 29), 24 * 43),
        (datetime(2026, 10, 20), datetime(2026, 10, 30), 6),
        (datetime(2026, 10, 24, 20), datetime(2026, 10, 25, 22), 1),
        (datetime(2026, 10, 25, 0, 30), datetime(2026, 10, 25, 9), 0.25),
        (datetime(2026, 10, 25, 1, 30), datetime(2026, 10, 25, 2, 10, fold=1), 1 / 12),
        (datetime(2026, 10, 25, 2, 50), datetime(2026, 10, 25, 2, 10, fold=1), 1 / 60),
        (datetime(2026, 3, 29, 1, 30), datetime(2026, 3, 29, 9), 0.25),
    ],
)
def test_bars_are_whole_days_and_hours_here_and_hold_all_though_the_clocks_are_set(berlin, begin, end, hours):
    from_s, to_s, width = begin.timestamp(), end.timestamp(), timedelta(hours=hours)
    edges = report._bins(from_s, to_s)
    here = [datetime.fromtimestamp(time_s) for time_s in np.linspace(from_s, to_s, 1000)]

    assert {later - edge for edge, later in pairwise(edges)} == {width}
    assert not (edges[0] - datetime(1970, 1, 1)) % width
    assert edges[0] <= min(here) < edges[1] and edges[-2] <= max(here) < edges[-1]


def test_each_wake_of_an_hour_that_comes_twice_is_in_the_bar_that_it_is_drawn_above(berlin, filled):
    two = datetime(2026, 10, 25, 2).timestamp()
    store = filled(replace(WAKE, time_s=two + minutes * 60) for minutes in (-30, 5, 35, 65, 95, 125))
    figure = new_figure(5, 4)
    report._draw_time(figure, report.history(store, two + 3 * 3600), (), False)
    bars = [bar for bar in figure.axes[1].patches if bar.get_height()]

    starts = [num2date(bar.get_x()).strftime("%H:%M") for bar in bars]
    assert list(zip(starts, [bar.get_height() for bar in bars], strict=True)) == [("01:30", 1), ("02:05", 2), ("02:35", 2), ("03:05", 1)]
    assert all(bar.get_width() > 0 for bar in bars)


def test_energy_is_what_bench_measured_and_else_the_reason(filled):
    bench = replace(
        WAKE, kind="bench", keyword="", extra={"backend": "onnxruntime", "energy_mj_per_hop": None, "why_no_energy": "no sensor here"}
    )
    assert "no sensor here" in Page(made(filled([WAKE, bench]))[1]).text

    facts, markup = made(filled([replace(bench, extra={"backend": "onnxruntime", "energy_mj_per_hop": 0.42, "why_no_energy": None})]))
    assert facts["energy"][0]["mj_per_hop"] == 0.42
    assert "0.42 mJ a hop" in Page(markup).text


def test_the_energy_told_first_is_the_last_measured_of_the_version_that_listens(filled):
    def bench(hours, backend, mj, model="edge-3"):
        return replace(at(-hours, "bench", backend=backend, energy_mj_per_hop=mj), model=model)

    other = bench(1, "tensorrt", 9.5, "edge-0")
    facts, markup = made(filled([WAKE, bench(4, "onnxruntime", 0.5), bench(3, "tensorrt", 3.25), bench(2, "onnxruntime", 0.75), other]))

    assert [one["mj_per_hop"] for one in facts["energy"]] == [3.25, 0.75, 9.5]
    assert re.search(r"energy\s+0\.75 mJ a hop\s+on onnxruntime", Page(markup).text)


def test_what_is_not_enrolled_and_only_nearly_woke_has_a_row_too_and_says_who_was_asked(filled):
    store = filled([replace(START, time_s=NOW_S - DAY_S), replace(WAKE, time_s=NOW_S - HOUR_S)])
    clip = Clip("between", "hey jetson", "", 1.0, 16_000, 1.0, "0.50 below the threshold", time_s=NOW_S - HOUR_S, threshold=1.5)
    for i in range(4):
        store.confirm_clip(store.add_clip(clip, np.full(16_000, i, np.int16)).id)
    facts, markup = made(store)

    assert [(row["keyword"], row["near_misses"], row["likely_missed"]) for row in facts["keywords"]] == [
        ("hey jetson", 4, 4),
        ("open sesame", 0, 0),
    ]
    assert any("were the keyword, two networks or a person say" in text for _, text in levels(facts))
    assert "says a second network or a person" in markup


def test_a_median_of_few_has_no_interval(told, filled):
    """Of five the least and the most hold the median in 94 of 100 cases."""
    for count in (1, 5, 6):
        (row,) = told([at(-10, "start"), *(at(i - 9, place=1 + i) for i in range(count))])["keywords"]
        assert (row["margin"]["median"], row["margin"]["n"]) == (1.0, count)
        assert (row["margin"]["low"], row["margin"]["high"]) == ((1.0, 1.0) if count == 6 else (None, None))
    assert "+1.00" in made(filled([WAKE]))[1]


def test_a_version_that_was_made_here_has_its_gate_its_size_and_its_cost(tmp_path, lived):
    store = Store(shutil.copytree(lived, tmp_path / "state", symlinks=True))
    held_out = {"new": {"recall": {"pseudo": {"heard": 4, "of": 5}, "room": {"heard": 9, "of": 10}}, "false_accepts": 0, "hours": 1.0}}
    model = shutil.copytree(find_model("edge-small"), tmp_path / "made")
    raw = json.loads((model / "manifest.json").read_text())
    facts = {
        "id": "0001-abcdef",
        "parent": "edge-3",
        "created_s": NOW_S,
        "metrics": {"held_out": held_out},
        "gate": {"promoted": True, "reasons": []},
    }
    (model / "manifest.json").write_text(json.dumps({**raw, **facts, "cost": {"cpu_us_per_hop": 34.7, "cpu_us_per_hop_before": 50.4}}))
    store.promote(model, "0001-abcdef")
    rows = {row["id"]: row for row in found(Store(store.root, read_only=True), now_s=time.time())["models"]}

    new = rows["0001-abcdef"]
    assert (new["listens"], new["parent"], new["parameters"], new["cpu_us_per_hop"], new["gate"]) == (True, "edge-3", 87408, 34.7, [])
    assert new["held_out"] == {"heard": 13, "of": 15, "false_accepts": 0, "hours": 1.0}
    assert not rows["edge-3"]["listens"]


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"id": "odd", "parameters": "many", "cost": [], "metrics": 3, "gate": {"reasons": "no"}, "recipe": []}']
)
def test_a_manifest_that_is_odd_costs_no_page(tmp_path, manifest):
    (tmp_path / "state" / "models" / "odd").mkdir(parents=True)
    (tmp_path / "state" / "models" / "odd" / "manifest.json").write_text(manifest)

    assert "edge-3" in [row["id"] for row in found(Store(tmp_path / "state", read_only=True))["models"]]


WRONG = [
    ((), 2, "--html FILE"),
    (("--html", "/no/such/folder/page.html"), 1, "/no/such/folder/page.html"),
    (("--html", "/tmp"), 1, "/tmp"),
    (("--json", "--since", "yesterday"), 2, "accepted is"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG, ids=["nothing", "no folder", "a folder", "since"])
def test_wrong_usage_is_said_in_a_line(tmp_path, arguments, code, said):
    done = edgekws_command(tmp_path / "state", "report", *arguments)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_page_that_has_no_room_leaves_the_one_that_was_there(tmp_path, lived):
    page = tmp_path / "page.html"
    page.write_text("of yesterday")
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))  # enough for SQLite's own
    done = edgekws_command(lived, "report", "--html", page, preexec_fn=full)

    assert (done.returncode, page.read_text()) == (1, "of yesterday")
    assert done.stderr.splitlines()[-1] == f"edgekws: {page}: File too large"

    page.write_text("of yesterday" * 100_000)
    assert edgekws_command(lived, "report", "--html", page).returncode == 0
    assert page.read_text().rstrip().endswith("</html>")


def test_a_database_that_cannot_be_read_is_said_in_a_line(tmp_path):
    (tmp_path / "edgekws.db").write_bytes(b"none" * 5000)
    done = edgekws_command(tmp_path, "report", "--json")

    assert done.returncode == 1
    assert "not a database" in done.stderr.splitlines()[-1]


def test_a_browser_shows_it_on_a_desktop_and_on_a_phone_and_has_nothing_to_complain_of(lived, tmp_path, chromium):
    markup = made(Store(lived, read_only=True), now_s=time.time())[1]
    page = tmp_path / "page.html"
    page.write_text(markup)
    for width, height in ((1280, 800), (390, 844)):
        picture = tmp_path / f"{width}.png"
        _, complaints = chromium(page.as_uri(), f"--window-size={width},{height}", f"--screenshot={picture}")
        assert complaints == []
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, height)

        # The page in a frame of that size says how wide it became.
        measure = "document.title = [this.contentDocument.documentElement.scrollWidth, this.contentDocument.querySelectorAll('svg').length]"
        frame = tmp_path / "frame.html"
        frame.write_text(f'<!doctype html><iframe src="page.html" onload="{measure}" style="border: 0; width: {width}px; height: 800px">')
        dump, complaints = chromium(frame.as_uri(), "--allow-file-access-from-files", "--window-size=1400,900", "--dump-dom")
        assert complaints == []
        assert re.search(r"<title>(.*?)</title>", dump)[1] == f"{width},4"
