"""What is broken is said with the command that mends it, and nothing essential is missed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekws import doctor, engines, errors
from edgekws.config import AudioSettings, ModelSettings, MqttSettings, Settings, SinkSettings, StoreSettings
from edgekws.errors import NotPrepared
from edgekws.model import builtin_models, load_model
from edgekws.power import NoMeter
from edgekws.store import Store

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


def test_a_command_and_certificates_that_the_listener_only_misses_are_looked_for(settings, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    missing = replace(settings, sinks=SinkSettings(command=("/no/such/lamp.sh",)), mqtt=MqttSettings(ca_file=str(tmp_path / "ca.pem")))
    there = replace(settings, sinks=SinkSettings(command=("sh", "-c", "true")))

    assert [found(missing)[name].ok for name in ("command of a wake", "mqtt certificates")] == [False, False]
    assert "/no/such/lamp.sh is no program here" in found(missing)["command of a wake"].detail
    assert found(there)["command of a wake"].ok and not {"command of a wake", "mqtt certificates"} & found(settings).keys()


@pytest.mark.parametrize("source", ["mik:default", "mic:default?rat=48000", "stdin:foo", "file:/no/such.wav"])
def test_a_source_that_would_end_the_listener_is_an_essential_fault(settings, source):
    check = found(replace(settings, audio=AudioSettings(source=source)))["source"]

    assert (check.ok, check.essential) == (False, True) and source.removeprefix("file:") in check.detail
    assert found(settings)["source"].ok


def test_it_changes_nothing(settings, tmp_path):
    doctor.checks(settings)

    assert list(tmp_path.iterdir()) == []


def test_every_fault_comes_with_a_way_to_mend_it(settings):
    faults = [check for check in doctor.checks(replace(settings, model=ModelSettings(id="nowhere"))) if not check.ok]

    assert "model" in {check.name for check in faults}
    assert all(check.mend for check in faults)


@pytest.mark.parametrize("missing", ["espeak-ng", "flite", "text2wave"])
def test_each_program_that_pretraining_speaks_with_is_asked_for(settings, monkeypatch, missing):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    check = found(settings)["speech synthesis"]

    assert (check.ok, check.essential, check.detail) == (False, False, f"{missing} is not installed: no pretraining")
    assert check.mend.startswith("sudo apt-get install ") and "flite festival festvox-kallpc16k" in check.mend


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
def test_the_version_that_listens_is_looked_at_and_its_engine(settings):
    edge, small = (builtin_models()[name] for name in ("edge", "edge-small"))
    store = Store(settings.store.root)
    live = store.promote(small, "0001-learned")
    assert "promoted version" not in found(replace(settings, store=StoreSettings(root=settings.store.root.parent / "other")))
    assert found(settings)["promoted version"].ok and load_model(edge).id in found(settings)["model"].detail
    assert load_model(small).id in found(settings)["engine onnxruntime"].detail

    with (live / "model.onnx").open("ab") as file:
        file.write(b"\0")
    check = found(settings)["promoted version"]
    assert not check.ok and not check.essential and "model.onnx: altered" in check.detail and "rollback" in check.mend
    assert load_model(edge).id in found(settings)["engine onnxruntime"].detail


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


def test_a_state_directory_on_a_full_disk_is_mended_by_space(tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    (tmp_path / "filler").write_bytes(bytes(64 * 1024))
    check = doctor._state_directory(tmp_path / "state")
    subprocess.run(["umount", tmp_path], check=True)

    assert not check.ok and "No space left on device" in check.detail
    assert check.mend == "free 100 MB there; or another [store] root in edgekws.toml"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_service_s_state_directory_is_not_taken_away_from_it():
    ask = (
        "import os, sys; from pathlib import Path; from edgekws import doctor; os.setuid(65533);"
        "check = doctor._state_directory(Path(sys.argv[1])); print(check.ok, check.mend)"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # pytest's folders are root's alone
        os.chown(root, 65534, 65534)
        done = subprocess.run([sys.executable, "-c", ask, root], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("False none where it is the service's: sudo edgekws doctor")


@needs_model
def test_an_engine_that_must_be_prepared_first_is_not_prepared_here(settings, monkeypatch):
    """A double for TensorRT, which needs a GPU."""

    def prepared(model):
        raise NotPrepared("there is no plan")

    double = SimpleNamespace(why_unavailable=lambda: None, load=lambda model: pytest.fail("it was built"), load_prepared=prepared)
    real = engines._backend
    monkeypatch.setattr(engines, "_backend", lambda name: double if name == "tensorrt" else real(name))
    check = found(settings)["engine tensorrt"]

    assert check.ok and "once its plan" in check.detail


def test_a_state_directory_that_others_may_look_into_is_told(settings):
    settings.store.root.mkdir(parents=True, mode=0o755)
    check = found(settings)["state directory"]

    assert not check.ok and check.essential
    assert "others may look into what was recorded (mode 755)" in check.detail
    assert check.mend == f'chmod 700 "{settings.store.root}"'


def test_a_microphone_is_essential_only_where_the_source_is_one(settings):
    assert not found(settings)["microphone"].essential
    assert found(replace(settings, audio=AudioSettings()))["microphone"].essential


def test_both_onnxruntimes_at_once_are_a_fault(settings, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.23.2")
    check = found(settings)["onnxruntime"]

    assert not check.ok
    assert "overwrite each other" in check.detail


def no_name(number):
    raise KeyError(number)


def test_a_sound_device_of_a_group_without_a_name_is_told_by_its_number(monkeypatch, tmp_path):
    """As in a container that was given the device: the group's name is the host's."""
    device = tmp_path / "pcmC0D0c"
    device.touch()
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    monkeypatch.setattr(doctor.grp, "getgrgid", no_name)
    check = doctor._sound_devices(tmp_path)
    group = device.stat().st_gid

    assert check.detail == f"{device} is for the group {group} only"
    assert check.mend.endswith(f"--group-add {group}")


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


@pytest.fixture
def jetson(tmp_path):
    """The few files of a Jetson's root that are looked at: JetPack 6.2, its service's account, no jtop."""
    for name, text in {
        "nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "passwd": "root:x:0:0::/root:/bin/sh\nedgekws:x:998:998::/var/lib/edgekws:/usr/sbin/nologin\n",
        "group": "root:x:0:\naudio:x:29:pulse,edgekws\nvideo:x:44:edgekws\nrender:x:104:\n",
    }.items():
        path = tmp_path / "etc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "run").mkdir()
    return tmp_path


def on_jetson(root, python="/nowhere/python"):
    return {check.name: check for check in doctor._jetson(root, python)}


def test_elsewhere_nothing_is_said_of_jetsons(tmp_path):
    assert on_jetson(tmp_path) == {}


@pytest.mark.parametrize(
    ("release", "ok", "detail"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1", True, "JetPack 6, L4T 36.4.3"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", True, "JetPack 7, L4T 39.2.0"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", False, "L4T 35.4.1"),
        ("", False, "does not tell its version"),
    ],
)
def test_the_jetpack_is_told(jetson, release, ok, detail):
    (jetson / "etc" / "nv_tegra_release").write_text(release)
    check = on_jetson(jetson)["jetpack"]

    assert check.ok == ok and detail in check.detail
    assert check.ok or "flash JetPack 6.2 or 7.2" in check.mend


def test_the_service_account_s_missing_groups_are_told_with_the_command(jetson):
    check = on_jetson(jetson)["groups"]

    assert "edgekws is not in render (the GPU)" in check.detail  # and there is no jtop's group to be in
    assert check.mend == "sudo usermod -aG render edgekws; sudo systemctl restart edgekws"


def test_an_account_in_all_groups_is_well(jetson):
    (jetson / "etc" / "group").write_text("audio:x:29:edgekws\nvideo:x:44:edgekws\nrender:x:104:edgekws\njtop:x:990:edgekws\n")

    assert on_jetson(jetson)["groups"].detail == "edgekws is in audio, video, render, jtop"


def test_an_account_without_a_name_is_told(jetson, monkeypatch):
    """As of a container's --user."""
    (jetson / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    monkeypatch.setattr(doctor.pwd, "getpwuid", no_name)
    check = on_jetson(jetson)["groups"]

    assert f"account {os.getuid()} has no name" in check.detail
    assert "--group-add" in check.mend


def test_a_jtop_that_does_not_run_is_told_until_it_does(jetson):
    mend = on_jetson(jetson)["jtop service"].mend
    assert "systemctl enable --now jtop.service" in mend and "pip3 install jetson-stats && sudo jtop --install-service" in mend

    (jetson / "run" / "jtop.sock").touch()

    assert on_jetson(jetson)["jtop service"].ok


def test_numpy_2_is_told_on_a_jetson(jetson, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "2.2.6")

    assert on_jetson(jetson)["numpy"].mend == "pip install -c deploy/constraints-jp6.txt 'numpy<2'"

    monkeypatch.setattr(doctor, "_version", lambda package: "1.26.4")

    assert "numpy" not in on_jetson(jetson)


def test_the_torch_that_pip_finds_by_itself_is_told():
    """This machine's own, which has no CUDA that works here."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (check,) = doctor._torch(sys.executable)

    assert not check.ok and torch.__version__ in check.detail
    assert "bash deploy/install.sh --torch" in check.mend


@pytest.mark.parametrize(
    ("architectures", "gpu", "ok", "detail"),
    [
        (["sm_87"], (8, 7), True, "2.9.0, with CUDA"),
        (["sm_80", "sm_90"], (8, 7), False, "no code for this GPU (sm_87), only for sm_80, sm_90"),
        (["sm_72", "compute_80"], (8, 7), True, "with CUDA"),
        (["sm_72", "compute_89"], (8, 7), False, "no code for this GPU (sm_87)"),
        (["sm_110", "sm_121", "compute_121"], (11, 0), True, "with CUDA"),
        (["sm_87", "compute_87"], (11, 0), False, "no code for this GPU (sm_110), only for sm_87, compute_87"),
        ([], None, False, "made without CUDA"),
    ],
)
def test_a_torch_for_another_gpu_is_told(tmp_path, monkeypatch, architectures, gpu, ok, detail):
    """A torch that says what one on an Orin or a Thor would: there is none here."""
    (tmp_path / "torch.py").write_text(f"""
__version__ = "2.9.0"
class cuda:
    is_available = lambda: {gpu is not None}
    get_arch_list = lambda: {architectures}
    get_device_capability = lambda: {gpu}
""")
    monkeypatch.setattr(doctor, "environment", lambda: {**os.environ, "PYTHONPATH": str(tmp_path)})
    (check,) = doctor._torch(sys.executable)

    assert check.ok == ok and detail in check.detail


@pytest.mark.parametrize(
    ("state", "ok", "essential", "detail"),
    [
        ("active\nStatusText=listening to mic:\nNRestarts=0", True, True, "active: listening to mic:"),
        ("active\nStatusText=listening to mic: with edge-3, level silence, 0 wakes", False, False, "level silence"),
        ("active\nStatusText=deaf: no microphone\nNRestarts=2", False, True, "active, started again 2 times: deaf: no microphone"),
        ("failed\nStatusText=\nNRestarts=20", False, True, "failed, started again 20 times"),
        ("inactive\nStatusText=\nNRestarts=0", False, False, "installed and not started"),
    ],
)
def test_the_service_tells_how_it_is(tmp_path, state, ok, essential, detail):
    """A systemctl that says what systemd would; tests/test_boot.py asks a real one."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho 'LoadState=loaded\nActiveState={state}'\n")
    systemctl.chmod(0o755)
    (check,) = doctor._service(str(systemctl))

    assert (check.ok, check.essential) == (ok, essential)
    assert detail in check.detail


@pytest.mark.parametrize(
    ("file", "prefix", "command"),
    [
        (
            "/usr/lib/edgekws/edgekws/errors.py",
            "/usr",
            "sudo apt-get install python3-pip && sudo python3 -m pip install --target /usr/local/lib/edgekws",
        ),
        ("/opt/edgekws/venv/lib/python3.10/site-packages/edgekws/errors.py", "/opt/edgekws/venv", "sudo bash deploy/install.sh --torch"),
        (
            "/home/ann/.venv/lib/python3.12/site-packages/edgekws/errors.py",
            "/home/ann/.venv",
            f"{sys.executable} -m pip install 'edgekws[tr",
        ),
    ],
)
def test_the_command_that_adds_the_learner_is_that_of_this_installation(monkeypatch, settings, file, prefix, command):
    """What pip installs beside the Debian package it would not find."""
    monkeypatch.setattr(errors, "__file__", file)
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)

    mend = found(settings)["training"].mend

    assert mend.startswith(command)
    assert ("torch-pruning==" in mend) == ("--target" in mend)
