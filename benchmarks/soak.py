"""A day of audio through the real listener, faster than real time: does it lose a sample, does anything grow?

    python benchmarks/soak.py [--hours 24] [--rounds 3] [--save]

`edgekws run --source stdin:` with its engine, store, clips, socket, metrics and a command at each wake. Meanwhile, as on a device,
versions are promoted from beside (copies of `edge` under other names, three an hour), rounds of adaptation are run (`edgekws adapt`,
three), the settings are read again (every second hour), and the last wake is called wrong (each hour). While a round trains, an hour of
audio takes two minutes at least. The audio is the demo's recordings at other speeds and levels among silence and noise, and with
EDGEKWS_CORPUS the corpus' other speech and noise too. At the end of each hour of audio, when a copy of `edge` listens and everything fed
was heard, the process is looked at.
Exit code 1 unless every sample was stepped through, every wake that was printed is in the database, no event was dropped, resident memory
grew by at most 2 MB after the first hour, and file handles and threads by none.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgekws
from edgekws import bench
from edgekws.audio import read_recording
from edgekws.cli import main as edgekws_main
from edgekws.model import find_model, write_manifest
from edgekws.store import Store
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
DEMO = Path(edgekws.__file__).parent / "demo"
HOUR = 3600
GROWTH_MB = 2.0
SWAP_EVERY_S, RELOAD_EVERY_S = 1800, 2 * HOUR
ROUND_PACE = 30  # times real time while a round trains
# In the first hour it listens for so long without an exchange: after a minute it looks how a version does, for which it opens the database
# once more, and SQLite keeps that handle for the next time.
FIRST_CHECK_S = 70
CORPUS_FILES = 200  # of speech and of noise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=24, help="of audio")
    parser.add_argument("--rounds", type=int, default=3, help="of adaptation")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/soak.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = soak(Path(folder), arguments.hours, arguments.rounds)
    print(json.dumps(row))
    if arguments.save:
        with RESULTS.open("a") as file:
            print(json.dumps(row), file=file)
    well = not any(
        (row["lost_samples"], row["gaps"], row["dropped_events"], row["wakes_not_stored"], row["handles_grew"], row["threads_grew"])
    )
    return 0 if well and row["rss_grew_mb"] <= GROWTH_MB and row["ended"] == 0 else 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def audio(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """int16, endless, in pieces of some seconds, no two alike."""
    words = [read_recording(path) for path in (DEMO / "stream.flac", DEMO / "room-live.opus", DEMO / "room-test.opus")]
    hiss = rng.standard_normal(60 * SAMPLE_RATE_HZ).astype(np.float32)
    noises, speech = [hiss, np.convolve(hiss, np.ones(32) / 8, "same").astype(np.float32)], list(words)
    if corpus := os.environ.get("EDGEKWS_CORPUS"):
        rows = list(csv.DictReader((Path(corpus) / "manifest.csv").open()))
        for kind, found in (("negative", speech), ("noise", noises)):
            paths = [Path(corpus) / row["path"] for row in rows if row["kind"] == kind]
            for i in rng.permutation(len(paths))[:CORPUS_FILES]:
                samples = read_recording(paths[int(i)])
                found.append(samples if kind == "negative" else samples / max(1.0, float(samples.std())))
    while True:
        heard = words if rng.random() < 0.3 else speech
        whole = heard[int(rng.integers(len(heard)))]
        first = int(rng.integers(max(1, len(whole) - 30 * SAMPLE_RATE_HZ)))
        piece = whole[first : first + 30 * SAMPLE_RATE_HZ]
        speed = rng.uniform(0.93, 1.07)
        piece = np.interp(np.arange(0, len(piece) - 1, speed), np.arange(len(piece)), piece) * 10 ** (rng.uniform(-12, 3) / 20)
        piece = np.concatenate([piece, np.zeros(int(rng.uniform(5, 60) * SAMPLE_RATE_HZ))])
        noise = np.asarray(noises[int(rng.integers(len(noises)))])
        noise = np.resize(np.roll(noise, int(rng.integers(len(noise)))), len(piece)) * 32768 * 10 ** (rng.uniform(-75, -40) / 20)
        yield np.clip(piece + noise, -32768, 32767).astype(np.int16)


class Listener:
    """`edgekws run`, and all that it says."""

    def __init__(self, config: Path, log: Path) -> None:
        self.command = [sys.executable, "-u", "-m", "edgekws", "run", "--json", "--source", "stdin:", "--config", str(config)]
        self.said = log.open("w+")
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said)
        self.printed: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(json.loads(line))

    def feed(self, samples: np.ndarray) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(samples.tobytes())

    def size(self) -> dict[str, float]:
        """Resident memory, of it what is not a file's, open handles, threads."""
        proc = Path(f"/proc/{self.process.pid}")
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        mb = {name: round(int(fields[field].split()[0]) / 1024, 2) for name, field in (("rss_mb", "VmRSS"), ("anonymous_mb", "RssAnon"))}
        self.handles = sorted(os.readlink(one) for one in (proc / "fd").iterdir())
        return {**mb, "handles": len(self.handles), "threads": int(fields["Threads"])}

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(120)
        self._reader.join()
        return code


class Socket:
    """A client that reads every event, and asks."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self.kinds: Counter[str] = Counter()

    def ask(self, command: str) -> dict[str, Any]:
        self._socket.sendall(json.dumps({"command": command}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "kind" not in answer:
                return answer
            self.kinds[answer["kind"]] += 1

    def rest(self) -> None:
        for line in self._lines:
            self.kinds[json.loads(line)["kind"]] += 1


def soak(folder: Path, hours: int, count: int) -> dict[str, Any]:
    """One row."""
    state, config = folder / "state", folder / "edgekws.toml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = [
        f'[store]\nroot = "{state}"',
        '[sinks]\nsocket = true\ncommand = ["true"]',
        "[learning]\naudio_max_mb = 30",
        f"[metrics]\nport = {port}",
    ]
    config.write_text("\n".join(lines) + "\n")
    os.environ.pop("RUNTIME_DIRECTORY", None)

    def run(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgekws", *words, "--config", str(config)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def done(*words: str) -> str:
        child = run(*words)
        said = child.communicate()[0]
        if child.returncode:
            sys.exit(f"edgekws {' '.join(words)}: {said}")
        return said

    done("enroll", "open sesame", *map(str, sorted(DEMO.glob("enrol-*.flac"))))
    listener = Listener(config, folder / "said")
    deadline_s = time.monotonic() + 60
    while not (state / "control.sock").exists():
        time.sleep(0.1)
        if time.monotonic() > deadline_s or listener.process.poll() is not None:
            sys.exit(f"it does not start: {(folder / 'said').read_text()}")
    client = Socket(state / "control.sock")
    rng = np.random.default_rng(24)
    stream, waiting = audio(rng), np.zeros(0, np.int16)
    rounds: list[dict[str, Any]] = []
    rounds_at = [round((0.5 + i) / (1 + count) * hours * HOUR) for i in range(count)]
    training: subprocess.Popen[str] | None = None
    hourly: list[dict[str, Any]] = []
    swaps = rejected = 0
    began_s = time.monotonic()

    def exchange() -> None:
        """Promote the next copy of `edge`, and feed on until it listens."""
        nonlocal swaps
        swaps += 1
        path, id = folder / "next", f"edge-copy-{swaps}"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(find_model("edge"), path)
        write_manifest(path, {**json.loads((path / "manifest.json").read_text()), "id": id})
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if edgekws_main(["models", "promote", str(path), "--config", str(config)]):
                sys.exit(f"{id} cannot be promoted")
        until = time.monotonic() + 120
        while (status := client.ask("status"))["model"] != id:
            if time.monotonic() > until:
                sys.exit(f"{id} does not go live; {status}\n{(folder / 'said').read_text()}")
            feed(1)

    fed_s = 0

    def feed(seconds: int) -> None:
        nonlocal waiting, fed_s
        count = seconds * SAMPLE_RATE_HZ
        while len(waiting) < count:
            waiting = np.concatenate([waiting, next(stream)])
        listener.feed(waiting[:count])
        waiting = waiting[count:]
        fed_s += seconds

    for hour in range(1, hours + 1):
        while fed_s < hour * HOUR:
            before = fed_s
            feed(5)
            if training is not None:
                time.sleep(5 / ROUND_PACE)
                if training.poll() is not None:
                    said = training.communicate()[0]
                    if training.returncode:
                        sys.exit(f"the round failed: {said}")
                    facts = json.loads(said.splitlines()[-1])
                    rounds.append({key: facts[key] for key in ("promoted", "reason", "round_s")})
                    say(f"a round ended: {rounds[-1]}")
                    training = None
            elif rounds_at and fed_s >= rounds_at[0]:
                rounds_at.pop(0)
                say("a round begins")
                training = run("adapt", "--json")
            elif fed_s // SWAP_EVERY_S != before // SWAP_EVERY_S:
                exchange()
            if (fed_s + RELOAD_EVERY_S // 4) // RELOAD_EVERY_S != (before + RELOAD_EVERY_S // 4) // RELOAD_EVERY_S:
                listener.process.send_signal(signal.SIGHUP)
        rejected += "rejected" in client.ask("reject")
        exchange()
        for _ in range(FIRST_CHECK_S if hour == 1 else 0):
            feed(1)
            time.sleep(1.0)
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
        until = time.monotonic() + 60
        while (status := client.ask("status"))["hops"] < fed_s * SAMPLE_RATE_HZ // HOP_SAMPLES and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(1.0)  # the last clip and event are written, and the old version is let go of
        lost = fed_s * SAMPLE_RATE_HZ // HOP_SAMPLES * HOP_SAMPLES - status["hops"] * HOP_SAMPLES
        figures = {name: status[name] for name in ("wakes", "gaps", "dropped")}
        seen = getattr(listener, "handles", None)
        hourly.append({"hour": hour, "lost_samples": lost, **listener.size(), **figures})
        if seen is not None and len(listener.handles) > len(seen):
            say(f"new handles: {Counter(listener.handles) - Counter(seen)}")
        say(f"{json.dumps(hourly[-1])}  {(time.monotonic() - began_s) / 60:.1f} min")
    if training is not None:
        training.kill()
        training.communicate()
    took_s = time.monotonic() - began_s
    size_end = hourly[-1]
    after_first = hourly[0]
    threading.Thread(target=client.rest, daemon=True).start()
    code = listener.end()
    store = Store(state)
    stored: Counter[tuple[str, float]] = Counter()
    kinds: Counter[str] = Counter()
    after = 0
    while page := store.events(after=after):
        after = page[-1].id
        kinds.update(event.extra.get("what", "") if event.kind == "model" else event.kind for event in page)
        stored.update((event.keyword, round(event.stream_s, 3)) for event in page if event.kind == "wake")
    printed = Counter((wake["keyword"], wake["stream_s"]) for wake in listener.printed)
    said = (folder / "said").read_text().splitlines()
    complaints = Counter(" ".join(line.split()[:6]) for line in said if line.startswith("edgekws: "))
    return {
        "benchmark": "soak",
        "hours": hours,
        "corpus": bool(os.environ.get("EDGEKWS_CORPUS")),
        "took_s": round(took_s),
        "ended": code,
        "lost_samples": max(one["lost_samples"] for one in hourly),
        "gaps": size_end["gaps"],
        "dropped_events": size_end["dropped"],
        "wakes": len(listener.printed),
        "wakes_not_stored": sum((printed - stored).values()),
        "wakes_on_socket": client.kinds["wake"],
        "swaps": swaps,
        "live": kinds["live"],
        "reloaded": kinds["reloaded"],
        "refused": kinds["refused"],
        "rolled_back": kinds["rolled back"],
        "rejected": rejected,
        "rounds": rounds,
        "clips": len(store.clips()),
        "rss_mb": [one["rss_mb"] for one in hourly],
        "anonymous_mb": [one["anonymous_mb"] for one in hourly],
        "rss_grew_mb": round(size_end["rss_mb"] - after_first["rss_mb"], 2),
        "handles": [one["handles"] for one in hourly],
        "handles_grew": max(0, size_end["handles"] - after_first["handles"]),
        "threads": [one["threads"] for one in hourly],
        "threads_grew": max(0, size_end["threads"] - after_first["threads"]),
        "complaints": dict(complaints.most_common(12)),
        "host": bench.host(),
    }


if __name__ == "__main__":
    sys.exit(main())
