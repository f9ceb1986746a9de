"""`python benchmarks/kill_listener.py [--kills 500] [--seed 0] [--save]`: the listener is killed (SIGKILL) at random moments.

This script plays systemd: it starts `edgekws run` again after each kill. A third of the lives end within the time that a start takes, a
third within the second after the first wake, while wakes, near misses and clips are written, and a third within 0.3 s of another version's
promotion. After each: the database opens, every wake that was printed is in it, no row of a clip is without its audio,
the version that is current is whole, and the next start that gets as far as its first event says that the one before was killed.
Exit code 1 if not, and where a start does not come to listen by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from soak import DEMO, audio, say

from edgekws import bench
from edgekws.errors import EdgekwsError
from edgekws.model import find_model, load_model
from edgekws.sinks import CUT_SHORT
from edgekws.store import Store
from edgekws.values import SAMPLE_RATE_HZ

RESULTS = Path(__file__).parent / "results" / "kill_listener.jsonl"
MINUTES = 30  # of audio, of which a life hears a part
START_S = 60.0  # at most, on a busy machine
WHEN = ("at its start", "while it writes", "at a promotion")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/kill_listener.jsonl")
    arguments = parser.parse_args()
    logging.disable()  # what opening the store says is looked for below
    with tempfile.TemporaryDirectory() as folder:
        row = Lives(Path(folder), arguments.seed).lead(arguments.kills)
    print(json.dumps(row))
    if arguments.save:
        with RESULTS.open("a") as file:
            print(json.dumps(row), file=file)
    return 1 if row["faults"] else 0


class Lives:
    """Of one state directory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.state, self.config, self.pcm, self.said = (folder / name for name in ("state", "edgekws.toml", "pcm", "said"))
        self.config.write_text(f'[store]\nroot = "{self.state}"\n[learning]\naudio_max_mb = 3\n')
        pieces = audio(np.random.default_rng(seed))
        with self.pcm.open("wb") as file:
            while file.tell() < MINUTES * 60 * SAMPLE_RATE_HZ * 2:
                file.write(next(pieces).tobytes())
        enroll = [sys.executable, "-m", "edgekws", "enroll", "open sesame", *sorted(map(str, DEMO.glob("enrol-*.flac")))]
        subprocess.run([*enroll, "--config", str(self.config)], check=True, capture_output=True)
        self.versions = {"edge-3": find_model("edge"), "edge-small-4": find_model("edge-small")}
        self.faults: Counter[str] = Counter()
        self.last_event = 0

    def lead(self, kills: int) -> dict[str, Any]:
        took_s, wakes, deaths, starts = 3.0, 0, Counter(), []
        known = told = 0  # starts behind a kill, and those that said so
        killed = False
        began_s = time.monotonic()
        for number in range(kills):
            when = WHEN[number % 3]
            printed, start_s = self.live(when, took_s)
            if start_s is not None:
                took_s = 0.8 * took_s + 0.2 * start_s
                starts.append(start_s)
            deaths[when if start_s is not None or when == WHEN[0] else "at its start"] += 1
            wakes += len(printed)
            for event in self.look(printed):
                if event.kind == "start":
                    known += killed
                    told += killed and event.extra.get("before") == CUT_SHORT
                    killed = True
            if (number + 1) % 25 == 0:
                say(f"{number + 1} kills, {wakes} wakes printed, {dict(self.faults) or 'no fault'}, {time.monotonic() - began_s:.0f} s")
        if told != known:
            self.faults["a start did not say that the one before was killed"] += known - told
        store = Store(self.state)
        rolled = [event for event in store.events(limit=10**6) if event.extra.get("what") == "rolled back"]
        return {
            "benchmark": "kill_listener",
            "kills": kills,
            "killed": dict(deaths),
            "wakes_printed": wakes,
            "events_stored": self.last_event,
            "starts_that_said_so": f"{told} of {known}",
            "rolled_back": len(rolled),
            "start_to_first_wake_s": bench.percentiles(np.array(starts)),
            "faults": dict(self.faults),
            "took_s": round(time.monotonic() - began_s),
            "host": bench.host(),
        }

    def live(self, when: str, took_s: float) -> tuple[list[dict[str, Any]], float | None]:
        """The wakes that a life printed, and how long the first one took; None = it was killed before."""
        command = [sys.executable, "-u", "-m", "edgekws", "run", "--json", "--source", "stdin:", "--config", str(self.config)]
        start_s = time.monotonic()
        first_s: float | None = None
        lines = b""
        with self.pcm.open("rb") as pcm, self.said.open("wb") as said:
            pcm.seek(2 * SAMPLE_RATE_HZ * self.chance.randrange(60 * MINUTES // 3))
            child = subprocess.Popen(command, stdin=pcm, stdout=subprocess.PIPE, stderr=said)
        assert child.stdout is not None
        ends_s = start_s + (self.chance.uniform(0, took_s) if when == WHEN[0] else START_S)
        while (left_s := ends_s - time.monotonic()) > 0:
            if not select.select([child.stdout], [], [], left_s)[0]:
                continue
            more = os.read(child.stdout.fileno(), 1 << 16)
            if not more:
                self.faults[f"it ended by itself: {self.said.read_text()[-300:]}"] += 1
                break
            lines += more
            if first_s is None and b"\n" in lines:
                first_s = time.monotonic() - start_s
                if when == WHEN[1]:
                    ends_s = time.monotonic() + self.chance.uniform(0, 1.0)
                if when == WHEN[2]:
                    self.promote()
                    ends_s = time.monotonic() + self.chance.uniform(0, 0.3)
        else:
            if first_s is None and when != WHEN[0]:
                self.faults[f"it did not listen within {START_S:.0f} s: {self.said.read_text()[-300:]}"] += 1
        child.kill()
        lines += child.stdout.read()
        child.wait()
        return [json.loads(line) for line in lines.split(b"\n")[:-1]], first_s

    def promote(self) -> None:
        store = Store(self.state)
        current = store.current_model()
        name = "edge-small-4" if current is None or current.name == "edge-3" else "edge-3"
        store.promote(self.versions[name], name)
        store.close()

    def look(self, printed: list[dict[str, Any]]) -> list[Any]:
        """What is left; the events that are new."""
        store = Store(self.state)
        try:
            new = store.events(after=self.last_event, limit=10**6)
            for clip in store.clips():
                store.clip_samples(clip)
            if (current := store.current_model()) is not None:
                load_model(current)
        except EdgekwsError as error:
            self.faults[str(error)] += 1
            return []
        finally:
            store.close()
        if list(self.state.glob("*damaged*")):
            self.faults["the database was damaged"] += 1
        self.last_event = new[-1].id if new else self.last_event
        stored = Counter((event.keyword, round(event.stream_s, 3), round(event.time_s, 3)) for event in new if event.kind == "wake")
        lost = Counter((wake["keyword"], wake["stream_s"], wake["time_s"]) for wake in printed) - stored
        if lost:
            self.faults["wakes that were printed are not in the database"] += sum(lost.values())
        return new


if __name__ == "__main__":
    sys.exit(main())
