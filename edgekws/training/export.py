"""Network → model directory: an ONNX graph written node by node, batch norm folded, no exporter, no dynamic shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekws.errors import ModelError
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import Model, State, load_model, write_manifest
from edgekws.training.networks import CausalConv, Network, Residual

OPSET = 17
PARITY_HOPS = 24


class _Writer:
    """Collects nodes and constants. A hop lies in rows (frames · freqs, C), frame after frame; a window is an image (1, C, T, F).

    In rows, rings are joined and cut whole, and a layer that is a matrix product is written as one. One hop on one x86 core, beside
    images with ONNX Runtime's reordering between the layers: DS-CNN-L 57 µs instead of 76, edge 33 instead of 46. For a window images
    are the faster form, DS-CNN-L 315 µs instead of 330.
    """

    def __init__(self, *, streaming: bool) -> None:
        from onnx import helper, numpy_helper

        self.streaming = streaming
        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.states: list[State] = []
        self.renamed: dict[str, str] = {}

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = self._numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("_".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self._helper.make_node(op, inputs, [output], **attributes))
        return output

    def remember(self, x: str, past: int, new: int, channels: int, *, flat: bool = False) -> str:
        """A state of `past` rows before the `new` rows of x. With `flat` the rows lie end to end: (1, (past + new) · channels).

        Where that is what the last one or two hops left, x itself is the next state: without cutting it out a hop of DS-CNN-L takes 8 %
        less, of edge-small 12 %.
        """
        name = f"state_{len(self.states)}"
        axis, row = (1, channels) if flat else (0, 1)
        whole = past in (new, 2 * new)
        rows = new if whole else past
        state = State(name, (1, rows * channels) if flat else (rows, channels), past // rows)
        self.states.append(state)
        joined = self.node("Concat", [*reversed(state.tensors[1:]), x], f"{name}_joined", axis=axis)
        if whole:
            self.renamed[x] = state.tensors[0]
        else:
            self.node("Slice", [joined, self.ints(new * row), self.ints((past + new) * row), self.ints(axis)], state.tensors[0])
        return joined

    def relu(self, x: str, wanted: bool) -> str:
        return self.node("Relu", [x], f"{x}_relu") if wanted else x

    def image(self, layer: CausalConv, x: str, name: str, freqs: int, past: int, *, relu: bool) -> str:
        """(1, C, T, F), `past` frames of zeros before it → (1, C', T', F')."""
        c = layer.spec
        low, high = layer.freq_pad(freqs)
        weight, bias = _weights(layer)
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        pads, strides = [past, low, 0, high], [c.stride_t, c.stride_f]
        return self.relu(self.node("Conv", inputs, name, pads=pads, strides=strides, group=c.groups), relu)

    def conv(
        self, layer: CausalConv, x: str, name: str, frames: int, freqs: int, *, relu: bool, taps: bool = False, shortcut: str = ""
    ) -> tuple[str, int, int]:
        """A layer over `frames` and `freqs` → its output, and how many frames and freqs that has.

        With `taps` the rows are already those of the output's freqs, each with the kernel's taps in frequency side by side. What is named
        as `shortcut` is added before the ReLU.
        """
        c = layer.spec
        weight, bias = _weights(layer)
        if taps:
            c, weight = c._replace(c_in=c.kernel_f, kernel_f=1, stride_f=1), weight.transpose(0, 3, 2, 1)
        frames_out, freqs_out = frames // c.stride_t, -(-freqs // c.stride_f)
        product = self.streaming and c.groups == c.kernel_f == c.stride_f == 1
        if shortcut and not product:
            x, frames, freqs = self.conv(layer, x, name, frames, freqs, relu=False)
            return self.relu(self.node("Add", [x, shortcut], f"{name}_sum"), relu), frames, freqs
        if not self.streaming:
            return self.image(layer, x, name, freqs, layer.ring, relu=relu), frames_out, freqs_out
        flat = product and frames * freqs == 1
        if layer.ring:
            x = self.remember(x, layer.ring * freqs, frames * freqs, c.c_in, flat=flat)
        if product:
            if c.kernel_t * c.stride_t > 1 and not flat:
                if frames_out * freqs > 1:  # each output's own rows
                    times = np.arange(frames_out)[:, None, None] * c.stride_t + np.arange(c.kernel_t)
                    rows = (times * freqs + np.arange(freqs)[:, None]).reshape(-1, c.kernel_t)
                    x = self.node("Gather", [x, self.constant(f"{name}.rows", rows)], f"{name}_taken", axis=0)  # (T' · F, kt, in)
                x = self.node("Reshape", [x, self.ints(frames_out * freqs, c.kernel_t * c.c_in)], f"{name}_flat")
            matrix = self.constant(f"{name}.weight", weight.transpose(0, 2, 3, 1).reshape(c.c_out, -1))  # (out, kt · in)
            added = self.constant(f"{name}.bias", bias)
            if shortcut:  # added with the bias, and the ReLU becomes a part of the product
                added = self.node("Add", [shortcut, added], f"{name}_shortcut")
            x = self.node("Gemm", [x, matrix, added], name, transB=1)
            return self.relu(x, relu), frames_out, freqs_out
        x = self.node("Reshape", [x, self.ints(1, layer.ring + frames, freqs, c.c_in)], f"{name}_nhwc")
        x = self.node("Transpose", [x], f"{name}_nchw", perm=[0, 3, 1, 2])
        x = self.node("Transpose", [self.image(layer, x, name, freqs, 0, relu=relu)], f"{name}_back", perm=[0, 2, 3, 1])
        return self.node("Reshape", [x, self.ints(frames_out * freqs_out, c.c_out)], f"{name}_rows"), frames_out, freqs_out


def _weights(layer: CausalConv) -> tuple[np.ndarray, np.ndarray]:
    """As the graphs have them, time before frequency: (out, in / groups, kt, kf), and the bias (out,)."""
    weight, bias = (t.detach().numpy() for t in layer.folded())
    return weight.transpose(0, 1, 3, 2), bias


def _taps(network: Network, dct: np.ndarray) -> tuple[np.ndarray, int]:
    """The cosines (40, 10) laid out so that the product holds, for each output of the first layer, its own taps: (40, F · taps), and F."""
    first = network.layers[0]
    assert isinstance(first, CausalConv) and first.spec.c_in == 1
    padded = np.pad(dct, ((0, 0), first.freq_pad(dct.shape[1])))
    starts = range(0, padded.shape[1] - first.spec.kernel_f + 1, first.spec.stride_f)
    return np.concatenate([padded[:, f : f + first.spec.kernel_f] for f in starts], 1), len(starts)


def to_onnx(network: Network, window_hops: int | None = None) -> tuple[bytes, list[State]]:
    """The streaming graph of one hop, frames (1, 4, 40) and states → embedding (1, dim) and states; and what the states are.

    With `window_hops`, at least the spec's `window_steps`: the same network over a whole window (1, 4 · window_hops, 40) that zeros
    come before, without states. This is what sliding a window computes again and again; the listener never does, benchmarks/ do.
    """
    from onnx import TensorProto, checker, helper

    w = _Writer(streaming=window_hops is None)
    spec, hops = network.spec, window_hops or 1
    frames, freqs = HOP_FRAMES * hops, 1
    mel = spec["input"] == "mel"
    if mel and w.streaming:
        x = w.node("Reshape", ["frames", w.ints(frames, N_MELS)], "rows")  # (T, 40)
    elif mel:
        x = w.node("Transpose", ["frames"], "bins", perm=[0, 2, 1])
        x = w.node("Reshape", [x, w.ints(1, N_MELS, frames, 1)], "image")
    else:
        dct, freqs = network.dct.numpy(), network.dct.shape[1]
        if w.streaming:
            dct, freqs = _taps(network, dct)
        x = w.node("MatMul", ["frames", w.constant("dct", dct)], "cepstra")  # (1, T, 10), or (1, T, F · taps)
        if w.streaming:
            x = w.node("Reshape", [x, w.ints(frames * freqs, dct.shape[1] // freqs)], "rows")
        else:
            x = w.node("Reshape", [x, w.ints(1, 1, frames, freqs)], "image")
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Residual):
            y = x
            for j, inner in enumerate(layer.inner):
                assert isinstance(inner, CausalConv)
                last = {"relu": True, "shortcut": x} if j == len(layer.inner) - 1 else {"relu": inner.spec.relu}
                y, frames, freqs = w.conv(inner, y, f"layer_{i}_{j}", frames, freqs, **last)
            x = y
        else:
            assert isinstance(layer, CausalConv)
            taps = i == 0 and w.streaming and not mel
            x, frames, freqs = w.conv(layer, x, f"layer_{i}", frames, freqs, relu=layer.spec.relu, taps=taps)
    channels = network.head.in_features
    if not w.streaming:
        x = w.node("Transpose", [x], "hops", perm=[0, 2, 3, 1])
        parts = [frames * freqs // hops] if frames * freqs > hops else []
        x = w.node("Reshape", [x, w.ints(hops, *parts, channels)], "hop_rows")
    if frames * freqs > 1 and w.streaming:  # as a product: 3 % of a hop of DS-CNN-L less than as ReduceMean
        shares = np.full((1, frames * freqs), 1 / (frames * freqs), np.float32)
        x = w.node("MatMul", [w.constant("shares", shares), x], "pooled")  # (1, C)
    elif frames * freqs > hops:
        x = w.node("ReduceMean", [x], "pooled", axes=[1], keepdims=0)  # (hops, C)
    head = w.constant("head.weight", network.head.weight.detach().numpy())
    x = w.node("Gemm", [x, head, w.constant("head.bias", network.head.bias.detach().numpy())], "step", transB=1)  # (hops, step_dim)
    length, segments, step_dim = spec["window_steps"], spec["segments"], spec["step_dim"]
    if not w.streaming:
        x = w.node("Slice", [x, w.ints(hops - length), w.ints(hops), w.ints(0)], "last_steps")
    elif length > 1:
        x = w.remember(x, length - 1, 1, step_dim, flat=True)  # (1, window_steps · step_dim)
    if segments != length:
        x = w.node("Reshape", [x, w.ints(segments, length // segments, step_dim)], "window_parts")
        x = w.node("ReduceMean", [x], "window_means", axes=[1], keepdims=0)
    if segments != length or not w.streaming:
        x = w.node("Reshape", [x, w.ints(1, segments * step_dim)], "window")
    w.node("LpNormalization", [x], "embedding", axis=1, p=2)

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    for node in w.nodes:
        for names in (node.input, node.output):
            names[:] = [w.renamed.get(name, name) for name in names]
    inputs = [tensor("frames", (1, HOP_FRAMES * hops, N_MELS)), *(tensor(n, s.shape) for s in w.states for n in s.tensors[1:])]
    outputs = [tensor("embedding", (1, network.dim)), *(tensor(s.tensors[0], s.shape) for s in w.states)]
    graph = helper.make_graph(w.nodes, "edgekws", inputs, outputs, list(w.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="edgekws")
    checker.check_model(model)
    return model.SerializeToString(), w.states


def save_model(network: Network, path: Path, *, id: str, name: str, golden_frames: np.ndarray, facts: Mapping[str, Any]) -> Model:
    """Write a whole model directory; it appears under its name only when complete.

    Args:
        golden_frames: float32, shape (n, 4, 40): frames that every engine must reproduce.
        facts: what the manifest says beside the contract: data, recipe, seeds, metrics, trained_on_sha256.

    Raises:
        ModelError: `path` is there already.
    """
    if path.exists():
        raise ModelError(f"{path}: already there, and a model version never changes. Give another directory or remove it")
    network = network.eval()
    graph, states = to_onnx(network)
    with torch.no_grad():
        now, embeddings = network.initial_states(), []
        for hop in golden_frames[:PARITY_HOPS]:
            embedding, now = network.step(torch.from_numpy(hop[None]), now)
            embeddings.append(embedding[0, 0].numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        new = Path(folder) / "model"
        new.mkdir()
        (new / "model.onnx").write_bytes(graph)
        np.savez_compressed(new / "parity.npz", frames=golden_frames[:PARITY_HOPS], embeddings=np.stack(embeddings))
        write_manifest(
            new,
            {
                "id": id,
                "network": name,
                "spec": network.spec,
                "dim": network.dim,
                "states": states,
                "parameters": network.parameter_count(),
                "macs_per_s": network.macs_per_s(),
                "receptive_field_ms": network.receptive_field_ms(),
                **facts,
            },
        )
        new.rename(path)
    return load_model(path)


def load_network(model: Model) -> Network:
    """The PyTorch network of a model directory, its weights read from model.onnx: no pickle, no second copy on disk.

    Batch norm is folded already; that is the same network as one with frozen statistics.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model.path / "model.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    network = Network(model.raw["spec"], norm=False)
    with torch.no_grad():
        for i, layer in enumerate(network.layers):
            named = (
                [(f"layer_{i}_{j}", inner) for j, inner in enumerate(layer.inner)]
                if isinstance(layer, Residual)
                else [(f"layer_{i}", layer)]
            )
            for name, conv in named:
                assert isinstance(conv, CausalConv) and conv.conv.bias is not None
                weight = weights[f"{name}.weight"]
                if weight.ndim == 2:  # written as a matrix: (out, kt · in), or (out, kt · kf) where one channel comes in
                    out, of, kf, kt = conv.conv.weight.shape
                    weight = weight.reshape(out, kt, kf, of).transpose(0, 3, 1, 2)
                conv.conv.weight.copy_(torch.from_numpy(weight.copy()).transpose(2, 3))
                conv.conv.bias.copy_(torch.from_numpy(weights[f"{name}.bias"].copy()))
        network.head.weight.copy_(torch.from_numpy(weights["head.weight"].copy()))
        network.head.bias.copy_(torch.from_numpy(weights["head.bias"].copy()))
    return network.eval()
