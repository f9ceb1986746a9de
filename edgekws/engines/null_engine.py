"""An engine that computes nothing: measures everything but the network, and lets tests run without a model's arithmetic."""

from __future__ import annotations

import numpy as np

from edgekws.engines import Engine
from edgekws.model import Model


def why_unavailable() -> str | None:
    """It always runs."""
    return None


def load(model: Model) -> NullEngine:
    """An engine that hears nothing."""
    return NullEngine(model.dim)


class NullEngine(Engine):
    """Every embedding is the zero vector, which is like no keyword."""

    name = "null"
    precision = "none"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → zeros (dim,)."""
        return np.zeros(self.dim, np.float32)

    def reset(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to give back."""
