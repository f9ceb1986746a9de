"""What is broken is said with the command that mends it, and nothing essential is missed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekws import doctor
from edgekws.config import AudioSettings, ModelSettings, Settings, StoreSettings
from edgekws.model import builtin_models
from edgekws.power import NoMeter

needs_model = pytest.mark.skipif(not builtin_models(), reason="no built-in model in this tree")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(audio=AudioSettings(source="stdin:"), store=StoreSettings(root=tmp_path / "state" / "edgekws"))


def found(settings: Settings) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(settings)}


@needs_model
def test_a_working_machine_has_no_essential_fault(settings):
    broken = [check for check in doctor.checks(settings) if check.essential and not check.ok]

    assert broken == []
    assert found(settings)["engine onnxruntime"].ok


def test_it_changes_nothing(settings, tmp_path):
    doctor.checks(settings)

    assert list(tmp_path.iterdir()) == []


def test_every_fault_comes_with_a_way_to_mend_it(settings):
    faults = [check for check in doctor.checks(replace(settings, model=ModelSettings(id="nowhere"))) if not check.ok]

    assert "model" in {check.name for check in faults}
    assert all(check.mend for check in faults)


@needs_model
def test_an_altered_model_is_essential_and_named(settings, tmp_path):
    shutil.copytree(next(iter(builtin_models().values())), tmp_path / "model")
    with (tmp_path / "model" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    check = found(replace(settings, model=ModelSettings(id=str(tmp_path / "model"))))["model"]

    assert not check.ok
    assert check.essential
    assert "model.onnx: altered" in check.detail


@needs_model
def test_an_engine_that_does_not_exist_is_essential(settings):
    check = found(replace(settings, model=ModelSettings(engine="abacus")))["engine abacus"]

    assert not check.ok
    assert check.essential
    assert "Accepted: auto, onnxruntime" in check.detail


def test_a_state_directory_that_is_a_file_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    check = found(replace(settings, store=StoreSettings(root=tmp_path / "file" / "state")))["state directory"]

    assert not check.ok
    assert str(tmp_path / "file") in check.detail


def test_a_microphone_is_essential_only_where_the_source_is_one(settings):
    assert not found(settings)["microphone"].essential
    assert found(replace(settings, audio=AudioSettings()))["microphone"].essential


def test_both_onnxruntimes_at_once_are_a_fault(settings, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.23.2")
    check = found(settings)["onnxruntime"]

    assert not check.ok
    assert "overwrite each other" in check.detail


def test_the_exit_code_says_whether_it_can_listen(settings, capsys):
    assert doctor.run(replace(settings, model=ModelSettings(id="nowhere"))) == 1
    table = capsys.readouterr().out

    assert 'BROKEN  model                   no model "nowhere"' in table
    assert "→ edgekws models list" in table


def test_json_lists_every_check(settings, capsys):
    doctor.run(settings, as_json=True)
    printed = json.loads(capsys.readouterr().out)

    assert {"name", "ok", "detail", "mend", "essential"} == set(printed[0])
    assert {"python", "onnxruntime", "model", "state directory", "portaudio", "microphone"} <= {check["name"] for check in printed}


def test_the_power_meter_is_named_with_what_it_reads(monkeypatch):
    """Faked: no meter can be read on most machines that run tests."""
    chip = SimpleNamespace(
        name="ina3221", rail="VDD_IN", counts=False, read=lambda: {"VDD_IN": 4775.2, "VDD_SOC": 1440.0}, close=lambda: None
    )
    monkeypatch.setattr(doctor, "load_meter", lambda: chip)

    assert doctor._power_meter() == doctor.Check("power meter", True, "ina3221, VDD_IN: 4775 mW now", essential=False)


def test_no_power_meter_is_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "load_meter", lambda: NoMeter("no power meter can be read here (rapl: none)"))
    check = doctor._power_meter()

    assert (check.ok, check.essential, check.detail) == (False, False, "no power meter can be read here (rapl: none)")
