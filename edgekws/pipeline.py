"""Chunk → log-mel → embedding → detections, as one pure object: no clock, thread, disk or settings in it."""

from __future__ import annotations

import numpy as np

from edgekws.detector import Detector
from edgekws.engines import Engine
from edgekws.frontend import LogMel
from edgekws.values import HOP_SAMPLES, AudioChunk, Detection


class Pipeline:
    """The same samples give the same detections, in whatever chunks they come."""

    def __init__(self, engine: Engine, detector: Detector) -> None:
        self.engine = engine
        self.detector = detector
        self.hops = 0
        """Network steps done so far: the watchdog's proof of progress."""
        self._frontend = LogMel()
        self._pending = np.zeros(0, np.int16)
        self._end_sample = 0  # of the stream, gaps counted, up to which hops were done

    def feed(self, chunk: AudioChunk) -> list[Detection]:
        """Every detection that the chunk completes. A gap forgets the half-heard word before it."""
        if chunk.gap_samples:
            self._pending = self._pending[:0]
            self._frontend.reset()
            self.engine.reset()
            self.detector.reset()
        if not len(self._pending):
            self._end_sample = chunk.first_sample
        samples = np.concatenate([self._pending, chunk.samples]) if len(self._pending) else chunk.samples
        detections: list[Detection] = []
        done = 0
        while done + HOP_SAMPLES <= len(samples):
            frames = self._frontend.hop(samples[done : done + HOP_SAMPLES])
            done += HOP_SAMPLES
            self.hops += 1
            self._end_sample += HOP_SAMPLES
            detections += self.detector.step(self.engine.step(frames), self._end_sample)
        self._pending = samples[done:].copy()
        return detections
