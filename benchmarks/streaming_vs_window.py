"""A streaming step against the same network recomputed over a one-second window: the network alone, ONNX Runtime, one thread.

    python benchmarks/streaming_vs_window.py [--networks ds-cnn-l …] [--repeats 9] [--save]

Both are bound once to fixed buffers and run in one process on one core, in turn, one pass to warm up, then `repeats` that count.
The window is 13 hops, 1.04 s: the fewest whole hops that hold a second. It is written as plain convolutions, which ONNX Runtime
computes faster over a window than the step's own form. Ratios are taken within each turn, window over streaming step, so above 1
streaming is cheaper: at the same hop of 80 ms, and against a window every 125 ms, which is what the papers do. Weights are
untrained; they do not change the cost.

What keeps DS-CNN-L below the arithmetic's 13x, from graphs cut off after each node, µs on two Xeon cores (2 MB of second-level cache each):
with its weights at hand a step is about 70: the call, cepstrum and first two layers 16, five products of 6 (63 GMAC/s, as fast as in the
window), four depthwise layers of 4 (past, layout, convolution, layout), mean, head and window 8. It is 25 more, since 1.7 MB of weights go
through that cache once a step: in a chain of products each takes 8 when there are two, 10 with five, 14 with eight and more. 8 times would
be 57 in all. 40 nodes cost 0.3 to 0.5 each at least.
Dropped, each against the present form in one run: images throughout, as the window has them (10 to 17 % slower); images with the past
convolved by itself and added (equal); depthwise as Gather, Mul, ReduceSum (8 µs instead of 5 a layer); the window's states two hops deep
too (slower); an arena, memory patterns, huge pages (equal); no prepacking (60 % slower); graph optimisation below its last level (3 times
slower); the unit length by a product, Sqrt and Div (equal). Of the last five blocks alone: the product as a convolution in ONNX Runtime's
blocked layout (12 % slower), 288 channels for 276, so that its blocks are full (4 %), a depthwise convolution for each of the three frames,
added (17 %; with the product in that layout too 30 %). The products with weights in blocks of 8 bits (MatMulNBits, a quarter of the
bytes): 1.5 times slower on AVX2, five rows are too many for its kernels; in 4 bits 1.25 times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekws import bench
from edgekws.engines import load_engine
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import Model, load_model
from edgekws.values import HOP_MS

WINDOW_HOPS = 13
WINDOW_EVERY_MS = 125
STEPS, WINDOWS = 250, 40  # in one pass: 20 s of audio by steps, 3.2 s by windows at the same hop
RESULTS = Path(__file__).parent / "results" / "streaming_vs_window.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["ds-cnn-l", "ds-cnn-m", "ds-cnn-s", "resnet15", "edge", "edge-small"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/streaming_vs_window.jsonl")
    arguments = parser.parse_args()
    here = bench.host()
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            model = export(name, Path(folder))
            with bench.Worker([__file__, "--serve", folder]) as worker:
                readings: dict[str, list[bench.Reading]] = {"step": [], "window": []}
                for repeat in range(arguments.repeats + 1):
                    for kind, found in readings.items():
                        found.append(worker.ask(kind))
                    if not repeat:
                        readings = {"step": [], "window": []}
        pairs = list(zip(readings["step"], readings["window"], strict=True))
        each_s = {kind: [r.cpu_s / len(r.latency_ms) for r in found] for kind, found in readings.items()}
        row = {
            "benchmark": "streaming_vs_window",
            "network": name,
            "parameters": model.parameters,
            "macs_per_s": model.macs_per_s,
            "window_s": WINDOW_HOPS * HOP_MS / 1000,
            "repeats": arguments.repeats,
            "step_cpu_us": bench.spread(s * 1e6 for s in each_s["step"]),
            "window_cpu_us": bench.spread(s * 1e6 for s in each_s["window"]),
            "step_cpu_s_per_audio_hour": bench.per_audio_hour(readings["step"]),
            "window_every_80_ms_cpu_s_per_audio_hour": bench.per_audio_hour(readings["window"]),
            "ratio_same_hop": bench.spread(window.cpu_s / window.audio_s / (step.cpu_s / step.audio_s) for step, window in pairs),
            "ratio_every_125_ms": bench.spread(
                window.cpu_s / window.audio_s / (step.cpu_s / step.audio_s) * HOP_MS / WINDOW_EVERY_MS for step, window in pairs
            ),
        }
        show(row)
        if arguments.save:
            with RESULTS.open("a") as file:
                print(json.dumps({**row, "host": here}), file=file)
    print(bench.host_line(here))


def export(name: str, folder: Path) -> Model:
    """The untrained network as a model directory `folder`/model, and its whole window as `folder`/window.onnx."""
    import torch

    from edgekws.training.export import save_model, to_onnx
    from edgekws.training.networks import Network, spec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(spec(name)).eval()
    (folder / "window.onnx").write_bytes(to_onnx(network, WINDOW_HOPS)[0])
    frames = np.random.default_rng(0).standard_normal((4, HOP_FRAMES, N_MELS)).astype(np.float32)
    return save_model(network, folder / "model", id=name, name=name, golden_frames=frames, facts={})


def show(row: dict[str, Any]) -> None:
    """One row for people."""
    same, papers = row["ratio_same_hop"], row["ratio_every_125_ms"]
    print(
        f"{row['network']:<11}{row['parameters']:>7} parameters  step {row['step_cpu_us']['median']:8.1f} µs  "
        f"window {row['window_cpu_us']['median']:9.1f} µs  same hop {same['median']:5.2f}x ({same['min']:.2f} to {same['max']:.2f})  "
        f"every 125 ms {papers['median']:5.2f}x ({papers['min']:.2f} to {papers['max']:.2f})",
        flush=True,
    )


def serve(folder: str) -> None:
    """The measuring process: torch is not loaded here."""
    import onnxruntime as ort

    engine = load_engine(load_model(Path(folder) / "model"), "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(Path(folder) / "window.onnx"), options, providers=["CPUExecutionProvider"])
    frames = np.zeros((1, WINDOW_HOPS * HOP_FRAMES, N_MELS), np.float32)
    kept = ort.OrtValue.ortvalue_from_numpy(frames), ort.OrtValue.ortvalue_from_numpy(np.zeros((1, engine.dim), np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_input("frames", kept[0])
    binding.bind_ortvalue_output("embedding", kept[1])
    run, bound, run_options = session._sess.run_with_iobinding, binding._iobinding, ort.RunOptions()
    noise = np.random.default_rng(1).standard_normal((STEPS, HOP_FRAMES, N_MELS)).astype(np.float32)

    def window(first: int) -> None:
        frames[0] = noise[first : first + WINDOW_HOPS].reshape(-1, N_MELS)
        run(bound, run_options)

    bench.serve(
        {
            "step": lambda: (STEPS * HOP_MS / 1000, bench.timed(engine.step, list(noise))),
            "window": lambda: (WINDOWS * HOP_MS / 1000, bench.timed(window, range(WINDOWS))),
        },
        {},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
