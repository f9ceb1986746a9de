"""What is missing or broken on this machine, and the command that mends it. Changes nothing."""

from __future__ import annotations

import dataclasses
import grp
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekws import __version__
from edgekws.config import Settings
from edgekws.engines import ORDER, load_engine
from edgekws.errors import EdgekwsError, PowerError
from edgekws.model import Model, find_model, load_model
from edgekws.power import NoMeter, load_meter

FREE_MB = 100  # for events and models; below it the store is near to refusing


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    """A command or a step that mends it; "" when ok."""
    essential: bool = True
    """False: the listener works without it."""


def checks(settings: Settings) -> list[Check]:
    """Everything that the listener needs with these settings, then what is only good to have. Never raises EdgekwsError."""
    model, model_check = _model(settings.model.id)
    needs_microphone = settings.audio.source.startswith("mic:")
    return [
        _python(),
        _onnxruntime(),
        model_check,
        *(_engines(model, settings.model.engine) if model else ()),
        _state_directory(settings.store.root),
        _portaudio(needs_microphone),
        _input_device(needs_microphone),
        _sound_devices(),
        _importable("recordings", "soundfile", "reading of WAV, FLAC and Opus files", "pip install soundfile"),
        _importable("training", "torch", "adaptation and pretraining", "pip install 'edgekws[train]'; on a Jetson its own torch first"),
        _program("speech synthesis", "espeak-ng", "pretraining", "sudo apt-get install espeak-ng"),
        _power_meter(),
    ]


def run(settings: Settings, *, as_json: bool = False) -> int:
    """Prints a table, or a list of checks as JSON. Returns the exit code: 1 if something essential is broken."""
    found = checks(settings)
    broken = any(check.essential and not check.ok for check in found)
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=1))
        return int(broken)
    for check in found:
        mark = "ok" if check.ok else "BROKEN" if check.essential else "absent"
        first, *more = check.detail.splitlines()
        print(f"{mark:<8}{check.name:<24}{first}", *(f"{'':<32}{line.strip()}" for line in more), sep="\n")
        if check.mend:
            print(f"{'':<32}→ {check.mend}")
    return int(broken)


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.machine()}, edgekws {__version__}"
    return Check("python", sys.version_info >= (3, 10), detail, "" if sys.version_info >= (3, 10) else "use Python 3.10 or later")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _onnxruntime() -> Check:
    """Both distributions write the same files, so that whichever was installed last is half of each."""
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        mend = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
        return Check("onnxruntime", False, f"onnxruntime {cpu} and onnxruntime-gpu {gpu} overwrite each other's files", mend)
    if not (cpu or gpu):
        return Check("onnxruntime", False, "not installed", "pip install onnxruntime")
    return Check("onnxruntime", True, f"onnxruntime {cpu}" if cpu else f"onnxruntime-gpu {gpu}")


def _model(name: str) -> tuple[Model | None, Check]:
    try:
        model = load_model(find_model(name))
    except EdgekwsError as error:
        return None, Check("model", False, str(error), "edgekws models list, then [model] id in edgekws.toml")
    return model, Check("model", True, f"{model.id}: {model.parameters} parameters, every file as its manifest says")


def _engines(model: Model, wanted: str) -> Iterator[Check]:
    """Each engine by itself. With "auto" one that works is enough, so the others are no fault."""
    results: list[tuple[str, str | None]] = []
    for name in ORDER if wanted in ("auto", *ORDER) else (*ORDER, wanted):
        try:
            load_engine(model, name).close()
            results.append((name, None))
        except EdgekwsError as error:
            results.append((name, str(error).splitlines()[-1].strip().removeprefix(f"{name}: ")))
    any_works = any(reason is None for _, reason in results)
    for name, reason in results:
        essential = name == wanted or (wanted == "auto" and not any_works)
        if reason is None:
            yield Check(f"engine {name}", True, f"reproduces the golden embeddings of {model.id}", essential=essential)
        else:
            mend = "pip install edgekws, in a fresh virtual environment" if essential else "none needed with another engine"
            yield Check(f"engine {name}", False, reason, mend, essential)


def _state_directory(root: Path) -> Check:
    """Tried by writing, as permission bits say nothing of a full or read-only disk."""
    name = "state directory"
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    mend = f'sudo install -d -m 700 -o "$USER" "{root}"; or another [store] root in edgekws.toml'
    try:
        if not there.is_dir():
            return Check(name, False, f"{there} is not a directory", mend)
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free_mb = shutil.disk_usage(there).free // 1_000_000
    except OSError as error:
        return Check(name, False, f"{there}: cannot be written ({error.strerror})", mend)
    detail = f"{root}{'' if there == root else ' (made when it is needed)'}, {free_mb} MB free"
    return Check(name, free_mb >= FREE_MB, detail, "" if free_mb >= FREE_MB else f"free {FREE_MB} MB there")


def _portaudio(essential: bool) -> Check:
    library = find_library("portaudio")
    if library is None:
        return Check("portaudio", False, "libportaudio.so.2 not found", "sudo apt-get install libportaudio2", essential)
    return Check("portaudio", True, library, essential=essential)


def _input_device(essential: bool) -> Check:
    from edgekws.audio import input_devices

    mend = "plug in a microphone, then: edgekws devices. Without one: edgekws run --source file:PATH or stdin:"
    try:
        found = input_devices()
    except EdgekwsError as error:
        return Check("microphone", False, str(error), mend, essential)
    if not found:
        return Check("microphone", False, "no input device", mend, essential)
    default = next((device for device in found if device.is_default), found[0])
    return Check("microphone", True, f'{len(found)} input devices, default "{default.name}"', essential=essential)


def _sound_devices(directory: Path = Path("/dev/snd")) -> Check:
    """ALSA's own devices; a sound server of the logged-in user opens them for others."""
    captures = sorted(directory.glob("pcmC*c")) if directory.is_dir() else []
    if not captures:
        return Check("sound devices", False, f"no capture device under {directory}", "none needed with a sound server or a file", False)
    if all(os.access(one, os.R_OK | os.W_OK) for one in captures):
        return Check("sound devices", True, f"{len(captures)} capture devices may be opened", essential=False)
    group = grp.getgrgid(captures[0].stat().st_gid).gr_name
    return Check(
        "sound devices", False, f"{captures[0]} is for the group {group} only", f'sudo usermod -aG {group} "$USER"; log in again', False
    )


def _power_meter() -> Check:
    meter = load_meter()
    try:
        if isinstance(meter, NoMeter):
            return Check(
                "power meter", False, meter.why, "none is needed to listen; with one, edgekws bench tells the energy of a hop", False
            )
        unit = "mJ counted" if meter.counts else "mW now"
        return Check("power meter", True, f"{meter.name}, {meter.rail}: {meter.read()[meter.rail]:.0f} {unit}", essential=False)
    except PowerError as error:
        return Check("power meter", False, str(error), "edgekws doctor again", False)
    finally:
        meter.close()


def _importable(name: str, module: str, purpose: str, mend: str) -> Check:
    return _optional(name, module, purpose, mend, lambda one: importlib.util.find_spec(one) is not None)


def _program(name: str, program: str, purpose: str, mend: str) -> Check:
    return _optional(name, program, purpose, mend, lambda one: shutil.which(one) is not None)


def _optional(name: str, what: str, purpose: str, mend: str, found: Callable[[str], bool]) -> Check:
    if found(what):
        return Check(name, True, what, essential=False)
    return Check(name, False, f"{what} is not installed: no {purpose}", mend, False)
