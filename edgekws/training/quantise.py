"""model.onnx → float16 for GPUs, or INT8 by QuantizeLinear and DequantizeLinear: signed, symmetric, weights per output channel.

Both keep the graph's inputs and outputs, states included, in float32: a stream may go on from one precision in another, and the copies
cost nothing beside a launch. Both are the graph itself, so the strongly typed networks of every TensorRT from 10.3 on take them.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.engines import onnxruntime_engine
from edgekws.errors import ModelError
from edgekws.frontend import louder
from edgekws.model import Model, State, golden, load_model, write_manifest

CALIBRATION_HOPS = 1000  # at most: 80 s of audio, heard as they are and louder
LOUDER_DB = 24.0


def half(model_onnx: Path, out: Path) -> Path:
    """Weights and arithmetic in float16, half the bytes. The unit norm at the end is in float32: its sum of squares overflows float16."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(model_onnx)
    whole = model.graph
    for tensor in whole.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    outputs = {value.name for value in whole.output}
    casts = {value.name: f"{value.name}_half" for value in whole.input}
    nodes = [helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT16) for name, cast in casts.items()]
    for node in whole.node:
        node.input[:] = [casts.get(name, name) for name in node.input]
        if node.op_type == "LpNormalization":
            nodes.append(helper.make_node("Cast", [node.input[0]], [f"{node.input[0]}_single"], to=TensorProto.FLOAT))
            node.input[0] += "_single"
            nodes.append(node)
            continue
        after = [name for name in node.output if name in outputs]
        node.output[:] = [f"{name}_half" if name in outputs else name for name in node.output]
        nodes += [node, *(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT) for name in after)]
        casts |= {name: f"{name}_half" for name in after}
    del whole.node[:]
    whole.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, out)
    return out


def quantise(model_onnx: Path, states: Sequence[State], frames: np.ndarray, out: Path) -> Path:
    """Products of matrices and dense convolutions in INT8; the rest, with few of the weights, stays float32.

    Args:
        frames: float32, shape (n, 4, 40): a stream to calibrate the activations on, of which the first `CALIBRATION_HOPS` count, and the
            same `LOUDER_DB` louder. What is louder than all of that is cut off. Median and lowest hundredth of the cosine with float32
            under helicopters at full scale, calibrated on quiet speech alone, with 12 and with 24 dB: `edge` 0.84 (0.49), 0.97 (0.89),
            0.97 (0.91); DS-CNN-L 0.89 (0.65), 0.93 (0.72), 0.97 (0.92). Speech at -30 dBFS has 0.997 to 0.999 with any.

    Raises:
        ModelError: there is nothing to calibrate on.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not len(frames):
        raise ModelError("INT8 needs at least one hop of audio to calibrate on")
    heard = frames[:CALIBRATION_HOPS]
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        model, nodes = _biases_apart(onnx.load(model_onnx))
        onnx.save(model, plain)
        quantize_static(
            plain,
            out,
            _Stream(plain, states, np.concatenate([heard, louder(heard, LOUDER_DB)])),
            quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod.MinMax,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            reduce_range=_overflows(),
            nodes_to_quantize=nodes,
            # A product's result stays float32; a convolution's does not, since ONNX Runtime's INT8 kernel for it has no other.
            extra_options={"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    return out


def _overflows(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether INT8 weights may have 7 bits only: x86-64 without VNNI adds two products in 16 bits, and cuts off what does not fit.

    With 8 bits embeddings are like those in float32 by 0.89 (AMD Zen 3, edge-tiny), on a processor with VNNI by 0.999.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "_vnni" not in cpuinfo.read_text()
    except OSError:
        return True


def version(model: Model, path: Path, *, id: str, precision: str, frames: np.ndarray | None = None) -> Model:
    """A copy of a model version that is deployed as "fp16" (on GPUs; a CPU takes model.onnx all the same) or "int8" (everywhere).

    The golden embeddings of an INT8 version are its own. Prototypes are those of the original: make them again where the last digit counts.

    Args:
        frames: for int8, as `quantise`.

    Raises:
        ModelError: `path` is there already, or there is nothing to calibrate on.
    """
    if path.exists():
        raise ModelError(f"{path}: already there, and a model version never changes. Give another directory or remove it")
    facts = {key: value for key, value in model.raw.items() if key not in ("files", "precision")} | {"id": id}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        new = Path(folder) / "model"
        new.mkdir()
        for name in model.raw["files"]:
            shutil.copyfile(model.path / name, new / name)
        if precision == "fp16":
            half(new / "model.onnx", new / "model_fp16.onnx")
        else:
            facts["precision"] = "int8"
            heard = np.zeros((0, 4, 40), np.float32) if frames is None else frames
            quantise(new / "model.onnx", model.states, heard, new / "model_int8.onnx")
            write_manifest(new, facts)
            hops, _ = golden(model)
            engine = onnxruntime_engine.load(load_model(new))
            np.savez_compressed(new / "parity.npz", frames=hops, embeddings=engine.steps(hops))
            engine.close()
        write_manifest(new, facts)
        new.rename(path)
    return load_model(path)


def _biases_apart(model: Any) -> tuple[Any, list[str]]:
    """Gemm → MatMul and Add, dense Conv → Conv and Add; and the names of what is to be quantised.

    TensorRT takes no INT32 bias, and ONNX Runtime has an INT8 kernel for Gemm and Conv with that bias only, but one for each without a
    bias. The Identity keeps the quantisation to the product alone, where the next state is cut out of the same tensor.
    """
    from onnx import helper, numpy_helper

    whole = model.graph
    tensors = {tensor.name: tensor for tensor in whole.initializer}
    nodes, chosen = [], []
    for node in whole.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type != "Gemm" and not (node.op_type == "Conv" and attributes["group"] == 1):
            nodes.append(node)
            continue
        x, weight, bias = node.input
        result = node.output[0]
        alone, product = f"{result}_input", f"{result}_product"
        nodes.append(helper.make_node("Identity", [x], [alone]))
        if node.op_type == "Gemm":
            matrix = np.ascontiguousarray(numpy_helper.to_array(tensors[weight]).T)
            tensors[weight].CopyFrom(numpy_helper.from_array(matrix, weight))
            nodes.append(helper.make_node("MatMul", [alone, weight], [product], name=product))
        else:
            image = numpy_helper.to_array(tensors[bias]).reshape(1, -1, 1, 1)
            tensors[bias].CopyFrom(numpy_helper.from_array(image, bias))
            nodes.append(helper.make_node("Conv", [alone, weight], [product], name=product, **attributes))
        nodes.append(helper.make_node("Add", [product, bias], [result]))
        chosen.append(product)
    del whole.node[:]
    whole.node.extend(nodes)
    # What onnxruntime's own pre-processing leaves: without it the root logger is asked to complain.
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    return model, chosen


def moved_on(states: Sequence[State], held: Mapping[str, np.ndarray], left: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's state inputs one hop after they were `held`, when it `left` an output for each state."""
    return {
        name: value
        for state, newest in zip(states, left, strict=True)
        for name, value in zip(state.tensors[1:], [newest, *(held[one] for one in state.tensors[1:-1])], strict=True)
    }


class _Stream:
    """What the calibration reads: hop after hop with the states that the network has by then."""

    def __init__(self, model_onnx: Path, states: Sequence[State], frames: np.ndarray) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(str(model_onnx), providers=["CPUExecutionProvider"])
        self._states = states
        self._held = {name: np.zeros(state.shape, np.float32) for state in states for name in state.tensors[1:]}
        self._hops = iter(frames)

    def get_next(self) -> dict[str, np.ndarray] | None:
        hop = next(self._hops, None)
        if hop is None:
            return None
        feed = {"frames": np.asarray(hop[None], np.float32), **self._held}
        left = self._session.run([state.tensors[0] for state in self._states], feed)
        self._held = moved_on(self._states, self._held, left)
        return feed
