"""The packaged model, the demo's recordings (synthetic speech of our own making) and what people do wrong."""

import contextlib
import csv
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgekws import enrolment
from edgekws.audio import read_recording
from edgekws.detector import Detector, scores
from edgekws.engines import load_engine
from edgekws.errors import EnrolmentError
from edgekws.evaluation import events
from edgekws.model import find_model, load_model, rewrite_manifest
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ
from edgekws.voice import speech_span

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())


def read(name):
    return soundfile.read(DEMO / name, dtype="int16")[0]


@pytest.fixture(scope="module")
def model():
    return load_model(find_model())


@pytest.fixture(scope="module")
def engine(model):
    return load_engine(model)


@pytest.fixture(scope="module")
def takes():
    return [read(f"enrol-{i}.flac") for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def phrases():
    """Three different ones."""
    samples = read("stream.flac")
    return [samples[round(a * SAMPLE_RATE_HZ) : round(b * SAMPLE_RATE_HZ)] for a, b in ((1, 2.2), (7, 8.2), (17.5, 18.7))]


@pytest.fixture(scope="module")
def stream(engine):
    return enrolment.embed(read("stream.flac"), engine)


def wakes_s(stream, enrolled):
    detector = Detector([enrolled])
    return [hop * HOP_SAMPLES / SAMPLE_RATE_HZ for hop, row in enumerate(stream, 1) if detector.step(row, hop * HOP_SAMPLES)]


def assert_all_heard(wakes):
    assert len(wakes) == len(TRUTH["spoken"])
    assert all(spoken["start_s"] < wake < spoken["end_s"] + 0.5 for spoken, wake in zip(TRUTH["spoken"], wakes, strict=True))


def test_three_recordings_make_a_keyword_that_is_heard_and_nothing_else(engine, model, takes, stream):
    assert_all_heard(wakes_s(stream, enrolment.enrol("open sesame", "demo", takes, engine, model)))


def test_a_tightly_trimmed_recording_is_given_its_context_back(engine, model, takes, stream):
    """A rival that trims its references falls from 100 % to 1 % recall."""
    trimmed = [take[slice(*speech_span(take))] for take in takes]

    assert_all_heard(wakes_s(stream, enrolment.enrol("open sesame", "demo", trimmed, engine, model)))


@pytest.mark.parametrize("snr_db", [5, 0])
def test_in_noise_a_word_stands_out_further_than_by_nearness_alone(engine, model, takes, snr_db):
    """By its prototypes: the lowest score of the spoken keywords, and of the rest of the stream the highest, above the threshold."""
    samples = read("stream.flac").astype(np.float64)
    noise = np.convolve(np.random.default_rng(0).standard_normal(len(samples)), np.ones(8), "same")
    noise *= np.sqrt((samples**2).mean() / (noise**2).mean() * 10 ** (-snr_db / 10))
    noisy = enrolment.embed(np.clip(samples + noise, -32768, 32767).astype(np.int16), engine)
    heard_s = np.arange(1, len(noisy) + 1) * HOP_SAMPLES / SAMPLE_RATE_HZ
    said = [(heard_s > word["start_s"]) & (heard_s < word["end_s"] + 0.5) for word in TRUTH["spoken"]]

    def stand_out(plain):
        made = enrolment.without_rivals(enrolment.enrol("open sesame", "demo", takes, engine, model, plain=plain))
        margins = scores(noisy, made) - made.threshold
        return min(margins[one].max() for one in said), margins[~np.any(said, 0)].max()

    (keyword, rest), (keyword_by_nearness, rest_by_nearness) = stand_out(plain=False), stand_out(plain=True)

    assert keyword > keyword_by_nearness
    assert rest < rest_by_nearness < 0


def test_an_embedding_of_the_negatives_is_that_of_their_window(model):
    """Read hop by hop for similarities, as windows for what sets a word apart."""
    negatives = enrolment.load_negatives(model)
    first = np.array([0, 100, 700])

    rows = negatives.embeddings(first)

    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.allclose(negatives.similarities(rows)[0][first[:2]].diagonal(), 1, atol=1e-5)


def test_negatives_that_took_the_place_of_others_are_the_ones_that_count(model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model.path, copy)
    first = enrolment.load_negatives(load_model(copy))
    enrolment.save_negatives(copy, [np.asarray(first.steps[:1000], np.float32)])
    rewrite_manifest(copy)

    assert len(enrolment.load_negatives(load_model(copy)).steps) == 1000 < len(first.steps)


def test_an_offset_of_the_microphone_does_not_move_a_word(takes):
    for take in takes:
        offset = np.clip(take.astype(np.int32) + 1500, -32768, 32767).astype(np.int16)

        assert speech_span(offset) == speech_span(take)


def test_an_offset_of_the_microphone_does_not_change_the_keyword(engine, model, takes):
    quiet = [take // 8 for take in takes]
    made, shifted = (enrolment.enrol("open sesame", "demo", [take + offset for take in quiet], engine, model) for offset in (0, 1500))

    assert np.allclose(made.prototypes, shifted.prototypes, atol=0.002)


def test_noise_after_the_word_does_not_move_its_end(takes):
    start, end = speech_span(takes[0])
    click = takes[0].copy()
    click[-1600:-1400] = 4000

    assert speech_span(click) == (start, end)


def test_the_threshold_gives_the_promised_rate_on_the_bundled_negatives(engine, model, takes):
    """The fit may be off by what Poisson allows at 0.3 an hour: at most 6 events in some hours."""
    made = enrolment.enrol("open sesame", "demo", takes, engine, model)
    negatives = enrolment.load_negatives(model)
    highest = np.concatenate([(one[:, 0] - made.offset) * made.scale for one in negatives.similarities(made.prototypes)])

    assert negatives.hours > 2
    assert len([peak for peak in enrolment.peaks(highest, 30) if peak >= made.threshold]) <= 6


def test_a_score_is_the_rate_of_false_wakes_that_the_negatives_have_there(engine, model, takes):
    """Twenty of their peaks lie above the score of twenty in so many hours, half as many again for noise."""
    made = enrolment.enrol("open sesame", "demo", takes, engine, model)
    negatives = enrolment.load_negatives(model)
    streams = [(one[:, 0] - made.offset) * made.scale for one in negatives.similarities(made.prototypes)]
    twenty = -np.log10(1.5 * 20 / negatives.hours)

    assert sum(len([peak for peak in enrolment.peaks(one, 40) if peak > twenty + 1e-3]) for one in streams) == 20
    assert 18 <= sum(len(events(one, float(twenty))) for one in streams) <= 24


def test_rivals_cost_what_is_like_the_keyword_and_not_the_word(engine, model, takes):
    made = enrolment.enrol("open sesame", "demo", takes, engine, model)
    alone = enrolment.without_rivals(made)
    said = [enrolment.embed(enrolment.pad(take), engine) for take in [*takes, read("stream.flac")]]
    rivals, before = scores(made.rivals, made), scores(made.rivals, alone)

    assert [scores(one, made).max() for one in said] == [scores(one, alone).max() for one in said]
    assert (rivals <= before).all() and (rivals < before - 0.3).mean() > 0.5


def test_only_enrolled_asks_for_what_the_recordings_reach_among_themselves(engine, model, takes):
    anyone = enrolment.enrol("open sesame", "demo", takes, engine, model)
    only = enrolment.enrol("open sesame", "demo", takes, engine, model, only_enrolled=True)
    own = [scores(enrolment.embed(enrolment.pad(take), engine), anyone).max() for take in takes]

    assert only.only_enrolled
    assert anyone.threshold + 1 < only.threshold < min(own)


def test_of_unlike_recordings_that_were_enrolled_once_only_enrolled_lowers_no_threshold(engine, model, phrases):
    anyone, only = (enrolment.enrol("it", "", phrases, engine, model, strict=False, only_enrolled=one) for one in (False, True))

    assert only.only_enrolled
    assert only.threshold == anyone.threshold


def test_the_speakers_of_a_keyword_keep_its_promise_together(engine, model, takes):
    ann = enrolment.enrol("open sesame", "ann", takes, engine, model)
    bob, other = replace(ann, speaker="bob"), replace(ann, keyword="jarvis")
    rises = [after.threshold - ann.threshold for after in enrolment.together([ann, bob, other])]

    assert rises == pytest.approx([0.15, 0.15, 0.0], abs=0.01)
    assert enrolment.together([ann, other]) == [ann, other]


def test_the_same_recordings_give_the_same_keyword(engine, model, takes):
    first, second = (enrolment.enrol("open sesame", "demo", takes, engine, model) for _ in range(2))

    assert np.array_equal(first.prototypes, second.prototypes)
    assert np.array_equal(first.voice, second.voice)
    assert np.array_equal(first.rivals, second.rivals)
    none = dict.fromkeys(("prototypes", "cohort", "voice", "takes", "rivals", "wrong"), 0)
    assert replace(first, **none) == replace(second, **none)


def test_quantised_negatives_score_as_the_engine_does(engine, model):
    """The calibration reads int8 steps, the listener float32 embeddings."""
    samples = read("stream.flac")[: 20 * HOP_SAMPLES]
    rows = enrolment.embed(samples, engine)
    length = model.raw["spec"]["window_steps"]
    flat = rows[-1].reshape(length, -1)
    quantised = enrolment.Negatives(np.round(flat * 200).astype(np.int8), 1 / 200, np.array([0, length]), length, length)

    assert quantised.similarities(rows[-1:])[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda take: np.zeros_like(take), "recording 2: silent"),
        (lambda take: (np.random.default_rng(0).standard_normal(len(take)) * 3).astype(np.int16), "recording 2: silent"),
        (lambda take: (1000 + np.random.default_rng(0).standard_normal(len(take)) * 3).astype(np.int16), "recording 2: silent"),
        (lambda take: (np.random.default_rng(0).standard_normal(len(take)) * 100).astype(np.int16), "recording 2: nothing stands out"),
        (lambda take: clicked(), r"recording 2: only 0\.0\d s of sound stand out"),
        (lambda take: take[:800], "0.05 s long"),
        (lambda take: np.clip(take.astype(np.int32) * 300, -32768, 32767).astype(np.int16), "clipped"),
    ],
    ids=["zeros", "hiss", "hiss and an offset", "noise", "a click", "short", "clipped"],
)
def test_a_bad_recording_is_named_with_its_fault(engine, model, takes, spoil, message):
    with pytest.raises(EnrolmentError, match=message):
        enrolment.enrol("open sesame", "demo", [takes[0], spoil(takes[1]), takes[2]], engine, model)


def clicked():
    """20 ms in a second of hiss."""
    sound = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ) * 10
    sound[8000:8320] *= 800
    return sound.astype(np.int16)


def test_a_recording_is_called_silent_by_the_level_that_was_tested(takes):
    """Its peak may be above what its word must be."""
    quiet = (takes[1] * (18 / np.sqrt(np.mean(takes[1][slice(*speech_span(takes[1]))].astype(float) ** 2)))).astype(np.int16)
    assert np.abs(quiet).max() > 32768 / 1000  # -60 dBFS

    with pytest.raises(EnrolmentError, match=r"take: silent \(level -6\d\.\d dBFS; speech must be above -60 dBFS\)"):
        enrolment.check(quiet, "take")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda take: np.concatenate([take, np.zeros(10 * SAMPLE_RATE_HZ, np.int16)]), "1.*s long, accepted are up to 10 s"),
        (lambda take: np.tile(take[slice(*speech_span(take))], 5), "s of sound without a pause, accepted are up to 3.5 s"),
    ],
    ids=["long", "long-winded"],
)
def test_a_new_recording_that_is_too_long_is_refused_and_one_that_was_enrolled_once_goes_on(engine, model, takes, spoil, message):
    with pytest.raises(EnrolmentError, match=message):
        enrolment.check(spoil(takes[1]), "recording 2", takes[:1])
    enrolment.enrol("open sesame", "demo", [takes[0], spoil(takes[1]), takes[2]], engine, model, strict=False)


def test_a_recording_that_is_an_earlier_one_again_is_refused(takes):
    with pytest.raises(EnrolmentError, match="recording 3: this is recording 2 again"):
        enrolment.check(takes[1].copy(), "recording 3", takes[:2])


@pytest.mark.parametrize(
    "copy",
    [
        lambda take: (take * 0.3).astype(np.int16),
        lambda take: take[slice(*speech_span(take))],
        lambda take: reencoded(take),
    ],
    ids=["softer", "trimmed", "re-encoded"],
)
def test_a_copy_of_an_earlier_recording_is_that_recording_again_and_another_take_is_not(takes, copy):
    with pytest.raises(EnrolmentError, match="recording 3: this is recording 2 again"):
        enrolment.check(copy(takes[1]), "recording 3", takes[:2])
    enrolment.check(copy(takes[1]), "recording 2", [takes[0], takes[2]])


def reencoded(take):
    file = io.BytesIO()
    soundfile.write(file, take, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS")
    file.seek(0)
    return soundfile.read(file, dtype="int16")[0]


def test_a_name_in_another_spelling_is_the_enrolled_one_and_any_other_is_itself():
    known = ["open sesame", "Café", "Hey", "hey"]

    asked = ["Open  SESAME", "cafe\u0301", "hey", "Hey", "HEY", "other"]
    assert [enrolment.as_enrolled(name, known) for name in asked] == ["open sesame", "Café", "hey", "Hey", "Hey", "other"]


def test_one_recording_of_another_phrase_is_named(engine, model, takes):
    other = read("stream.flac")[7 * SAMPLE_RATE_HZ : round(8.2 * SAMPLE_RATE_HZ)]

    with pytest.raises(EnrolmentError, match="recording 2 is unlike the others"):
        enrolment.enrol("open sesame", "demo", [takes[0], other, takes[2]], engine, model)


def test_three_different_phrases_are_refused(engine, model, phrases):
    with pytest.raises(EnrolmentError, match="not alike"):
        enrolment.enrol("open sesame", "demo", phrases, engine, model)


def test_no_recording_is_refused(engine, model):
    with pytest.raises(EnrolmentError, match="three are best"):
        enrolment.enrol("open sesame", "demo", [], engine, model)


def test_the_ready_to_use_keyword_is_silent_in_other_speech(model, stream):
    (ready,) = enrolment.bundled(model)

    assert ready.keyword == "hey jetson"
    assert scores(stream, ready).max() < ready.threshold


def test_the_ready_to_use_keyword_keeps_the_promise_of_every_other(model):
    (ready,) = enrolment.bundled(model)

    assert ready.threshold >= -np.log10(enrolment.FALSE_ACCEPTS_PER_HOUR) - 1e-6


@pytest.mark.skipif("EDGEKWS_CORPUS" not in os.environ, reason="EDGEKWS_CORPUS names no corpus")
def test_one_take_of_another_word_by_the_same_person_is_found_and_real_enrolments_are_hardly_asked_again(engine, model):
    corpus, spoken = Path(os.environ["EDGEKWS_CORPUS"]), {}
    for row in csv.DictReader((corpus / "manifest.csv").open(encoding="utf-8")):
        if (row["kind"], row["split"]) == ("keyword", "enrol") and row["label"] in ("computer", "jarvis"):
            spoken.setdefault((row["speaker"], row["label"]), []).append(corpus / row["path"])

    def odd(paths):
        with contextlib.suppress(EnrolmentError):
            enrolment.enrol("it", "", [read_recording(path) for path in paths], engine, model)
            return False
        return True

    both = sorted({who for who, _ in spoken if {(who, "computer"), (who, "jarvis")} <= spoken.keys()})
    mixed = [
        [*spoken[who, one][:2], spoken[who, other][0]] for who in both for one, other in (("computer", "jarvis"), ("jarvis", "computer"))
    ]

    assert len(mixed) >= 8 and sum(map(odd, mixed)) >= 0.8 * len(mixed)
    assert sum(odd(paths[:3]) for paths in spoken.values()) <= 2
