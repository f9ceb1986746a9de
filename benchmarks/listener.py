"""The whole listener beside pymicro-wakeword (okay_nabu) in one run: CPU time for an hour of audio, and memory.

    python benchmarks/listener.py [--models edge-small edge] [--seconds 60] [--repeats 9] [--save]

One process per engine, all pinned to the same core; passes over the same audio in turn, one to warm up, then `repeats` that count.
pymicro-wakeword gets blocks of 80 ms like ours and of 10 ms as its documentation has it; "numpy" only reads the samples.
Ratios are taken within each turn: ours over theirs, so below 1 ours is cheaper. "live" is at the pace of a microphone, where each hop
is a wake-up with cold caches; numpy's empty loop shows what of it no engine can save. "pipeline_clips" also cuts clips to learn
from, in a room where nothing comes near a keyword; to store one costs 1 ms, to cut a near miss and compare it with 25 others 4 ms.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench
from edgekws.model import find_model, load_model
from edgekws.values import HOP_MS, HOP_SAMPLES, SAMPLE_RATE_HZ

RIVAL = "pymicro-wakeword"
RESULTS = Path(__file__).parent / "results" / "listener.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["edge-small", "edge"], metavar="MODEL", help="built-in names or directories")
    parser.add_argument("--seconds", type=float, default=60.0, help="of audio in one pass")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--live-s", type=float, default=10.0, help="of audio in each of 3 passes at a live pace; 0: none")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/listener.jsonl")
    arguments = parser.parse_args()
    models = [load_model(find_model(name)) for name in arguments.models]
    here = bench.host() | {RIVAL: bench.version(RIVAL)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pcm = Path(folder) / "audio.pcm"
        pcm.write_bytes(bench.audio(arguments.seconds).tobytes())
        rival = stack.enter_context(bench.Worker([__file__, "--serve", str(pcm)]))
        bare = stack.enter_context(bench.Worker([__file__, "--serve-numpy", str(pcm)]))
        ours = {model.id: stack.enter_context(bench.listener(model, "auto", pcm)) for model in models}
        parts = ("pipeline_clips", "frontend", "network", "detector")
        plan = {
            ("numpy", "pipeline"): bare,
            **{(RIVAL, name): rival for name in ("pipeline", "pipeline_10ms", "frontend", "network")},
            **{(id, name): worker for id, worker in ours.items() for name in ("pipeline", *parts)},
        }
        # Memory first: the inputs that "network" and "detector" keep are no part of a listener.
        rss_mb = {engine: worker.ask("pipeline").rss_mb for (engine, name), worker in plan.items() if name == "pipeline"}
        for (_, name), worker in plan.items():
            worker.ask(name)
        readings: dict[tuple[str, str], list[bench.Reading]] = {key: [] for key in plan}
        for _ in range(arguments.repeats):
            for key, worker in plan.items():
                readings[key].append(worker.ask(key[1]))
        live: dict[str, list[bench.Reading]] = {engine: [] for engine in ("numpy", RIVAL, *ours)}
        for _ in range(3 if arguments.live_s else 0):
            for engine, found in live.items():
                found.append(plan[engine, "pipeline"].ask(f"paced {arguments.live_s}"))
    cost = {key: bench.per_audio_hour(found) for key, found in readings.items()}
    for engine in ("numpy", RIVAL, *ours):
        row = {
            "benchmark": "listener",
            "engine": engine,
            "audio_s": arguments.seconds,
            "repeats": arguments.repeats,
            "cpu_s_per_audio_hour": {name: cost[of, name] for of, name in plan if of == engine},
            "cpu_s_per_audio_hour_live": bench.per_audio_hour(live[engine]) if live[engine] else None,
            "rss_mb": rss_mb[engine],
            "torch_loaded": readings[engine, "pipeline"][-1].torch_loaded,
        }
        if engine in ours:
            row["ratio_to_pymicro"] = ratio(readings[engine, "pipeline"], readings[RIVAL, "pipeline"])
            row["ratio_to_pymicro_live"] = ratio(live[engine], live[RIVAL]) if live[engine] else None
            row["ratio_with_clips"] = ratio(readings[engine, "pipeline_clips"], readings[engine, "pipeline"])
        show(row)
        if arguments.save:
            with RESULTS.open("a") as file:
                print(json.dumps({**row, "host": here}), file=file)
    print(bench.host_line(here))


def ratio(ours: list[bench.Reading], theirs: list[bench.Reading]) -> dict[str, float]:
    """The CPU time of the first over that of the second, turn by turn."""
    return bench.spread(a.cpu_s / b.cpu_s for a, b in zip(ours, theirs, strict=True))


def show(row: dict[str, Any]) -> None:
    """One row for people."""
    costs = {**row["cpu_s_per_audio_hour"], "live": row["cpu_s_per_audio_hour_live"]}
    print(f"{row['engine']}: {row['rss_mb']} MB, CPU seconds for an hour of audio, median (least to most) of {row['repeats']} passes")
    for name, cost in costs.items():
        if cost:
            print(f"  {name:<14}{cost['median']:7.2f}  ({cost['min']:.2f} to {cost['max']:.2f})")
    for name in ("ratio_to_pymicro", "ratio_to_pymicro_live", "ratio_with_clips"):
        if found := row.get(name):
            print(f"  {name}  {found['median']:.2f}  ({found['min']:.2f} to {found['max']:.2f})")


def serve_numpy(pcm: str) -> None:
    """Reads the samples, block by block: what an empty loop costs, and the memory of Python with numpy."""
    blocks = split(pcm, HOP_SAMPLES)

    def pipeline(live_s: float = 0.0) -> tuple[float, list[int]]:
        chosen = blocks[: round(live_s * 1000 / HOP_MS)] if live_s else blocks
        return len(chosen) * HOP_MS / 1000, bench.timed(np.sum, chosen, every_s=HOP_MS / 1000 if live_s else 0.0)

    bench.serve({"pipeline": pipeline, "paced": pipeline}, {})


def serve_rival(pcm: str) -> None:
    """pymicro-wakeword as its documentation has it: features, then a step of the network for each."""
    from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures, Model

    network = MicroWakeWord.from_builtin(Model.OKAY_NABU)
    blocks = {ms: [block.tobytes() for block in split(pcm, ms * SAMPLE_RATE_HZ // 1000)] for ms in (10, HOP_MS)}
    computed: list[np.ndarray] = []  # features of the whole audio, made when first asked for

    def pipeline(ms: int, live_s: float = 0.0) -> tuple[float, list[int]]:
        features = MicroWakeWordFeatures()
        chosen = blocks[ms][: round(live_s * 1000 / ms)] if live_s else blocks[ms]

        def step(block: bytes) -> None:
            for one in features.process_streaming(block):
                network.process_streaming(one)

        return len(chosen) * ms / 1000, bench.timed(step, chosen, every_s=ms / 1000 if live_s else 0.0)

    def frontend() -> tuple[float, list[int]]:
        features = MicroWakeWordFeatures()
        durations = bench.timed(lambda block: list(features.process_streaming(block)), blocks[HOP_MS])
        return len(blocks[HOP_MS]) * HOP_MS / 1000, durations

    def steps() -> tuple[float, list[int]]:
        if not computed:
            features = MicroWakeWordFeatures()
            computed.extend(one for block in blocks[HOP_MS] for one in features.process_streaming(block))
        return len(blocks[HOP_MS]) * HOP_MS / 1000, bench.timed(network.process_streaming, computed)

    passes = {"pipeline": partial(pipeline, HOP_MS), "pipeline_10ms": partial(pipeline, 10), "paced": partial(pipeline, HOP_MS)}
    bench.serve({**passes, "frontend": frontend, "network": steps}, {})


def split(pcm: str, samples: int) -> list[np.ndarray]:
    """Whole blocks of the file's int16 samples."""
    every = np.fromfile(pcm, np.int16)
    return list(every[: len(every) // samples * samples].reshape(-1, samples))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_rival(sys.argv[2])
    elif sys.argv[1:2] == ["--serve-numpy"]:
        serve_numpy(sys.argv[2])
    else:
        main()
