"""ONNX Runtime: one thread, states in buffers that are bound once and taken in turn; on the CPU, or on a GPU with onnxruntime-gpu."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from edgekws.engines import Engine
from edgekws.errors import EngineUnavailable, ModelError
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import Model, damage_told, graph, turns

CUDA = "CUDAExecutionProvider"


def why_unavailable() -> str | None:
    """None if onnxruntime can be imported here."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package is not installed (pip install onnxruntime)"
    return None


def load(model: Model) -> OnnxRuntimeEngine:
    """Raises ModelError when ONNX Runtime refuses the graph."""
    return OnnxRuntimeEngine(model)


def why_no_cuda() -> str | None:
    """None if this ONNX Runtime was built with CUDA."""
    reason = why_unavailable()
    if reason is None:
        import onnxruntime as ort

        if CUDA not in ort.get_available_providers():
            return f"onnxruntime {ort.__version__} is built without CUDA (pip uninstall onnxruntime, then pip install onnxruntime-gpu)"
    return reason


class OnnxRuntimeEngine(Engine):
    """Some bound steps that are taken in turn, so that no state is ever copied."""

    name = "onnxruntime"

    def __init__(self, model: Model) -> None:
        self._load(model, "CPUExecutionProvider", "cpu")

    def _load(self, model: Model, provider: str, device: str) -> None:
        import onnxruntime as ort

        path, self.precision = graph(model, gpu=device != "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The arena keeps whole megabytes for tensors of some kilobytes.
        options.enable_cpu_mem_arena = False
        # Its Gemm with a float bias is none of the INT8 kernels, MatMul and Add are: 66 µs instead of 147 for a step of edge.
        without = ["MatMulAddFusion", "ConvAddFusion"] if self.precision == "int8" else None
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[provider], disabled_optimizers=without)
        except Exception as error:  # onnxruntime's own classes derive from RuntimeError, ValueError and Exception by turns
            raise ModelError(f"{path}: ONNX Runtime refuses it: {error}") from error
        if self._session.get_providers()[0] != provider:
            raise EngineUnavailable(f"ONNX Runtime could not start {provider} and offers {', '.join(self._session.get_providers())}")
        # No hash protects the manifest: names or shapes that the graph does not have. On a GPU memory may run out as well.
        with damage_told(model.path / "manifest.json") if device == "cpu" else nullcontext():
            self._bind(model, device)

    def _bind(self, model: Model, device: str) -> None:
        import onnxruntime as ort

        self.dim = model.dim
        self._frames = np.zeros((1, HOP_FRAMES, N_MELS), np.float32)
        self._embedding = np.zeros((1, model.dim), np.float32)
        self._states = [[np.zeros(state.shape, np.float32) for _ in range(state.hops + 1)] for state in model.states]
        # On the CPU a value shares the array's memory.
        frames, embedding = (ort.OrtValue.ortvalue_from_numpy(array, device) for array in (self._frames, self._embedding))
        values = [[ort.OrtValue.ortvalue_from_numpy(buffer, device) for buffer in buffers] for buffers in self._states]
        self._values = (frames, embedding, values)
        self._bindings = []
        outputs = {state.tensors[0] for state in model.states}
        for turn in turns(model.states):
            binding = self._session.io_binding()
            binding.bind_ortvalue_input("frames", frames)
            binding.bind_ortvalue_output("embedding", embedding)
            for name, (state, buffer) in turn.items():
                bind = binding.bind_ortvalue_output if name in outputs else binding.bind_ortvalue_input
                bind(name, values[state][buffer])
            # The bare C object: its Python wrapper costs 2 of the 20 µs of a small network's step.
            self._bindings.append(binding._iobinding)
        self._run = self._session._sess.run_with_iobinding
        self._options = ort.RunOptions()  # made anew at each step where none is given: 0.7 µs
        self._turn = 0

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → unit embedding, float32 (dim,)."""
        self._frames[0] = frames
        self._run(self._bindings[self._turn], self._options)
        self._turn = (self._turn + 1) % len(self._bindings)
        return self._embedding[0].copy()

    def reset(self) -> None:
        """Zero states: a new stream."""
        for buffers in self._states:
            for buffer in buffers:
                buffer[:] = 0
        self._turn = 0

    def close(self) -> None:
        """Give the session back."""
        self._bindings.clear()
        del self._session, self._run


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """The same with its buffers on the GPU, where they stay; frames go there and embeddings come back at each step."""

    name = "onnxruntime-cuda"

    def __init__(self, model: Model) -> None:
        with _on_the_gpu():
            self._load(model, CUDA, "cuda")

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → unit embedding, float32 (dim,).

        Raises:
            EngineUnavailable: CUDA failed.
        """
        with _on_the_gpu():
            self._values[0].update_inplace(np.ascontiguousarray(frames[None], np.float32))
            self._run(self._bindings[self._turn], self._options)
            self._turn = (self._turn + 1) % len(self._bindings)
            return np.array(self._values[1].numpy()[0])

    def reset(self) -> None:
        """Zero states: a new stream. Raises EngineUnavailable when CUDA failed."""
        with _on_the_gpu():
            for buffers, values in zip(self._states, self._values[2], strict=True):
                for zeros, value in zip(buffers, values, strict=True):
                    value.update_inplace(zeros)
        self._turn = 0


@contextmanager
def _on_the_gpu() -> Iterator[None]:
    """Whatever fails there, out of memory or a fault, the processor can do instead."""
    try:
        yield
    except EngineUnavailable:
        raise
    except Exception as error:  # onnxruntime's own classes, as above
        raise EngineUnavailable(f"ONNX Runtime failed on the GPU: {error}") from error
