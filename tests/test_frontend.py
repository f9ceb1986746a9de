import numpy as np
import pytest

from edgekws.frontend import FRAME_SAMPLES, HOP_FRAMES, N_MELS, LogMel, log_mel, louder
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ


def noise(hops: int, rms: float = 2000.0) -> np.ndarray:
    return np.clip(np.random.default_rng(0).standard_normal(hops * HOP_SAMPLES) * rms, -32768, 32767).astype(np.int16)


def by_hop(samples: np.ndarray) -> np.ndarray:
    frontend = LogMel()
    return np.concatenate([frontend.hop(hop) for hop in samples.reshape(-1, HOP_SAMPLES)])


@pytest.mark.parametrize("rms", [3, 2000, 60000])
def test_hop_by_hop_equals_the_whole(rms):
    samples = noise(900, rms)  # longer than the block of 3000 frames that log_mel works in

    assert by_hop(samples).shape == log_mel(samples).shape == (900 * HOP_FRAMES, N_MELS)
    assert np.abs(by_hop(samples) - log_mel(samples)).max() <= 1e-5


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(16000, np.int16),
        np.full(16000, -32768, np.int16),
        np.tile(np.array([32767, -32768], np.int16), 8000),
        np.where(np.sin(np.arange(16000) * 0.2) > 0, 32767, -32768).astype(np.int16),
        np.eye(1, 16000, 8000, np.int16)[0],
    ],
    ids=["digital silence", "stuck at the rail", "Nyquist at full scale", "clipped sine", "a single count"],
)
def test_frames_are_finite_and_small(samples):
    """Nothing that a sound card can deliver may upset the network."""
    frames = log_mel(samples)

    assert frames.dtype == np.float32
    assert np.isfinite(frames).all()
    assert np.abs(frames).max() < 6


def test_the_same_hop_gives_the_same_bits():
    samples = noise(50)

    assert np.array_equal(by_hop(samples), by_hop(samples))


def test_a_frame_depends_on_nothing_after_its_end():
    samples = noise(10)
    changed = samples.copy()
    changed[5 * FRAME_SAMPLES :] = 0

    assert np.array_equal(log_mel(samples)[:5], log_mel(changed)[:5])
    assert not np.array_equal(log_mel(samples)[5], log_mel(changed)[5])


def test_reset_forgets_the_stream():
    frontend = LogMel()
    hop = noise(1)
    first = frontend.hop(hop)
    second = frontend.hop(hop)
    frontend.reset()

    assert not np.array_equal(second, first)
    assert np.array_equal(frontend.hop(hop), first)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (319, 0), (320, 1), (1279, 3), (1280, 4)])
def test_a_frame_comes_with_every_320_samples(samples, frames):
    assert log_mel(np.ones(samples, np.int16)).shape == (frames, N_MELS)


def test_a_higher_tone_peaks_in_a_higher_bin():
    n = np.arange(16000)
    tones = [(8000 * np.sin(2 * np.pi * hz * n / SAMPLE_RATE_HZ)).astype(np.int16) for hz in range(100, 7600, 100)]
    peaks = [int(log_mel(tone)[20].argmax()) for tone in tones]

    assert peaks == sorted(peaks)
    assert peaks[0] <= 1
    assert peaks[-1] == N_MELS - 1


def test_twice_the_amplitude_is_six_decibels_louder():
    samples = noise(5) // 4

    assert np.abs(louder(log_mel(samples), 20 * np.log10(2)) - log_mel(2 * samples)).max() < 1e-4


def test_no_bin_is_deaf():
    """Narrow triangles between two FFT bins would hear nothing."""
    assert (log_mel(noise(50)).std(0) > 0.01).all()
