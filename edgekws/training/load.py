"""Trains a model's network on noise until it is ended: the load of a round, for measuring the listener beside it.

    python -m edgekws.training.load MODEL_DIRECTORY

One thread. Prints "ready" after the first step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import load_model
from edgekws.training.networks import Network

BATCH, HOPS = 64, 20


def main(model_path: str) -> None:
    """Never returns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(load_model(Path(model_path)).raw["spec"])
    optimizer = torch.optim.Adam(network.parameters())
    frames = torch.randn(BATCH, HOPS * HOP_FRAMES, N_MELS)
    steps = 0
    while True:
        embeddings = network(frames)[:, -1]
        loss = (embeddings @ embeddings.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps == 1:
            print("ready", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
