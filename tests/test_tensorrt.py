"""The TensorRT engine without a GPU: its logic on a double, every name of the double in NVIDIA's own bindings, and the graphs in NVIDIA's
own parser and builder. What only a GPU shows is benchmarks/engines.py's to tell."""

import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from nvidia_double import Cudart, Trt, cudaError_t
from test_promotion import AtOnce

from edgekws.audio import read_recording
from edgekws.cli import main
from edgekws.detector import Detector
from edgekws.engines import Preparation, load_engine, parity, tensorrt_engine
from edgekws.enrolment import enrol
from edgekws.errors import EngineUnavailable
from edgekws.model import find_model, golden, load_model
from edgekws.pipeline import Pipeline
from edgekws.promotion import Updates, Version
from edgekws.sinks import words
from edgekws.store import Store
from edgekws.values import HOP_SAMPLES, AudioChunk


@pytest.fixture
def model():
    return load_model(find_model("edge-small"))


@pytest.fixture
def board(monkeypatch, tmp_path):
    """A machine with TensorRT 10.3 and a GPU; `board(version=…, refuses=…)` makes it another one, and gives its (tensorrt, runtime)."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))

    def install(**options):
        runtime = Cudart()
        trt = Trt(runtime, **options)
        bindings = types.ModuleType("cuda.bindings")
        bindings.runtime = runtime
        for name, module in {"tensorrt": trt, "cuda": types.ModuleType("cuda"), "cuda.bindings": bindings}.items():
            monkeypatch.setitem(sys.modules, name, module)
        return trt, runtime

    return install


def plans(tmp_path):
    return sorted((tmp_path / "state" / "tensorrt").glob("*.plan"))


def test_a_stream_gives_the_golden_embeddings(board, model):
    board()
    engine = load_engine(model, "tensorrt")

    assert (engine.name, engine.precision, engine.dim) == ("tensorrt", "fp32", model.dim)
    assert parity(engine, model) <= 1e-4


def test_float16_is_taken_where_the_model_brings_it(board, model, tmp_path):
    pytest.importorskip("onnx")
    from edgekws.training.quantise import version

    board()
    lighter = version(model, tmp_path / "half", id="half", precision="fp16")
    engine = load_engine(lighter, "tensorrt")

    assert engine.precision == "fp16"
    assert 1e-6 < parity(engine, lighter) <= 1e-3
    assert load_engine(lighter, "onnxruntime").precision == "fp32"


def test_a_hop_is_one_graph_launch_and_one_wait(board, model):
    _, runtime = board()
    engine = load_engine(model, "tensorrt")
    runtime.calls.clear()
    for hop in golden(model)[0]:
        engine.step(hop)

    assert runtime.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"] * len(golden(model)[0])


@pytest.mark.parametrize(("name", "before"), [("edge-small", 0), ("edge-small", 1), ("edge-small", 5), ("edge-tiny", 1)])
def test_several_hops_are_one_launch_and_give_what_they_give_one_by_one(name, before, board):
    _, runtime = board()
    engine = load_engine(load_model(find_model(name)), "tensorrt")
    hops = np.random.default_rng(0).standard_normal((60, 4, 40)).astype(np.float32)
    one_by_one = [engine.step(hop) for hop in hops]
    engine.reset()
    got = [engine.step(hop) for hop in hops[:before]]
    runtime.calls.clear()
    at_once = engine.steps(hops[before:50])

    alone = -before % len(engine._graphs)  # until the buffers have gone round
    several = (50 - before - alone) // tensorrt_engine.SEVERAL_HOPS
    launches = alone + several + (50 - before - alone) % tensorrt_engine.SEVERAL_HOPS
    assert runtime.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"] * launches
    assert several >= 1
    assert np.array_equal([*got, *at_once, *(engine.step(hop) for hop in hops[50:])], one_by_one)


def test_no_hop_gives_no_embedding(board, model):
    board()

    assert load_engine(model, "tensorrt").steps(np.zeros((0, 4, 40), np.float32)).shape == (0, model.dim)


def test_reset_starts_a_new_stream_after_an_odd_number_of_hops_too(board, model):
    board()
    engine = load_engine(model, "tensorrt")
    frames, _ = golden(model)
    first = [engine.step(hop) for hop in frames[:5]]
    engine.reset()

    assert np.array_equal([engine.step(hop) for hop in frames[:5]], first)


def test_engines_side_by_side_do_not_mix_their_streams(board, model):
    board()
    frames, _ = golden(model)
    one, other, alone = (load_engine(model, "tensorrt") for _ in range(3))
    mixed = []
    for hop in frames[:8]:
        mixed.append(one.step(hop))
        other.step(-hop)

    assert np.array_equal(mixed, [alone.step(hop) for hop in frames[:8]])


def test_an_embedding_is_the_callers_to_keep(board, model):
    board()
    engine = load_engine(model, "tensorrt")
    first = engine.step(golden(model)[0][0])
    kept = first.copy()
    engine.step(golden(model)[0][1])

    assert np.array_equal(first, kept)


def test_closing_gives_everything_back(board, model):
    _, runtime = board()
    load_engine(model, "tensorrt").close()

    assert runtime.alive() == 0


def test_a_plan_is_built_once_and_then_taken_from_the_cache(board, model, tmp_path):
    first, _ = board()
    load_engine(model, "tensorrt")
    second, _ = board()
    engine = load_engine(model, "tensorrt")

    assert (first.builds, second.builds, len(plans(tmp_path))) == (1, 0, 1)
    assert parity(engine, model) <= 1e-4


@pytest.mark.parametrize("what", ["tensorrt", "gpu", "l4t", "graph"])
def test_another_tensorrt_gpu_l4t_or_graph_is_another_plan(what, board, model, monkeypatch, tmp_path):
    board()
    load_engine(model, "tensorrt")
    trt, runtime = board(version="10.16.1" if what == "tensorrt" else "10.3.0")
    if what == "gpu":
        monkeypatch.setattr(runtime, "cudaGetDeviceProperties", lambda device: (0, types.SimpleNamespace(name=b"Thor", major=11, minor=0)))
    if what == "l4t":
        release = tmp_path / "nv_tegra_release"
        release.write_text("# R36 (release), REVISION: 4.3\n")
        monkeypatch.setattr(tensorrt_engine, "L4T_RELEASE", release)
    engine = load_engine(load_model(find_model("edge")) if what == "graph" else model, "tensorrt")
    engine.close()

    assert (trt.builds, len(plans(tmp_path))) == (1, 2)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:10], lambda data: b"", lambda data: data[:-1] + b"x"])
def test_a_damaged_plan_never_reaches_tensorrt_and_is_built_again(damage, board, model, tmp_path, caplog):
    board()
    load_engine(model, "tensorrt")
    plan = plans(tmp_path)[0]
    plan.write_bytes(damage(plan.read_bytes()))
    trt, _ = board()
    engine = load_engine(model, "tensorrt")

    assert parity(engine, model) <= 1e-4
    assert trt.builds == 1
    assert f"{plan}: damaged; it is made again" in caplog.text


def test_a_plan_that_tensorrt_does_not_take_is_built_again(board, model, tmp_path, caplog):
    """As after an upgrade that kept its version number: the file is whole and TensorRT says no."""
    board()
    load_engine(model, "tensorrt")
    plan = plans(tmp_path)[0]
    other = plan.read_bytes()[32:].replace(b"10.3.0", b"10.2.9")
    tensorrt_engine._write(plan, other)
    trt, _ = board()
    engine = load_engine(model, "tensorrt")

    assert parity(engine, model) <= 1e-4
    assert trt.builds == 1
    assert "does not take this plan (IRuntime::deserializeCudaEngine: Error Code 1: Version tag does not match)" in caplog.text


def test_without_room_for_the_plan_the_engine_runs_all_the_same(board, model, tmp_path, caplog):
    (tmp_path / "state").write_text("a file where the directory should be")
    board()

    assert parity(load_engine(model, "tensorrt"), model) <= 1e-4
    assert "cannot be kept" in caplog.text


def test_who_comes_while_a_plan_is_built_waits_for_it_and_says_so(board, model, monkeypatch, tmp_path, caplog):
    """As when the listener and the wake service are started together."""
    trt, _ = board()
    monkeypatch.setattr(tensorrt_engine, "PROGRESS_S", 0.01)
    begun, both, build = threading.Event(), threading.Event(), tensorrt_engine.build

    def slowly(*what, **how):
        begun.set()
        assert both.wait(300)
        return build(*what, **how)

    monkeypatch.setattr(tensorrt_engine, "build", slowly)
    with ThreadPoolExecutor(2) as processes:
        first = processes.submit(load_engine, model, "tensorrt")
        assert begun.wait(300)
        second = processes.submit(load_engine, model, "tensorrt")
        while not re.search("waiting for another process that builds a TensorRT plan: .* so far", caplog.text) and not second.done():
            time.sleep(0.01)
        both.set()

        assert (first.result().name, second.result().name, trt.builds) == ("tensorrt", "tensorrt", 1)
    assert "building a TensorRT plan for edge-small-4 on Orin (double) sm_87: up to minutes, once" in caplog.text


def test_a_build_that_died_holds_up_nobody(board, model, tmp_path):
    board()
    lock = tmp_path / "state" / "tensorrt" / "build.lock"
    lock.parent.mkdir(parents=True)
    code = f"import fcntl, os; fcntl.flock(open({str(lock)!r}, 'a'), fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])

    assert load_engine(model, "tensorrt").name == "tensorrt"


def test_timings_that_tensorrt_does_not_take_are_made_again(board, model, tmp_path):
    board()
    load_engine(model, "tensorrt")
    plans(tmp_path)[0].unlink()
    trt, _ = board(refuses=("timing",))

    assert parity(load_engine(model, "tensorrt"), model) <= 1e-4
    assert trt.builds == 1


def test_old_plans_go(board, model, tmp_path):
    for number in range(12):
        board(version=f"10.{number}.0")
        load_engine(model, "tensorrt").close()

    assert len(plans(tmp_path)) == tensorrt_engine.PLANS_MAX


@pytest.fixture
def other_weights(model, tmp_path):
    """A version of the same shapes, as fine-tuning without pruning leaves it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from edgekws.training.export import load_network, save_model

    torch.manual_seed(0)
    network = load_network(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    save_model(network, tmp_path / "other", id="other", name=model.network, golden_frames=golden(model)[0], facts={})
    return load_model(tmp_path / "other")


def test_an_engine_that_refits_builds_once_for_versions_of_the_same_shapes(board, model, other_weights, tmp_path):
    trt, runtime = board()
    load_engine(model, "tensorrt-refit").close()
    for _ in range(2):  # the second time from the cache
        engine = load_engine(other_weights, "tensorrt-refit")
        assert (engine.name, trt.builds, len(plans(tmp_path))) == ("tensorrt-refit", 1, 2)
        assert parity(engine, other_weights) <= 1e-4 < 1e-2 < parity(engine, model)
        engine.close()

    load_engine(load_model(find_model("edge")), "tensorrt-refit").close()  # other shapes
    load_engine(other_weights, "tensorrt").close()  # a plan that nothing can be put in
    assert (trt.builds, runtime.alive()) == (3, 0)


@pytest.mark.parametrize(
    ("refuses", "told"),
    [
        ("weights", "does not refit a plan with other (Weights of other shapes); one is built"),
        ("all weights", "does not refit a plan with other (TensorRT says no reason); one is built"),
        ("numerics", "a plan refitted with other differs from its golden embeddings by "),
    ],
)
def test_what_cannot_be_refitted_or_then_computes_something_else_is_built(refuses, told, board, model, other_weights, caplog):
    trt, runtime = board(refuses=(refuses,))
    load_engine(model, "tensorrt-refit").close()
    engine = load_engine(other_weights, "tensorrt-refit")

    assert (engine.name, trt.builds) == ("tensorrt-refit", 2)
    assert parity(engine, other_weights) <= 1e-4
    assert told in caplog.text
    engine.close()
    assert runtime.alive() == 0


FAULTS = {
    "graph": "TensorRT 10.3.0 refuses the graph: No importer registered for op: StringNormalizer; second",
    "build": "TensorRT 10.3.0 builds no plan: Error Code 10: Could not find any implementation for node",
    "plan": "does not load the plan that it just built: IRuntime::deserializeCudaEngine: Error Code 1",
    "Builder": "TensorRT makes no Builder: CUDA initialization failure with error: 2",
    "Runtime": "TensorRT makes no Runtime: TensorRT says no reason",
    "OnnxParser": "TensorRT makes no OnnxParser: TensorRT says no reason",
    "context": "no execution context, most likely for want of GPU memory: IExecutionContext: out of memory",
}
CUDA_FAULTS = {
    "cudaGetDeviceCount": (cudaError_t.cudaErrorInsufficientDriver, 1),
    "cudaMalloc": (cudaError_t.cudaErrorMemoryAllocation, 7),
    "cudaMallocHost": (cudaError_t.cudaErrorMemoryAllocation, 2),
    "cudaMemcpyAsync": (cudaError_t.cudaErrorInvalidValue, 2),
    "cudaStreamEndCapture": (cudaError_t.cudaErrorStreamCaptureUnsupported, 2),
    "cudaStreamSynchronize": (cudaError_t.cudaErrorIllegalAddress, 6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_tensorrt_refuses_is_told_in_its_own_words_and_onnx_runtime_listens(fault, board, model, caplog):
    _, runtime = board(refuses=(fault,))
    engine = load_engine(model, "tensorrt", fall_back=True)

    assert engine.name == "onnxruntime"
    assert "engine onnxruntime takes over, since tensorrt: " in caplog.text and FAULTS[fault] in caplog.text
    assert runtime.alive() == 0
    with pytest.raises(EngineUnavailable):
        load_engine(model, "tensorrt")


@pytest.mark.parametrize("name", CUDA_FAULTS)
def test_a_cuda_error_while_loading_leaves_nothing_behind_and_onnx_runtime_listens(name, board, model, caplog):
    _, runtime = board()
    runtime.fail[name] = CUDA_FAULTS[name]
    engine = load_engine(model, "tensorrt", fall_back=True)

    assert engine.name == "onnxruntime"
    assert f"tensorrt: {name}: " in caplog.text
    assert runtime.alive() == 0


@pytest.mark.parametrize("name", ["step", "steps"])
def test_a_plan_that_computes_something_else_is_refused(name, board, model, monkeypatch, caplog):
    board()
    right = getattr(tensorrt_engine.TensorRtEngine, name)
    monkeypatch.setattr(tensorrt_engine.TensorRtEngine, name, lambda self, frames: right(self, frames) + np.float32(0.002))
    engine = load_engine(model, "tensorrt", fall_back=True)

    assert engine.name == "onnxruntime"
    assert "differs from the golden embeddings of edge-small-4 by 0.002, accepted is 0.001 in fp32" in caplog.text


@pytest.mark.parametrize(
    "go_on", [lambda engine, hops: np.stack([engine.step(hop) for hop in hops]), lambda engine, hops: engine.steps(hops)]
)
def test_when_the_gpu_fails_in_the_middle_of_a_stream_onnx_runtime_goes_on(go_on, board, model, caplog):
    _, runtime = board()
    engine = load_engine(model, "tensorrt", fall_back=True)
    frames, embeddings = golden(model)
    for hop in frames[:5]:
        engine.step(hop)
    runtime.fail["cudaGraphLaunch"] = (cudaError_t.cudaErrorIllegalAddress, 1)
    got = go_on(engine, frames)

    assert (engine.name, runtime.alive()) == ("onnxruntime", 0)
    assert np.abs(got - embeddings).max() <= 1e-4  # as a stream that begins at that hop
    assert "engine tensorrt failed while listening, onnxruntime takes over: cudaGraphLaunch: cudaErrorIllegalAddress" in caplog.text


def test_a_machine_without_a_gpu_is_told_as_that(board, model, monkeypatch, caplog):
    _, runtime = board()
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (cudaError_t.cudaSuccess, 0))

    assert load_engine(model, "tensorrt", fall_back=True).name == "onnxruntime"
    assert "tensorrt: CUDA finds no GPU" in caplog.text


def test_without_tensorrt_the_reason_says_how_to_get_it(model):
    if "tensorrt" in sys.modules or tensorrt_engine.why_unavailable() is None:
        pytest.skip("TensorRT is here")

    assert "sudo apt-get install python3-libnvinfer" in str(tensorrt_engine.why_unavailable())


def test_listening_with_tensorrt_wanted_and_absent_is_a_warning(model, caplog):
    if tensorrt_engine.why_unavailable() is None:
        pytest.skip("TensorRT is here")
    with caplog.at_level(logging.WARNING):
        engine = load_engine(model, "tensorrt", fall_back=True)

    assert engine.name == "onnxruntime"
    assert "engine onnxruntime takes over, since tensorrt: tensorrt cannot be imported" in caplog.text


# Beside a listener.

HERE = Path(__file__).parent
DEMO = HERE.parent / "edgekws" / "demo"
# The double as the modules that a process of its own imports.
MODULES = {
    "tensorrt.py": """
import sys
import nvidia_double
from cuda.bindings import runtime
sys.modules[__name__] = nvidia_double.Trt(runtime, refuses={refuses!r})
""",
    "cuda/bindings.py": "import nvidia_double; runtime = nvidia_double.Cudart()",
}


class Listener:
    """The demo's stream, hop by hop, with TensorRT wanted. Its clock stands at the stream's time; `prepare` as `Updates` has it."""

    def __init__(self, root, **options):
        self.store, self.at, self.heard, self.events = Store(root), 0, [], []
        self.word = None
        version = self.load(False)
        clock = {"clock": lambda: self.at * 0.08, "now": lambda: 1e9 + self.at * 0.08}
        self.updates = Updates(version, self.load, Store(root), self.store.enrolment_stamp(), **clock, **options)
        self.pipeline = Pipeline(version.engine, version.detector)
        self.stream = read_recording(DEMO / "stream.flac")

    def load(self, reread):
        model = load_model(self.store.current_model() or find_model("edge-small"))
        engine = load_engine(model, "tensorrt", fall_back=True, at_once=True)
        takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
        self.word = self.word or enrol("open sesame", "", takes, engine, model)
        return Version(model, engine, Detector([self.word]))

    def hear(self, hops):
        for _ in range(hops):
            first = self.at * HOP_SAMPLES
            self.heard += self.pipeline.feed(AudioChunk(self.stream[first : first + HOP_SAMPLES], first))
            self.at += 1
            self.events += self.updates.step(self.pipeline, self.at * 0.08)
        return self

    def settled(self):
        """Until what a thread or a process does beside it is done; the stream stands still."""
        preparation, work = self.updates._awaited._preparation, self.updates._work
        end_s = time.monotonic() + 300
        while not ((preparation is None or preparation.done()) and (work is None or work.done())):
            assert time.monotonic() < end_s
            time.sleep(0.01)
        return self

    @property
    def engine(self):
        return self.pipeline.engine.name


class Here:
    """Prepares in this process, with the double that it has, once it is asked whether it is done."""

    def __init__(self, model, backend):
        self.model, self.backend, self.closed = model, backend, False

    def done(self):
        return True

    def why_not(self):
        try:
            load_engine(self.model, self.backend).close()
        except EngineUnavailable as error:
            return str(error)
        return ""

    def close(self):
        self.closed = True


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """What other processes find as TensorRT and CUDA is the double too."""

    def install(refuses=()):
        for name, text in MODULES.items():
            file = tmp_path / "modules" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(refuses=refuses))
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.syspath_prepend(tmp_path / "modules")

    return install


def test_a_start_without_a_plan_listens_at_once_and_goes_over_to_tensorrt_when_another_process_has_built_it(
    board, elsewhere, tmp_path, caplog
):
    trt, _ = board()
    elsewhere()
    listener = Listener(tmp_path / "root").hear(40)
    assert (listener.engine, plans(tmp_path), trt.builds) == ("onnxruntime", [], 0)
    assert "engine onnxruntime takes over, since tensorrt: there is no plan for edge-small-4 by TensorRT 10.3.0 on Orin" in caplog.text

    listener.settled().hear(13).settled().hear(len(listener.stream) // HOP_SAMPLES - 53)
    listener.updates.close()
    (event,) = listener.events
    assert (listener.engine, len(plans(tmp_path)), trt.builds) == ("tensorrt", 1, 0)
    assert words(event) == "model: edge-small-4 listens on tensorrt, before on onnxruntime"
    assert len(listener.heard) == len(json.loads((DEMO / "truth.json").read_text())["spoken"])


def test_the_next_start_takes_the_plan_at_once(board, model):
    board()
    load_engine(model, "tensorrt").close()

    assert load_engine(model, "tensorrt", fall_back=True, at_once=True).name == "tensorrt"


def test_who_enrols_or_promotes_does_not_wait_for_a_plan(board, tmp_path, capsys):
    trt, _ = board()
    config = tmp_path / "edgekws.toml"
    config.write_text('[model]\nid = "edge-small"\nengine = "tensorrt"\n')
    takes = [str(path) for path in sorted(DEMO.glob("enrol-*.flac"))]

    assert main(["enroll", "open sesame", *takes, "--config", str(config)]) == 0
    assert main(["models", "promote", "edge-small", "--config", str(config)]) == 0
    assert trt.builds == 0


def test_a_builder_that_fails_is_told_once_with_its_words_and_onnx_runtime_goes_on(board, elsewhere, tmp_path):
    board()
    elsewhere(refuses=("build",))
    listener = Listener(tmp_path / "root").hear(40).settled().hear(60)

    (event,) = listener.events
    assert words(event) == (
        "model: engine tensorrt is refused, edge-small-4 goes on:"
        " tensorrt: TensorRT 10.3.0 builds no plan: Error Code 10: Could not find any implementation for node"
    )
    assert listener.engine == "onnxruntime"
    listener.updates.reload()
    listener.hear(14).settled().hear(14)
    assert listener.updates._awaited._preparation is not None  # who reads the settings again has it tried again
    listener.updates.close()


def test_a_plan_that_this_process_cannot_load_is_refused_with_the_reason(board, model, tmp_path, caplog):
    _, runtime = board()
    load_engine(model, "tensorrt").close()
    plans(tmp_path)[0].unlink()
    runtime.fail["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation, 2 * runtime.calls.count("cudaMalloc") + 1  # after the builder's own
    listener = Listener(tmp_path / "root", prepare=Here, worker=AtOnce()).hear(60)

    (event,) = listener.events
    assert "engine tensorrt is refused, edge-small-4 goes on: tensorrt: cudaMalloc: out of memory" in words(event)
    assert "engine onnxruntime takes over, since tensorrt: cudaMalloc: out of memory" in caplog.text
    assert (listener.engine, len(plans(tmp_path)), runtime.alive()) == ("onnxruntime", 1, 0)


def test_a_version_that_is_promoted_meanwhile_listens_and_has_its_own_plan_built(board, tmp_path):
    made = []

    class Endless(Here):
        def __init__(self, *what):
            super().__init__(*what)
            made.append(self)

        def done(self):
            return False

    board()
    listener = Listener(tmp_path / "root", prepare=Endless, worker=AtOnce()).hear(40)
    listener.store.promote(find_model("edge"), "edge-3")
    listener.word = None
    listener.hear(60)
    assert [event.extra["what"] for event in listener.events] == ["live"]
    assert [(one.model.id, one.closed) for one in made] == [("edge-small-4", True), ("edge-3", False)]

    listener.updates.close()
    assert made[1].closed


def test_the_wake_service_serves_at_once_too_and_goes_over(elsewhere, tmp_path):
    pytest.importorskip("wyoming")
    elsewhere()
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[model]\nid = "edge-small"\nengine = "tensorrt"\n[store]\nroot = "{tmp_path / "root"}"\n')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "STATE_DIRECTORY": str(tmp_path / "state")}
    command = [sys.executable, "-m", "edgekws", "wyoming", "--uri", "tcp://127.0.0.1:0", "--config", str(config)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as service:
        too_long = threading.Timer(300, service.kill)
        too_long.start()
        said = ""
        for line in service.stderr:
            said += line
            if "before on" in line:
                break
        too_long.cancel()
        service.terminate()

    assert "engine onnxruntime takes over, since tensorrt: there is no plan" in said.split('serving "hey jetson"')[0]
    assert "with what was read again (on tensorrt, before on onnxruntime)" in said.split('serving "hey jetson"')[1]


def test_the_end_of_the_listener_is_the_end_of_a_builder(board, elsewhere, model):
    board()
    elsewhere()
    preparation = Preparation(model, "tensorrt")
    preparation.close()

    assert preparation.done()


# Against NVIDIA's own files, from the package registry.

# Empty libraries under the names that the bindings load: enough for their classes to be there.
STUBS = """
#include <stddef.h>
#define NOTHING(name) void *name(void) { return NULL; }
NOTHING(createInferBuilder_INTERNAL) NOTHING(createInferRuntime_INTERNAL) NOTHING(createInferRefitter_INTERNAL)
NOTHING(getBuilderPluginRegistry) NOTHING(getPluginRegistry) NOTHING(getBuilderSafePluginRegistry)
NOTHING(createNvOnnxParser_INTERNAL) NOTHING(createNvOnnxParserRefitter_INTERNAL)
int getInferLibVersion(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, const char *ns) { return 1; }
"""


def pip(request, name, *arguments):
    """The directory that pip filled, kept between runs; skips when the registry has nothing for this Python or cannot be reached."""
    folder = Path(request.config.cache.mkdir(name))
    done = folder / ".done"
    if not done.exists():
        command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--retries", "1", "--timeout", "20"]
        where = ["--dest" if arguments[0] == "download" else "--target", str(folder)]
        try:
            told = subprocess.run([*command, *where], capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip {' '.join(arguments)} took more than ten minutes")
        if told.returncode:
            pytest.skip(f"pip {' '.join(arguments)}: {(told.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        done.touch()
    return folder


def names_of(kind):
    """What the engine may ask of a class or module of the double: everything public that was written there."""
    found = {name for name in vars(kind) if not name.startswith("_")}
    return sorted(
        found - {"classes", "builds", "refit", "calls", "fail", "alive", "enqueue", "capturing", "floats", "captured", "queue", "onnx"}
    )


@pytest.mark.registry
@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_every_name_of_tensorrt_that_the_engine_uses_is_in_nvidias_bindings(version, request, tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    wheels = pip(request, f"tensorrt-{version}", "download", "--no-deps", "--only-binary", ":all:", f"tensorrt_cu12_bindings=={version}")
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path / "bindings")
    (tmp_path / "stub.c").write_text(STUBS)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.{version.split('.')[0]}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(tmp_path / "stub.c")]
        subprocess.run(command, check=True)
    wanted = {name: names_of(kind) for name, kind in Trt(Cudart()).classes.items()}
    script = f"""
import functools, json, tensorrt_bindings as trt
missing = []
for kind, names in {wanted!r}.items():
    owner = functools.reduce(getattr, kind.split("."), trt)
    missing += [kind + "." + name for name in names if not hasattr(owner, name)]
print(json.dumps([trt.__version__, missing]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "bindings"), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [version, []]


@pytest.mark.registry
@pytest.mark.parametrize("line", ["12", "13.0"])
def test_every_cuda_function_that_the_engine_calls_is_in_nvidias_bindings_with_these_arguments(line, request):
    """12 is JetPack 6's, 13.0 JetPack 7's (deploy/constraints-jp*.txt); and without a driver they say so instead of dying."""
    folder = pip(request, f"cuda-bindings-{line}", "install", "--only-binary", ":all:", f"cuda-bindings=={line}.*")
    wanted = {name: len(inspect.signature(getattr(Cudart, name)).parameters) - 1 for name in dir(Cudart) if name.startswith("cuda")}
    enums = {kind.__name__: names_of(kind) for kind in (Cudart.cudaError_t, Cudart.cudaMemcpyKind, Cudart.cudaStreamCaptureMode)}
    script = f"""
import json
from cuda.bindings import runtime
from edgekws.engines.tensorrt_engine import _Cuda, _gpu
from edgekws.errors import EngineUnavailable
counts = {{}}
for name in {[name for name in wanted if name not in enums]!r}:
    told = getattr(runtime, name).__doc__.splitlines()[0]
    inside = told[told.index("(") + 1 : told.rindex(")")]
    counts[name] = len(inside.split(",")) if inside else 0
missing = [kind + "." + name for kind, names in {enums!r}.items() for name in names if not hasattr(getattr(runtime, kind), name)]
try:
    found = _gpu(_Cuda(runtime))
except EngineUnavailable as error:
    found = str(error)
print(json.dumps([counts, missing, found]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    counts, missing, found = json.loads(done.stdout)
    assert counts == {name: count for name, count in wanted.items() if name not in enums}
    assert missing == []
    assert found


# NVIDIA's own parser and builder, without a GPU: TensorRT for RTX builds for a GPU that it is told of.

BUILD = """
import json, sys, tensorrt_rtx as trt
from pathlib import Path
from edgekws.engines.tensorrt_engine import _logger, configure, parse
from edgekws.errors import EngineUnavailable
found = {}
for path in map(Path, sys.argv[1:]):
    logger = _logger(trt)
    builder = trt.Builder(logger)
    try:
        network = parse(trt, logger, builder, path.read_bytes())
        config, cache = configure(trt, builder, b"")
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            found[path.name] = logger.told()
            continue
        found[path.name] = [len(bytes(plan)), network.num_inputs + network.num_outputs]
    except EngineUnavailable as error:
        found[path.name] = str(error)
        logger.told()
for what, data in {"truncated": bytes(plan)[:1000], "rubbish": b"rubbish"}.items():
    logger.told()
    found[what] = [trt.Runtime(logger).deserialize_cuda_engine(data), logger.told()]
print(json.dumps(found))
"""


def pruned(wanted):
    """The same network with ragged widths, as a knapsack over its channels leaves it."""
    wanted = json.loads(json.dumps(wanted))
    layers, width = wanted["layers"], None
    for i, layer in enumerate(layers):
        if isinstance(layer, dict):
            for inner in layer["residual"]:
                inner[0], inner[1] = width, width
            if len(layer["residual"]) == 2:
                layer["residual"][0][1] = layer["residual"][1][0] = 24 + 8 * (i % 3)
            continue
        layer[0] = width or layer[0]
        width = layer[1] = layer[0] if layer[6] > 1 else 40 + 8 * (i % 4)
        layer[6] = width if layer[6] > 1 else 1
    return wanted


@pytest.mark.registry
def test_nvidias_parser_and_builder_take_every_network_in_every_precision_pruned_or_not(request, tmp_path):
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    from edgekws.training.export import to_onnx
    from edgekws.training.networks import Network, spec
    from edgekws.training.quantise import half, quantise

    folder = pip(request, "tensorrt-rtx", "install", "tensorrt-rtx==1.7.1.116")
    torch.manual_seed(0)
    hops = np.random.default_rng(0).standard_normal((8, 4, 40)).astype(np.float32)
    states = {}
    for name in ("edge", "edge-small", "ds-cnn-s", "ds-cnn-m", "ds-cnn-l", "resnet15"):
        for kind, wanted in {"": spec(name), "-pruned": pruned(spec(name))}.items():
            path = tmp_path / f"{name}{kind}.fp32"
            graph, shapes = to_onnx(Network(wanted).eval())
            path.write_bytes(graph)
            half(path, path.with_suffix(".fp16"))
            quantise(path, shapes, hops, path.with_suffix(".int8"))
            states[f"{name}{kind}"] = sum(len(state.tensors) for state in shapes)
    for name in ("edge", "edge-small", "ds-cnn-l"):
        shutil.copy(find_model(name) / "model.onnx", tmp_path / f"{name}-packaged.fp32")
        states[f"{name}-packaged"] = sum(len(state.tensors) for state in load_model(find_model(name)).states)
    text = onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [1])
    upper = onnx.helper.make_tensor_value_info("upper", onnx.TensorProto.STRING, [1])
    node = onnx.helper.make_node("StringNormalizer", ["text"], ["upper"], case_change_action="UPPER")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "no network", [text], [upper])), tmp_path / "text.fp32")
    graphs = sorted(path for path in tmp_path.iterdir() if path.suffix in (".fp32", ".fp16", ".int8"))
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", BUILD, *map(str, graphs)], env=environment, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refusal, truncated, rubbish = found.pop("text.fp32"), found.pop("truncated"), found.pop("rubbish")
    assert truncated[0] is None and "deserializeCudaEngine: Error Code 1: Serialization" in truncated[1]
    assert rubbish[0] is None and "Internal Error" in rubbish[1]
    assert "refuses the graph: " in refusal and "Failed to convert ONNX date type" in refusal  # its own words
    assert len(found) == 3 * 12 + 3
    assert {name: told for name, told in found.items() if isinstance(told, str)} == {}
    assert all(count == 2 + states[name.split(".")[0]] for name, (_, count) in found.items())
