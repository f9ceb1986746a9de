import os
import re
import signal
import socket
import threading
import time
from datetime import datetime

import numpy as np
import pytest

from edgekws.audio import Source
from edgekws.daemon import DEAF_S, MUTE_S, ServiceManager, Status, closed_by_signals, listen, open_patiently
from edgekws.detector import Detector
from edgekws.errors import AudioError, StoreError, UsageError
from edgekws.pipeline import Pipeline
from edgekws.pseudo_labels import PseudoLabels
from edgekws.sinks import Delivery, StoreSink, words
from edgekws.store import Store
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Enrolled

ONE = np.array([[1.0, 0.0]], np.float32)


class LoudIsOne:
    """An engine whose embedding is `ONE` while it is loud."""

    name, precision, dim = "loud", "fp32", 2

    def step(self, frames):
        return np.array([1.0, 0.0] if frames.mean() > 0 else [0.0, 1.0], np.float32)

    def reset(self):
        pass

    def close(self):
        pass


class Chunks(Source):
    def __init__(self, chunks, live=False, error=None):
        self.uri, self.live, self._chunks, self._error, self.closed = "chunks:", live, chunks, error, False

    def chunks(self):
        for chunk in self._chunks:
            if self.closed:
                return
            yield chunk
        if self._error:
            raise self._error

    def close(self):
        self.closed = True


class Kept:
    def __init__(self):
        self.events = []

    def deliver(self, event):
        self.events.append(event)

    def close(self):
        pass


def heard(source, **clocks):
    kept = Kept()
    delivery = Delivery([kept])
    try:
        summary = listen(source, Pipeline(LoudIsOne(), Detector([Enrolled("loud", "ann", ONE, 0.5)])), delivery, "edge-3", **clocks)
    finally:
        delivery.close()
        heard.events = kept.events
    return summary, kept.events


def seconds(*loud):
    """A second of noise for each, loud or quiet."""
    noise = np.random.default_rng(0).standard_normal((len(loud), SAMPLE_RATE_HZ))
    return (noise * np.where(loud, 3000, 0)[:, None]).astype(np.int16).ravel()


def cut(samples, size):
    return [AudioChunk(samples[i : i + size], i) for i in range(0, len(samples), size)]


def test_a_wake_is_an_event_with_its_place_model_and_latency():
    ticks = iter(range(1000))
    samples = seconds(0, 1, 0)
    summary, (start, wake, stop) = heard(Chunks(cut(samples, HOP_SAMPLES)), now=lambda: 1234.5, clock=lambda: next(ticks) / 1000)

    assert (wake.kind, wake.keyword, wake.speaker, wake.model, wake.time_s) == ("wake", "loud", "ann", "edge-3", 1234.5)
    assert 1.0 < wake.stream_s < 1.2
    assert wake.latency_ms == pytest.approx(1.0)
    assert (start.kind, start.extra, stop.kind, stop.extra["wakes"]) == ("start", {"source": "chunks:"}, "stop", 1)
    assert (summary.audio_s, summary.wakes, summary.gaps) == (3.0, 1, 0)


@pytest.mark.parametrize("size", [1, 160, 1280, 16000, 48000])
def test_any_chunking_gives_the_same_events(size):
    samples = seconds(0, 1, 0)
    _, events = heard(Chunks(cut(samples, size)), now=lambda: 0.0, clock=lambda: 0.0)
    _, wanted = heard(Chunks(cut(samples, 777)), now=lambda: 0.0, clock=lambda: 0.0)

    assert events == wanted
    assert len(events) == 3


def test_each_clip_of_a_wake_has_its_event_however_soon_the_keyword_wakes_again(tmp_path):
    """A clip is complete 0.48 s after its wake; here the next wake comes 0.24 s after it."""
    enrolled = [Enrolled("loud", "ann", ONE, 0.5)]
    stored = StoreSink(Store(tmp_path))
    delivery = Delivery([stored], keep=stored.keep)
    rng = np.random.default_rng(0)
    loud = np.tile(np.repeat([0, 3000, 0], [16_000, 6_400, 9_600]), 9)
    source = Chunks(cut((rng.standard_normal(len(loud)) * loud).astype(np.int16), HOP_SAMPLES))
    heard = listen(source, Pipeline(LoudIsOne(), Detector(enrolled, 0.2), PseudoLabels(enrolled)), delivery, "edge-3")
    delivery.close()

    store = Store(tmp_path)
    wakes = {event.id: event.time_s for event in store.events() if event.kind == "wake"}
    clips = [clip for clip in store.clips() if clip.label == "positive"]
    assert len(wakes) == heard.wakes and len(clips) > 9
    assert [wakes.get(clip.event) for clip in clips] == [clip.time_s for clip in clips]


@pytest.mark.parametrize("live", [True, False])
def test_a_near_miss_is_dated_when_it_was_spoken_but_in_a_file_never_before_the_run(live):
    clips = []
    delivery = Delivery([], keep=lambda clip, samples: clips.append(clip))
    enrolled = [Enrolled("loud", "ann", ONE, 1.5)]
    pipeline = Pipeline(LoudIsOne(), Detector(enrolled), PseudoLabels(enrolled))
    listen(Chunks(cut(seconds(0, 0, 1, 0, 0), HOP_SAMPLES), live), pipeline, delivery, "edge-3", now=lambda: 1000.0)
    delivery.close()

    assert {"between", "negative"} == {clip.label for clip in clips if clip.keyword}
    assert {clip.time_s < 1000.0 for clip in clips if clip.keyword} == {live}


def test_clips_that_were_lost_are_not_told_as_kept():
    """Those too that the disk refuses while the stop is on its way."""

    def keep(clip, samples):
        time.sleep(0.02)
        raise StoreError("the disk is full")

    kept, enrolled = Kept(), [Enrolled("loud", "ann", ONE, 0.5)]
    delivery = Delivery([kept], keep=keep)
    source = Chunks(cut(seconds(*[0, 1, 0, 0] * 4), HOP_SAMPLES))
    listen(source, Pipeline(LoudIsOne(), Detector(enrolled), PseudoLabels(enrolled)), delivery, "edge-3")
    delivery.close()
    stop = kept.events[-1]

    assert stop.extra["clips"]["cut"] > 0 and stop.extra["clips"]["lost"] == delivery.clips_dropped
    assert words(stop).endswith(f"0 clips kept to learn from, {delivery.clips_dropped} lost")


def test_a_wake_in_the_last_moment_of_a_stream_leaves_its_clip():
    kept, enrolled = [], [Enrolled("loud", "ann", ONE, 0.5)]
    delivery = Delivery([Kept()], keep=lambda clip, samples: kept.append((clip.label, len(samples))))
    samples = seconds(0, 1)[: 16 * HOP_SAMPLES]
    pipeline = Pipeline(LoudIsOne(), Detector(enrolled), PseudoLabels(enrolled))
    summary = listen(Chunks(cut(samples, HOP_SAMPLES)), pipeline, delivery, "edge-3")
    delivery.close()

    assert summary.wakes == 1 and kept == [("positive", len(samples))]


@pytest.mark.parametrize("live", [False, True])
def test_a_microphone_waits_for_no_sink_and_a_file_for_each(live):
    """Of a file no event is dropped where a sink is slow; live sound would be lost meanwhile."""
    asked = []

    class Queue:
        clips_dropped = 0

        def put(self, event, *, wait):
            asked.append((event.kind, wait))

    pipeline = Pipeline(LoudIsOne(), Detector([Enrolled("loud", "ann", ONE, 0.5)]))
    listen(Chunks(cut(seconds(0, 1), HOP_SAMPLES), live=live), pipeline, Queue(), "edge-3")

    assert asked == [("start", not live), ("wake", not live), ("stop", not live)]


def test_each_gap_is_an_event_and_all_are_counted_together():
    samples = seconds(0)
    summary, events = heard(Chunks([AudioChunk(samples, 0), AudioChunk(samples, 24_000, 8_000), AudioChunk(samples, 56_000, 16_000)]))

    gaps = [(e.stream_s, e.extra) for e in events if e.kind == "gap"]
    assert gaps == [(1.5, {"lost_ms": 500}), (3.5, {"lost_ms": 1000})]
    assert (summary.audio_s, summary.gaps, summary.lost_s) == (3.0, 2, 1.5)


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86_400, -3600, 3600, 10 * 365 * 86_400])
def test_a_clock_that_jumps_loses_nothing_and_the_log_keeps_the_order_of_what_was_heard(tmp_path, jump_s):
    """A board without a battery for its clock begins in 1970 and learns the time from the network."""
    store, ticks = Store(tmp_path), iter(range(10**6))
    delivery = Delivery([StoreSink(store)])
    pipeline = Pipeline(LoudIsOne(), Detector([Enrolled("loud", "ann", ONE, 0.5)]))
    samples = seconds(*[0, 1, 0, 0] * 4)

    def now():
        tick = next(ticks)
        return 1.7e9 + tick + (jump_s if tick > 2 else 0)

    heard = listen(Chunks(cut(samples, HOP_SAMPLES)), pipeline, delivery, "edge-3", now=now)
    delivery.close()

    events = Store(tmp_path).events()
    assert (heard.wakes, heard.gaps) == (4, 0)
    assert [event.kind for event in events] == ["start", *["wake"] * 4, "stop"]
    assert [event.stream_s for event in events] == sorted(event.stream_s for event in events)


def test_a_source_that_breaks_leaves_its_reason_behind():
    with pytest.raises(AudioError, match="unplugged"):
        heard(Chunks(cut(seconds(0), 1280), error=AudioError("unplugged")))

    assert [(e.kind, e.extra) for e in heard.events[1:]] == [("stop", {"error": "unplugged"})]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_source_and_the_next_one_is_as_before(number):
    before = signal.getsignal(number)
    source = Chunks([])
    with closed_by_signals(source.close):
        os.kill(os.getpid(), number)
        assert source.closed
        assert signal.getsignal(number) == before

    assert signal.getsignal(number) == before


def test_beside_the_main_thread_signals_are_left_alone():
    def use():
        with closed_by_signals(Chunks([]).close):
            done.append(1)

    done = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()

    assert done == [1]


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """What the service manager was told."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@edgekws-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + name[1:] if name[0] == "@" else name)
        ear.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "2")

        def told():
            lines = []
            while True:
                try:
                    lines += ear.recv(4096).decode().split("\n")
                except BlockingIOError:
                    return lines

        yield told


def test_the_service_manager_hears_of_start_progress_and_end(manager):
    heard(Chunks(cut(seconds(0)[: 5 * HOP_SAMPLES], HOP_SAMPLES)))
    told = manager()

    assert told[0] == "READY=1" and told[-1] == "STOPPING=1"
    assert told.count("WATCHDOG=1") == 5


def test_a_name_that_is_no_utf_8_is_told_to_the_service_manager(manager):
    ServiceManager().tell("READY=1", "STATUS=listening to file:t\udce4st.flac")

    assert manager() == ["READY=1", "STATUS=listening to file:t\\udce4st.flac"]


@pytest.mark.parametrize("uri", ["mic:default?ratee=48000", "micc:default"])
def test_a_service_does_not_wait_for_a_source_that_cannot_be(manager, uri):
    ended = threading.Event()
    threading.Timer(5.0, ended.set).start()
    with pytest.raises(UsageError):
        open_patiently(uri, ended)

    assert manager() == []


class Waits:
    """In place of the event that ends the waiting: how long was to be waited."""

    def __init__(self):
        self.pauses_s = []

    def wait(self, pause_s):
        self.pauses_s.append(pause_s)
        return len(self.pauses_s) > 6


@pytest.fixture
def no_microphone(monkeypatch):
    def none(uri):
        raise AudioError("there is no microphone here")

    monkeypatch.setattr("edgekws.daemon.open_source", none)


def test_who_waits_for_a_microphone_feeds_the_watchdog_at_each_attempt_and_rests_longer_each_time(manager, no_microphone):
    waits, deaf = Waits(), []

    assert open_patiently("mic:default", waits, deaf.append) is None
    assert waits.pauses_s == [0.0, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0] and deaf == ["there is no microphone here"]
    assert manager().count("WATCHDOG=1") == 6


def test_without_a_service_manager_nobody_waits_for_a_microphone(no_microphone, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    with pytest.raises(AudioError, match="no microphone"):
        open_patiently("mic:default", Waits())


class Deaf(Chunks):
    """Deaf for a while between its first chunk and the others."""

    def chunks(self):
        first, *others = self._chunks
        yield first
        self.on_deaf("unplugged")
        yield from others


def test_the_attempt_to_reopen_feeds_the_watchdog(manager, monkeypatch):
    """Progress may have fed it half its time ago: what is left of that would not last until the microphone is given up."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    samples = seconds(0)
    heard(Deaf([AudioChunk(samples, 0), AudioChunk(samples, 24_000, 8_000)]))
    told = manager()

    (at,) = [i for i, line in enumerate(told) if line == "WATCHDOG=1"]
    assert told[at + 1].startswith("STATUS=deaf since ")


def test_deafness_is_an_event_and_a_status_until_it_hears_again(manager):
    samples = seconds(0)
    _, events = heard(Deaf([AudioChunk(samples, 0), AudioChunk(samples, 24_000, 8_000)]))
    told = [line for line in manager() if line.startswith("STATUS=")]

    assert [(event.kind, event.stream_s, event.extra) for event in events[1:3]] == [
        ("deaf", 1.0, {"reason": "unplugged"}),
        ("gap", 1.5, {"lost_ms": 500}),
    ]
    assert told[1].startswith("STATUS=deaf since ") and told[1].endswith(": unplugged")
    assert told[2].startswith("STATUS=listening to chunks: with edge-3") and "1 gaps of 0.50 s in all" in told[2]


def test_since_when_it_is_deaf_is_told_with_the_date_as_it_may_be_read_weeks_later(manager):
    heard(Deaf([AudioChunk(seconds(0), 0)]), now=lambda: datetime(2026, 11, 8, 22, 10, 49).timestamp())

    assert "STATUS=deaf since 2026-11-08 22:10:49: unplugged" in manager()


MUTE = [0] * (round(MUTE_S) + 1)


def test_minutes_of_digital_silence_are_deafness_until_the_first_sound_and_no_hang(manager, caplog):
    source, status = Chunks(cut(seconds(1, *MUTE, 1, 0), HOP_SAMPLES), live=True), Status()
    source.uri = "mic:default"
    hears, told = [], []

    def clock():
        hears.append(status.listening())
        told.extend(manager())
        return 0.0

    summary, events = heard(source, status=status, clock=clock)

    deaf, again = [event for event in events if event.kind in ("deaf", "gap")]
    assert (deaf.kind, round(deaf.stream_s)) == ("deaf", MUTE_S + 1) and "is it muted?" in deaf.extra["reason"]
    assert (again.kind, again.stream_s, again.extra) == ("gap", MUTE_S + 2, {"lost_ms": 0, "reason": "sound again"})
    assert words(again) == "gap: sound again"
    assert (summary.gaps, status.gaps, status.lost_s) == (0, 0, 0.0)
    assert hears.count(False) > 10 and status.listening()
    assert [*told, *manager()].count("WATCHDOG=1") == (MUTE_S + 4) * SAMPLE_RATE_HZ // HOP_SAMPLES  # a mute is no hang
    assert any(line.startswith("STATUS=deaf on mic:default with edge-3, level silence") for line in told)
    assert [message.split("?")[0] for message in caplog.messages] == [
        "mic:default: only digital silence for 300 s: is it muted",
        "mic:default: sound again",
    ]


def test_a_microphone_that_comes_back_muted_is_told_again():
    silence, more = seconds(*MUTE), seconds(0)
    source = Chunks([*cut(silence, HOP_SAMPLES), AudioChunk(more, len(silence) + 1600, 1600)], live=True)
    source.uri = "mic:default"

    assert [event.kind for event in heard(source)[1]] == ["start", "deaf", "gap", "deaf", "stop"]


def test_a_pipe_of_digital_silence_is_deaf_as_a_microphone_is():
    """arecord goes on writing zeros from a muted card."""
    source = Chunks(cut(seconds(1, *MUTE), HOP_SAMPLES), live=True)
    source.uri = "stdin:"

    assert [event.kind for event in heard(source)[1]][-2:] == ["deaf", "stop"]


@pytest.mark.parametrize("value", [-1, 983])
def test_a_microphone_that_is_stuck_at_a_value_is_deaf_as_a_muted_one_is(value):
    source, status = Chunks(cut(np.concatenate([seconds(1), seconds(*MUTE) + np.int16(value)]), HOP_SAMPLES), live=True), Status()
    source.uri = "mic:default"

    assert [event.kind for event in heard(source, status=status)[1]][-2:] == ["deaf", "stop"]
    assert "level silence" in status.line()


def test_a_constant_offset_is_no_level():
    status = Status()
    status.heard((np.tile([33, -33], 640) + 9000).astype(np.int16))

    assert status.level_dbfs() == -59.9


def test_silence_in_a_file_and_a_noise_of_one_step_are_no_deafness():
    for uri, samples in (("file:a.wav?paced=1", seconds(*MUTE)), ("mic:default", np.tile([0, 1], 160 * SAMPLE_RATE_HZ).astype(np.int16))):
        source = Chunks(cut(samples, HOP_SAMPLES), live=True)
        source.uri = uri

        assert [event.kind for event in heard(source)[1]] == ["start", "stop"]


def test_the_status_line_tells_level_and_last_wake():
    status = Status(now=lambda: 0.0)
    heard(Chunks(cut(seconds(0, 1, 1), HOP_SAMPLES)), now=lambda: 0.0, status=status)

    wanted = r"level -\d\d\.\d dBFS, 1 wakes, the last \"loud\" at \d\d:\d\d:\d\d, 0 gaps of 0.00 s in all, 0 events dropped"
    assert re.search(wanted, status.line())


def test_the_last_wake_is_told_with_its_date_unless_that_is_today_s():
    time_s = [datetime(2026, 11, 8, 22, 10, 49).timestamp()]
    status = Status(now=lambda: time_s[0])
    heard(Chunks(cut(seconds(0, 1, 1), HOP_SAMPLES)), now=lambda: time_s[0], status=status)
    same_day = status.line()
    time_s[0] = datetime(2026, 11, 9).timestamp()

    assert 'the last "loud" at 22:10:49, ' in same_day and 'the last "loud" at 2026-11-08 22:10, ' in status.line()


@pytest.mark.parametrize("size", [160, HOP_SAMPLES])
def test_the_level_is_that_of_the_last_second_in_whatever_pieces_it_comes(size):
    status = Status(lambda: 0.0)
    for peak, seconds in ((30_000, 2.0), (3277, 0.5), (0, 0.5)):
        for chunk in cut(np.resize([peak, -peak], round(seconds * SAMPLE_RATE_HZ)).astype(np.int16), size):
            status.heard(chunk.samples)

    assert status.level_dbfs() == pytest.approx(-23, abs=0.5)


def test_a_level_of_before_it_was_deaf_is_not_that_of_now():
    clock = iter([0.0, DEAF_S - 0.1, DEAF_S])
    status = Status(lambda: next(clock))
    status.heard(np.tile([3277, -3277], 640).astype(np.int16))

    assert (status.level_dbfs(), status.level_dbfs()) == (-20.0, None)


def test_after_deafness_the_service_manager_is_told_the_level_that_is_heard(manager):
    clock = [0.0]

    def chunks():
        yield AudioChunk(seconds(1), 0)
        clock[0] += 3600
        yield AudioChunk(seconds(1), 24_000, 8_000)

    heard(Chunks(chunks()), status=Status(lambda: clock[0]))
    (line,) = [line for line in manager() if line.startswith("STATUS=listening to chunks: with")]

    assert re.search(r"level -\d\d\.\d dBFS", line)


def test_without_progress_the_watchdog_starves(manager):
    service = ServiceManager()
    service.progress(1, str)
    for _ in range(3):
        service.progress(1, str)

    assert manager() == ["WATCHDOG=1"]


def test_the_watchdog_is_fed_twice_in_the_time_that_it_is_given(manager, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    service, fed_s = ServiceManager(), []
    for hop in range(1, 12_000):
        now_s[0] += 0.01
        service.progress(hop, str)
        if "WATCHDOG=1" in manager():
            fed_s.append(now_s[0] - 100)

    assert fed_s == pytest.approx([15, 30, 45, 60, 75, 90, 105], abs=0.1)


def test_a_manager_that_does_not_read_stops_nobody(manager):
    heard(Chunks(cut(seconds(0, 0, 0), HOP_SAMPLES)))


def test_without_a_service_manager_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    ServiceManager().tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    ServiceManager().tell("READY=1")
