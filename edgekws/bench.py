"""What listening costs: latency, CPU time, memory. The CLI and benchmarks/ take every timing from here.

What is measured runs in a process of its own (`Worker`), pinned to one core, with one thread. There it does the same pass over the
same audio again and again: once to warm up, then as often as asked, in turn with the others that it stands beside. CPU time is that
of all threads of the process, so it holds on a busy machine too; wall time does not.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgekws import __version__
from edgekws.detector import Detector
from edgekws.engines import ORDER, environment, load_engine
from edgekws.errors import EdgekwsError, EngineUnavailable, PowerError, UsageError, install_command
from edgekws.frontend import LogMel
from edgekws.model import Model, graph, load_model
from edgekws.pipeline import Pipeline
from edgekws.power import NoMeter, PowerMeter, Recording, disagreement, load_meter
from edgekws.power.conditions import conditions, power_mode
from edgekws.power.per_hop import per_hop
from edgekws.pseudo_labels import FAR, PseudoLabels
from edgekws.values import HOP_MS, HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Enrolled

KEYWORDS, PROTOTYPES = 3, 3  # enrolled while measuring: three keywords of three recordings each
LATENCY_BUDGET_MS = 20.0  # p99 of a hop, a quarter of it: what an engine must keep to be recommended
SETTLE_S = 0.5  # between a load and the next idle window: sensors average
LONGEST_S = 3600  # of audio in a pass, half a GB while it is made; of a window
KEPT_S = 60  # of the audio in the worker, again and again in a longer pass: its memory is to be that of a listener, which keeps none
MICROPHONE_S = 2.0  # of listening, before its memory is looked at
Item = TypeVar("Item")


def bench(
    model: Model,
    backend: str = "auto",
    *,
    seconds: float = 60.0,
    repeats: int = 5,
    paced_s: float = 10.0,
    window_s: float = 10.0,
    while_adapting: bool = False,
    meter: PowerMeter | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """What the listener's pipeline costs here, int16 samples in → detections out.

    Args:
        backend: an engine, auto, or all: every one that runs here, in turn within each repeat.
        seconds: of audio in one pass.
        repeats: passes that count, after one to warm up; and windows of each mode for the energy.
        paced_s: of audio fed at the pace of a microphone, where caches are cold and each hop is a wake-up. 0 leaves that out, and the
            memory of `edgekws run` at the default microphone too.
        window_s: of idling, of work back to back and of work in real time, in turn, for the energy. Nothing of it without a meter.
        while_adapting: once more beside a process that trains; passes alone and beside it in turn.
        meter: else the first that can be read here.
        say: gets each warning and what takes long.

    Returns:
        One row for each engine, and for each beside training. The latencies are over all `n` hops;
        `cpu_s_per_audio_hour` is the median pass, back to back.

    Raises:
        EdgekwsError: no engine can run here, or torch was loaded by what only listens.
    """
    if not (HOP_MS / 1000 <= seconds <= LONGEST_S and 1 <= repeats <= 10_000 and 0 <= window_s <= LONGEST_S):
        raise UsageError(
            f"bench takes {HOP_MS / 1000} to {LONGEST_S} s of audio, 1 to 10000 passes and windows of up to {LONGEST_S} s,"
            f" not {seconds:g} s, {repeats} and {window_s:g} s"
        )
    here = host()
    if (load := here["load_average"][0]) > here["cores"]:
        say(f"warning: {load:g} programs want {here['cores']} cores, so that latencies are those of a busy machine")
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgekws-bench-") as folder:
        pcm = Path(folder) / "audio.pcm"
        pcm.write_bytes(audio(seconds).tobytes())
        with ExitStack() as stack:
            workers = []
            for name in ORDER if backend == "all" else (backend,):
                try:
                    workers.append(stack.enter_context(listener(model, name, pcm)))
                except EngineUnavailable as error:
                    if backend != "all":
                        raise
                    left_out.append(str(error).splitlines()[-1].strip())
                    say(left_out[-1])
            if not workers:
                raise EngineUnavailable("no inference engine can run here: edgekws doctor says more")
            measured = [_Measured(worker) for worker in workers]
            if while_adapting:
                training = stack.enter_context(Training(model))
                say(f"beside: {training.name}")
                measured += [_Measured(worker, training) for worker in workers]
            for one in measured:
                one.warm_up()
            for _ in range(repeats):
                for one in measured:
                    one.turn()
            for one in measured if paced_s else ():
                one.at_a_live_pace(paced_s)
            backends = dict.fromkeys(one.facts["backend"] for one in measured if paced_s)
            at_a_microphone = {name: _at_a_microphone(model, name, Path(folder)) for name in backends}
        rows = [{**_row(model, one, repeats, here), **at_a_microphone.get(one.facts["backend"], _NO_MICROPHONE)} for one in measured]
        for row in rows:
            row["left_out"] = left_out
        for row, one in zip(rows, measured, strict=True):  # one worker at a time: a second one that idles may keep a GPU awake
            row.update(_energy(model, row, one, pcm, repeats, window_s, meter, say))
    alone = {row["backend"]: row for row in rows if row["beside"] is None}
    for row in rows:
        if row["beside"]:
            other = alone[row["backend"]]
            row["ratio_to_alone"] = {
                **{name: round(row["latency_ms"][name] / other["latency_ms"][name], 2) for name in ("p50", "p99")},
                "cpu": round(row["cpu_s_per_audio_hour"] / other["cpu_s_per_audio_hour"], 2),
            }
    return rows


class _Measured:
    """One engine, alone or beside training, and the passes that it did."""

    def __init__(self, worker: Worker, training: Training | None = None) -> None:
        self.facts = worker.facts
        self.training = training
        self.passes: dict[str, list[Reading]] = {name: [] for name in ("pipeline", "frontend", "network", "detector")}
        self.paced: Reading | None = None
        self._worker = worker

    def warm_up(self) -> None:
        self.warm = self._worker.ask("pipeline")
        if self.warm.torch_loaded:
            raise EdgekwsError("the listener's process loaded torch, which it must never do. This is a fault of edgekws: please report it")
        for name in [*self.passes][1:]:  # what a pass needs is made when it is first asked for, and that is none of its cost
            self._worker.ask(name)

    def turn(self) -> None:
        with self.training.running() if self.training else nullcontext():
            for name, readings in self.passes.items():
                readings.append(self._worker.ask(name))

    def at_a_live_pace(self, seconds: float) -> None:
        with self.training.running() if self.training else nullcontext():
            self.paced = self._worker.ask(f"paced {seconds}")


def _row(model: Model, one: _Measured, repeats: int, here: Mapping[str, Any]) -> dict[str, Any]:
    cpu = {name: per_audio_hour(readings) for name, readings in one.passes.items()}
    parts = {name: spread["median"] for name, spread in cpu.items() if name != "pipeline"}
    latency_ms = np.concatenate([reading.latency_ms for reading in one.passes["pipeline"]])
    return {
        "model": model.id,
        "backend": one.facts["backend"],
        "precision": one.facts["precision"],
        "beside": one.training.name if one.training else None,
        "hop_ms": HOP_MS,
        "n": len(latency_ms),
        "warmup": len(one.warm.latency_ms),
        "repeats": repeats,
        "keywords": KEYWORDS,
        "latency_ms": percentiles(latency_ms),
        "cpu_s_per_audio_hour": cpu["pipeline"]["median"],
        "cpu_s_per_audio_hour_range": [cpu["pipeline"]["min"], cpu["pipeline"]["max"]],
        "cpu_s_per_audio_hour_parts": {**parts, "rest": round(cpu["pipeline"]["median"] - sum(parts.values()), 3)},
        "cpu_s_per_audio_hour_paced": per_audio_hour([one.paced])["median"] if one.paced else None,
        "latency_ms_paced": percentiles(one.paced.latency_ms) if one.paced else None,
        "real_time_factor": float(np.median([r.wall_s / r.audio_s for r in one.passes["pipeline"]])),
        "rss_mb": one.warm.rss_mb,
        "torch_loaded": one.warm.torch_loaded,
        "parameters": model.parameters,
        "macs_per_s": model.macs_per_s,
        "file_kb": round(graph(model, gpu=_on_gpu(one.facts["backend"]))[0].stat().st_size / 1000, 1),
        "host": here,
    }


_NO_MICROPHONE: Mapping[str, Any] = {"rss_mb_microphone": None, "why_no_microphone": "not asked for"}


def _at_a_microphone(model: Model, backend: str, folder: Path) -> Mapping[str, Any]:
    """The most memory of `edgekws run` as users start it, the sound system's libraries included; or why it does not hear anything here."""
    config, id, root = folder / "edgekws.toml", str(model.path.resolve()), str(folder / f"state-{backend}")
    config.write_text(f'[model]\nid = {json.dumps(id)}\nengine = "{backend}"\n[store]\nroot = {json.dumps(root)}\n')
    said = "it ended at once"
    command = [sys.executable, "-m", "edgekws", "run", "--source", "mic:default", "--config", str(config)]
    if not (model.path / "prototypes.npz").exists():  # one that was adapted brings no keyword; what makes one needs more than listening
        takes = sorted(map(str, (Path(__file__).parent / "demo").glob("enrol-*.flac")))
        subprocess.run([*command[:3], "enroll", "open sesame", *takes, *command[-2:]], env=_environment(), cwd="/", capture_output=True)
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, env=_environment(), cwd="/", stdout=quiet, stderr=subprocess.PIPE, text=True, preexec_fn=_die_with_parent
    ) as run:
        assert run.stderr is not None
        try:
            for line in run.stderr:
                if line.startswith("listening to"):
                    time.sleep(MICROPHONE_S)
                    return {"rss_mb_microphone": _peak_rss_mb(run.pid), "why_no_microphone": None}
                said = line.strip() or said
        finally:  # or it would go on to record
            run.kill()
    return {**_NO_MICROPHONE, "why_no_microphone": said.removeprefix("edgekws: ")}


def _energy(
    model: Model,
    row: Mapping[str, Any],
    one: _Measured,
    pcm: Path,
    repeats: int,
    window_s: float,
    given: PowerMeter | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """`energy_mj_per_hop`, `why_no_energy`, `energy` and `conditions` of a row."""
    if one.training:
        why = "training runs beside it, and a meter cannot tell the one from the other"
        return {"energy_mj_per_hop": None, "why_no_energy": why, "energy": None, "conditions": {"after": conditions()}}
    if not window_s:
        return {"energy_mj_per_hop": None, "why_no_energy": "not asked for", "energy": None, "conditions": {"after": conditions()}}
    meter = given or load_meter(gpu=_on_gpu(row["backend"]))
    before = conditions(meter=meter)
    if isinstance(meter, NoMeter):
        return {"energy_mj_per_hop": None, "why_no_energy": meter.why, "energy": None, "conditions": {"before": before, "after": before}}
    try:
        warning = _check(meter) if given is None else None
        if warning:
            say(f"warning: {warning}")
        say(f"energy of {row['backend']}: {(4 * repeats + 1) * window_s:.0f} s of windows")
        requests = {"back_to_back": f"steady {window_s}", "real_time": f"paced {window_s}"}
        with listener(model, row["backend"], pcm) as worker:
            worker.ask("pipeline")
            modes, power_modes = energy_windows(worker, requests, meter, repeats, window_s)
    finally:
        if given is None:
            meter.close()
    real_time = modes["real_time"]
    why = real_time["why_not"]
    if len(power_modes) > 1:
        why = f"the power mode changed during the measurement ({', '.join(power_modes)}): measure again"
    return {
        "energy_mj_per_hop": None if why else real_time["mj_per_hop_above_idle"],
        "why_no_energy": why or None,
        "energy": {"meter": meter.name, "rail": meter.rail, "covers": sorted(meter.covers), "warning": warning, **modes},
        "conditions": {"before": before, "after": conditions(meter=meter)},
    }


def _on_gpu(backend: str) -> bool:
    return any(part in backend for part in ("tensorrt", "cuda"))


def _check(meter: PowerMeter) -> str | None:
    """jtop and sysfs look at the same chip: what they disagree in is worth a warning."""
    if meter.name != "ina3221":
        return None
    other = load_meter("jtop")
    try:
        return disagreement(meter, other)
    except PowerError:
        return None
    finally:
        other.close()


def energy_windows(
    worker: Worker, requests: Mapping[str, str], meter: PowerMeter, repeats: int, window_s: float
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Idle, the first request, idle, the second, idle, and again.

    What each costs by its name (`per_hop`, with the `conditions` in the middle of its last window), and the power modes that were seen.

    Args:
        requests: name → what the worker is asked, to last for about `window_s`. A hop is 80 ms of its reading's audio.
    """
    idle: list[tuple[float, float]] = []
    load: dict[str, list[Reading]] = {name: [] for name in requests}
    during: dict[str, dict[str, Any]] = {}
    power_modes: dict[str, None] = {}

    def rest() -> None:
        if mode := power_mode():
            power_modes[mode] = None
        time.sleep(SETTLE_S)
        begin = time.monotonic()
        time.sleep(window_s)
        idle.append((begin, time.monotonic()))

    with Recording(meter) as recording:
        rest()
        for _ in range(repeats):
            for name, request in requests.items():
                look = threading.Timer(window_s / 2, lambda name=name: during.update({name: conditions(meter=meter)}))
                look.start()
                load[name].append(worker.ask(request))
                look.join()
                rest()
    idle_energy = [recording.energy(*window) for window in idle]
    modes = {}
    for i, (name, readings) in enumerate(load.items()):
        before = [len(requests) * turn + i for turn in range(repeats)]
        around = [one for first in before for one in idle_energy[first : first + 2]]
        energies = [recording.energy(reading.begin_s, reading.end_s) for reading in readings]
        hops = [round(reading.audio_s * 1000 / HOP_MS) for reading in readings]
        modes[name] = {**per_hop(around, energies, hops, meter.step_mw), "conditions": during[name]}
    return modes, list(power_modes)


def recommended(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str] | None:
    """The engine that costs least here and keeps the latency budget, and why; None if none keeps it.

    By what the whole machine draws in real time, as an engine that keeps a GPU awake must pay for that. Engines that the meter cannot tell
    apart, or all of them where there is no meter, are told apart by their CPU time.
    """
    alone = [row for row in rows if row["beside"] is None]
    kept = [row for row in alone if (row["latency_ms_paced"] or row["latency_ms"])["p99"] <= LATENCY_BUDGET_MS]
    if not kept:
        return None
    by_cpu = min(kept, key=lambda row: float(row["cpu_s_per_audio_hour"]))
    drawn = [(row, row["energy"] and row["energy"]["real_time"]) for row in kept]
    if not all(mode and mode["mj_per_hop"] is not None for _, mode in drawn):
        return by_cpu, f"least CPU time, {by_cpu['cpu_s_per_audio_hour']:.2f} s per hour of audio; energy is not known for all"
    least = min(mode["mj_per_hop"] for _, mode in drawn)
    equal = [row for row, mode in drawn if mode["mj_per_hop"] - least <= mode["mj_per_hop_resolution"]]
    if len(equal) == 1:
        return equal[0], f"least energy, {least:g} mJ a hop with all that the machine draws"
    best = min(equal, key=lambda row: float(row["cpu_s_per_audio_hour"]))
    return best, f"least CPU time, {best['cpu_s_per_audio_hour']:.2f} s per hour of audio; the meter cannot tell {len(equal)} of them apart"


def _die_with_parent() -> None:
    """A stopped process would outlive a measurement that was killed, for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Training:
    """Training of the same network beside the listener, at the low priority that adaptation has; stopped but when it is wanted.

    Not a round of `edgekws adapt`: stopped in the middle, that would keep the state directory locked for the listener that is in use.
    """

    def __init__(self, model: Model) -> None:
        self.name = f"training of {model.id}"
        self._command = [sys.executable, "-m", "edgekws.training.load", str(model.path.resolve())]

    def __enter__(self) -> Training:
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(),
            cwd="/",
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise EdgekwsError(f"what trains beside the listener did not start: it needs torch. Try: {install_command('train')}")
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 15)
        self._process.send_signal(signal.SIGSTOP)
        return self

    @contextmanager
    def running(self) -> Iterator[None]:
        """For as long as the block. Raises EdgekwsError when it died."""
        self._process.send_signal(signal.SIGCONT)
        yield
        if self._process.poll() is not None:
            raise EdgekwsError(f"what trained beside the listener ended with exit code {self._process.returncode}: out of memory?")
        self._process.send_signal(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def report_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: one block for each, what to choose where there was a choice, then the host."""
    lines = []
    for row in rows:
        latency, parts, (low, high) = row["latency_ms"], row["cpu_s_per_audio_hour_parts"], row["cpu_s_per_audio_hour_range"]
        lines += [
            f"{row['model']} on {row['backend']} ({row['precision']}){', beside ' + row['beside'] if row['beside'] else ''},"
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
        if row["beside"]:
            lines.append(f"  times that alone  {', '.join(f'{name} {ratio:.2f}' for name, ratio in row['ratio_to_alone'].items())}")
        lines += [
            f"  real-time factor  {row['real_time_factor']:.5f}",
            f"  memory            {row['rss_mb']:.1f} MB at most, torch {'LOADED' if row['torch_loaded'] else 'not loaded'};"
            f" edgekws run at the microphone: {row['why_no_microphone'] or format(row['rss_mb_microphone'], '.1f') + ' MB'}",
            f"  model             {row['parameters']} parameters, {row['macs_per_s'] / 1e6:.1f} M multiply-adds a second,"
            f" {row['file_kb']} kB",
            *(f"  {'energy' if not i else '':<16}  {text}" for i, text in enumerate(_energy_lines(row))),
            f"  conditions        {_conditions_line(row)}",
        ]
    if text := choice(rows):
        lines.append(text)
    for text in dict.fromkeys(host_line(row["host"]) for row in rows):
        lines.append(text)
    return "\n".join(lines)


def _energy_lines(row: Mapping[str, Any]) -> list[str]:
    energy = row["energy"]
    if energy is None:
        return [row["why_no_energy"]]
    lines = [f"{energy['meter']}, {energy['rail']}"]
    for name, mode in (("in real time", energy["real_time"]), ("back to back", energy["back_to_back"])):
        if mode["mj_per_hop"] is None:
            lines.append(f"{name}: {mode['why_not']}")
            continue
        above = mode["mj_per_hop_above_idle"]
        told = mode["why_not"] if above is None else f"{above:g} mJ a hop above idle"
        lines.append(
            f"{name}: {told}; {mode['mj_per_hop']:g} mJ with all that the machine draws ({mode['mw']['median']:g} mW,"
            f" idle {mode['idle_mw']['median']:g}; {mode['windows']} windows of {mode['window_s']:g} s)"
        )
    if row["why_no_energy"] and row["why_no_energy"] != energy["real_time"]["why_not"]:
        lines.append(row["why_no_energy"])
    if energy["warning"]:
        lines.append(f"warning: {energy['warning']}")
    return lines


def _conditions_line(row: Mapping[str, Any]) -> str:
    after = row["conditions"]["after"]
    before = row["conditions"].get("before", after)
    clocks = row["energy"]["real_time"]["conditions"]["clock_mhz"] if row["energy"] else after["clock_mhz"]  # at work, not after it
    said = []
    if after["temperature_c"]:
        zone = max(after["temperature_c"], key=lambda name: float(after["temperature_c"][name]))
        said.append(f"{zone} {before['temperature_c'].get(zone, '?')} °C before, {after['temperature_c'][zone]} after")
    if clocks:
        said.append(", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in clocks.items()))
    if after["power_mode"]:
        said.append(f"power mode {after['power_mode']}")
    missing = [
        name for name, key in (("temperature", "temperature_c"), ("clock", "clock_mhz"), ("power mode", "power_mode")) if not after[key]
    ]
    if missing:
        said.append(f"no {' or '.join(missing)} can be read here")
    return "; ".join(said)


def choice(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which engine to take, where several were measured; "" where there was only one."""
    alone = [row for row in rows if row["beside"] is None]
    if len(alone) < 2:
        return ""
    found = recommended(rows)
    if found is None:
        return f"no engine keeps its 99th percentile within {LATENCY_BUDGET_MS:g} ms of a hop here"
    return f"best by this measurement: {found[0]['backend']}, {found[1]}"


def report_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a page that says on what machine, with what, and what could not be measured."""
    here = rows[0]["host"]
    head = ["model", "engine", "beside", "p50 ms", "p95 ms", "p99 ms", "max ms", "live p99 ms", "CPU-s/h", "MB"]
    cells = [[*head, "mJ/hop above idle", "mJ/hop in all"]]
    for row in rows:
        mode = (row["energy"] or {}).get("real_time", {})
        cells.append(
            [
                row["model"],
                f"{row['backend']} ({row['precision']})",
                row["beside"] or "-",
                *(f"{ms:.3f}" for ms in row["latency_ms"].values()),
                f"{row['latency_ms_paced']['p99']:.3f}" if row["latency_ms_paced"] else "-",
                f"{row['cpu_s_per_audio_hour']:.2f}",
                f"{row['rss_mb']:.0f}",
                f"{row['energy_mj_per_hop']:g}" if row["energy_mj_per_hop"] is not None else "not known",
                f"{mode['mj_per_hop']:g}" if mode.get("mj_per_hop") is not None else "not known",
            ]
        )
    lines = [
        "# edgekws bench",
        "",
        f"{rows[0]['repeats']} passes after one to warm up, {rows[0]['n']} hops of {rows[0]['hop_ms']} ms, {rows[0]['keywords']} keywords,"
        " one core, engines in turn within each pass. The latency is of the whole pipeline, int16 samples in, detections out. Energy is"
        " in real time, one hop each hop.",
        "",
        *table(cells),
        "",
        *(f"- {row['backend']}{', beside ' + row['beside'] if row['beside'] else ''}: {'; '.join(_energy_lines(row))}" for row in rows),
        *(f"- {row['backend']}{', beside ' + row['beside'] if row['beside'] else ''}: {_conditions_line(row)}" for row in rows),
        *([f"- {choice(rows)}"] if choice(rows) else []),
        *(f"- not here: {reason}" for reason in rows[0]["left_out"]),
        "",
        "## Host",
        "",
        *host_table(here),
        "",
    ]
    return "\n".join(lines)


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of Markdown, the first one the head."""
    head, *rest = [f"| {' | '.join(one)} |" for one in cells]
    return [head, "|" + " --- |" * len(cells[0]), *rest]


def host_table(here: Mapping[str, Any]) -> list[str]:
    """The fingerprint as a table of Markdown."""
    return table([["what", "value"], *([name, "not known" if value in (None, {}) else str(value)] for name, value in here.items())])


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
    for source, prefix in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        lines = Path(source).read_text(errors="replace").splitlines() if Path(source).exists() else []
        if found := [line for line in lines if line.startswith(prefix)]:
            cpu = found[0].split(":")[-1].strip(" \t\0")
            break
    l4t = Path("/etc/nv_tegra_release")
    cards = [file.read_text().splitlines()[0] for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return {
        "cpu": cpu,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6),
        "gpu": ", ".join(card.removeprefix("Model:").strip() for card in cards) or None,
        "os": f"{system}, kernel {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": version("onnxruntime"),
        "tensorrt": version("tensorrt"),
        "l4t": l4t.read_text().splitlines()[0].strip("# ") if l4t.exists() else None,
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


def repeated(step: Callable[[int], object], seconds: float) -> int:
    """How often it was called within so long."""
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        step(done)
        done += 1
    return done


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
    begin_s: float = 0.0
    """Of the clock that is the same in every process (time.monotonic)."""
    end_s: float = 0.0


def per_audio_hour(readings: Sequence[Reading]) -> dict[str, float]:
    """CPU seconds for an hour of audio: median, least and most of the passes."""
    return spread(reading.cpu_s / reading.audio_s * 3600 for reading in readings)


def _environment() -> dict[str, str]:
    """Of our processes here: one thread."""
    return {**environment(), **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}}


class Worker:
    """The parent's end of a measuring process: `python *command`, which calls `serve`. Paths in it are absolute."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            cwd="/",
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
            raise EngineUnavailable(answer["error"]) if answer.get("engine") else EdgekwsError(answer["error"])
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
        begin, cpu = time.monotonic(), time.process_time()
        audio_s, durations = passes[name](*map(float, numbers))
        cpu, end = time.process_time() - cpu, time.monotonic()
        reading = {
            "audio_s": audio_s,
            "cpu_s": cpu,
            "wall_s": end - begin,
            "begin_s": begin,
            "end_s": end,
            "rss_mb": _peak_rss_mb(),
            "torch_loaded": "torch" in sys.modules,
        }
        print(json.dumps({**reading, "latency_ms": [ns / 1e6 for ns in durations]}), flush=True)


def _peak_rss_mb(process: int | str = "self") -> float:
    # Not getrusage: its ru_maxrss survives exec, so that a child of a big process would look big.
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def listener(model: Model, backend: str, pcm: Path) -> Worker:
    """A process that does what the listener does and nothing else.

    Its passes: "pipeline", "paced SECONDS", "steady SECONDS", "steady_network SECONDS", "frontend", "network", "detector"; and
    "pipeline_clips", which also cuts clips of a room where nothing comes near a keyword.

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
    all_hops = Path(pcm).stat().st_size // (2 * HOP_SAMPLES)
    hops = list(np.fromfile(pcm, np.int16, min(all_hops, KEPT_S * 1000 // HOP_MS) * HOP_SAMPLES).reshape(-1, HOP_SAMPLES))
    inputs: dict[str, list[np.ndarray]] = {}  # of the network and the detector, made when first asked for

    def pipeline(audio_s: float = 0.0, labels: PseudoLabels | None = None) -> tuple[float, list[int]]:
        """All of the audio at once, or seconds of it, from the start again where it ends, at the pace of a microphone."""
        count = max(1, round(audio_s * 1000 / HOP_MS)) if audio_s else all_hops
        chunks = (AudioChunk(hops[i % len(hops)], i * HOP_SAMPLES) for i in range(count))
        engine.reset()
        feed = Pipeline(engine, Detector(enrolled), labels).feed
        return count * HOP_MS / 1000, timed(feed, chunks, every_s=HOP_MS / 1000 if audio_s else 0.0)

    def steady(seconds: float) -> tuple[float, list[int]]:
        """One hop after the other for so long; nothing of it is timed."""
        engine.reset()
        feed = Pipeline(engine, Detector(enrolled)).feed
        return repeated(lambda i: feed(AudioChunk(hops[i % len(hops)], i * HOP_SAMPLES)), seconds) * HOP_MS / 1000, []

    def steady_network(seconds: float) -> tuple[float, list[int]]:
        engine.reset()
        ready = frames()
        return repeated(lambda i: engine.step(ready[i % len(ready)]), seconds) * HOP_MS / 1000, []

    def part(step: Callable[[Any], object], items: Sequence[Any]) -> tuple[float, list[int]]:
        return all_hops * HOP_MS / 1000, timed(step, (items[i % len(items)] for i in range(all_hops)))

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
        {
            "pipeline": pipeline,
            "pipeline_clips": lambda: pipeline(labels=PseudoLabels([replace(one, threshold=FAR + 1.0) for one in enrolled])),
            "paced": pipeline,
            "steady": steady,
            "steady_network": steady_network,
            "frontend": lambda: part(LogMel().hop, hops),
            "network": network,
            "detector": detector,
        },
        {"backend": engine.name, "precision": engine.precision},
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for who started this
    try:
        _serve_listener(*sys.argv[1:])
    except EdgekwsError as error:
        print(json.dumps({"error": str(error), "engine": isinstance(error, EngineUnavailable)}), flush=True)
        sys.exit(error.exit_code)
