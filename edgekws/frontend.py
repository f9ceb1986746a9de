"""int16 samples → log-mel frames, the same for listening and for training. NumPy only.

Frames are causal: frame k ends with sample 320 (k + 1) and looks back 512 samples, so one hop of 1280 samples is always
exactly four frames and nothing waits for the next hop.
"""

from __future__ import annotations

import numpy as np

from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ

WINDOW_SAMPLES = 512  # 32 ms: a power of two, so that the FFT needs no padding
FRAME_SAMPLES = 320  # 20 ms
N_MELS = 40
LOW_HZ, HIGH_HZ = 60.0, 7600.0
HOP_FRAMES = HOP_SAMPLES // FRAME_SAMPLES  # 4
SHIFT, SCALE = np.float32(7.0), np.float32(0.25)  # to about zero mean and unit variance over speech at -25 dBFS
FLOOR = 1e-3  # of mel power with samples in ±32768: below the rounding noise of int16, so digital silence is finite


def _mel_filters() -> np.ndarray:
    """Triangles on the mel scale of O'Shaughnessy (1987), shape (257, 40); each sums to one."""

    def to_mel(hz: np.ndarray | float) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + np.asarray(hz) / 700.0)

    edges = 700.0 * (10.0 ** (np.linspace(to_mel(LOW_HZ), to_mel(HIGH_HZ), N_MELS + 2) / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(WINDOW_SAMPLES, 1.0 / SAMPLE_RATE_HZ)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))
    # Below 400 Hz a triangle may fall between two FFT bins: give such a one its nearest bin.
    empty = np.flatnonzero(filters.sum(0) == 0)
    filters[np.abs(bins - edges[1:-1][empty]).argmin(0), empty] = 1.0
    return (filters / filters.sum(0)).astype(np.float32)


_FILTERS = _mel_filters()
# Scaled so that a full-scale sine has mel power near 1e9 · window gain; the constant only shifts the logarithm.
_WINDOW = np.hanning(WINDOW_SAMPLES).astype(np.float32) / np.float32(np.sqrt(WINDOW_SAMPLES))


def _frames(padded: np.ndarray, count: int) -> np.ndarray:
    """Log-mel of `count` windows, 320 samples apart, from the start of `padded` (int16). Returns float32 (count, 40)."""
    windows = np.lib.stride_tricks.as_strided(
        padded, (count, WINDOW_SAMPLES), (FRAME_SAMPLES * padded.itemsize, padded.itemsize), writeable=False
    )
    spectrum = np.fft.rfft(windows * _WINDOW)  # (count, 257)
    power = spectrum.real**2 + spectrum.imag**2
    mel = power.astype(np.float32, copy=False) @ _FILTERS  # (count, 40)
    return (np.log(mel + np.float32(FLOOR)) - SHIFT) * SCALE


def louder(frames: np.ndarray, db: float) -> np.ndarray:
    """Log-mel frames of the same sound `db` decibels louder, as if nothing of it were clipped; the floor rises with it."""
    return frames + SCALE * np.float32(np.log(10) * db / 10)


class LogMel:
    """The streaming front-end: hop after hop, 192 samples of memory.

    `hop()` takes exactly one hop, so the same samples give the same bits in whatever chunks they were captured.
    """

    def __init__(self) -> None:
        self._buffer = np.zeros(WINDOW_SAMPLES - FRAME_SAMPLES + HOP_SAMPLES, np.int16)

    def hop(self, samples: np.ndarray) -> np.ndarray:
        """int16, shape (1280,) → float32, shape (4, 40)."""
        buffer = self._buffer
        buffer[: WINDOW_SAMPLES - FRAME_SAMPLES] = buffer[HOP_SAMPLES:]
        buffer[WINDOW_SAMPLES - FRAME_SAMPLES :] = samples
        return _frames(buffer, HOP_FRAMES)

    def reset(self) -> None:
        """Forget the stream: silence came before."""
        self._buffer[:] = 0


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Log-mel frames of a whole recording, with silence before it.

    Args:
        samples: int16, shape (n,), mono at 16 kHz.

    Returns:
        float32, shape (n // 320, 40): about zero mean and unit variance over speech at -25 dBFS.
        Equal to `LogMel` hop by hop up to the last bits of the matrix product.
    """
    count = len(samples) // FRAME_SAMPLES
    if count == 0:
        return np.zeros((0, N_MELS), np.float32)
    padded = np.concatenate([np.zeros(WINDOW_SAMPLES - FRAME_SAMPLES, np.int16), samples])
    return np.concatenate([_frames(padded[start * FRAME_SAMPLES :], min(3000, count - start)) for start in range(0, count, 3000)])
