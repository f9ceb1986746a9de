"""ONNX Runtime on the GPU, where onnxruntime-gpu is installed instead of onnxruntime: see onnxruntime_engine."""

from __future__ import annotations

from edgekws.engines.onnxruntime_engine import OnnxRuntimeCudaEngine, why_no_cuda
from edgekws.model import Model


def why_unavailable() -> str | None:
    """None if this ONNX Runtime was built with CUDA; whether there is a GPU shows when a model is loaded."""
    return why_no_cuda()


def load(model: Model) -> OnnxRuntimeCudaEngine:
    """Raises EngineUnavailable when there is no GPU, or ONNX Runtime cannot compute the graph on it."""
    return OnnxRuntimeCudaEngine(model)
