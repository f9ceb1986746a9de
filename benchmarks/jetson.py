"""OnDA's table of a Jetson Orin Nano with our columns beside theirs: what pruning saves in training and in inference, on CPU and GPU.

    python benchmarks/jetson.py [--networks ds-cnn-l …] [--compression 0.75] [--repeats 5] [--corpus DIR] [--save]

On a board that deploy/install.sh set up, with NVIDIA's torch: /opt/edgekws/venv/bin/python. With a meter it takes some hours, and says
what it is at; with --save each row is kept as soon as it is measured.

On a machine that does other things too only the ratio of CPU times holds, as waiting for a core counts as latency.

Everything is measured twice in turn: with the network that adapting the weights alone leaves as it is, and with one that has lost the
share `compression` of its parameters, all layers alike, widths in multiples of 8. Ratios are of medians, first over second, so above 1
the pruned one is cheaper. Weights are untrained, as they do not change the cost.

training    one step over 64 windows of 1.6 s, one thread or the GPU
round       a whole round as `edgekws bench adaptation --corpus DIR` measures it, edge, two users: weights-only against OnDA-1 with HAP
inference   one hop of 80 ms through the network alone; OnDA's windows are longer and come every 125 ms, so compare ratios, not times

Energy is the board's input above idle, back to back (`edgekws bench` gives that of real time); of a round it is all that is drawn
meanwhile. What cannot be measured here is not in the table but below it, with the reason. Theirs: OnDA (Risso et al.), "up to", as
its abstract and digests of the paper state them; which share was pruned is not stated, nor on which device the training ran.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgekws import bench
from edgekws.engines import ORDER
from edgekws.errors import EdgekwsError
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.model import Model
from edgekws.power import NoMeter, load_meter
from edgekws.power.conditions import conditions
from edgekws.values import HOP_MS

THEIRS = {  # (phase, device) → latency and energy, weights-only over pruned
    ("training", "cpu"): (1.52, 1.64),
    ("training", "gpu"): (1.52, 1.64),
    ("round", "cpu"): (1.52, 1.64),
    ("inference", "gpu"): (1.57, 1.77),
    ("inference", "cpu"): (1.93, 2.07),
}
PASS_S = 3.0  # of training steps, or one step: a ResNet15's takes 2 s of CPU time on a Xeon, and some more on a board
NO_TORCH = "torch is not installed (on a Jetson NVIDIA's own, else pip install 'edgekws[train]')"
RESULTS = Path(__file__).parent / "results" / "jetson.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["ds-cnn-l", "resnet15", "edge"])
    parser.add_argument("--compression", type=float, default=0.75, help="share of the parameters that is pruned (%(default)g)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--window-s", type=float, default=30.0, help="of each window of energy, where there is a meter (%(default)g)")
    parser.add_argument("--corpus", type=Path, help="for whole rounds: a directory with a manifest.csv")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/jetson.jsonl")
    arguments = parser.parse_args()
    here = {**bench.host(), **conditions()}
    rows = []
    for row in measure(arguments.networks, arguments.compression, arguments.repeats, arguments.window_s, arguments.corpus):
        rows.append(row)
        if arguments.save:
            with RESULTS.open("a") as file:
                print(json.dumps({"benchmark": "jetson", "compression": arguments.compression, **row, "host": here}), file=file)
    print(page(rows, here))


def measure(networks: Sequence[str], compression: float, repeats: int, window_s: float, corpus: Path | None) -> Iterator[dict[str, Any]]:
    """The rows of the table, one by one; one that fails holds the reason, and the others come all the same."""
    phases = {"training": training, "inference": inference}
    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in networks:
            pair = functools.cache(functools.partial(export, name, compression, Path(folder) / name))
            for device in ("cpu", "gpu"):
                for phase, run in phases.items():
                    row = {"network": name, "phase": phase, "device": device}
                    jobs.append((row, lambda run=run, pair=pair, device=device: run(pair(), device, repeats, window_s)))
        jobs.append(({"network": "edge", "phase": "round", "device": "cpu"}, lambda: adaptation(corpus, compression)))
        for i, (row, run) in enumerate(jobs, 1):
            say(f"{i} of {len(jobs)}: {row['network']}, {row['phase']} on {row['device']}")
            try:
                row |= run()
            except Exception as error:  # hours of other rows must not fall with it
                known = isinstance(error, EdgekwsError)
                why = str(error).splitlines()[-1].strip() if known else f"{type(error).__name__}: {error}"
                row |= {"why_no_latency": why, "why_no_energy": why}
            yield row


def say(line: str) -> None:
    """What it is at."""
    print(line, file=sys.stderr, flush=True)


def narrowed(spec: Mapping[str, Any], compression: float) -> dict[str, Any]:
    """A network's layers with the share `compression` of its weights gone: every width times the root of what is left."""
    factor = (1 - compression) ** 0.5

    def width(channels: int) -> int:
        return max(8, round(channels * factor / 8) * 8)

    def layer(one: Any, *, first: bool = False) -> Any:
        if isinstance(one, dict):
            return {"residual": [layer(inner) for inner in one["residual"]]}
        c_in, c_out, *rest = one
        new_in = c_in if first else width(c_in)
        groups = new_in if rest[4] == c_in and c_in > 1 else rest[4]
        return [new_in, width(c_out), *rest[:4], groups, rest[5]]

    layers = [layer(one, first=not i) for i, one in enumerate(copy.deepcopy(spec["layers"]))]
    return {**spec, "layers": layers}


def export(name: str, compression: float, folder: Path) -> dict[str, Model]:
    """The network as it is and narrowed, untrained, as model directories."""
    try:
        import torch
    except ImportError:
        raise EdgekwsError(NO_TORCH) from None

    from edgekws.training.export import save_model
    from edgekws.training.networks import Network, spec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames = np.random.default_rng(0).standard_normal((4, HOP_FRAMES, N_MELS)).astype(np.float32)
    specs = {"weights_only": spec(name), "pruned": narrowed(spec(name), compression)}
    return {
        arm: save_model(Network(one).eval(), folder / arm, id=f"{name}-{arm}", name=name, golden_frames=frames, facts={"spec": one})
        for arm, one in specs.items()
    }


def inference(pair: Mapping[str, Model], device: str, repeats: int, window_s: float) -> dict[str, Any]:
    """One hop through the network, by the first engine of that device that runs here."""
    why = []
    with tempfile.TemporaryDirectory() as folder:
        pcm = Path(folder) / "audio.pcm"
        pcm.write_bytes(bench.audio(20.0).tobytes())
        for engine in (one for one in ORDER if ("tensorrt" in one or "cuda" in one) == (device == "gpu")):
            try:
                with ExitStack() as stack:
                    workers = {arm: stack.enter_context(bench.listener(model, engine, pcm)) for arm, model in pair.items()}
                    found = compare(workers, "network", f"steady_network {window_s}", device, repeats, window_s)
                    precision = workers["pruned"].facts["precision"]
                    return {"parameters": parameters(pair), "engine": engine, "precision": precision, **found}
            except EdgekwsError as error:
                why.append(str(error).splitlines()[-1].strip())
    raise EdgekwsError("; ".join(why))


def training(pair: Mapping[str, Model], device: str, repeats: int, window_s: float) -> dict[str, Any]:
    """One step of training."""
    with ExitStack() as stack:
        workers = {
            arm: stack.enter_context(bench.Worker([__file__, "--serve-training", json.dumps(model.raw["spec"]), device]))
            for arm, model in pair.items()
        }
        return {"parameters": parameters(pair), **compare(workers, "steps", f"steady {window_s}", device, repeats, window_s)}


def compare(workers: Mapping[str, bench.Worker], timed: str, steady: str, device: str, repeats: int, window_s: float) -> dict[str, Any]:
    """Latency in turn, then energy one after the other: `weights_only` and `pruned`, each with ms, cpu_ms and mj, and the ratios."""
    latency_ms: dict[str, list[float]] = {arm: [] for arm in workers}
    cpu_ms: dict[str, list[float]] = {arm: [] for arm in workers}
    for repeat in range(repeats + 1):
        start_s = time.monotonic()
        for arm, worker in workers.items():
            reading = worker.ask(timed)
            if repeat:  # the first one warms up
                latency_ms[arm].append(float(np.median(reading.latency_ms)))
                cpu_ms[arm].append(reading.cpu_s * 1000 / len(reading.latency_ms))
        if (left_s := (time.monotonic() - start_s) * (repeats - repeat)) > 10:
            say(f"  about {left_s:.0f} s of passes left")
    arms: dict[str, dict[str, Any]] = {
        arm: {"ms": round(median(latency_ms[arm]), 4), "cpu_ms": round(median(cpu_ms[arm]), 4), "mj": None} for arm in workers
    }
    now = conditions()
    with closing(load_meter(gpu=device == "gpu")) as meter:
        why = meter.why if isinstance(meter, NoMeter) else ""
        for arm, worker in () if why else workers.items():
            say(f"  energy of {arm}: {(2 * repeats + 1) * window_s:.0f} s of windows")
            modes, power_modes = bench.energy_windows(worker, {"steady": steady}, meter, repeats, window_s)
            now = modes["steady"].get("conditions", now)
            if len(power_modes) > 1:
                why = why or f"the power mode changed meanwhile ({', '.join(power_modes)})"
            else:
                arms[arm]["mj"], why = modes["steady"]["mj_per_hop_above_idle"], why or modes["steady"]["why_not"]
    return {**arms, "meter": meter.name, "conditions": now, **ratios(arms), "why_no_energy": why or None}


def ratios(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Weights-only over pruned."""
    both = [arms["weights_only"], arms["pruned"]]
    found: dict[str, float | None] = {}
    for name, key in (("latency", "ms"), ("cpu", "cpu_ms"), ("energy", "mj")):
        one, other = (arm.get(key) for arm in both)
        found[f"{name}_ratio"] = round(one / other, 2) if one is not None and other else None
    return found


def adaptation(corpus: Path | None, compression: float) -> dict[str, Any]:
    """Whole rounds, as `edgekws bench adaptation` measures them."""
    if corpus is None:
        raise EdgekwsError("not asked for: --corpus DIR")
    command = [sys.executable, "-m", "edgekws", "bench", "adaptation", "--corpus", str(corpus), "--users", "2", "--networks", "edge"]
    command += ["--arms", "weights-only", "onda1-hap", "--compression", f"{1 / (1 - compression):g}", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its progress and its errors are to be seen
    if done.returncode:
        raise EdgekwsError(f"edgekws bench adaptation ended with exit code {done.returncode}; what it said stands above")
    rows, why = json.loads(done.stdout), None
    arms: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for arm, label in (("weights_only", "weights-only"), ("pruned", "onda1-hap")):
        rounds = [one for one in rows if one["arm"] == label and one.get("round_s")]
        if not rounds:
            raise EdgekwsError(f"no round of {label} among its {len(rows)} rows")
        why = why or next((one["why_no_energy"] for one in rounds if one["energy_j"] is None), None)
        mj = None if why else median(one["energy_j"] for one in rounds) * 1000
        cpu_ms = median(one["round_cpu_s"] for one in rounds) * 1000
        arms[arm] = {"ms": median(one["round_s"] for one in rounds) * 1000, "cpu_ms": cpu_ms, "mj": mj}
        counts[arm] = round(median(one["parameters"] for one in rounds))
    return {"parameters": counts, **arms, **ratios(arms), "why_no_energy": why}


def parameters(pair: Mapping[str, Model]) -> dict[str, int]:
    """Of each arm."""
    return {arm: model.parameters for arm, model in pair.items()}


def page(rows: list[dict[str, Any]], here: Mapping[str, Any]) -> str:
    """The table, what is not in it, and the host, as Markdown."""
    head = ["network", "phase", "on", "parameters", "ms weights-only", "ms pruned", "ratio", "of CPU time", "OnDA"]
    cells = [[*head, "mJ weights-only", "mJ pruned", "ratio", "OnDA"]]
    missing: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['phase']} on {row['device']}"
        latency, energy = (f"{one:.2f}" for one in THEIRS[row["phase"], row["device"]])
        counts = row.get("parameters", {})
        if row.get("why_no_latency"):
            missing.setdefault(row["why_no_latency"], []).append(f"{row['network']}, {where}: latency and energy")
        elif row["why_no_energy"]:
            missing.setdefault(row["why_no_energy"], []).append(f"{row['network']}, {where}: energy")
        arms = [row.get(arm, {}) for arm in ("weights_only", "pruned")]
        cells.append(
            [
                row["network"],
                row["phase"],
                f"{row['device']}{' (' + row['engine'] + ' ' + row['precision'] + ')' if 'engine' in row else ''}",
                f"{counts['weights_only']} → {counts['pruned']}" if counts else "-",
                *(f"{arm['ms']:.3f}" if arm.get("ms") is not None else "-" for arm in arms),
                f"{row['latency_ratio']:.2f}" if row.get("latency_ratio") else "-",
                f"{row['cpu_ratio']:.2f}" if row.get("cpu_ratio") and row["device"] == "cpu" else "-",
                latency,
                *(f"{arm['mj']:.3f}" if arm.get("mj") is not None else "-" for arm in arms),
                f"{row['energy_ratio']:.2f}" if row.get("energy_ratio") else "-",
                energy,
            ]
        )
    reasons = [f"- {'; '.join(what)}: {why}" for why, what in missing.items()]
    told = ["Not measured here:", "", *reasons, ""] if reasons else []
    return "\n".join([*bench.table(cells), "", *told, *bench.host_table(here)])


def serve_training(spec: str, device: str) -> None:
    """The measuring process: the only one that loads torch."""
    try:
        import torch
    except ImportError:
        raise EdgekwsError(NO_TORCH) from None
    if device == "gpu" and not torch.cuda.is_available():
        raise EdgekwsError("this torch finds no CUDA GPU")
    from edgekws.training.load import stepper

    step = stepper(json.loads(spec), "cuda" if device == "gpu" else "cpu")

    def steps() -> tuple[float, list[int]]:
        durations: list[int] = []
        while sum(durations) < PASS_S * 1e9:
            durations += bench.timed(lambda _: step(), [0])
        return len(durations) * HOP_MS / 1000, durations

    def steady(seconds: float) -> tuple[float, list[int]]:
        return bench.repeated(lambda _: step(), seconds) * HOP_MS / 1000, []  # a step counts as a hop, so that mJ are those of a step

    bench.serve({"steps": steps, "steady": steady}, {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-training"]:
        try:
            serve_training(*sys.argv[2:])
        except EdgekwsError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            sys.exit(error.exit_code)
    else:
        main()
