"""Chunk → log-mel → embedding → detections and clips, as one pure object: no clock, thread, disk or settings in it."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from edgekws.detector import Detector
from edgekws.engines import Engine
from edgekws.frontend import LogMel
from edgekws.pseudo_labels import Cut, PseudoLabels
from edgekws.values import HOP_SAMPLES, AudioChunk, Detection
from edgekws.voice import HEARD_HOPS, who

log = logging.getLogger(__name__)

RECENT_HOPS = 125  # 10 s, 80 kB


class Hop(NamedTuple):
    """One step of the network, for whoever must step through the same."""

    number: int
    frames: np.ndarray
    """float32, shape (4, 40)."""
    margin: float
    """How far the best score was above its threshold."""


class Pipeline:
    """The same samples give the same detections, in whatever chunks they come."""

    def __init__(self, engine: Engine, detector: Detector, labels: PseudoLabels | None = None) -> None:
        """`labels`: what is kept to learn from; None keeps nothing."""
        self.engine = engine
        self.detector = detector
        self.labels = labels
        self.cuts: list[Cut] = []
        """Clips that were completed: whoever feeds takes them away."""
        self.hops = 0
        """Network steps done so far: the watchdog's proof of progress."""
        self.recent: deque[Hop] = deque(maxlen=RECENT_HOPS)
        """The last hops since a gap, without one missing: with these a newcomer is warmed up and judged."""
        self.witness: tuple[Engine, Detector] | None = None
        """The version before, while a new one proves itself: it steps through the same and does not act; what it alone wakes at is kept."""
        self._frontend = LogMel()
        self._heard: deque[np.ndarray] = deque(maxlen=HEARD_HOPS)  # the samples of the last hops, held and not copied
        self._pending = np.zeros(0, np.int16)
        self._end_sample = 0  # of the stream, gaps counted, up to which hops were done

    def feed(self, chunk: AudioChunk) -> list[Detection]:
        """Every detection that the chunk completes. A gap forgets the half-heard word before it."""
        if chunk.gap_samples:
            self._pending = self._pending[:0]
            self._heard.clear()
            self._frontend.reset()
            self.engine.reset()
            self.detector.reset()
            self.recent.clear()
            if self.witness is not None:
                self.witness[0].reset()
                self.witness[1].reset()
            if self.labels is not None:
                self.cuts += self.labels.end()
        if not len(self._pending):
            self._end_sample = chunk.first_sample
        samples = np.concatenate([self._pending, chunk.samples]) if len(self._pending) else chunk.samples
        detections: list[Detection] = []
        done = 0
        while done + HOP_SAMPLES <= len(samples):
            hop = samples[done : done + HOP_SAMPLES]
            frames = self._frontend.hop(hop)
            done += HOP_SAMPLES
            self.hops += 1
            self._end_sample += HOP_SAMPLES
            self._heard.append(hop)
            found = self.detector.step(self.engine.step(frames), self._end_sample)
            detections += [self._named(one) for one in found]
            if self.labels is not None:
                self.cuts += self.labels.step(hop, self._end_sample, self.detector.latest, found, self._missed(frames))
            self.recent.append(Hop(self.hops, frames, self.detector.margin))
        self._pending = samples[done:].copy()
        return detections

    def _named(self, wake: Detection) -> Detection:
        """With the name of whose voice it is, where several enrolled the keyword; the score stays that of the nearest prototype.

        A clip keeps the name that goes with it: a round teaches what is like a prototype, and does not believe a clip that is unlike that
        of its name. With clips named by the voice it learned less (docs/measured.md, "Where several people live").
        """
        several = [one for one in self.detector.enrolled if one.keyword == wake.keyword]
        if len(several) < 2 or not all(len(one.voice) for one in several):
            return wake
        return replace(wake, speaker=who(np.concatenate(self._heard), several).speaker)

    def _missed(self, frames: np.ndarray) -> list[Detection]:
        """What the witness wakes at. One that fails is let go of: the version in use must not fall with it."""
        if self.witness is None:
            return []
        engine, detector = self.witness
        try:
            return detector.step(engine.step(frames), self._end_sample)
        except Exception as error:
            log.warning("the version before does not listen along any more: %s", error)
            self.witness = None
            return []

    def snapshot(self) -> list[Hop]:
        """The recent hops, for other threads while it goes on."""
        while True:
            with contextlib.suppress(RuntimeError):  # a hop came while they were copied
                return list(self.recent)

    def replace(self, engine: Engine, detector: Detector) -> None:
        """Go on with others from the next hop. `engine` has stepped through all of `recent`; refractory times hold."""
        detector.take_over(self.detector)
        self.engine, self.detector = engine, detector
        if self.labels is not None:
            self.labels.listen_for(detector.enrolled)
