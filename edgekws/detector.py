"""DECIDE: embedding against prototypes → score, threshold, refractory time → detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekws.values import SAMPLE_RATE_HZ, Detection, Enrolled

REFRACTORY_S = 2.0
# Half of what the embedding has in common with its nearest few of the cohort is taken off. On the development words under 10 dB noise
# this gave 83 % recall instead of 81 % (real voices, 0.5 false accepts an hour); 256 cohort rows, or other shares, gave the same.
COHORT_NEAREST = 8
COHORT_SHARE = np.float32(0.5)
# Of a score, for each 1 of cosine that a sound is less than the lead nearer to a recording than to its nearest rivals (their mean). Chosen
# where `enrolment.RIVALS` was: a lead of 0.05 0.922 and 0.726, of 0.15 0.959 and 0.753; 30 of a score 0.955 and 0.756.
RIVAL_COST, RIVAL_LEAD, RIVALS_NEAREST = np.float32(20.0), np.float32(0.1), 10
LIKELY = -2.0  # what scores lower is not compared with rivals, nor with what was wrong
# The same for being more than so much nearer to what the user called wrong than to a recording. `benchmarks/rejected.py` on 31
# development users, 0.6 below their thresholds: of 24 such sounds that come again 24 wake no more, 2 of 1285 words are lost, and 1.2 % of
# the words to one that was called wrong by mistake; with 0.03 4 words and 1.9 %. At half the cost 22 of 24 with 0.03.
WRONG_LEAD = np.float32(0.05)


def background(similarities: np.ndarray) -> np.ndarray:
    """What is taken off a similarity, from those with the cohort (T, cohort): float32 (T,). T-norm, after Auckenthaler et al. (2000)."""
    if similarities.shape[1] < COHORT_NEAREST:
        return np.zeros(len(similarities), np.float32)
    nearest = np.partition(similarities, -COHORT_NEAREST, 1)[:, -COHORT_NEAREST:]
    return COHORT_SHARE * nearest.mean(1)


def cost(embeddings: np.ndarray, enrolled: Enrolled) -> np.ndarray:
    """What is taken off a score for being no nearer to the recordings than to what is no keyword: float32 (T, dim) → float32 (T,)."""
    takes = (embeddings @ enrolled.takes.T).max(1)
    taken = np.zeros(len(embeddings), np.float32)
    if len(enrolled.rivals):
        nearest = min(RIVALS_NEAREST, len(enrolled.rivals))
        rivals = np.partition(embeddings @ enrolled.rivals.T, -nearest, 1)[:, -nearest:].mean(1)
        taken += RIVAL_COST * np.maximum(0, rivals - takes + RIVAL_LEAD)
    if len(enrolled.wrong):
        wrong = (embeddings @ enrolled.wrong.T).max(1)
        taken += RIVAL_COST * np.maximum(0, wrong - takes - WRONG_LEAD)
    return taken


def scores(embeddings: np.ndarray, enrolled: Enrolled) -> np.ndarray:
    """The score of each hop for one keyword and speaker.

    Args:
        embeddings: float32, shape (T, dim), unit rows, hop after hop of one stream.

    Returns:
        float32, shape (T,).
    """
    similarity = (embeddings @ enrolled.prototypes.T).max(1)  # (T,)
    if len(enrolled.cohort):
        similarity = similarity - background(embeddings @ enrolled.cohort.T)
    found = ((similarity - enrolled.offset) * enrolled.scale).astype(np.float32)
    if len(enrolled.takes):
        likely = np.flatnonzero(found > LIKELY)
        found[likely] -= cost(embeddings[likely], enrolled)
    return found


class Detector:
    """All keywords and speakers at the price of one network step. Holds no clock: time is counted in samples."""

    def __init__(self, enrolled: Sequence[Enrolled], refractory_s: float = REFRACTORY_S) -> None:
        self.enrolled = tuple(enrolled)
        self.latest: dict[tuple[str, str], float] = {}
        """(keyword, speaker) → score of the last hop, for people who tune by looking."""
        self.margin = -np.inf
        """Of the last hop: how far the best score was above its threshold, negative below it."""
        self._refractory_samples = round(refractory_s * SAMPLE_RATE_HZ)
        self._quiet_until: dict[str, int] = {}
        # One product a hop for everybody: all prototypes, then all cohorts that differ (as a rule they are one and the same).
        cohorts = {id(one.cohort): one.cohort for one in self.enrolled if len(one.cohort)}
        rows = [one.prototypes for one in self.enrolled] + list(cohorts.values())
        self._rows = np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)
        ends = np.cumsum([len(row) for row in rows])
        spans = [slice(int(end) - len(row), int(end)) for end, row in zip(ends, rows, strict=True)]
        self._own, self._cohorts = spans[: len(self.enrolled)], spans[len(self.enrolled) :]
        self._begins = [span.start for span in self._own]
        places = {key: place for place, key in enumerate(cohorts)}
        self._each = [
            (
                (one.keyword, one.speaker),
                places.get(id(one.cohort), len(places)),
                one.offset,
                one.scale,
                one.threshold,
                one if len(one.takes) else None,
            )
            for one in self.enrolled
        ]

    def step(self, embedding: np.ndarray, end_sample: int) -> list[Detection]:
        """The wakes of this hop: at most one a keyword, by its best speaker; none within the refractory time after the last."""
        if not self.enrolled:
            return []
        similarities = self._rows @ embedding
        common = [*(float(background(similarities[None, span])[0]) for span in self._cohorts), 0.0]
        # One maximum of them all, then plain numbers: a slice and a maximum of each cost 900 µs a hop for 500 of them, this 100. Arrays
        # to the end would take 51, but 5 for one or two instead of 4.
        nearest = np.maximum.reduceat(similarities[: self._own[-1].stop], self._begins).tolist()
        best: dict[str, Detection] = {}
        highest = -np.inf
        for similarity, (key, cohort, offset, scale, threshold, compared) in zip(nearest, self._each, strict=True):
            score = (similarity - common[cohort] - offset) * scale
            if compared is not None and score > LIKELY:
                score -= float(cost(embedding[None], compared)[0])
            self.latest[key] = score
            margin = score - threshold
            if margin > highest:  # a score that is no number is above nothing, here and below: it would wake every two seconds
                highest = margin
            if score >= threshold and end_sample >= self._quiet_until.get(key[0], 0):
                keyword = key[0]
                if keyword not in best or margin > best[keyword].score - best[keyword].threshold:
                    best[keyword] = Detection(*key, score, threshold, end_sample)
        self.margin = highest
        for keyword in best:
            self._quiet_until[keyword] = end_sample + self._refractory_samples
        return list(best.values())

    def anew(self) -> Detector:
        """The same keywords, for another stream."""
        return Detector(self.enrolled, self._refractory_samples / SAMPLE_RATE_HZ)

    def take_over(self, old: Detector) -> None:
        """Go on where another one stops: its refractory times hold."""
        self._quiet_until = dict(old._quiet_until)

    def reset(self) -> None:
        """A gap in the stream: forget scores, but hold the refractory time."""
        self.latest.clear()
