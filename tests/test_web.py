"""The live page: what it tells, what it takes, whom it refuses, and as a browser shows it."""

import contextlib
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgekws
from edgekws import few_clients
from edgekws.audio import open_source, read_recording
from edgekws.config import Settings
from edgekws.daemon import Status, listen
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.enrolment import enrol
from edgekws.errors import ConfigError
from edgekws.few_clients import CLIENTS
from edgekws.model import find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.pseudo_labels import PseudoLabels
from edgekws.sinks import Delivery, StoreSink
from edgekws.store import Store
from edgekws.web import EVENTS, HEADERS, PAUSE_S, LivePage

DEMO = Path(edgekws.__file__).parent / "demo"
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"


class Served:
    """A listener that heard the demo's stream, its store, and the page over both."""

    def __init__(self, root):
        model = load_model(find_model())
        engine = load_engine(model)
        takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
        enrolled = [enrol("open sesame", "ann", takes, engine, model)]
        self.pipeline = Pipeline(engine, Detector(enrolled), PseudoLabels(enrolled))
        self.status, self.store = Status(), Store(root)
        stored = StoreSink(Store(root))
        with open_source(f"file:{DEMO / 'stream.flac'}") as source:
            delivery = Delivery([stored], keep=stored.keep)
            self.heard = listen(source, self.pipeline, delivery, model.id, status=self.status)
            delivery.close()
        self.page = self.serve()

    def serve(self, host="127.0.0.1", port=0):
        return LivePage(host, port, self.status.report, self.pipeline, Store(self.store.root))

    def ask(self, method="GET", path="/state", body=None, headers=(), page=None):
        """Status, headers and body. `headers` are all there are; a Host of None is left out."""
        page = page or self.page
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": f"127.0.0.1:{page.port}", **dict(headers)}.items():
            for one in [value] if isinstance(value, str) else value:
                connection.putheader(name, one)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None and "Content-Length" not in dict(headers):
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def state(self):
        return json.loads(self.ask()[2])

    def reject(self, body, page=None, **headers):
        page = page or self.page
        own = {
            "Content-Type": "application/json",
            "X-Edgekws-Token": page.token,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return self.ask("POST", "/wrong", body, own, page)

    def wakes(self):
        return [event for event in self.store.events() if event.kind == "wake"]

    def rejected(self):
        return [event.extra["wake"] for event in self.store.events() if event.kind == "reject"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served") / "state")
    yield served
    served.page.close()


def test_it_tells_what_listens_what_it_scores_and_what_happened(served):
    state = served.state()

    assert (state["model"], state["engine"], state["wakes"], state["dropped"]) == ("edge-3", "onnxruntime", served.heard.wakes, 0)
    assert [(one["keyword"], one["speaker"]) for one in state["scores"]] == [("open sesame", "ann")]
    hops = list(served.pipeline.recent)
    assert state["margins"] == [[hop.number, pytest.approx(hop.margin, abs=1e-3)] for hop in hops]
    assert [one["kind"] for one in state["events"]] == [event.kind for event in reversed(served.store.events()) if event.kind != "reject"]
    assert state["trouble"] is None
    assert state["power"]["by"] or state["power"]["why"]


def test_while_it_is_deaf_there_is_no_score_of_now(served):
    status = Status(lambda: 0.0)
    status.heard(np.ones(1280, np.int16))
    page = LivePage("127.0.0.1", 0, status.report, served.pipeline, Store(served.store.root))

    def scores():
        return [one["score"] for one in json.loads(served.ask(page=page)[2])["scores"]]

    heard, status.muted = scores(), True
    deaf = scores()
    page.close()
    assert None not in heard and deaf == [None]


def test_a_wake_that_is_marked_is_what_clips_reject_makes_of_it(served):
    wake = served.wakes()[1]
    before = {clip.id: clip.label for clip in served.store.clips()}
    status, _, body = served.reject({"event": wake.id})
    (clip,) = [clip for clip in served.store.clips() if clip.event == wake.id]

    assert (status, json.loads(body)["rejected"]["clip"]) == (200, clip.id)
    assert (clip.label, clip.state, clip.reason) == ("negative", "confirmed", "rejected by the user")
    assert {one.id: one.label for one in served.store.clips()} == {**before, clip.id: "negative"}
    assert served.rejected() == [wake.id]
    assert [one["id"] for one in served.state()["events"] if one["wrong"]] == [wake.id]


def test_a_mark_that_is_taken_back_is_gone_from_the_page(served):
    wake = served.wakes()[2]
    served.reject({"event": wake.id})
    (clip,) = [clip for clip in served.store.clips() if clip.event == wake.id]

    def wrong():
        return [one["wrong"] for one in served.state()["events"] if one["id"] == wake.id]

    assert wrong() == [True]
    served.store.confirm_clip(clip.id)
    assert wrong() == [False]


def test_what_is_no_wake_cannot_be_marked(served):
    before = served.rejected()
    start = served.store.events()[0].id
    for number in (start, 10**6):
        status, _, body = served.reject({"event": number})
        assert (status, body) == (409, f"there is no wake {number}. Try: edgekws log --json\n".encode())

    assert served.rejected() == before


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost.evil.example:{port}",
        "127.0.0.1.evil.example",
        "127.0.0.1.local",  # of whoever says so by mDNS
        "localhost.local",
        "",
        ":{port}",
        (),
        ("127.0.0.1", "evil.example"),
    ],
)
def test_a_name_that_is_not_of_this_machine_is_refused(served, host):
    """A site that makes its own name point to 127.0.0.1 comes with that name in Host."""
    hosts = [one.format(port=served.page.port) for one in ([host] if isinstance(host, str) else host)]
    for method, path in (("GET", "/"), ("GET", "/state"), ("POST", "/wrong")):
        status, _, body = served.ask(
            method, path, {"event": 1} if method == "POST" else None, {"Host": hosts, "X-Edgekws-Token": served.page.token}
        )
        assert (status, body) == (421, b"that is no name of this machine\n")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:{port}",
        "localhost:{port}",
        "LOCALHOST:8080",
        "[::1]:{port}",
        "192.168.1.7",
        socket.gethostname(),
        f"{socket.gethostname()}.local",
    ],
)
def test_an_address_or_a_name_of_this_machine_is_welcome(served, host):
    """With any port, since `ssh -L` brings another one."""
    assert served.ask("GET", "/", headers={"Host": host.format(port=served.page.port)})[0] == 200


FOREIGN = [
    {"X_Edgekws_Token": ""},
    {"X_Edgekws_Token": "guess"},
    {"X_Edgekws_Token": "é"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_only_the_page_itself_can_mark_a_wake(served, headers):
    before = served.rejected()

    assert served.reject({"event": served.wakes()[0].id}, **headers)[0] == 403
    assert served.rejected() == before


def test_another_site_cannot_ask_for_the_state(served):
    assert served.ask(headers={"Sec-Fetch-Site": "cross-site"})[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        b"[]",
        b"3",
        b"{}",
        b'{"event": "1"}',
        b'{"event": 0}',
        b'{"event": 1e99}',
        b'{"event": true}',
        b"[" * 150,
        b'{"event": 99999999999999999999}',
    ],
)
def test_junk_is_told_what_is_accepted(served, body):
    status, _, told = served.reject(body)

    assert (status, told) == (400, b'accepted is {"event": the number of a wake}\n')


def test_a_body_that_is_too_long_is_not_waited_for(served):
    assert served.reject(None, Content_Length=str(10**9))[0] == 400


def test_every_answer_has_the_headers_that_keep_others_out(served):
    answers = [
        served.ask(method, path)
        for method, path in (("GET", "/"), ("GET", "/state"), ("GET", "/page.css"), ("GET", "/nothing"), ("PUT", "/"))
    ]

    assert [status for status, _, _ in answers] == [200, 200, 200, 404, 501]
    for _, headers, _ in answers:
        assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "'unsafe-inline'" not in HEADERS["Content-Security-Policy"]
    assert "/../" not in served.page.get("/")[1].decode()
    assert served.ask("GET", "/../live.html")[0] == 404


def test_clients_that_stall_are_let_go_and_then_the_others_are_answered(served, monkeypatch):
    monkeypatch.setattr(few_clients, "REQUEST_S", 0.5)
    stalled = [socket.create_connection(("127.0.0.1", served.page.port)) for _ in range(CLIENTS)]
    for i, one in enumerate(stalled):
        one.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: 5 * i])  # and no more
    with pytest.raises((OSError, http.client.HTTPException)):
        served.ask()  # one too many
    for one in stalled:
        one.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(1000):
                pass
        one.close()
    status = 0
    while not status:  # their threads are about to end
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, _, _ = served.ask()

    assert status == 200


def test_a_flood_is_answered_at_a_pace(served):
    """So that nobody can keep the listener's process busy: before each answer is a pause of 20 ms, of all clients together."""
    start_s = time.monotonic()
    threads = [threading.Thread(target=lambda: [served.ask(path="/page.css") for _ in range(10)]) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert time.monotonic() - start_s >= 40 * PAUSE_S


def test_beyond_loopback_it_is_said_aloud_and_nothing_can_be_marked(served, caplog):
    page = served.serve("0.0.0.0")
    before = served.rejected()
    status, _, _ = served.reject({"event": served.wakes()[0].id}, page=page)
    shown = served.ask("GET", "/", page=page)[2].decode()
    page.close()

    assert "beyond loopback: everybody on that network can see, without a password" in caplog.text
    assert status == 403
    assert page.token not in shown
    assert served.rejected() == before


def test_it_is_off_until_asked_for_and_on_loopback_then(served, caplog):
    assert (Settings().web.port, Settings().web.host) == (0, "127.0.0.1")
    served.serve().close()
    assert caplog.text == ""


def test_an_address_that_cannot_be_had_is_a_configuration_error(served):
    with pytest.raises(ConfigError, match=r"\[web\] cannot listen on 127.0.0.1 port"):
        served.serve(port=served.page.port)
    with pytest.raises(ConfigError, match=r"cannot listen on no such host port 9"):
        served.serve("no such host", 9)


def test_a_store_that_cannot_be_read_is_said_on_the_page_and_the_rest_goes_on(served, tmp_path):
    (tmp_path / "state").write_text("a file")
    page = LivePage("127.0.0.1", 0, served.status.report, served.pipeline, Store(tmp_path / "state"))
    state = json.loads(served.ask(page=page)[2])
    page.close()

    assert "Not a directory" in state["trouble"]
    assert state["model"] == "edge-3"


def test_a_browser_shows_it_on_a_desktop_and_on_a_phone_and_names_are_text(served, tmp_path, chromium):
    store = Store(tmp_path / "state")
    for event in (*served.store.events(), replace(served.wakes()[0], keyword=HOSTILE, speaker=HOSTILE)):
        store.add_event(event)
    page = LivePage("127.0.0.1", 0, served.status.report, served.pipeline, store)
    dump, complaints = chromium(page.url, "--dump-dom")
    assert complaints == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dump and "<script>alert" not in dump and "<img" not in dump
    assert dump.count("was wrong</button>") == served.heard.wakes + 1 - len(served.rejected())
    assert re.search(r'id="engine">onnxruntime<', dump) and "<polyline" in dump
    for width, height in ((1280, 800), (390, 844)):
        picture = tmp_path / f"{width}.png"
        _, complaints = chromium(page.url, f"--window-size={width},{height}", f"--screenshot={picture}")
        assert complaints == []
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, height)
    page.close()


def test_a_microphone_that_is_muted_is_shown_as_deaf_and_not_as_without_samples(served, chromium):
    status = Status()
    status.heard(np.zeros(1280, np.int16))
    status.muted = True
    page = LivePage("127.0.0.1", 0, status.report, served.pipeline, Store(served.store.root))
    dump, _ = chromium(page.url, "--dump-dom")
    page.close()

    assert re.search(r'id="state" class="bad">Deaf<', dump)


def test_a_browser_is_refused_under_a_name_that_was_made_to_point_here(served, chromium):
    dump, _ = chromium(f"http://evil.example:{served.page.port}/", "--host-resolver-rules=MAP evil.example 127.0.0.1", "--dump-dom")

    assert "that is no name of this machine" in dump


def test_only_the_last_events_are_shown_of_many_and_what_comes_is_added(served, tmp_path):
    store = Store(tmp_path / "state")
    wake = served.wakes()[0]
    for i in range(2 * EVENTS):
        store.add_event(replace(wake, time_s=wake.time_s + i))
    page = LivePage("127.0.0.1", 0, served.status.report, served.pipeline, Store(tmp_path / "state"))
    shown = [one["id"] for one in json.loads(served.ask(page=page)[2])["events"]]
    newest = store.add_event(wake).id
    later = [one["id"] for one in json.loads(served.ask(page=page)[2])["events"]]
    page.close()

    assert shown == list(range(2 * EVENTS, EVENTS, -1))
    assert later == [newest, *shown[:-1]]


class Listener:
    """`edgekws run` with the page."""

    def __init__(self, folder, *arguments, **env):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        config = folder / "edgekws.toml"
        config.write_text(f'[store]\nroot = "{folder / "state"}"\n[web]\nport = {self._port}\n')
        command = [sys.executable, "-m", "edgekws", "run", *arguments, "--config", str(config)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env={**os.environ, **env}, **pipes)
        assert any(b"shown at http://127.0.0.1:" in line for line in self.process.stderr)  # ends if the listener dies

    def state(self):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", "/state")
        state = json.loads(connection.getresponse().read())
        connection.close()
        return state


def test_a_running_listener_has_the_page(tmp_path):
    listener = Listener(tmp_path, "--source", "stdin:")
    try:
        listener.process.stdin.write(bytes(64_000))
        listener.process.stdin.flush()
        while not ((state := listener.state())["hops"] and state["events"]):  # its first row is written beside it
            pass
    finally:
        listener.process.stdin.close()
        listener.process.wait(30)

    assert (state["source"], state["audio_s"], state["level_dbfs"]) == ("stdin:", 2.0, None)
    assert state["events"][0]["words"] == "start: listening to stdin: with edge-3"
    assert listener.process.returncode == 0


def test_a_service_that_waits_for_its_microphone_says_that_it_is_deaf(tmp_path):
    listener = Listener(tmp_path, "--source", "mic:no such microphone", NOTIFY_SOCKET=str(tmp_path / "nobody listens here"))
    try:
        state = listener.state()
    finally:
        listener.process.kill()
        listener.process.communicate()

    assert (state["listening"], state["source"], state["model"]) == (False, "mic:no such microphone", "edge-3")
