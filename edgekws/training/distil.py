"""Teach a small streaming network to say, in noise and rooms, what the teacher says of the clean sound."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgekws.frontend import HOP_FRAMES
from edgekws.training.material import Material
from edgekws.training.networks import Network

CROP_HOPS = 60
WARM_HOPS = 13  # a crop starts from zero states: the loss waits until the convolutions' 1.02 s are filled
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Projection:
    """The teacher's 96 numbers → the `step_dim` that we learn: principal components of the material, partly whitened.

    On development words (amelia, ey ordenador, digits) 32 components at half whitening lost nothing against all 96.
    """

    mean: np.ndarray
    """float32, shape (96,): the background's mean. Taking it away decides more than the classifier (Google's embedding, 1.33 s)."""
    matrix: np.ndarray
    """float32, shape (96, dim)."""

    @classmethod
    def fit(cls, targets: np.ndarray, dim: int) -> Projection:
        """From teacher embeddings (hops, 96); rows of NaN are skipped."""
        rows = targets[::3].astype(np.float64)
        rows = rows[~np.isnan(rows).any(1)]
        mean = rows.mean(0)
        values, vectors = np.linalg.eigh(np.cov(rows.T))
        values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
        matrix = vectors / values**0.25
        matrix /= np.sqrt((values**0.5).mean())  # mean variance of the outputs is one
        return cls(mean.astype(np.float32), matrix.astype(np.float32))

    def __call__(self, targets: np.ndarray) -> np.ndarray:
        """(…, 96) → float32 (…, dim)."""
        return (targets.astype(np.float32) - self.mean) @ self.matrix


def crops(material: Material, targets: np.ndarray, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces: frames (batch, 240, 40) of random copies and targets (batch, 60, step_dim)."""
    lengths = np.diff(material.starts)
    chance = np.maximum(0, lengths - CROP_HOPS).astype(float)
    frames, wanted = [], []
    for stream in rng.choice(len(lengths), batch, p=chance / chance.sum()):
        hop = material.starts[stream] + int(rng.integers(lengths[stream] - CROP_HOPS))
        copy = int(rng.integers(len(material.frames)))
        frames.append(material.frames[copy, hop * HOP_FRAMES : (hop + CROP_HOPS) * HOP_FRAMES])
        wanted.append(targets[hop : hop + CROP_HOPS])
    return torch.from_numpy(np.stack(frames).astype(np.float32)), torch.from_numpy(np.stack(wanted))


def loss(network: Network, frames: Tensor, wanted: Tensor) -> Tensor:
    """Step by step (squared error), window by window (cosine), and window against all other windows (InfoNCE, van den Oord 2018)."""
    said = network.steps(frames)[:, WARM_HOPS:]
    wanted = wanted[:, WARM_HOPS:]
    valid = ~wanted.isnan().any(2)
    step_loss = functional.mse_loss(said[valid], wanted[valid])
    ours, theirs = network.window(said), network.window(torch.nan_to_num(wanted))  # (N, W, dim)
    whole = valid.unfold(1, network.spec["window_steps"], 1).all(2)  # (N, W)
    window_loss = 1 - (ours * theirs).sum(2)[whole].mean()
    spaced = whole.clone()
    spaced[:, torch.arange(whole.shape[1]) % 9 != int(torch.randint(9, ()))] = False  # neighbours overlap: they are no negatives
    a, b = ours[spaced], theirs[spaced]
    contrast = functional.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)))
    return step_loss + 2 * window_loss + 0.3 * contrast


def distil(
    network: Network,
    material: Material,
    projection: Projection,
    *,
    steps: int,
    batch: int,
    seed: int,
    lr: float = 2e-3,
    minutes: float = 1e9,
) -> list[float]:
    """Train in place on one thread; stops early, with the rate fully decayed, when `minutes` are over.

    Returns:
        The mean loss of each hundred steps.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    targets = projection(material.targets)
    decay = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=lr)
    network.to(memory_format=torch.channels_last)  # 1.2 to 1.3 times faster a step on one x86 core
    network.train()
    history: list[float] = []
    recent: list[float] = []
    start = time.monotonic()
    done = 0.0
    step = 0
    while done < 1:
        done = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        rate = lr * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * min(1.0, done)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        value = loss(network, *crops(material, targets, batch, rng))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        recent.append(float(value.detach()))
        step += 1
        if step % 100 == 0:
            history.append(float(np.mean(recent)))
            recent.clear()
            elapsed_s = time.monotonic() - start
            print(
                f"pretrain: step {step} of {steps}, loss {history[-1]:.3f}, {elapsed_s / max(done, 1e-3) * (1 - done):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    network.eval()
    return history
