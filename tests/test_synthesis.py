"""The three speaking programs for real: each test skips with its reason where a program is not installed."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgekws.errors import EdgekwsError
from edgekws.training import synthesis
from edgekws.training.synthesis import ESPEAK_ACCENTS, ESPEAK_FOREIGN, ESPEAK_VARIANTS, Voice, random_voice, say, sentences, words
from edgekws.values import SAMPLE_RATE_HZ

TEXT = "the house by the river"
ONE_OF_EACH = [Voice("espeak-ng", "en-us+m3"), Voice("flite", "slt"), Voice("festival", "kal_diphone")]

# Anywhere in a word, not only where it begins: who hears "minicomputer" has heard "computer".
HELD_OUT_ANYWHERE = re.compile("alexa|computer|jarvis|amelia|ordenador|seven|zero|hey ?snips|snapdragon|mycroft|porcupine|bumblebee", re.I)


def known_fault(reason: str) -> pytest.MarkDecorator:
    """Strict: the test fails as soon as the fault is mended, and then this mark goes."""
    return pytest.mark.xfail(strict=True, reason=reason)


def need(program: str) -> None:
    for command in {"festival": ["festival", "text2wave"]}.get(program, [program]):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed")


def need_words() -> None:
    if not Path("/usr/share/dict/words").exists():
        pytest.skip("/usr/share/dict/words is missing (Debian package wamerican)")


def pitch_hz(samples: np.ndarray) -> float:
    """The median over voiced windows of 64 ms, by autocorrelation."""
    found = []
    for start in range(0, len(samples) - 1024, 512):
        window = samples[start : start + 1024].astype(np.float64)
        window -= window.mean()
        like = np.correlate(window, window, "full")[1023:]
        lag = 40 + int(np.argmax(like[40:267]))  # 60 to 400 Hz
        if like[0] > 1024 * 500**2 and like[lag] > 0.5 * like[0]:
            found.append(SAMPLE_RATE_HZ / lag)
    return float(np.median(found))


@pytest.mark.parametrize("voice", ONE_OF_EACH, ids=lambda voice: voice.program)
def test_each_program_speaks_int16_at_16_khz(voice):
    need(voice.program)

    said = say(TEXT, voice)

    assert said.dtype == np.int16
    assert said.ndim == 1
    assert 0.7 < len(said) / SAMPLE_RATE_HZ < 2.5
    assert np.abs(said.astype(int)).max() > 3000


@pytest.mark.parametrize("voice", ONE_OF_EACH, ids=lambda voice: voice.program)
def test_longer_text_is_longer_audio(voice):
    need(voice.program)

    assert len(say(f"{TEXT} and {TEXT}", voice)) > 1.5 * len(say(TEXT, voice))


def test_espeak_on_a_pipe_is_as_long_as_espeak_in_a_file(tmp_path):
    """No header in the samples, nothing lost, and 22.05 kHz really became 16 kHz."""
    need("espeak-ng")
    subprocess.run(["espeak-ng", "-w", str(tmp_path / "said.wav"), "-v", "en-us+m3", "-s", "165", "-p", "50", TEXT], check=True)

    seconds = soundfile.info(tmp_path / "said.wav").duration

    assert len(say(TEXT, Voice("espeak-ng", "en-us+m3"))) / SAMPLE_RATE_HZ == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    "voice",
    [
        *ONE_OF_EACH,
        pytest.param(
            Voice("festival", "cmu_us_slt_arctic_hts"),
            marks=known_fault("the HTS voice does not heed Duration_Stretch"),
        ),
    ],
    ids=lambda voice: f"{voice.program}-{voice.name}",
)
def test_speed_shortens_and_lengthens_what_is_said(voice):
    need(voice.program)

    slow, usual, fast = (len(say(TEXT, Voice(voice.program, voice.name, speed))) for speed in (0.75, 1.0, 1.3))

    assert slow > 1.15 * usual
    assert fast < 0.9 * usual


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("espeak-ng", "en-us+m3"),
        ("flite", "slt"),
        ("flite", "awb"),
        ("flite", "kal16"),
        pytest.param(
            "flite",
            "rms",
            marks=known_fault("flite's rms does not heed int_f0_target_mean"),
        ),
    ],
)
def test_pitch_raises_and_lowers_the_voice(program, name):
    need(program)

    low, usual, high = (pitch_hz(say(TEXT, Voice(program, name, 1.0, pitch))) for pitch in (0.75, 1.0, 1.35))

    assert low < 0.95 * usual
    assert high > 1.1 * usual


def test_speaker_is_one_at_any_speed_and_pitch():
    assert Voice("flite", "slt", 0.8, 1.2).speaker == Voice("flite", "slt").speaker
    assert len({voice.speaker for voice in ONE_OF_EACH}) == 3


def test_every_accent_and_language_is_a_voice_of_its_own():
    need("espeak-ng")
    text = "good morning father, where is the water"

    said = {say(text, Voice("espeak-ng", name)).tobytes() for name in ESPEAK_ACCENTS + ESPEAK_FOREIGN}

    assert len(said) == len(ESPEAK_ACCENTS) + len(ESPEAK_FOREIGN)


def test_every_variant_is_a_voice_of_its_own():
    need("espeak-ng")

    said = {say(TEXT, Voice("espeak-ng", f"en-us+{variant}")).tobytes(): variant for variant in ("", *ESPEAK_VARIANTS)}

    assert set(ESPEAK_VARIANTS) <= set(said.values())


def test_random_voices_repeat_with_the_seed_and_are_many():
    first, again = ([random_voice(rng) for _ in range(300)] for rng in (np.random.default_rng(1), np.random.default_rng(1)))

    assert first == again
    assert {voice.program for voice in first} == {"espeak-ng", "flite", "festival"}
    assert len({voice.speaker for voice in first}) > 100


def test_random_foreign_voices_speak_no_english_accent():
    rng = np.random.default_rng(2)

    assert {random_voice(rng, english=False).name.split("+")[0] for _ in range(300)} == set(ESPEAK_FOREIGN)


@pytest.mark.parametrize("seed", range(6))
def test_random_voices_can_all_speak(seed):
    voice = random_voice(np.random.default_rng(seed))
    need(voice.program)

    assert len(say(TEXT, voice)) > 0.5 * SAMPLE_RATE_HZ


def test_sentences_are_plain_english_of_a_few_words():
    found = sentences()

    assert len(found) > 1000
    assert len(set(found)) == len(found)
    assert all(4 <= len(sentence.split()) <= 30 for sentence in found)
    assert all(re.fullmatch(r"[A-Za-z' ]+", sentence) for sentence in found)


def test_words_are_plain_and_many():
    need_words()

    assert len(words()) > 10_000
    assert all(re.fullmatch("[a-z]{4,12}", word) for word in words())


def test_no_sentence_has_a_word_that_begins_like_a_held_out_one():
    assert [sentence for sentence in sentences() if any(synthesis.HELD_OUT.match(word) for word in sentence.split())] == []


def test_no_word_begins_like_a_held_out_one():
    need_words()

    assert [word for word in words() if synthesis.HELD_OUT.match(word)] == []


@pytest.mark.parametrize("word", ["alexa", "Computer", "computers", "JARVIS", "amelia", "ordenador", "seven", "zeros", "snips"])
def test_held_out_words_are_recognised_in_any_case_and_form(word):
    assert synthesis.HELD_OUT.match(word)


def test_no_sentence_has_a_held_out_word_inside_another():
    assert sorted({word for sentence in sentences() for word in sentence.split() if HELD_OUT_ANYWHERE.search(word)}) == []


def test_no_word_has_a_held_out_one_inside():
    need_words()

    assert [word for word in words() if HELD_OUT_ANYWHERE.search(word)] == []


@pytest.mark.parametrize("voice", ONE_OF_EACH, ids=lambda voice: voice.program)
def test_missing_program_is_named_with_what_to_install(voice, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(EdgekwsError, match=r"is not installed\. Try: apt-get install"):
        say(TEXT, voice)


@pytest.mark.parametrize(
    "voice",
    [
        Voice("espeak-ng", "xx-nobody"),
        pytest.param(Voice("flite", "nobody")),
        pytest.param(Voice("festival", "nobody")),
    ],
    ids=lambda voice: voice.program,
)
def test_voice_that_a_program_lacks_is_refused(voice):
    need(voice.program)

    with pytest.raises(EdgekwsError):
        say(TEXT, voice)
