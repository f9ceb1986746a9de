"""Figures for Prometheus, read as Prometheus reads them."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from edgekws import few_clients
from edgekws.daemon import Status
from edgekws.errors import ConfigError, EdgekwsError
from edgekws.few_clients import CLIENTS
from edgekws.metrics import Metrics
from edgekws.sinks import CommandSink, Delivery
from edgekws.values import Event


def wake(keyword):
    return Event(keyword, "ann", 1.25, 0.7, 1000.5, 4.2, 3.0, "edge-3")


def scrape(port):
    """(name, labels) → value"""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}


def scrape_soon(port):
    """Once the threads of others, which are about to end, have."""
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return scrape(port)
        time.sleep(0.05)


def test_wakes_gaps_and_level_are_there_for_prometheus():
    status = Status()
    status.heard(np.tile([3277, -3277], 640).astype(np.int16))
    status.source, status.model, status.gaps, status.lost_s, status.hops, status.busy_s = "mic:x", "edge-3", 2, 0.04, 100, 0.25
    metrics = Metrics("127.0.0.1", 0, status.report)
    for keyword in ("alexa", 'quote " and\nline', "alexa"):
        metrics.deliver(wake(keyword))
    metrics.deliver(Event("", "", 0.0, 0.0, 0.0, 0.0, 0.0, "edge-3", "gap"))
    found = scrape(metrics.port)

    assert found["edgekws_wakes_total", (("keyword", "alexa"),)] == 2
    assert found["edgekws_wakes_total", (("keyword", 'quote " and\nline'),)] == 1
    assert found["edgekws_wake_latency_seconds_count", ()] == 3
    assert found["edgekws_wake_latency_seconds_bucket", (("le", "0.005"),)] == 3
    assert (found["edgekws_listening", ()], found["edgekws_level_dbfs", ()]) == (1, -20.0)
    counters = {name: found[f"edgekws_{name}_total", ()] for name in ("gaps", "lost_seconds", "hops", "busy_seconds", "dropped_clips")}
    assert counters == {"gaps": 2, "lost_seconds": 0.04, "hops": 100, "busy_seconds": 0.25, "dropped_clips": 0}
    metrics.close()
    assert any(name == "edgekws_info" and ("model", "edge-3") in labels for name, labels in found)


def test_what_a_sink_lost_is_counted_by_its_name():
    class FullSink:
        def deliver(self, event):
            raise EdgekwsError("no room")

        def close(self):
            pass

    status, full = Status(), FullSink()
    metrics = Metrics("127.0.0.1", 0, status.report)
    status.delivery = Delivery([full, metrics])
    for _ in range(3):
        status.delivery.put(wake("alexa"))
    while (found := scrape(metrics.port)).get(("edgekws_wakes_total", (("keyword", "alexa"),))) != 3:
        pass
    line, report = status.line(), status.report()
    status.delivery.close()

    by = {labels: value for (name, labels), value in found.items() if name == "edgekws_dropped_events_total"}
    assert by == {(("by", "queue"),): 0, (("by", "full"),): 3, (("by", "metrics"),): 0}
    assert (report["dropped"], report["dropped_by"]) == (3, {"queue": 0, "full": 3, "metrics": 0})
    assert line.endswith("3 events dropped (full 3)")


def test_before_the_first_sample_there_is_a_page_too():
    metrics = Metrics("127.0.0.1", 0, Status().report)
    found = scrape(metrics.port)
    metrics.close()

    assert (found["edgekws_listening", ()], found["edgekws_level_dbfs", ()]) == (0, float("-inf"))
    with pytest.raises(OSError):
        scrape(metrics.port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_only_who_asks_for_this_machine_is_answered(host):
    """A site that makes its own name point here comes with that name in Host. Who opened it to others may scrape by any name."""

    metrics, found = Metrics(host, 0, Status().report), []
    for name in ("evil.example", f"evil.example:{metrics.port}", "", "localhost:9", "192.168.1.7", socket.gethostname()):
        asking = http.client.HTTPConnection("127.0.0.1", metrics.port, timeout=30)
        asking.request("GET", "/metrics", headers={"Host": name})
        found.append(asking.getresponse().status)
        asking.close()
    metrics.close()

    assert found == ([421] * 3 if host == "127.0.0.1" else [200] * 3) + [200] * 3


def test_clients_that_say_nothing_are_few(monkeypatch):
    monkeypatch.setattr(few_clients, "REQUEST_S", 600.0)
    metrics = Metrics("127.0.0.1", 0, Status().report)
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", metrics.port), 30) for _ in range(CLIENTS)]
    while threading.active_count() < before + CLIENTS:
        time.sleep(0.01)
    for _ in range(30):  # each is let go at once
        with socket.create_connection(("127.0.0.1", metrics.port), 30) as one, contextlib.suppress(ConnectionResetError):
            assert one.recv(1000) == b""
    threads = threading.active_count() - before
    for one in silent:
        one.close()
    found = scrape_soon(metrics.port)
    metrics.close()

    assert threads == CLIENTS
    assert found["edgekws_listening", ()] == 0


def test_clients_that_stall_are_let_go_and_then_prometheus_is_answered(monkeypatch):
    monkeypatch.setattr(few_clients, "REQUEST_S", 0.5)
    metrics = Metrics("127.0.0.1", 0, Status().report)
    stalled = [socket.create_connection(("127.0.0.1", metrics.port), 30) for _ in range(CLIENTS)]
    for i, one in enumerate(stalled):
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: 5 * i])  # and no more
    for one in stalled:
        with contextlib.suppress(ConnectionResetError):
            while one.recv(1000):
                pass
        one.close()
    found = scrape_soon(metrics.port)
    metrics.close()

    assert found["edgekws_listening", ()] == 0


def test_figures_that_cannot_be_read_are_said_and_the_next_request_is_answered(caplog):
    facts = [Status().report]
    metrics = Metrics("127.0.0.1", 0, lambda: facts[0]())
    facts[0] = lambda: {}["model"]
    with pytest.raises((OSError, http.client.HTTPException)):
        scrape(metrics.port)
    facts[0] = Status().report
    found = scrape(metrics.port)
    metrics.close()

    assert "a request of the metrics failed (KeyError: 'model')" in caplog.text
    assert found["edgekws_listening", ()] == 0


def test_a_command_that_no_thread_can_wait_for_is_killed_and_said(monkeypatch):
    """As when somebody's connections, or anything else, took all the threads that the unit may have."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            started.append(self)

    def no_more(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(threading.Thread, "start", no_more)
    sink = CommandSink([sys.executable, "-c", "import time; time.sleep(600)"], 600)
    with pytest.raises(EdgekwsError, match="so it was killed \\(can't start new thread\\)"):
        sink.deliver(wake("alexa"))
    sink.close()

    assert [one.returncode for one in started] == [-signal.SIGKILL]


def test_an_address_that_cannot_be_had_is_a_configuration_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1 port"):
            Metrics("127.0.0.1", taken.getsockname()[1], Status().report)
    with pytest.raises(ConfigError, match="cannot listen on no such host port 9"):
        Metrics("no such host", 9, Status().report)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(EdgekwsError, match=r"pip install 'edgekws\[metrics\]'"):
        Metrics("127.0.0.1", 0, Status().report)


def test_a_running_listener_has_the_page(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{tmp_path / "state"}"\n[metrics]\nport = {port}\n')
    command = [sys.executable, "-m", "edgekws", "run", "--source", "stdin:", "--config", str(config)]
    listener = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert any(b"listening to" in line for line in listener.stderr)  # ends if the listener dies
        listener.stdin.write(bytes(64_000))
        listener.stdin.flush()
        while not (found := scrape(port))["edgekws_hops_total", ()]:
            pass
    finally:
        listener.stdin.close()
        listener.wait(30)

    assert found["edgekws_audio_seconds_total", ()] == 2.0
    assert listener.returncode == 0
