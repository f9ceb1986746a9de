import numpy as np
import pytest

from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.frontend import LogMel
from edgekws.model import Model, find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.pseudo_labels import PseudoLabels
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Detection, Enrolled

NEVER = 2.0  # no score is above one


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(find_model("edge-small"))


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """Six seconds and a bit of noise whose level and colour wander, so that no two hops are alike."""
    random = np.random.default_rng(0)
    count = 6 * SAMPLE_RATE_HZ + 777
    loud = np.interp(np.arange(count), np.arange(0, count + 4000, 4000), random.uniform(0, 9000, count // 4000 + 2))
    return np.clip(np.convolve(random.standard_normal(count), [1, 0.7, 0.2], "same") * loud, -32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def word(model, samples) -> np.ndarray:
    """The embedding of this very stream after 30 hops, as a prototype."""
    engine, frontend = load_engine(model), LogMel()
    for first in range(0, 30 * HOP_SAMPLES, HOP_SAMPLES):
        embedding = engine.step(frontend.hop(samples[first : first + HOP_SAMPLES]))
    return embedding[None]


def enrolled(word: np.ndarray, threshold: float) -> list[Enrolled]:
    return [Enrolled("word", "ann", word, threshold)]


def listen(pipeline: Pipeline, samples: np.ndarray, sizes, first: int = 0) -> list[Detection]:
    """Feed all samples in chunks of `sizes`, again and again; the first is at index `first` of the stream."""
    found, at = [], 0
    while at < len(samples):
        for size in sizes:
            if at < len(samples):
                chunk = samples[at : at + size]
                found += pipeline.feed(AudioChunk(chunk, first + at))
                at += len(chunk)
    return found


CHUNKS = {"1": [1], "160": [160], "1280": [1280], "16000": [16000], "everything": [10**9], "odd": [1, 1279, 3, 4001, 641, 1280, 2560]}


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_any_chunking_gives_the_same_scores_bit_for_bit(model, samples, word, sizes):
    """Threshold below every score and no refractory time: each hop is a detection, which holds its score."""
    every = [Detector(enrolled(word, -NEVER), refractory_s=0) for _ in range(2)]
    wanted = listen(Pipeline(load_engine(model), every[0]), samples, [1280])

    assert listen(Pipeline(load_engine(model), every[1]), samples, sizes) == wanted
    assert len(wanted) == len(samples) // HOP_SAMPLES
    assert len({one.score for one in wanted}) > len(wanted) // 2


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_any_chunking_gives_the_same_detections(model, samples, word, sizes):
    """A word is heard where it ends, once."""
    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, 0.99999), refractory_s=2))
    (found,) = listen(pipeline, samples, sizes)

    assert (found.keyword, found.speaker, found.end_sample) == ("word", "ann", 30 * HOP_SAMPLES)
    assert found.score == pytest.approx(1, abs=1e-5)
    assert pipeline.hops == len(samples) // HOP_SAMPLES


def test_a_gap_starts_anew(model, samples, word):
    """After lost samples nothing from before them counts: not the pending samples, the front-end's or the network's past."""
    fresh = Pipeline(load_engine(model), Detector(enrolled(word, -NEVER), refractory_s=0))
    torn = Pipeline(load_engine(model), Detector(enrolled(word, -NEVER), refractory_s=0))
    torn.feed(AudioChunk(samples[:20_500], 0))
    first = 20_500 + 3200
    heard = torn.feed(AudioChunk(samples[:16_000], first, gap_samples=3200))

    assert heard == fresh.feed(AudioChunk(samples[:16_000], first))
    assert heard[0].end_sample == first + HOP_SAMPLES


def test_two_halves_of_a_word_across_a_gap_are_no_word(model, samples, word):
    whole, torn = (Pipeline(load_engine(model), Detector(enrolled(word, 0.99999))) for _ in range(2))
    middle, end = 25 * HOP_SAMPLES, 30 * HOP_SAMPLES
    chunks = [AudioChunk(samples[:middle], 0), AudioChunk(samples[middle:end], middle)]
    lost = AudioChunk(chunks[1].samples, middle + 1600, gap_samples=1600)

    assert [len(whole.feed(chunk)) for chunk in chunks] == [0, 1]
    assert [len(torn.feed(chunk)) for chunk in (chunks[0], lost)] == [0, 0]


@pytest.mark.parametrize(("gap_s", "heard"), [(0.1, 0), (1.0, 1)])
def test_refractory_time_holds_over_a_gap(model, samples, word, gap_s, heard):
    """The word takes 2.4 s here: 0.1 s later its second end is 2.5 s after the first, of 3 s refractory; 1 s later it is past them."""
    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, 0.99999), refractory_s=3))
    end, gap = 30 * HOP_SAMPLES, round(gap_s * SAMPLE_RATE_HZ)

    assert len(pipeline.feed(AudioChunk(samples[:end], 0))) == 1
    assert len(pipeline.feed(AudioChunk(samples[:end], end + gap, gap_samples=gap))) == heard


@pytest.mark.parametrize(
    "extreme",
    [np.zeros(32_000, np.int16), np.tile(np.array([32767] * 20 + [-32768] * 20, np.int16), 800), np.full(32_000, -32768, np.int16)],
    ids=["digital silence", "full scale", "stuck at the rail"],
)
def test_scores_are_numbers_whatever_the_sound_card_delivers(model, word, extreme):
    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, -NEVER), refractory_s=0))
    found = listen(pipeline, extreme, [4000])

    assert len(found) == 25
    assert np.isfinite([one.score for one in found]).all()
    assert max(abs(one.score) for one in found) <= 1.00001


def test_less_than_a_hop_decides_nothing(model, word):
    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, -NEVER)))

    assert pipeline.feed(AudioChunk(np.zeros(0, np.int16), 0)) == []
    assert pipeline.feed(AudioChunk(np.zeros(HOP_SAMPLES - 1, np.int16), 0)) == []
    assert pipeline.hops == 0
    assert len(pipeline.feed(AudioChunk(np.zeros(1, np.int16), HOP_SAMPLES - 1))) == 1


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_any_chunking_gives_the_same_clips(model, samples, word, sizes):
    """With a threshold that its scores lie around, and a gap."""

    def cuts(sizes):
        labels = PseudoLabels(enrolled(word, 0.9))
        pipeline = Pipeline(load_engine(model), Detector(enrolled(word, 0.9), refractory_s=2), labels)
        listen(pipeline, samples[:60_000], sizes)
        pipeline.feed(AudioChunk(samples[:0], 64_000, gap_samples=4000))
        listen(pipeline, np.tile(samples, 2), sizes, 64_000)
        return [(one.clip, one.end_sample, one.samples.tobytes()) for one in pipeline.cuts + labels.end()]

    wanted = cuts([1280])

    assert cuts(sizes) == wanted
    assert {one[0].label for one in wanted} >= {"positive", "between"}


def test_the_version_before_hears_the_same_and_does_not_act(model, samples, word):
    """The one in use wakes at nothing: what the other would have woken at is kept, at the very hops at which it would wake alone."""
    alone = listen(Pipeline(load_engine(model), Detector(enrolled(word, 0.9))), samples, [1280])
    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, NEVER)), PseudoLabels(enrolled(word, NEVER)))
    pipeline.witness = load_engine(model), Detector(enrolled(word, 0.9))

    assert listen(pipeline, samples, [1280]) == [] != alone
    assert [one.end_sample for one in pipeline.cuts if "would have woken" in one.clip.reason] == [one.end_sample for one in alone]


def test_a_gap_starts_the_version_before_anew_too(model, samples, word):
    fresh = Pipeline(load_engine(model), Detector(enrolled(word, NEVER)))
    torn = Pipeline(load_engine(model), Detector(enrolled(word, NEVER)), PseudoLabels(enrolled(word, NEVER)))
    torn.witness = load_engine(model), Detector(enrolled(word, NEVER))
    torn.feed(AudioChunk(samples[:20_500], 0))
    first = 20_500 + 3200
    torn.feed(AudioChunk(samples[:16_000], first, gap_samples=3200))
    fresh.feed(AudioChunk(samples[:16_000], first))

    assert torn.witness[1].latest == fresh.detector.latest


def test_a_version_before_that_fails_takes_nothing_with_it(model, samples, word):
    class Failing:
        def step(self, frames):
            raise RuntimeError("out of memory")

    pipeline = Pipeline(load_engine(model), Detector(enrolled(word, 0.9)), PseudoLabels(enrolled(word, 0.9)))
    alone = listen(Pipeline(load_engine(model), Detector(enrolled(word, 0.9))), samples, [1280])
    pipeline.witness = Failing(), Detector(enrolled(word, 0.9))

    assert listen(pipeline, samples, [1280]) == alone
    assert pipeline.witness is None
