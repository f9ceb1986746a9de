"""The demo's voice (synthetic speech of our own making) and the same played slower, a quarter deeper: somebody else's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.signal

from edgekws import enrolment, pipeline
from edgekws.audio import read_recording
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.model import find_model, load_model
from edgekws.pseudo_labels import PseudoLabels
from edgekws.training.voices import DIM, discriminant, write_voices
from edgekws.values import SAMPLE_RATE_HZ, AudioChunk
from edgekws.voice import FEATURES, features, pitch, said, speech_span

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"
SPOKEN = json.loads((DEMO / "truth.json").read_text())["spoken"]


def slower(samples):
    return np.round(scipy.signal.resample_poly(samples.astype(np.float32), 5, 4)).astype(np.int16)


@pytest.fixture(scope="module")
def engine():
    return load_engine(load_model(find_model()))


@pytest.fixture(scope="module")
def household(engine):
    """Ann, and Bob with her prototypes and a deeper voice: by the word it is always Ann."""
    takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
    ann = enrolment.enrol("open sesame", "ann", takes, engine, load_model(find_model()))
    return [ann, replace(enrolment.with_voice(ann, [slower(take) for take in takes]), speaker="bob")]


@pytest.fixture(scope="module")
def own():
    return read_recording(DEMO / "stream.flac")


def listen(engine, enrolled, samples, size=16_000):
    """Wakes, and the clips that were cut of them."""
    engine.reset()
    heard = pipeline.Pipeline(engine, Detector(enrolled), PseudoLabels(enrolled))
    wakes = [one for first in range(0, len(samples), size) for one in heard.feed(AudioChunk(samples[first : first + size], first))]
    return wakes, [cut.clip for cut in heard.cuts if cut.clip.label == "positive"]


def test_recordings_in_which_no_word_stands_out_give_no_voice(household):
    without = replace(household[0], voice=household[0].voice[:0], word_samples=0)
    assert len(enrolment.with_voice(without, [np.zeros(16_000, np.int16)]).voice) == 0


@pytest.mark.parametrize("size", [777, 1280, 16_000, 10**9])
def test_whose_voice_it_is_names_the_wake_and_score_and_clips_stay_as_they_are_in_any_chunking(engine, household, own, size):
    samples = np.concatenate([own, slower(own), np.zeros(32_000, np.int16)])
    by_word, kept = listen(engine, [replace(one, voice=one.voice[:0]) for one in household], samples)
    wakes, clips = listen(engine, household, samples, size)

    names = ["ann" if one.end_sample < len(own) else "bob" for one in by_word]
    assert (names.count("ann"), names.count("bob")) == (len(SPOKEN), len(SPOKEN) - 1)  # one of the slower words is missed
    assert wakes == [replace(one, speaker=name) for one, name in zip(by_word, names, strict=True)]
    assert clips == kept and {one.speaker for one in clips} == {"ann"}


def test_of_one_speaker_or_one_whose_voice_is_not_known_no_voice_is_asked_for(engine, household, own, monkeypatch):
    ann, bob = household
    monkeypatch.setattr(pipeline, "who", None)

    for enrolled in ([ann], [ann, replace(bob, voice=bob.voice[:0])], [ann, replace(bob, keyword="jarvis", threshold=9.0)]):
        assert [one.speaker for one in listen(engine, enrolled, own)[0]] == ["ann"] * len(SPOKEN)


def test_what_is_played_a_quarter_slower_has_its_pitch_lower_by_as_much(own):
    other = slower(own)
    for spoken in SPOKEN:
        start, end = (round(spoken[name] * SAMPLE_RATE_HZ) for name in ("start_s", "end_s"))
        high, low = pitch(own[start:end]), pitch(other[start * 5 // 4 : end * 5 // 4])

        assert 140 < 2**high < 260  # a woman's
        assert high - low == pytest.approx(np.log2(5 / 4), abs=0.05)


@pytest.mark.parametrize("hz", [90, 120, 180, 220, 300])
def test_the_pitch_of_a_steady_voice_is_no_octave_below_it(hz):
    turns = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ * 2 * np.pi * hz
    steady = sum(3000 / k * np.cos(k * turns) for k in range(1, 8)) + np.random.default_rng(0).normal(0, 300, SAMPLE_RATE_HZ)

    assert 2 ** pitch(steady.astype(np.int16)) == pytest.approx(hz, rel=0.02)


@pytest.mark.parametrize(
    "samples", [np.zeros(0, np.int16), np.zeros(100, np.int16), np.zeros(16_000, np.int16), np.full(16_000, -32768, np.int16)]
)
def test_what_is_no_sound_has_features_too(samples):
    assert np.isfinite(features(samples)).all()
    assert features(samples).shape == (FEATURES,)


def test_a_word_is_cut_out_where_it_is_and_under_noise_where_it_must_be(own):
    """Two hops behind its end a wake decides; a bang there is no word's end."""
    start, end = (round(SPOKEN[0][name] * SAMPLE_RATE_HZ) for name in ("start_s", "end_s"))
    heard = own[end + 2560 - 32_000 : end + 2560].copy()
    _, last = speech_span(heard)
    word = said(heard, end - start)
    assert np.array_equal(word[-800:], heard[last : last + 800])

    heard[:1600] = np.random.default_rng(0).integers(-30_000, 30_000, 1600)
    assert np.array_equal(said(heard, end - start)[-800:], heard[len(heard) - 2560 : len(heard) - 1760])


def test_the_discriminant_finds_what_differs_between_voices_only():
    """Of sixty directions one tells thirty voices apart, another has as much variance within each."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 16, 60))
    rows[..., 7] += 6 * rng.standard_normal((30, 1))
    rows[..., 8] += 6 * rng.standard_normal((30, 16))
    _, matrix = discriminant(rows)

    first = np.abs(matrix[:, 0]) * rows.std((0, 1))
    assert matrix.shape == (60, DIM)
    assert first.argmax() == 7
    assert first[8] < 0.1 * first[7]


def test_a_corpus_of_few_readers_leaves_the_packaged_voices(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,kind,label,speaker,split,duration_s\none.wav,negative,speech,ann,negative,9\n")
    (tmp_path / "one.wav").touch()

    assert not write_voices(tmp_path / "voices.npz", tmp_path)
    assert not (tmp_path / "voices.npz").exists()
