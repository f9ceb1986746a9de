"""DECIDE: embedding against prototypes → score, threshold, refractory time → detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekws.values import SAMPLE_RATE_HZ, Detection, Enrolled

REFRACTORY_S = 2.0


def scores(embeddings: np.ndarray, enrolled: Enrolled) -> np.ndarray:
    """The score of each hop for one keyword and speaker.

    Args:
        embeddings: float32, shape (T, dim), unit rows, hop after hop of one stream.

    Returns:
        float32, shape (T,).
    """
    similarity = (embeddings @ enrolled.prototypes.T).max(1)  # (T,)
    return ((similarity - enrolled.offset) * enrolled.scale).astype(np.float32)


class Detector:
    """All keywords and speakers at the price of one network step. Holds no clock: time is counted in samples."""

    def __init__(self, enrolled: Sequence[Enrolled], refractory_s: float = REFRACTORY_S) -> None:
        self.enrolled = tuple(enrolled)
        self.latest: dict[tuple[str, str], float] = {}
        """(keyword, speaker) → score of the last hop, for people who tune by looking."""
        self._refractory_samples = round(refractory_s * SAMPLE_RATE_HZ)
        self._quiet_until: dict[str, int] = {}

    def step(self, embedding: np.ndarray, end_sample: int) -> list[Detection]:
        """The wakes of this hop: at most one a keyword, by its best speaker; none within the refractory time after the last."""
        best: dict[str, Detection] = {}
        for one in self.enrolled:
            score = float(scores(embedding[None], one)[0])
            self.latest[one.keyword, one.speaker] = score
            if score < one.threshold or end_sample < self._quiet_until.get(one.keyword, 0):
                continue
            margin = score - one.threshold
            if one.keyword not in best or margin > best[one.keyword].score - best[one.keyword].threshold:
                best[one.keyword] = Detection(one.keyword, one.speaker, score, one.threshold, end_sample)
        for keyword in best:
            self._quiet_until[keyword] = end_sample + self._refractory_samples
        return list(best.values())

    def reset(self) -> None:
        """A gap in the stream: forget scores, but hold the refractory time."""
        self.latest.clear()
