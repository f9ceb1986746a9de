"""What is missing or broken on this machine, and the command that mends it. Changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import grp
import importlib.util
import json
import os
import platform
import pwd
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekws import __version__
from edgekws.config import Settings
from edgekws.engines import ORDER, environment, load_engine
from edgekws.errors import EdgekwsError, ModelError, ModelUnreadable, NotPrepared, PowerError, StoreError, install_command
from edgekws.model import Model, find_model, load_model
from edgekws.power import NoMeter, load_meter
from edgekws.power.conditions import power_mode
from edgekws.store import Store

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
    promoted, promoted_check = _promoted(settings.store.root)
    listens = promoted or model
    needs_microphone = settings.audio.source.startswith("mic:")
    return [
        _python(),
        _onnxruntime(),
        model_check,
        *promoted_check,
        *(_engines(listens, settings.model.engine) if listens else ()),
        _state_directory(settings.store.root),
        _portaudio(needs_microphone),
        _source(settings.audio.source),
        _input_device(settings.audio.source),
        _sound_devices(),
        *_told(settings),
        _importable("recordings", "soundfile", "reading of WAV, FLAC and Opus files", "pip install soundfile"),
        _importable(
            "training",
            "torch",
            "training; without it prototypes alone move",
            f"{install_command('train')}; on a Jetson with NVIDIA's own torch",
        ),
        _speech_synthesis(),
        _power_meter(),
        *_jetson(),
        *_service(),
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


def _told(settings: Settings) -> Iterator[Check]:
    """What the listener only says that it lacks, and then listens without."""
    if command := settings.sinks.command:
        there = shutil.which(command[0])
        mend = "" if there else "[sinks] command: the full path of a program that may be executed, or []"
        yield Check("command of a wake", bool(there), there or f"{command[0]} is no program here", mend, essential=False)
    if path := settings.mqtt.ca_file:
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError is one
            mend = "[mqtt] ca_file: a PEM file of the broker's certificate authority, which the service's user may read"
            yield Check("mqtt certificates", False, f"{path}: {error.strerror or error}", mend, essential=False)
        else:
            yield Check("mqtt certificates", True, path, essential=False)


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
    return model, Check("model", True, _whole(model))


def _promoted(root: Path) -> tuple[Model | None, list[Check]]:
    """The version that a round or an operator promoted, which listens in the place of the model. While it cannot, another one does."""
    try:
        path = Store(root, read_only=True).current_model()
        model = load_model(path) if path else None
    except ModelUnreadable as error:
        mend = "let the listener's user read it, or upgrade edgekws; else: edgekws models rollback"
        return None, [Check("promoted version", False, str(error), mend, essential=False)]
    except ModelError as error:
        return None, [Check("promoted version", False, str(error), "edgekws models rollback", essential=False)]
    except StoreError:  # of the state directory there is a check
        return None, []
    return model, [Check("promoted version", True, _whole(model), essential=False)] if model else []


def _whole(model: Model) -> str:
    return f"{model.id}: {model.parameters} parameters, every file as its manifest says"


def _engines(model: Model, wanted: str) -> Iterator[Check]:
    """Each engine by itself. With "auto" one that works is enough, so the others are no fault."""
    results: list[tuple[str, str | None]] = []
    for name in ORDER if wanted in ("auto", *ORDER) else (*ORDER, wanted):
        try:
            load_engine(model, name, at_once=True).close()
            results.append((name, None))
        except NotPrepared:
            detail = f"runs, once its plan for {model.id} is made; beside the listener, which asks for it"
            yield Check(f"engine {name}", True, detail, essential=False)
        except EdgekwsError as error:
            results.append((name, str(error).splitlines()[-1].strip().removeprefix(f"{name}: ")))
    any_works = any(reason is None for _, reason in results)
    for name, reason in results:
        essential = name == wanted or (wanted == "auto" and not any_works)
        if reason is None:
            yield Check(f"engine {name}", True, f"reproduces the golden embeddings of {model.id}", essential=essential)
        else:
            mend = "none needed with another engine"
            if name == ORDER[0]:
                mend = "pip install edgekws, in a fresh virtual environment"
            elif name == wanted:
                mend = 'mend that, or [model] engine = "auto" in edgekws.toml'
            yield Check(f"engine {name}", False, reason, mend, essential)


def _state_directory(root: Path) -> Check:
    """Tried by writing, as permission bits say nothing of a full or read-only disk."""
    name = "state directory"
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    mend = f'sudo install -d -m 700 -o "$USER" "{root}"; or another [store] root in edgekws.toml'
    with suppress(OSError):
        if root.is_dir() and root.stat().st_uid != os.getuid():  # the service's, which would be shut out
            mend = "none where it is the service's: sudo edgekws doctor; else another [store] root in edgekws.toml"
    try:
        if not there.is_dir():
            return Check(name, False, f"{there} is not a directory", mend)
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free_mb = shutil.disk_usage(there).free // 1_000_000
        mode = root.stat().st_mode & 0o777 if root == there else 0o700
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = f"free {FREE_MB} MB there; or another [store] root in edgekws.toml"
        return Check(name, False, f"{there}: cannot be written ({error.strerror})", mend)
    if mode & 0o077:  # made by somebody else: what we make is 0700
        return Check(name, False, f"{root}: others may look into what was recorded (mode {mode:o})", f'chmod 700 "{root}"')
    detail = f"{root}{'' if there == root else ' (made when it is needed)'}, {free_mb} MB free"
    return Check(name, free_mb >= FREE_MB, detail, "" if free_mb >= FREE_MB else f"free {FREE_MB} MB there")


def _portaudio(essential: bool) -> Check:
    library = find_library("portaudio")
    if library is None:
        return Check("portaudio", False, "libportaudio.so.2 not found", "sudo apt-get install libportaudio2", essential)
    return Check("portaudio", True, library, essential=essential)


def _source(source: str) -> Check:
    """What ends the listener before it hears anything. Whether there is a microphone, `_input_device` asks."""
    from edgekws.audio import microphone, open_source, stdin

    scheme, _, rest = source.partition(":")
    try:
        if scheme == "mic":
            microphone.wanted(source, rest)
        elif scheme == "stdin":
            stdin.wanted(source, rest)
        else:
            open_source(source).close()
    except EdgekwsError as error:
        return Check("source", False, str(error), "[audio] source in edgekws.toml: mic:NAME, file:PATH or stdin:")
    return Check("source", True, source)


def _input_device(source: str) -> Check:
    from edgekws.audio import find_input, input_devices

    essential = source.startswith("mic:")
    mend = "plug in a microphone, then: edgekws devices. Without one: edgekws run --source file:PATH or stdin:"
    mends = {"sudo apt-get install libportaudio2": "libportaudio2", "systemctl --user restart pipewire pulseaudio": "did not answer"}
    try:
        found = input_devices()
        if found:
            mend = "edgekws devices, then one of these as [audio] source in edgekws.toml. One that a program holds may not be among them"
            chosen = find_input(source if essential else "mic:")
    except EdgekwsError as error:
        mend = next((how for how, said in mends.items() if said in str(error)), mend)
        return Check("microphone", False, str(error), mend, essential)
    if not found:
        return Check("microphone", False, "no input device", mend, essential)
    named = source if essential else "default"
    return Check("microphone", True, f'{len(found)} input devices, {named} is "{chosen.name}"', essential=essential)


def _sound_devices(directory: Path = Path("/dev/snd")) -> Check:
    """ALSA's own devices; a sound server of the logged-in user opens them for others."""
    captures = sorted(directory.glob("pcmC*c")) if directory.is_dir() else []
    if not captures:
        return Check("sound devices", False, f"no capture device under {directory}", "none needed with a sound server or a file", False)
    if all(os.access(one, os.R_OK | os.W_OK) for one in captures):
        return Check("sound devices", True, f"{len(captures)} capture devices may be opened", essential=False)
    number = captures[0].stat().st_gid
    try:
        group = grp.getgrgid(number).gr_name
        mend = f'sudo usermod -aG {group} "$USER"; log in again'
    except KeyError:  # in a container: the host has its name
        group, mend = str(number), f"start the container with --group-add {number}"
    return Check("sound devices", False, f"{captures[0]} is for the group {group} only", mend, False)


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


JETPACK = {"36": 6, "38": 7, "39": 7}  # by L4T's number
GROUPS = {"audio": "sound cards", "video": "the GPU", "render": "the GPU", "jtop": "power readings"}
# Run by a Python of its own: torch takes seconds and gigabytes to load.
TORCH = (
    "import json, torch; cuda = torch.cuda; there = cuda.is_available();"
    "print(json.dumps([torch.__version__, cuda.get_arch_list(), there and cuda.get_device_capability()]))"
)


def _jetson(root: Path = Path("/"), python: str = sys.executable) -> Iterator[Check]:
    """What people trip over on a Jetson; nothing elsewhere.

    Args:
        root: where its /etc and /run are.
        python: asked about its torch.
    """
    release = root / "etc" / "nv_tegra_release"
    if not release.exists():
        return
    found = re.match(r"# R(\d+).*?REVISION: ([\d.]+)", release.read_text())
    l4t, revision = found.groups() if found else ("", "?")
    jetpack = JETPACK.get(l4t)
    if jetpack is None:
        detail = f"L4T {l4t}.{revision}" if l4t else f"{release} does not tell its version"
        yield Check(
            "jetpack", False, detail, "flash JetPack 6.2 or 7.2: these have Python 3.10 and 3.12, and are what was looked at", False
        )
    else:
        yield Check("jetpack", True, f"JetPack {jetpack}, L4T {l4t}.{revision}", essential=False)
    constraints = f"-c deploy/constraints-jp{jetpack or 6}.txt"
    numpy = _version("numpy") or "0"
    if int(numpy.split(".")[0]) >= 2:
        mend = f"pip install {constraints} 'numpy<2'"
        yield Check("numpy", False, f"{numpy}: JetPack's own packages are compiled against 1.x, and break", mend, False)
    yield from _groups(root)
    if not (root / "run" / "jtop.sock").exists():
        allowed = " --break-system-packages" if jetpack == 7 else ""  # Ubuntu 24.04's pip asks for it
        # From 7.2 on pip alone brings no service.
        install = f"sudo pip3 install{allowed} jetson-stats && sudo jtop --install-service"
        mend = f"sudo systemctl enable --now jtop.service; where there is none: {install}, then restart the board"
        yield Check("jtop service", False, "not running: power from the sensors themselves, no GPU load", mend, False)
    else:
        yield Check("jtop service", True, "running", essential=False)
    mode = power_mode()
    if mode is None:
        yield Check("power mode", False, "nvpmodel does not tell it", "sudo nvpmodel -q; sudo apt-get install nvidia-l4t-nvpmodel", False)
    else:
        yield Check("power mode", True, mode, essential=False)
    yield from _torch(python)


def _groups(root: Path) -> Iterator[Check]:
    """Those of the service's account where there is one, else of this user."""
    with suppress(OSError):
        names = {line.split(":")[0] for line in (root / "etc" / "passwd").read_text().splitlines()}
        try:
            user = "edgekws" if "edgekws" in names else pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # a container's, whose groups are the host's numbers
            mend = "start the container with --group-add, as deploy/Containerfile says"
            yield Check("groups", False, f"the account {os.getuid()} has no name, so its groups are not known", mend, False)
            return
        members = {
            fields[0]: fields[3].split(",")
            for line in (root / "etc" / "group").read_text().splitlines()
            if len(fields := line.split(":")) == 4
        }
        lacking = [name for name in GROUPS if name in members and user not in members[name]] if user != "root" else []
        if lacking:
            what = ", ".join(f"{name} ({GROUPS[name]})" for name in lacking)
            again = "sudo systemctl restart edgekws" if user == "edgekws" else "log in again"
            mend = f"sudo usermod -aG {','.join(lacking)} {user}; {again}"
            yield Check("groups", False, f"{user} is not in {what}", mend, False)
        else:
            yield Check("groups", True, f"{user} is in {', '.join(name for name in GROUPS if name in members)}", essential=False)


def _torch(python: str) -> Iterator[Check]:
    """A torch for another machine imports and trains, on the CPU."""
    try:
        done = subprocess.run([python, "-c", TORCH], env=environment(), cwd="/", capture_output=True, text=True, timeout=120)
        version, architectures, gpu = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return  # none, as said above
    mend = "NVIDIA's own for this JetPack: pip uninstall -y torch, then bash deploy/install.sh --torch INDEX"
    if not gpu:
        yield Check("torch", False, f"{version}: made without CUDA, or for another CUDA than this JetPack's", mend, False)
        return
    major, minor = gpu
    # compute_… is PTX, which the driver compiles for its own GPU or a newer one.
    if not any(re.fullmatch(rf"sm_{major}{minor}[af]?|compute_{major}[0-{minor}]", one) for one in architectures):
        detail = f"{version}: no code for this GPU (sm_{major}{minor}), only for {', '.join(architectures)}"
        yield Check("torch", False, detail, mend, False)
    else:
        yield Check("torch", True, f"{version}, with CUDA", essential=False)


def _service(systemctl: str = "systemctl") -> Iterator[Check]:
    """What the listener that runs as a service says of itself; nothing where there is no systemd or it is not installed."""
    asked = ["LoadState", "ActiveState", "StatusText", "NRestarts"]
    try:
        command = [systemctl, "show", "edgekws.service", *(f"--property={name}" for name in asked)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    state = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if state.get("LoadState") != "loaded":
        return
    text = state.get("StatusText", "")
    detail = (
        f"{state.get('ActiveState')}{f', started again {count} times' if (count := state.get('NRestarts', '0')) != '0' else ''}: {text}"
    )
    if state.get("ActiveState") == "active" and ", level silence," in text:  # not even a microphone's own noise
        mend = "unmute it (alsamixer, or pactl set-source-mute @DEFAULT_SOURCE@ 0), or name another: edgekws devices"
        yield Check("service", False, detail, mend, False)
    elif state.get("ActiveState") == "active" and text.startswith("listening"):
        yield Check("service", True, detail)
    elif state.get("ActiveState") == "inactive":
        yield Check("service", False, "installed and not started", "sudo systemctl enable --now edgekws", False)
    else:
        yield Check("service", False, detail, "journalctl -u edgekws -n 20")


def _importable(name: str, module: str, purpose: str, mend: str) -> Check:
    return _optional(name, module, purpose, mend, importlib.util.find_spec(module) is not None)


def _speech_synthesis() -> Check:
    from edgekws.training.synthesis import PACKAGES, PROGRAMS

    lacking = [one for one in PROGRAMS if shutil.which(one) is None]
    what = lacking[0] if lacking else ", ".join(PROGRAMS)
    return _optional("speech synthesis", what, "pretraining", f"sudo apt-get install {PACKAGES}", not lacking)


def _optional(name: str, what: str, purpose: str, mend: str, found: bool) -> Check:
    if found:
        return Check(name, True, what, essential=False)
    return Check(name, False, f"{what} is not installed: no {purpose}", mend, False)
