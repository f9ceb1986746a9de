import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgekws.pseudo_labels import (
    AFTER_HOPS,
    BEFORE_HOPS,
    BETWEEN,
    FAR,
    MISSED,
    PER_DAY,
    PER_HOUR,
    QUIET_HOPS,
    RING_HOPS,
    ROOM_HOPS,
    PseudoLabels,
)
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, Detection, Enrolled
from edgekws.voice import speech_span

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"
KEY = ("hey", "ann")
ENROLLED = [Enrolled("hey", "ann", np.eye(1, 2, dtype=np.float32), 0.5)]
QUIET = -9.0


class Stream:
    """Hops of noise, each with a score; `woke` as the detector would say it."""

    def __init__(self, labels=None, seed=0):
        self.labels = labels or PseudoLabels(ENROLLED)
        self.random = np.random.default_rng(seed)
        self.heard = np.zeros(0, np.int16)
        self.cuts, self.alike = [], []

    def hops(self, *scores, woke=True, audio=None, missed=False):
        for i, score in enumerate(scores):
            hop = self.random.integers(-9000, 9000, HOP_SAMPLES).astype(np.int16) if audio is None else audio[i]
            self.heard = np.concatenate([self.heard, hop])[-200 * HOP_SAMPLES :]
            end = (self.labels._hops + 1) * HOP_SAMPLES
            found = [Detection("hey", "ann", score, 0.5, end)] if woke and score >= 0.5 else []
            before = [Detection("hey", "ann", 1.0, 0.5, end)] if missed else []
            for cut in self.labels.step(hop, end, {KEY: score}, found, before):
                (self.alike if cut.clip.label == "alike" else self.cuts).append(cut)
        return self

    def quiet(self, hops=60):
        return self.hops(*[-1.9] * hops)  # too high for the room, in the middle of a near miss that goes on


def word(score, audio=None, **options):
    """Two hops up, one down."""
    return Stream().hops(*[QUIET] * 50).hops(score - 0.3, score, QUIET, **options).hops(*[QUIET] * 20)


@pytest.mark.parametrize(
    ("score", "label"),
    [
        (0.5, "positive"),
        (3.0, "positive"),
        (0.49, "between"),
        (0.51 - BETWEEN, "between"),
        (0.49 - BETWEEN, "negative"),
        (0.51 - FAR, "negative"),
    ],
)
def test_a_moment_is_labelled_by_its_distance_from_the_threshold_which_its_clip_says(score, label):
    stream = word(score) if score < 0.5 else Stream().hops(*[QUIET] * 51).hops(score, QUIET).hops(*[QUIET] * 20)
    (cut,) = stream.cuts

    assert (cut.clip.label, cut.clip.keyword, cut.clip.speaker, cut.clip.score) == (label, "hey", "ann", pytest.approx(score))
    assert (cut.clip.state, cut.clip.threshold) == ("quarantined", pytest.approx(0.5))


def test_what_is_far_from_every_keyword_is_no_moment():
    assert word(0.49 - FAR).cuts == []


@pytest.mark.parametrize("score", [2.0, 0.0])
def test_a_clip_holds_3_s_before_its_decision_and_half_a_second_after(score):
    stream = Stream().hops(*[QUIET] * 51).hops(score, QUIET).hops(*[QUIET] * 20)
    (cut,) = stream.cuts
    end = 52 * HOP_SAMPLES

    assert (cut.end_sample, cut.clip.decided_sample, len(cut.samples)) == (end, BEFORE_HOPS * HOP_SAMPLES, 44 * HOP_SAMPLES)
    np.testing.assert_array_equal(cut.samples, stream.heard[end - BEFORE_HOPS * HOP_SAMPLES : end + AFTER_HOPS * HOP_SAMPLES])
    assert cut.clip.duration_s == 3.52


def test_at_the_beginning_of_a_stream_a_clip_is_shorter():
    (cut,) = Stream().hops(QUIET, QUIET, 2.0).hops(*[QUIET] * 10).cuts

    assert (cut.clip.decided_sample, len(cut.samples)) == (3 * HOP_SAMPLES, 9 * HOP_SAMPLES)


def test_at_the_end_of_a_stream_or_a_gap_a_wake_is_not_lost_and_the_next_clip_begins_behind_it():
    stream = Stream().hops(QUIET, QUIET, 2.0)
    (cut,) = stream.labels.end()
    stream.hops(QUIET, 2.0).hops(*[QUIET] * 10)

    assert (cut.clip.label, cut.clip.decided_sample, len(cut.samples)) == ("positive", 3 * HOP_SAMPLES, 3 * HOP_SAMPLES)
    assert [len(one.samples) for one in stream.cuts] == [8 * HOP_SAMPLES]


def test_the_way_up_to_a_wake_and_its_tail_are_no_near_misses():
    stream = Stream().hops(*[QUIET] * 50).hops(-1.0, 0.3, 2.0, 0.4, 0.2, -0.5).hops(*[QUIET] * 30)

    assert [one.clip.label for one in stream.cuts] == ["positive"]


def test_a_second_word_within_the_refractory_time_is_no_near_miss():
    stream = Stream().hops(*[QUIET] * 50).hops(2.0).hops(*[QUIET] * 15).hops(3.0, woke=False).hops(*[QUIET] * 40)

    assert [one.clip.label for one in stream.cuts] == ["positive"]


@pytest.mark.parametrize("behind", [17, QUIET_HOPS - 1])
def test_nothing_within_two_seconds_after_a_wake_is_a_near_miss(behind):
    stream = Stream().hops(*[QUIET] * 50, 2.0, *[QUIET] * (behind - 1), 0.3, QUIET).hops(*[QUIET] * 40)

    assert [one.clip.label for one in stream.cuts] == ["positive"]


@pytest.mark.parametrize("score", [QUIET, -1.5, 0.0])
def test_what_only_the_version_before_wakes_at_is_a_moment_between_however_low_its_score(score):
    stream = Stream().hops(*[QUIET] * 50).hops(score, missed=True).hops(score + 0.1, QUIET).hops(*[QUIET] * 20)
    (cut,) = stream.cuts

    assert (cut.clip.label, cut.clip.score, cut.clip.decided_sample) == ("between", score, BEFORE_HOPS * HOP_SAMPLES)
    assert cut.clip.reason == f"{0.5 - score:.2f} below the threshold, where the version before would have woken"


@pytest.mark.parametrize("hops", [5, 12])
def test_where_the_version_before_is_quicker_by_less_than_a_second_there_is_one_clip(hops):
    stream = Stream().hops(*[QUIET] * 50).hops(0.3, missed=True).hops(*[QUIET] * (hops - 1), 2.0, *[QUIET] * 40)

    assert [one.clip.label for one in stream.cuts] == ["positive"]


@pytest.mark.parametrize("hops", [18, QUIET_HOPS - 1])
def test_what_the_version_before_wakes_at_within_two_seconds_of_a_wake_speaks_for_no_version(hops):
    """A word said twice: the one in use has woken, and holds its refractory time."""
    stream = Stream().hops(*[QUIET] * 50, 2.0, *[QUIET] * (hops - 1)).hops(0.3, missed=True).hops(*[QUIET] * 40)

    assert [one.clip.label for one in stream.cuts] == ["positive"]


def test_what_the_version_before_wakes_at_of_somebody_who_was_removed_is_nothing():
    labels, hop = PseudoLabels(ENROLLED), np.ones(HOP_SAMPLES, np.int16)
    of_bob = [Detection("hey", "bob", 1.0, 0.5, HOP_SAMPLES)]
    cuts = labels.step(hop, HOP_SAMPLES, {KEY: QUIET}, [], of_bob)
    labels.listen_for([])
    cuts += labels.step(hop, 2 * HOP_SAMPLES, {}, [], [Detection("hey", "ann", 1.0, 0.5, 2 * HOP_SAMPLES)])

    assert cuts == labels.end() == []


def test_the_room_is_not_taken_around_what_the_version_before_wakes_at():
    stream = Stream().hops(*[QUIET] * 100).hops(QUIET, missed=True).hops(*[QUIET] * 137)

    assert [one.clip.keyword for one in stream.cuts] == ["hey"]


def test_of_a_long_near_miss_the_highest_hop_counts():
    (cut,) = Stream().hops(*[QUIET] * 50).hops(-0.5, -0.2, 0.1, 0.0, -0.3).hops(*[QUIET] * 30).cuts

    assert cut.clip.score == pytest.approx(0.1) and cut.end_sample == 53 * HOP_SAMPLES
    assert cut.clip.reason == "0.40 below the threshold"


def test_the_best_speaker_of_a_keyword_decides_by_their_own_threshold():
    enrolled = [*ENROLLED, Enrolled("hey", "bob", np.eye(1, 2, dtype=np.float32), 2.0)]
    labels = PseudoLabels(enrolled)
    cuts = []
    for hop in range(40):
        scores = {KEY: -0.5, ("hey", "bob"): 1.8} if hop == 20 else {KEY: QUIET, ("hey", "bob"): QUIET}
        cuts += labels.step(np.full(HOP_SAMPLES, hop, np.int16), (hop + 1) * HOP_SAMPLES, scores, [])

    assert [(one.clip.label, one.clip.speaker) for one in cuts] == [("between", "bob")]


def test_ten_seconds_far_from_every_keyword_are_the_room_without_the_last_second():
    stream = Stream().hops(*[QUIET] * 138)
    (cut,) = stream.cuts

    assert (cut.clip.label, cut.clip.keyword, cut.clip.score) == ("negative", "", QUIET)
    assert cut.clip.duration_s == 10.0 and cut.clip.decided_sample == len(cut.samples)
    np.testing.assert_array_equal(cut.samples, stream.heard[: ROOM_HOPS * HOP_SAMPLES])


@pytest.mark.parametrize("score", [0.51 - FAR, 3.0, float("nan")])
def test_the_room_is_never_taken_around_a_score_that_is_not_clearly_low(score):
    stream = Stream().hops(*[QUIET] * 100).hops(score, woke=False).hops(*[QUIET] * 137)

    assert [one for one in stream.cuts if not one.clip.keyword] == []


def test_the_room_is_never_taken_across_a_gap():
    stream = Stream().hops(*[QUIET] * 100)
    stream.labels.end()
    stream.hops(*[QUIET] * (RING_HOPS - 1))
    assert stream.cuts == []

    assert [one.clip.keyword for one in stream.hops(QUIET).cuts] == [""]


@pytest.mark.parametrize("value", [0, -1])
def test_a_microphone_that_is_muted_or_stuck_is_no_room(value):
    stream = Stream().hops(*[QUIET] * 400, audio=np.full((400, HOP_SAMPLES), value, np.int16))

    assert stream.cuts == []


def test_the_room_is_taken_often_at_first_and_all_day_long():
    """Two days of clear hops; after the first hour only every tenth is heard."""
    labels, hop, end, rooms = PseudoLabels(ENROLLED), np.arange(HOP_SAMPLES, dtype=np.int16), 0, []
    while end < 2 * 86_400 * SAMPLE_RATE_HZ:
        end += HOP_SAMPLES * (1 if end < 3600 * SAMPLE_RATE_HZ else 10)
        rooms += [cut.end_sample / SAMPLE_RATE_HZ / 3600 for cut in labels.step(hop, end, {KEY: QUIET}, [])]
    an_hour = np.histogram(rooms, np.arange(49))[0]

    assert 25 <= an_hour[0] <= 29
    assert an_hour[:24].sum() <= 80 and an_hour[24:].sum() <= 49
    assert (an_hour[24:] >= 1).all()


@pytest.mark.parametrize(("score", "label"), [(2.0, "positive"), (0.0, "between"), (-1.5, "negative")])
def test_at_most_so_many_an_hour_and_a_day(score, label):
    """A word that is never the same sound, every 40 seconds of a day and an hour."""
    labels, cuts = PseudoLabels(ENROLLED), []
    random = np.random.default_rng(0)
    for at_s in range(0, 90_000, 40):
        for i in range(50):
            end = at_s * SAMPLE_RATE_HZ + (i + 1) * HOP_SAMPLES
            now = score if i == 20 else QUIET
            found = [Detection("hey", "ann", score, 0.5, end)] if now == 2.0 else []
            cuts += labels.step(random.integers(-99, 99, HOP_SAMPLES).astype(np.int16), end, {KEY: now}, found)
    kept = np.array([cut.end_sample / SAMPLE_RATE_HZ for cut in cuts if cut.clip.label == label and cut.clip.score == score])

    assert max((kept < 3600).sum(), (kept > 86_400).sum()) == PER_HOUR[label]
    assert (kept < 86_400).sum() == PER_DAY[label]
    assert labels.counts["too_many"] > 1000 and labels.counts["alike"] == 0


def test_what_was_kept_before_a_restart_counts():
    first = word(2.0)
    (cut,) = first.cuts
    labels = PseudoLabels(ENROLLED, per_hour={"positive": 1}, per_day={"positive": 1})
    labels.remember(cut.clip, cut.samples, age_s=60.0)
    later = PseudoLabels(ENROLLED, per_hour={"positive": 1}, per_day={"positive": 2})
    later.remember(cut.clip, cut.samples, age_s=7200.0)

    assert [len(Stream(one, seed=1).hops(*[QUIET] * 50, 2.0, *[QUIET] * 20).cuts) for one in (labels, later)] == [0, 1]
    assert len(Stream(later, seed=0).hops(*[QUIET] * 50, 2.0, *[QUIET] * 20).cuts) == 0


def test_near_misses_crowd_out_nothing_that_only_the_version_before_wakes_at():
    """A television's near misses fill their hour; after a restart too each is counted as what it was."""
    one_each = {"between": 1, "missed": 1}
    labels = PseudoLabels(ENROLLED, per_hour=one_each, per_day=one_each)
    stream = Stream(labels).hops(*[QUIET] * 50)
    for missed in (False, False, True, True):
        stream.hops(0.3, QUIET, missed=missed).hops(*[QUIET] * 40)
    after = PseudoLabels(ENROLLED, per_hour=one_each, per_day=one_each)
    for cut in stream.cuts:
        after.remember(cut.clip, cut.samples, age_s=60.0)

    assert [cut.clip.reason.endswith(MISSED) for cut in stream.cuts] == [False, True]
    assert Stream(after, seed=9).hops(*[QUIET] * 50).hops(0.3, QUIET, missed=True).hops(*[QUIET] * 20).cuts == []


def test_a_clip_from_the_future_takes_its_place_for_an_hour_as_one_of_now():
    """The clock was set back since."""
    (cut,) = word(2.0).cuts
    labels, random, kept = PseudoLabels(ENROLLED, per_hour={"positive": 1}, per_day={"positive": 2}), np.random.default_rng(1), []
    labels.remember(cut.clip, None, age_s=-1e9)
    for at_s in (0, 3601):
        for i in range(50):
            end = at_s * SAMPLE_RATE_HZ + (i + 1) * HOP_SAMPLES
            found = [Detection("hey", "ann", 2.0, 0.5, end)] if i == 20 else []
            hop = random.integers(-99, 99, HOP_SAMPLES).astype(np.int16)
            kept += [at_s for _ in labels.step(hop, end, {KEY: 2.0 if found else QUIET}, found)]

    assert kept == [3601]


def test_a_recording_that_is_played_500_times_is_kept_once():
    """A spoken phrase, each time with another 80 ms raster, loudness and noise, over 4 h; its other takes are kept all the same."""
    recordings = [soundfile.read(path, dtype="int16")[0] for path in sorted(DEMO.glob("enrol-*.flac"))]
    takes = [one[slice(*speech_span(one))].astype(np.float32) for one in recordings]
    random = np.random.default_rng(0)
    labels, cuts = PseudoLabels(ENROLLED, per_hour={"positive": 999}, per_day={"positive": 999}), []

    def say(take, at_s):
        sound = np.zeros(50 * HOP_SAMPLES, np.float32)
        first = 30 * HOP_SAMPLES - len(take) + int(random.integers(HOP_SAMPLES))
        sound[first : first + len(take)] = take * random.uniform(0.3, 1.0)
        sound += random.normal(0, 30, len(sound))
        for i, hop in enumerate(sound.astype(np.int16).reshape(-1, HOP_SAMPLES)):
            end = at_s * SAMPLE_RATE_HZ + (i + 1) * HOP_SAMPLES
            found = [Detection("hey", "ann", 2.0, 0.5, end)] if i == 31 else []
            step = labels.step(hop, end, {KEY: 2.0 if i == 31 else QUIET}, found)
            cuts.extend(cut for cut in step if cut.clip.label != "alike")

    for i in range(500):
        say(takes[0], 30 * i)
    replayed = len(cuts)
    for i, take in enumerate(takes):
        say(take, 15_000 + 30 * i)

    assert (replayed, len(cuts), labels.counts["alike"]) == (1, len(takes), 500)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_wake_by_the_same_recording_again_names_the_clip_that_it_is_like(restarted):
    jingle = np.random.default_rng(5).integers(-9000, 9000, (20, HOP_SAMPLES)).astype(np.int16)
    stream = Stream().hops(*[QUIET] * 40, 2.0, *[QUIET] * 40).hops(*[QUIET] * 19, 2.0, audio=jingle).hops(*[QUIET] * 40, 2.0, *[QUIET] * 40)
    clips = [cut.clip for cut in stream.cuts]
    if restarted:
        labels = PseudoLabels(ENROLLED)
        clips = [dataclasses.replace(clip, file=f"stored {clip.file}") for clip in clips]
        for clip, cut in zip(clips, stream.cuts, strict=True):
            labels.remember(clip, cut.samples, age_s=9.0)
        stream = Stream(labels, seed=2).hops(*[QUIET] * 40)
    stream.hops(*[QUIET] * 19, 2.0, audio=jingle).hops(*[QUIET] * 40)
    (alike,) = stream.alike

    assert [clip.file == alike.clip.file for clip in clips] == [False, True, False]
    assert (alike.clip.keyword, alike.clip.score, len(alike.samples)) == ("hey", 2.0, 0)


def test_a_near_miss_by_the_same_recording_again_is_nothing():
    """No one can call it wrong."""
    jingle = np.random.default_rng(5).integers(-9000, 9000, (20, HOP_SAMPLES)).astype(np.int16)
    stream = Stream()
    for _ in range(2):
        stream.hops(*[QUIET] * 40).hops(*[QUIET] * 19, 0.0, audio=jingle).hops(*[QUIET] * 40)

    assert [cut.clip.label for cut in stream.cuts] == ["between"] and stream.alike == []


def test_where_nothing_is_listened_for_nothing_is_kept():
    """What is said then is far from every keyword too, and no room."""
    stream = Stream()
    stream.labels.listen_for([])

    assert stream.hops(*[QUIET] * 3 * ROOM_HOPS).cuts == []


@pytest.mark.parametrize("score", [0.5, -0.5])
def test_of_who_is_not_listened_for_any_more_not_even_what_was_just_heard_is_kept(score):
    stream = Stream().hops(*[QUIET] * 50, score)
    stream.labels.listen_for([])

    assert stream.hops(*[QUIET] * 40).cuts == []


def test_other_keywords_and_thresholds_hold_from_the_next_hop():
    """A version that is swapped in may score on another scale."""
    stream = Stream().hops(*[QUIET] * 50)
    stream.labels.listen_for([Enrolled("hey", "ann", np.eye(1, 2, dtype=np.float32), 4.0)])
    stream.hops(3.9, woke=False).hops(*[QUIET] * 20)

    assert [(one.clip.label, one.clip.reason) for one in stream.cuts] == [("between", "0.10 below the threshold")]
