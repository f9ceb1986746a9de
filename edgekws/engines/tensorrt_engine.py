"""TensorRT: the model's graph built into a plan on this very board; states stay on the GPU; one CUDA graph launch a hop, or for many.

A plan is bound to the TensorRT, the GPU and the system that built it, so it is a cache and never part of a model. It is made anew,
in seconds, where there is none for the graph or where TensorRT does not take it. Works with TensorRT 10.3 (JetPack 6), 10.16
(JetPack 7) and 11: strong typing, so the precision is the graph's own (float16 tensors, or INT8 by QuantizeLinear and DequantizeLinear).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.engines import PARITY_TOLERANCE, Engine, parity
from edgekws.errors import EngineUnavailable, NotPrepared, install_command
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import Model, graph, turns

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 64 << 20  # of the builder's; the networks need kilobytes
PLANS_MAX = 8  # of one machine: models in use, the one before, and what was tried
L4T_RELEASE = Path("/etc/nv_tegra_release")
PROGRESS_S = 10.0  # between two words of a build
NON_BLOCKING = 1  # cudaStreamNonBlocking
# In one launch, where a caller has them: as many as golden frames are compared, and whole rounds of every network's buffers.
SEVERAL_HOPS = 24


def why_unavailable() -> str | None:
    """None if TensorRT, the CUDA bindings and a GPU are here."""
    try:
        _gpu(_Cuda(_libraries()[1]))
    except EngineUnavailable as error:
        return str(error)
    return None


def load(model: Model) -> TensorRtEngine:
    """From the cached plan, else from a new one, which takes up to minutes on a board.

    Raises:
        EngineUnavailable: TensorRT refuses the graph, or the GPU has no memory left.
    """
    return _load(model)


def load_prepared(model: Model) -> TensorRtEngine:
    """From the cached plan. Raises NotPrepared where there is none that TensorRT takes, else as `load`."""
    return _load(model, may_build=False)


def load_refitted(model: Model) -> TensorRtEngine:
    """As `load`, from plans that take other weights (tensorrt_refit_engine)."""
    return _load(model, refit=True)


def load_refitted_prepared(model: Model) -> TensorRtEngine:
    """As `load_prepared`, of these."""
    return _load(model, may_build=False, refit=True)


def _load(model: Model, *, may_build: bool = True, refit: bool = False) -> TensorRtEngine:
    trt, runtime = _libraries()
    cuda = _Cuda(runtime)
    gpu = _gpu(cuda)
    path, precision = graph(model, gpu=True)
    onnx = path.read_bytes()
    here = {"tensorrt": str(trt.__version__), "gpu": gpu, "l4t": _l4t(), "workspace": WORKSPACE_BYTES} | ({"refit": True} if refit else {})
    cache = cache_directory()
    plan_path = cache / f"{_digest({**here, 'onnx': hashlib.sha256(onnx).hexdigest()})}.plan"
    logger = _logger(trt)
    runner = _made(trt.Runtime, logger)

    def cached() -> Any:
        plan = _read(plan_path)
        taken = runner.deserialize_cuda_engine(plan) if plan else None
        if plan and taken is None:
            log.warning("%s: TensorRT %s does not take this plan (%s); it is built again", plan_path, here["tensorrt"], logger.told())
        return taken

    def engine_of(cuda_engine: Any) -> TensorRtEngine:
        name = "tensorrt-refit" if refit else "tensorrt"
        return TensorRtEngine(model, precision, runner, cuda_engine, cuda, logger, name)

    shapes_path = cache / f"{_digest({**here, 'spec': model.raw.get('spec'), 'precision': precision})}.shapes"

    def refitted() -> TensorRtEngine | None:
        """With these weights in a plan for the same shapes."""
        plan = _read(shapes_path)
        base = runner.deserialize_cuda_engine(plan) if plan else None
        if base is None:
            return None
        refitter = _made(trt.Refitter, logger, base)
        put_in = _made(trt.OnnxParserRefitter, logger, refitter).refit_from_bytes(onnx)
        if not put_in or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
            log.warning("TensorRT %s does not refit a plan with %s (%s); one is built", here["tensorrt"], model.id, logger.told())
            return None
        engine = engine_of(base)
        if not (off := parity(engine, model)) <= PARITY_TOLERANCE[precision]:
            engine.close()
            log.warning("a plan refitted with %s differs from its golden embeddings by %.2g; one is built", model.id, off)
            return None
        _write(plan_path, bytes(base.serialize()))
        return engine

    cuda_engine = cached()
    if cuda_engine is None and not may_build:
        raise NotPrepared(f"there is no plan for {model.id} by TensorRT {here['tensorrt']} on {gpu} in {cache} yet")
    if cuda_engine is None:
        with _alone(cache) as waited:
            cuda_engine = cached() if waited else None
            if cuda_engine is None and refit and (engine := refitted()) is not None:
                return engine
            if cuda_engine is None:
                timing_path = cache / f"{_digest(here)}.timing"
                with _patience(f"building a TensorRT plan for {model.id} on {gpu}"):
                    plan, timing = build(trt, logger, onnx, _read(timing_path) or b"", refit=refit)
                _write(timing_path, timing)
                for path in (plan_path, shapes_path) if refit else (plan_path,):
                    _write(path, plan)
                cuda_engine = runner.deserialize_cuda_engine(plan)
        if cuda_engine is None:
            raise EngineUnavailable(f"TensorRT {here['tensorrt']} does not load the plan that it just built: {logger.told()}")
    return engine_of(cuda_engine)


class TensorRtEngine(Engine):
    """Some CUDA graphs that are taken in turn, so that no state is ever copied. Each copies the frames in, runs the network, and copies
    the embedding out. One more does that for several hops, from the first turn to the last, and so leaves the next one to the first."""

    def __init__(self, model: Model, precision: str, runner: Any, cuda_engine: Any, cuda: _Cuda, logger: Any, name: str) -> None:
        self.name = name
        self.precision = precision
        self.dim = model.dim
        self._turn = 0
        self._cuda = cuda
        self._keep: tuple[Any, ...] = (runner, cuda_engine)  # TensorRT wants each to outlive what it made, and the logger all
        self._logger = logger
        self._contexts: list[Any] = []
        self._graphs: list[Any] = []
        self._several: list[Any] = []  # one
        self._stream: Any = None
        self._device: list[int] = []
        self._pinned: list[int] = []
        shapes = {"frames": (1, HOP_FRAMES, N_MELS), "embedding": (1, model.dim)}
        for state in model.states:
            shapes.update(dict.fromkeys(state.tensors, state.shape))
        names = [cuda_engine.get_tensor_name(i) for i in range(cuda_engine.num_io_tensors)]
        found = {name: tuple(cuda_engine.get_tensor_shape(name)) for name in names}
        if found != shapes:
            odd = {name: shape for name, shape in found.items() if shapes.get(name) != shape} or set(shapes) - set(found)
            raise EngineUnavailable(f"the plan has other inputs and outputs than {model.id}: {odd}")
        try:
            self._stream = cuda("cudaStreamCreateWithFlags", NON_BLOCKING)
            taken = turns(model.states)
            rounds = max(1, SEVERAL_HOPS // len(taken))
            self._frames = self._host((rounds * len(taken), HOP_FRAMES, N_MELS))
            self._embeddings = self._host((rounds * len(taken), model.dim))
            frames, embedding = self._allocate(shapes["frames"]), self._allocate(shapes["embedding"])
            self._states = [
                [(self._allocate(state.shape), int(np.prod(state.shape)) * 4) for _ in range(state.hops + 1)] for state in model.states
            ]
            self.reset()
            for turn in taken:
                context = cuda_engine.create_execution_context()
                if context is None:
                    raise EngineUnavailable(f"TensorRT made no execution context, most likely for want of GPU memory: {logger.told()}")
                self._contexts.append(context)
                addresses = {"frames": frames, "embedding": embedding}
                addresses |= {name: self._states[state][buffer][0] for name, (state, buffer) in turn.items()}
                for name, address in addresses.items():
                    if not context.set_tensor_address(name, address):
                        raise EngineUnavailable(f"TensorRT does not take a buffer for {name}: {logger.told()}")
                self._enqueue(context)  # what it prepares at its first run cannot be captured
                cuda("cudaStreamSynchronize", self._stream)
                self._graphs.append(self._capture([context], frames, embedding))
            self._several.append(self._capture(self._contexts * rounds, frames, embedding))
            self.reset()
        except BaseException:
            self.close()
            raise

    def step(self, frames: np.ndarray) -> np.ndarray:
        """float32 (4, 40) → unit embedding, float32 (dim,).

        Raises:
            EngineUnavailable: CUDA failed, and this engine is of no use any more.
        """
        self._frames[0] = frames
        self._cuda("cudaGraphLaunch", self._graphs[self._turn], self._stream)
        self._cuda("cudaStreamSynchronize", self._stream)
        self._turn = (self._turn + 1) % len(self._graphs)
        return self._embeddings[0].copy()

    def steps(self, hops: np.ndarray) -> np.ndarray:
        """float32 (n, 4, 40) → (n, dim): as many as are captured together in one launch each, the rest hop by hop. Raises as `step`."""
        found, several = np.empty((len(hops), self.dim), np.float32), len(self._frames)
        done = 0
        while done < len(hops):
            if self._turn or len(hops) - done < several:
                found[done] = self.step(hops[done])
                done += 1
                continue
            self._frames[:] = hops[done : done + several]
            self._cuda("cudaGraphLaunch", self._several[0], self._stream)
            self._cuda("cudaStreamSynchronize", self._stream)
            found[done : done + several] = self._embeddings
            done += several
        return found

    def reset(self) -> None:
        """Zero states: a new stream."""
        for buffers in self._states:
            for address, size in buffers:
                self._cuda("cudaMemsetAsync", address, 0, size, self._stream)
        self._cuda("cudaStreamSynchronize", self._stream)
        self._turn = 0

    def close(self) -> None:
        """Give the GPU's memory back."""
        # Each by itself: after a CUDA fault all of them fail.
        calls = [("cudaGraphExecDestroy", captured) for captured in self._graphs + self._several]
        self._contexts.clear()
        calls += [("cudaFree", address) for address in self._device] + [("cudaFreeHost", address) for address in self._pinned]
        calls += [("cudaStreamDestroy", self._stream)] if self._stream is not None else []
        for name, what in calls:
            with suppress(EngineUnavailable):
                self._cuda(name, what)
        self._graphs, self._several, self._device, self._pinned, self._stream = [], [], [], [], None
        self._frames = self._embeddings = np.zeros(0, np.float32)  # what they showed is gone
        self._keep = ()

    def _enqueue(self, context: Any) -> None:
        # TensorRT's own handle is a number.
        if not context.execute_async_v3(int(self._stream)):
            raise EngineUnavailable(f"TensorRT does not run the plan: {self._logger.told()}")

    def _capture(self, contexts: list[Any], frames: int, embedding: int) -> Any:
        """One hop after another, by these contexts."""
        cuda, runtime, stream = self._cuda, self._cuda.runtime, self._stream
        # Of this thread alone: another engine may be at work in another one while this is captured.
        cuda("cudaStreamBeginCapture", stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        to_device, to_host = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        try:
            for context, given, told in zip(contexts, self._frames, self._embeddings, strict=False):
                cuda("cudaMemcpyAsync", frames, given.ctypes.data, given.nbytes, to_device, stream)
                self._enqueue(context)
                cuda("cudaMemcpyAsync", told.ctypes.data, embedding, told.nbytes, to_host, stream)
        except EngineUnavailable:
            with suppress(EngineUnavailable):  # as long as it lasts nothing can be given back
                cuda("cudaGraphDestroy", cuda("cudaStreamEndCapture", stream))
            raise
        captured = cuda("cudaStreamEndCapture", stream)
        try:
            return cuda("cudaGraphInstantiate", captured, 0)
        finally:
            cuda("cudaGraphDestroy", captured)

    def _allocate(self, shape: tuple[int, ...]) -> int:
        """Device memory for a float32 tensor."""
        self._device.append(int(self._cuda("cudaMalloc", int(np.prod(shape)) * 4)))
        return self._device[-1]

    def _host(self, shape: tuple[int, ...]) -> np.ndarray:
        """Float32 numbers that the GPU can copy from and to while Python does something else."""
        count = int(np.prod(shape))
        self._pinned.append(int(self._cuda("cudaMallocHost", count * 4)))
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._pinned[-1])).reshape(shape)


def parse(trt: Any, logger: Any, builder: Any, onnx: bytes) -> Any:
    """The strongly typed network of a graph.

    Raises:
        EngineUnavailable: the parser refuses it, with the parser's own words.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = _made(trt.OnnxParser, logger, network)
    if not parser.parse(onnx):
        errors = [" ".join(str(parser.get_error(i).desc()).split()) for i in range(parser.num_errors)]
        raise EngineUnavailable(f"TensorRT {trt.__version__} refuses the graph: {'; '.join(errors) or logger.told()}")
    return network


def configure(trt: Any, builder: Any, timing: bytes) -> tuple[Any, Any]:
    """The builder's settings, and the timing cache in them."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    cache = config.create_timing_cache(timing)
    if cache is None or not config.set_timing_cache(cache, False):  # one that is not for this GPU is not taken
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return config, cache


def build(trt: Any, logger: Any, onnx: bytes, timing: bytes = b"", *, refit: bool = False) -> tuple[bytes, bytes]:
    """A plan for this GPU, and the timing cache that makes the next one cheap. `refit`: one that takes other weights.

    Raises:
        EngineUnavailable: the parser or the builder refuses the graph, with its own words.
    """
    builder = _made(trt.Builder, logger)
    network = parse(trt, logger, builder, onnx)
    config, cache = configure(trt, builder, timing)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineUnavailable(f"TensorRT {trt.__version__} builds no plan: {logger.told()}")
    return bytes(plan), bytes(cache.serialize())


@contextmanager
def _alone(cache: Path) -> Iterator[bool]:
    """One build at a time for all who share a cache: each takes much memory, and times the GPU. True = another one's was waited for, and
    may have been the same."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (cache / "build.lock").open("a")
    except OSError:  # without a cache there is nothing to wait for
        yield False
        return
    with file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            with _patience("waiting for another process that builds a TensorRT plan"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield waited


@contextmanager
def _patience(what: str) -> Iterator[None]:
    """Say what takes up to minutes, and every so often that it goes on."""
    ended, start_s = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(PROGRESS_S):
            log.warning("%s: %.0f s so far", what, time.monotonic() - start_s)

    log.warning("%s: up to minutes, once", what)
    threading.Thread(target=tell, name="patience", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _made(kind: Any, logger: Any, *arguments: Any) -> Any:
    """One of TensorRT's own objects. Where its library gives none, for want of memory or a driver, the bindings raise a bare TypeError."""
    try:
        return kind(*arguments, logger)
    except (TypeError, RuntimeError) as error:
        raise EngineUnavailable(f"TensorRT makes no {kind.__name__}: {logger.told()}") from error


def cache_directory() -> Path:
    """Where plans are kept: with the service's state ($STATE_DIRECTORY), else under ~/.cache."""
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return (Path(state) if state else Path(caches) / "edgekws") / "tensorrt"


class _Cuda:
    """The CUDA runtime by the names of its functions, with errors as exceptions."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            code, *values = getattr(self.runtime, name)(*arguments)
        except (RuntimeError, OSError) as error:  # cuda-bindings finds no CUDA library
            raise EngineUnavailable(f"no CUDA here: {error}") from error
        if int(code) != 0:
            told = self.runtime.cudaGetErrorString(code)[1]
            raise EngineUnavailable(f"{name}: {told.decode() if isinstance(told, bytes) else told} (CUDA error {int(code)})")
        return values[0] if values else None


def _libraries() -> tuple[Any, Any]:
    """TensorRT, and the CUDA runtime's bindings."""
    try:
        import tensorrt as trt
    except (ImportError, OSError, RuntimeError) as error:
        jetson = "on a Jetson: sudo apt-get install python3-libnvinfer, and a venv made with --system-site-packages"
        raise EngineUnavailable(f"tensorrt cannot be imported: {error} ({jetson})") from error
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineUnavailable(f"cuda-bindings cannot be imported: {error} ({install_command('gpu')})") from error
    return trt, runtime


def _gpu(cuda: _Cuda) -> str:
    """Name and compute capability of the GPU."""
    if cuda("cudaGetDeviceCount") == 0:
        raise EngineUnavailable("CUDA finds no GPU")
    found = cuda("cudaGetDeviceProperties", 0)
    name = found.name.decode(errors="replace") if isinstance(found.name, bytes) else str(found.name)
    return f"{name.rstrip(chr(0))} sm_{found.major}{found.minor}"


def _l4t() -> str:
    try:
        return L4T_RELEASE.read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return ""


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps TensorRT's errors for the exception that follows."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))
            else:
                log.debug("TensorRT: %s", message)

        def told(self) -> str:
            told, self.errors = self.errors[-3:], []
            return "; ".join(told) or "TensorRT says no reason"

    return Logger()


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """A cached file. What was cut short or altered never reaches TensorRT, which need not survive it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s); it is made again", path, error.strerror)
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        log.warning("%s: damaged; it is made again", path)
        return None
    with suppress(OSError):
        path.touch()  # in use, so not the oldest
    return data[32:]


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; without room for it the next start builds again. The oldest plans go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for litter in path.parent.glob(".new-*"):
            if time.time() - litter.stat().st_mtime > 3600:  # of a process that was killed while it wrote
                litter.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as new:
            try:
                new.write(hashlib.sha256(data).digest() + data)
                new.close()
                Path(new.name).replace(path)
            except BaseException:
                Path(new.name).unlink(missing_ok=True)
                raise
        kept = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in kept[PLANS_MAX:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be kept (%s); the next start builds it again", path, error.strerror)
