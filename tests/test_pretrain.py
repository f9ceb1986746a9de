"""The whole recipe in small: real text-to-speech, three steps of training, a model that listens."""

import contextlib
import hashlib
import io
import json
import shutil
import types

import numpy as np
import pytest
import soundfile

from edgekws import enrolment
from edgekws.cli import main
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError
from edgekws.model import find_model, load_model
from edgekws.training import distil, material, pretrain, synthesis, teacher
from edgekws.training.datasets import Utterance, is_for_training, load
from edgekws.training.teacher import Teacher

WORDS = ("left", "right", "marvin", "sheila", "follow", "forward", "visual", "backward", "happy", "house", "yes", "tree")


def skip_without_the_programs():
    for program in ("espeak-ng", "flite", "text2wave"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def speak(path, text, variant="f1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, synthesis.say(text, synthesis.Voice("espeak-ng", f"en-us+{variant}")), 16_000)


def speech_commands(root):
    """Two speakers to train on, one for each other split, two words that evaluation needs, and noise."""
    for speaker, word in [(s, w) for s in ("f1", "m3") for w in (*WORDS, "seven", "zero")] + [("f2", "tree"), ("m2", "house")]:
        speak(root / word / f"{speaker}_nohash_0.wav", word, speaker)
    (root / "_background_noise_").mkdir()
    hiss = np.random.default_rng(0).standard_normal(48_000) * 300
    soundfile.write(root / "_background_noise_" / "hiss.wav", hiss.astype(np.int16), 16_000)
    (root / "validation_list.txt").write_text("tree/f2_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("house/m2_nohash_0.wav\n")
    return root


def hey_snapdragon(root, keywords=("hi_galaxy", "hey_snapdragon")):
    """Eight speakers; the hashes of number 1 and 4 leave them out of training."""
    for keyword in keywords:
        for i in range(8):
            speak(root / keyword / f"speaker {i}" / "1.wav", keyword.replace("_", " "), f"m{i + 1}")
    return root


def our_corpus(root, text):
    speak(root / "neg/nathalie/0.wav", text)
    speak(root / "noise/rain.wav", f"{text}, the noise")
    rows = ["neg/nathalie/0.wav,negative,speech-nl,nathalie,negative,4", "noise/rain.wav,noise,rain,,fold1,4"]
    (root / "manifest.csv").write_text("\n".join(["path,kind,label,speaker,split,duration_s", *rows, ""]))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that hears a minute of text-to-speech, our corpus and two data sets."""
    skip_without_the_programs()
    folder = tmp_path_factory.mktemp("made")
    data = [speech_commands(folder / "gsc"), hey_snapdragon(folder / "qualcomm")]
    corpus = our_corpus(folder / "corpus", "of what the corpus says " * 12)
    settings = {"teacher_wheel": None, "corpus": corpus, "data": data, "spoken_minutes": 1, "steps": 1}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        (model,) = pretrain.pretrain(folder / "out", networks=["edge-small"], **settings)
    return types.SimpleNamespace(out=folder / "out", settings=settings, model=model, said=said.getvalue())


def no_room(*given):
    raise EdgekwsError("disk full")


def test_pretrain_writes_a_model_that_listens_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    skip_without_the_programs()
    monkeypatch.setattr(material, "LEXICON_WORDS", 10)  # so that some minutes hold words by two speakers
    monkeypatch.setattr(synthesis, "random_voice", lambda rng, english=True: synthesis.Voice("espeak-ng", f"en-us+f{rng.integers(1, 6)}"))
    monkeypatch.setattr(distil, "KEPT_EVERY", 2)
    recipe = {"teacher_wheel": None, "corpus": None, "networks": ["edge-small"], "spoken_minutes": 6, "steps": 3}
    with monkeypatch.context() as stopped, pytest.raises(EdgekwsError, match="disk full"):
        stopped.setattr(pretrain, "finish", no_room)
        pretrain.pretrain(tmp_path, **recipe)

    (model,) = pretrain.pretrain(tmp_path, **recipe)
    (tiny,) = pretrain.pretrain(tmp_path, **{**recipe, "networks": ["edge-tiny"]})

    assert "going on after step 3 of 3" in capsys.readouterr().err and not list(tmp_path.glob("*.halfway*"))
    load_engine(model).close()
    packaged = {"id": "edge-3", "sha256": load_model(find_model("edge")).raw["files"]["model.onnx"]}
    assert (tiny.raw["recipe"]["teacher"], tiny.raw["recipe"]["taught_by"]) == ("edge", packaged)
    assert (model.raw["recipe"]["teacher"], model.raw["recipe"]["taught_by"]) == (None, None)
    assert [one.keyword for one in enrolment.bundled(model)] == [pretrain.BUNDLED_KEYWORD]
    assert model.raw["recipe"]["steps"] == 3
    assert "minutes spoken" not in capsys.readouterr().out  # progress is no data
    with pytest.raises(EdgekwsError, match="already there"):
        pretrain.pretrain(tmp_path, **recipe)
    made_ns = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    shutil.rmtree(tmp_path / "edge-small")
    pretrain.pretrain(tmp_path, **recipe)
    assert [path.name for path in sorted(made_ns)] == ["material.npz", "replay.npz", "streams.npz"]
    assert {path: path.stat().st_mtime_ns for path in made_ns} == made_ns


@pytest.mark.parametrize(
    ("runs", "made_here"),
    [([["edge", "edge-tiny"]], True), ([["edge-tiny", "edge"]], True), ([["edge"], ["edge-tiny"]], True), ([["edge-tiny"]], False)],
)
def test_edge_tiny_is_taught_by_the_edge_beside_it_in_whatever_order_they_are_made(tmp_path, monkeypatch, runs, made_here):
    """Only who teaches is real: all that costs time is replaced."""
    taught = []
    nothing = types.SimpleNamespace(targets=np.zeros((1, 96)), frames=np.zeros((4, 4, 40)))
    model = {"id": "edge-3", "network": "edge", "raw": {"files": {"model.onnx": "0" * 64}}}
    monkeypatch.setattr(synthesis, "check", lambda: None, raising=False)
    monkeypatch.setattr(pretrain, "_streams", lambda *given: [])
    monkeypatch.setattr(pretrain, "_material", lambda *given: nothing)
    monkeypatch.setattr(pretrain, "_negative_streams", lambda *given: [])
    monkeypatch.setattr(pretrain, "write_replay", lambda *given: None)
    monkeypatch.setattr(pretrain, "load_model", lambda path: types.SimpleNamespace(path=path, **model))
    monkeypatch.setattr(pretrain, "_taught_by", lambda model, *given: taught.append(model.path) or (nothing, nothing))
    monkeypatch.setattr(pretrain, "distil", lambda *given, **settings: ([0.0], 0.0))
    monkeypatch.setattr(
        pretrain,
        "finish",
        lambda _, path, name, *given: path.mkdir(parents=True) or types.SimpleNamespace(path=path, **model | {"network": name}),
    )
    for networks in runs:
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=None, networks=networks, spoken_minutes=1, steps=1)

    assert taught == [tmp_path / "out" / "edge" if made_here else find_model("edge")]


@pytest.mark.parametrize("missing", ["espeak-ng", "flite", "text2wave"])
def test_without_a_program_that_speaks_nothing_is_made(tmp_path, monkeypatch, missing):
    """It would loop for ever, or train on the voices that are left."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")

    with pytest.raises(EdgekwsError, match=f"{missing} is not installed"):
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=None, spoken_minutes=1, steps=1)
    assert not (tmp_path / "out").exists()


def test_without_a_voice_nothing_is_made(tmp_path, monkeypatch):
    """Of a voice that is not there festival says nothing and exits with 0."""
    skip_without_the_programs()
    monkeypatch.setattr(synthesis, "FESTIVAL_VOICES", (*synthesis.FESTIVAL_VOICES, "nobody_diphone"))

    with pytest.raises(synthesis.Missing, match=r"in voice nobody_diphone\. Try: apt-get install .* festvox-kallpc16k .* wamerican"):
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=None, networks=["edge-small"], spoken_minutes=1, steps=1)
    assert not (tmp_path / "out").exists()


def test_the_bundled_keyword_is_not_made_of_the_voices_that_are_left(tmp_path, monkeypatch):
    shutil.copytree(find_model("edge-tiny"), tmp_path / "model")
    monkeypatch.setattr(shutil, "which", lambda name: None)

    with pytest.raises(EdgekwsError, match="is not installed"):
        pretrain.add_keyword(tmp_path / "model", "hey jetson")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--spoken-minutes", "0", "--spoken-minutes 0: accepted is a whole number from 1 on"),
        ("--steps", "0", "--steps 0: accepted is a whole number from 1 on"),
        ("--seed", "-1", "--seed -1: accepted is a whole number from 0 on, but not 29"),
        ("--seed", "29", "--seed 29: accepted is a whole number from 0 on, but not 29"),
        ("--network", "edgy", 'no network "edgy". Accepted: edge, edge-small'),
    ],
)
def test_what_cannot_be_is_wrong_usage_before_anything_is_fetched_or_made(tmp_path, monkeypatch, capsys, option, value, said):
    monkeypatch.setattr(teacher, "fetch", pytest.fail)

    assert main(["pretrain", "--out", str(tmp_path / "out"), option, value]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_training_side_is_refused_before_anything_is_made(tmp_path):
    skip_without_the_programs()
    corpus = our_corpus(tmp_path / "corpus", "nothing to learn from")
    text = (corpus / "manifest.csv").read_text()
    (corpus / "manifest.csv").write_text(text.replace("neg/nathalie/", "neg/ann/").replace("fold1", "train"))

    with pytest.raises(EdgekwsError, match=r"corpus: none of its 2 recordings is on the training side.*neg/nathalie/.*fold1"):
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=corpus, spoken_minutes=1, steps=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_called_noise_makes_no_noise_of_speech(tmp_path):
    speech, noise = np.random.default_rng(0).integers(-3000, 3000, (2, 192_000)).astype(np.int16)
    found = []
    for root in (tmp_path / "corpus", tmp_path / "noise" / "corpus"):
        root.mkdir(parents=True)
        soundfile.write(root / "speech.wav", speech, 16_000)
        soundfile.write(root / "rain.wav", noise, 16_000)
        found.append(pretrain._negative_streams([], [root / "speech.wav"], [root / "rain.wav"]))

    assert [len(samples) for samples in found[0]] == [len(samples) for samples in found[1]]
    assert len(found[0]) == 3 and np.array_equal(found[0][1], noise)  # speech, noise, and where speech begins


def test_the_teacher_is_fetched_last_of_what_is_needed(tmp_path, monkeypatch, capsys):
    skip_without_the_programs()
    corpus = our_corpus(tmp_path / "corpus", "nothing to learn from")
    arguments = ["pretrain", "--out", str(tmp_path / "out"), "--network", "edge-small", "--corpus", str(corpus), "--spoken-minutes", "1"]
    text = (corpus / "manifest.csv").read_text()
    said = []
    for which, rows in ((shutil.which, text.replace("neg/nathalie/", "neg/ann/").replace("fold1", "train")), (lambda name: None, text)):
        monkeypatch.setattr(shutil, "which", which)
        (corpus / "manifest.csv").write_text(rows)
        monkeypatch.setattr(teacher, "fetch", pytest.fail)
        assert main(arguments) == 1
        said.append(capsys.readouterr().err)
    monkeypatch.undo()
    (tmp_path / "some.whl").write_bytes(b"no zip")
    monkeypatch.setattr(teacher, "fetch", lambda folder: tmp_path / "some.whl")
    assert main(arguments) == 1
    said.append(capsys.readouterr().err)

    for one, why in zip(said, ("on the training side", "is not installed", "some.whl: not the wheel"), strict=True):
        assert why in one


def test_a_file_that_is_no_wheel_of_the_teacher_is_refused(tmp_path):
    (tmp_path / "some.whl").write_bytes(b"no zip")

    with pytest.raises(EdgekwsError, match=r"not the wheel that carries the teacher.*pip download"):
        Teacher(tmp_path / "some.whl")


def test_data_sets_are_heard_but_for_held_out_words_and_speakers_of_other_splits(made):
    heard = [one for folder in made.settings["data"] for one in load(folder) if is_for_training(one)]
    heard = [one for one in heard if one.label not in ("seven", "zero", "hey snapdragon")]
    corpus = [made.settings["corpus"] / name for name in ("neg/nathalie/0.wav", "noise/rain.wav")]

    assert made.model.raw["recipe"]["data"] == {"gsc": 2 * len(WORDS) + 1, "hey_snapdragon": 6}
    files = {hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in [*corpus, *(one.path for one in heard)]}
    assert made.model.trained_on_sha256 == files
    assert f"gsc: 4 of {2 * len(WORDS) + 5} training utterances left out" in made.said
    assert "qualcomm: 6 of 12 training utterances left out" in made.said


def test_words_of_the_recordings_are_keywords_and_neither_held_out_nor_noise(made):
    recorded = [stream for stream in material.load_streams(made.out / "streams.npz") if stream.source == "data"]

    assert {word.text for stream in recorded for word in stream.words} == {*WORDS, "hi galaxy"}


def test_sentences_beside_a_keyword_are_heard_and_are_no_word(tmp_path):
    """HeySnips labels them all alike."""
    keywords = [Utterance(tmp_path / f"{i}.wav", "wake up", "m1", "train", True) for i in range(6)]
    sentences = [Utterance(tmp_path / f"{i}.wav", "speech-en", "m1", "train", False) for i in range(6, 9)]
    for one in [*keywords, *sentences]:
        soundfile.write(one.path, np.full(32_000, 1000, np.int16), 16_000)

    (stream,) = pretrain._recorded_streams([*keywords, *sentences], None)

    assert [word.text for word in stream.words] == ["wake up"] * 6
    assert len(stream.samples) > 9 * 32_000


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("spoken_minutes", 2, "spoken_minutes 1, now 2"),
        ("seed", 2, "seed 1, now 2"),
        ("teacher_wheel", "some.whl", "teacher None, now google speech_embedding"),
        ("corpus", "another", "corpus [0-9a-f]{16}, now [0-9a-f]{16}"),
        ("corpus", None, "corpus [0-9a-f]{16}, now None"),
        ("data", "fewer", "data [0-9a-f]{16}, now [0-9a-f]{16}"),
    ],
)
@pytest.mark.parametrize("kept", ["streams.npz", "material.npz"])
def test_what_was_made_with_other_settings_is_not_trained_on(made, tmp_path, setting, value, said, kept):
    other = {"another": lambda: our_corpus(tmp_path / "corpus", "something else"), "fewer": lambda: made.settings["data"][:1]}
    settings = {**made.settings, setting: other[value]() if value in other else value}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / kept).symlink_to(made.out / kept)

    with pytest.raises(EdgekwsError, match=rf"{kept}: made with other settings \({said}\)\. .*remove it or give another --out"):
        pretrain.pretrain(tmp_path / "out", networks=["edge-small"], **settings)

    assert [path.name for path in (tmp_path / "out").iterdir()] == [kept]


def test_streams_that_do_not_say_what_they_were_made_from_are_not_trained_on(tmp_path):
    skip_without_the_programs()
    np.savez(tmp_path / "streams.npz", lengths=np.zeros((0, 4)))

    with pytest.raises(EdgekwsError, match=r"streams\.npz: made with other settings \(spoken_minutes not noted, now 6; .*remove it"):
        pretrain.pretrain(tmp_path, teacher_wheel=None, corpus=None, spoken_minutes=6)


def test_a_moved_corpus_and_data_sets_in_another_order_are_the_same(made, tmp_path):
    with np.load(made.out / "streams.npz") as kept:
        noted = json.loads(str(kept["made_from"]))
    corpus = shutil.copytree(made.settings["corpus"], tmp_path / "moved")
    changed = {**made.settings, "corpus": corpus, "data": made.settings["data"][::-1], "seed": 2}
    (tmp_path / "streams.npz").symlink_to(made.out / "streams.npz")

    with pytest.raises(EdgekwsError, match=r"\(seed 1, now 2\)"):  # and nothing else
        pretrain.pretrain(tmp_path, networks=["edge-small"], **changed)

    assert list(noted) == ["spoken_minutes", "seed", "teacher", "corpus", "data", "paces"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: hey_snapdragon(root, ["hey_snapdragon"]), "6 of 6 training utterances left out"),
        (lambda root: our_corpus(root, "no split is called train"), "none of its 2 utterances is in a training split.*--corpus"),
    ],
)
def test_a_data_set_that_gives_nothing_to_train_on_is_refused_before_anything_is_made(tmp_path, make, said):
    skip_without_the_programs()
    with pytest.raises(EdgekwsError, match=f"data: nothing to train on, .*({said})"):
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=None, data=[make(tmp_path / "data")], spoken_minutes=1, steps=1)

    assert not (tmp_path / "out").exists()
