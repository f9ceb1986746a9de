"""Any rate → 16 kHz (soxr)."""

from __future__ import annotations

import numpy as np

from edgekws.errors import AudioError
from edgekws.values import SAMPLE_RATE_HZ


class To16k:
    """A stream of mono samples at any rate becomes int16 at 16 kHz. Samples at 16 kHz pass bit for bit.

    Resampled ones come out 1:1 in time, some 10 ms late; `flush()` gives the last of them.
    """

    def __init__(self, rate_hz: int) -> None:
        self._resampler = None
        if rate_hz != SAMPLE_RATE_HZ:
            try:
                import soxr
            except ImportError as error:
                raise AudioError(f"cannot resample {rate_hz} Hz: the package soxr is not installed (pip install soxr)") from error
            # In floating point: on integers soxr dithers.
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """float32, shape (n,), ±1 → int16, shape (m,); m may be 0."""
        return to_int16(self._resampler.resample_chunk(samples) if self._resampler else samples)

    def flush(self) -> np.ndarray:
        """The end of the stream: int16, shape (m,). Nothing may be fed after it."""
        if not self._resampler:
            return np.zeros(0, np.int16)
        return to_int16(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))


def to_int16(samples: np.ndarray) -> np.ndarray:
    """float32, ±1 → int16, clipped. What was read from int16 comes back as it was; what is not a number becomes silence."""
    scaled = np.rint(np.nan_to_num(samples) * np.float32(32768))
    return np.asarray(np.clip(scaled, -32768, 32767), np.int16)


def mono(samples: np.ndarray) -> np.ndarray:
    """float32, shape (n, channels) → shape (n,), their mean."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
