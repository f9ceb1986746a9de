import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from edgekws.engines import PARITY_TOLERANCE, load_engine, onnxruntime_cuda_engine, onnxruntime_engine, parity
from edgekws.errors import EngineUnavailable, ModelError
from edgekws.model import Model, find_model, golden, load_model, write_manifest


@pytest.fixture
def model() -> Model:
    return load_model(find_model("edge-small"))


def altered(original: Model, path, **files: bytes | dict) -> Model:
    """A copy with other files (bytes, or arrays for a .npz) and a manifest that vouches for them."""
    shutil.copytree(original.path, path)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / f"{name}.onnx").write_bytes(content)
        else:
            np.savez_compressed(path / f"{name}.npz", **content)
    write_manifest(path, {key: value for key, value in original.raw.items() if key != "files"})
    return load_model(path)


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize("name", ["edge", "edge-small"])
def test_a_shipped_model_runs_here(name, backend):
    model = load_model(find_model(name))
    engine = load_engine(model, backend)

    assert (engine.name, engine.precision, engine.dim) == ("onnxruntime", "fp32", model.dim)
    assert parity(engine, model) <= 1e-4


def test_an_engine_that_computes_something_else_is_refused_with_the_reason(model, tmp_path):
    frames, embeddings = golden(model)
    wrong = altered(model, tmp_path / "model", parity={"frames": frames, "embeddings": embeddings + 2 * PARITY_TOLERANCE["fp32"]})

    with pytest.raises(EngineUnavailable) as refusal:
        load_engine(wrong, "onnxruntime")

    assert str(refusal.value).startswith("no inference engine can run here\n  onnxruntime: differs from the golden embeddings of ")
    assert str(refusal.value).endswith(" by 0.002, accepted is 0.001 in fp32")


def test_golden_embeddings_that_are_no_numbers_are_refused(model, tmp_path):
    frames, embeddings = golden(model)
    wrong = altered(model, tmp_path / "model", parity={"frames": frames, "embeddings": embeddings * np.nan})

    with pytest.raises(EngineUnavailable, match="by nan, accepted is"):
        load_engine(wrong)


def test_a_graph_that_onnx_runtime_cannot_read_is_a_model_error(model, tmp_path):
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime refuses it"):
        load_engine(altered(model, tmp_path / "model", model=b"not a graph"))


@pytest.mark.parametrize("change", [{"states": "name"}, {"states": "shape"}, {"dim": 7}], ids=str)
def test_a_manifest_whose_names_or_shapes_the_graph_does_not_have_is_a_model_error(model, tmp_path, change):
    """No hash protects it, and a start goes back from a version that is a ModelError."""
    path = shutil.copytree(model.path, tmp_path / "altered")
    raw = json.loads((path / "manifest.json").read_text())
    if change == {"states": "name"}:
        raw["states"][0][0] += "x"
    elif change == {"states": "shape"}:
        raw["states"][0][1] = [1, 2, 3]
    else:
        raw |= change
    (path / "manifest.json").write_text(json.dumps(raw))

    with pytest.raises(ModelError, match="damaged"):
        load_engine(load_model(path))


def test_an_unknown_backend_lists_those_accepted(model):
    with pytest.raises(EngineUnavailable, match='no engine "tensorflow"') as refusal:
        load_engine(model, "tensorflow")

    assert "Accepted: auto, onnxruntime, tensorrt, onnxruntime-cuda, tensorrt-refit, null" in str(refusal.value)


def test_reset_starts_a_new_stream(model):
    engine = load_engine(model)
    frames, _ = golden(model)
    first = [engine.step(hop) for hop in frames[:5]]
    engine.reset()

    assert np.array_equal([engine.step(hop) for hop in frames[:5]], first)


def test_an_embedding_is_the_callers_to_keep(model):
    engine = load_engine(model)
    frames, _ = golden(model)
    first = engine.step(frames[0])
    kept = first.copy()
    engine.step(frames[1])

    assert np.array_equal(first, kept)


def test_engines_side_by_side_do_not_mix_their_streams(model):
    frames, _ = golden(model)
    one, other, alone = load_engine(model), load_engine(model), load_engine(model)
    mixed = []
    for hop in frames[:8]:
        mixed.append(one.step(hop))
        other.step(-hop)

    assert np.array_equal(mixed, [alone.step(hop) for hop in frames[:8]])


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for ONNX Runtime that is this processor, its memory apart from the host's. `fails`: what each use raises from then on."""
    import onnxruntime as ort

    made, updated = ort.OrtValue.ortvalue_from_numpy, ort.OrtValue.update_inplace

    class Gpu:
        fails = ""

        def value(self, array, device):
            return made(self.reached(array).copy(), "cpu") if device == "cuda" else made(array, device)

        def reached(self, array):
            if self.fails:
                raise RuntimeError(self.fails)
            return array

    one = Gpu()
    monkeypatch.setattr(onnxruntime_engine, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", staticmethod(one.value))
    monkeypatch.setattr(ort.OrtValue, "update_inplace", lambda value, array: updated(value, one.reached(array)))
    return one


def test_with_its_buffers_on_a_gpu_onnx_runtime_gives_the_golden_embeddings(gpu, model):
    engine = load_engine(model, "onnxruntime-cuda")

    assert engine.name == "onnxruntime-cuda"
    assert parity(engine, model) <= 1e-4
    assert parity(engine, model) <= 1e-4  # after a reset too


def test_a_gpu_out_of_memory_leaves_the_listening_to_the_processor(gpu, model, caplog):
    gpu.fails = "Failed to allocate memory for requested buffer of size 16384"
    engine = load_engine(model, "onnxruntime-cuda", fall_back=True)

    assert engine.name == "onnxruntime"
    assert f"onnxruntime-cuda: ONNX Runtime failed on the GPU: {gpu.fails}" in caplog.text


@pytest.mark.parametrize("use", ["step", "reset"])
def test_a_gpu_that_fails_in_the_middle_leaves_it_too(use, gpu, model, caplog):
    engine = load_engine(model, "onnxruntime-cuda", fall_back=True)
    frames, embeddings = golden(model)
    engine.step(frames[0])
    gpu.fails = "CUDA failure 700: an illegal memory access was encountered"
    if use == "reset":
        engine.reset()
    got = np.stack([engine.step(hop) for hop in frames])

    assert engine.name == "onnxruntime"
    assert np.abs(got - embeddings).max() <= 1e-4  # as a stream that begins there
    assert (
        f"engine onnxruntime-cuda failed while listening, onnxruntime takes over: ONNX Runtime failed on the GPU: {gpu.fails}"
        in caplog.text
    )


def test_without_cuda_the_reason_says_how_to_get_it():
    if onnxruntime_cuda_engine.why_unavailable() is None:
        pytest.skip("ONNX Runtime has CUDA here")

    assert (
        "is built without CUDA (pip uninstall onnxruntime, then pip install onnxruntime-gpu)" in onnxruntime_cuda_engine.why_unavailable()
    )


def test_the_null_engine_hears_nothing(model):
    engine = load_engine(model, "null")

    assert engine.step(np.ones((4, 40), np.float32)).tolist() == [0.0] * model.dim


def test_a_board_out_of_memory_ends_who_prepares_an_engine_before_others():
    code = "import atexit; atexit.register(lambda: print(open('/proc/self/oom_score_adj').read())); "
    code += "from edgekws.engines import prepare; prepare('/nowhere', 'onnxruntime')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == "500", done.stderr


def test_onnxruntime_keeps_no_telemetry(tmp_path):
    script = (
        "from edgekws.engines import load_engine; from edgekws.model import find_model, load_model;"
        "load_engine(load_model(find_model('edge-small')), 'onnxruntime')"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", script], env=env | {"HOME": str(tmp_path)}, check=True)

    assert list(tmp_path.rglob("*")) == []
