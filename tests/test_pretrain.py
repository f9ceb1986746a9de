"""The whole recipe in small: real text-to-speech, three steps of training, a model that listens."""

import shutil

import pytest

from edgekws import enrolment
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError
from edgekws.training import material, pretrain, synthesis
from edgekws.training.teacher import Teacher


def test_pretrain_writes_a_model_that_listens_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    for program in ("espeak-ng", "flite", "text2wave"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    monkeypatch.setattr(material, "LEXICON_WORDS", 10)  # so that some minutes hold words by two speakers
    monkeypatch.setattr(synthesis, "random_voice", lambda rng, english=True: synthesis.Voice("espeak-ng", f"en-us+f{rng.integers(1, 6)}"))
    recipe = {"teacher_wheel": None, "corpus": None, "networks": ["edge-small"], "spoken_minutes": 6, "steps": 3}

    (model,) = pretrain.pretrain(tmp_path, **recipe)
    (tiny,) = pretrain.pretrain(tmp_path, **{**recipe, "networks": ["edge-tiny"]})

    load_engine(model).close()
    assert (tiny.raw["recipe"]["teacher"], model.raw["recipe"]["teacher"]) == ("edge", None)
    assert [one.keyword for one in enrolment.bundled(model)] == [pretrain.BUNDLED_KEYWORD]
    assert model.raw["recipe"]["steps"] == 3
    assert "minutes spoken" not in capsys.readouterr().out  # progress is no data
    with pytest.raises(EdgekwsError, match="already there"):
        pretrain.pretrain(tmp_path, **recipe)
    spoken_ns = (tmp_path / "streams.npz").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "edge-small")
    pretrain.pretrain(tmp_path, **recipe)
    assert (tmp_path / "streams.npz").stat().st_mtime_ns == spoken_ns


def test_an_unknown_network_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(EdgekwsError, match=r'no network "edgy". Accepted: edge, edge-small'):
        pretrain.pretrain(tmp_path / "out", teacher_wheel=None, corpus=None, networks=["edgy"])

    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_wheel_of_the_teacher_is_refused(tmp_path):
    (tmp_path / "some.whl").write_bytes(b"no zip")

    with pytest.raises(EdgekwsError, match=r"not the wheel that carries the teacher.*pip download"):
        Teacher(tmp_path / "some.whl")
