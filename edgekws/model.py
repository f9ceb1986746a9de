"""A model version on disk: an immutable directory that says itself what it is, and is checked before it is used.

manifest.json        what the model is, and the sha256 of each other file; written last
model.onnx           (frames, states) → (embedding, states)
model_fp16.onnx      the same in float16, for GPUs (optional)
model_int8.onnx      the same in INT8, in a version that is deployed so (optional)
prototypes.npz       keywords that anyone may say (optional)
negatives.npz        what the network said of hours without a keyword: thresholds are calibrated on it (optional)
adapted.npz          what an adapted version listens for, by enrolment (optional)
parity.npz           golden frames and embeddings: an engine must reproduce them before it goes live
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from edgekws.errors import EdgekwsError, ModelError, ModelUnreadable
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.values import HOP_MS, SAMPLE_RATE_HZ

FORMAT = 2  # 1 had no states of two hops
DEFAULT_MODEL = "edge"
REQUIRED_FILES = ("model.onnx", "parity.npz")


class State(NamedTuple):
    """A tensor that a hop leaves for the next ones, float32: the graph's output `<name>_next`.

    One hop later it is the graph's input `<name>`, and with two hops the input `<name>_2` of the hop after that one too: what only moves
    on needs no copy. Zeros at the start of a stream.
    """

    name: str
    shape: tuple[int, ...]
    hops: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """The graph's names for it, the newest first."""
        return f"{self.name}_next", self.name, *(f"{self.name}_{age}" for age in range(2, self.hops + 1))


def turns(states: Sequence[State]) -> list[dict[str, tuple[int, int]]]:
    """How an engine goes round its buffers, of which each state has one more than hops: hop by hop, tensor → (state, buffer)."""
    count = math.lcm(*(state.hops + 1 for state in states))
    return [
        {name: (i, (turn - age) % (state.hops + 1)) for i, state in enumerate(states) for age, name in enumerate(state.tensors)}
        for turn in range(count)
    ]


@dataclass(frozen=True)
class Model:
    """One verified model version."""

    id: str
    path: Path
    network: str
    """edge, edge-small, edge-tiny, ds-cnn-l or another name of `training.networks.spec`."""
    dim: int
    """Length of the embedding."""
    states: tuple[State, ...]
    parameters: int
    macs_per_s: int
    """Multiply-accumulates of the network for one second of audio."""
    receptive_field_ms: int
    """Audio that an embedding can depend on."""
    trained_on_sha256: frozenset[str] = frozenset()
    """First 16 hex digits of the sha256 of each corpus file seen in training: `edgekws eval` leaves these out."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The whole manifest."""


def builtin_models() -> dict[str, Path]:
    """The models that ship in the package: name → directory."""
    root = Path(str(resources.files("edgekws") / "models"))
    return {path.name: path for path in sorted(root.iterdir()) if (path / "manifest.json").exists()} if root.is_dir() else {}


def find_model(name: str | Path | None = None) -> Path:
    """The directory of a model given by built-in name or by path; None is the default.

    Raises:
        ModelError: there is no such model.
    """
    known = builtin_models()
    if name is None:
        name = DEFAULT_MODEL
    if str(name) in known:
        return known[str(name)]
    if (Path(name) / "manifest.json").exists():
        return Path(name)
    raise ModelError(f'no model "{name}". Built in: {", ".join(known) or "none"}; or give a directory that holds a manifest.json')


def load_model(path: Path) -> Model:
    """Read a manifest and check every file that it names.

    Raises:
        ModelError: a file is missing or altered, or the manifest is not one of ours.
        ModelUnreadable: of it that a file cannot be read just now, or that the manifest is of a later version.
    """
    manifest_path = path / "manifest.json"
    try:
        raw = json.loads(manifest_path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: no manifest.json. Its writing was cut short or it is no model; see: edgekws models list") from None
    except OSError as error:
        raise _unreadable(error)(f"{manifest_path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(
            f"{manifest_path}: not readable as JSON ({error}). Restore it or use another model: edgekws models list"
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("format"), int):
        raise ModelError(f'{manifest_path}: no "format" number, so not a manifest of edgekws')
    if raw["format"] > FORMAT:
        raise ModelUnreadable(
            f"{manifest_path}: format {raw['format']}, this edgekws reads up to {FORMAT}. Upgrade edgekws or use another model"
        )
    try:
        files: dict[str, str] = raw["files"]
        for name in (*REQUIRED_FILES, *(["model_int8.onnx"] if raw.get("precision") == "int8" else [])):
            if name not in files:
                raise ModelError(f'{manifest_path}: "files" does not list {name}, which every model needs')
        frame = (raw["sample_rate_hz"], raw["hop_ms"], raw["mel_bins"], raw["hop_frames"])
        model = Model(
            id=str(raw["id"]),
            path=path,
            network=str(raw["network"]),
            dim=int(raw["dim"]),
            states=tuple(State(str(name), tuple(int(n) for n in shape), *map(int, hops)) for name, shape, *hops in raw["states"]),
            parameters=int(raw["parameters"]),
            macs_per_s=int(raw["macs_per_s"]),
            receptive_field_ms=int(raw["receptive_field_ms"]),
            trained_on_sha256=frozenset(raw.get("trained_on_sha256", ())),
            raw=raw,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{manifest_path}: {type(error).__name__} {error} where the model contract wants another value") from error
    if frame != (SAMPLE_RATE_HZ, HOP_MS, N_MELS, HOP_FRAMES):
        raise ModelError(
            f"{manifest_path}: made for rate {frame[0]} Hz, hop {frame[1]} ms, {frame[2]} mel bins, {frame[3]} frames a hop;"
            f" this edgekws has {SAMPLE_RATE_HZ}, {HOP_MS}, {N_MELS}, {HOP_FRAMES}"
        )
    for name, wanted in files.items():
        check_file(path / name, wanted)
    return model


def manifests(folders: Iterable[Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Id → directory and manifest of each version that can be read; their files are not checked."""
    found = {}
    for path in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads((path / "manifest.json").read_text())
            found[str(raw["id"])] = path, raw
    return found


def _unreadable(error: OSError) -> type[ModelError]:
    """Who may not read it yet may later; what a bad sector holds is gone."""
    return ModelUnreadable if isinstance(error, PermissionError) else ModelError


def check_file(path: Path, wanted_sha256: str) -> None:
    """Raises ModelError unless the file is there and unaltered."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise ModelError(f"{path}: missing, but the manifest lists it. Restore it or use another model: edgekws models list") from None
    except OSError as error:
        raise _unreadable(error)(f"{path}: cannot be read ({error.strerror})") from error
    if found != wanted_sha256:
        raise ModelError(f"{path}: altered (sha256 {found[:12]}…, manifest {wanted_sha256[:12]}…). Restore it or use another model")


def write_manifest(path: Path, fields: Mapping[str, Any]) -> None:
    """Hash every file of the directory and write manifest.json last, so that a half-written model has none."""
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir()) if p.is_file() and p.name != "manifest.json"
    }
    shape = {"format": FORMAT, "sample_rate_hz": SAMPLE_RATE_HZ, "hop_ms": HOP_MS, "mel_bins": N_MELS, "hop_frames": HOP_FRAMES}
    temporary = path / "manifest.json.new"
    temporary.write_text(json.dumps({**shape, **fields, "files": files}, indent=1) + "\n")
    temporary.replace(path / "manifest.json")


def graph(model: Model, *, gpu: bool = False) -> tuple[Path, str]:
    """The ONNX file that an engine runs, and its precision.

    An INT8 version (`"precision": "int8"` in the manifest) is model_int8.onnx on every engine. Else it is model.onnx, in whose place
    a GPU takes model_fp16.onnx where there is one; on a CPU that one only costs more.
    """
    if model.raw.get("precision") == "int8":
        return model.path / "model_int8.onnx", "int8"
    if gpu and "model_fp16.onnx" in model.raw.get("files", {}):
        return model.path / "model_fp16.onnx", "fp16"
    return model.path / "model.onnx", "fp32"


def rewrite_manifest(path: Path, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
    """After a file was put into a model directory that is still being made: hash all of them again. `facts` are added."""
    raw = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**{name: value for name, value in raw.items() if name not in ("files", "format")}, **facts})


def golden(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Frames (n, 4, 40) and embeddings (n, dim) that every engine must reproduce, fed in order from zero states."""
    path = model.path / "parity.npz"
    with damage_told(path), np.load(path, allow_pickle=False) as data:
        frames, embeddings = data["frames"], data["embeddings"]
        if frames.shape != (len(embeddings), HOP_FRAMES, N_MELS) or embeddings.shape != (len(frames), model.dim):
            raise ValueError(f"frames {frames.shape} and embeddings {embeddings.shape} of a model with {model.dim} dimensions")
        return frames, embeddings


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Whatever a file of a model makes NumPy, zipfile, zlib and ONNX Runtime raise → ModelError: they have a dozen kinds."""
    try:
        yield
    except (EdgekwsError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, PermissionError):
            raise ModelUnreadable(f"{path}: cannot be read ({error.strerror})") from error
        raise ModelError(f"{path}: damaged ({type(error).__name__}: {str(error)[:200]}). Restore it or use another model") from error
