"""What training hears: levels, disturbances and the split, on small signals."""

import csv
import hashlib

import numpy as np
import pytest
import soundfile

from edgekws.errors import EdgekwsError
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.training import material, synthesis
from edgekws.training.material import Stream, Word
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ


@pytest.fixture
def stream():
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.random(40) < 0.6, SAMPLE_RATE_HZ // 4)  # ten seconds, on and off like speech
    samples = material.to_int16(rng.standard_normal(len(loud)) * loud * 2000)
    hops = len(samples) // HOP_SAMPLES
    return Stream(samples, rng.standard_normal((hops, 96)).astype(np.float32), [Word("hello", "ann", 40), Word("there", "bob", 90)])


def test_the_level_counts_only_while_somebody_speaks(stream):
    quiet_around = np.concatenate([np.zeros(SAMPLE_RATE_HZ * 20, np.int16), stream.samples])

    assert material.active_rms(quiet_around) == pytest.approx(material.active_rms(stream.samples), rel=0.01)
    assert material.active_rms(material.at_level(quiet_around, -30)) == pytest.approx(32768 * 10 ** (-30 / 20), rel=0.01)


def test_a_disturbed_copy_keeps_time_and_differs_from_the_next(stream):
    copies = [material.disturbed(stream, [stream], [], np.random.default_rng(seed), mild=False) for seed in (1, 2)]

    assert copies[0].shape == copies[1].shape == (len(stream.targets) * HOP_FRAMES, N_MELS)
    assert np.isfinite(copies[0]).all()
    assert np.abs(copies[0] - copies[1]).mean() > 0.1


def test_a_mild_copy_still_rises_and_falls_with_the_speech(stream):
    heard = material.disturbed(stream, [stream], [], np.random.default_rng(3), mild=True).astype(np.float32).mean(1)
    spoken = np.abs(stream.samples[: len(heard) * 320].astype(np.float32)).reshape(-1, 320).mean(1)

    assert np.corrcoef(heard, np.log(spoken + 1))[0, 1] > 0.5


def test_a_microphone_colours_without_moving_the_sound():
    impulse = np.zeros(8000, np.float32)
    impulse[4000] = 1000

    found = [int(np.abs(material.coloured(impulse, np.random.default_rng(seed))).argmax()) for seed in range(20)]

    assert max(abs(at - 4000) for at in found) <= 16  # 1 ms


def test_a_room_response_begins_with_the_direct_sound():
    response = material.room_response(np.random.default_rng(0), 0.4)

    assert len(response) == round(0.4 * SAMPLE_RATE_HZ)
    assert response[0] == 1
    assert np.abs(response[1:]).max() < 1
    assert (response[: len(response) // 2] ** 2).sum() > 100 * (response[len(response) // 2 :] ** 2).sum()


def test_streams_come_back_from_disk_as_they_were(stream, tmp_path):
    material.save_streams(tmp_path / "streams.npz", [stream, Stream(stream.samples[:32000], stream.targets[:25], source="nathalie")])
    first, second = material.load_streams(tmp_path / "streams.npz")

    assert np.array_equal(first.samples, stream.samples)
    assert first.words == stream.words
    assert (first.source, second.source) == ("", "nathalie")
    assert np.allclose(second.targets, stream.targets[:25], atol=2e-3)


def test_material_lays_streams_end_to_end_with_their_words(stream):
    recorded = Stream(stream.samples, stream.targets, stream.words, source="nathalie")
    made = material.make_material([recorded, stream], [], 2, seed=1, workers=1)
    hops = len(stream.targets)

    assert made.frames.shape == (2, 2 * hops * HOP_FRAMES, N_MELS)
    assert made.starts.tolist() == [0, hops, 2 * hops]
    assert made.source.tolist() == [1, 0]
    assert made.words.tolist() == [[0, 0, 40], [1, 1, 90], [0, 0, hops + 40], [1, 1, hops + 90]]


def test_only_the_training_side_of_a_corpus_is_heard(tmp_path):
    rows = [
        ("neg/nathalie/nathalie_000.opus", "negative", "negative"),
        ("neg/librispeech/librispeech_002.opus", "negative", "negative"),
        ("neg/librispeech/librispeech_003.opus", "negative", "negative"),
        ("neg/kathleen/kathleen_000.opus", "negative", "negative"),
        ("noise/rain/1.opus", "noise", "fold1"),
        ("noise/rain/3.opus", "noise", "fold3"),
        ("kw/alexa/1.opus", "keyword", "enrol"),
    ]
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "kind", "split"), *rows])

    speech, noise = material.train_files(tmp_path)

    assert [path.name for path in speech] == ["nathalie_000.opus", "librispeech_002.opus"]
    assert [path.name for path in noise] == ["1.opus"]


def test_recorded_speech_is_heard_at_other_paces_with_its_pitch(tmp_path):
    seconds = np.arange(15 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    (tmp_path / "nathalie").mkdir()
    recording = (3000 * np.sin(2 * np.pi * 400 * seconds)).astype(np.int16)
    soundfile.write(tmp_path / "nathalie" / "0.wav", recording, SAMPLE_RATE_HZ)

    streams = list(material.real_streams([tmp_path / "nathalie" / "0.wav"], None))

    peaks_hz = [np.abs(np.fft.rfft(one.samples)).argmax() * SAMPLE_RATE_HZ / len(one.samples) for one in streams]
    assert peaks_hz == pytest.approx([400 * pace for pace in material.PACES], abs=1)
    assert [len(one.samples) / SAMPLE_RATE_HZ for one in streams] == pytest.approx([15 / pace for pace in material.PACES], abs=0.01)
    assert {one.source for one in streams} == {"nathalie"}
    assert np.array_equal(streams[material.PACES.index(1.0)].samples, material.to_int16(material.at_level(recording, -25)))


def test_a_manifest_as_a_spreadsheet_writes_it_is_read(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,kind,split\nneg/nathalie/0.opus,negative,negative\n", encoding="utf-8-sig")

    assert material.train_files(tmp_path) == ([tmp_path / "neg/nathalie/0.opus"], [])


def test_a_recording_of_any_rate_and_channels_is_heard_and_one_of_ours_bit_for_bit(tmp_path):
    samples = np.random.default_rng(0).integers(-3000, 3000, 2 * 44_100).astype(np.int16)
    soundfile.write(tmp_path / "ours.wav", samples, 16_000)
    soundfile.write(tmp_path / "fast.wav", samples, 44_100)
    soundfile.write(tmp_path / "both.wav", samples.reshape(-1, 2), 16_000)
    ours, fast, both = (material.read_audio(tmp_path / f"{name}.wav") for name in ("ours", "fast", "both"))

    assert ours.dtype == np.int16 and np.array_equal(ours, samples)
    assert fast.shape == pytest.approx((32_000,), abs=2)
    assert both.shape == (44_100,)


def test_where_no_program_speaks_a_stream_is_an_error_and_no_endless_loop(monkeypatch):
    asked = []
    monkeypatch.setattr(synthesis, "words", lambda: ("about", "house", "visual") * 400)
    monkeypatch.setattr(synthesis.shutil, "which", lambda name: None if len(asked) < 100 else pytest.fail("it tries again and again"))
    monkeypatch.setattr(synthesis, "random_voice", lambda *given, **kinds: asked.append(1) or synthesis.Voice("flite", "slt"))

    with pytest.raises(EdgekwsError, match="flite is not installed"):
        material.spoken_stream(1, None)


def test_files_are_named_by_what_is_in_them(tmp_path):
    (tmp_path / "a").write_bytes(b"sound")

    assert material.sha256_16([tmp_path / "a"]) == [hashlib.sha256(b"sound").hexdigest()[:16]]
