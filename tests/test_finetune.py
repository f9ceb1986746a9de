import dataclasses
import json

import numpy as np
import pytest

import edgekws
from edgekws.audio import read_recording
from edgekws.engines import load_engine
from edgekws.enrolment import enrol, pad
from edgekws.errors import EdgekwsError
from edgekws.frontend import HOP_FRAMES, log_mel
from edgekws.model import find_model, load_model

torch = pytest.importorskip("torch")
from pathlib import Path  # noqa: E402

from edgekws.training.export import load_network  # noqa: E402
from edgekws.training.finetune import Batches, Loss, finetune, steps_of, windows_of  # noqa: E402
from edgekws.training.sounds import WARM_HOPS, Example, Lesson, Lessons, Sound, crop, elsewhere, mix, said_again  # noqa: E402

torch.set_num_threads(1)
DEMO = Path(edgekws.__file__).parent / "demo"
TAKES = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
STREAM = read_recording(DEMO / "stream.flac")
TRUTH = json.loads((DEMO / "truth.json").read_text())


@pytest.fixture(scope="module")
def model():
    return load_model(find_model("edge-small"))


@pytest.fixture(scope="module")
def lessons(model):
    """The demo's speaker; the stream up to the first keyword and a noise are the room."""
    network, engine = load_network(model), load_engine(model)
    one = enrol(TRUTH["keyword"], "slt", TAKES, engine, model, plain=True)
    own = [Example(log_mel(pad(take)), (24_000 + len(take)) // 1280) for take in TAKES]
    noise = np.round(np.random.default_rng(0).standard_normal(16_000 * 6) * 300).astype(np.int16)
    room = [Sound(frames, steps_of(network, frames)) for frames in (log_mel(STREAM[: 16_000 * 4]), log_mel(noise))]
    return Lessons([Lesson(one.prototypes[0], one.threshold / one.scale + one.offset, own)], one.cohort, room, room[:1])


@pytest.mark.parametrize("gain_db", [-6.0, 0.0, 3.0])
def test_two_sounds_at_once_are_nearly_the_sum_of_their_power(gain_db):
    """What mixing leaves out is how two sounds cancel: it averages out over a recording, a median frame is off by 1 dB (0.06)."""
    speech = STREAM[: 16_000 * 20].astype(np.float32)
    noise = np.random.default_rng(1).standard_normal(len(speech)).astype(np.float32) * 400
    both = np.round(speech + noise * 10 ** (gain_db / 20)).astype(np.int16)
    found = mix(log_mel(speech.astype(np.int16)), log_mel(np.round(noise).astype(np.int16)), gain_db)
    off = found - log_mel(both)

    assert found.dtype == np.float32
    assert np.median(np.abs(off)) < 0.06
    assert abs(off.mean()) < 0.03
    assert np.percentile(np.abs(off), 99) < 0.5


def test_something_far_softer_changes_nothing():
    frames = log_mel(STREAM[:32_000])

    np.testing.assert_allclose(mix(frames, frames, -120.0), frames, atol=1e-5)
    np.testing.assert_allclose(mix(frames, frames, 0.0), frames + np.log(2) / 4, atol=1e-5)  # 3 dB


def test_a_crop_repeats_the_edge_of_a_recording():
    frames = np.arange(40.0)[:, None].repeat(40, 1).astype(np.float32)  # ten hops

    np.testing.assert_array_equal(crop(frames, 9, 3)[:, 0], np.arange(28, 40))
    np.testing.assert_array_equal(crop(frames, 0, 2)[:, 0], [0, 0, 0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(crop(frames, 10, 2)[:, 0], [36, 37, 38, 39, 39, 39, 39, 39])
    assert crop(frames, 100, 4).shape == (16, 40)
    assert crop(frames, -100, 4)[:, 0].tolist() == [0.0] * 16


def test_the_same_seed_draws_the_same_batches(lessons):
    first, second, other = Batches(lessons, 4), Batches(lessons, 4), Batches(lessons, 5)
    for _ in range(2):
        drawn = [batches.draw() for batches in (first, second, other)]

        assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
        assert not torch.equal(drawn[0][0], drawn[2][0])


def test_of_a_near_miss_nothing_is_taught_beyond_the_end_of_its_clip(lessons):
    """The listener cuts a clip 6 hops after its decision."""
    said = np.arange(1000, 1044, dtype=np.float32)[:, None].repeat(lessons.replay[0].taught.shape[1], 1)
    near = Sound(log_mel(STREAM[: 16_000 * 4])[: 44 * HOP_FRAMES], said, hop=37)
    _, _, _, taught, _ = Batches(dataclasses.replace(lessons, hard=[near]), 0).draw()
    drawn = [rows[WARM_HOPS:, 0] for rows in taught if rows[-1, 0] >= 1000]

    assert len(drawn) > 2 and all((rows.diff() == 1).all() for rows in drawn)


def test_what_is_wrong_for_one_keyword_pushes_no_other_down(model, lessons):
    """A near miss of the one may be the other, said clearly."""
    both = dataclasses.replace(lessons, keywords=[lessons.keywords[0], lessons.keywords[0]], replay=(), ambience=lessons.ambience[:1])
    near = dataclasses.replace(lessons.ambience[0], hop=30, but=(1,))
    *_, against = Batches(dataclasses.replace(both, hard=[near]), 0).draw()
    assert against[:, 0].all() and 0 < int((~against[:, 1]).sum()) < len(against)

    network, loss = load_network(model), Loss(both, 0.0)
    positives, keywords, negatives, taught, _ = Batches(both, 0).draw()
    all_of_them, none = torch.ones(len(negatives), 2, dtype=torch.bool), torch.zeros(len(negatives), 2, dtype=torch.bool)
    pushed, one, spared = (
        float(loss(network, (positives, keywords, negatives, taught, each)).detach())
        for each in (all_of_them, torch.stack([all_of_them[:, 0], none[:, 1]], 1), none)
    )
    assert one > spared and pushed > spared


def test_a_few_steps_lower_the_loss_and_the_same_seed_ends_in_the_same_weights(model, lessons):
    told = []
    networks = [load_network(model) for _ in range(2)]
    loss, batch = Loss(lessons, 0.5), Batches(lessons, 99).draw()
    before = float(loss(networks[0], batch).detach())
    seconds = [finetune(one, lessons, steps=8, lr=1e-3, seed=1, teacher_weight=0.5, step_done=told.append) for one in networks]

    assert float(loss(networks[0], batch)) < before
    assert min(seconds) > 0
    assert told == [1, 2, 3, 4, 5, 6, 7, 8] * 2
    assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True))


@pytest.mark.parametrize("where", ["frames", "gradient"])
def test_a_number_that_is_none_ends_training_with_one_sentence(model, lessons, where):
    network = load_network(model)
    if where == "frames":
        own = [Example(np.full_like(one.frames, np.nan), one.word_hop) for one in lessons.keywords[0].own]
        lessons = dataclasses.replace(lessons, keywords=[Lesson(lessons.keywords[0].prototype, 0.5, own)])
        wanted = "the loss is nan"
    else:  # an overflow that only the way back has
        next(network.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        wanted = "the gradient is"
    with pytest.raises(EdgekwsError, match=f"training gave up at step 1 of 1: {wanted}.*Nothing was changed"):
        network.requires_grad_(True)
        finetune(network, lessons, steps=1, lr=1e-3, seed=1, teacher_weight=0.5)


def test_training_may_be_given_up_at_any_step(model, lessons):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(load_network(model), lessons, steps=3, lr=1e-3, seed=1, teacher_weight=0.5, step_done=stop)


def test_a_long_recording_in_pieces_is_what_a_stream_says(model):
    network, engine = load_network(model), load_engine(model)
    frames = np.resize(log_mel(STREAM), (520 * HOP_FRAMES, 40))  # over the edge of a piece
    found = windows_of(network, steps_of(network, frames))
    heard = np.stack([engine.step(hop) for hop in frames.reshape(-1, HOP_FRAMES, 40)])

    assert np.abs(found - heard).max() <= 1e-4


def test_a_word_said_again_ends_where_the_word_ends():
    """A click in the recording, however it is stretched, stays at the hop that the example names."""
    frames = np.zeros((400, 40), np.float32)
    frames[(49 + 1) * HOP_FRAMES - 1] = 1.0
    rng = np.random.default_rng(3)
    for _ in range(20):
        again = said_again(Example(frames, 49), rng)
        assert again.frames.dtype == np.float32 and again.frames.shape[1] == 40
        assert abs(again.frames.max(1).argmax() // HOP_FRAMES - again.word_hop) <= 1
    assert 0.7 < len(again.frames) / len(frames) < 1.4


def test_the_room_at_another_time_is_not_the_same_and_as_loud():
    frames = log_mel(STREAM[: 16_000 * 4])
    rng = np.random.default_rng(3)
    moved = [elsewhere(frames, rng) for _ in range(20)]

    assert all(one.shape[1] == 40 and one.dtype == np.float32 for one in moved)
    assert np.std([len(one) for one in moved]) > 0.1 * len(frames)
    assert np.mean([one.mean() for one in moved]) == pytest.approx(frames.mean(), abs=0.1)
