"""A step of training on noise: the load of a round, for measuring what it costs and what the listener costs beside it.

    python -m edgekws.training.load MODEL_DIRECTORY

trains that model's network until it is ended; one thread. Prints "ready" after the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import load_model
from edgekws.training.networks import Network, Spec

BATCH, HOPS = 64, 20


def stepper(spec: Spec, device: str = "cpu") -> Callable[[], None]:
    """Forward, backward and update over 64 windows of 1.6 s each time it is called."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(spec).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    frames = torch.randn(BATCH, HOPS * HOP_FRAMES, N_MELS, device=device)

    def step() -> None:
        embeddings = network(frames)[:, -1]
        loss = (embeddings @ embeddings.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def main(model_path: str) -> None:
    """Never returns."""
    step = stepper(load_model(Path(model_path)).raw["spec"])
    step()
    print("ready", flush=True)
    while True:
        step()


if __name__ == "__main__":
    main(sys.argv[1])
