"""Every model in float32, float16 and INT8 on every engine that runs here: bytes, CPU time and latency of a network step, likeness.

    python benchmarks/precision.py [--models edge …] [--repeats 9] [--save]

On a Jetson or any machine with TensorRT this is the one command that shows what no other machine can: that the plans build, that they
reproduce the golden embeddings, and what a step costs beside ONNX Runtime on the CPU. An engine that refuses says why. A step is the
network alone, its frames in and its embedding out; each version on each engine is a process of its own on one core, in turn, one pass
to warm up, then `repeats` that count. Ratios are to model.onnx on onnxruntime, taken within each turn. INT8 is calibrated on the
bundled enrolment and the first quarter of the bundled stream; the cosine to float32 is over the other three quarters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench
from edgekws.audio import read_recording
from edgekws.engines import ORDER, load_engine, parity
from edgekws.errors import EngineUnavailable
from edgekws.frontend import LogMel
from edgekws.model import Model, builtin_models, find_model, graph, load_model
from edgekws.training.quantise import version
from edgekws.values import HOP_MS, HOP_SAMPLES

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(builtin_models()))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/precision.jsonl")
    arguments = parser.parse_args()
    here = bench.host()
    demo = Path(str(resources.files("edgekws") / "demo"))
    stream = hops(demo / "stream.flac")
    quarter = len(stream) // 4
    calibration = np.concatenate([*(hops(path) for path in sorted(demo.glob("enrol-*.flac"))), stream[:quarter]])
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(load_model(find_model(name)), Path(folder), calibration, stream[quarter:], arguments.repeats):
                show(row)
                if arguments.save:
                    with RESULTS.open("a") as file:
                        print(json.dumps({**row, "host": here}), file=file)
    print(bench.host_line(here))


def hops(path: Path) -> np.ndarray:
    """A recording as the network is fed: float32 (n, 4, 40)."""
    samples, frontend = read_recording(path), LogMel()
    return np.stack([frontend.hop(samples[i : i + HOP_SAMPLES]) for i in range(0, len(samples) - HOP_SAMPLES + 1, HOP_SAMPLES)])


def measure(model: Model, folder: Path, calibration: np.ndarray, stream: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """A row for each precision and engine; what cannot run here is told and left out."""
    np.save(folder / "stream.npy", stream)
    made = [
        model,
        *(version(model, folder / what, id=f"{model.id}-{what}", precision=what, frames=calibration) for what in ("fp16", "int8")),
    ]
    rows: list[dict[str, Any]] = []
    workers: list[bench.Worker] = []
    reference = np.zeros(0)
    told: set[str] = set()
    try:
        for one in made:
            for name in ORDER:
                path, precision = graph(one, gpu=name != "onnxruntime")
                if one is made[1] and precision != "fp16":
                    continue  # on a CPU that is model.onnx again
                try:
                    engine = load_engine(one, name)
                except EngineUnavailable as error:
                    reason = str(error).splitlines()[-1].strip()
                    if reason not in told:
                        print(f"{one.id} not on {reason}", file=sys.stderr)
                    told.add(reason)
                    continue
                embeddings = engine.steps(stream)
                off = parity(engine, one)
                engine.close()
                if not rows:
                    reference = embeddings
                cosine = (embeddings * reference).sum(1)
                size = path.stat().st_size
                rows.append(
                    {
                        "benchmark": "precision",
                        "model": model.id,
                        "engine": name,
                        "precision": precision,
                        "repeats": repeats,
                        "file_bytes": size,
                        "file_ratio": round(size / (model.path / "model.onnx").stat().st_size, 3),
                        "off_golden": float(f"{off:.3g}"),
                        "cosine_to_fp32": {"median": round(float(np.median(cosine)), 5), "min": round(float(cosine.min()), 5)},
                    }
                )
                workers.append(bench.Worker([__file__, "--serve", str(one.path.resolve()), name, str(folder / "stream.npy")]))
        turns = [[worker.ask("step") for worker in workers] for _ in range(repeats + 1)][1:]
    finally:
        for worker in workers:
            worker.close()
    for i, row in enumerate(rows):
        row["step_cpu_us"] = bench.spread(turn[i].cpu_s / len(stream) * 1e6 for turn in turns)
        row["step_cpu_ratio"] = bench.spread(turn[i].cpu_s / turn[0].cpu_s for turn in turns)
        row["step_latency_ms"] = bench.percentiles(np.concatenate([turn[i].latency_ms for turn in turns]))
    return rows


def show(row: dict[str, Any]) -> None:
    """One row for people."""
    cpu, ratio, alike = row["step_cpu_us"], row["step_cpu_ratio"], row["cosine_to_fp32"]
    print(
        f"{row['model']:<13}{row['engine']:<17}{row['precision']:<5} {row['file_bytes'] / 1000:7.0f} kB {row['file_ratio']:5.2f}x",
        f"CPU {cpu['median']:6.1f} µs a step {ratio['median']:5.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"p50 {row['step_latency_ms']['p50'] * 1000:.0f} µs",
        f"cosine {alike['median']:.4f}, least {alike['min']:.4f}",
        f"off golden {row['off_golden']:.1g}",
        sep="  ",
        flush=True,
    )


def serve(path: str, engine_name: str, stream: str) -> None:
    """The measuring process."""
    engine = load_engine(load_model(Path(path)), engine_name)
    frames = list(np.load(stream))
    bench.serve({"step": lambda: (len(frames) * HOP_MS / 1000, bench.timed(engine.step, frames))}, {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:5])
    else:
        main()
