"""A Unix socket of JSON lines, used as a script would: sockets and nothing else."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekws.control import CLIENTS, LINE_BYTES, PATH_BYTES, WAITING_BYTES, ControlSocket, socket_path
from edgekws.daemon import DEAF_S, Status
from edgekws.errors import ConfigError, StoreError
from edgekws.sinks import Delivery, as_json
from edgekws.values import Event

WAKE = Event("hey küche", "ann", 1.2, 0.7, 1000.5, 4.2, 0.3, "edge-3")


def refuse():
    raise StoreError("nothing woke yet")


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def read(self):
        """The next line's object; None at the end."""
        try:
            line = self.lines.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def ask(self, command):
        self.send(command)
        return self.read()

    def close(self):
        self.lines.close()
        self.socket.close()


@pytest.fixture
def served(tmp_path):
    sink = ControlSocket(tmp_path / "control.sock", {"status": lambda: {"listening": True}, "reject": refuse})
    clients = []

    def connect(greeted=True):
        clients.append(Client(tmp_path / "control.sock"))
        if greeted:  # an answer: now it is known to be connected
            assert clients[-1].ask({"command": "status"}) == {"reply": "status", "listening": True}
        return clients[-1]

    connect.sink = sink
    connect.path = tmp_path / "control.sock"
    yield connect
    for client in clients:
        client.close()
    if sink._thread.is_alive():
        sink.close()


def test_every_client_gets_every_event_and_the_end_of_it(served):
    clients = [served() for _ in range(3)]
    delivery = Delivery([served.sink])
    with ThreadPoolExecutor() as beside:
        got = [beside.submit(list, client.lines) for client in clients]
        for _ in range(500):
            delivery.put(WAKE)
        delivery.close()

        assert [[line.decode() for line in one.result(30)] for one in got] == [[as_json(WAKE) + "\n"] * 500] * 3
    assert not served.path.exists()


def test_the_name_of_a_file_that_is_no_utf_8_reaches_a_client(served):
    event = replace(WAKE, kind="start", extra={"source": "file:t\udce4st.flac"})
    client = served()
    served.sink.deliver(event)

    assert client.read() == json.loads(as_json(event))


def test_it_ends_though_a_client_does_not_read(served):
    stalled = served()
    for _ in range(500):
        served.sink.deliver(WAKE)
    served.sink.close()

    assert sum(1 for _ in iter(stalled.read, None)) < 500


def test_whoever_asks_and_how_often_it_takes_one_thread(served):
    before = set(threading.enumerate())
    clients = [served() for _ in range(4)]
    for client in clients * 5:
        client.ask({"command": "status"})

    assert [thread.name for thread in set(threading.enumerate()) - before] == ["commands_0"]


def test_only_the_user_and_the_group_may_use_it(served):
    assert stat.S_IMODE(os.stat(served.path).st_mode) == 0o660


def test_a_command_that_fails_says_why(served):
    assert served().ask({"command": "reject"}) == {"reply": "reject", "error": "nothing woke yet"}


@pytest.mark.parametrize(
    "line", [b"\n", b"junk\n", b"[]\n", b"3\n", b'{"command": {}}\n', b'{"command": "rm"}\n', b"\xff\xfe\n", b"[" * 4000 + b"\n"]
)
def test_junk_is_answered_with_what_is_accepted_and_the_client_goes_on(served, line):
    client = served()

    assert client.ask(line)["error"] == 'not understood. Accepted is {"command": "status"} or {"command": "reject"} on a line'
    assert client.ask({"command": "status"})["listening"]


def test_an_endless_line_ends_the_client(served):
    client = served()
    client.send(b"x" * (4 * LINE_BYTES))

    assert f"more than {LINE_BYTES} bytes" in client.read()["error"]
    assert client.read() is None


def test_a_client_that_does_not_read_is_let_go_and_the_others_get_every_event(served, caplog):
    healthy, stalled, gone = served(), served(), served()
    gone.close()
    events = 4 * WAITING_BYTES // len(as_json(WAKE))
    with ThreadPoolExecutor() as beside:
        count = beside.submit(lambda: sum(1 for _ in healthy.lines))
        for i in range(events):
            served.sink.deliver(WAKE)
            if i % 100 == 99:
                time.sleep(0.01)  # 10 000 a second
        served.sink.close()

        assert count.result(30) == events
    assert sum(1 for _ in iter(stalled.read, None)) < events
    assert "unread and was let go" in caplog.text


def test_a_flood_of_commands_is_answered_at_a_pace(served):
    """So that nobody can keep the listener's process busy: each command is followed by a pause of 50 ms."""
    client = served()
    client.send(b'{"command": "status"}\n' * 30)
    start_s = time.monotonic()
    for _ in range(10):
        assert client.read()["reply"] == "status"

    assert time.monotonic() - start_s >= 9 * 0.05


def test_clients_beyond_the_bound_are_told_so(served):
    for _ in range(CLIENTS):
        served()
    refused = served(greeted=False)

    assert "all that may be" in refused.read()["error"]
    assert refused.read() is None


def test_a_slow_command_holds_up_no_event(tmp_path):
    go_on, begun = threading.Event(), threading.Event()
    sink = ControlSocket(tmp_path / "s", {"reject": lambda: {"began": begun.set(), "waited": go_on.wait(30)}})
    client = Client(tmp_path / "s")
    client.send({"command": "reject"})
    begun.wait(30)
    sink.deliver(WAKE)

    assert client.read()["kind"] == "wake"
    go_on.set()
    assert client.read()["waited"]
    client.close()
    sink.close()


def test_the_socket_of_one_that_was_killed_is_taken_over_and_that_of_a_living_one_is_not(tmp_path):
    path = tmp_path / "control.sock"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    sink = ControlSocket(path, {})
    with pytest.raises(ConfigError, match="another edgekws has"):
        ControlSocket(path, {})

    Client(path).close()
    sink.close()


def test_a_path_that_no_socket_can_have_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=f"longer than the {PATH_BYTES} bytes"):
        ControlSocket(tmp_path / ("x" * PATH_BYTES), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made \(File exists\)"):
        ControlSocket(tmp_path / "file" / "s", {})


def test_it_lies_in_the_runtime_directory_else_in_the_state(monkeypatch):
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/edgekws:/run/other")
    assert socket_path(Path("/var/lib/edgekws")) == Path("/run/edgekws/control.sock")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert socket_path(Path("/var/lib/edgekws")) == Path("/var/lib/edgekws/control.sock")


def test_the_status_says_whether_it_hears_and_how_loud():
    clock = {"now_s": 0.0}
    status = Status(lambda: clock["now_s"])
    assert not status.listening()
    status.heard(np.tile([3277, -3277], 640).astype(np.int16))
    assert (status.listening(), status.level_dbfs()) == (True, -20.0)

    clock["now_s"] = DEAF_S + 1
    assert json.loads(json.dumps(status.report()))["listening"] is False


def test_a_running_listener_answers_and_tells(tmp_path):
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{tmp_path / "state"}"\n[sinks]\nsocket = true\n')
    command = [sys.executable, "-m", "edgekws", "run", "--source", "stdin:", "--config", str(config)]
    env = {name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"}
    listener = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert any(b"listening to" in line for line in listener.stderr)  # ends if the listener dies
        listener.stdin.write(np.tile([3277, -3277], 16_000).astype("<i2").tobytes())
        listener.stdin.flush()
        client = Client(tmp_path / "state" / "control.sock")
        status = {}
        while not status.get("audio_s"):
            status = client.ask({"command": "status"})
            while "kind" in status:  # the start, if we were there in time
                status = client.read()
        assert (status["reply"], status["listening"], status["source"], status["level_dbfs"]) == ("status", True, "stdin:", -20.0)
        listener.stdin.close()
        assert [told["kind"] for told in iter(client.read, None) if told["kind"] != "start"] == ["stop"]
        client.close()
    finally:
        listener.stdin.close()
        listener.wait(30)
    assert listener.returncode == 0
