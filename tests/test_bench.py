import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgekws import bench
from edgekws.errors import EdgekwsError
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


def test_the_listener_is_small_though_torch_is_loaded_here(model):
    pytest.importorskip("torch")
    (row,) = bench.bench(model, seconds=1, repeats=1, paced_s=0)

    assert row["torch_loaded"] is False
    assert 15 < row["rss_mb"] <= 80
    assert row["cpu_s_per_audio_hour_paced"] is None


def test_the_table_says_it_to_people(rows, model):
    table = bench.report_table(rows)

    assert table.startswith(f"{model.id} on onnxruntime (fp32), 200 hops of 80 ms after 100 to warm up\n")
    assert "torch not loaded" in table
    assert rows[0]["why_no_energy"] in table


def test_an_unknown_backend_lists_those_accepted(model):
    with pytest.raises(EdgekwsError, match=r'no engine "npu"\. Accepted: auto, onnxruntime, null'):
        bench.bench(model, "npu", seconds=1, repeats=1)


@pytest.mark.parametrize(("seconds", "repeats"), [(0.07, 1), (1, 0)])
def test_nothing_to_measure_is_refused(model, seconds, repeats):
    with pytest.raises(EdgekwsError, match=r"bench needs at least 0\.08 s of audio and one pass"):
        bench.bench(model, seconds=seconds, repeats=repeats)


def test_a_worker_that_dies_is_reported():
    with pytest.raises(EdgekwsError, match="the measuring process ended with exit code 3"):
        bench.Worker(["-c", "raise SystemExit(3)"])


def test_the_audio_is_the_same_every_time():
    assert np.array_equal(bench.audio(3), bench.audio(3))
    assert bench.audio(3).dtype == np.int16
    assert len(bench.audio(3)) == 48_000


def test_cpu_time_is_scaled_to_an_hour_of_audio():
    readings = [bench.Reading(audio_s=60, cpu_s=s, wall_s=9, rss_mb=1, torch_loaded=False, latency_ms=np.ones(1)) for s in (0.1, 0.3, 0.2)]

    assert bench.per_audio_hour(readings) == {"median": 12, "min": 6, "max": 18}


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_have_no_timing_code_of_their_own(script):
    assert re.findall(r"\bimport time\b|\bfrom time\b|perf_counter|process_time|thread_time|timeit", script.read_text()) == []


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
