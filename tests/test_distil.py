"""The lessons, on material made by hand: no claim about accuracy."""

import numpy as np
import pytest
import torch

from edgekws.errors import EdgekwsError
from edgekws.training.distil import CROP_HOPS, Crops, Projection, distil, word_loss
from edgekws.training.material import Material
from edgekws.training.networks import Network, spec


@pytest.fixture(scope="module")
def material():
    """Targets that can be told from the frames: a slow wave in the mel bins, the same wave in the teacher's numbers."""
    rng = np.random.default_rng(0)
    hops = 400
    wave = np.cumsum(rng.standard_normal((hops, 4)), 0)
    wave = (wave - wave.mean(0)) / wave.std(0)
    frames = np.repeat(wave @ rng.standard_normal((4, 40)), 4, 0)
    copies = np.stack([frames + 0.1 * rng.standard_normal(frames.shape) for _ in range(2)]).astype(np.float16)
    targets = (wave @ rng.standard_normal((4, 96)) + 0.1 * rng.standard_normal((hops, 96))).astype(np.float16)
    targets[:9] = np.nan
    words = np.array([[word, speaker, 60 + 30 * word + 100 * speaker] for word in range(3) for speaker in range(3)])
    return Material(copies, targets, np.array([0, 150, 400]), np.array([0, 1]), words)


def test_the_projection_is_centred_on_speech_of_both_kinds(material):
    projection = Projection.fit(material, 8)
    balanced = [
        projection(part[~np.isnan(part).any(1)].astype(np.float32)).mean(0) for part in (material.targets[:150], material.targets[150:])
    ]

    assert projection(material.targets).shape == (400, 8)
    assert np.abs(np.mean(balanced, 0)).max() < 0.5
    assert np.isnan(projection(material.targets)[:9]).all()


def test_training_lowers_the_loss(material, capsys):
    torch.set_num_threads(1)
    torch.manual_seed(0)

    history, _ = distil(Network(spec("edge-small")), material, Projection.fit(material, 32), steps=200, batch=4, seed=0)

    assert len(history) == 2
    assert history[1] < 0.8 * history[0]
    assert "step 200 of 200" in capsys.readouterr().err


@pytest.fixture
def train(material, tmp_path):
    """The same lessons in 12 steps, kept every 5; they may be killed before a step."""

    def train(killed_before=None, **changed):
        torch.manual_seed(0)
        network = Network(spec("edge-tiny"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgekws.training.distil.KEPT_EVERY", 5)
            drawn = []

            def draw(crops, draw=Crops.draw):
                drawn.append(None)
                if len(drawn) == killed_before:
                    raise KeyboardInterrupt
                return draw(crops)

            patch.setattr(Crops, "draw", draw)
            recipe = {"steps": 12, "batch": 6, "seed": 0, "word_weight": 1.0, "halfway": tmp_path / "kept.npz", **changed}
            distil(network, material, Projection.fit(material, 32), **recipe)
        return len(drawn), [p.detach().numpy().copy() for p in network.state_dict().values()]

    return train


def test_training_that_was_killed_goes_on_to_the_same_weights(train, capsys):
    whole = train(halfway=None)[1]
    with pytest.raises(KeyboardInterrupt):
        train(killed_before=9)
    count, weights = train()

    assert count == 8 and "going on after step 5 of 12" in capsys.readouterr().err
    for one, other in zip(weights, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_goes_on_from_nothing_else(train, tmp_path):
    train()
    with pytest.raises(EdgekwsError, match=r"kept\.npz: made with other settings \(steps 12, now 20\)\. .*remove it"):
        train(steps=20)
    (tmp_path / "kept.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(EdgekwsError, match=r"kept\.npz: training cannot go on from it: .* Remove it"):
        train()


def test_a_source_of_recordings_is_drawn_as_often_as_text_to_speech_however_short():
    lengths, source = np.array([1000, 4000, 4000]), np.array([1, 0, 0])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    hops = int(starts[-1])
    frames = np.repeat(np.repeat(source, lengths), 4)[None, :, None].repeat(40, 2).astype(np.float16)
    long = Material(frames, np.zeros((hops, 96), np.float16), starts, source, np.zeros((0, 3), np.int64))

    crops = Crops(long, np.zeros((hops, 32), np.float32), 200, 0, seed=0)
    recorded = np.mean([float(crops.draw().frames[:, 0, 0].mean()) for _ in range(20)])

    assert recorded == pytest.approx(0.5, abs=0.04)


def test_crops_hold_pairs_of_one_word_by_two_speakers_and_never_leave_a_stream(material):
    crops = Crops(material, Projection.fit(material, 32)(material.targets), 8, 2, seed=0)
    for _ in range(20):
        batch = crops.draw()

        assert batch.frames.shape == (8, CROP_HOPS * 4, 40)
        assert batch.word[0] == batch.word[1] != batch.word[2] == batch.word[3]
        assert (batch.word[4:] == -1).all()
        assert (batch.word_hop < CROP_HOPS).all()


def test_words_apart_cost_less_than_words_alike(material):
    network = Network(spec("edge-small"))
    batch = Crops(material, Projection.fit(material, 32)(material.targets), 8, 2, seed=0).draw()
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(8, CROP_HOPS, 32, generator=generator)
    apart[1], apart[3] = apart[0], apart[2]
    for pair in (0, 2):  # both speakers at the same place in their pieces
        batch.word_hop[pair + 1] = batch.word_hop[pair]
    alike = torch.randn(1, CROP_HOPS, 32, generator=generator).expand(8, -1, -1) + 0.5 * torch.randn(8, CROP_HOPS, 32, generator=generator)

    assert word_loss(network, apart, batch) < word_loss(network, alike, batch)


def test_too_few_words_say_what_to_do(material):
    with pytest.raises(EdgekwsError, match="Give more --spoken-minutes"):
        Crops(material, np.zeros((400, 32), np.float32), 32, 8, seed=0)
