import contextlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from edgekws import bench
from edgekws.cli import main
from edgekws.errors import EdgekwsError, PowerError
from edgekws.model import Model, find_model, load_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(find_model("edge-small"))


@pytest.fixture(scope="module")
def rows(model) -> list[dict]:
    return bench.bench(model, seconds=8.01, repeats=2, paced_s=0.4)


def test_a_row_holds_what_scripts_rely_on(rows, model):
    (row,) = json.loads(json.dumps(rows))

    assert {"model", "backend", "precision", "hop_ms", "n", "latency_ms", "cpu_s_per_audio_hour", "real_time_factor", "rss_mb"} <= set(row)
    assert (row["model"], row["backend"], row["precision"], row["hop_ms"]) == (model.id, "onnxruntime", "fp32", 80)
    assert row["parameters"] == model.parameters
    assert row["file_kb"] == pytest.approx((model.path / "model.onnx").stat().st_size / 1000, abs=0.1)
    assert (row["energy_mj_per_hop"], bool(row["why_no_energy"])) == (None, True)
    assert {"cpu", "cores", "os", "python", "numpy", "onnxruntime", "load_average"} <= set(row["host"])


def test_every_hop_of_every_pass_is_counted(rows):
    """8.01 s are 100 whole hops."""
    assert (rows[0]["n"], rows[0]["warmup"], rows[0]["repeats"]) == (200, 100, 2)


def test_figures_are_in_order(rows):
    latency, (low, high) = rows[0]["latency_ms"], rows[0]["cpu_s_per_audio_hour_range"]

    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert 0 < low <= rows[0]["cpu_s_per_audio_hour"] <= high
    assert set(rows[0]["cpu_s_per_audio_hour_parts"]) == {"frontend", "network", "detector", "rest"}


def test_each_pass_is_done_once_before_it_counts_and_memory_is_looked_at_first():
    """What a pass needs is made when it is first asked for."""

    class Asked:
        def __init__(self):
            self.facts, self.names = {}, []

        def ask(self, name):
            self.names.append(name)
            return bench.Reading(audio_s=1, cpu_s=1, wall_s=1, rss_mb=len(self.names), torch_loaded=False, latency_ms=np.ones(1))

    worker = Asked()
    one = bench._Measured(worker)
    one.warm_up()

    assert set(worker.names) == set(one.passes) and not any(one.passes.values())
    assert one.warm.rss_mb == 1


def test_the_memory_is_the_listener_s_however_long_the_audio_of_a_pass(model, tmp_path):
    pcm, found = tmp_path / "audio.pcm", []
    for seconds in (60, 900):
        pcm.write_bytes(bytes(2 * 16_000 * seconds))
        with bench.listener(model, "onnxruntime", pcm) as worker:
            found.append(worker.ask("pipeline"))
    short, long = found

    assert (short.audio_s, long.audio_s, len(long.latency_ms)) == (60, 900, 11_250)
    assert long.rss_mb - short.rss_mb < 5


def test_the_listener_is_small_though_torch_is_loaded_here(model):
    pytest.importorskip("torch")
    (row,) = bench.bench(model, seconds=1, repeats=1, paced_s=0)

    assert row["torch_loaded"] is False
    assert 15 < row["rss_mb"] <= 80
    assert row["cpu_s_per_audio_hour_paced"] is None


def test_the_daemon_at_a_microphone_is_small_too(null_sink, monkeypatch):
    """With the plug-ins that PortAudio opens while it looks for devices: libasound2-plugins brings a hundred libraries."""
    monkeypatch.setenv("PULSE_SERVER", null_sink.env["PULSE_SERVER"])
    (row,) = bench.bench(load_model(find_model()), seconds=1, repeats=1, paced_s=0.1)

    assert row["why_no_microphone"] is None
    assert 15 < row["rss_mb_microphone"] <= 80
    assert f"edgekws run at the microphone: {row['rss_mb_microphone']:.1f} MB" in bench.report_table([row])


def test_a_bench_that_is_killed_leaves_no_listener_that_records(null_sink, tmp_path):
    env = {**os.environ, "PULSE_SERVER": null_sink.env["PULSE_SERVER"], "STATE_DIRECTORY": str(tmp_path), "TMPDIR": str(tmp_path)}
    killed = subprocess.Popen([sys.executable, "-m", "edgekws", "bench", "--seconds", "1", "--repeats", "1"], env=env)

    def listeners():
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = os.fsdecode((one / "cmdline").read_bytes()).split("\0")  # another test runs one with a name that is no UTF-8
                if "mic:default" in words and any(word.startswith(str(tmp_path)) for word in words):
                    found.append(one.name)
        return found

    while not listeners() and killed.poll() is None:
        time.sleep(0.05)
    seen = listeners()
    killed.kill()
    killed.wait()
    deadline_s = time.monotonic() + 10
    while listeners() and time.monotonic() < deadline_s:
        time.sleep(0.05)

    assert seen and not listeners()


def test_without_a_microphone_the_reason_is_told(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PULSE_SERVER", f"unix:{tmp_path}/none")
    (row,) = bench.bench(model, seconds=1, repeats=1, paced_s=0.1)
    if row["rss_mb_microphone"]:
        pytest.skip("there is a microphone here")

    assert row["why_no_microphone"].startswith("cannot open mic:default: ") or "no microphone can be opened" in row["why_no_microphone"]
    assert row["why_no_microphone"] in bench.report_table([row])


def test_the_table_says_it_to_people(rows, model):
    table = bench.report_table(rows)

    assert table.startswith(f"{model.id} on onnxruntime (fp32), 200 hops of 80 ms after 100 to warm up\n")
    assert "torch not loaded" in table
    assert rows[0]["why_no_energy"] in table


def test_an_unknown_backend_lists_those_accepted(model):
    with pytest.raises(
        EdgekwsError, match=r'no engine "npu"\. Accepted: auto, onnxruntime, tensorrt, onnxruntime-cuda, tensorrt-refit, null'
    ):
        bench.bench(model, "npu", seconds=1, repeats=1)


@pytest.mark.parametrize(("seconds", "repeats"), [(0.07, 1), (1, 0), (float("nan"), 1), (1e40, 1), (1, 10**20)])
def test_nothing_to_measure_and_more_than_anybody_waits_for_are_refused(model, seconds, repeats):
    with pytest.raises(EdgekwsError, match=r"bench takes 0\.08 to 3600 s of audio, 1 to 10000 passes"):
        bench.bench(model, seconds=seconds, repeats=repeats)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seconds", "0"], "bench takes 0.08 to 3600 s of audio, 1 to 10000 passes and windows of up to 3600 s, not 0 s, 5 and 10 s"),
        (["--report", "a.txt"], "--report a.txt: accepted is a name that ends with .md, in a directory that is there"),
        (["--report", "nowhere/a.md"], "--report nowhere/a.md: accepted is a name that ends with .md"),
        (["--corpus", "."], "--corpus is an option of edgekws bench adaptation, this is bench listener"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(options, words, tmp_path, capsys):
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{tmp_path}"\n')
    assert main(["bench", *options, "--config", str(config)]) == 2
    assert words in capsys.readouterr().err


def test_a_worker_that_dies_is_reported():
    with pytest.raises(EdgekwsError, match="the measuring process ended with exit code 3"):
        bench.Worker(["-c", "raise SystemExit(3)"])


# Energy.


class Steady:
    """A board that always draws 4 W."""

    name, rail, covers, counts, interval_s, waits, step_mw = "steady", "VDD_IN", frozenset({"cpu", "gpu"}), False, 0.02, False, 40.0

    def read(self) -> dict[str, float]:
        return {"VDD_IN": 4000.0}

    def close(self) -> None:
        raise AssertionError("the meter is its owner's to close")


class Busy(Steady):
    """One that draws 3 W more for as long as our measuring processes compute: their CPU time as the kernel counts it, in mJ."""

    counts, step_mw = True, None

    def read(self) -> dict[str, float]:
        ticks, own = 0.0, f"({Path(sys.executable).name}"[:9]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                text = stat.read_text()
                fields = text.rpartition(")")[2].split()
                if int(fields[1]) == os.getpid() and own in text:
                    ticks += int(fields[11]) + int(fields[12])
        return {"VDD_IN": 1000 * time.monotonic() + 3000 * ticks / os.sysconf("SC_CLK_TCK")}


@pytest.fixture
def measure(model, monkeypatch):
    def run(meter, *, gap_s=60.0, **options) -> dict:
        monkeypatch.setattr("edgekws.power.recording.GAP_S", gap_s)  # a busy machine may starve the sampler for seconds
        (row,) = bench.bench(model, **{"seconds": 1, "repeats": 2, "paced_s": 0, "meter": meter, **options})
        return row

    return run


def test_a_listener_that_draws_nothing_to_be_seen_has_no_energy_but_the_reason(measure):
    row = measure(Steady(), window_s=0.3)

    assert row["energy_mj_per_hop"] is None
    assert row["why_no_energy"] == "below the sensor's resolution (0.0 mW above idle, 40.0 can be told)"
    assert row["energy"]["real_time"]["mj_per_hop"] >= 4000 * 0.08 * 0.95  # 4 hops in 0.32 s, or later on a busy machine
    assert row["energy"]["back_to_back"]["mw"]["median"] == pytest.approx(4000)
    assert "in real time: below the sensor's resolution" in bench.report_table([row])


def test_without_windows_no_energy_is_asked_for_and_the_rest_is_told(measure):
    row = measure(Steady(), window_s=0, repeats=1)

    assert (row["energy_mj_per_hop"], row["why_no_energy"]) == (None, "not asked for") and row["latency_ms"]["p50"] > 0
    assert "not asked for" in bench.report_table([row])


def test_work_back_to_back_draws_more_than_in_real_time(measure):
    energy = measure(Busy(), window_s=0.6)["energy"]

    assert energy["back_to_back"]["mj_per_hop_above_idle"] > 0
    assert energy["back_to_back"]["above_idle_mw"]["median"] > energy["real_time"]["above_idle_mw"]["median"]
    assert energy["back_to_back"]["hops"] > energy["real_time"]["hops"]


def test_a_meter_that_vanishes_leaves_the_latency_and_the_reason(measure):
    class Vanishing(Steady):
        left = 20

        def read(self) -> dict[str, float]:
            self.left -= 1
            if self.left < 0:
                raise PowerError("curr1_input: No such device")
            return super().read()

    row = measure(Vanishing(), gap_s=1.0, window_s=1.2, repeats=1)

    assert row["latency_ms"]["p50"] > 0
    assert row["energy_mj_per_hop"] is None
    assert "no reading from" in row["why_no_energy"]
    assert "curr1_input: No such device" in row["why_no_energy"]


def test_a_power_mode_that_changes_meanwhile_is_no_energy(measure, monkeypatch):
    """Faked: setting one takes a Jetson."""
    modes = iter(["15W", "15W", "MAXN_SUPER"])
    monkeypatch.setattr(bench, "power_mode", lambda: next(modes, "MAXN_SUPER"))
    row = measure(Steady(), window_s=0.1, repeats=1)

    assert row["energy_mj_per_hop"] is None
    assert row["why_no_energy"] == "the power mode changed during the measurement (15W, MAXN_SUPER): measure again"


def test_clocks_are_those_at_work(measure, monkeypatch):
    """Faked: virtual machines tell no clock."""
    clocks = iter([729.0, 1728.0, 1510.0])
    monkeypatch.setattr(
        bench,
        "conditions",
        lambda meter=None: {"temperature_c": {"tj": 50.0}, "clock_mhz": {"cpu0": next(clocks, 730.0)}, "power_mode": "15W"},
    )
    row = measure(Steady(), window_s=0.2, repeats=1)

    assert row["conditions"]["before"]["clock_mhz"] == {"cpu0": 729.0}
    assert row["energy"]["back_to_back"]["conditions"]["clock_mhz"] == {"cpu0": 1728.0}
    assert "conditions        tj 50.0 °C before, 50.0 after; cpu0 1510 MHz; power mode 15W\n" in bench.report_table([row])


def test_jtop_and_sysfs_that_disagree_are_reported_with_the_row(model, monkeypatch):
    """Faked: it takes a Jetson on which one of them is wrong."""

    class Sysfs(Steady):
        name = "ina3221"

        def close(self) -> None:
            pass

    class Jtop(Sysfs):
        name = "jtop"

        def read(self) -> dict[str, float]:
            return {"VDD_IN": 5000.0}

    monkeypatch.setattr(bench, "load_meter", lambda wanted="auto", gpu=False: Jtop() if wanted == "jtop" else Sysfs())
    said = []
    (row,) = bench.bench(model, seconds=1, repeats=1, paced_s=0, window_s=0.1, say=said.append)

    assert row["energy"]["warning"].startswith("ina3221 reads 4000 mW and jtop 5000 mW over the same rails (VDD_IN): more than 10% apart")
    assert f"warning: {row['energy']['warning']}" in said
    assert "  warning: ina3221 reads" in bench.report_table([row])


# The choice among engines.


def engine_row(backend, cpu_s, p99_ms=1.0, mj=None, resolution=1.0, beside=None):
    energy = None if mj is None else {"real_time": {"mj_per_hop": mj, "mj_per_hop_resolution": resolution}}
    return {
        "backend": backend,
        "beside": beside,
        "cpu_s_per_audio_hour": cpu_s,
        "latency_ms": {"p99": p99_ms},
        "latency_ms_paced": None,
        "energy": energy,
    }


@pytest.mark.parametrize(
    ("rows", "best", "why"),
    [
        ([engine_row("gpu", 1.0, mj=410), engine_row("cpu", 3.0, mj=390)], "cpu", "least energy, 390 mJ a hop"),
        ([engine_row("gpu", 1.0, mj=390.5), engine_row("cpu", 3.0, mj=390)], "gpu", "the meter cannot tell 2 of them apart"),
        ([engine_row("gpu", 1.0), engine_row("cpu", 3.0)], "gpu", "least CPU time, 1.00 s per hour of audio; energy is not known for all"),
        ([engine_row("gpu", 1.0, mj=390), engine_row("cpu", 3.0)], "gpu", "least CPU time"),
        ([engine_row("gpu", 1.0, p99_ms=21.0), engine_row("cpu", 3.0)], "cpu", "least CPU time"),
        ([engine_row("cpu", 3.0), engine_row("gpu", 1.0, beside="training")], "cpu", "least CPU time"),
    ],
)
def test_the_recommended_engine_costs_least_and_keeps_the_latency(rows, best, why):
    row, said = bench.recommended(rows)

    assert row["backend"] == best
    assert why in said


def test_no_engine_is_recommended_that_is_too_slow():
    rows = [engine_row("gpu", 1.0, p99_ms=30.0), engine_row("cpu", 3.0, p99_ms=40.0)]

    assert bench.recommended(rows) is None
    assert bench.choice(rows) == "no engine keeps its 99th percentile within 20 ms of a hop here"


def test_the_choice_is_told_where_there_is_one():
    assert bench.choice([engine_row("gpu", 3.0), engine_row("cpu", 1.0)]).startswith("best by this measurement: cpu, least CPU time")
    assert bench.choice([engine_row("cpu", 1.0)]) == ""


def test_all_measures_what_runs_here_and_says_why_the_rest_does_not(model, monkeypatch):
    monkeypatch.setattr(bench, "ORDER", ("abacus", "onnxruntime"))
    said = []
    rows = bench.bench(model, "all", seconds=1, repeats=1, paced_s=0, say=said.append)

    assert [row["backend"] for row in rows] == ["onnxruntime"]
    assert said[-1].startswith('no engine "abacus"') and rows[0]["left_out"] == said[-1:]
    assert f"- not here: {said[-1]}\n" in bench.report_markdown(rows)


def test_a_busy_machine_is_warned_of(model, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    said = []
    bench.bench(model, "onnxruntime", seconds=0.08, repeats=1, paced_s=0, say=said.append)

    assert said == ["warning: 7.5 programs want 2 cores, so that latencies are those of a busy machine"]


# Beside training.


def test_beside_training_there_is_a_second_row_with_ratios(model):
    pytest.importorskip("torch")
    alone, beside = bench.bench(model, seconds=1, repeats=2, paced_s=0.2, while_adapting=True)

    assert (alone["beside"], "ratio_to_alone" in alone) == (None, False)
    assert beside["beside"] == f"training of {model.id}"
    assert beside["ratio_to_alone"].keys() == {"p50", "p99", "cpu"}
    assert beside["torch_loaded"] is False
    assert beside["why_no_energy"].startswith("training runs beside it")
    assert "times that alone" in bench.report_table([alone, beside])


def test_training_computes_only_while_it_is_wanted(model):
    pytest.importorskip("torch")

    def cpu_ticks(process) -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with bench.Training(model) as training:
        begin = cpu_ticks(training._process)
        time.sleep(0.3)
        stopped = cpu_ticks(training._process)
        with training.running():
            end = time.monotonic() + 20
            while cpu_ticks(training._process) - stopped < 5 and time.monotonic() < end:
                time.sleep(0.05)
        worked = cpu_ticks(training._process)

    assert stopped - begin <= 1
    assert worked - stopped >= 5
    assert training._process.poll() is not None


def test_training_does_not_outlive_a_measurement_that_was_killed(model):
    pytest.importorskip("torch")
    script = f"""
import time
from pathlib import Path
from edgekws.bench import Training
from edgekws.model import load_model
with Training(load_model(Path({str(model.path)!r}))) as training:
    print(training._process.pid, flush=True)
    time.sleep(60)
"""
    measuring = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    training = Path(f"/proc/{int(measuring.stdout.readline())}/stat")
    measuring.kill()
    measuring.communicate()
    end = time.monotonic() + 10
    while training.exists() and ") Z " not in training.read_text() and time.monotonic() < end:
        time.sleep(0.05)

    assert not training.exists() or ") Z " in training.read_text()


def test_training_that_dies_meanwhile_is_no_measurement(model):
    pytest.importorskip("torch")
    died = pytest.raises(EdgekwsError, match="what trained beside the listener ended with exit code -9")
    with bench.Training(model) as training, died, training.running():
        training._process.kill()
        training._process.wait()


# Reports.


def test_the_page_holds_each_row_the_reasons_and_the_host(rows, model):
    page = bench.report_markdown(rows)

    assert f"| {model.id} | onnxruntime (fp32) | - |" in page
    assert page.partition("## Host")[0].count("not known") == 2
    assert rows[0]["why_no_energy"] in page
    assert f"| cpu | {rows[0]['host']['cpu']} |" in page


def test_a_report_is_a_page_and_the_same_rows_as_json(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.bench.__kwdefaults__, "paced_s", 0.1)  # no option, and ten seconds
    page = tmp_path / "bench.md"
    assert main(["bench", "--model", "edge-small", "--seconds", "1", "--repeats", "1", "--report", str(page), "--json"]) == 0

    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert f"| {row['model']} | {row['backend']} ({row['precision']}) | - |" in page.read_text()


def test_the_audio_is_the_same_every_time():
    assert np.array_equal(bench.audio(3), bench.audio(3))
    assert bench.audio(3).dtype == np.int16
    assert len(bench.audio(3)) == 48_000


def test_cpu_time_is_scaled_to_an_hour_of_audio():
    readings = [bench.Reading(audio_s=60, cpu_s=s, wall_s=9, rss_mb=1, torch_loaded=False, latency_ms=np.ones(1)) for s in (0.1, 0.3, 0.2)]

    assert bench.per_audio_hour(readings) == {"median": 12, "min": 6, "max": 18}


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_have_no_timing_code_of_their_own(script):
    """What computing costs is bench's to measure. Scenarios may sleep, and watch processes come and go, by the monotonic clock."""
    assert re.findall(r"\bfrom time\b|perf_counter|process_time|thread_time|timeit", script.read_text()) == []


def output_of(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


@pytest.mark.skipif(find_spec("pymicro_wakeword") is None, reason="pymicro-wakeword is not installed (pip install 'edgekws[bench]')")
def test_the_listener_stands_beside_its_rival():
    output = output_of("listener.py", "--models", "edge-small", "--seconds", "2", "--repeats", "1", "--live-s", "0")

    assert re.search(r"^pymicro-wakeword: .*MB(.|\n)*^edge-small.*: (.|\n)*^  ratio_to_pymicro ", output, re.MULTILINE)


def test_streaming_stands_beside_windows():
    pytest.importorskip("torch")
    output = output_of("streaming_vs_window.py", "--networks", "edge-small", "--repeats", "1")

    assert re.search(r"^edge-small .* same hop .*x .* every 125 ms ", output)


def test_the_jetsons_table_has_our_columns_and_says_what_is_missing():
    pytest.importorskip("torch")
    output = output_of("jetson.py", "--networks", "edge-small", "--repeats", "1", "--window-s", "0.2")

    assert re.search(r"^\| edge-small \| training \| cpu \| 87408 → 24904( \| [\d.]+){4} \| 1\.52 \|", output, re.MULTILINE)
    assert re.search(r"^\| edge-small \| inference \| cpu \(onnxruntime fp32\) .* \| 1\.93 \|", output, re.MULTILINE)
    assert "edge, round on cpu: latency and energy: not asked for: --corpus DIR" in output


@pytest.fixture
def jetson():
    pytest.importorskip("torch")
    spec = spec_from_file_location("jetson", BENCHMARKS / "jetson.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_of_the_jetsons_table_that_fails_leaves_the_others(jetson, monkeypatch):
    def training(pair, device, repeats, window_s):
        if device == "gpu":
            raise RuntimeError("CUDA out of memory")
        return {
            "weights_only": {"ms": 8.0, "mj": None},
            "pruned": {"ms": 4.0, "mj": None},
            "latency_ratio": 2.0,
            "why_no_energy": "no meter",
        }

    monkeypatch.setattr(jetson, "training", training)
    rows = list(jetson.measure(["edge-small"], 0.75, 1, 0.1, None))
    page = jetson.page(rows, {"cpu": "one", "l4t": None})

    assert [(row["phase"], row["device"], "weights_only" in row) for row in rows] == [
        ("training", "cpu", True),
        ("inference", "cpu", True),
        ("training", "gpu", False),
        ("inference", "gpu", False),
        ("round", "cpu", False),
    ]
    assert "| edge-small | training | cpu | - | 8.000 | 4.000 | 2.00 | - | 1.52 | - | - | - | 1.64 |" in page
    assert "- edge-small, training on gpu: latency and energy: RuntimeError: CUDA out of memory" in page
    assert "| l4t | not known |" in page


def test_where_there_is_a_meter_the_jetsons_table_has_energy(jetson, monkeypatch, tmp_path):
    class Meter(Busy):
        def close(self) -> None:
            pass

    monkeypatch.setattr("edgekws.power.recording.GAP_S", 60.0)
    monkeypatch.setattr(jetson, "load_meter", lambda gpu: Meter())
    found = jetson.inference(jetson.export("edge-small", 0.75, tmp_path), "cpu", 1, 1.0)

    assert found["weights_only"]["mj"] > 0 and found["pruned"]["mj"] > 0
    assert found["energy_ratio"] == pytest.approx(found["weights_only"]["mj"] / found["pruned"]["mj"], abs=0.01)
    assert found["why_no_energy"] is None

    modes = iter(["15W", "MAXN_SUPER"])
    monkeypatch.setattr(bench, "power_mode", lambda: next(modes, "MAXN_SUPER"))
    found = jetson.inference(jetson.export("edge-small", 0.75, tmp_path / "again"), "cpu", 1, 0.1)

    assert found["why_no_energy"] == "the power mode changed meanwhile (15W, MAXN_SUPER)"
    assert (found["weights_only"]["mj"], found["energy_ratio"]) == (None, None)
    assert found["weights_only"]["ms"] > 0
