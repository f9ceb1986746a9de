"""Model versions exchanged under a running listener: hops and wakes lost or doubled, and the time from `promote` to live.

    python benchmarks/swap.py [--swaps 1000] [--fast] [--save]

The listener of `edgekws run` hears the bundled demo recordings again and again, in blocks of 20 ms at the pace of a microphone, or as fast
as it can with --fast, where thousands of words fall on the exchanges. As soon as a version is live the other one is promoted.
"twin" exchanges two copies of one model: its wakes must be, hop for hop, those of a run without exchanges. "edge-small" exchanges two
models that hear a word some hops apart: each word must wake once; wakes elsewhere stand beside those of each model alone.
The time is from the call of `Store.promote`, which is given by itself too, to the event that says live. The first exchange is given by
itself: it copies the version into the store, and waits until two seconds were heard. The time between hops stands beside that of the
same listener without exchanges.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgekws
from edgekws import bench
from edgekws.audio import Source, read_recording
from edgekws.daemon import listen
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.enrolment import enrol
from edgekws.model import find_model, load_model, write_manifest
from edgekws.pipeline import Pipeline
from edgekws.promotion import Updates, Version
from edgekws.sinks import Delivery
from edgekws.store import Store
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Detection, Enrolled, Event

BLOCK = SAMPLE_RATE_HZ // 50
WITHOUT_S = 30.0  # of audio without exchanges, at the pace of a microphone
DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
RESULTS = Path(__file__).parent / "results" / "swap.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--fast", action="store_true", help="not at the pace of a microphone")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/swap.jsonl")
    arguments = parser.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for other in ("twin", "edge-small"):
            row = exchange(Path(folder) / other, other, arguments.swaps, paced=not arguments.fast) | {"host": bench.host()}
            print(json.dumps(row), flush=True)
            worst = max(worst, row["lost_hops"], row["lost_wakes"], row["doubled_wakes"], row["refused"])
            if arguments.save:
                with RESULTS.open("a") as file:
                    print(json.dumps(row), file=file)
    return 1 if worst else 0


class Stream(Source):
    """The demo's recordings again and again, until closed."""

    uri = "demo:"

    def __init__(self, paced: bool) -> None:
        self.live = paced
        self.samples = read_recording(DEMO / "stream.flac")
        self.closed = False

    def chunks(self) -> Iterator[AudioChunk]:
        start_s, first = time.monotonic(), 0
        endless = np.concatenate([self.samples, self.samples[:BLOCK]])
        while not self.closed:
            if self.live:
                time.sleep(max(0.0, start_s + (first + BLOCK) / SAMPLE_RATE_HZ - time.monotonic()))
            at = first % len(self.samples)
            yield AudioChunk(endless[at : at + BLOCK], first)
            first += BLOCK

    def close(self) -> None:
        self.closed = True


class Promoter:
    """A sink that promotes the other version as soon as one is live, and keeps the wakes."""

    def __init__(self, store: Store, versions: dict[str, Path], swaps: int, source: Stream) -> None:
        self._store, self._versions, self._swaps, self._source = store, versions, swaps, source
        self.wakes: list[int] = []
        self.took_ms: list[float] = []
        self.promote_ms: list[float] = []
        self.refused = 0
        self._since_s = 0.0

    def promote(self, name: str) -> None:
        self._since_s = time.monotonic()
        self._store.promote(self._versions[name], name)
        self.promote_ms.append((time.monotonic() - self._since_s) * 1000)

    def deliver(self, event: Event) -> None:
        if event.kind == "wake":
            self.wakes.append(round(event.stream_s * SAMPLE_RATE_HZ))
            return
        if event.kind == "model":
            if event.extra["what"] == "live":
                self.took_ms.append((time.monotonic() - self._since_s) * 1000)
            else:
                self.refused += 1
        if len(self.took_ms) >= self._swaps or self.refused:
            self._source.close()
        elif event.kind in ("start", "model"):
            self.promote(next(name for name in self._versions if name != event.model))

    def close(self) -> None:
        """Nothing to close."""


class Watched(Pipeline):
    """Keeps the time from hop to hop."""

    def __init__(self, version: Version) -> None:
        super().__init__(version.engine, version.detector)
        self.done_s: list[float] = []

    def feed(self, chunk: AudioChunk) -> list[Detection]:
        hops, found = self.hops, super().feed(chunk)
        if self.hops != hops:
            self.done_s.append(time.monotonic())
        return found

    def between_ms(self) -> dict[str, float]:
        return bench.percentiles(np.diff(self.done_s) * 1000)


def exchange(folder: Path, other: str, swaps: int, *, paced: bool) -> dict[str, Any]:
    """One row."""
    folder.mkdir()
    versions = {"edge-3": find_model("edge")}
    if other == "twin":
        path = shutil.copytree(versions["edge-3"], folder / "twin")
        write_manifest(path, {**json.loads((path / "manifest.json").read_text()), "id": "twin"})
        versions["twin"] = path
    else:
        versions["edge-small-4"] = find_model(other)
    takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
    words: dict[str, Enrolled] = {}
    for name, path in versions.items():
        model = load_model(path)
        words[name] = enrol(TRUTH["keyword"], "", takes, load_engine(model), model)
    store = Store(folder / "state")
    store.promote(versions["edge-3"], "edge-3")

    def load(reread: bool = False) -> Version:
        current = store.current_model()
        assert current is not None
        model = load_model(current)
        return Version(model, load_engine(model), Detector([words[model.id]]))

    source, version = Stream(paced), load()
    pipeline = Watched(version)
    updates = Updates(version, load, Store(store.root), store.enrolment_stamp())
    promoter = Promoter(Store(store.root), versions, swaps, source)
    delivery = Delivery([promoter], on_failure=source.close)
    audio_s = listen(source, pipeline, delivery, updates.model, updates=updates).audio_s
    delivery.close()
    updates.close()

    samples = round(audio_s * SAMPLE_RATE_HZ)
    alone, steady = {}, pipeline
    for name, path in versions.items():
        model = load_model(path)
        steady = Watched(Version(model, load_engine(model), Detector([words[name]])))
        alone[name] = wakes(steady, Stream(False), samples)
    if paced:
        steady = Watched(load())
        wakes(steady, Stream(True), round(WITHOUT_S * SAMPLE_RATE_HZ))
    lost, doubled, spoken, elsewhere = counted(promoter.wakes, samples, len(source.samples))
    if other == "twin":
        wanted = alone["edge-3"]
        lost, doubled, spoken = (
            len(set(wanted) - set(promoter.wakes)),
            len(promoter.wakes) - len({*wanted} & {*promoter.wakes}),
            len(wanted),
        )
    return {
        "benchmark": "swap",
        "other": other,
        "swaps": len(promoter.took_ms),
        "refused": promoter.refused,
        "paced": paced,
        "audio_s": round(audio_s, 1),
        "words": spoken,
        "wakes": len(promoter.wakes),
        "lost_hops": samples // HOP_SAMPLES - pipeline.hops,
        "lost_wakes": lost,
        "doubled_wakes": doubled,
        "wakes_elsewhere": elsewhere,
        "wakes_elsewhere_alone": {name: counted(found, samples, len(source.samples))[3] for name, found in alone.items()},
        "promote_to_live_ms": bench.percentiles(np.array(promoter.took_ms[1:])),
        "promote_ms": bench.percentiles(np.array(promoter.promote_ms[1:])),
        "first_promote_to_live_ms": round(promoter.took_ms[0], 1),
        "between_hops_ms": pipeline.between_ms(),
        "between_hops_ms_without": steady.between_ms(),
    }


def wakes(pipeline: Pipeline, source: Stream, samples: int) -> list[int]:
    """Where the first samples of the same stream wake a listener that exchanges nothing."""
    found: list[int] = []
    for chunk in source.chunks():
        if chunk.first_sample >= samples:
            break
        found += [one.end_sample for one in pipeline.feed(chunk)]
    return found


def counted(found: list[int], samples: int, period: int) -> tuple[int, int, int, int]:
    """Words without a wake, further wakes of a word, words that were said to their end, wakes elsewhere."""
    at = [(one["start_s"], one["end_s"] + 0.5) for one in TRUTH["spoken"]]
    spans = [(first + start * SAMPLE_RATE_HZ, first + end * SAMPLE_RATE_HZ) for first in range(0, samples, period) for start, end in at]
    heard = [sum(start < end <= stop for end in found) for start, stop in spans]
    whole = [count for count, (_, stop) in zip(heard, spans, strict=True) if stop <= samples]
    return whole.count(0), sum(max(0, count - 1) for count in heard), len(whole), len(found) - sum(heard)


if __name__ == "__main__":
    sys.exit(main())
