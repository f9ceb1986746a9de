"""Model versions exchanged under the wake service while clients stream: detections lost or doubled, connections that ended.

    python benchmarks/wyoming_swap.py [--clients 20]

`edgekws wyoming` is a process of its own. Each client sends the bundled stream once, at the pace of a microphone, while edge and edge-small
are promoted in turns, about every two seconds. Both hear each of its keywords, so every client must be told of each once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.ping import Ping, Pong

import edgekws
from edgekws.audio import read_recording
from edgekws.values import SAMPLE_RATE_HZ

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
CHUNK = SAMPLE_RATE_HZ // 10
PAUSE_S = 1.5  # between two promotions
COMMAND = [sys.executable, "-m", "edgekws"]


async def client(port: int) -> list[float]:
    """Where in the stream it was told of a wake, seconds. Raises where it was told of anything else, or its connection ended."""
    samples = read_recording(DEMO / "stream.flac")
    async with AsyncTcpClient("127.0.0.1", port) as connection:

        async def send() -> None:
            await connection.write_event(AudioStart(SAMPLE_RATE_HZ, 2, 1).event())
            start_s = time.monotonic()
            for at in range(0, len(samples), CHUNK):
                await asyncio.sleep(start_s + at / SAMPLE_RATE_HZ - time.monotonic())
                await connection.write_event(AudioChunk(SAMPLE_RATE_HZ, 2, 1, samples[at : at + CHUNK].tobytes()).event())
            await connection.write_event(AudioStop().event())
            await connection.write_event(Ping("end").event())

        sending = asyncio.ensure_future(send())
        told = []
        while not ((event := await connection.read_event()) and Pong.is_type(event.type)):
            if event is None or event.type != "detection":
                raise AssertionError(f"instead of a detection: {event}")
            told.append(event.data["timestamp"] / 1000)
        await sending
        return told


async def measure(port: int, clients: int, env: dict[str, str]) -> tuple[list[list[float]], int]:
    """What each client was told, and how often a version was promoted meanwhile."""
    tasks = [asyncio.ensure_future(client(port)) for _ in range(clients)]
    for promotions, name in enumerate(itertools.cycle(("edge-small", "edge"))):
        if all(task.done() for task in tasks):
            return [task.result() for task in tasks], promotions
        promote = await asyncio.create_subprocess_exec(*COMMAND, "models", "promote", name, env=env, stdout=2, stderr=subprocess.DEVNULL)
        await promote.wait()
        await asyncio.sleep(PAUSE_S)
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        env = {**os.environ, "STATE_DIRECTORY": root}
        subprocess.run([*COMMAND, "enroll", TRUTH["keyword"], *DEMO.glob("enrol-*.flac")], env=env, check=True, stdout=2)
        service = subprocess.Popen(
            [*COMMAND, "wyoming", "--uri", "tcp://127.0.0.1:0"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert service.stderr is not None
            serving = next(line for line in service.stderr if line.startswith("serving "))
            told, promotions = asyncio.run(measure(int(serving.rpartition(":")[2]), options.clients, env))
        finally:
            service.terminate()
            _, said = service.communicate(timeout=30)
    wanted = [(one["start_s"], one["end_s"] + 1.0) for one in TRUTH["spoken"]]
    heard = [sum(low < at < high for at in one) for one in told for low, high in wanted]
    taken_up = said.count(" serves ")
    print(f"{options.clients} clients, {promotions} promotions, {taken_up} versions taken up in {len(wanted)} spoken keywords each:")
    print(f"{heard.count(1)} of {len(heard)} told once, {heard.count(0)} lost, {sum(count > 1 for count in heard)} doubled, ", end="")
    print(f"{sum(map(len, told)) - sum(heard)} elsewhere; no connection ended")
    return 0 if set(heard) == {1} and sum(map(len, told)) == len(heard) else 1


if __name__ == "__main__":
    sys.exit(main())
