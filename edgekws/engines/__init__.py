"""INFER: one step of the network a hop. The file name is the backend's name; a backend is imported only when asked for.

A backend module has two functions, and a third where loading may take minutes:

    why_unavailable() -> str | None         the reason why it cannot run here, with what to do; None = it can
    load(model: Model) -> Engine            raises EngineUnavailable when that shows only now
    load_prepared(model: Model) -> Engine   the same from what an earlier `load` left in a cache, else raises NotPrepared
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekws.errors import EdgekwsError, EngineUnavailable, NotPrepared
from edgekws.model import Model, damage_told, golden, load_model

log = logging.getLogger(__name__)

# Else onnxruntime 1.31 gives this machine an identity, keeps a database of telemetry under ~/.cache and starts a thread that may send it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# "auto" is the first that works: a network of 0.1 to 0.4 million parameters does not pay for waking a GPU unless a measurement says so.
ORDER = ("onnxruntime", "tensorrt", "onnxruntime-cuda")
ASKED_FOR = ("tensorrt-refit", "null")  # by name alone
KNOWN = ("auto", *ORDER, *ASKED_FOR)
# Largest difference from a golden embedding, by precision; measured on the packaged models. fp32: 2e-7 on a CPU, and 2e-4 where a GPU
# multiplies in TF32, which rounds as float16 does. fp16: 2e-4 with sums in float32, 1.2e-3 with sums in float16. int8: another order of
# sums that tips a value over a rounding step moves an embedding by up to 4e-3, frames that are 1e-4 off by 1.3e-2; a lost hop by 1e-1.
PARITY_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "int8": 2e-2}

PREPARING_NICE = 5  # below the listener's
PREPARING_OOM = "500"  # of oom_score_adj: a board out of memory ends it before any other program


class Engine(Protocol):
    """A network with its state. One stream, one thread."""

    name: str
    precision: str
    dim: int
    awaited: str = ""
    """The backend that was asked for, if it works once it is prepared (`Preparation`)."""
    refused: str = ""
    """Why this is not the backend that was asked for; "" = it is."""

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → unit embedding, float32 (dim,). The result is the caller's to keep."""

    def steps(self, hops: np.ndarray) -> np.ndarray:
        """The same of several hops, for who has them: float32 (n, 4, 40) → (n, dim)."""
        return np.stack([self.step(hop) for hop in hops]) if len(hops) else np.zeros((0, self.dim), np.float32)

    def reset(self) -> None:
        """Zero states: a new stream."""

    def close(self) -> None:
        """Give everything back."""


def load_engine(model: Model, backend: str = "auto", *, fall_back: bool = False, at_once: bool = False) -> Engine:
    """The first backend that runs here and reproduces the model's golden embeddings.

    Args:
        fall_back: for listening. Where a GPU engine was asked for and does not work, or fails later in the middle of a stream, ONNX
            Runtime on the CPU takes over, and a warning in the log has the reason.
        at_once: nothing that takes minutes; with `fall_back` the CPU takes over until that is done (`Guarded.awaited`).

    Raises:
        EngineUnavailable: none does; the message holds each one's reason.
        NotPrepared: of these: with `at_once`, where one would run once it is prepared.
    """
    if backend not in KNOWN:
        raise EngineUnavailable(f'no engine "{backend}". Accepted: {", ".join(KNOWN)}')
    names: tuple[str, ...] = ORDER if backend == "auto" else (backend,)
    if fall_back and backend not in ("auto", "null", ORDER[0]):
        names = (backend, ORDER[0])
    reasons: list[str] = []
    awaited = ""
    for name in names:
        module = _backend(name)
        reason = module.why_unavailable()
        if reason is None:
            load = getattr(module, "load_prepared", module.load) if at_once else module.load
            try:
                engine = _checked(load(model), model)
            except EngineUnavailable as error:
                reason = str(error)
                if isinstance(error, NotPrepared):
                    awaited = name
            else:
                if not fall_back or (not reasons and name in (ORDER[0], "null")):
                    return engine
                refused = "; ".join(one.strip() for one in reasons)
                if refused:
                    log.warning("engine %s takes over, since %s", name, refused)
                return Guarded(engine, model, awaited, refused)
        reasons.append(f"  {name}: {reason}")
    why = "no inference engine can run here\n" + "\n".join(reasons)
    raise NotPrepared(why) if awaited else EngineUnavailable(why)


def _backend(name: str) -> Any:
    return importlib.import_module(f"edgekws.engines.{name.replace('-', '_')}_engine")


def _checked(engine: Engine, model: Model) -> Engine:
    if engine.name == "null":
        return engine
    try:
        worst, accepted = parity(engine, model), PARITY_TOLERANCE[engine.precision]
    except BaseException:
        engine.close()
        raise
    if worst <= accepted:
        return engine
    engine.close()
    raise EngineUnavailable(
        f"differs from the golden embeddings of {model.id} by {worst:.2g}, accepted is {accepted:g} in {engine.precision}"
    )


class Guarded(Engine):
    """An engine that may fail in the middle of a stream: then ONNX Runtime on the CPU goes on, as if the stream began there."""

    def __init__(self, engine: Engine, model: Model, awaited: str = "", refused: str = "") -> None:
        self._engine, self._model = engine, model
        self.name, self.precision, self.dim = engine.name, engine.precision, engine.dim
        self.awaited, self.refused = awaited, refused

    def step(self, frames: np.ndarray) -> np.ndarray:
        try:
            return self._engine.step(frames)
        except EngineUnavailable as error:
            self._give_up(error)
            return self._engine.step(frames)

    def steps(self, hops: np.ndarray) -> np.ndarray:
        try:
            return self._engine.steps(hops)
        except EngineUnavailable as error:
            self._give_up(error)
            return self._engine.steps(hops)

    def reset(self) -> None:
        try:
            self._engine.reset()
        except EngineUnavailable as error:
            self._give_up(error)

    def close(self) -> None:
        self._engine.close()

    def _give_up(self, error: EngineUnavailable) -> None:
        if self.name == ORDER[0]:
            raise error
        log.error("engine %s failed while listening, %s takes over: %s", self.name, ORDER[0], error)
        self._engine.close()
        self._engine = load_engine(self._model, ORDER[0])
        self.name, self.precision = self._engine.name, self._engine.precision


def parity(engine: Engine, model: Model) -> float:
    """Largest absolute difference from the model's golden embeddings, hop by hop and several at once. Leaves the engine reset."""
    frames, wanted = golden(model)
    engine.reset()
    with damage_told(model.path / "manifest.json"):  # shapes that the graph does not take
        one_by_one = np.stack([engine.step(hop) for hop in frames])
        engine.reset()
        at_once = engine.steps(frames)
    engine.reset()
    return float(max(np.abs(got - wanted).max() for got in (one_by_one, at_once)))


def environment() -> dict[str, str]:
    """Of our processes: this very edgekws. The Debian package's packages, and torch beside them, are where only its own script looks.

    Start them with cwd="/": what -c and -m import is looked for in the current directory first, whosever that is.
    """
    package_root = str(Path(__file__).parent.parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [package_root, *filter(None, sys.path)]))}


class Preparation:
    """A process that loads an engine once, and so leaves what takes minutes, TensorRT's plan, in its cache. It is one of its own because a
    builder takes much memory, and may die of it."""

    def __init__(self, model: Model, backend: str) -> None:
        self.model, self.backend = model, backend
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        code = "import sys; from edgekws.engines import prepare; prepare(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(model.path.resolve()), backend]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=environment(), cwd="/", stdin=quiet, stdout=quiet, stderr=self._said)

    def done(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def why_not(self) -> str:
        """Once it has ended: why the engine cannot be had; "" = it can."""
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            return f"what prepared it was ended by signal {-code}{': out of memory?' if code == -9 else ''}"
        return (said[-1].strip() if said else f"what prepared it ended with exit code {code}") if code else ""

    def close(self) -> None:
        """End it, however far it is."""
        self._process.kill()
        self._process.wait()
        self._said.close()


def prepare(model_path: str, backend: str) -> None:
    """What a `Preparation` does: ends this process with the reason where it fails."""
    os.nice(PREPARING_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(PREPARING_OOM)
    try:
        model = load_model(Path(model_path))
        load_engine(model, backend).close()
        try:
            _backend(backend).load_prepared(model).close()
        except NotPrepared as error:
            sys.exit(f"it was made and could not be kept: {error}")
    except EdgekwsError as error:
        sys.exit(str(error))
