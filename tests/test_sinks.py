import fcntl
import io
import json
import logging
import os
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edgekws.errors import EdgekwsError, StoreError
from edgekws.sinks import (
    COMMANDS,
    CUT_SHORT,
    UNREAD_S,
    CommandSink,
    Complaints,
    Delivery,
    LineSink,
    StoreSink,
    as_json,
    as_line,
    without_waiting_for_stderr,
    words,
)
from edgekws.store import Store
from edgekws.values import Clip, Event

WAKE = Event("hey küche", "ann", 1.234567, 0.7, 1000.5, 4.2, 0.3, "edge-3")
GAP = Event("", "", 0.0, 0.0, 1000.5, 4.2, 0.0, "edge-3", "gap", extra={"lost_ms": 120})


class Recording:
    def __init__(self, error=None):
        self.events, self.closed, self.error = [], False, error

    def deliver(self, event):
        self.events.append(event)
        if self.error:
            raise self.error

    def close(self):
        self.closed = True


def test_every_sink_gets_every_event_in_order_and_is_closed():
    sinks = [Recording(), Recording()]
    delivery = Delivery(sinks)
    events = [WAKE, GAP, WAKE]
    for event in events:
        delivery.put(event)
    delivery.close()

    assert [(sink.events, sink.closed) for sink in sinks] == [(events, True)] * 2


def test_a_sink_in_trouble_stops_nobody_and_is_said_once(caplog):
    troubled, other = Recording(StoreError("edgekws.db: disk is full. Free space")), Recording()
    delivery = Delivery([troubled, other])
    for _ in range(5):
        delivery.put(WAKE)
    delivery.close()

    assert (len(troubled.events), len(other.events)) == (5, 5)
    assert [record.getMessage() for record in caplog.records] == ["edgekws.db: disk is full. Free space"]


def test_a_broken_sink_ends_the_listener_and_the_others_go_on(caplog):
    broken, other, ended = Recording(BrokenPipeError()), Recording(), threading.Event()
    delivery = Delivery([broken, other], on_failure=ended.set)
    delivery.put(WAKE)
    delivery.put(WAKE)

    with pytest.raises(BrokenPipeError):
        delivery.close()
    assert ended.is_set()
    assert (len(broken.events), len(other.events), other.closed) == (1, 2, True)
    assert caplog.records == []  # `run | head` is no trouble


def test_a_fault_in_a_sink_is_logged_with_its_traceback(caplog):
    delivery = Delivery([Recording(ValueError("a bug"))])
    delivery.put(WAKE)

    with pytest.raises(ValueError, match="a bug"):
        delivery.close()
    assert caplog.records[0].exc_info


class Slow(Recording):
    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    def deliver(self, event):
        self.go_on.wait()
        super().deliver(event)


def test_a_full_queue_drops_counts_and_never_blocks():
    slow = Slow()
    delivery = Delivery([slow], queue_events=2)
    for _ in range(10):
        delivery.put(WAKE)
    slow.go_on.set()
    delivery.close()

    assert delivery.dropped >= 7
    assert len(slow.events) + delivery.dropped == 10


def test_a_fault_in_keeping_clips_is_logged_and_counted_and_events_go_on(caplog):
    sink = Recording()

    def keep(clip, samples):
        raise ValueError("a bug")

    delivery = Delivery([sink], keep=keep)
    for _ in range(2):
        delivery.put_clip(Clip("positive", "ho", "", 1.0, 1280, 0.0, "woke"), np.ones(3000, np.int16))
    delivery.put(WAKE)
    delivery.close()

    assert (sink.events, sink.closed, delivery.clips_dropped) == ([WAKE], True, 2)
    assert all(record.exc_info for record in caplog.records) and len(caplog.records) == 2


def test_where_time_does_not_press_nothing_is_dropped():
    slow = Slow()
    delivery = Delivery([slow], queue_events=2)
    threading.Timer(0.1, slow.go_on.set).start()
    for _ in range(10):
        delivery.put(WAKE, wait=True)
    delivery.close()

    assert (delivery.dropped, len(slow.events)) == (0, 10)


def test_complaints_of_one_kind_come_once_a_minute_with_their_count(caplog):
    clock = {"now_s": 0.0}
    complaints = Complaints(lambda: clock["now_s"])
    for clock["now_s"] in (0.0, 1.0, 59.0, 61.0):
        complaints.say("full", "disk")
    complaints.say("late", "command")

    assert [record.getMessage() for record in caplog.records] == ["full", "full (and 2 times more since the last such line)", "late"]


def test_lines_are_for_people_and_json_is_for_scripts():
    for as_json_too, wanted in ((False, as_line(WAKE)), (True, as_json(WAKE))):
        out = io.StringIO()
        sink = LineSink(out, json=as_json_too)
        sink.deliver(GAP)
        sink.deliver(WAKE)
        assert out.getvalue() == wanted + "\n"
    assert as_line(WAKE) == "     4.20 s  hey küche (ann)  score 1.23 / 0.70  latency 0.30 ms"
    assert json.loads(as_json(WAKE)) == {
        "kind": "wake",
        "time": "1970-01-01T00:16:40.500Z",
        "time_s": 1000.5,
        "stream_s": 4.2,
        "keyword": "hey küche",
        "speaker": "ann",
        "score": 1.2346,
        "threshold": 0.7,
        "latency_ms": 0.3,
        "model": "edge-3",
    }
    assert as_line(replace(GAP, kind="start", extra={"source": "file:a\nb"})).endswith("listening to file:a\\nb with edge-3")
    assert as_line(GAP) == "     4.20 s  gap: 120 ms of audio were lost"


def test_lines_that_nobody_reads_hold_up_no_other_sink_and_are_counted(tmp_path):
    """A pipe is full after some of them; read again, it gets those that waited and what comes."""
    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading, "rb", buffering=0) as reader:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        delivery = Delivery([StoreSink(Store(tmp_path)), LineSink(stream, json=True), heard := Recording()], queue_events=5000)
        for _ in range(1500):
            delivery.put(WAKE)
        delivery.settle(60)

        assert len(heard.events) == len(Store(tmp_path).events(limit=5000)) == 1500
        lost = delivery.drops()["line"]
        assert 0 < lost < 1000
        lines = b""
        while lines.count(b"\n") < 1500 - lost:
            lines += reader.read(65536)
        delivery.put(replace(WAKE, keyword="after"))
        delivery.close()
        lines += reader.read(65536)

    assert [json.loads(line)["keyword"] for line in lines.splitlines()] == [WAKE.keyword] * (1500 - lost) + ["after"]
    assert delivery.drops()["line"] == lost


def test_the_end_waits_a_moment_for_a_reader_and_no_longer(tmp_path, caplog):
    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading, "rb"):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        delivery = Delivery([LineSink(stream, json=True)])
        for _ in range(40):
            delivery.put(WAKE)
        delivery.close()

    assert "were not printed; edgekws log has them" in caplog.text


def test_where_what_is_listened_to_waits_no_line_is_lost_to_a_reader_that_is_slow_to_the_end():
    reading, writing = os.pipe()
    lines = []

    def read_slowly():
        with open(reading) as reader:
            time.sleep(2 * UNREAD_S)
            lines.extend(reader)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    with open(writing, "w") as stream:
        sink = LineSink(stream, json=True)
        sink.wait = True
        for _ in range(5000):
            sink.deliver(WAKE)
        sink.close()
    reader.join()

    assert [json.loads(line)["keyword"] for line in lines] == [WAKE.keyword] * 5000


def test_where_somebody_wants_it_to_end_nobody_waits_for_a_reader_any_more():
    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading):
        delivery = Delivery([line := LineSink(stream, json=True), others := Recording()], queue_events=5000)
        line.wait = True
        for _ in range(1500):
            delivery.put(WAKE)
        delivery.settle(2 * UNREAD_S)
        assert len(others.events) < 1500
        line.wait = False
        delivery.close()

    assert (len(others.events), others.closed) == (1500, True)


def test_lines_are_in_the_encoding_of_their_stream(tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        sink = LineSink(stream)
        sink.deliver(replace(WAKE, speaker="Дима"))
        sink.close()

    assert b"hey k\xfcche (\\u0414" in (tmp_path / "out").read_bytes()


def test_a_closed_pipe_ends_the_listener_at_once():
    reading, writing = os.pipe()
    os.close(reading)
    ended = threading.Event()
    with open(writing, "w") as stream:
        delivery = Delivery([LineSink(stream)], on_failure=ended.set)
        delivery.put(WAKE)
        assert ended.wait(10)
        with pytest.raises(BrokenPipeError):
            delivery.close()


def test_what_is_said_on_stderr_waits_for_no_reader(monkeypatch):
    """Neither by the log, which other threads share, nor otherwise; in order, once it is read."""
    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading, "rb", buffering=0) as reader:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        monkeypatch.setattr(sys, "stderr", stream)
        handler = logging.StreamHandler()
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])  # no other test's, whose stderr is gone
        with without_waiting_for_stderr():
            for i in range(300):
                logging.getLogger("edgekws").warning("%d %s", 2 * i, "x" * 40)
                print(2 * i + 1, "y" * 40, file=sys.stderr, flush=True)
            said = b""
            while said.count(b"\n") < 600:
                said += reader.read(65536)
        assert sys.stderr is handler.stream is stream

    assert [int(line.split()[0]) for line in said.splitlines()] == list(range(600))


def test_the_store_sink_keeps_gaps_too(tmp_path):
    delivery = Delivery([StoreSink(Store(tmp_path))])
    delivery.put(WAKE)
    delivery.put(GAP)
    delivery.close()

    assert [(e.kind, e.extra) for e in Store(tmp_path).events()] == [("wake", {}), ("gap", {"lost_ms": 120})]


def test_a_thousand_events_at_once_are_all_stored(tmp_path):
    """What a hundred a second are in ten seconds in which the disk does nothing."""
    delivery = Delivery([StoreSink(Store(tmp_path)), LineSink(io.StringIO())])
    for _ in range(1000):
        delivery.put(WAKE)
    delivery.close()

    assert (delivery.dropped, len(Store(tmp_path).events(limit=2000))) == (0, 1000)


@pytest.mark.parametrize("called_wrong", ["later", "at once", "after a restart"])
def test_a_wake_by_the_same_recording_again_is_rejected_with_the_clip_of_the_first(tmp_path, called_wrong):
    """And nothing else is: neither another clip nor the first wake."""
    store = Store(tmp_path)
    sink = StoreSink(store)
    for time_s, score, name in ((1.0, 2.0, "cut 1"), (2.0, 3.0, "cut 2")):
        sink.deliver(replace(WAKE, time_s=time_s, score=score))
        sink.keep(Clip("positive", WAKE.keyword, "ann", score, 1280, 0.0, "woke", time_s=time_s, file=name), np.ones(3000, np.int16))
    sink.deliver(replace(WAKE, time_s=3.0, score=2.5))
    sink.deliver(replace(WAKE, time_s=3.0, score=2.5, keyword="ho"))
    alike = Clip("alike", WAKE.keyword, "ann", 2.5, 0, 0.0, "", time_s=3.1, file="cut 1")
    if called_wrong == "after a restart":
        alike = replace(alike, file=store.clips()[0].file)
    if called_wrong == "at once":
        assert store.reject_wake(3)[1] is None
    sink.keep(alike, np.ones(0, np.int16))

    assert called_wrong == "at once" or store.reject_wake(3)[1].id == 1
    assert [(one.label, one.state) for one in store.clips()] == [("negative", "confirmed"), ("positive", "quarantined")]
    assert [one.extra["wake"] for one in store.events() if one.kind == "reject"] == [3]


def test_a_wake_that_is_like_a_clip_that_is_gone_is_told_all_the_same(tmp_path):
    store = Store(tmp_path)
    sink = StoreSink(store)
    sink.deliver(WAKE)
    sink.keep(Clip("alike", WAKE.keyword, "ann", WAKE.score, 0, 0.0, "", file="cut 7"), np.ones(0, np.int16))

    assert store.reject_last()[1] is None and store.clips() == []


def test_who_hears_of_a_wake_finds_it_in_the_store(tmp_path):
    """Killed between the two, nothing that was told would be lost."""
    store, found = Store(tmp_path), []

    class Asking(Recording):
        def deliver(self, event):
            found.append(len(store.events()))

    delivery = Delivery([StoreSink(Store(tmp_path)), Asking()])
    delivery.put(WAKE)
    delivery.put(WAKE)
    delivery.close()

    assert found == [1, 2]


def test_a_start_says_that_the_listener_before_it_was_killed(tmp_path, caplog):
    def events_of(*kinds):
        sink = StoreSink(Store(tmp_path))
        for kind in kinds:
            sink.deliver(replace(WAKE, kind=kind))
        return sink

    killed = events_of("start", "wake")
    killed._store._listening.close()  # as the kernel does
    events_of("start", "stop").close()
    events_of("start", "stop").close()

    starts = [event.extra.get("before") for event in Store(tmp_path).events() if event.kind == "start"]
    assert starts == [None, CUT_SHORT, None]
    assert caplog.text.count(CUT_SHORT) == 1


@pytest.mark.parametrize("how", ["an event", "a clip"])
def test_a_listener_that_began_beside_another_is_the_one_that_listens_once_that_ends(tmp_path, how):
    sinks = [StoreSink(Store(tmp_path)) for _ in range(2)]
    for sink in sinks:
        sink.deliver(replace(WAKE, kind="start"))
    sinks[0].deliver(replace(WAKE, kind="stop"))
    sinks[1].deliver(WAKE) if how == "an event" else sinks[1].keep(Clip("negative", "", "", -3.0, 160, 0.0, "room"), np.ones(160, np.int16))
    went_on = Store(tmp_path).listens()
    sinks[1].deliver(replace(WAKE, kind="stop"))

    assert (went_on, Store(tmp_path).listens(), Store(tmp_path).begin_listening()) == (True, False, False)


def test_a_file_that_is_listened_to_takes_no_other_listener_s_place(tmp_path):
    service, file = StoreSink(Store(tmp_path)), StoreSink(Store(tmp_path), live=False)
    for sink in (service, file):
        sink.deliver(replace(WAKE, kind="start"))
    service.deliver(replace(WAKE, kind="stop"))
    file.deliver(WAKE)
    again = StoreSink(Store(tmp_path))
    again.deliver(replace(WAKE, kind="start"))
    file.deliver(replace(WAKE, kind="stop"))

    assert Store(tmp_path).listens()


def test_what_a_listener_to_a_file_tells_is_marked_and_reads_as_before(tmp_path):
    store = Store(tmp_path)
    told = [replace(WAKE, kind="start"), WAKE, replace(WAKE, kind="stop", extra={"error": "the file is damaged"})]
    for live in (True, False):
        sink = StoreSink(store, live=live)
        for event in told:
            sink.deliver(event)
    store.reject_last()
    events = store.events()

    assert ["file" in event.extra for event in events] == [False] * 3 + [True] * 4
    for shown in (words, lambda event: as_json(replace(event, id=0))):
        assert [shown(event) for event in events[3:6]] == [shown(event) for event in told]


def test_who_stores_wakes_and_never_began_to_listen_is_no_listener(tmp_path):
    """As the wake service."""
    sink = StoreSink(Store(tmp_path))
    sink.deliver(WAKE)

    assert not Store(tmp_path).listens()


def shell(text):
    return [sys.executable, "-c", text]


def test_a_command_gets_the_event_on_its_stdin(tmp_path):
    sink = CommandSink([*shell("import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"), str(tmp_path / "out")], 30)
    sink.deliver(GAP)
    sink.deliver(WAKE)
    sink.close()

    assert (tmp_path / "out").read_text() == as_json(WAKE) + "\n"


def test_a_command_that_does_not_end_is_killed_with_its_children(tmp_path, caplog):
    """And does not hold up the delivery."""
    child = f"import time; time.sleep(5); open({str(tmp_path / 'late')!r}, 'w')"
    sink = CommandSink(shell(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 1.0)
    sink.deliver(WAKE)
    start_s = time.monotonic()
    sink.close()

    assert time.monotonic() - start_s < 5
    assert "killed after 1 s ([sinks] command_timeout_s)" in caplog.text
    time.sleep(max(0.0, 6 - (time.monotonic() - start_s)))
    assert not (tmp_path / "late").exists()


def test_commands_that_pile_up_are_not_started(caplog):
    sink = CommandSink(shell("import time; time.sleep(1)"), 30)
    delivery = Delivery([sink])
    for _ in range(COMMANDS + 3):
        delivery.put(WAKE)
    delivery.close()

    assert f"{COMMANDS} of it are still running" in caplog.text


def test_a_command_that_fails_or_reads_nothing_is_said(caplog):
    caplog.set_level(logging.WARNING)
    sink = CommandSink(shell("raise SystemExit(3)"), 30)
    sink.deliver(WAKE)
    sink.close()

    assert "ended with 3" in caplog.text


def test_a_command_that_is_not_there_yet_is_said_and_called_from_when_it_is(tmp_path, caplog):
    """On a stick that is mounted after the start."""
    program = tmp_path / "lamp.sh"
    sink = CommandSink([str(program), str(tmp_path / "out")], 30)
    with pytest.raises(EdgekwsError, match=r"lamp\.sh: cannot be run \(No such file or directory\)"):
        sink.deliver(WAKE)
    program.write_text('#!/bin/sh\ncat > "$1"\n')
    program.chmod(0o755)
    sink.deliver(WAKE)
    sink.close()

    assert 'lamp.sh" is no program here' in caplog.text
    assert (tmp_path / "out").read_text() == as_json(WAKE) + "\n"
