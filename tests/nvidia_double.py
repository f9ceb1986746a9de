"""A double of TensorRT and of the CUDA runtime, for the faults that no machine without a GPU can provoke.

It has the names that edgekws uses and no others: tests/test_tensorrt.py looks each one up in NVIDIA's own bindings. What it does is as
strict as the real ones are: work on a stream happens at its synchronisation and not before; device memory begins as rubbish and cannot be
touched by the host; while a stream is captured its work is recorded instead of done, and neither allocating nor synchronising nor the
first run of a context is allowed; a plan is taken only by the version and GPU that built it; networks are computed, by ONNX Runtime.
"""

import ctypes
import enum
import json
import threading

import numpy as np
import onnxruntime as ort


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class _Properties:
    name, major, minor = b"Orin (double)", 8, 7


class _Handle:
    """A stream or a graph: a number to those that ask."""

    def __init__(self, number):
        self.number, self.queue, self.captured, self.thread = number, [], None, 0

    def __int__(self):
        return self.number


class Cudart:
    """Stands in for the module cuda.bindings.runtime. `fail` maps a function's name to (error, at which call)."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode

    def __init__(self):
        self.fail, self.calls = {}, []
        self._memory, self._handles = {}, {}

    def alive(self):
        """How many allocations, streams and graphs were not given back."""
        return len(self._memory) + len(self._handles)

    def _called(self, name):
        self.calls.append(name)
        error, at = self.fail.get(name, (None, 0))
        if error and self.calls.count(name) >= at:
            return error
        capturing = any(one.captured is not None and one.thread == threading.get_ident() for one in list(self._handles.values()))
        if capturing and name in ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaStreamSynchronize"):
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        return cudaError_t.cudaSuccess

    def _new(self):
        handle = _Handle(1 + max(list(self._handles), default=0))
        self._handles[handle.number] = handle
        return handle

    def enqueue(self, stream, work):
        stream = self._handles[int(stream)]
        (stream.queue if stream.captured is None else stream.captured).append(work)

    def capturing(self, stream):
        return self._handles[int(stream)].captured is not None

    def floats(self, address, count, side):
        """The memory behind an address, as the side that owns it sees it."""
        start = max((one for one in list(self._memory) if one <= address), default=0)
        owner, buffer = self._memory.get(start, ("", b""))
        fits = owner == side and address - start + count * 4 <= len(buffer)
        assert fits, f"{address:#x} is no {side} memory of {count} floats"
        return np.frombuffer(buffer, np.float32, count, address - start)

    def _allocate(self, name, size, side):
        if (code := self._called(name)) != 0:
            return code, None
        buffer = ctypes.create_string_buffer(b"\xa5" * size, size)
        self._memory[ctypes.addressof(buffer)] = (side, buffer)
        return code, ctypes.addressof(buffer)

    def cudaGetDeviceCount(self):
        code = self._called("cudaGetDeviceCount")
        return code, 1 if code == 0 else None

    def cudaGetDeviceProperties(self, device):
        return self._called("cudaGetDeviceProperties"), _Properties()

    def cudaGetErrorString(self, error):
        return cudaError_t.cudaSuccess, {2: b"out of memory", 35: b"CUDA driver version is insufficient"}.get(
            int(error), error.name.encode()
        )

    def cudaMalloc(self, size):
        return self._allocate("cudaMalloc", size, "device")

    def cudaMallocHost(self, size):
        return self._allocate("cudaMallocHost", size, "host")

    def _free(self, name, address, side):
        assert self._memory[address][0] == side
        if (code := self._called(name)) == 0:
            del self._memory[address]
        return (code,)

    def cudaFree(self, address):
        return self._free("cudaFree", address, "device")

    def cudaFreeHost(self, address):
        return self._free("cudaFreeHost", address, "host")

    def cudaMemsetAsync(self, address, value, size, stream):
        if (code := self._called("cudaMemsetAsync")) == 0:
            target = self.floats(address, size // 4, "device").view(np.uint8)
            self.enqueue(stream, lambda: target.fill(value))
        return (code,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        if (code := self._called("cudaMemcpyAsync")) == 0:
            sides = ("device", "host") if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else ("host", "device")
            into, out_of = (self.floats(one, size // 4, side) for one, side in zip((target, source), sides, strict=True))
            self.enqueue(stream, lambda: np.copyto(into, out_of))
        return (code,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1, "only a non-blocking stream can be captured beside others"
        code = self._called("cudaStreamCreateWithFlags")
        return code, self._new() if code == 0 else None

    def cudaStreamSynchronize(self, stream):
        code = self._called("cudaStreamSynchronize")
        if code == 0:
            for work in stream.queue:
                work()
            stream.queue.clear()
        return (code,)

    def cudaStreamDestroy(self, stream):
        del self._handles[int(stream)]
        return (self._called("cudaStreamDestroy"),)

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        stream.captured, stream.thread = [], threading.get_ident()
        return (self._called("cudaStreamBeginCapture"),)

    def cudaStreamEndCapture(self, stream):
        captured, stream.captured = stream.captured, None
        if (code := self._called("cudaStreamEndCapture")) != 0:
            return code, None
        graph = self._new()
        graph.queue = captured
        return code, graph

    def cudaGraphInstantiate(self, graph, flags):
        made = self._new()
        made.queue = list(graph.queue)
        return self._called("cudaGraphInstantiate"), made

    def cudaGraphDestroy(self, graph):
        del self._handles[int(graph)]
        return (self._called("cudaGraphDestroy"),)

    def cudaGraphExecDestroy(self, graph):
        del self._handles[int(graph)]
        return (self._called("cudaGraphExecDestroy"),)

    def cudaGraphLaunch(self, graph, stream):
        if (code := self._called("cudaGraphLaunch")) == 0:
            for work in graph.queue:
                self.enqueue(stream, work)
        return (code,)


class _Severity(enum.IntEnum):
    ERROR = 1
    WARNING = 2


class _Logger:
    Severity = _Severity

    def __init__(self):
        pass


class _Memory(bytes):
    """IHostMemory: bytes to those that copy it."""


class Trt:
    """Stands in for the module tensorrt of one version on one GPU. `builds` counts plans made from a graph."""

    ILogger = _Logger

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class MemoryPoolType(enum.IntEnum):
        WORKSPACE = 0

    class BuilderFlag(enum.IntEnum):
        REFIT = 4

    def __init__(self, cudart, version="10.3.0", refuses=()):
        self.__version__, self.builds = version, 0
        outer = self

        class Context:
            def __init__(self, engine):
                self._engine, self._addresses, self._ran = engine, {}, False

            def set_tensor_address(self, name, address):
                self._addresses[name] = address
                return name in self._engine._names

            def execute_async_v3(self, stream):
                missing = set(self._engine._names) - set(self._addresses)
                if missing or (cudart.capturing(stream) and not self._ran):
                    return False
                self._ran = True
                at = dict(self._addresses)
                cudart.enqueue(stream, lambda: self._engine._compute(at))
                return True

        class Engine:
            def __init__(self, head, onnx, log):
                self._head, self._log = head, log
                self._set(onnx)

            def _set(self, onnx):
                self._onnx = onnx
                self._session = ort.InferenceSession(onnx, providers=["CPUExecutionProvider"])
                self._inputs, self._outputs = self._session.get_inputs(), self._session.get_outputs()
                self._names = [one.name for one in (*self._inputs, *self._outputs)]

            def serialize(self):
                return _Memory(self._head + b"\n" + self._onnx)

            def _compute(self, at):
                def seen(one):
                    return cudart.floats(at[one.name], int(np.prod(one.shape)), "device").reshape(one.shape)

                found = self._session.run(None, {one.name: seen(one).copy() for one in self._inputs})
                for one, value in zip(self._outputs, found, strict=True):
                    np.copyto(seen(one), value)

            @property
            def num_io_tensors(self):
                return len(self._names)

            def get_tensor_name(self, index):
                return self._names[index]

            def get_tensor_shape(self, name):
                return next(tuple(one.shape) for one in (*self._inputs, *self._outputs) if one.name == name)

            def create_execution_context(self):
                if "context" in refuses:
                    self._log.log(_Severity.ERROR, "IExecutionContext: out of memory")
                    return None
                return Context(self)

        def made(kind):
            if kind in refuses:  # as pybind11 tells that the library gave no object
                raise TypeError("pybind11::init(): factory function returned nullptr")

        class Runtime:
            def __init__(self, log):
                self._log = log
                made("Runtime")

            def deserialize_cuda_engine(self, plan):
                head, onnx = plan.split(b"\n", 1)
                if json.loads(head)["version"] != outer.__version__ or "plan" in refuses:
                    self._log.log(_Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Version tag does not match")
                    return None
                return Engine(head, onnx, self._log)

        class Refitter:
            def __init__(self, engine, log):
                assert json.loads(engine._head)["refit"], "only a plan that was built for it can be refitted"
                self._engine, self._onnx = engine, None

            def get_missing_weights(self):
                return ["a bias"] if "all weights" in refuses else []

            def refit_cuda_engine(self):
                if "numerics" not in refuses:  # as NVIDIA's notes have it: it says that it did
                    self._engine._set(self._onnx)
                return True

        class OnnxParserRefitter:
            def __init__(self, refitter, log):
                self._refitter, self._log = refitter, log

            def refit_from_bytes(self, onnx):
                if "weights" in refuses:
                    self._log.log(_Severity.ERROR, "Weights of other shapes")
                    return False
                self._refitter._onnx = onnx
                return True

        class TimingCache:
            def __init__(self, data):
                self._data = data

            def serialize(self):
                return _Memory(self._data or b"timings")

        class Config:
            refit = False

            def set_flag(self, flag):
                self.refit = flag == Trt.BuilderFlag.REFIT

            def set_memory_pool_limit(self, pool, size):
                assert pool == Trt.MemoryPoolType.WORKSPACE and size > 0

            def create_timing_cache(self, data):
                return None if data and "timing" in refuses else TimingCache(data)

            def set_timing_cache(self, cache, ignore_mismatch):
                return not ignore_mismatch

        class Network:
            onnx = b""

        class ParserError:
            def __init__(self, text):
                self._text = text

            def desc(self):
                return self._text

        class OnnxParser:
            def __init__(self, network, log):
                self._network, self._errors = network, []
                made("OnnxParser")

            def parse(self, onnx):
                self._network.onnx = onnx
                if "graph" in refuses:
                    self._errors = [ParserError("No importer registered for op: StringNormalizer"), ParserError("second")]
                return not self._errors

            @property
            def num_errors(self):
                return len(self._errors)

            def get_error(self, index):
                return self._errors[index]

        class Builder:
            def __init__(self, log):
                self._log = log
                if "Builder" in refuses:
                    log.log(_Severity.ERROR, "CUDA initialization failure with error: 2")
                made("Builder")

            def create_network(self, flags):
                assert flags == 1 << Trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
                return Network()

            def create_builder_config(self):
                return Config()

            def build_serialized_network(self, network, config):
                if "build" in refuses:
                    self._log.log(_Severity.ERROR, "Error Code 10: Could not find any implementation for node")
                    return None
                outer.builds += 1
                return _Memory(json.dumps({"version": outer.__version__, "refit": config.refit}).encode() + b"\n" + network.onnx)

        self.Builder, self.OnnxParser, self.Runtime = Builder, OnnxParser, Runtime
        self.Refitter, self.OnnxParserRefitter = Refitter, OnnxParserRefitter
        # By the names that the real bindings have, for the test that compares them.
        self.classes = {
            "Builder": Builder,
            "BuilderFlag": Trt.BuilderFlag,
            "IBuilderConfig": Config,
            "ICudaEngine": Engine,
            "IExecutionContext": Context,
            "ILogger": _Logger,
            "ILogger.Severity": _Severity,
            "INetworkDefinition": Network,
            "ITimingCache": TimingCache,
            "MemoryPoolType": Trt.MemoryPoolType,
            "NetworkDefinitionCreationFlag": Trt.NetworkDefinitionCreationFlag,
            "OnnxParser": OnnxParser,
            "OnnxParserRefitter": OnnxParserRefitter,
            "ParserError": ParserError,
            "Refitter": Refitter,
            "Runtime": Runtime,
        }
