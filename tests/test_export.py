import json

import numpy as np
import pytest

from edgekws.engines import load_engine
from edgekws.errors import ModelError
from edgekws.frontend import N_MELS
from edgekws.model import Model

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
from test_networks import NAMES, lively, noise_hops  # noqa: E402

from edgekws.training.export import load_network, save_model, to_onnx  # noqa: E402
from edgekws.training.networks import CausalConv, ConvSpec, Network  # noqa: E402


@pytest.fixture(scope="module")
def hops() -> np.ndarray:
    return noise_hops()


def saved(network: Network, path, hops: np.ndarray, **facts) -> Model:
    return save_model(network, path, id="0001-test", name="test", golden_frames=hops, facts=facts)


@torch.no_grad()
def by_torch(network: Network, hops: np.ndarray) -> np.ndarray:
    return network(torch.from_numpy(hops.reshape(1, -1, N_MELS)))[0].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_equals_pytorch(name, hops, tmp_path):
    network = lively(name)
    engine = load_engine(saved(network, tmp_path / "model", hops), "onnxruntime")

    assert np.abs(np.stack([engine.step(hop) for hop in hops]) - by_torch(network, hops)).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_of_a_whole_window_equals_pytorch(name, hops):
    import onnxruntime

    network = lively(name)
    graph, states = to_onnx(network, window_hops=12)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"frames": hops[:12].reshape(1, -1, N_MELS)})

    assert states == []
    assert np.abs(embedding[0] - by_torch(network, hops[:12])[-1]).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_no_shape_is_dynamic(name):
    graph = onnx.load_from_string(to_onnx(lively(name))[0]).graph

    for value in (*graph.input, *graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_holds_the_parameters_that_the_manifest_counts(name, hops, tmp_path):
    model = saved(lively(name), tmp_path / "model", hops)
    tensors = onnx.load(model.path / "model.onnx").graph.initializer

    assert model.parameters == sum(int(np.prod(t.dims)) for t in tensors if t.name.endswith((".weight", ".bias")))


def test_batch_norm_is_folded_into_the_convolution():
    torch.manual_seed(0)
    conv = CausalConv(ConvSpec(6, 8, 3, 3, 1, 1, 2, False), norm=True).eval()
    conv.norm.running_mean.uniform_(-2, 2)
    conv.norm.running_var.uniform_(0.1, 4)
    conv.norm.weight.data.uniform_(-2, 2)
    conv.norm.bias.data.uniform_(-2, 2)
    folded = CausalConv(conv.spec, norm=False).eval()
    folded.conv.weight.data, folded.conv.bias.data = (t.detach() for t in conv.folded())
    x = torch.randn(2, 6, 9, 10)
    with torch.no_grad():
        difference = (conv(x) - folded(x)).abs().max()

    assert difference <= 1e-5


@pytest.mark.parametrize("name", ["edge-small", "ds-cnn-s", "resnet15"])
def test_a_network_comes_back_from_its_model(name, hops, tmp_path):
    network = lively(name)
    back = load_network(saved(network, tmp_path / "model", hops))

    assert np.abs(by_torch(back, hops) - by_torch(network, hops)).max() <= 1e-5
    assert to_onnx(back) == to_onnx(network)


def test_a_model_directory_is_never_overwritten(hops, tmp_path):
    model = saved(lively("edge-small"), tmp_path / "model", hops)
    before = {path.name: path.read_bytes() for path in model.path.iterdir()}

    with pytest.raises(ModelError, match=r"model: already there, and a model version never changes\. Give another directory"):
        saved(lively("ds-cnn-s"), tmp_path / "model", hops)

    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == before


def test_an_export_cut_short_leaves_nothing(hops, tmp_path):
    with pytest.raises(TypeError):
        saved(lively("edge-small"), tmp_path / "model", hops, recipe=object())  # no JSON

    assert list(tmp_path.iterdir()) == []


def test_facts_stand_in_the_manifest(hops, tmp_path):
    model = saved(lively("edge-small"), tmp_path / "model", hops, seeds=[1, 2], trained_on_sha256=["0123456789abcdef"])

    assert json.loads((model.path / "manifest.json").read_text())["seeds"] == [1, 2]
    assert model.trained_on_sha256 == {"0123456789abcdef"}
