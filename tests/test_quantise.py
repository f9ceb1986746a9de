from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from edgekws.audio import read_recording
from edgekws.detector import Detector
from edgekws.engines import load_engine, parity
from edgekws.enrolment import embed, enrol
from edgekws.errors import ModelError
from edgekws.model import find_model, golden, load_model, write_manifest
from edgekws.pipeline import Pipeline
from edgekws.training import quantise
from edgekws.training.quantise import half, moved_on, version
from edgekws.values import AudioChunk

DEMO = Path(str(resources.files("edgekws") / "demo"))


@pytest.fixture(scope="module")
def takes():
    return [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]


@pytest.fixture(scope="module")
def stream():
    return read_recording(DEMO / "stream.flac")


@pytest.fixture(scope="module", params=["edge", "edge-small", "edge-tiny", "ds-cnn-l"])
def both(request, tmp_path_factory, takes, stream):
    """A packaged model, and its INT8 version calibrated on the enrolment and the first 8 s of the stream."""
    from edgekws.frontend import LogMel

    frontend = LogMel()
    heard = np.concatenate([*takes, stream[: 8 * 16_000]])
    frames = np.stack([frontend.hop(heard[i : i + 1280]) for i in range(0, len(heard) - 1279, 1280)])
    model = load_model(find_model(request.param))
    return model, version(model, tmp_path_factory.mktemp("models") / "int8", id="int8", precision="int8", frames=frames)


def test_an_int8_version_is_less_than_a_third_and_hears_the_same(both, stream):
    model, small = both
    engines = [load_engine(one, "onnxruntime") for one in both]
    whole, eighth = (embed(stream, engine) for engine in engines)

    assert [engine.precision for engine in engines] == ["fp32", "int8"]
    assert (small.path / "model_int8.onnx").stat().st_size < 0.31 * (model.path / "model.onnx").stat().st_size
    assert np.median((whole * eighth).sum(1)) > (0.997 if quantise._overflows() else 0.998)
    assert (whole * eighth).sum(1).min() > 0.98


def test_an_int8_version_hears_the_same_where_it_is_much_louder_than_what_it_was_calibrated_on(both, stream):
    rumble = np.cumsum(np.random.default_rng(0).standard_normal(len(stream)))
    rumble -= np.convolve(rumble, np.ones(800) / 800, "same")
    loud = np.clip(stream * 16.0 + rumble * (60_000 / np.abs(rumble).max()), -32768, 32767).astype(np.int16)
    whole, eighth = (embed(loud, load_engine(one, "onnxruntime")) for one in both)

    assert (whole * eighth).sum(1).min() > 0.95


def test_a_keyword_enrolled_in_int8_wakes_where_it_does_in_float32(both, takes, stream):
    def wakes(model):
        engine = load_engine(model, "onnxruntime")
        enrolled = enrol("open sesame", "", takes, engine, model)
        return Pipeline(engine, Detector([enrolled])).feed(AudioChunk(stream, 0))

    whole, eighth = (wakes(model) for model in both)
    assert len(whole) >= 4
    assert [abs(one.end_sample - other.end_sample) <= 4 * 1280 for one, other in zip(whole, eighth, strict=True)] == [True] * len(whole)


def test_an_int8_version_is_held_to_its_own_golden_embeddings(both):
    model, small = both

    assert parity(load_engine(small, "onnxruntime"), small) == 0
    assert np.abs(golden(small)[1] - golden(model)[1]).max() > 1e-3


def test_the_graph_is_signed_symmetric_per_channel_and_without_integer_biases(both):
    """What TensorRT takes; states stay float32."""
    graph = onnx.load(both[1].path / "model_int8.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    weights = [tensors[node.input[0]] for node in steps if node.input[0] in tensors]

    assert {tensors[node.input[2]].dtype for node in steps} == {np.dtype(np.int8)}
    assert not any(tensors[node.input[2]].any() for node in steps)
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8)}
    assert all(tensors[node.input[1]].size in tensors[node.input[0]].shape for node in steps if node.input[0] in tensors)
    assert all(np.abs(weight).max() == (64 if quantise._overflows() else 127) for weight in weights)
    assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "flags : avx2 fma", True),
        ("x86_64", "flags : avx2 avx512f avx512_vnni", False),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", "Features : asimd asimddp", False),
    ],
)
def test_weights_have_7_bits_where_products_of_8_overflow(machine, flags, overflows, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise.platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)

    assert quantise._overflows(tmp_path / "cpuinfo") is overflows


def test_every_product_is_an_int8_kernel_on_the_cpu(both, tmp_path, monkeypatch):
    """And not a float one that unpacks its weights at every step, which costs two to twelve times as much."""
    made = ort.InferenceSession

    def keeping(path, options, **more):
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        return made(path, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", keeping)
    load_engine(both[1], "onnxruntime")
    written = [node.op_type for node in onnx.load(both[1].path / "model_int8.onnx").graph.node]
    run = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    products = written.count("MatMul") - 2 * (both[0].network == "ds-cnn-l")  # its cepstrum and its mean stay float32

    assert run.count("MatMulIntegerToFloat") == products
    assert run.count("DequantizeLinear") == 0


def test_float16_is_half_and_golden(tmp_path):
    model = load_model(find_model("edge"))
    small = half(model.path / "model.onnx", tmp_path / "half.onnx")
    session = ort.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    held = {one.name: np.zeros(one.shape, np.float32) for one in session.get_inputs()[1:]}
    off = 0.0
    for hop, wanted in zip(*golden(model), strict=True):
        embedding, *left = session.run(None, {"frames": hop[None], **held})
        held = moved_on(model.states, held, left)
        off = max(off, float(np.abs(embedding[0] - wanted).max()))

    assert small.stat().st_size < 0.52 * (model.path / "model.onnx").stat().st_size
    assert 1e-6 < off < 5e-4


def test_an_int8_version_needs_audio_to_calibrate_on(tmp_path):
    with pytest.raises(ModelError, match="at least one hop of audio"):
        version(load_model(find_model("edge-small")), tmp_path / "int8", id="int8", precision="int8")

    assert list(tmp_path.iterdir()) == []


def test_a_version_never_changes(both):
    with pytest.raises(ModelError, match="already there"):
        version(both[0], both[1].path, id="again", precision="fp16")


def test_a_manifest_that_says_int8_must_bring_the_file(both, tmp_path):
    for name in ("model.onnx", "parity.npz"):
        (tmp_path / name).write_bytes((both[1].path / name).read_bytes())
    write_manifest(tmp_path, {key: value for key, value in both[1].raw.items() if key != "files"})

    with pytest.raises(ModelError, match=r'"files" does not list model_int8\.onnx'):
        load_model(tmp_path)
