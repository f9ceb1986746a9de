"""What listening costs: latency, CPU time, memory. The CLI and benchmarks/ take every timing from here.

What is measured runs in a process of its own (`Worker`), pinned to one core, with one thread. There it does the same pass over the
same audio again and again: once to warm up, then as often as asked, in turn with the others that it stands beside. CPU time is that
of all threads of the process, so it holds on a busy machine too; wall time does not.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgekws import __version__
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError
from edgekws.frontend import LogMel
from edgekws.model import Model, load_model
from edgekws.pipeline import Pipeline
from edgekws.values import HOP_MS, HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Enrolled

KEYWORDS, PROTOTYPES = 3, 3  # enrolled while measuring: three keywords of three recordings each
Item = TypeVar("Item")


def bench(model: Model, backend: str = "auto", *, seconds: float = 60.0, repeats: int = 5, paced_s: float = 10.0) -> list[dict[str, Any]]:
    """What the listener's pipeline costs here, int16 samples in → detections out.

    Args:
        seconds: of audio in one pass.
        repeats: passes that count, after one to warm up.
        paced_s: of audio fed at the pace of a microphone, where caches are cold and each hop is a wake-up. 0 leaves that out.

    Returns:
        One row (DESIGN section 8). The latencies are over all `n` hops; `cpu_s_per_audio_hour` is the median pass, back to back.

    Raises:
        EdgekwsError: the engine cannot run here, or torch was loaded by what only listens.
    """
    if seconds * 1000 < HOP_MS or repeats < 1:
        raise EdgekwsError(f"bench needs at least {HOP_MS / 1000} s of audio and one pass, not {seconds} s and {repeats}")
    here = host()
    with tempfile.TemporaryDirectory(prefix="edgekws-bench-") as folder:
        pcm = Path(folder) / "audio.pcm"
        pcm.write_bytes(audio(seconds).tobytes())
        with listener(model, backend, pcm) as worker:
            warm = worker.ask("pipeline")
            passes: dict[str, list[Reading]] = {name: [] for name in ("pipeline", "frontend", "network", "detector")}
            for _ in range(repeats):
                for name, readings in passes.items():
                    readings.append(worker.ask(name))
            paced = worker.ask(f"paced {paced_s}") if paced_s else None
    if warm.torch_loaded:
        raise EdgekwsError("the listener's process loaded torch, which it must never do. This is a fault of edgekws: please report it")
    cpu = {name: per_audio_hour(readings) for name, readings in passes.items()}
    parts = {name: spread["median"] for name, spread in cpu.items() if name != "pipeline"}
    latency_ms = np.concatenate([reading.latency_ms for reading in passes["pipeline"]])
    return [
        {
            "model": model.id,
            "backend": worker.facts["backend"],
            "precision": worker.facts["precision"],
            "hop_ms": HOP_MS,
            "n": len(latency_ms),
            "warmup": len(warm.latency_ms),
            "repeats": repeats,
            "keywords": KEYWORDS,
            "latency_ms": percentiles(latency_ms),
            "cpu_s_per_audio_hour": cpu["pipeline"]["median"],
            "cpu_s_per_audio_hour_range": [cpu["pipeline"]["min"], cpu["pipeline"]["max"]],
            "cpu_s_per_audio_hour_parts": {**parts, "rest": round(cpu["pipeline"]["median"] - sum(parts.values()), 3)},
            "cpu_s_per_audio_hour_paced": per_audio_hour([paced])["median"] if paced else None,
            "latency_ms_paced": percentiles(paced.latency_ms) if paced else None,
            "real_time_factor": float(np.median([r.wall_s / r.audio_s for r in passes["pipeline"]])),
            "rss_mb": warm.rss_mb,
            "torch_loaded": warm.torch_loaded,
            "parameters": model.parameters,
            "macs_per_s": model.macs_per_s,
            "file_kb": round((model.path / "model.onnx").stat().st_size / 1000, 1),
            "energy_mj_per_hop": None,
            "why_no_energy": "this version of edgekws reads no power meter",
            "host": here,
        }
    ]


def report_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: one block for each, then the host."""
    lines = []
    for row in rows:
        latency, parts, (low, high) = row["latency_ms"], row["cpu_s_per_audio_hour_parts"], row["cpu_s_per_audio_hour_range"]
        lines += [
            f"{row['model']} on {row['backend']} ({row['precision']}),"
            f" {row['n']} hops of {row['hop_ms']} ms after {row['warmup']} to warm up",
            f"  latency per hop   {', '.join(f'{name} {ms:.3f}' for name, ms in latency.items())} ms",
            f"  CPU               {row['cpu_s_per_audio_hour']:.2f} s per hour of audio ({low:.2f} to {high:.2f}"
            f" in {row['repeats']} passes): {', '.join(f'{name} {cost:.2f}' for name, cost in parts.items())}",
        ]
        if row["cpu_s_per_audio_hour_paced"] is not None:
            lines.append(
                f"  at a live pace    {row['cpu_s_per_audio_hour_paced']:.2f} CPU-s per hour of audio, wake-ups and cold caches counted;"
                f" {', '.join(f'{name} {ms:.3f}' for name, ms in row['latency_ms_paced'].items())} ms"
            )
        lines += [
            f"  real-time factor  {row['real_time_factor']:.5f}",
            f"  memory            {row['rss_mb']:.1f} MB at most, torch {'LOADED' if row['torch_loaded'] else 'not loaded'}",
            f"  model             {row['parameters']} parameters, {row['macs_per_s'] / 1e6:.1f} M multiply-adds a second,"
            f" {row['file_kb']} kB",
            f"  energy            {row['energy_mj_per_hop'] if row['energy_mj_per_hop'] is not None else row['why_no_energy']}",
        ]
    for text in dict.fromkeys(host_line(row["host"]) for row in rows):
        lines.append(text)
    return "\n".join(lines)


def audio(seconds: float) -> np.ndarray:
    """The same int16 samples every time: noise that swells and fades once a second, and the demo's stream where that is packaged."""
    count = round(seconds * SAMPLE_RATE_HZ)
    noise = np.random.default_rng(0).standard_normal(count) * 3000 * np.abs(np.sin(np.pi * np.arange(count) / SAMPLE_RATE_HZ))
    samples = np.clip(noise, -32768, 32767).astype(np.int16)
    demo = Path(str(resources.files("edgekws") / "demo" / "stream.flac"))
    if demo.exists():
        from edgekws.audio import read_recording

        speech = read_recording(demo)[: count // 2]
        samples[: len(speech)] = speech
    return samples


def host() -> dict[str, Any]:
    """What a figure depends on beside our code."""
    cpu = platform.processor() or platform.machine()
    for source, prefix in (("/proc/cpuinfo", "model name"), ("/proc/device-tree/model", "")):
        lines = Path(source).read_text(errors="replace").splitlines() if Path(source).exists() else []
        if found := [line for line in lines if line.startswith(prefix)]:
            cpu = found[0].split(":")[-1].strip(" \t\0")
            break
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return {
        "cpu": cpu,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "os": f"{system}, kernel {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": version("onnxruntime"),
        "edgekws": __version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def host_line(here: Mapping[str, Any]) -> str:
    """One line about the host."""
    return (
        f"on {here['cpu']} ({here['machine']}, {here['cores']} cores, load {here['load_average'][0]}), {here['os']},"
        f" Python {here['python']}, numpy {here['numpy']}, onnxruntime {here['onnxruntime']}, edgekws {here['edgekws']}"
    )


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Measuring: what benchmarks/ use as well.


def timed(step: Callable[[Item], object], items: Iterable[Item], *, every_s: float = 0.0) -> list[int]:
    """Nanoseconds of each call (wall). With `every_s`, calls start that far apart, as live audio comes."""
    durations = []
    due = time.perf_counter()
    for item in items:
        if every_s:
            due += every_s
            time.sleep(max(0.0, due - time.perf_counter()))
        before = time.perf_counter_ns()
        step(item)
        durations.append(time.perf_counter_ns() - before)
    return durations


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    array = np.array(list(values))
    return {"median": round(float(np.median(array)), 3), "min": round(float(array.min()), 3), "max": round(float(array.max()), 3)}


def percentiles(latency_ms: np.ndarray) -> dict[str, float]:
    """p50, p95, p99 and max, in ms."""
    p50, p95, p99 = np.percentile(latency_ms, (50, 95, 99))
    return {name: round(float(v), 4) for name, v in (("p50", p50), ("p95", p95), ("p99", p99), ("max", latency_ms.max()))}


@dataclass(frozen=True)
class Reading:
    """One pass in a worker."""

    audio_s: float
    cpu_s: float
    """Of all threads of the process."""
    wall_s: float
    rss_mb: float
    """Most memory that the process held so far."""
    torch_loaded: bool
    latency_ms: np.ndarray
    """float64, shape (calls,)."""


def per_audio_hour(readings: Sequence[Reading]) -> dict[str, float]:
    """CPU seconds for an hour of audio: median, least and most of the passes."""
    return spread(reading.cpu_s / reading.audio_s * 3600 for reading in readings)


class Worker:
    """The parent's end of a measuring process: `python *command`, which calls `serve`."""

    def __init__(self, command: Sequence[str]) -> None:
        package_root = str(Path(__file__).parent.parent)
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread, "PYTHONPATH": python_path},
        )
        self.facts: dict[str, Any] = {}
        try:
            self.facts = self._answer()
        except EdgekwsError:
            self.close()
            raise

    def ask(self, request: str) -> Reading:
        """One pass. Raises EdgekwsError when the process died."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # _answer tells why
            print(request, file=self._process.stdin, flush=True)
        answer = self._answer()
        return Reading(**{**answer, "latency_ms": np.array(answer["latency_ms"])})

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EdgekwsError(f"the measuring process ended with exit code {self._process.wait()}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EdgekwsError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()  # closes its stdin, at which it ends

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(passes: Mapping[str, Callable[..., tuple[float, list[int]]]], facts: Mapping[str, Any]) -> None:
    """The worker's end: answers "NAME [NUMBER ...]" with a reading of that pass, until its input ends.

    A pass returns the seconds of audio that it stood for and the nanoseconds of each call.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        wall, cpu = time.perf_counter(), time.process_time()
        audio_s, durations = passes[name](*map(float, numbers))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        reading = {"audio_s": audio_s, "cpu_s": cpu, "wall_s": wall, "rss_mb": _peak_rss_mb(), "torch_loaded": "torch" in sys.modules}
        print(json.dumps({**reading, "latency_ms": [ns / 1e6 for ns in durations]}), flush=True)


def _peak_rss_mb() -> float:
    # Not getrusage: its ru_maxrss survives exec, so that a child of a big process would look big.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def listener(model: Model, backend: str, pcm: Path) -> Worker:
    """A process that does what the listener does and nothing else: passes "pipeline", "paced SECONDS", "frontend", "network", "detector".

    Args:
        pcm: int16, mono at 16 kHz, no header.
    """
    return Worker(["-m", "edgekws.bench", str(model.path.resolve()), backend, str(pcm)])


def _serve_listener(model_path: str, backend: str, pcm: str) -> None:
    model = load_model(Path(model_path))
    engine = load_engine(model, backend)
    rows = np.random.default_rng(0).standard_normal((KEYWORDS, PROTOTYPES, model.dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    enrolled = [Enrolled(f"keyword {i}", "", prototypes, threshold=2.0) for i, prototypes in enumerate(rows)]
    samples = np.fromfile(pcm, np.int16)
    hops = [samples[first : first + HOP_SAMPLES] for first in range(0, len(samples) - HOP_SAMPLES + 1, HOP_SAMPLES)]
    inputs: dict[str, list[np.ndarray]] = {}  # of the network and the detector, made when first asked for

    def pipeline(audio_s: float = 0.0) -> tuple[float, list[int]]:
        """All of the audio at once, or the first seconds of it at the pace of a microphone."""
        chosen = hops[: round(audio_s * 1000 / HOP_MS)] if audio_s else hops
        chunks = [AudioChunk(hop, i * HOP_SAMPLES) for i, hop in enumerate(chosen)]
        engine.reset()
        feed = Pipeline(engine, Detector(enrolled)).feed
        return len(chunks) * HOP_MS / 1000, timed(feed, chunks, every_s=HOP_MS / 1000 if audio_s else 0.0)

    def part(step: Callable[[Any], object], items: Sequence[Any]) -> tuple[float, list[int]]:
        return len(hops) * HOP_MS / 1000, timed(step, items)

    def frames() -> list[np.ndarray]:
        if "network" not in inputs:
            frontend = LogMel()
            inputs["network"] = [frontend.hop(hop) for hop in hops]
        return inputs["network"]

    def network() -> tuple[float, list[int]]:
        engine.reset()
        return part(engine.step, frames())

    def detector() -> tuple[float, list[int]]:
        if "detector" not in inputs:
            engine.reset()
            inputs["detector"] = [engine.step(one) for one in frames()]
        one = Detector(enrolled)
        return part(lambda embedding: one.step(embedding, 0), inputs["detector"])

    serve(
        {"pipeline": pipeline, "paced": pipeline, "frontend": lambda: part(LogMel().hop, hops), "network": network, "detector": detector},
        {"backend": engine.name, "precision": engine.precision},
    )


if __name__ == "__main__":
    try:
        _serve_listener(*sys.argv[1:])
    except EdgekwsError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(error.exit_code)
