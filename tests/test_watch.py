import io

import numpy as np
from test_power import ORIN_NANO, jetson

from edgekws.audio import Source
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.enrolment import bundled
from edgekws.model import find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.power.gauge import Gauge
from edgekws.values import AudioChunk
from edgekws.watch import View, watch


class Interrupted(Source):
    """A second of noise, deafness, and a second after 240 ms that were lost."""

    uri, live = "mic:x", True

    def chunks(self):
        noise = np.random.default_rng(0).normal(0, 300, 16_000).astype(np.int16)
        yield AudioChunk(noise, 0)
        self.on_deaf("no samples for 5 s")
        yield AudioChunk(noise, 16_000 + 3840, gap_samples=3840)

    def close(self):
        pass


def pipeline():
    model = load_model(find_model())
    engine = load_engine(model)
    return Pipeline(engine, Detector(bundled(model)))


def test_a_pipe_gets_level_scores_power_deafness_and_gaps(tmp_path):
    out = io.StringIO()
    watch(Interrupted(), pipeline(), out, "edge-3", Gauge(jetson(tmp_path, ORIN_NANO)))
    first, deaf, second = out.getvalue().splitlines()

    assert "-41 dBFS  hey jetson" in first and first.endswith("  4.78 W (ina3221 VDD_IN)")
    assert deaf == "deaf: no samples for 5 s"
    assert second.endswith("GAP 240 ms")


def test_a_constant_offset_is_no_level():
    view = View(())
    view.hear((np.tile([33, -33], 640) + 9000).astype(np.int16), {}, [], 1.0)

    assert "  -60 dBFS" in view.line([])


def test_a_terminal_shows_engine_power_and_what_happened(tmp_path):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    out = Terminal()
    clock = iter(np.arange(0.0, 1000.0))
    watch(Interrupted(), pipeline(), out, "edge-3", Gauge(jetson(tmp_path, ORIN_NANO)), clock=lambda: float(next(clock)))
    last = out.getvalue().rpartition("\x1b[H")[2]

    assert "edge-3 on onnxruntime  mic:x" in last and "4.78 W (ina3221 VDD_IN)" in last
    assert "deaf: no samples for 5 s" in last and "gap: 240 ms of audio were lost" in last
