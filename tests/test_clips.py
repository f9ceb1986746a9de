"""Clips in the store, and the whole way from samples to them."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from edgekws import cli
from edgekws import store as store_module
from edgekws.cli import main
from edgekws.config import Settings
from edgekws.errors import StoreError
from edgekws.pseudo_labels import MISSED
from edgekws.sinks import QUEUE_CLIPS, Delivery, StoreSink
from edgekws.store import BATCH, FEW, GOING, Store
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, Clip, Detection, Enrolled, Event

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"
SOUND = (np.sin(np.arange(56_320) / 7) * 9000).astype(np.int16)
CLIP = Clip("positive", "hey", "ann", 1.5, 48_640, 3.52, "woke", model="edge-3", time_s=1000.0)
ROOM = Clip("negative", "", "", -4.0, 160_000, 10.0, "the room", time_s=1000.0)
WAKE = Event("hey", "ann", 1.5, 0.7, 1000.0, 4.2, 0.3, "edge-3")


class Clocks:
    """The wall's clock can be set; the other goes on with it."""

    def __init__(self, wall_s=1000.0):
        self.wall_s, self.steady_s = wall_s, 0.0

    def go(self, seconds):
        self.wall_s += seconds
        self.steady_s += seconds

    def store(self, root, **caps):
        return Store(root, now=lambda: self.wall_s, clock=lambda: self.steady_s, **caps)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state", now=lambda: 1000.0)


def files(store):
    return sorted((store.root / "clips").glob("*"))


def test_a_clip_comes_back_as_it_was(store):
    kept = store.add_clip(CLIP, SOUND)
    store.close()

    assert Store(store.root).clips() == [kept]
    assert kept == dataclasses.replace(CLIP, id=1, file=kept.file)
    np.testing.assert_array_equal(Store(store.root).clip_samples(kept), SOUND)
    assert soundfile.info(store.root / "clips" / kept.file).samplerate == SAMPLE_RATE_HZ


def test_clips_are_chosen_by_label_state_and_keyword(store):
    for label, keyword in (("positive", "hey"), ("positive", "ho"), ("between", "hey"), ("negative", "")):
        store.add_clip(dataclasses.replace(CLIP, label=label, keyword=keyword), SOUND)
    store.mark_clip(2, "admitted", "sounds like ann")

    assert [one.id for one in store.clips(label="positive")] == [1, 2]
    assert [one.id for one in store.clips(state="admitted")] == [2]
    assert [one.id for one in store.clips(keyword="hey", state="quarantined")] == [1, 3]
    assert [one.id for one in store.clips(keyword="")] == [4]
    assert store.clip(2).reason == "sounds like ann"


@pytest.mark.parametrize("use", [lambda s: s.clip(7), lambda s: s.mark_clip(7, "admitted", "")])
def test_a_clip_that_is_not_there_is_an_error(store, use):
    with pytest.raises(StoreError, match="no clip 7"):
        use(store)


def test_a_state_that_is_none_is_refused(store):
    store.add_clip(CLIP, SOUND)

    with pytest.raises(StoreError, match="States are quarantined, admitted, confirmed, rejected"):
        store.mark_clip(1, "good", "")
    assert store.clip(1).state == "quarantined"


def test_what_a_person_says_holds(store):
    for clip in (*(dataclasses.replace(CLIP, label=label) for label in ("positive", "between", "negative")), ROOM):
        store.add_clip(clip, SOUND)

    assert [(one.label, one.keyword, one.state) for one in map(store.confirm_clip, (1, 2, 3, 4))] == [
        ("positive", "hey", "confirmed"),
        ("positive", "hey", "confirmed"),
        ("negative", "hey", "confirmed"),
        ("negative", "", "confirmed"),
    ]
    rejected = store.reject_clip(1)
    assert (rejected.label, rejected.state, rejected.reason) == ("negative", "confirmed", "rejected by the user")
    assert store.clips()[0] == rejected


def test_who_rejected_by_mistake_can_take_it_back(store):
    wakes = [store.add_event(dataclasses.replace(WAKE, time_s=time_s)) for time_s in (1.0, 2.0)]
    clip = store.add_clip(dataclasses.replace(CLIP, event=wakes[0].id), SOUND)
    store.note_alike(wakes[1].id, clip.file)
    store.reject_last()  # the second, which was the same recording
    store.reject_clip(clip.id)
    taken_back = store.confirm_clip(clip.id)

    assert (taken_back.label, taken_back.state, taken_back.reason) == ("positive", "confirmed", "confirmed by the user")
    assert [event.kind for event in store.events()] == ["wake", "wake"]


@pytest.mark.parametrize(("label", "becomes"), [("between", "positive"), ("positive", "positive"), ("negative", "negative")])
def test_a_near_miss_whose_rejection_is_taken_back_is_what_it_was_taken_for(store, label, becomes):
    near = store.add_clip(dataclasses.replace(CLIP, label=label), SOUND)
    rejected = [store.reject_clip(near.id), store.reject_clip(near.id)]
    taken_back = store.confirm_clip(near.id)

    assert [one.label for one in rejected] == ["negative"] * 2 and rejected[0] == rejected[1]
    assert (taken_back.label, taken_back.state) == (becomes, "confirmed")
    assert taken_back.reason == ("confirmed as not the keyword" if label == "negative" else "confirmed by the user")


def test_the_last_wake_is_played_confirmed_and_rejected_as_the_kept_clip_of_the_same_recording(store):
    first, second = (store.add_event(dataclasses.replace(WAKE, time_s=time_s)) for time_s in (1.0, 2.0))
    kept = store.add_clip(dataclasses.replace(CLIP, event=first.id), SOUND)
    store.note_alike(second.id, kept.file)

    assert store.last_clip() == kept
    assert store.reject_last()[1].label == "negative"
    wake, clip = store.confirm_last()
    assert (wake.time_s, clip.id, clip.label) == (2.0, kept.id, "positive")
    store.reject_last()  # which leaves the clip, as a person has confirmed it
    store.confirm_last()
    assert [one.kind for one in store.events()] == ["wake", "wake"]


def test_a_wake_that_is_confirmed_makes_a_positive_of_the_near_miss_that_is_the_same_recording(store):
    near = store.add_clip(dataclasses.replace(CLIP, label="negative"), SOUND)
    store.note_alike(store.add_event(WAKE).id, near.file)
    store.confirm_clip(near.id)

    assert store.confirm_last()[1].label == store.clip(near.id).label == "positive"


def test_the_rejection_of_a_last_wake_without_audio_can_be_taken_back_once(store):
    wake = store.add_event(WAKE)
    store.reject_last()

    assert store.confirm_last() == (wake, None)
    assert store.rejected(0) == set()
    with pytest.raises(StoreError, match="none of the last wake's audio is kept"):
        store.confirm_last()


def test_rejecting_the_last_wake_makes_its_clip_a_hard_negative(store):
    with pytest.raises(StoreError, match="nothing woke yet"):
        store.reject_last()
    for time_s in (1.0, 2.0):
        event = store.add_event(dataclasses.replace(WAKE, time_s=time_s))
        store.add_clip(dataclasses.replace(CLIP, event=event.id), SOUND)
    wake, clip = store.reject_last()
    again = store.reject_last()

    assert (wake.time_s, clip.id, clip.label, clip.state) == (2.0, 2, "negative", "confirmed")
    assert [one.label for one in store.clips()] == ["positive", "negative"]
    assert again == (wake, clip)
    assert [(one.kind, one.extra) for one in store.events()[2:]] == [("reject", {"wake": wake.id})]


def test_a_wake_that_is_rejected_while_its_clip_is_kept_is_no_positive(store, monkeypatch):
    event = store.add_event(WAKE)
    other = Store(store.root)
    assert other.clips() == []  # its database is open
    judge = threading.Thread(target=other.reject_last)
    asked = store._is_rejected

    def meanwhile(wake):
        found = asked(wake)
        judge.start()
        judge.join(0.3)  # it has to wait
        return found

    monkeypatch.setattr(store, "_is_rejected", meanwhile)
    store.add_clip(dataclasses.replace(CLIP, event=event.id), SOUND)
    judge.join()

    assert [(one.label, one.state) for one in store.clips()] == [("negative", "confirmed")]


def test_a_clip_keeps_its_audio_where_the_database_has_to_be_begun_anew_meanwhile(store, monkeypatch):
    event = store.add_event(WAKE)

    def lost(wake):
        for path in store.root.glob("edgekws.db*"):
            path.unlink()
        return False

    monkeypatch.setattr(store, "_is_rejected", lost)
    kept = store.add_clip(dataclasses.replace(CLIP, event=event.id), SOUND)

    np.testing.assert_array_equal(store.clip_samples(kept), SOUND)


def test_a_wake_without_a_clip_is_rejected_without_touching_another(store):
    event = store.add_event(WAKE)
    store.add_clip(dataclasses.replace(CLIP, event=event.id), SOUND)
    store.add_event(WAKE)

    assert store.reject_last()[1] is None
    assert [one.label for one in store.clips()] == ["positive"]


def test_rejecting_a_clip_counts_as_rejecting_its_wake(store):
    """Both ways are one; and the clip of a wake that is forgotten by now is rejected all the same."""
    event = store.add_event(WAKE)
    for wake in (event.id, 99):
        store.add_clip(dataclasses.replace(CLIP, event=wake), SOUND)
    labels = [store.reject_clip(id).label for id in (1, 1, 2)]
    rejects = [one.extra for one in store.events() if one.kind == "reject"]

    assert (labels, rejects) == (["negative"] * 3, [{"wake": event.id}])
    store.reject_last()
    assert store.last_event() == event.id + 1


def test_a_wake_that_is_rejected_long_afterwards_counts_where_it_was_heard(tmp_path):
    """By whichever version listened then, and not a week later by another."""
    clocks = Clocks()
    store = clocks.store(tmp_path)
    wake = store.add_event(WAKE)
    clip = store.add_clip(dataclasses.replace(CLIP, event=wake.id), SOUND)
    clocks.go(7 * 86_400)
    store.reject_clip(clip.id)

    assert [(one.time_s, one.model) for one in store.events() if one.kind == "reject"] == [(wake.time_s, wake.model)]


def test_who_follows_the_log_is_not_sent_back_by_a_rejection_that_is_taken_back(store):
    """Only a new database begins again."""
    store.add_clip(dataclasses.replace(CLIP, event=store.add_event(WAKE).id), SOUND)
    store.reject_last()
    seen = store.events()[-1].id
    store.confirm_last()

    assert store.last_event() == seen > store.events()[-1].id
    store.close()
    (store.root / "edgekws.db").unlink()
    assert store.last_event() == 0 and store.add_event(WAKE).id == store.last_event() == 1


@pytest.mark.parametrize(("state", "label"), [("quarantined", "negative"), ("admitted", "negative"), ("confirmed", "positive")])
def test_the_clip_that_a_wrong_wake_is_like_is_rejected_unless_a_person_confirmed_it(store, state, label):
    first, second = (store.add_event(dataclasses.replace(WAKE, time_s=time_s)) for time_s in (1.0, 2.0))
    kept = store.add_clip(dataclasses.replace(CLIP, event=first.id, state=state), SOUND)
    store.note_alike(second.id, kept.file)
    clips = [store.reject_last()[1] for _ in range(2)]

    assert store.clips()[0].label == label
    assert clips == ([None, None] if state == "confirmed" else store.clips() * 2)
    assert [one.extra["wake"] for one in store.events() if one.kind == "reject"] == [second.id]


def test_a_wake_that_was_rejected_before_it_was_known_to_be_like_a_clip_makes_that_a_hard_negative(store):
    clip, wake = store.add_clip(CLIP, SOUND), store.add_event(WAKE)
    store.reject_wake(wake.id)
    assert store.clip(clip.id).label == "positive"
    store.note_alike(wake.id, clip.file)

    assert (store.clip(clip.id).label, store.clip(clip.id).state) == ("negative", "confirmed")


def test_the_rejection_of_a_satellite_s_wake_is_not_counted_against_the_listener(store):
    for model, kind in (("edge-0", "start"), ("edge-3", "start"), ("edge-3", "wake")):
        store.add_event(dataclasses.replace(WAKE, kind=kind, model=model))
    wake = store.add_event(dataclasses.replace(WAKE, extra={"client": "10.0.0.2:1234"}))
    store.reject_last()
    rejects = [store.tally("edge-3", 86_400.0).rejects]
    store.reject_wake(wake.id - 1)
    rejects.append(store.tally("edge-3", 86_400.0).rejects)

    assert [one.extra for one in store.events()[4:]] == [{"client": "10.0.0.2:1234", "wake": wake.id}, {"wake": wake.id - 1}]
    assert rejects == [{}, {"hey": (0, 1)}]


def test_a_clip_that_comes_after_its_rejection_is_a_hard_negative(store):
    event = store.add_event(WAKE)
    store.reject_last()
    kept = store.add_clip(dataclasses.replace(CLIP, event=event.id), SOUND)

    assert (kept.label, kept.state) == ("negative", "confirmed") and store.clips() == [kept]


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-5001]), lambda p: p.write_bytes(b"RIFF")]
)
def test_a_clip_that_is_damaged_is_named_and_the_others_are_read(store, damage):
    one, two = store.add_clip(CLIP, SOUND), store.add_clip(CLIP, SOUND)
    damage(store.root / "clips" / one.file)

    with pytest.raises(StoreError, match=one.file):
        store.clip_samples(one)
    assert len(store.clip_samples(two)) == len(SOUND)


def test_the_oldest_go_first_what_passed_a_second_opinion_later_and_what_a_person_confirmed_last(tmp_path):
    """A stranger who talks all day does not push out what was confirmed."""
    store = Store(tmp_path, clips_max_mb=1)  # eight clips of 113 kB
    for state in ("confirmed", "admitted", "quarantined", "quarantined"):
        store.mark_clip(store.add_clip(CLIP, SOUND).id, state, "")
    for _ in range(40):
        store.add_clip(CLIP, SOUND)
    kept = store.clips()

    assert [one.state for one in kept[:2]] == ["confirmed", "admitted"] and kept[-1].id == 44
    assert sum(path.stat().st_size for path in files(store)) < 1_000_000
    assert {one.file for one in kept} == {path.name for path in files(store)}


def test_what_a_person_confirmed_outlasts_what_passed_a_second_opinion(tmp_path):
    store = Store(tmp_path, clips_max_mb=1)  # eight clips of 113 kB
    confirmed = store.add_clip(dataclasses.replace(CLIP, state="confirmed"), SOUND)
    for _ in range(20):
        store.add_clip(dataclasses.replace(CLIP, state="admitted"), SOUND)

    assert store.clips()[0] == confirmed and len(store.clips()) == 8


def test_the_room_crowds_out_no_wake_that_nobody_has_judged_and_wakes_not_its_last_thirty_pieces(tmp_path):
    """The room for weeks after a few wakes, then more wakes than there is space for: a quarter of that would be one piece."""
    store = Store(tmp_path, clips_max_mb=2)
    wakes = [store.add_clip(CLIP, SOUND).id for _ in range(12)]
    rooms = [store.add_clip(ROOM, SOUND[:10_000]).id for _ in range(60)]
    assert [one.id for one in store.clips(label="positive")] == wakes
    for _ in range(9):
        store.add_clip(CLIP, SOUND)

    assert [one.id for one in store.clips(keyword="")] == rooms[-30:]


def test_sound_of_the_room_that_a_round_took_goes_before_a_wake_that_a_round_believed(tmp_path):
    store = Store(tmp_path, clips_max_mb=1)
    wakes = [store.add_clip(dataclasses.replace(CLIP, state="admitted"), SOUND).id for _ in range(8)]
    for _ in range(4):
        store.add_clip(dataclasses.replace(ROOM, state="admitted"), SOUND)

    assert [one.id for one in store.clips()] == wakes


def test_near_misses_beside_a_television_crowd_out_no_wake_and_nothing_that_the_week_on_trial_needs(tmp_path, monkeypatch):
    """Four keywords, one of them said twice a day: a tenth of the space, and of what comes beside the wakes."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    store = Store(tmp_path, clips_max_mb=20)
    missed = store.add_clip(dataclasses.replace(CLIP, label="between", reason=f"0.3 below the threshold{MISSED}"), SOUND)
    admitted = store.add_clip(dataclasses.replace(CLIP, label="between", state="admitted"), SOUND)
    for _ in range(10):
        for label in ("negative", "between") * 20:
            store.add_clip(dataclasses.replace(CLIP, label=label), SOUND)
        for _ in range(5):
            store.add_clip(ROOM, SOUND[:16_000])
        store.add_clip(CLIP, SOUND)
        store.add_clip(CLIP, SOUND)

    assert len(store.clips(label="positive")) == 20
    assert store.clips(label="between")[:2] == [missed, admitted]
    assert 20 <= len(store.clips(label="negative", keyword="hey")) <= 80 and 20 <= len(store.clips(label="between")) <= 80


def test_the_size_holds_even_against_what_was_confirmed(tmp_path):
    store = Store(tmp_path, clips_max_mb=1)
    for _ in range(30):
        store.add_clip(dataclasses.replace(CLIP, state="confirmed"), SOUND)

    assert store.clips()[-1].id == 30
    assert sum(path.stat().st_size for path in files(store)) < 1_000_000


def test_less_room_than_before_is_made_a_few_clips_at_a_time(tmp_path):
    """So that no wake waits for hundreds of them."""
    store = Store(tmp_path)
    for _ in range(60):
        store.add_clip(CLIP, SOUND)
    store.close()
    less, left = Store(tmp_path, clips_max_mb=1), []  # eight clips
    for _ in range(4):
        less.add_clip(CLIP, SOUND)
        left.append(len(less.clips()))

    assert left == [61 - FEW, 62 - 2 * FEW, 8, 8] and less.clips()[-1].id == 64


def test_what_is_too_old_is_deleted(tmp_path):
    clocks = Clocks()
    store = clocks.store(tmp_path, clips_max_days=30)
    store.confirm_clip(store.add_clip(CLIP, SOUND).id)
    clocks.go(29 * 86_400)
    store.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    before = [one.id for one in store.clips()]
    clocks.go(2 * 86_400)
    store.add_event(WAKE)

    assert (before, [one.id for one in store.clips()], len(files(store))) == ([1, 2], [2], 1)


def test_clips_grow_too_old_where_nothing_wakes_too(tmp_path):
    clocks = Clocks()
    store = clocks.store(tmp_path, clips_max_days=30)
    for _ in range(2 * FEW + 1):
        store.add_clip(CLIP, SOUND)
    clocks.go(31 * 86_400)
    sink = StoreSink(store)
    delivery = Delivery([sink], keep=sink.keep, tidy=sink.tidy, tidy_s=0.01)
    end_s = time.monotonic() + 30
    while files(store) and time.monotonic() < end_s:
        time.sleep(0.01)
    delivery.close()

    assert (files(store), Store(tmp_path).clips()) == ([], [])


def test_a_clock_that_is_wrong_for_a_moment_costs_nothing(tmp_path):
    """Years ahead at the start, or while running; then it is right again."""
    clocks = Clocks(wall_s=2e9)
    store = clocks.store(tmp_path)
    store.add_event(dataclasses.replace(WAKE, time_s=2e9))
    store.add_clip(dataclasses.replace(CLIP, time_s=2e9), SOUND)
    clocks.wall_s += 1e9
    for _ in range(10):
        clocks.go(60)
        store.add_event(WAKE)
    store.close()
    other = clocks.store(tmp_path)  # a new start with the wrong clock
    other.add_event(WAKE)
    clocks.wall_s -= 1e9
    clocks.go(7200)
    other.add_event(WAKE)

    assert len(store.clips()) == 1


def test_a_store_that_is_opened_under_a_wrong_clock_believes_no_event_that_is_dated_by_it(tmp_path):
    """The board starts years ahead, and its listener says so; what runs for a moment beside it deletes nothing, nor does the listener."""
    clocks = Clocks()
    clocks.store(tmp_path).add_clip(CLIP, SOUND)
    clocks.wall_s = 2e9
    listener = clocks.store(tmp_path)
    listener.add_event(dataclasses.replace(WAKE, kind="start", time_s=2e9))
    clocks.go(60)
    for _ in range(2):
        beside = clocks.store(tmp_path)
        beside.add_event(dataclasses.replace(WAKE, kind="round", time_s=clocks.wall_s))
        beside.reject_clip(1)
        clocks.go(1200)
    listener.add_event(WAKE)
    clocks.wall_s = 4000.0
    clocks.go(7200)
    listener.add_event(WAKE)

    assert len(listener.clips()) == len(files(listener)) == 1


def test_a_listener_that_runs_for_days_keeps_to_the_age_and_a_night_s_process_leaves_that_to_it(tmp_path):
    clocks, ages = Clocks(), []
    listener = clocks.store(tmp_path, clips_max_days=3)
    for _ in range(10):
        for _ in range(4):
            listener.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
            clocks.go(6 * 3600)
        clocks.store(tmp_path, clips_max_days=1).add_event(dataclasses.replace(WAKE, kind="round", time_s=clocks.wall_s))
        ages.append((clocks.wall_s - listener.clips()[0].time_s) / 86_400)

    assert ages == [1.0, 2.0, 3.0] + [3.25] * 7


def test_a_clip_from_a_wrong_future_ages_all_the_same(tmp_path):
    clocks = Clocks(1.79e9)
    store = clocks.store(tmp_path)
    store.add_clip(dataclasses.replace(CLIP, time_s=4e9), SOUND)
    for days in (1, 31):
        clocks.go(days * 86_400)
        store.add_event(WAKE)

    assert store.clips() == [] == files(store)


@pytest.mark.parametrize("lags_to_s", [0.0, 1_700_000_000.0])
def test_a_board_that_begins_in_the_past_takes_no_clip_for_one_of_the_future(tmp_path, lags_to_s):
    """A clock without a battery, for hours without a network, then set."""
    clocks = Clocks(1.79e9)
    store = clocks.store(tmp_path)
    store.add_event(dataclasses.replace(WAKE, time_s=clocks.wall_s))
    kept = store.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    for wall_s in (lags_to_s, 1.79e9 + 86_400):
        clocks.wall_s = wall_s
        store = clocks.store(tmp_path)
        for _ in range(3):
            store.add_event(dataclasses.replace(WAKE, kind="gap", time_s=clocks.wall_s))
            clocks.go(3700)

    assert store.clips() == [kept]


@pytest.mark.parametrize("first_s", [1_700_000_000.0, 4e9])
def test_one_event_of_a_wrong_year_decides_nothing_about_the_clock(tmp_path, first_s):
    """The first start came before the time was known, or when it was wrong; later the clock lags once more, or a clip is of the future."""
    clocks = Clocks(1.79e9)
    store = clocks.store(tmp_path)
    for time_s in (first_s, *[clocks.wall_s] * 3):
        store.add_event(dataclasses.replace(WAKE, time_s=time_s))
    kept = store.add_clip(dataclasses.replace(CLIP, time_s=4e9 if first_s == 4e9 else clocks.wall_s), SOUND)
    if first_s < 1.79e9:
        clocks.wall_s = first_s + 100
    store = clocks.store(tmp_path)
    for _ in range(9):
        clocks.go(3700)
        store.add_event(dataclasses.replace(WAKE, kind="gap", time_s=clocks.wall_s))

    assert [clip.time_s < 1.8e9 for clip in store.clips()] == [True]
    assert (store.clips() == [kept]) == (first_s < 1.79e9)


def test_what_was_kept_before_the_clock_was_set_is_dated_anew_and_what_an_earlier_listener_kept_is_not(tmp_path):
    """Two days without a network, then NTP: an hour later all of it was deleted as years old, the confirmed too."""
    clocks = Clocks(1.79e9)
    earlier = clocks.store(tmp_path)
    earlier.add_event(dataclasses.replace(WAKE, time_s=clocks.wall_s))
    earlier.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    clocks.wall_s = 1.62e9
    listener, ages = clocks.store(tmp_path), []
    for _ in range(2):
        listener.confirm_clip(listener.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND).id)
        clocks.go(86_400)
    clocks.wall_s += 1.8e8
    for seconds in (0, 3700, 28 * 86_400):
        clocks.go(seconds)
        listener.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
        ages.append({clip.id: round((clocks.wall_s - clip.time_s) / 86_400) for clip in listener.clips()})

    assert ages == [{1: 118, 2: 2, 3: 1, 4: 0}, {2: 2, 3: 1, 4: 0, 5: 0}, {3: 29, 4: 28, 5: 28, 6: 0}]


def test_a_clip_is_dated_anew_once_whichever_store_sees_the_clock_leap(tmp_path):
    clocks = Clocks(1.62e9)
    listener, socket = clocks.store(tmp_path), clocks.store(tmp_path)
    for one in (listener, socket):
        one.add_event(WAKE)
    listener.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    clocks.wall_s += 1.8e8
    for one in (socket, listener, socket):
        one.add_event(WAKE)

    assert [clip.time_s for clip in listener.clips()] == [clocks.wall_s]


def test_of_two_spellings_of_a_keyword_the_named_one_s_clips_are_purged(tmp_path):
    """Of the bundled "hey jetson", say, beside an enrolled "Hey Jetson"."""
    with contextlib.closing(Store(tmp_path)) as store:
        for name in ("hey jetson", "Hey Jetson"):
            store.add_clip(dataclasses.replace(CLIP, keyword=name), SOUND)
        config = tmp_path / "edgekws.toml"
        config.write_text(f'[store]\nroot = "{tmp_path}"\n')
        assert main(["clips", "purge", "--keyword", "hey jetson", "--config", str(config)]) == 0
        assert [one.keyword for one in store.clips()] == ["Hey Jetson"]
        assert main(["clips", "purge", "--keyword", "HEY  JETSON", "--config", str(config)]) == 0
        assert store.clips() == []


def test_a_wrong_year_for_a_moment_makes_no_clip_new_again(tmp_path):
    clocks = Clocks(1.79e9)
    listener = clocks.store(tmp_path)
    listener.add_event(dataclasses.replace(WAKE, time_s=clocks.wall_s))
    listener.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    clocks.go(20 * 86_400)
    for leap_s in (3e8, -3e8):
        clocks.wall_s += leap_s
        listener.add_event(dataclasses.replace(WAKE, time_s=clocks.wall_s))
        clocks.go(5)
    clocks.go(7200)
    listener.add_event(dataclasses.replace(WAKE, time_s=clocks.wall_s))

    assert [round((clocks.wall_s - clip.time_s) / 86_400) for clip in listener.clips()] == [20]


def test_a_machine_that_slept_for_days_makes_no_clip_younger(tmp_path, monkeypatch):
    """The clock that only goes forward must go on in its sleep."""
    clocks = Clocks(1.79e9)
    monkeypatch.setattr(store_module.time, "clock_gettime", lambda id: clocks.steady_s if id == time.CLOCK_BOOTTIME else 0.0)
    store = Store(tmp_path, now=lambda: clocks.wall_s)
    store.add_clip(dataclasses.replace(CLIP, time_s=clocks.wall_s), SOUND)
    clocks.go(3 * 86_400)
    store.add_event(WAKE)

    assert [clocks.wall_s - clip.time_s for clip in store.clips()] == [3 * 86_400]


@pytest.mark.parametrize(("ahead_s", "kept"), [(2e8, 1), (3600.0, 0)])
def test_clips_that_an_unset_clock_takes_for_the_future_s_take_no_day_s_allowance(tmp_path, monkeypatch, ahead_s, kept):
    """Weeks of them counted as of this hour, where a board has no battery; those of a clock that was set back a little still do."""
    store = Store(tmp_path)
    for _ in range(20):
        store.add_clip(dataclasses.replace(CLIP, time_s=1.79e9), np.zeros(1280, np.int16))
    monkeypatch.setattr(cli, "time", SimpleNamespace(time=lambda: 1.79e9 - ahead_s))
    labels = cli._labels(Settings(), store, [Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.5)])
    noise = np.random.default_rng(0).normal(0, 1000, (60, HOP_SAMPLES)).astype(np.int16)
    cuts = []
    for hop, samples in enumerate(noise, 1):
        found = [Detection("hey", "ann", 2.0, 0.5, hop * HOP_SAMPLES)] if hop == 40 else []
        cuts += labels.step(samples, hop * HOP_SAMPLES, {("hey", "ann"): 2.0 if found else -9.0}, found)

    assert len(cuts) == kept and labels.counts["too_many"] == 1 - kept


def test_a_purge_writes_over_the_audio_before_it_deletes(store):
    """A second name of the file shows what became of its bytes."""
    clip = store.add_clip(CLIP, SOUND)
    path = store.root / "clips" / clip.file
    os.link(path, store.root / "other")
    assert store.purge_clips() == 1

    assert store.clips() == [] == files(store)
    assert (store.root / "other").read_bytes() == b"\0" * (44 + 2 * len(SOUND))


def test_a_wake_that_deletes_nothing_waits_for_no_lock(store):
    """Whoever holds it, and for as long."""
    store.add_clip(CLIP, SOUND)
    with (store.root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = threading.Thread(target=lambda: store.add_event(WAKE), daemon=True)
        told.start()
        told.join(30)
        waits = told.is_alive()

    assert not waits and len(store.events()) == 1


def test_a_purge_lets_others_in_before_it_has_deleted_everything(store, monkeypatch):
    for _ in range(2 * BATCH + 1):
        store.add_clip(CLIP, SOUND)
    seen = []

    def pause(seconds):
        other = threading.Thread(target=lambda: seen.append(Store(store.root).add_clip(CLIP, SOUND).id), daemon=True)
        other.start()
        other.join(30)
        seen.append(len(store.clips()))
        assert {one.reason for one in store.clips() if one.id <= 2 * BATCH + 1} == {GOING}  # who looks in between is told

    monkeypatch.setattr(store_module.time, "sleep", pause)

    assert store.purge_clips() == 2 * BATCH + 1
    assert seen == [2 * BATCH + 2, BATCH + 2, 2 * BATCH + 3, 3]
    assert [one.id for one in store.clips()] == [2 * BATCH + 2, 2 * BATCH + 3]  # what came meanwhile


def test_a_purge_takes_only_what_it_was_asked_for(store):
    for time_s, keyword in ((1.0, "hey"), (2.0, "hey"), (1.0, "ho")):
        store.add_clip(dataclasses.replace(CLIP, time_s=time_s, keyword=keyword), SOUND)

    assert store.purge_clips(before_s=1.5, keyword="hey") == 1
    assert [one.id for one in store.clips()] == [2, 3]
    assert store.purge_clips(before_s=1.5) == 1
    assert [one.id for one in store.clips()] == [2]


def test_only_its_owner_may_read_the_audio(store):
    store.add_clip(CLIP, SOUND)

    assert (store.root / "clips").stat().st_mode & 0o777 == 0o700 == store.root.stat().st_mode & 0o777


def test_audio_without_a_row_is_deleted_when_the_database_opens(store, caplog):
    kept = store.add_clip(CLIP, SOUND)
    (store.root / "clips" / "0123456789abcdef.wav").write_bytes(b"half a cl")
    store.close()

    assert Store(store.root).clips() == [kept]
    assert [path.name for path in files(store)] == [kept.file] and "1 clips without a row" in caplog.text


def test_another_process_that_opens_the_store_leaves_a_clip_alone_that_is_being_written(store, monkeypatch):
    """It waits until the row is there."""
    others = [threading.Thread(target=lambda: Store(store.root).clips())]  # to a file lock it is as another process

    def write(path, samples):
        real(path, samples)
        others[0].start()
        others[0].join(0.5)
        assert others[0].is_alive()

    real = store_module.write_wav
    monkeypatch.setattr(store_module, "write_wav", write)
    kept = store.add_clip(CLIP, SOUND)
    others[0].join()

    assert len(store.clip_samples(kept)) == len(SOUND)


def test_killed_at_any_moment_no_row_is_without_its_audio(tmp_path):
    """kill -9 while it adds, rejects and purges."""
    script = f"""
import itertools, numpy as np
from pathlib import Path
from edgekws.store import Store
from edgekws.values import Clip
store = Store(Path({str(tmp_path / "state")!r}), clips_max_mb=1)
print("go", flush=True)
for i in itertools.count():
    if i % 7 == 0:  # first of all too: where 25 rejected ones are kept, which is all that may be, a new one goes at once
        store.purge_clips(keyword="hey")
    clip = store.add_clip(Clip("positive", "hey", "", 1.0, 1280, 0.0, "woke", time_s=1.0), np.full(20_000, 7, np.int16))
    store.reject_clip(clip.id)
"""
    random = np.random.default_rng(0)
    for _ in range(15):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(float(random.uniform(0.0, 0.15)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = Store(tmp_path / "state")

        assert all(len(store.clip_samples(clip)) == 20_000 for clip in store.clips())
        assert {path.name for path in files(store)} == {clip.file for clip in store.clips()}
        store.close()


def test_a_database_of_the_first_version_keeps_its_events(tmp_path):
    with sqlite3.connect(tmp_path / "edgekws.db") as db:
        db.executescript(f"PRAGMA journal_mode = WAL; {store_module.MIGRATIONS[0]}; PRAGMA user_version = 1;")
        db.execute("INSERT INTO events VALUES (41, 'wake', 1000.0, 4.2, 'hey', 'ann', 1.5, 0.7, 0.3, 'edge-3', '{}')")
    db.close()
    store = Store(tmp_path)
    store.add_clip(CLIP, SOUND)

    assert store.events() == [dataclasses.replace(WAKE, id=41)]
    assert store.add_event(WAKE).id == 42
    assert store._execute("PRAGMA user_version")[0] == [(store_module.SCHEMA,)]


def test_clips_of_the_second_version_get_the_threshold_of_their_keyword(tmp_path):
    with sqlite3.connect(tmp_path / "edgekws.db") as db:
        before = ";".join(store_module.MIGRATIONS[:2])
        db.executescript(f"PRAGMA journal_mode = WAL; {before}; PRAGMA user_version = 2;")
        db.execute("INSERT INTO events VALUES (1, 'wake', 1000.0, 4.2, 'hey', 'ann', 1.5, 0.7, 0.3, 'edge-3', '{}')")
        for keyword in ("hey", "ho"):
            row = ("between", keyword, "ann", 0.1, 0, 1.0, "0.6 below", "quarantined", "edge-3", 1000.0, 0, f"{keyword}.wav")
            db.execute(f"INSERT INTO clips VALUES (NULL, {', '.join('?' * len(row))})", row)
    db.close()

    assert [clip.threshold for clip in Store(tmp_path).clips()] == [0.7, 0.0]


def test_any_wake_can_be_rejected_and_nothing_else(store):
    wakes = [store.add_event(dataclasses.replace(WAKE, time_s=1000.0 + i)) for i in range(2)]
    clips = [store.add_clip(dataclasses.replace(CLIP, event=wake.id), SOUND) for wake in wakes]
    rejected, clip = store.reject_wake(wakes[0].id)

    assert (rejected, clip.id, clip.label) == (wakes[0], clips[0].id, "negative")
    assert [one.label for one in store.clips()] == ["negative", "positive"]
    for unknown in (store.last_event(), 999, -1):  # the first is the event of the rejection
        with pytest.raises(StoreError, match=f"there is no wake {unknown}"):
            store.reject_wake(unknown)


@pytest.fixture
def small_disk(tmp_path):
    """1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_the_new_clip_only_and_a_purge_still_works(small_disk):
    store = Store(small_disk / "state")
    store.add_clip(CLIP, SOUND)
    with pytest.raises(StoreError, match="Free space"):
        for _ in range(20):
            store.add_clip(CLIP, SOUND)
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)
    kept = store.clips()

    assert len(kept) >= 5 and [len(store.clip_samples(one)) for one in kept] == [len(SOUND)] * len(kept)
    assert {one.file for one in kept} == {path.name for path in files(store)}
    assert store.purge_clips() == len(kept)
    assert store.clips() == [] == files(store)
    store.add_clip(CLIP, SOUND)
    store.close()


@pytest.mark.parametrize("samples", [len(SOUND), 4000], ids=["long", "short"])
def test_who_comes_to_a_full_disk_frees_space_by_a_purge(small_disk, samples):
    """A clip of a second would not free what the note of its own deletion takes."""
    store = Store(small_disk / "state")
    for _ in range(7):
        store.add_clip(CLIP, SOUND[:samples])
    store.close()
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)
    store = Store(store.root)

    assert len(store.clips()) == store.purge_clips() == 7
    assert store.clips() == [] == files(store)
    store.close()


def test_a_voice_that_is_no_longer_enrolled_is_not_kept_in_clips_either(store):
    for keyword, speaker in (("hey", "ann"), ("hey", "bob"), ("ho", "ann")):
        store.save_enrolment(keyword, speaker, [SOUND])
        store.add_clip(dataclasses.replace(CLIP, keyword=keyword, speaker=speaker), SOUND)
    store.remove_enrolment("hey", "ann")

    assert [(one.keyword, one.speaker) for one in store.clips()] == [("hey", "bob"), ("ho", "ann")]
    store.remove_enrolment("hey")
    assert [one.keyword for one in store.clips()] == ["ho"] and len(files(store)) == 1


def test_a_removal_that_is_interrupted_can_be_asked_for_again(store, monkeypatch):
    store.save_enrolment("hey", "ann", [SOUND])
    store.add_clip(dataclasses.replace(CLIP, keyword="hey", speaker="ann"), SOUND)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_delete_clips", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.remove_enrolment("hey", "ann")

    assert [one.speaker for one in store.remove_enrolment("hey", "ann")] == ["ann"]
    assert store.clips() == [] == files(store) and store.enrolments() == []


def interrupted(*args):
    raise KeyboardInterrupt


# On the way from the listener to the store.


def test_a_disk_that_stalls_costs_clips_and_neither_time_nor_events():
    stalled, told = threading.Event(), []

    class Told:
        def deliver(self, event):
            told.append(event)

        def close(self):
            pass

    delivery = Delivery([Told()], keep=lambda clip, samples: stalled.wait(30))
    for _ in range(100):
        delivery.put_clip(CLIP, SOUND)  # returns at once
    delivery.put(WAKE)
    stalled.set()
    delivery.close()

    assert told == [WAKE] and delivery.clips_dropped == 100 - QUEUE_CLIPS


def test_a_clip_that_cannot_be_kept_is_counted_and_the_next_ones_are_tried(caplog):
    """A full disk, from the third clip to the fifth."""
    tried = []

    def keep(clip, samples):
        tried.append(clip)
        if 3 <= len(tried) <= 5:
            raise StoreError("no room")

    delivery = Delivery([], keep=keep)
    for _ in range(QUEUE_CLIPS + 5):
        delivery.put_clip(CLIP, SOUND, wait=True)
    delivery.close()

    assert (len(tried), delivery.clips_dropped) == (QUEUE_CLIPS + 5, 3)
    assert [record.message for record in caplog.records] == ["no room"]


# The whole way.


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "edgekws.toml"
    path.write_text(f'[store]\nroot = "{tmp_path / "state"}"\n')
    assert main(["enroll", "open sesame", "--speaker", "ann", *map(str, sorted(DEMO.glob("enrol-*.flac"))), "--config", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The demo's stream, then 25 s of a quiet room."""
    samples, _ = soundfile.read(DEMO / "stream.flac", dtype="int16")
    room = np.random.default_rng(0).normal(0, 30, 25 * SAMPLE_RATE_HZ).astype(np.int16)
    path = tmp_path_factory.mktemp("recording") / "stream.wav"
    soundfile.write(path, np.concatenate([samples, room]), SAMPLE_RATE_HZ)
    return path


def listed(config, capsys, *arguments):
    capsys.readouterr()
    assert main(["clips", *arguments, "--json", "--config", str(config)]) == 0
    return json.loads(capsys.readouterr().out)


def test_listening_keeps_wakes_and_the_room(config, recording, capsys, tmp_path):
    assert main(["run", "--source", f"file:{recording}", "--config", str(config)]) == 0
    truth = json.loads((DEMO / "truth.json").read_text())
    store = Store(tmp_path / "state")
    wakes = [event for event in store.events() if event.kind == "wake"]
    positives = listed(config, capsys, "--label", "positive")
    rooms = listed(config, capsys, "--label", "negative", "--keyword", "")

    assert len(positives) == len(truth["spoken"])
    assert [(one["event"], one["time_s"], one["model"]) for one in positives] == [(one.id, one.time_s, one.model) for one in wakes]
    assert {one["state"] for one in positives} == {"quarantined"} and {one["duration_s"] for one in rooms} == {10.0}
    stream, _ = soundfile.read(recording, dtype="int16")
    for clip, wake in zip(store.clips(label="positive"), wakes, strict=True):
        first = round(wake.stream_s * SAMPLE_RATE_HZ) - clip.decided_sample
        np.testing.assert_array_equal(store.clip_samples(clip), stream[first : first + len(store.clip_samples(clip))])


def test_the_same_recording_again_is_kept_once(config, recording, capsys):
    main(["run", "--source", f"file:{recording}", "--config", str(config)])
    before = [one for one in listed(config, capsys) if one["keyword"]]
    stop = Store(config.parent / "state").events()[-1].extra["clips"]
    assert stop == {"cut": len(listed(config, capsys)), "too_many": 0, "alike": 0, "lost": 0}
    for _ in range(2):
        main(["run", "--source", f"file:{recording}", "--config", str(config)])

    assert [one for one in listed(config, capsys) if one["keyword"]] == before


def test_that_was_wrong_of_a_recording_that_wakes_again_and_again_reaches_the_clip_of_the_first_time(config, recording, capsys):
    for _ in range(2):
        main(["run", "--source", f"file:{recording}", "--config", str(config)])
    before = listed(config, capsys, "--label", "positive")
    (rejected,) = listed(config, capsys, "reject", "--last")

    assert rejected == {**before[-1], "label": "negative", "state": "confirmed", "reason": "rejected by the user"}
    assert listed(config, capsys, "--label", "positive") == before[:-1]


def test_the_user_can_say_that_was_wrong_and_play_it_and_delete_it(config, recording, capsys, tmp_path):
    main(["run", "--source", f"file:{recording}", "--config", str(config)])
    (rejected,) = listed(config, capsys, "reject", "--last")
    (confirmed,) = listed(config, capsys, "confirm", "1")
    out = tmp_path / "clip.wav"
    assert main(["clips", "play", str(rejected["id"]), "--out", str(out), "--config", str(config)]) == 0

    assert (rejected["label"], rejected["state"], rejected["reason"]) == ("negative", "confirmed", "rejected by the user")
    assert (confirmed["id"], confirmed["state"]) == (1, "confirmed")
    assert soundfile.info(out).duration == rejected["duration_s"]
    main(["clips", "purge", "--older-than", "1h", "--config", str(config)])
    main(["clips", "purge", "--keyword", "other", "--config", str(config)])
    main(["clips", "purge", "--state", "confirmed", "--config", str(config)])
    assert {one["state"] for one in listed(config, capsys)} == {"quarantined"}
    main(["clips", "purge", "--config", str(config)])
    assert listed(config, capsys) == [] and list((tmp_path / "state" / "clips").glob("*")) == []


def test_of_a_wake_without_audio_confirm_last_says_that_its_rejection_is_taken_back(config, capsys):
    Store(config.parent / "state").add_event(WAKE)
    assert main(["clips", "reject", "--last", "--config", str(config)]) == 0
    assert main(["clips", "confirm", "--last", "--config", str(config)]) == 0
    assert capsys.readouterr().out.endswith('the last wake of "hey" is not rejected any more; none of its audio was kept\n')


def test_of_a_wake_like_a_clip_that_the_user_confirmed_reject_last_names_that_clip(config, capsys):
    store = Store(config.parent / "state")
    first, second = store.add_event(WAKE), store.add_event(WAKE)
    store.add_clip(dataclasses.replace(CLIP, keyword="other"), SOUND)
    clip = store.confirm_clip(store.add_clip(dataclasses.replace(CLIP, event=first.id), SOUND).id)
    store.note_alike(second.id, clip.file)
    capsys.readouterr()

    assert main(["clips", "reject", "--last", "--config", str(config)]) == 0
    assert capsys.readouterr().out == (
        'the last wake of "hey" is rejected; its audio is clip 2, which you confirmed; to take that back: edgekws clips reject 2\n'
    )
    assert store.clip(2) == clip


def test_a_keyword_s_clips_are_listed_and_purged_in_any_spelling(config, capsys):
    store = Store(config.parent / "state")
    for keyword in ("open sesame", "other"):
        store.add_clip(dataclasses.replace(CLIP, keyword=keyword), SOUND)

    assert [one["id"] for one in listed(config, capsys, "--keyword", "Open  Sesame")] == [1]
    assert main(["clips", "purge", "--keyword", "OPEN SESAME", "--config", str(config)]) == 0
    assert [one.keyword for one in store.clips()] == ["other"]


def test_nothing_is_kept_where_that_is_not_wanted(config, recording, capsys, tmp_path):
    config.write_text(config.read_text() + "[learning]\nkeep_audio = false\n")
    main(["run", "--source", f"file:{recording}", "--config", str(config)])

    assert listed(config, capsys) == [] and not (tmp_path / "state" / "clips").exists()


@pytest.mark.parametrize(
    "arguments", [["play"], ["confirm"], ["reject", "1", "--last"], ["list", "1"], ["purge", "1"], ["purge", "--older-than", "x"]]
)
def test_wrong_usage_says_what_is_right(config, arguments, capsys):
    assert main(["clips", *arguments, "--config", str(config)]) == 2
    assert "Try: edgekws clips list" in (said := capsys.readouterr().err) or "accepted is" in said


@pytest.mark.parametrize("arguments", [["confirm", "7"], ["reject", "--last"], ["play", "--last"]])
def test_what_is_not_there_is_one_clear_sentence(config, arguments, capsys):
    capsys.readouterr()
    assert main(["clips", *arguments, "--config", str(config)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_no_empty_file_is_left_where_there_is_nothing_to_play(config, tmp_path):
    out = tmp_path / "out.wav"

    assert main(["clips", "play", "4711", "--out", str(out), "--config", str(config)]) == 1
    assert not out.exists()

    out.write_bytes(b"mine")
    assert main(["clips", "play", "4711", "--out", str(out), "--config", str(config)]) == 1
    assert out.read_bytes() == b"mine"
