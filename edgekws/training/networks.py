"""The networks: causal convolutions over log-mel frames, each with its state outside, so that streaming equals the whole window.

A network is a plain list of layers (JSON in the manifest), so that a pruned one is the same list with other numbers:

    input      "mel": the 40 mel bins are channels (N, 40, T, 1).  "mfcc": 10 cepstra are the frequency axis (N, 1, T, 10)
    layers     [in, out, kernel_t, kernel_f, stride_t, stride_f, groups, relu], or {"residual": [layers]}: relu(x + layers(x))
    head       mean over frequency and the hop's frames, then a linear map to step_dim numbers a hop
    window     the last `window_steps` hops, averaged within `segments` equal parts, laid side by side, to unit length

The papers pool over the whole second: segments = 1. Keeping the order of the parts is what Google's embedding with a stored template does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.values import HOP_MS

Spec = dict[str, Any]
States = list[Tensor]


class ConvSpec(NamedTuple):
    """One convolution, in the order of the JSON list."""

    c_in: int
    c_out: int
    kernel_t: int
    kernel_f: int
    stride_t: int
    stride_f: int
    groups: int
    relu: bool


def ds_cnn(channels: int, blocks: int, strides: list[tuple[int, int]]) -> list[Any]:
    """Hello Edge (Zhang et al. 2017): a 10 x 4 convolution, then depthwise 3 x 3 and pointwise pairs."""
    layers: list[Any] = [[1, channels, 10, 4, *strides[0], 1, True]]
    for i in range(blocks - 1):
        stride = strides[i + 1] if i + 1 < len(strides) else (1, 1)
        layers += [[channels, channels, 3, 3, *stride, channels, True], [channels, channels, 1, 1, 1, 1, 1, True]]
    return layers


def edge(stem: int, width: int) -> list[Any]:
    """Ours: dense temporal convolutions with mel bins as channels.

    Chosen by measurement: on one x86 core ONNX Runtime does a dense 3-tap convolution of one time step at 10 GMAC/s,
    while each layer costs 1 to 2 µs whatever it holds, so few wide layers at 40 and 80 ms beat many thin ones at 20 ms.
    """
    conv = [stem, stem, 3, 1, 1, 1, 1]
    return [
        [N_MELS, stem, 5, 1, 2, 1, 1, True],  # (N, stem, 1, T/2): 40 ms a step
        {"residual": [[*conv, True], [*conv, False]]},
        [stem, width, 4, 1, 2, 1, 1, True],  # (N, width, 1, T/4): 80 ms a step
        *({"residual": [[width, width, 3, 1, 1, 1, 1, False]]} for _ in range(4)),
    ]


def edge_tiny(stem: int, width: int) -> list[Any]:
    """Where little is left to compute, the number of layers decides: four and a head, with longer kernels.

    At 37 000 to 42 000 parameters, ONNX Runtime on one loaded x86 core, a hop against one of `edge`: ten layers 1.8x, eight 2.1x, six 2.5x.

    Not done: six layers as far back as `edge` hears (four residual ones of 4, 4, 3 and 3 taps, 48 wide; 49 784 parameters, 75 000 steps
    on 500 minutes of text-to-speech). They say what `edge` says better, mean cosine 0.77 for 0.74 on disturbed streams held out, but
    the ends of all residuals are one group: to an eighth, pruning goes from 48 channels to 40 in all of them, 35 464 parameters. On ten
    development lives, two seeds each, recall averaged over 0 to 4 false accepts was 1.2 ± 1.0 points lower in the room and 1.3 ± 1.6 in
    quiet, and a hop 2.2 times faster than one of `edge` for 2.7. Left whole, on the four hard ones of them, 2.4 ± 1.6 and 2.1 ± 2.1
    higher.

    Nor six layers whose residuals have inner widths of their own (48 to 40 to 48, 4 and 3 taps; 44 392 parameters, 62 000 steps on the
    same minutes, seed 41), which pruning narrows a few channels at a time. Cosine 0.764; recall on development words, mostly
    text-to-speech as it was trained on, 0.936 for 0.924 in quiet and 0.901 for 0.856 in a room, on the test's people 0.892 for 0.893 and
    0.863 for 0.886. Pruned to 40 124 by steps of four channels, trained 300 steps at 2e-3 with a teacher's weight of 1, over the 60 lives
    of seeds 5 to 7 in docs/measured.md: 0.731 for 0.734 in the room and 0.934 for 0.920 in quiet; deployed 0.678 for 0.681 and 0.834 for
    0.863 at 0.23 for 0.25 and 0.03 for 0.21 false accepts an hour, but one user had 2.1 of them. A hop was 2.3 times faster for 2.7.
    """
    return [
        [N_MELS, stem, 5, 1, 2, 1, 1, True],
        [stem, width, 4, 1, 2, 1, 1, True],
        *({"residual": [[width, width, 5, 1, 1, 1, 1, False]]} for _ in range(2)),
    ]


def spec(network: str) -> Spec:
    """The layers of a network by name. Raises KeyError with the names."""
    ours = {"input": "mel", "step_dim": 32, "window_steps": 12, "segments": 12}
    paper = {"input": "mfcc", "step_dim": 32, "window_steps": 12, "segments": 12}
    resnet: list[Any] = [[1, 64, 3, 3, 1, 1, 1, True]]
    resnet += [{"residual": [[64, 64, 3, 3, 1, 1, 1, True], [64, 64, 3, 3, 1, 1, 1, False]]} for _ in range(6)]
    resnet += [[64, 64, 3, 3, 1, 1, 1, True]]
    known: dict[str, Spec] = {
        "edge": {**ours, "layers": edge(96, 128)},
        "edge-small": {**ours, "layers": edge(48, 64)},
        "edge-tiny": {**ours, "layers": edge_tiny(40, 56)},
        "ds-cnn-s": {**paper, "layers": ds_cnn(64, 5, [(2, 2)])},
        "ds-cnn-m": {**paper, "layers": ds_cnn(172, 5, [(2, 1), (2, 2)])},
        "ds-cnn-l": {**paper, "layers": ds_cnn(276, 6, [(2, 1), (2, 2)])},
        "resnet15": {**paper, "layers": resnet},
    }
    if network not in known:
        raise KeyError(f'no network "{network}". Accepted: {", ".join(known)}')
    return known[network]


class CausalConv(nn.Module):
    """Convolution, batch norm, maybe ReLU. Time is padded on the left only; frequency as usual, to ceil(F / stride).

    Time lies last, where oneDNN's loops are: a training step of `edge` takes 36 ms so, with time before frequency 55.
    """

    def __init__(self, c: ConvSpec, *, norm: bool) -> None:
        super().__init__()
        self.spec = c
        self.ring = max(0, c.kernel_t - c.stride_t)  # frames of the past that a step needs
        kernel, stride = (c.kernel_f, c.kernel_t), (c.stride_f, c.stride_t)
        self.conv = nn.Conv2d(c.c_in, c.c_out, kernel, stride, groups=c.groups, bias=not norm)
        self.norm = nn.BatchNorm2d(c.c_out) if norm else None

    def freq_pad(self, freqs: int) -> tuple[int, int]:
        """Bins of zeros below and above."""
        c = self.spec
        total = max(0, (-(-freqs // c.stride_f) - 1) * c.stride_f + c.kernel_f - freqs)
        return total // 2, total - total // 2

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in / groups, kf, kt) and bias (out,) with the batch norm's statistics folded in."""
        if self.norm is None:
            assert self.conv.bias is not None
            return self.conv.weight, self.conv.bias
        assert self.norm.running_var is not None and self.norm.running_mean is not None
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - self.norm.running_mean * scale

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        """(N, C, F, T) → (N, C', F', T / stride). With states: the next one is taken from the front and its successor put at the back."""
        pad = self.freq_pad(x.shape[2])
        if states is None:
            x = functional.pad(x, (self.ring, 0, *pad))
        else:
            if self.ring:
                x = torch.cat([states.pop(0), x], 3)
                states.append(x[..., x.shape[3] - self.ring :])
            x = functional.pad(x, (0, 0, *pad))
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return torch.relu(x) if self.spec.relu else x


class Residual(nn.Module):
    """relu(x + inner(x)); causal layers need no delay on the short cut."""

    def __init__(self, inner: list[CausalConv]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        """(N, C, F, T) → the same shape."""
        y = x
        for layer in self.inner:
            y = layer(y, states)
        return torch.relu(x + y)


def _dct(count: int) -> np.ndarray:
    """Orthonormal DCT-II of the mel bins, first `count` rows: shape (40, count)."""
    n = np.arange(N_MELS)
    basis = np.cos(np.pi / N_MELS * (n[:, None] + 0.5) * np.arange(count)) * np.sqrt(2 / N_MELS)
    basis[:, 0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _mean(x: Tensor, dim: int) -> Tensor:
    """Over that dimension, which most often is of length one: a mean and its gradient would be six passes over everything."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.mean(dim)


class Network(nn.Module):
    """(N, T, 40) log-mel frames → one vector a hop, and from those the unit embedding of the window."""

    def __init__(self, spec: Spec, *, norm: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList()
        c_out = 1
        for layer in spec["layers"]:
            if isinstance(layer, dict):
                self.layers.append(Residual([CausalConv(ConvSpec(*inner), norm=norm) for inner in layer["residual"]]))
                c_out = layer["residual"][-1][1]
            else:
                self.layers.append(CausalConv(ConvSpec(*layer), norm=norm))
                c_out = layer[1]
        self.head = nn.Linear(c_out, spec["step_dim"])
        self.dct: Tensor
        self.register_buffer("dct", torch.from_numpy(_dct(10)), persistent=False)

    @property
    def dim(self) -> int:
        """Length of the embedding."""
        return int(self.spec["segments"] * self.spec["step_dim"])

    def convs(self) -> list[CausalConv]:
        """Every convolution, in the order of the data."""
        return [m for m in self.modules() if isinstance(m, CausalConv)]

    def training_layout(self) -> torch.memory_format:
        """In which a training step is fastest on one x86 core: channels last, 1.2 to 1.5 times, but for dense convolutions over frequency
        (ResNet15), which take 1.4 times longer so."""
        dense = any(c.spec.kernel_f > 1 and c.spec.c_in > 1 and c.spec.groups == 1 for c in self.convs())
        return torch.contiguous_format if dense else torch.channels_last

    def steps(self, frames: Tensor, states: States | None = None) -> Tensor:
        """(N, T, 40) → (N, T / 4, step_dim): one vector a hop."""
        x = frames.transpose(1, 2)[:, :, None] if self.spec["input"] == "mel" else (frames @ self.dct).transpose(1, 2)[:, None]
        for layer in self.layers:
            x = layer(x, states)
        x = _mean(x, 2)  # (N, C, T')
        x = _mean(x.reshape(*x.shape[:2], frames.shape[1] // HOP_FRAMES, -1), 3)  # (N, C, hops)
        return self.head(x.transpose(1, 2))  # (N, hops, step_dim)

    def window(self, steps: Tensor) -> Tensor:
        """(N, hops, step_dim) → (N, hops - window_steps + 1, dim): the unit embedding at each hop that has a whole window."""
        length, segments = self.spec["window_steps"], self.spec["segments"]
        x = steps.unfold(1, length, 1)  # (N, W, step_dim, window_steps)
        x = _mean(x.reshape(*x.shape[:3], segments, -1), 4)  # (N, W, step_dim, segments)
        return functional.normalize(x.transpose(2, 3).flatten(2), dim=2, eps=1e-6)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, T, 40), T a multiple of 4 → (N, T / 4, dim): the embedding at every hop, with zeros before the first."""
        steps = self.steps(frames)
        before = steps.new_zeros(steps.shape[0], self.spec["window_steps"] - 1, steps.shape[2])
        return self.window(torch.cat([before, steps], 1))

    def initial_states(self) -> States:
        """Zeros for a new stream: one tensor for each convolution with a past, then the window's."""
        states = []
        freqs = 1 if self.spec["input"] == "mel" else 10
        for conv in self.convs():
            if conv.ring:
                states.append(torch.zeros(1, conv.spec.c_in, freqs, conv.ring))
            freqs = -(-freqs // conv.spec.stride_f)
        if self.spec["window_steps"] > 1:
            states.append(torch.zeros(1, self.spec["window_steps"] - 1, self.spec["step_dim"]))
        return states

    def step(self, frames: Tensor, states: States) -> tuple[Tensor, States]:
        """One hop or more of a stream.

        Args:
            frames: (1, 4 · hops, 40).
            states: from `initial_states` or the last call; not changed.

        Returns:
            Embeddings (1, hops, dim) and the next states.
        """
        queue = list(states)
        window = queue.pop() if self.spec["window_steps"] > 1 else None
        steps = self.steps(frames, queue)
        if window is None:
            return self.window(steps), queue
        steps = torch.cat([window, steps], 1)
        return self.window(steps), [*queue, steps[:, steps.shape[1] - window.shape[1] :]]

    def parameter_count(self) -> int:
        """Weights and biases with batch norm folded: what is deployed."""
        convs = sum(c.conv.weight.numel() + c.spec.c_out for c in self.convs())
        return convs + sum(p.numel() for p in self.head.parameters())

    def macs_per_s(self) -> int:
        """Multiply-accumulates for one second of audio, streaming."""
        total, frames, freqs = 0.0, float(HOP_FRAMES), 1 if self.spec["input"] == "mel" else 10
        for conv in self.convs():
            frames /= conv.spec.stride_t
            freqs = -(-freqs // conv.spec.stride_f)
            total += conv.conv.weight.numel() * frames * freqs
        total += self.head.weight.numel() + (0 if self.spec["input"] == "mel" else HOP_FRAMES * self.dct.numel())
        return round(total * 1000 / HOP_MS)

    def receptive_field_ms(self) -> int:
        """Audio that an embedding can depend on: the convolutions' past and the window's."""
        frames, stride = 1, 1
        for conv in self.convs():
            frames += (conv.spec.kernel_t - 1) * stride
            stride *= conv.spec.stride_t
        frames += HOP_FRAMES - stride  # the frames of a hop are averaged
        return round(frames * HOP_MS / HOP_FRAMES + 12) + int(self.spec["window_steps"] - 1) * HOP_MS
