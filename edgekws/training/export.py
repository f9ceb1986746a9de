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
from edgekws.model import Model, load_model, write_manifest
from edgekws.training.networks import CausalConv, Network, Residual

OPSET = 17
PARITY_HOPS = 24


class _Writer:
    """Collects nodes and constants. Data lies in rows (frames · freqs, C), frame after frame.

    So rings are joined and cut in whole rows, and a layer that is a matrix product is written as one. One hop on one x86 core, beside
    convolutions over (1, C, T, F) with ONNX Runtime's reordering between them: DS-CNN-L 60 µs instead of 76, edge 36 instead of 46.
    """

    def __init__(self, *, streaming: bool) -> None:
        from onnx import helper, numpy_helper

        self.streaming = streaming
        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.states: list[tuple[str, tuple[int, ...]]] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = self._numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("_".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self._helper.make_node(op, inputs, [output], **attributes))
        return output

    def remember(self, x: str, past: int, new: int, channels: int) -> str:
        """A state of `past` rows before the `new` rows of x; the last `past` of them all become the next state."""
        name = f"state_{len(self.states)}"
        self.states.append((name, (past, channels)))
        joined = self.node("Concat", [name, x], f"{name}_joined", axis=0)
        self.node("Slice", [joined, self.ints(new), self.ints(past + new), self.ints(0)], f"{name}_next")
        return joined

    def conv(self, layer: CausalConv, x: str, name: str, frames: int, freqs: int, *, relu: bool) -> tuple[str, int, int]:
        """Rows of `frames` and `freqs` → the output's rows, and how many frames and freqs they are."""
        c = layer.spec
        past = layer.ring  # frames of zeros before the first, where no state holds the real ones
        if past and self.streaming:
            x = self.remember(x, past * freqs, frames * freqs, c.c_in)
            frames_in, past = past + frames, 0
        else:
            frames_in = frames
        frames_out, freqs_out = frames // c.stride_t, -(-freqs // c.stride_f)
        weight, bias = (t.detach().numpy() for t in layer.folded())  # (out, in / groups, kt, kf)
        bias_name = self.constant(f"{name}.bias", bias)
        pointwise = c.kernel_t * c.kernel_f * c.stride_t * c.stride_f * c.groups == 1
        if pointwise or (self.streaming and freqs == c.kernel_f == c.groups == 1):
            weight = weight[..., 0].transpose(0, 2, 1).reshape(c.c_out, -1)  # (out, kt · in)
            if frames_out > 1 and not pointwise:  # each output's own rows
                rows = np.arange(frames_out)[:, None] * c.stride_t + np.arange(c.kernel_t)
                x = self.node("Gather", [x, self.constant(f"{name}.rows", rows)], f"{name}_taken", axis=0)  # (T', kt, in)
            if not pointwise:
                x = self.node("Reshape", [x, self.ints(frames_out, c.kernel_t * c.c_in)], f"{name}_flat")
            x = self.node("Gemm", [x, self.constant(f"{name}.weight", weight), bias_name], name, transB=1)
            return self.node("Relu", [x], f"{name}_relu") if relu else x, frames_out, freqs_out
        low, high = layer.freq_pad(freqs)
        x = self.node("Reshape", [x, self.ints(1, frames_in, freqs, c.c_in)], f"{name}_image")
        x = self.node("Transpose", [x], f"{name}_nchw", perm=[0, 3, 1, 2])  # (1, C, T, F)
        x = self.node(
            "Conv",
            [x, self.constant(f"{name}.weight", weight), bias_name],
            name,
            pads=[past, low, 0, high],
            strides=[c.stride_t, c.stride_f],
            group=c.groups,
        )
        if relu:
            x = self.node("Relu", [x], f"{name}_relu")
        x = self.node("Transpose", [x], f"{name}_nhwc", perm=[0, 2, 3, 1])
        return self.node("Reshape", [x, self.ints(frames_out * freqs_out, c.c_out)], f"{name}_rows"), frames_out, freqs_out


def to_onnx(network: Network, window_hops: int | None = None) -> tuple[bytes, list[tuple[str, tuple[int, ...]]]]:
    """The streaming graph of one hop, frames (1, 4, 40) and states → embedding (1, dim) and states; and the states' names and shapes.

    With `window_hops`, at least the spec's `window_steps`: the same network over a whole window (1, 4 · window_hops, 40) that zeros
    come before, without states. This is what sliding a window computes again and again; the listener never does, benchmarks/ do.
    """
    from onnx import TensorProto, checker, helper

    w = _Writer(streaming=window_hops is None)
    spec, hops = network.spec, window_hops or 1
    frames, freqs = HOP_FRAMES * hops, 1
    if spec["input"] == "mel":
        x = w.node("Reshape", ["frames", w.ints(frames, N_MELS)], "rows")  # (T, 40)
    else:
        freqs = network.dct.shape[1]
        x = w.node("MatMul", ["frames", w.constant("dct", network.dct.numpy())], "cepstra")  # (1, T, 10)
        x = w.node("Reshape", [x, w.ints(frames * freqs, 1)], "rows")  # (10 T, 1)
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Residual):
            y = x
            for j, inner in enumerate(layer.inner):
                assert isinstance(inner, CausalConv)
                y, frames, freqs = w.conv(inner, y, f"layer_{i}_{j}", frames, freqs, relu=inner.spec.relu)
            x = w.node("Relu", [w.node("Add", [y, x], f"layer_{i}_sum")], f"layer_{i}")
        else:
            assert isinstance(layer, CausalConv)
            x, frames, freqs = w.conv(layer, x, f"layer_{i}", frames, freqs, relu=layer.spec.relu)
    if frames * freqs > hops:
        x = w.node("Reshape", [x, w.ints(hops, frames * freqs // hops, network.head.in_features)], "hop_rows")
        x = w.node("ReduceMean", [x], "pooled", axes=[1], keepdims=0)  # (hops, C)
    head = w.constant("head.weight", network.head.weight.detach().numpy())
    x = w.node("Gemm", [x, head, w.constant("head.bias", network.head.bias.detach().numpy())], "step", transB=1)  # (hops, step_dim)
    length, segments, step_dim = spec["window_steps"], spec["segments"], spec["step_dim"]
    if not w.streaming:
        x = w.node("Slice", [x, w.ints(hops - length), w.ints(hops), w.ints(0)], "last_steps")
    elif length > 1:
        x = w.remember(x, length - 1, 1, step_dim)  # (window_steps, step_dim)
    if segments != length:
        x = w.node("Reshape", [x, w.ints(segments, length // segments, step_dim)], "window_parts")
        x = w.node("ReduceMean", [x], "window_means", axes=[1], keepdims=0)
    x = w.node("Reshape", [x, w.ints(1, segments * step_dim)], "window")
    norm = w.node("ReduceL2", [x], "norm", axes=[1], keepdims=1)
    norm = w.node("Max", [norm, w.constant("tiny", np.array(1e-6, np.float32))], "norm_floor")
    w.node("Div", [x, norm], "embedding")

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [tensor("frames", (1, HOP_FRAMES * hops, N_MELS)), *(tensor(n, s) for n, s in w.states)]
    outputs = [tensor("embedding", (1, network.dim)), *(tensor(f"{n}_next", s) for n, s in w.states)]
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
                "states": [[n, list(s)] for n, s in states],
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
                if weight.ndim == 2:  # written as a matrix (out, kt · in)
                    weight = weight.reshape(len(weight), conv.spec.kernel_t, -1).transpose(0, 2, 1)[..., None]
                conv.conv.weight.copy_(torch.from_numpy(weight.copy()))
                conv.conv.bias.copy_(torch.from_numpy(weights[f"{name}.bias"].copy()))
        network.head.weight.copy_(torch.from_numpy(weights["head.weight"].copy()))
        network.head.bias.copy_(torch.from_numpy(weights["head.bias"].copy()))
    return network.eval()
