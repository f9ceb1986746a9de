"""The page that `edgekws report` writes: of a real short run, of nothing, of much, of hostile names; and as a browser shows it."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import edgekws
from edgekws import report
from edgekws.model import find_model
from edgekws.pictures import new_figure, time_axis
from edgekws.store import Store
from edgekws.values import Event

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
DAY_S = 86_400
NOW_S = 1_790_000_000.0  # in September 2026
WAKE = Event("open sesame", "ann", 1.5, 0.5, NOW_S - DAY_S, 60.0, 0.3, "edge-1")


def edgekws_command(root, *arguments):
    env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "edgekws", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120)


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
    assert [(row["id"], row["parameters"], row["listens"], row["wakes"]) for row in facts["models"]] == [("edge-1", 325312, True, 5)]
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
        events.append(replace(plain, kind=kind, extra=extra, model="edge-1" if extra.get("what") == "live" else HOSTILE))
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


def test_a_listener_that_was_killed_is_not_said_to_listen(filled):
    start = replace(WAKE, kind="start", keyword="", time_s=NOW_S - DAY_S, stream_s=0.0, extra={"source": "mic:default"})
    facts = found(filled([start, replace(WAKE, time_s=NOW_S - 3600)]))

    assert facts["listening"]["state"] == "gone"
    ((level, text),) = levels(facts)
    assert level == "bad" and "ended without a word" in text


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


def test_energy_is_what_bench_measured_and_else_the_reason(filled):
    bench = replace(
        WAKE, kind="bench", keyword="", extra={"backend": "onnxruntime", "energy_mj_per_hop": None, "why_no_energy": "no sensor here"}
    )
    assert "no sensor here" in Page(made(filled([WAKE, bench]))[1]).text

    facts, markup = made(filled([replace(bench, extra={"backend": "onnxruntime", "energy_mj_per_hop": 0.42, "why_no_energy": None})]))
    assert facts["energy"][0]["mj_per_hop"] == 0.42
    assert "0.42 mJ a hop" in Page(markup).text


def test_a_version_that_was_made_here_has_its_gate_its_size_and_its_cost(tmp_path, lived):
    store = Store(shutil.copytree(lived, tmp_path / "state", symlinks=True))
    held_out = {"new": {"recall": {"pseudo": {"heard": 4, "of": 5}, "room": {"heard": 9, "of": 10}}, "false_accepts": 0, "hours": 1.0}}
    model = shutil.copytree(find_model("edge-small"), tmp_path / "made")
    raw = json.loads((model / "manifest.json").read_text())
    facts = {
        "id": "0001-abcdef",
        "parent": "edge-1",
        "created_s": NOW_S,
        "metrics": {"held_out": held_out},
        "gate": {"promoted": True, "reasons": []},
    }
    (model / "manifest.json").write_text(json.dumps({**raw, **facts, "cost": {"cpu_us_per_hop": 34.7, "cpu_us_per_hop_before": 50.4}}))
    store.promote(model, "0001-abcdef")
    rows = {row["id"]: row for row in found(Store(store.root, read_only=True), now_s=time.time())["models"]}

    new = rows["0001-abcdef"]
    assert (new["listens"], new["parent"], new["parameters"], new["cpu_us_per_hop"], new["gate"]) == (True, "edge-1", 87408, 34.7, [])
    assert new["held_out"] == {"heard": 13, "of": 15, "false_accepts": 0, "hours": 1.0}
    assert not rows["edge-1"]["listens"]


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"id": "odd", "parameters": "many", "cost": [], "metrics": 3, "gate": {"reasons": "no"}, "recipe": []}']
)
def test_a_manifest_that_is_odd_costs_no_page(tmp_path, manifest):
    (tmp_path / "state" / "models" / "odd").mkdir(parents=True)
    (tmp_path / "state" / "models" / "odd" / "manifest.json").write_text(manifest)

    assert "edge-1" in [row["id"] for row in found(Store(tmp_path / "state", read_only=True))["models"]]


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
