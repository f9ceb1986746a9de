"""Teach a small streaming network to say, in noise and rooms, what the teacher says of the clean sound."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from edgekws.errors import EdgekwsError
from edgekws.frontend import HOP_FRAMES
from edgekws.training.material import Material, check_made_from, say
from edgekws.training.networks import Network

CROP_HOPS = 60
WARM_HOPS = 13  # a crop starts from zero states: the loss waits until the convolutions' 1.02 s are filled
WORD_TAIL_HOPS = 2
TEMPERATURE = 0.07
LR = 2e-3
KEPT_EVERY = 500  # steps: half a minute of `edge` on a Xeon core with bfloat16, a minute on an AMD one without


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
    def fit(cls, material: Material, dim: int) -> Projection:
        """Recorded and synthesised speech count alike, however much there is of each."""
        real = np.repeat(material.source > 0, np.diff(material.starts))
        parts = [part for part in (material.targets[~real], material.targets[real]) if len(part)]
        fewest = min(len(part) for part in parts)
        rows = np.concatenate([part[np.linspace(0, len(part) - 1, fewest).astype(int)] for part in parts]).astype(np.float64)
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


@dataclass(frozen=True)
class Batch:
    """Pieces of `CROP_HOPS` hops."""

    frames: Tensor
    """(N, 240, 40): random copies."""
    wanted: Tensor
    """(N, 60, step_dim): NaN where the teacher had not heard enough."""
    word: Tensor
    """(N,): number of the word that the piece ends with, -1 if none."""
    word_hop: Tensor
    """(N,): where in the piece the word has been heard, plus `WORD_TAIL_HOPS`."""


class Crops:
    """Draws batches: a part at random places, a part as pairs of one word by two speakers.

    Recordings are scarce, and what we are for: each source of them is drawn as often as text-to-speech, however long it is.
    """

    def __init__(self, material: Material, targets: np.ndarray, batch: int, pairs: int, seed: int) -> None:
        self._material, self._targets, self._batch, self._pairs = material, targets, batch, pairs
        self._rng = np.random.default_rng(seed)
        self._lengths = np.diff(material.starts)
        chance = np.maximum(0, self._lengths - CROP_HOPS) / np.bincount(material.source, self._lengths)[material.source]
        self._chance = chance / chance.sum()
        self._by_word: dict[int, np.ndarray] = {}
        if pairs:
            stream = np.searchsorted(material.starts, material.words[:, 2], "right") - 1
            early = material.words[:, 2] - material.starts[stream] < WARM_HOPS + 12
            usable = material.words[~early]
            by_word = {int(w): usable[usable[:, 0] == w] for w in np.unique(usable[:, 0])}
            self._by_word = {w: rows for w, rows in by_word.items() if len(np.unique(rows[:, 1])) >= 2}
            if len(self._by_word) < pairs:
                raise EdgekwsError(
                    f"only {len(self._by_word)} words are spoken by two speakers, a batch needs {pairs}. Give more --spoken-minutes"
                )
            self._word_list = np.array(sorted(self._by_word))

    def draw(self) -> Batch:
        """The next batch."""
        rng, starts = self._rng, self._material.starts
        places: list[tuple[int, int, int]] = []  # first hop, word, hop of the word in the piece
        for word in rng.choice(self._word_list, self._pairs, replace=False) if self._pairs else ():
            rows = rng.permutation(self._by_word[int(word)])
            second = rows[rows[:, 1] != rows[0, 1]][0]
            for row in (rows[0], second):
                stream = int(np.searchsorted(starts, row[2], "right")) - 1
                heard = int(row[2]) + WORD_TAIL_HOPS
                latest = min(heard - WARM_HOPS - 10, int(starts[stream + 1]) - CROP_HOPS)
                first = int(rng.integers(max(int(starts[stream]), heard - CROP_HOPS + 1), max(latest, int(starts[stream])) + 1))
                places.append((first, int(word), heard - first))
        for stream in rng.choice(len(self._lengths), self._batch - len(places), p=self._chance):
            places.append((int(starts[stream]) + int(rng.integers(self._lengths[stream] - CROP_HOPS)), -1, 0))
        frames = []
        for first, _, _ in places:
            copy = int(rng.integers(len(self._material.frames)))
            frames.append(self._material.frames[copy, first * HOP_FRAMES : (first + CROP_HOPS) * HOP_FRAMES])
        return Batch(
            torch.from_numpy(np.stack(frames).astype(np.float32)),
            torch.from_numpy(np.stack([self._targets[first : first + CROP_HOPS] for first, _, _ in places])),
            torch.tensor([word for _, word, _ in places]),
            torch.tensor([min(hop, CROP_HOPS - 1) for _, _, hop in places]),
        )

    @property
    def drawn(self) -> dict[str, Any]:
        """How far the draws are; set it to draw on from there."""
        return dict(self._rng.bit_generator.state)

    @drawn.setter
    def drawn(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state


def teacher_loss(network: Network, said: Tensor, wanted: Tensor) -> Tensor:
    """Step by step (squared error), window by window (cosine), and window against all other windows (InfoNCE, van den Oord 2018)."""
    said, wanted = said[:, WARM_HOPS:], wanted[:, WARM_HOPS:]
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


def word_loss(network: Network, said: Tensor, batch: Batch) -> Tensor:
    """The same word by two speakers belongs together, apart from the batch's other words and other sounds (Khosla et al. 2020)."""
    windows = network.window(said)  # (N, W, dim); row w ends at hop w + window_steps - 1
    shift = network.spec["window_steps"] - 1
    spoken = batch.word >= 0
    at = windows[torch.arange(len(windows)), (batch.word_hop - shift).clamp(min=0)]  # (N, dim)
    anchors, labels = at[spoken], batch.word[spoken]
    others = windows[:, WARM_HOPS::11].flatten(0, 1)  # whatever else is heard; a few of them overlap the words, as in life
    like = torch.cat([anchors @ anchors.T, anchors @ others.T], 1) / TEMPERATURE
    itself = torch.eye(len(anchors), like.shape[1], dtype=torch.bool)
    same = torch.zeros_like(itself)
    same[:, : len(anchors)] = labels[:, None] == labels[None]
    # Windows so alike that they must be the word's own neighbours are no negatives.
    like = like.masked_fill(itself | ((like > 0.95 / TEMPERATURE) & ~same), -1e4)
    same &= ~itself
    log_share = like - like.logsumexp(1, keepdim=True)
    return -log_share.masked_fill(~same, 0).sum(1).div(same.sum(1).clamp(min=1)).mean()


def distil(
    network: Network,
    material: Material,
    projection: Projection | None,
    *,
    steps: int,
    batch: int,
    seed: int,
    word_weight: float = 0.0,
    halfway: Path | None = None,
    made_from: Mapping[str, object] | None = None,
) -> tuple[list[float], float]:
    """Train in place on one thread.

    Args:
        halfway: the file that training leaves every `KEPT_EVERY` steps, and goes on from to the same weights as if nothing had stopped it.
        made_from: what makes it another training, beside the numbers given here.

    Returns:
        The mean loss of each hundred steps, and the seconds that training took, those before it was stopped included.

    Raises:
        EdgekwsError: `halfway` is of another training, or cannot be read.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if projection is None:
        targets = np.full((len(material.targets), network.spec["step_dim"]), np.nan, np.float32)
    else:
        targets = projection(material.targets)
    crops = Crops(material, targets, batch, batch // 4 if word_weight else 0, seed)
    decay = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=LR)
    network.to(memory_format=network.training_layout())  # type: ignore[call-overload]
    network.train()
    # Products in bfloat16 where the processor has them take less time than in float32.
    short = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    training = {
        **(made_from or {}),
        "parameters": network.parameter_count(),
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "words": word_weight,
    }
    history: list[float] = []
    recent: list[float] = []
    first, before_s = 0, 0.0
    if halfway and halfway.exists():
        first, before_s, history, recent = _go_on(halfway, training, network, optimiser, crops)
        say(f"going on after step {min(first, steps)} of {steps}, which took {before_s:.0f} s")
    start = time.monotonic()
    for step in range(first, steps + 1):
        done = step / steps
        rate = LR * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        pieces = crops.draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            said = network.steps(pieces.frames)
        said = said.float()
        value = said.new_zeros(())
        if projection is not None:
            value = value + teacher_loss(network, said, pieces.wanted)
        if word_weight:
            value = value + word_weight * word_loss(network, said, pieces)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        recent.append(float(value.detach()))
        elapsed_s = time.monotonic() - start
        if (step + 1) % 100 == 0:
            history.append(float(np.mean(recent)))
            recent.clear()
            left_s = elapsed_s / (step + 1 - first) * (steps - step)
            say(f"step {step + 1} of {steps}, loss {history[-1]:.3f}, {left_s:.0f} s left")
        if halfway and (step + 1) % KEPT_EVERY == 0:
            _keep(halfway, training, network, optimiser, crops, (step + 1, before_s + elapsed_s, history, recent))
    network.eval()
    return history, before_s + time.monotonic() - start


Progress = tuple[int, float, list[float], list[float]]
"""The next step, seconds so far, the mean loss of each hundred steps, the losses since."""


def _keep(path: Path, training: Mapping[str, object], network: Network, optimiser: Optimizer, crops: Crops, progress: Progress) -> None:
    """Whole or not at all: a power cut leaves the one before."""
    arrays = {f"network.{name}": value.numpy() for name, value in network.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        arrays |= {f"optimiser.{i}.{name}": value.numpy() for name, value in moments.items()}
    facts = {"made_from": training, "crops": crops.drawn, "progress": progress}
    temporary = path.with_suffix(".new.npz")
    np.savez(temporary, torch=torch.get_rng_state().numpy(), facts=np.array(json.dumps(facts)), **arrays)
    temporary.replace(path)


def _go_on(path: Path, training: Mapping[str, object], network: Network, optimiser: Optimizer, crops: Crops) -> Progress:
    try:
        with np.load(path, allow_pickle=False) as data:
            facts, arrays = json.loads(str(data["facts"])), {name: torch.from_numpy(data[name]) for name in data.files if name != "facts"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EdgekwsError(f"{path}: training cannot go on from it: {error}. Remove it, and training begins anew") from error
    check_made_from(path, facts["made_from"], training)
    network.load_state_dict({name.removeprefix("network."): value for name, value in arrays.items() if name.startswith("network.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        if name.startswith("optimiser."):
            _, i, moment = name.split(".")
            state.setdefault(int(i), {})[moment] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(arrays["torch"])
    crops.drawn = facts["crops"]
    step, seconds, history, recent = facts["progress"]
    return step, seconds, history, recent
