import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgekws
from edgekws.audio import read_recording
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.enrolment import bundled, enrol
from edgekws.errors import AudioError, ConfigError, EnrolmentError, ModelError
from edgekws.frontend import LogMel
from edgekws.model import find_model, load_model, rewrite_manifest, write_manifest
from edgekws.pipeline import Hop, Pipeline
from edgekws.promotion import (
    CALM_HOPS,
    FAILED_BOOTS,
    FAILED_STARTS,
    PATIENCE_HOPS,
    WAKES_P,
    WATCHED_S,
    Awaited,
    Newcomer,
    Updates,
    Version,
    boot,
    flaw,
    more_often,
    start_counted,
    worse,
)
from edgekws.pseudo_labels import PseudoLabels
from edgekws.store import ADAPTED, GENERATIONS, Store, load_enrolled, save_enrolled
from edgekws.values import HOP_SAMPLES, AudioChunk, Clip, Enrolled, Event

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
STREAM = read_recording(DEMO / "stream.flac")
HOPS = list(STREAM[: len(STREAM) // HOP_SAMPLES * HOP_SAMPLES].reshape(-1, HOP_SAMPLES))


class AtOnce(Executor):
    """In place of the thread, so that a test knows at which hop a switch comes."""

    def submit(self, call, *arguments):
        done = Future()
        try:
            done.set_result(call(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(scope="module")
def word():
    """The demo's keyword as each model hears it."""
    takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
    kept = {}

    def make(model):
        files = str(model.raw["files"])
        if files not in kept:
            kept[files] = enrol(TRUTH["keyword"], "ann", takes, load_engine(model), model)
        return kept[files]

    return make


def a_copy(folder, id, name="edge", **fields):
    """A packaged model under another id."""
    path = shutil.copytree(find_model(name), folder / id)
    raw = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**raw, "id": id, **fields})
    return path


class Listener:
    """What the daemon does with a stream, hop by hop. Its clock stands at the stream's time."""

    def __init__(self, store, word, worker=None, keeps_clips=False):
        self.store, self.word = store, word
        self.heard, self.events, self.reread = [], [], []
        self.at = 0
        version = self.load(False)
        self.updates = Updates(
            version,
            self.load,
            Store(store.root),
            store.enrolment_stamp(),
            version_of=self.version_of,
            worker=worker or AtOnce(),
            clock=lambda: self.at * 0.08,
            now=lambda: 1e9 + self.at * 0.08,
        )
        self.pipeline = Pipeline(version.engine, version.detector, PseudoLabels(version.detector.enrolled) if keeps_clips else None)

    def load(self, reread):
        self.reread.append(reread)
        return self.version_of(self.store.current_model())

    def version_of(self, path):
        model = load_model(path or find_model())
        adapted = load_enrolled(model.path / ADAPTED).values() if ADAPTED in model.raw["files"] else [self.word(model)]
        return Version(model, load_engine(model), Detector(list(adapted)))

    def hear(self, hops):
        for hop in hops:
            self.heard += self.pipeline.feed(AudioChunk(hop, self.at * HOP_SAMPLES))
            self.at += 1
            self.events += self.updates.step(self.pipeline, self.at * 0.08)
        return self

    @property
    def whats(self):
        return [event.extra["what"] for event in self.events]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


@pytest.fixture
def listener(store, word):
    return Listener(store, word)


@pytest.fixture(scope="module")
def without(tmp_path_factory, word):
    """Where the demo's words wake the packaged model when nothing is exchanged."""
    store = Store(tmp_path_factory.mktemp("none"))
    ends = [one.end_sample for one in Listener(store, word).hear(HOPS).heard]
    assert len(ends) == len(TRUTH["spoken"])
    return ends


def test_a_promoted_version_listens_from_a_hop_on_and_its_events_carry_its_name(listener, store):
    listener.hear(HOPS[:40])
    store.promote(find_model("edge-small"), "edge-small-4")
    listener.hear(HOPS[40:])

    (event,) = listener.events
    assert (event.kind, event.model, event.extra["what"], event.extra["before"]) == ("model", "edge-small-4", "live", "edge-3")
    assert event.extra["hops"] >= 25 and event.extra["score_difference_max"] > 0
    assert 40 <= event.stream_s / 0.08 <= 50
    assert listener.updates.model == "edge-small-4" == load_model(store.current_model()).id
    assert listener.pipeline.hops == len(HOPS)
    assert len(listener.heard) == len(TRUTH["spoken"])


@pytest.mark.parametrize("word_number", range(3))
def test_an_exchange_at_any_hop_of_a_word_loses_and_doubles_nothing(store, word, without, word_number, tmp_path):
    """From 1.2 s before the wake to 0.8 s after it, there and back between two models that hear the word at different hops."""
    other = a_copy(tmp_path, "other", "edge-small")
    wake = without[word_number] // HOP_SAMPLES
    for at in range(wake - 15, wake + 10):
        listener = Listener(store, word).hear(HOPS[max(0, wake - 60) : at])
        assert listener.updates.model == "edge-3"
        store.promote(other, "other")
        listener.hear(HOPS[at : wake + 25])
        assert listener.updates.model == "other"
        assert len(listener.heard) == 1, at
        store.rollback()


def test_the_newcomer_is_warm_bit_for_bit(listener, store, without, tmp_path, word):
    """The same weights under another name: every score after the switch is that of a listener that never switched."""
    listener.hear(HOPS[:40])
    store.promote(a_copy(tmp_path, "twin"), "twin")
    steady = Listener(Store(tmp_path / "steady"), word).hear(HOPS[:40])
    for hop in HOPS[40:]:
        assert listener.hear([hop]).pipeline.detector.latest == steady.hear([hop]).pipeline.detector.latest

    assert listener.updates.model == "twin"
    assert [one.end_sample for one in listener.heard] == without


def test_refractory_time_holds_across_the_exchange(store, word, without, tmp_path):
    """The word's audio again right after its wake and the switch: 2 s are not over."""
    listener = Listener(store, word)
    wake = without[0] // HOP_SAMPLES
    listener.hear(HOPS[:wake])
    store.promote(a_copy(tmp_path, "twin"), "twin")
    listener.hear(HOPS[wake : wake + 10])
    assert (listener.whats, len(listener.heard)) == (["live"], 1)

    listener.hear(HOPS[wake - 12 : wake + 2])
    assert len(listener.heard) == 1
    listener.hear(HOPS[wake - 30 : wake + 2])
    assert len(listener.heard) == 2


class Late:
    """A real engine whose word is heard four hops later."""

    def __init__(self, engine):
        self.name, self.precision, self.dim, self.engine, self.line = engine.name, engine.precision, engine.dim, engine, []

    def step(self, frames):
        self.line = [*self.line[-4:], self.engine.step(frames)]
        return self.line[0]

    def reset(self):
        self.engine.reset()

    def close(self):
        self.engine.close()


def test_no_word_falls_between_a_newcomer_that_is_quicker_and_the_version_in_use(store, word, without, tmp_path):
    wake = without[0] // HOP_SAMPLES
    twin = a_copy(tmp_path, "twin")
    for at in range(wake - 5, wake + 10):
        listener = Listener(store, word)
        listener.pipeline.engine = Late(listener.pipeline.engine)
        listener.hear(HOPS[wake - 60 : at])
        store.promote(twin, "twin")
        listener.hear(HOPS[at : wake + 25])
        assert (listener.updates.model, len(listener.heard)) == ("twin", 1), at
        store.rollback()


@pytest.mark.parametrize("ready", [False, True], ids=["before it is loaded", "while it waits"])
def test_after_a_gap_nothing_from_before_it_counts_in_either_version(listener, store, tmp_path, word, ready):
    listener.hear(HOPS[:30])
    store.promote(a_copy(tmp_path, "twin"), "twin")
    if ready:
        listener.hear(HOPS[30:31])
    listener.heard += listener.pipeline.feed(AudioChunk(HOPS[0][:0], 40 * HOP_SAMPLES, gap_samples=9 * HOP_SAMPLES))
    listener.at = 40
    fresh = Listener(Store(tmp_path / "fresh"), word)
    for hop in HOPS[40:80]:
        assert listener.hear([hop]).pipeline.detector.latest == fresh.hear([hop]).pipeline.detector.latest

    assert listener.whats == ["live"]


def test_a_gap_begins_the_rest_of_a_newcomer_anew():
    one = Enrolled("hey", "ann", np.array([[1.0, 0.0]], np.float32), 0.5)
    newcomer = Newcomer(Version(None, Engine(np.array([0.0, 1.0], np.float32)), Detector([one])))
    frames = np.zeros((4, 40), np.float32)
    newcomer.follow([Hop(i, frames, -1.0) for i in range(1, 31)])
    assert newcomer.calm_hops == 30
    newcomer.follow([Hop(31 + i, frames, -1.0) for i in range(2)])  # all that came since a gap

    assert newcomer.calm_hops == 2


def test_no_version_goes_live_between_a_gap_and_the_first_hop_after_it(listener, store, tmp_path):
    listener.hear(HOPS[:40])
    store.promote(a_copy(tmp_path, "twin"), "twin")
    listener.hear(HOPS[40:41])  # it is loaded
    listener.pipeline.feed(AudioChunk(HOPS[0][:0], 50 * HOP_SAMPLES, gap_samples=9 * HOP_SAMPLES))

    assert listener.updates.step(listener.pipeline, 50 * 0.08) == [] and listener.updates.model == "edge-3"


def damaged(path):
    with (path / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xa5" * 100)


def no_graph(path):
    """Whole by its sums, but ONNX Runtime cannot read it."""
    (path / "model.onnx").write_bytes(b"no graph")
    write_manifest(path, json.loads((path / "manifest.json").read_text()))


def other_numbers(path):
    with np.load(path / "parity.npz") as data:
        np.savez(path / "parity.npz", frames=data["frames"], embeddings=-data["embeddings"])
    write_manifest(path, json.loads((path / "manifest.json").read_text()))


def no_numbers(path):
    with np.load(path / "parity.npz") as data:
        np.savez(path / "parity.npz", frames=data["frames"] * np.nan, embeddings=data["embeddings"] * np.nan)
    write_manifest(path, json.loads((path / "manifest.json").read_text()))


def no_zip(path):
    (path / "parity.npz").write_bytes(b"PK")
    write_manifest(path, json.loads((path / "manifest.json").read_text()))


def no_manifest(path):
    (path / "manifest.json").write_text("{")


FAULTS = {damaged: "altered", no_graph: "refuses", other_numbers: "golden", no_numbers: "nan", no_zip: "", no_manifest: "JSON"}


@pytest.mark.parametrize(("fault", "said"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_a_broken_version_is_refused_once_and_the_listener_goes_on(listener, store, tmp_path, without, fault, said):
    listener.hear(HOPS[:40])
    promoted = store.promote(a_copy(tmp_path, "bad"), "bad")
    fault(promoted)
    listener.hear(HOPS[40:])

    (event,) = listener.events
    assert (event.model, event.extra["what"], event.extra["version"]) == ("edge-3", "refused", "bad")
    assert said in event.extra["reason"]
    assert event.extra["back_to"] == "the configured model" and store.current_model() is None
    assert [one.end_sample for one in listener.heard] == without
    assert listener.reread == [False, False]


def test_a_refused_version_is_tried_again_only_once_it_has_changed(listener, store, tmp_path):
    good = a_copy(tmp_path, "bad")
    promoted = store.promote(good, "bad")
    damaged(promoted)
    listener.hear(HOPS[:60])
    assert listener.whats == ["refused"]

    (store.root / "models" / "current").symlink_to("bad")  # made current again by hand, as broken as before
    listener.hear(HOPS[60:120])
    assert (listener.whats, len(listener.reread)) == (["refused"], 2)

    store.promote(good, "bad")  # a whole copy mends the one here
    listener.hear(HOPS[120:180])
    assert listener.whats == ["refused", "live"] and listener.updates.model == "bad"


def test_a_version_that_has_a_flaw_does_not_go_live(listener, store, tmp_path, monkeypatch):
    monkeypatch.setattr(edgekws.promotion, "flaw", lambda version: "it wakes at noise of -50 dBFS")
    listener.hear(HOPS[:40])
    store.promote(a_copy(tmp_path, "new"), "new")
    listener.hear(HOPS[40:60])

    assert [(one.extra["what"], one.extra["reason"]) for one in listener.events] == [("refused", "it wakes at noise of -50 dBFS")]
    assert (store.current_model(), listener.updates.model) == (None, "edge-3")


def test_a_version_is_not_to_blame_that_it_does_not_hear_who_was_removed_a_moment_ago(store, word, tmp_path):
    """A promotion is noticed at once, a removal a second later."""
    store.save_enrolment("hey", "bob", [np.ones(16_000, np.int16)])
    listener = Listener(store, word)
    live = listener.updates._live
    (one,) = live.detector.enrolled
    both = Detector([one, dataclasses.replace(one, keyword="hey", speaker="bob")])
    listener.updates._live = dataclasses.replace(live, detector=both)
    listener.hear(HOPS[:40])
    store.remove_enrolment("hey")
    clip = Clip("positive", "hey", "bob", 1.0, 16_000, 0.0, "woke", model="edge-3", time_s=store._now())
    store.add_clip(clip, np.ones(32_000, np.int16))  # of a wake between the removal and the switch
    store.promote(a_copy(tmp_path, "new"), "new")
    listener.hear(HOPS[40:80])

    assert (listener.updates.model, store.current_model().name, store.clips()) == ("new", "new", [])


def test_a_version_that_cannot_hear_a_keyword_any_more_does_not_go_live(listener, store, tmp_path):
    load = listener.load

    def without_it(reread):
        version = load(reread)
        other = [dataclasses.replace(one, keyword="other") for one in version.detector.enrolled]
        return dataclasses.replace(version, detector=Detector(other))

    listener.hear(HOPS[:40])
    listener.updates._load = without_it
    store.promote(a_copy(tmp_path, "new"), "new")
    listener.hear(HOPS[40:60])

    assert listener.whats == ["refused"] and 'it cannot hear "open sesame" any more' in listener.events[0].extra["reason"]
    assert (store.current_model(), listener.updates.model) == (None, "edge-3")


class Engine:
    """A network with a fault that no honest training gives at will: `says` its embedding, whatever it hears."""

    name, precision, dim = "faulty", "fp32", 384

    def __init__(self, says):
        self.says = says

    def step(self, frames):
        return self.says

    def reset(self):
        pass

    def close(self):
        pass


def test_a_version_that_wakes_at_ambience_or_says_no_number_is_refused(word):
    model = load_model(find_model())
    enrolled = word(model)
    for says, said in ((enrolled.prototypes[0], "wakes at noise"), (np.full(384, np.nan, np.float32), "not a number")):
        assert said in flaw(Version(model, Engine(says), Detector([enrolled])))


@pytest.mark.parametrize("wakes_at_dbfs", [-70, -50])
def test_a_version_that_wakes_at_a_quiet_room_or_at_a_fan_alone_is_refused(word, wakes_at_dbfs):
    model = load_model(find_model())
    enrolled = word(model)
    noise = np.random.default_rng(1).standard_normal(HOP_SAMPLES) * 32768
    between = LogMel().hop(np.round(noise * 10 ** (-60 / 20)).astype(np.int16)).mean()

    class Wakes(Engine):
        def step(self, frames):
            return self.says if (frames.mean() > between) == (wakes_at_dbfs == -50) else -self.says

    assert flaw(Version(model, Wakes(enrolled.prototypes[0]), Detector([enrolled]))) == f"it wakes at noise of {wakes_at_dbfs} dBFS"


@pytest.mark.parametrize("name", ["edge", "edge-small", "edge-tiny", "ds-cnn-l"])
def test_the_packaged_models_have_no_flaw(name, word):
    model = load_model(find_model(name))
    assert flaw(Version(model, load_engine(model), Detector([word(model), *bundled(model)]))) is None


def out_of_memory(frames):
    raise RuntimeError("out of memory")


def no_number(frames):
    """It would be deaf: a score that is no number is above no threshold."""
    return np.full(384, np.nan, np.float32)


@pytest.mark.parametrize(("broken", "said"), [(out_of_memory, "out of memory"), (no_number, "its embedding is not a number")])
def test_a_newcomer_that_fails_while_it_waits_is_refused(listener, store, tmp_path, broken, said):
    """As the memory of a GPU may run out."""
    listener.hear(HOPS[:40])
    store.promote(a_copy(tmp_path, "new"), "new")
    listener.hear(HOPS[40:41])
    listener.updates._work.result().newcomer.version.engine.step = broken
    listener.hear(HOPS[41:60])

    assert said in listener.events[0].extra["reason"] and listener.whats == ["refused"]
    assert (store.current_model(), listener.updates.model, listener.pipeline.hops) == (None, "edge-3", 60)


def test_who_promotes_meanwhile_keeps_that_where_the_version_before_is_refused(listener, store, tmp_path):
    listener.hear(HOPS[:40])
    store.promote(a_copy(tmp_path, "bad"), "bad")
    listener.hear(HOPS[40:41])
    listener.updates._work.result().newcomer.version.engine.step = out_of_memory
    store.promote(a_copy(tmp_path, "mended"), "mended")
    listener.hear(HOPS[41:60])

    assert listener.whats == ["refused", "live"] and "back_to" not in listener.events[0].extra
    assert listener.updates.model == store.current_model().name == "mended"


def test_a_collapsed_embedding_is_refused(tmp_path, word):
    path = a_copy(tmp_path, "collapsed")
    with np.load(path / "parity.npz") as data:
        same = np.tile(data["embeddings"][:1], (len(data["embeddings"]), 1))
        np.savez(path / "parity.npz", frames=data["frames"], embeddings=same)
    write_manifest(path, json.loads((path / "manifest.json").read_text()))
    model, enrolled = load_model(path), word(load_model(find_model()))

    assert "hardly depends on the audio" in flaw(Version(model, Engine(same[0]), Detector([enrolled])))


def test_a_version_that_is_restless_in_this_room_is_refused_and_gone_back_from(listener, store, tmp_path, monkeypatch):
    """Above its threshold in every other hop."""
    load = listener.load

    def restless(reread):
        version = load(reread)
        one = version.detector.enrolled[0]
        scores = sorted(listener.margins)
        low = type(one)(**{**one.__dict__, "threshold": one.threshold + scores[len(scores) // 2]})  # its median
        return Version(version.model, version.engine, Detector([low]))

    listener.hear(HOPS[:100])
    listener.margins = [hop.margin for hop in listener.pipeline.recent]
    monkeypatch.setattr(edgekws.promotion, "flaw", lambda version: None)
    listener.updates._load = restless
    store.promote(a_copy(tmp_path, "restless"), "restless")
    listener.hear(HOPS[100:160])

    (event,) = listener.events
    assert event.extra["what"] == "refused" and "above its threshold in" in event.extra["reason"]
    assert store.current_model() is None and listener.updates.model == "edge-3"


@pytest.mark.parametrize(
    ("own", "other", "refused"),
    [
        ([1.0] * 10 + [-1.0] * 30, [-1.0] * 40, False),  # a word
        ([1.0] * 11 + [-1.0] * 29, [-1.0] * 40, True),
        ([1.0] * 40, [1.0] * 40, False),  # the version in use is as restless here
        ([0.0] * 40, [-0.1] * 40, True),
    ],
)
def test_a_newcomer_is_restless_above_its_threshold_in_a_quarter_of_the_hops_where_the_version_in_use_is_not(own, other, refused):
    newcomer = Newcomer(Version(None, None, Detector([])))
    newcomer.margins = own
    newcomer.compare([Hop(i, np.zeros((4, 40), np.float32), margin) for i, margin in enumerate(other, 1)])

    assert (newcomer.flaw is not None) == refused


def test_a_newcomer_that_never_comes_to_rest_is_refused_in_the_end_and_the_next_is_taken_up(listener, store, tmp_path, monkeypatch):
    """What waits for it waits too: removals and enrolments as well."""
    load = listener.load

    def restless(reread):
        version = load(reread)
        low = [dataclasses.replace(one, threshold=-1e9) for one in version.detector.enrolled]
        return dataclasses.replace(version, detector=Detector(low))

    monkeypatch.setattr(edgekws.promotion, "flaw", lambda version: None)
    monkeypatch.setattr(edgekws.promotion, "RESTLESS", 1.0)
    listener.hear(HOPS[:40])
    listener.updates._load = restless
    store.promote(a_copy(tmp_path, "restless"), "restless")
    listener.hear((HOPS * 2)[40 : 40 + PATIENCE_HOPS + 20])
    assert listener.whats == ["refused"] and f"for {CALM_HOPS} hops in a row" in listener.events[0].extra["reason"]

    listener.updates._load = load
    store.promote(a_copy(tmp_path, "calm"), "calm")
    assert listener.hear(HOPS[:60]).updates.model == "calm"


def test_a_new_enrolment_is_taken_up_and_a_failed_one_is_said(listener, store):
    listener.hear(HOPS[:30])
    store.save_enrolment("hey", "ann", [HOPS[0]])
    listener.hear(HOPS[30:75])
    assert (listener.whats, listener.updates.model) == (["reloaded"], "edge-3")

    def nothing(reread):
        raise EnrolmentError("there is nothing to listen for")

    listener.updates._load = nothing
    store.remove_enrolment("hey")
    listener.hear(HOPS[75:150])
    assert listener.whats == ["reloaded", "refused"] and "nothing to listen for" in listener.events[-1].extra["reason"]
    assert listener.hear(HOPS[150:]).whats == ["reloaded", "refused"]


def test_a_version_with_nothing_to_listen_for_wakes_at_nothing_until_there_is_something_again(listener, store):
    def nothing(reread):
        model = load_model(find_model("edge-small"))
        return Version(model, load_engine(model), Detector([]))

    load, listener.updates._load = listener.load, nothing
    listener.hear(HOPS[:30])
    store.save_enrolment("hey", "ann", [HOPS[0]])
    listener.hear(HOPS)
    assert listener.heard == []

    listener.updates._load = load
    store.remove_enrolment("hey")
    listener.hear(HOPS[:40]).hear(HOPS)
    assert len(listener.heard) == len(TRUTH["spoken"])
    assert [event.extra.get("reason") for event in listener.events] == ["there is nothing to listen for", None]
    assert all(json.dumps(event.extra, allow_nan=False) for event in listener.events)  # SQLite reads no infinite difference of scores


def test_of_a_removed_voice_nothing_is_kept_that_woke_before_the_listener_knew(store, word):
    """Its clips of before went with it; three of the stream's five words wake while the removal is not seen yet."""
    listener = Listener(store, word, keeps_clips=True)
    store.save_enrolment(TRUTH["keyword"], "ann", [HOPS[0]])
    listener.hear(HOPS[:1])
    store.remove_enrolment(TRUTH["keyword"])
    listener.updates._look_around_s = 17.0  # as where the machine is too busy to look
    listener.updates._load = lambda reread: Version(listener.updates._live.model, load_engine(load_model(find_model())), Detector([]))
    kept = 0
    for hop in HOPS[1:]:
        listener.hear([hop])
        for cut in listener.pipeline.cuts:
            store.add_clip(dataclasses.replace(cut.clip, time_s=time.time()), cut.samples)
            kept += 1
        listener.pipeline.cuts.clear()

    assert (listener.whats, len(listener.heard)) == (["reloaded"], 3) and kept >= 3
    assert store.clips() == [] and list((store.root / "clips").iterdir()) == []


def test_a_reload_reads_settings_again_and_broken_ones_change_nothing(listener, store, tmp_path):
    listener.hear(HOPS[:30])
    listener.updates.reload()
    listener.hear(HOPS[30:60])
    assert (listener.whats, listener.reread) == (["reloaded"], [False, True])

    def broken(reread):
        raise ConfigError("unknown key")

    store.promote(a_copy(tmp_path, "new"), "new")
    listener.updates._load = broken
    listener.updates.reload()
    listener.hear(HOPS[60:90])
    assert listener.whats == ["reloaded", "refused"]
    assert store.current_model().name == "new"  # the settings were at fault, not the version


def test_what_was_promoted_while_the_listener_started_is_not_missed(store, word, tmp_path):
    listener = Listener(store, word)
    version = listener.load(False)
    store.promote(a_copy(tmp_path, "new"), "new")
    clock = {"worker": AtOnce(), "clock": lambda: listener.at * 0.08}
    listener.updates = Updates(version, listener.load, Store(store.root), store.enrolment_stamp(), **clock)

    assert listener.hear(HOPS[:60]).updates.model == "new"


def test_a_fault_of_ours_on_the_thread_does_not_end_the_listening(listener, store, monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(listener.updates, "_steady", broken)
    listener.at = 1000

    assert listener.hear(HOPS).events == []


def test_1000_exchanges_in_short():
    """20 of them, by the benchmark itself, with its thread."""
    script = Path(__file__).parent.parent / "benchmarks" / "swap.py"
    env = {**os.environ, "PYTHONPATH": str(Path(edgekws.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, "--swaps", "20", "--fast"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    assert [row["swaps"] for row in rows] == [20] * len(rows) and len(rows) == 2
    for row in rows:
        assert (row["lost_hops"], row["lost_wakes"], row["doubled_wakes"]) == (0, 0, 0)
        assert row["words"] > 20


# Starting.


def fails(*bad):
    def load(path):
        if (path.name if path else None) in bad:
            raise ModelError(f"{path}: altered")
        return path

    return load


def test_a_start_takes_the_promoted_version_or_the_one_before_it_or_the_default(store, tmp_path):
    one, two = (store.promote(a_copy(tmp_path, name), name) for name in ("one", "two"))

    assert boot(store, fails()) == two and store.current_model() == two
    assert boot(store, fails("two")) == one == store.current_model()
    assert boot(store, fails("one")) is None is store.current_model()
    assert [(e.model, e.extra["what"], e.extra["back_to"]) for e in store.events()] == [
        ("two", "rolled back", "one"),
        ("one", "rolled back", "the configured model"),
    ]


@pytest.mark.parametrize("failed_starts", [0, FAILED_STARTS])
def test_two_services_that_start_at_once_go_back_once(store, tmp_path, failed_starts):
    """The other is done with it while this one loads the bad version, or counts."""
    one = [store.promote(a_copy(tmp_path, name), name) for name in ("zero", "one", "two")][1]
    other = Store(store.root)
    for _ in range(failed_starts):
        store.count_start()

    def load(path):
        if path and path.name == "two":
            assert boot(other, fails("two"), counted=False) == one
        return fails("two")(path)

    if failed_starts:
        count, store.count_start = store.count_start, lambda: (count(), boot(other, fails("two"), counted=False))[0]

    assert boot(store, load) == one == store.current_model()
    assert [event.extra["back_to"] for event in store.events()] == ["one"]


def test_where_no_version_loads_the_promoted_one_stays_and_its_reason_is_told(store, tmp_path):
    """An engine that is missing here is no fault of a version."""
    two = [store.promote(a_copy(tmp_path, name), name) for name in ("one", "two")][1]
    with pytest.raises(ModelError, match="two: altered"):
        boot(store, fails("one", "two", None))

    assert store.current_model() == two


def test_after_three_failed_starts_the_version_before_boots(store, tmp_path):
    one, two = (store.promote(a_copy(tmp_path, name), name) for name in ("one", "two"))
    for _ in range(FAILED_STARTS):
        assert boot(store, fails()) == two

    assert boot(store, fails()) == one
    assert "3 starts in a row" in store.events()[0].extra["reason"]
    for _ in range(FAILED_STARTS - 1):
        assert boot(store, fails()) == one


def test_a_start_that_does_not_count_leaves_the_count_as_it_was(store, tmp_path):
    store.promote(a_copy(tmp_path, "one"), "one")
    for _ in range(FAILED_STARTS + 1):
        assert boot(store, fails(), counted=False).name == "one"

    assert store.count_start() == 0


@pytest.fixture
def boots(tmp_path, monkeypatch):
    """Each call is a boot of the machine."""
    path = tmp_path / "boot_id"
    monkeypatch.setattr("edgekws.store.BOOT_ID", path)
    numbers = itertools.count(1)
    return lambda: path.write_text(f"boot-{next(numbers)}\n")


def test_who_cuts_the_power_within_a_minute_again_and_again_loses_no_version(store, tmp_path, boots):
    two = [store.promote(a_copy(tmp_path, name), name) for name in ("one", "two")][1]
    for _ in range(FAILED_BOOTS):
        boots()
        assert boot(store, fails()) == two
    store.clear_starts()  # this time it listened for a minute
    for _ in range(FAILED_BOOTS + 1):
        boots()
        assert boot(store, fails()) == two
        store.start_waits().__enter__()  # and these were cut while they waited for the microphone


@pytest.mark.parametrize("starts", [1, 2])
def test_a_version_with_which_no_boot_lasts_a_minute_is_gone_back_from(store, tmp_path, boots, starts):
    """As one that takes the whole board with it."""
    one, two = (store.promote(a_copy(tmp_path, name), name) for name in ("one", "two"))
    for _ in range(FAILED_BOOTS):
        boots()
        for _ in range(starts):
            assert boot(store, fails()) == two
    boots()

    assert boot(store, fails()) == one == store.current_model()
    assert f"in {FAILED_BOOTS} boots of the machine in a row" in store.events()[0].extra["reason"]


def cannot_be_read(path, patch):
    """As after a wrong chown; the tests may run as root, whom no mode stops."""
    read = Path.read_bytes

    def fails(one):
        if one == path / "model.onnx":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(one)

    patch.setattr(Path, "read_bytes", fails)


def of_a_later_edgekws(path, patch):
    patch.setattr("edgekws.model.FORMAT", 1)


@pytest.mark.parametrize("unreadable", [cannot_be_read, of_a_later_edgekws])
def test_a_version_that_cannot_be_read_now_stays_the_promoted_one(store, tmp_path, monkeypatch, unreadable):
    one, two = (store.promote(a_copy(tmp_path, name, "edge-small"), name) for name in ("one", "two"))
    with monkeypatch.context() as patch:
        unreadable(two, patch)
        for _ in range(FAILED_STARTS + 1):
            with contextlib.suppress(ModelError), start_counted(store):
                assert boot(store, lambda path: load_model(path) if path == two else path) == one
        with contextlib.suppress(ModelError), start_counted(store):
            boot(store, lambda path: load_model(two))  # nor can the others be read

    assert (store.current_model(), store.previous_model(), store.count_start()) == (two, one, 0)
    assert boot(store, lambda path: load_model(path).id) == "two"


def test_a_version_that_cannot_be_read_while_it_is_loaded_stays_the_promoted_one(listener, store, tmp_path, monkeypatch, word):
    listener.hear(HOPS[:40])
    promoted = store.promote(a_copy(tmp_path, "one"), "one")
    with monkeypatch.context() as patch:
        cannot_be_read(promoted, patch)
        listener.hear(HOPS[40:120])

    (event,) = listener.events
    assert (event.extra["what"], event.extra["version"], "back_to" in event.extra) == ("refused", "one", False)
    assert listener.reread == [False, False] and store.current_model() == promoted
    assert Listener(store, word).updates.model == "one"


def test_beside_a_version_that_cannot_be_read_who_is_removed_is_heard_no_more(listener, store, tmp_path, monkeypatch):
    store.save_enrolment("hey", "ann", [HOPS[0]])
    listener.hear(HOPS[:40])
    promoted = store.promote(a_copy(tmp_path, "one"), "one")
    of_its_own = listener.version_of
    listener.updates._version_of = lambda path: dataclasses.replace(of_its_own(path), detector=Detector([]))
    with monkeypatch.context() as patch:
        cannot_be_read(promoted, patch)
        listener.hear(HOPS[40:60])
        store.remove_enrolment("hey")
        listener.hear(HOPS[60:130])

    assert listener.whats == ["reloaded", "refused", "reloaded"] and listener.pipeline.detector.enrolled == ()
    assert store.current_model() == promoted


def test_an_engine_that_cannot_even_be_prepared_ends_no_listener(store, word):
    def full(model, backend):
        raise FileNotFoundError("no usable temporary directory")

    version = Version(load_model(find_model()), SimpleNamespace(awaited="tensorrt"), Detector([]))
    awaited = Awaited(full)

    assert awaited.look(version) == "no usable temporary directory"
    assert awaited.look(version) is None  # not tried again and again


def test_a_version_that_went_live_in_a_wrong_future_is_on_trial_from_now_on(store, tmp_path):
    store.add_event(Event("", "", 0.0, 0.0, time.time(), 0.0, 0.0, "edge-3", "start"))
    store.promote(a_copy(tmp_path, "one"), "one")
    os.utime(store.root / "models" / "current", (4e9, 4e9), follow_symlinks=False)

    assert store.promoted_s() <= time.time() and Store(store.root).promoted_s() <= time.time()


def test_an_engine_that_took_the_process_with_it_is_left_out_once(store):
    """As a driver's library that crashes: the next start listens by another engine, the one after tries it again."""
    code = "import os, sys; from pathlib import Path; from edgekws.store import Store\n"
    code += "with Store(Path(sys.argv[1])).loading('tensorrt') as may: print(may, flush=True); os.abort()"
    ended = subprocess.run([sys.executable, "-c", code, str(store.root)], capture_output=True, text=True)

    assert (ended.stdout, ended.returncode < 0) == ("True\n", True)
    for wanted in (False, True):
        with store.loading("tensorrt") as may:
            assert may is wanted


@pytest.mark.parametrize(
    ("ends", "failed"), [(None, 0), (AudioError("unplugged"), 0), (KeyboardInterrupt(), 0), (ModelError("bad"), 1), (ValueError("bug"), 1)]
)
def test_only_a_start_that_crashed_or_had_no_model_has_failed(store, tmp_path, ends, failed):
    store.promote(a_copy(tmp_path, "one"), "one")
    store.count_start()
    try:
        with start_counted(store):
            if ends:
                raise ends
    except type(ends):
        pass

    assert store.count_start() == failed


def test_a_start_that_ends_while_it_waits_for_the_microphone_has_not_failed(store, tmp_path):
    with store.start_waits():
        pass
    assert not store.root.exists()
    store.promote(a_copy(tmp_path, "one"), "one")
    store.count_start()
    store.count_start()
    with store.start_waits():
        waiting = (store.root / "starts").read_text().split()[1:]

    assert (waiting, store.count_start()) == (["1"], 2)


def test_a_minute_of_listening_ends_the_count(listener, store):
    store.count_start()
    listener.hear(HOPS)
    assert store.count_start() == 1
    listener.hear(HOPS * 2)
    assert store.count_start() == 0


# Watching.


def day(model, wakes, start_s, hours=24.0, keyword="hey", first="start"):
    """Events of a session: its beginning, wakes evenly over it, its end."""
    spread = np.linspace(0.1, hours * 3600 - 1, wakes)
    begin = Event("", "", 0.0, 0.0, start_s, 0.0, 0.0, model, "start" if first == "start" else "model", extra={"what": first})
    end = Event("", "", 0.0, 0.0, start_s + hours * 3600, hours * 3600, 0.0, model, "stop")
    return [begin, *(Event(keyword, "", 1.0, 0.5, start_s + at, at, 0.0, model) for at in spread), end]


@pytest.fixture
def judged(tmp_path):
    """What `worse` says of "new" after some events, each list of them in a state of its own."""

    def judge(events, stream_s, enrolled_s=None):
        store = Store(Path(tempfile.mkdtemp(dir=tmp_path)))
        for event in events:
            store.add_event(event)
        tally = store.tally("new", WATCHED_S)
        store.close()
        return tally and worse(tally, stream_s, enrolled_s or {})

    return judge


@pytest.mark.parametrize(
    ("before", "after", "hours", "back"),
    [
        (10, 10, 24, False),
        (10, 20, 24, False),
        (10, 60, 24, True),
        (0, 4, 1, False),
        (0, 5, 1, True),
        (10, 10, 2, True),
        (200, 260, 24, False),
    ],
)
def test_a_version_that_wakes_far_more_often_is_gone_back_from(judged, before, after, hours, back):
    """Twice as often may be a better recall: only beyond that it counts."""
    events = day("old", before, 0.0) + day("new", after, 90_000.0, hours)

    assert (judged(events, hours * 3600) is not None) == back


def test_hours_without_any_event_are_hours_that_a_version_was_heard(judged):
    """Eight wakes in its first hour, and none in the 23 since."""
    events = day("old", 10, 0.0) + day("new", 8, 90_000.0, hours=1.0)[:-1]

    assert judged(events, 3600.0) is not None
    assert judged(events, 24 * 3600.0) is None


def test_a_version_that_listens_again_after_another_is_compared_with_its_own_wakes_too(judged):
    """A week of it, a day of one that hears less, and the day after it was gone back to."""
    before = day("new", 84, 0.0, 7 * 24) + day("old", 4, 7 * 86_400.0)

    assert judged(before + day("new", 12, 8 * 86_400.0), 86_400) is None
    assert "120 wakes" in judged(before + day("new", 120, 8 * 86_400.0), 86_400)


def test_audio_of_a_file_beside_the_microphone_adds_no_more_hours_than_it_took(tmp_path):
    store = Store(tmp_path)
    for event in day("old", 5, 0.0) + day("new", 20, 86_400.0)[:-1]:
        store.add_event(event)
        if event.kind == "wake":  # a minute after it ten minutes of a file are listened to in 3 s
            for kind, stream_s in (("start", 0.0), ("stop", 600.0)):
                store.add_event(Event("", "", 0.0, 0.0, event.time_s + 60, stream_s, 0.0, event.model, kind))
    tally = store.tally("new", WATCHED_S)
    store.close()

    assert tally.hours == pytest.approx((24.0, 24.0), abs=2)


def test_what_gaps_took_is_no_time_that_a_version_was_heard(tmp_path):
    """Three hours of one version, 79 without a microphone, and an hour of the next."""
    store = Store(tmp_path)
    for kind, model, hours, extra in (
        ("start", "old", 0, {}),
        ("deaf", "old", 1, {"reason": "unplugged"}),
        ("gap", "old", 80, {"lost_ms": 79 * 3_600_000}),
        ("wake", "old", 81, {}),
        ("model", "new", 82, {"what": "live"}),
        ("wake", "new", 83, {}),
    ):
        store.add_event(Event("", "", 0.0, 0.0, 1e9 + hours * 3600, hours * 3600.0, 0.0, model, kind, extra=extra))
    tally = store.tally("new", WATCHED_S)
    store.close()

    assert tally.hours == pytest.approx((3.0, 1.0))


def test_where_there_is_nothing_to_compare_with_nothing_is_gone_back_from(judged):
    assert judged(day("new", 1000, 0.0), 86400.0) is None
    assert judged([], 0.0) is None
    assert judged(day("old", 0, 0.0, hours=0.0) + day("new", 100, 1.0, first="live"), 86400.0) is None
    old = day("old", 10, 0.0) + day("new", 1000, 90_000.0, hours=169.0)
    assert judged(old, 169 * 3600.0) is None  # a week was heard


def test_a_keyword_that_came_after_the_version_does_not_count_against_it(judged):
    events = day("old", 10, 0.0) + day("new", 100, 90_000.0, keyword="computer")

    assert judged(events, 86400.0, {"computer": 100_000.0}) is None
    assert judged(events, 86400.0, {"computer": 0.0}) is not None


def test_a_rare_keyword_that_wakes_at_everything_does_not_drown_beside_a_busy_one(judged):
    busy = day("old", 200, 0.0) + day("new", 200, 90_000.0)
    rare = [Event("computer", "", 1.0, 0.5, 90_000.0 + i, i, 0.0, "new") for i in range(1, 61)]
    said = judged(sorted(busy + rare, key=lambda event: event.time_s), 86400.0)

    assert said.startswith('60 wakes of "computer" in 24.0 h, before it 0')
    assert judged(busy, 86400.0) is None


def test_of_many_keywords_one_wakes_more_often_by_chance(judged):
    """What would be too often for a keyword that is the only one, by itself."""
    one_too_many = next(after for after in range(40, 400) if more_often(40, 24.0, after, 24.0) < WAKES_P)
    rare = day("old", 40, 0.0) + day("new", one_too_many, 90_000.0)
    busy = day("old", 400, 0.0, keyword="stop")[1:-1] + day("new", 400, 90_000.0, keyword="stop")[1:-1]

    assert judged(rare, 86400.0) is not None
    assert judged(sorted(rare + busy, key=lambda event: event.time_s), 86400.0) is None


def test_a_keyword_that_is_only_now_used_costs_no_version(judged):
    busy = day("old", 20, 0.0) + day("new", 20, 90_000.0)
    seldom = [Event("computer", "", 1.0, 0.5, 90_000.0 + i, i, 0.0, "new") for i in range(1, 13)]

    assert judged(sorted(busy + seldom, key=lambda event: event.time_s), 86400.0) is None


def test_wakes_of_the_wake_service_s_clients_say_nothing_about_the_listener(judged):
    """They come with the place in their own stream, which would make hours of every change from one to the other."""
    own = day("old", 10, 0.0) + day("new", 60, 90_000.0)
    others = [Event("hey", "", 1.0, 0.5, 90_000.0 + i, 5.0, 0.0, "new", extra={"client": "10.0.0.2:1234"}) for i in range(1000)]
    quiet = day("old", 10, 0.0) + day("new", 10, 90_000.0)

    assert judged(quiet + others, 86400.0) is None
    mixed = sorted(own + others, key=lambda event: event.time_s)
    assert judged(mixed, 86400.0) == judged(own, 86400.0) is not None


def test_a_file_that_is_listened_to_beside_the_microphone_says_nothing_about_the_version(judged):
    """Neither do its wakes count, nor is its end a place in the microphone's stream."""
    file = [dataclasses.replace(event, extra={**event.extra, "file": True}) for event in day("new", 1000, 176_000.0, hours=0.1)]
    quiet, restless = (day("old", 10, 0.0) + day("new", wakes, 90_000.0)[:-1] for wakes in (10, 60))

    assert judged(quiet + file, 86400.0) is None
    assert judged(restless + file, 86400.0) == judged(restless, 86400.0) is not None


def test_three_rejections_by_the_user_in_two_hours_are_enough(judged):
    rejects = [Event("hey", "", 1.0, 0.5, 90_000.0 + i, 0.0, 0.0, "new", "reject") for i in range(3)]
    events = day("old", 10, 0.0) + day("new", 1, 90_000.0, 2.0)

    assert judged(events + rejects[:2], 7200.0) is None
    assert "3 rejections" in judged(events + rejects, 7200.0)


def test_the_test_of_two_rates_keeps_its_level():
    """Simulated: at exactly the rate that is allowed, at most one in a hundred is called worse at that level."""
    random = np.random.default_rng(0)
    called = [
        more_often(before, 24.0, after, 24.0) < 0.01
        for before, after in zip(random.poisson(5, 4000), random.poisson(10, 4000), strict=True)
    ]

    assert 0 < np.mean(called) <= 0.01


def test_the_listener_itself_goes_back_and_says_why(store, word, tmp_path):
    """A day with the default, then the new version wakes at every chance."""
    store.promote(a_copy(tmp_path, "new"), "new")
    os.utime(store.root / "models" / "current", (1e9, 1e9), follow_symlinks=False)
    for event in day("edge-3", 2, 1e9 - 90_000) + day("new", 0, 1e9 - 1, 0.01, first="live"):
        store.add_event(event)
    listener = Listener(store, word)
    listener.hear(HOPS * 2)
    for at in range(8):
        store.add_event(Event(TRUTH["keyword"], "", 1.0, 0.5, 1e9 + at, 40.0 + at, 0.0, "new"))
    listener.hear(HOPS * 2)

    assert listener.whats == ["rolled back", "live"]
    assert "8 wakes in 0.0 h, before it 2 in 24.0 h" in listener.events[0].extra["reason"]
    assert listener.updates.model == "edge-3" and store.current_model() is None


@pytest.fixture
def too_often(store, word, tmp_path):
    """A listener with "new", after "old", that wakes at every chance and is looked at next."""
    for name in ("old", "new"):
        store.promote(a_copy(tmp_path, name), name)
    os.utime(store.root / "models" / "current", (1e9, 1e9), follow_symlinks=False)
    for event in day("old", 2, 1e9 - 90_000) + day("new", 60, 1e9 - 1, 0.01, first="live"):
        store.add_event(event)
    return Listener(store, word)


def test_a_version_that_was_gone_back_from_listens_again_where_somebody_promotes_it(too_often, store):
    too_often.hear(MINUTE)
    assert (too_often.whats, too_often.updates.model) == (["rolled back", "live"], "old")
    store.promote(store.models()["new"], "new")

    assert too_often.hear(HOPS[:60]).updates.model == "new"


def test_a_listener_to_a_file_judges_no_version(too_often):
    too_often.updates._counted = False

    assert too_often.hear(MINUTE).whats == []


@pytest.mark.parametrize("by_hand", ["rollback", "promote"])
def test_a_choice_by_hand_at_the_moment_of_going_back_stands(too_often, store, tmp_path, monkeypatch, by_hand):
    judge = edgekws.promotion.worse

    def judged(*given):
        if store.current_model().name == "new":
            store.rollback() if by_hand == "rollback" else store.promote(a_copy(tmp_path, "third"), "third")
        return judge(*given)

    monkeypatch.setattr(edgekws.promotion, "worse", judged)
    too_often.hear(MINUTE)

    chosen = {"rollback": "old", "promote": "third"}[by_hand]
    assert (store.current_model().name, too_often.updates.model, too_often.whats) == (chosen, chosen, ["live"])


def test_a_clock_that_is_wrong_at_a_look_delays_the_next_by_hours_and_not_by_a_year(store, word, tmp_path):
    store.promote(a_copy(tmp_path, "new"), "new")
    os.utime(store.root / "models" / "current", (1e9, 1e9), follow_symlinks=False)
    for event in day("edge-3", 2, 1e9 - 90_000) + day("new", 60, 1e9 - 1, 0.01, first="live"):
        store.add_event(event)
    listener = Listener(store, word)
    right = listener.updates._now
    listener.updates._now = lambda: right() + 20 * 365 * 86_400
    listener.hear(MINUTE + MINUTE)  # two looks
    listener.updates._now = right
    listener.at += round(WATCHED_S / 20 / 0.08)
    listener.hear(HOPS)

    assert listener.whats == ["rolled back", "live"]


def a_round_s(store, word, tmp_path, age_s=0.0, key="ann", name="0001-deaf"):
    """A version as a round leaves it, but one that never wakes, promoted so long ago."""
    path = a_copy(tmp_path, name)
    save_enrolled(path / ADAPTED, {key: dataclasses.replace(word(load_model(path)), threshold=99.0)})
    rewrite_manifest(path)
    store.promote(path, path.name)
    os.utime(store.root / "models" / "current", (1e9 - age_s,) * 2, follow_symlinks=False)


MINUTE = [np.zeros(HOP_SAMPLES, np.int16)] * 800


@pytest.mark.parametrize("restarted", [False, True])
def test_what_the_version_before_a_round_s_alone_wakes_at_is_kept_from_a_minute_on(store, word, without, tmp_path, restarted):
    if restarted:
        a_round_s(store, word, tmp_path)
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE[:40])
    if not restarted:
        a_round_s(store, word, tmp_path)
    listener.hear(MINUTE)
    said_from = listener.at * HOP_SAMPLES
    listener.hear(HOPS)

    assert listener.heard == []
    missed = [cut.end_sample - said_from for cut in listener.pipeline.cuts if "would have woken" in cut.clip.reason]
    assert missed == without


def test_beside_a_version_that_a_long_running_listener_takes_up_the_one_before_listens_along_too(store, word, tmp_path):
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE)
    store.count_start()
    a_round_s(store, word, tmp_path)
    store.count_start()
    listener.hear(MINUTE)

    assert listener.updates.model == "0001-deaf" and listener.pipeline.witness is not None
    assert store.count_start() == 0  # and a minute of it ends the count


def test_what_it_wakes_at_is_enough_to_go_back(store, word, tmp_path):
    """The five words of the demo's stream, none of which comes near the new version's threshold."""
    adaptation = pytest.importorskip("edgekws.training.adaptation")
    takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
    enrolment = store.save_enrolment(TRUTH["keyword"], "ann", takes)
    a_round_s(store, word, tmp_path, key=f"{enrolment.id} False")
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE).hear(HOPS).hear(MINUTE[:20])
    for cut in listener.pipeline.cuts:
        store.add_clip(dataclasses.replace(cut.clip, model="0001-deaf", time_s=1e9 + cut.end_sample / 16_000), cut.samples)

    assert "the version before alone hears 5, it alone 0" in adaptation.look_back(store, "edge")
    assert store.current_model() is None


def heard(store, before="edge-3", live="0001-deaf", hours=30.0):
    """As the log says it: a day of the one and then of the other."""
    for event in day(before, 2, 1e9 - 300_000) + day(live, 2, 1e9 - 200_000, hours):
        store.add_event(event)


def test_the_version_before_listens_along_for_a_week_or_until_another_is_promoted(store, word, tmp_path):
    a_round_s(store, word, tmp_path, age_s=WATCHED_S - 120)
    heard(store)
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE)
    assert listener.pipeline.witness is not None
    assert listener.hear(MINUTE).pipeline.witness is None

    os.utime(store.root / "models" / "current", (1e9, 1e9), follow_symlinks=False)
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE)
    assert listener.pipeline.witness is not None
    store.promote(a_copy(tmp_path, "by-hand"), "by-hand")
    assert listener.hear(MINUTE[:60]).pipeline.witness is None and listener.updates.model == "by-hand"


@pytest.mark.parametrize(("age_days", "hours", "listens_along"), [(8, 3.0, True), (8, 25.0, False), (27, 3.0, True), (28, 3.0, False)])
def test_a_week_in_which_the_board_was_off_goes_on_until_a_day_was_heard_or_for_four(store, word, tmp_path, age_days, hours, listens_along):
    a_round_s(store, word, tmp_path, age_s=age_days * 86_400)
    heard(store, hours=hours)

    assert (Listener(store, word, keeps_clips=True).hear(MINUTE).pipeline.witness is not None) == listens_along


def test_the_week_ends_in_a_listener_that_hears_the_day_that_it_lacked(store, word, tmp_path):
    a_round_s(store, word, tmp_path, age_s=8 * 86_400)
    heard(store, hours=3.0)
    listener = Listener(store, word, keeps_clips=True).hear(MINUTE)
    for event in day("0001-deaf", 2, 1e9 - 90_000):
        store.add_event(event)
    listener.at += round(WATCHED_S / 20 / 0.08)  # to its next look

    assert listener.pipeline.witness is not None
    assert listener.hear(MINUTE).pipeline.witness is None


@pytest.mark.parametrize("set_right", [True, False])
def test_a_board_that_starts_in_the_past_does_not_hear_the_version_before_for_years(store, word, tmp_path, set_right):
    a_round_s(store, word, tmp_path, age_s=90 * 86_400)
    heard(store)
    listener = Listener(store, word, keeps_clips=True)
    right = listener.updates._now
    listener.updates._now = lambda: right() - 9e7
    listener.hear(MINUTE)
    assert listener.pipeline.witness is not None
    if set_right:
        listener.updates._now = right
    else:
        listener.at += round(WATCHED_S / 0.08)

    assert listener.hear(MINUTE).pipeline.witness is None


@pytest.mark.parametrize("why", ["no clips are kept", "a week has passed", "it was promoted by hand", "the one before cannot be loaded"])
def test_no_version_listens_along_where(store, word, tmp_path, why):
    if why == "it was promoted by hand":
        store.promote(a_copy(tmp_path, "new"), "new")
    else:
        a_round_s(store, word, tmp_path, age_s=WATCHED_S if why == "a week has passed" else 0.0)
        heard(store)
    listener = Listener(store, word, keeps_clips=why != "no clips are kept")
    if why == "the one before cannot be loaded":
        listener.updates._version_of = lambda path: load_model(tmp_path)
    listener.hear(MINUTE)

    assert listener.pipeline.witness is None and listener.updates.model == store.current_model().name


# On disk.

PROMOTER = """
import sys
from pathlib import Path
from edgekws.store import Store
store = Store(Path(sys.argv[1]))
versions = [Path(name) for name in sys.argv[2:]]
print("ready", flush=True)
while True:
    for path in versions:
        store.promote(path, path.name)
"""


def test_kill_9_at_any_moment_of_a_promotion_leaves_a_whole_version(store, tmp_path):
    versions = [a_copy(tmp_path, f"v{i}", "edge-small") for i in range(GENERATIONS + 3)]  # so that old ones are deleted and copied again
    random = np.random.default_rng(0)
    seen = set()
    for kills in range(500):
        if kills >= 50 and len(seen) > 2:  # on a busy machine it takes more of them
            break
        process = subprocess.Popen([sys.executable, "-c", PROMOTER, store.root, *versions], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(random.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if store.current_model() is not None:
            seen.add(load_model(store.current_model()).id)
            if store.previous_model() is not None:
                load_model(store.previous_model())

    assert len(seen) > 2
    store.promote(versions[0], "v0")
    assert not list((store.root / "models").glob(".*"))
    assert len(store.models()) <= GENERATIONS


def test_power_cut_between_the_two_links_leaves_the_old_version_and_a_way_back(store, tmp_path, monkeypatch):
    one, two = (a_copy(tmp_path, name, "edge-small") for name in ("one", "two"))
    here = store.promote(one, "one")
    link = Store._link

    def cut(self, name, target):
        if name == "current":
            raise KeyboardInterrupt  # in place of the power cut: the second rename is not done
        link(self, name, target)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_link", cut)
        with pytest.raises(KeyboardInterrupt):
            store.promote(two, "two")

    assert store.current_model() == here and load_model(here).id == "one"
    assert store.previous_model() is None
    there = store.promote(two, "two")
    assert (store.current_model(), store.previous_model()) == (there, here)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_link", lambda self, name, target: link(self, name, target) if name == "current" else None)
        store.rollback()
    assert store.current_model() == here and store.previous_model() is None
    assert store.rollback() is None is store.current_model()


def test_only_the_last_generations_are_kept_and_never_the_current_or_the_previous_deleted(store, tmp_path):
    for i in range(4):
        store.promote(a_copy(tmp_path, f"v{i}", "edge-small"), f"v{i}")
    store.promote(tmp_path / "v0", "v0")  # old, and current again
    for i in range(4, 4 + GENERATIONS):
        store.promote(a_copy(tmp_path, f"v{i}", "edge-small"), f"v{i}")
        assert {store.current_model().name, store.previous_model().name} <= set(store.models())

    assert len(store.models()) == GENERATIONS
    assert set(store.models()) == {f"v{i}" for i in range(4, 4 + GENERATIONS)}


# The whole command.


class Running:
    """`edgekws run` on a pipe into which the demo's stream is said again and again, some times faster than speech."""

    def __init__(self, root, *arguments):
        self.env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "edgekws", "run", "--json", "--source", "stdin:", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=self.env, **pipes)
        self.wakes, self.done = [], False
        self.threads = [threading.Thread(target=call) for call in (self.speak, self.read, self.process.stderr.read)]
        for thread in self.threads:
            thread.start()

    def speak(self):
        with contextlib.suppress(BrokenPipeError):
            while not self.done:
                for hop in HOPS:
                    self.process.stdin.write(hop.tobytes())
                    self.process.stdin.flush()
                    time.sleep(0.01)
                    if self.done:
                        break

    def read(self):
        for line in self.process.stdout:
            self.wakes.append(json.loads(line))

    def cli(self, *arguments):
        command = [sys.executable, "-m", "edgekws", *map(str, arguments)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True, timeout=60).stdout

    def wait(self, ready):
        deadline_s = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline_s and self.process.poll() is None
            time.sleep(0.1)

    def end(self):
        self.process.terminate()
        self.done = True
        code = self.process.wait(30)
        for thread in self.threads:
            thread.join(30)
        return code


def test_a_running_listener_takes_up_a_model_a_keyword_and_settings(tmp_path):
    config = tmp_path / "edgekws.toml"
    config.write_text("")
    running = Running(tmp_path / "state", "--config", config)
    try:
        running.wait(lambda: "start: " in running.cli("log", "--all"))
        running.cli("models", "promote", "edge-small")
        running.wait(lambda: "model: edge-small-4 listens, before it edge-3" in running.cli("log"))
        running.cli("enroll", TRUTH["keyword"], *sorted(DEMO.glob("enrol-*.flac")))
        running.wait(lambda: running.wakes)
        assert (running.wakes[-1]["keyword"], running.wakes[-1]["model"]) == (TRUTH["keyword"], "edge-small-4")

        threshold = running.wakes[-1]["threshold"]
        config.write_text("[detector]\nthreshold_offset = 0.5\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait(lambda: running.wakes[-1]["threshold"] == pytest.approx(threshold + 0.5, abs=1e-3))

        promoted = Path(json.loads(running.cli("models", "show", "--json"))["path"])
        damaged(Store(tmp_path / "state").promote(a_copy(tmp_path, "bad"), "bad"))
        running.wait(lambda: "model: bad is refused, edge-small-4 goes on" in running.cli("log"))
        assert Path(json.loads(running.cli("models", "show", "--json"))["path"]) == promoted
    finally:
        code = running.end()
    assert code == 0


def test_a_running_listener_does_not_wake_again_at_what_was_called_wrong_until_that_is_taken_back(tmp_path):
    """With a threshold so low that a sentence of the stream wakes too."""
    config = tmp_path / "edgekws.toml"
    config.write_text("[detector]\nthreshold_offset = -0.85\n")
    takes = sorted(DEMO.glob("enrol-*.flac"))
    assert cli(tmp_path / "state", "enroll", "--config", config, TRUTH["keyword"], *takes).returncode == 0
    running = Running(tmp_path / "state", "--config", config)

    def wrong(wakes):
        return [one for one in wakes if one["score"] < 1]

    def a_round_later():
        """What woke in a whole stream from now on."""
        first = len(running.wakes)
        running.wait(lambda: len(running.wakes) - first > 2 * len(TRUTH["spoken"]))
        return running.wakes[first:]

    try:
        running.wait(lambda: wrong(running.wakes) and len(running.wakes) > 6)
        clips = json.loads(running.cli("clips", "list", "--json"))
        (clip,) = (one["id"] for one in clips if one["label"] == "positive" and one["score"] < 1)
        running.cli("clips", "reject", clip)
        running.wait(lambda: running.cli("log").count("settings read again") == 1)
        assert not wrong(a_round_later())
        running.cli("clips", "confirm", clip)
        running.wait(lambda: running.cli("log").count("settings read again") == 2)
        assert wrong(a_round_later())
    finally:
        code = running.end()
    assert code == 0


def test_who_removes_the_last_enrolment_is_heard_no_more_and_the_listener_goes_on(tmp_path, word):
    """Also where a learned version listens, which knows nobody else."""
    running = Running(tmp_path / "state")
    store = Store(tmp_path / "state")
    try:
        running.wait(lambda: "start: " in running.cli("log", "--all"))
        running.cli("enroll", TRUTH["keyword"], *sorted(DEMO.glob("enrol-*.flac")))
        running.wait(lambda: running.wakes)
        (voice,) = store.enrolments()
        path = a_copy(tmp_path, "0001-learned", "edge-small")  # without prototypes: it knows no keyword of its own
        (path / "prototypes.npz").unlink()
        save_enrolled(path / ADAPTED, {f"{voice.id} False": word(load_model(find_model("edge-small")))})
        rewrite_manifest(path)
        store.promote(path, path.name)
        running.wait(lambda: running.wakes[-1]["model"] == "0001-learned")
        running.cli("enroll", "--remove", TRUTH["keyword"])
        running.wait(lambda: "edge-3 listens, before it 0001-learned" in running.cli("log"))
        heard = len(running.wakes)
        time.sleep(3)  # the stream says the keyword every second or so
    finally:
        code = running.end()

    assert (code, len(running.wakes)) == (0, heard)
    assert cli(store.root, "run", "--source", DEMO / "stream.flac").returncode == 0  # and can be started again


def test_who_removes_the_last_enrolment_is_heard_no_more_by_a_model_without_a_keyword_of_its_own_either(tmp_path):
    """With nothing to listen for it says so and goes on, and wakes once somebody enrols again."""
    own = a_copy(tmp_path, "own", "edge-small")
    (own / "prototypes.npz").unlink()
    rewrite_manifest(own)
    takes = sorted(DEMO.glob("enrol-*.flac"))
    assert cli(tmp_path / "state", "enroll", TRUTH["keyword"], *takes).returncode == 0
    running = Running(tmp_path / "state", "--model", own)
    try:
        running.wait(lambda: running.wakes)
        running.cli("enroll", "--remove", TRUTH["keyword"])
        running.wait(lambda: "read again: there is nothing to listen for" in running.cli("log"))
        heard = len(running.wakes)
        time.sleep(3)
        assert len(running.wakes) == heard
        running.cli("enroll", TRUTH["keyword"], *takes)
        running.wait(lambda: len(running.wakes) > heard)
    finally:
        code = running.end()

    assert code == 0


def cli(root, *arguments):
    env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "edgekws", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=60)


def test_a_version_damaged_on_disk_does_not_keep_the_listener_from_starting(store, tmp_path):
    store.promote(a_copy(tmp_path, "good", "edge-small"), "good")
    damaged(store.promote(a_copy(tmp_path, "bad"), "bad"))
    done = cli(store.root, "run", "--source", DEMO / "stream.flac")

    assert done.returncode == 0 and "with good on" in done.stderr
    assert "bad is gone back from" in cli(store.root, "log").stdout
    assert (store.current_model().name, (store.root / "starts").exists()) == ("good", False)


@dataclasses.dataclass(frozen=True)
class LaterEnrolled(Enrolled):
    spoken_hz: float = 120.0
    pitches: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(3, np.float32))


def test_a_version_whose_words_have_fields_of_a_later_edgekws_listens_after_a_downgrade(store, tmp_path, word):
    store.save_enrolment(TRUTH["keyword"], "ann", [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))])
    (voice,) = store.enrolments()
    path = a_copy(tmp_path, "0001-later")
    save_enrolled(path / ADAPTED, {f"{voice.id} False": LaterEnrolled(**vars(word(load_model(path))))})
    rewrite_manifest(path)
    live = store.promote(path, path.name)
    done = cli(store.root, "run", "--source", DEMO / "stream.flac")

    assert (done.returncode, done.stdout.count(TRUTH["keyword"])) == (0, len(TRUTH["spoken"])) and "with 0001-later on" in done.stderr
    assert store.current_model() == live


def test_files_that_are_listened_to_count_as_no_starts(store, tmp_path):
    store.promote(a_copy(tmp_path, "good", "edge-small"), "good")
    store.count_start()  # of the service, which has begun a moment ago
    assert cli(store.root, "run", "--source", DEMO / "stream.flac").returncode == 0

    assert store.count_start() == 1


def test_a_rollback_that_waited_for_another_one_changes_nothing(store, tmp_path, monkeypatch, capsys):
    from edgekws.cli import main

    one = [store.promote(a_copy(tmp_path, name), name) for name in ("zero", "one", "two")][1]
    monkeypatch.setenv("STATE_DIRECTORY", str(store.root))
    unchanged = Store.unchanged
    monkeypatch.setattr(Store, "unchanged", lambda self: (Store(store.root).rollback(), unchanged(self))[1])

    assert main(["models", "rollback"]) == 1 and store.current_model() == one
    assert "one has become current meanwhile, so nothing was changed" in capsys.readouterr().err


def test_show_prints_what_is_recorded_and_says_what_is_not(store, tmp_path):
    recorded = {
        "parent": "edge-3",
        "created_s": 1.7e9,
        "data_sha256": "ab" * 32,
        "criterion": "hap",
        "metrics": {"recall": 0.91234567, "interval": [0.85, 0.95]},
        "gate": {"passed": True, "reason": "recall +3 points"},
    }
    store.promote(a_copy(tmp_path, "g-1", "edge-small", **recorded), "g-1")
    store.promote(a_copy(tmp_path, "g-2", "edge-small", parent="g-1"), "g-2")
    rows = dict(line.split(maxsplit=1) for line in cli(store.root, "models", "show", "g-1").stdout.splitlines())

    assert (rows["parent"], rows["data"], rows["criterion"]) == ("edge-3", "ab" * 32, "hap")
    assert rows["metrics"] == "recall 0.9123, interval (0.85 to 0.95)"
    assert rows["gate"] == "passed True, reason recall +3 points"
    assert rows["widths"] == "48, 48, 48, 64, 64, 64, 64, 64" and rows["parameters"] == "87408"
    assert rows["cost"] == "not recorded"
    store.promote(a_copy(tmp_path, "loop", parent="loop"), "loop")
    assert "loop ← loop" in cli(store.root, "models", "show").stdout  # and an end
    shown = json.loads(cli(store.root, "models", "show", "g-2", "--json").stdout)
    assert (shown["id"], shown["lineage"], shown["parent"]) == ("g-2", ["g-1", "edge-3"], "g-1")
    assert shown["file_bytes"]["model.onnx"] == (store.models()["g-2"] / "model.onnx").stat().st_size


def test_the_list_stands_in_lineage_order_and_marks_what_listens(store, tmp_path):
    for name, parent in (("c", "b"), ("b", "edge-3"), ("self", "self")):
        store.promote(a_copy(tmp_path, name, parent=parent), name)
    rows = json.loads(cli(store.root, "models", "list", "--json").stdout)

    assert [(row["name"], row["generation"]) for row in rows if row["name"] in ("edge", "b", "c", "self")] == [
        ("edge", 0),
        ("b", 1),
        ("c", 2),
        ("self", 0),
    ]
    assert [row["name"] for row in rows if row["current"]] == ["self"] and [row["name"] for row in rows if row["previous"]] == ["b"]


def test_a_version_with_which_three_starts_were_killed_does_not_get_a_fourth(store, tmp_path):
    for name in ("one", "two"):
        store.promote(a_copy(tmp_path, name, "edge-small"), name)
    env = {**os.environ, "STATE_DIRECTORY": str(store.root)}
    command = [sys.executable, "-m", "edgekws", "run", "--source", "stdin:"]
    said = []
    for _ in range(FAILED_STARTS + 1):
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said.append(next(line for line in process.stderr if "listening to" in line))
        process.kill()
        process.communicate()

    assert ["with two on" in line for line in said] == [True] * FAILED_STARTS + [False]
    assert "with one on" in said[-1]
    assert "3 starts in a row with it ended within 60 s" in cli(store.root, "log").stdout
