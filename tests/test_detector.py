"""Scores to detections, on embeddings made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from edgekws.detector import COHORT_NEAREST, RIVAL_COST, RIVAL_LEAD, WRONG_LEAD, Detector, background, scores
from edgekws.pipeline import Pipeline
from edgekws.pseudo_labels import PseudoLabels
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Detection, Enrolled

DIM = 16
ONE, TWO, OTHER = np.eye(DIM, dtype=np.float32)[:3]


def enrolled(keyword, speaker, direction, **more):
    return Enrolled(keyword, speaker, direction[None], 0.5, **more)


def hear(detector, *embeddings):
    return [found for hop, row in enumerate(embeddings, 1) for found in detector.step(row, hop * HOP_SAMPLES)]


def test_a_keyword_wakes_once_in_the_refractory_time():
    refractory_hops = round(2.0 * SAMPLE_RATE_HZ / HOP_SAMPLES)
    found = hear(Detector([enrolled("hey", "ann", ONE)]), *[ONE] * (refractory_hops + 1))

    assert [one.end_sample // HOP_SAMPLES for one in found] == [1, 1 + refractory_hops]


def test_keywords_have_refractory_times_of_their_own():
    found = hear(Detector([enrolled("hey", "ann", ONE), enrolled("stop", "ann", TWO)]), ONE, TWO)

    assert [one.keyword for one in found] == ["hey", "stop"]


def test_the_nearest_speaker_is_named():
    found = hear(Detector([enrolled("hey", "ann", ONE), enrolled("hey", "bob", TWO)]), (0.6 * ONE + 0.8 * TWO).astype(np.float32))

    assert found == [Detection("hey", "bob", pytest.approx(0.8), 0.5, HOP_SAMPLES)]


def test_a_reset_forgets_scores_and_holds_the_refractory_time():
    detector = Detector([enrolled("hey", "ann", ONE)])
    hear(detector, ONE)
    detector.reset()

    assert detector.latest == {}
    assert detector.step(ONE, 2 * HOP_SAMPLES) == []


def test_for_another_stream_a_detector_has_the_same_refractory_time_and_none_that_runs():
    """As the wake service's clients have them: `refractory_s` is the operator's."""
    one = Detector([enrolled("hey", "ann", ONE)], refractory_s=5.0)
    hear(one, ONE)
    hops = -(-round(5.0 * SAMPLE_RATE_HZ) // HOP_SAMPLES)
    again = hear(one.anew(), *[ONE] * (hops + 1))

    assert [found.end_sample // HOP_SAMPLES for found in again] == [1, 1 + hops]


def test_what_the_nearest_of_the_cohort_have_in_common_is_taken_off():
    cohort = np.concatenate([np.repeat(OTHER[None], COHORT_NEAREST, 0), np.eye(DIM, dtype=np.float32)[8:], -np.repeat(OTHER[None], 9, 0)])
    heard = (0.8 * ONE + 0.6 * OTHER).astype(np.float32)
    one = enrolled("hey", "ann", ONE, cohort=cohort)
    detector = Detector([one])
    hear(detector, heard)

    assert scores(heard[None], enrolled("hey", "ann", ONE)) == pytest.approx(0.8)
    assert scores(heard[None], one) == detector.latest["hey", "ann"] == pytest.approx(0.8 - 0.5 * 0.6)


def test_what_is_hardly_nearer_to_a_recording_than_to_its_rivals_scores_less():
    one = enrolled("hey", "ann", ONE, takes=ONE[None], rivals=TWO[None])
    word, other = ((share * ONE + np.sqrt(1 - share**2) * TWO).astype(np.float32) for share in (0.9, 0.7))

    assert scores(np.stack([word, other]), one) == pytest.approx([0.9, 0.7 - RIVAL_COST * (RIVAL_LEAD + np.sqrt(1 - 0.49) - 0.7)], abs=1e-5)
    assert [found.end_sample for found in hear(Detector([one]), other, word)] == [2 * HOP_SAMPLES]


def test_what_is_nearer_to_what_was_called_wrong_than_to_a_recording_scores_less():
    one = enrolled("hey", "ann", ONE, takes=ONE[None], wrong=TWO[None])
    word, other = ((share * ONE + np.sqrt(1 - share**2) * TWO).astype(np.float32) for share in (0.8, 0.6))

    assert scores(np.stack([word, other]), one) == pytest.approx([0.8, 0.6 - RIVAL_COST * (0.8 - 0.6 - WRONG_LEAD)], abs=1e-5)
    assert [found.end_sample for found in hear(Detector([one]), other, word)] == [2 * HOP_SAMPLES]


def test_of_several_prototypes_the_nearest_counts_in_a_whole_stream_too():
    both = Enrolled("hey", "ann", np.stack([ONE, TWO]), 0.5)

    assert scores(np.stack([ONE, TWO, OTHER]), both) == pytest.approx([1, 1, 0])


@pytest.mark.parametrize(("rivals", "wrong"), [(0, 0), (1, 0), (15, 0), (0, 2), (15, 2)])
def test_step_by_step_scores_are_those_of_the_whole_stream(rivals, wrong):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    compared = {"takes": rows[:3], "rivals": rows[35 : 35 + rivals], "wrong": rows[15 : 15 + wrong]}
    one = enrolled("hey", "ann", rows[3], scale=7.0, offset=0.2, cohort=rows[20:40], **compared)
    detector = Detector([one, enrolled("stop", "bob", rows[5])])
    found = []
    for hop, row in enumerate(rows, 1):
        detector.step(row, hop * HOP_SAMPLES)
        found.append(detector.latest["hey", "ann"])

    assert np.allclose(found, scores(rows, one), atol=1e-5)


def one_by_one(enrolled, rows, refractory_s=2.0):
    """What a plain loop over everybody hears: events, scores of each hop, margins."""
    events, latest, margins, quiet_until = [], [], [], {}
    for hop, row in enumerate(rows, 1):
        scores, found = {}, {}
        for one in enrolled:
            similarity = float((one.prototypes @ row).max())
            common = float(background((one.cohort @ row)[None])[0]) if len(one.cohort) else 0.0
            score = (similarity - common - one.offset) * one.scale
            scores[one.keyword, one.speaker] = score
            if score >= one.threshold and hop * HOP_SAMPLES >= quiet_until.get(one.keyword, 0):
                found.setdefault(one.keyword, []).append(Detection(one.keyword, one.speaker, score, one.threshold, hop * HOP_SAMPLES))
        for keyword, heard in found.items():
            quiet_until[keyword] = hop * HOP_SAMPLES + round(refractory_s * SAMPLE_RATE_HZ)
            events.append(max(heard, key=lambda one: one.score - one.threshold))
        latest.append(scores)
        margins.append(max(scores[one.keyword, one.speaker] - one.threshold for one in enrolled))
    return events, latest, margins


@pytest.mark.parametrize("cohorts", [0, 1, 2])
@pytest.mark.parametrize("many", [1, 2, 60])
def test_everybody_at_once_is_heard_as_one_by_one(many, cohorts):
    rng = np.random.default_rng(many)

    def unit(count):
        rows = rng.standard_normal((count, DIM)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    common = [unit(COHORT_NEAREST * 3) for _ in range(cohorts)] + [np.zeros((0, DIM), np.float32)]  # the last takes nothing off
    everybody = [
        Enrolled(f"k{i % 20}", f"s{i // 20}", unit(1 + i % 3), rng.uniform(0.3, 0.8), rng.uniform(1, 3), 0.1, common[i % len(common)])
        for i in range(many)
    ]
    rows = unit(400)
    detector, latest, margins, events = Detector(everybody), [], [], []
    for hop, row in enumerate(rows, 1):
        events += detector.step(row, hop * HOP_SAMPLES)
        latest.append(dict(detector.latest))
        margins.append(detector.margin)
    wanted_events, wanted_latest, wanted_margins = one_by_one(everybody, rows)

    assert latest == [pytest.approx(scores, abs=1e-6) for scores in wanted_latest] and margins == pytest.approx(wanted_margins, abs=1e-6)
    assert [replace(one, score=0.0) for one in events] == [replace(one, score=0.0) for one in wanted_events] != []
    assert [one.score for one in events] == pytest.approx([one.score for one in wanted_events], abs=1e-6)


def test_a_score_that_is_no_number_never_wakes_and_the_next_word_does():
    nothing = np.full(DIM, np.nan, np.float32)
    for cohort in ({}, {"cohort": np.repeat(OTHER[None], COHORT_NEAREST, 0)}):
        found = hear(Detector([enrolled("hey", "ann", ONE, **cohort)]), *[nothing] * 60, ONE)

        assert [one.end_sample // HOP_SAMPLES for one in found] == [61]


def test_a_network_that_gives_no_numbers_for_a_while_keeps_the_pipeline_running():
    class Engine:  # a fake one: the first of ten of its steps goes wrong
        steps = 0

        def step(self, frames):
            self.steps += 1
            return np.full(DIM, np.nan, np.float32) if self.steps == 1 else ONE

    one = enrolled("hey", "ann", ONE)
    pipeline = Pipeline(Engine(), Detector([one], refractory_s=0.4), PseudoLabels([one]))
    found = pipeline.feed(AudioChunk(np.ones(10 * HOP_SAMPLES, np.int16), 0))

    assert [one.end_sample // HOP_SAMPLES for one in found] == [2, 7] and pipeline.hops == 10


def test_nobody_enrolled_hears_nothing():
    assert hear(Detector([]), ONE) == []
