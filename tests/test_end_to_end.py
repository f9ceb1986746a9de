"""The whole way: a sound server plays, PortAudio captures, `edgekws run` reports."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import soundfile

from edgekws.values import SAMPLE_RATE_HZ

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"


def edgekws(*arguments, env):
    return [sys.executable, "-m", "edgekws", *map(str, arguments)], {**os.environ, **env}


def test_every_keyword_played_into_a_sound_server_is_reported(null_sink, tmp_path):
    """Real PulseAudio, real PortAudio, the real command; the demo's stream holds five keywords and other speech."""
    truth = json.loads((DEMO / "truth.json").read_text())
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{tmp_path / "state"}"\n')
    wav = tmp_path / "stream.wav"
    samples, _ = soundfile.read(DEMO / "stream.flac", dtype="int16")
    soundfile.write(wav, samples, SAMPLE_RATE_HZ)
    command, env = edgekws(
        "enroll", truth["keyword"], "--speaker", "demo", *sorted(DEMO.glob("enrol-*.flac")), "--config", config, env=null_sink.env
    )
    subprocess.run(command, env=env, check=True, timeout=120)
    command, env = edgekws("run", "--source", "mic:pulse", "--json", "--config", config, env=null_sink.env)
    listener = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in listener.stderr:  # ends if the listener dies
            if "listening to" in line:
                break
        threading.Thread(target=listener.stderr.read, daemon=True).start()
        null_sink.play(wav)
        wakes = [json.loads(listener.stdout.readline()) for _ in truth["spoken"]]
    finally:
        listener.terminate()
        rest, _ = listener.communicate(timeout=30)

    assert [wake["keyword"] for wake in wakes] == [truth["keyword"]] * len(truth["spoken"])
    assert rest == ""
    spoken = [b["end_s"] - a["end_s"] for a, b in itertools.pairwise(truth["spoken"])]
    heard = [b["stream_s"] - a["stream_s"] for a, b in itertools.pairwise(wakes)]
    assert all(abs(a - b) < 0.5 for a, b in zip(spoken, heard, strict=True))


def test_a_service_without_its_microphone_says_so_to_whoever_looks_and_waits(tmp_path):
    """By every way in, before there was a first sample. A reload is no end, and an end asked for is none without a word."""
    config = tmp_path / "edgekws.toml"
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    config.write_text(
        f'[audio]\nsource = "mic:no such thing"\n[store]\nroot = "{tmp_path / "state"}"\n[sinks]\nsocket = true\n'
        f"[metrics]\nport = {ports[0]}\n[web]\nport = {ports[1]}\n"
    )
    manager = f"@edgekws-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + manager[1:])
        ear.settimeout(60)
        command, env = edgekws("run", "--config", config, env={"RUNTIME_DIRECTORY": runtime, "NOTIFY_SOCKET": manager})
        listener = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        told = ear.recv(4096).decode()
        listener.send_signal(signal.SIGHUP)
        while "READY=1" not in (again := ear.recv(4096).decode()):
            pass
        page = urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics").read()
        for _ in range(300):  # events come by another thread
            live = json.load(urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/state"))
            if live["events"]:
                break
            time.sleep(0.1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(f"{runtime}/control.sock")
            client.sendall(b'{"command": "status"}\n')
            status = json.loads(client.makefile().readline())
        listener.terminate()
        said, _ = listener.communicate(timeout=30)

    assert told.startswith("READY=1\nWATCHDOG=1\nSTATUS=deaf: ") and "STATUS=deaf: " in again
    assert b"edgekws_listening 0.0" in page
    assert status["listening"] is live["listening"] is False
    assert [event["kind"] for event in live["events"]] == ["deaf"]
    assert listener.returncode == 0 and "deaf: " in said and "Traceback" not in said
    command, env = edgekws("log", "--all", "--json", "--config", config, env={})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == ["deaf", "stop"]
    assert not (tmp_path / "state" / "listening").read_text()  # the next start is not told that this one was killed
