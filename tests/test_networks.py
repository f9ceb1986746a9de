import numpy as np
import pytest

from edgekws.frontend import HOP_FRAMES, N_MELS, log_mel
from edgekws.values import HOP_MS

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
from edgekws.training.networks import Network, spec  # noqa: E402

NAMES = ("edge", "edge-small", "edge-tiny", "ds-cnn-s", "ds-cnn-m", "ds-cnn-l", "resnet15")
HOPS = 100


def lively(name: str, seed: int = 0) -> Network:
    """A network whose batch norms have seen something: statistics away from zero and one."""
    torch.manual_seed(seed)
    network = Network(spec(name)).eval()
    for conv in network.convs():
        conv.norm.running_mean.uniform_(-0.3, 0.3)
        conv.norm.running_var.uniform_(0.3, 1.5)
        conv.norm.weight.data.uniform_(0.7, 1.3)
        conv.norm.bias.data.uniform_(-0.2, 0.2)
    return network


def noise_hops() -> np.ndarray:
    """(100, 4, 40): eight seconds of noise that swells and fades, through the real front-end."""
    n = np.arange(HOPS * HOP_MS * 16)
    noise = np.random.default_rng(0).standard_normal(len(n)) * 4000 * np.sin(np.pi * n / 16000) ** 2
    return log_mel(noise.astype(np.int16)).reshape(HOPS, HOP_FRAMES, N_MELS)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """(1, 400, 40)."""
    return torch.from_numpy(noise_hops().reshape(1, -1, N_MELS))


@torch.no_grad()
def streamed(network: Network, frames: torch.Tensor, hops_a_step: int = 1) -> torch.Tensor:
    states, embeddings = network.initial_states(), []
    for part in frames.split(HOP_FRAMES * hops_a_step, 1):
        embedding, states = network.step(part, states)
        embeddings.append(embedding)
    return torch.cat(embeddings, 1)


@pytest.mark.parametrize("name", NAMES)
def test_streaming_equals_the_whole_window(name, frames):
    network = lively(name)
    with torch.no_grad():
        whole = network(frames)

    assert (streamed(network, frames) - whole).abs().max() <= 1e-5
    assert whole.shape == (1, HOPS, network.dim)
    assert whole[0].std(0).max() > 1e-3  # it does hear something


@pytest.mark.parametrize("name", NAMES)
def test_several_hops_in_one_step_equal_one_by_one(name, frames):
    network = lively(name)

    assert (streamed(network, frames, 5) - streamed(network, frames)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_have_unit_length_for_silence_too(name, frames):
    network = lively(name)
    silence = torch.from_numpy(log_mel(np.zeros(16000, np.int16)))[None, :48]
    with torch.no_grad():
        lengths = torch.cat([network(frames), network(silence)], 1).norm(dim=2)

    assert (lengths - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_nothing_before_the_receptive_field_matters(name, frames):
    """And its first frame does, so that the manifest claims neither too little nor too much. 12 ms are the front-end's look back."""
    network = lively(name).double()
    reach = round((network.receptive_field_ms() - 12) * HOP_FRAMES / HOP_MS)  # frames
    last = frames.double()[:, -4 * (reach // 4 + 3) :]
    first = last.shape[1] - reach
    before, inside = last.clone(), last.clone()
    before[:, :first] += 3
    inside[:, first] += 100
    with torch.no_grad():
        wanted, other, changed = (network(x)[0, -1] for x in (last, before, inside))

    assert torch.equal(wanted, other)
    assert not torch.equal(wanted, changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_each_gives_alone(name, frames):
    network = lively(name)
    two = torch.cat([frames[:, :80], frames[:, 80:160]])
    with torch.no_grad():
        alone = torch.cat([network(one[None]) for one in two])

        assert (network(two) - alone).abs().max() <= 1e-5


def test_ds_cnn_l_has_the_size_of_the_paper():
    assert 400_000 < Network(spec("ds-cnn-l")).parameter_count() < 430_000


def test_multiply_adds_are_those_of_the_convolutions_run(frames):
    """Counted by hooks over one second."""
    network = lively("ds-cnn-m")
    counted = 0

    def count(layer, _, output):
        nonlocal counted
        counted += layer.weight.numel() * output.shape[2] * output.shape[3]

    for conv in network.convs():
        conv.conv.register_forward_hook(count)
    with torch.no_grad():
        network(frames[:, :200])
    seconds = 200 * HOP_MS / HOP_FRAMES / 1000
    head = (network.head.weight.numel() + HOP_FRAMES * N_MELS * 10) * 1000 / HOP_MS

    assert network.macs_per_s() == pytest.approx(counted / seconds + head)


def test_an_unknown_network_lists_those_there_are():
    with pytest.raises(KeyError, match=r'no network "ds-cnn-xl"\. Accepted: edge, edge-small, edge-tiny, ds-cnn-s'):
        spec("ds-cnn-xl")
