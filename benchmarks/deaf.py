"""How long the listener is deaf when its sound server is killed: PulseAudio, killed at random moments while keywords play, 20 times,
and every other time once more within 0.3 s of its return.

    python benchmarks/deaf.py [--kills 20] [--save]

A null sink stands for the microphone (needs pulseaudio, pulseaudio-utils and libasound2-plugins). "back" is from the new server's first
answer to the listener's first block of sound, "wake" from there to the first wake that it reports, of a word played every 3 s. The listener
is started again when it ends, as systemd would, and that is counted. libpulse may end its process with SIGABRT when a server dies, so
then the listener is ended so, 5 times: "after_abort_s" is from there until it listens again, 2 s of systemd's RestartSec included.
At last the source is suspended for 15 s: "suspended" has the share of a core that the listener takes meanwhile, and when it is back.
Exit code 1 unless it was back within 5 s each time, with a wake after each kill, and nothing was left over.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import NullSink

import edgekws
from edgekws import bench
from edgekws.promotion import STEADY_S

RESULTS = Path(__file__).parent / "results" / "deaf.jsonl"
DEMO = Path(edgekws.__file__).parent / "demo"
BACK_S, WAKE_S = 5.0, 15.0  # at most
ABORTS = 5
SUSPENDED_S = 15.0


class Listener:
    """`edgekws run` on the null sink. What it says comes with the time at which it was said."""

    def __init__(self, env: dict[str, str], config: Path) -> None:
        self._env, self._config = env, config
        self.said: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self.lines: list[str] = []
        self.ends: list[int] = []
        self._over = False
        threading.Thread(target=self._supervise, daemon=True).start()

    def _supervise(self) -> None:
        while not self._over:
            command = [sys.executable, "-u", "-m", "edgekws", "run", "--config", str(self._config), "--source", "mic:pulse"]
            self.process = subprocess.Popen(command, env=self._env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for line in self.process.stdout:
                self.said.put((time.monotonic(), line))
                self.lines.append(line)
            code = self.process.wait()
            if not self._over:
                self.ends.append(code)
                time.sleep(2.0)

    def wait_for(self, *texts: str, within_s: float, since_s: float = 0.0) -> float | None:
        """When a line with one of the texts was said, from `since_s` on; what came before is forgotten."""
        until = time.monotonic() + within_s
        while (left_s := until - time.monotonic()) > 0:
            try:
                at_s, line = self.said.get(timeout=left_s)
            except queue.Empty:
                return None
            if at_s >= since_s and any(text in line for text in texts):
                return at_s
        return None

    def threads_and_children(self) -> tuple[int, int]:
        tasks = list(Path(f"/proc/{self.process.pid}/task").iterdir())
        return len(tasks), sum(len((task / "children").read_text().split()) for task in tasks)

    def cpu_s(self) -> float:
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> float:
        """Seconds that its end took."""
        self._over = True
        start_s = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return time.monotonic() - start_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/deaf.jsonl")
    arguments = parser.parse_args()
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sink = NullSink(folder, 16_000)
        samples, rate_hz = soundfile.read(DEMO / "stream.flac", dtype="int16")
        soundfile.write(folder / "word.wav", samples[int(3.2 * rate_hz) : int(6.2 * rate_hz)], rate_hz, subtype="PCM_16")
        config = folder / "edgekws.toml"
        config.write_text(f'[store]\nroot = "{folder / "state"}"\n')
        enroll = [sys.executable, "-m", "edgekws", "enroll", "open sesame", *sorted(map(str, DEMO.glob("enrol-*.flac")))]
        subprocess.run([*enroll, "--config", str(config)], check=True, capture_output=True)
        over = threading.Event()
        threading.Thread(target=play, args=(sink.env, folder / "word.wav", over), daemon=True).start()
        listener = Listener(sink.env, config)
        if not listener.wait_for("open sesame  ", within_s=60):
            sys.exit(f"it does not hear at all: {listener.lines}")
        time.sleep(STEADY_S + 5)  # by then the listener has all its threads
        threads, children = listener.threads_and_children()
        rows = []
        for i in range(arguments.kills):
            time.sleep(chance.uniform(0, 4))
            # Every other time once more as soon as it is back: while it opens its stream a client of PulseAudio is at its weakest.
            for _ in range(1 + i % 2):
                sink.kill()
                killed_s = time.monotonic()
                time.sleep(chance.uniform(0.2, 2.0))
                sink.start()
                up_s = time.monotonic()
                back_s = listener.wait_for("listening again", "listening to", within_s=40, since_s=killed_s)
                if back_s is None:
                    break
                time.sleep(chance.uniform(0, 0.3) if i % 2 else 0)
            wake_s = back_s and listener.wait_for("open sesame  ", within_s=WAKE_S, since_s=back_s)
            rows.append((back_s and max(0.0, back_s - up_s), back_s and wake_s and wake_s - back_s))
            print(
                i + 1,
                *(
                    f"{what} {seconds:.2f} s" if seconds is not None else f"{what} NEVER"
                    for what, seconds in zip(("back", "wake"), rows[-1], strict=True)
                ),
            )
        until = time.monotonic() + 10
        while (left := listener.threads_and_children()) != (threads, children) and time.monotonic() < until:
            time.sleep(0.5)
        left_threads, left_children = left
        if left_threads > threads:
            tasks = Path(f"/proc/{listener.process.pid}/task").iterdir()
            print(
                "threads:",
                *((task / "comm").read_text().strip() + " in " + (task / "wchan").read_text() for task in tasks),
                file=sys.stderr,
            )
        memory = Path(f"/proc/{listener.process.pid}/status").read_text()
        ends = list(listener.ends)
        after_abort_s = []
        for _ in range(ABORTS):
            aborted_s = time.monotonic()
            listener.process.send_signal(signal.SIGABRT)
            back_s = listener.wait_for("listening to", within_s=40, since_s=aborted_s)
            after_abort_s.append(round(back_s - aborted_s, 2) if back_s is not None else None)
            time.sleep(2.0)
        sink.suspend(True)
        used_s = listener.cpu_s()
        time.sleep(SUSPENDED_S)
        used_s = listener.cpu_s() - used_s
        resumed_s = time.monotonic()
        sink.suspend(False)
        back_s = listener.wait_for("listening again", within_s=40, since_s=resumed_s)
        suspended = {"cpu_share": round(used_s / SUSPENDED_S, 2), "back_s": back_s and round(back_s - resumed_s, 2)}
        end_s = listener.stop()
        over.set()
        sink.kill()
    said = "".join(listener.lines)
    back = sorted(one for one, _ in rows if one is not None)
    row = {
        "benchmark": "deaf",
        "kills": arguments.kills,
        "back_s": {"p50": round(back[len(back) // 2], 2), "max": round(back[-1], 2)} if back else None,
        "never_back": sum(one is None for one, _ in rows),
        "wakes_after": sum(bool(wake) for _, wake in rows),
        "stopped": said.count("the stream stopped"),
        "stalled": said.count("the stream stalled"),
        "listener_ended": ends,
        "after_abort_s": after_abort_s,
        "suspended": suspended,
        "threads": [threads, left_threads],
        "children": [children, left_children],
        "rss_mb": round(int(memory.split("VmRSS:")[1].split()[0]) / 1024, 1),
        "end_s": round(end_s, 2),
        "host": bench.host(),
    }
    print(json.dumps(row))
    if not all(wake for _, wake in rows):
        print(*listener.lines[-60:], sep="", file=sys.stderr)
    if arguments.save:
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    well = len(back) == arguments.kills and back[-1] <= BACK_S and row["wakes_after"] == arguments.kills
    well = well and suspended["back_s"] is not None and suspended["back_s"] <= BACK_S
    return 0 if well and left_threads <= threads and left_children <= children and end_s < 5 else 1


def play(env: dict[str, str], path: Path, over: threading.Event) -> None:
    while not over.is_set():
        if subprocess.run(["paplay", "--device=kws", path], env=env | {"PATH": os.environ["PATH"]}, capture_output=True).returncode:
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
