"""The whole way: a sound server plays, PortAudio captures, `edgekws run` reports."""

import itertools
import json
import os
import subprocess
import sys
import threading
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
