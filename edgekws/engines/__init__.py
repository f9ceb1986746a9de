"""INFER: one step of the network a hop. The file name is the backend's name; a backend is imported only when asked for.

A backend module has two functions:

    why_unavailable() -> str | None      the reason why it cannot run here, with what to do; None = it can
    load(model: Model) -> Engine
"""

from __future__ import annotations

import importlib
from typing import Protocol

import numpy as np

from edgekws.errors import EngineUnavailable
from edgekws.model import Model, golden

ORDER = ("onnxruntime",)
PARITY_TOLERANCE = 1e-3


class Engine(Protocol):
    """A network with its state. One stream, one thread."""

    name: str
    precision: str
    dim: int

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → unit embedding, float32 (dim,). The result is the caller's to keep."""

    def reset(self) -> None:
        """Zero states: a new stream."""

    def close(self) -> None:
        """Give everything back."""


def load_engine(model: Model, backend: str = "auto") -> Engine:
    """The first backend that runs here and reproduces the model's golden embeddings.

    Raises:
        EngineUnavailable: none does; the message holds each one's reason.
    """
    names = ORDER if backend == "auto" else (backend,)
    if backend != "auto" and backend not in (*ORDER, "null"):
        raise EngineUnavailable(f'no engine "{backend}". Accepted: auto, {", ".join(ORDER)}, null')
    reasons = []
    for name in names:
        module = importlib.import_module(f"edgekws.engines.{name}_engine")
        reason = module.why_unavailable()
        if reason is None:
            engine: Engine = module.load(model)
            if name == "null":
                return engine
            worst = parity(engine, model)
            if worst <= PARITY_TOLERANCE:
                return engine
            engine.close()
            reason = f"differs from the golden embeddings of {model.id} by {worst:.2g}, accepted is {PARITY_TOLERANCE:g}"
        reasons.append(f"  {name}: {reason}")
    raise EngineUnavailable("no inference engine can run here\n" + "\n".join(reasons))


def parity(engine: Engine, model: Model) -> float:
    """Largest absolute difference from the model's golden embeddings. Leaves the engine reset."""
    frames, wanted = golden(model)
    engine.reset()
    got = np.stack([engine.step(hop) for hop in frames])
    engine.reset()
    return float(np.abs(got - wanted).max())
