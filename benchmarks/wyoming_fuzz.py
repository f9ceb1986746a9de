"""Malformed frames against a wake service that is running:

edgekws wyoming & python benchmarks/wyoming_fuzz.py --frames 100000
"""

import argparse
import asyncio
import json
import random
import time

AT_ONCE = 20
TYPES = ("describe", "detect", "audio-start", "audio-chunk", "audio-stop", "ping", "transcribe", "")
VALUES = (None, True, -1, 0, 1, 2, 3, 16_000, 44_100, 1e9, 10**40, float("nan"), "", "x" * 1000, [], ["alexa"], [1], {}, {"a": {"b": []}})
KEYS = ("type", "data", "data_length", "payload_length", "version", "names", "rate", "width", "channels", "timestamp", "text", "context")


def frame(rng: random.Random) -> bytes:
    """A frame that is wrong in some way, or now and then right."""
    data = {"rate": 16_000, "width": 2, "channels": 1, "names": None, "text": "x"}
    header = {"type": rng.choice(TYPES), "data": data}
    payload = rng.randbytes(rng.choice((0, 0, 2, 1024, 5000)))
    if payload:
        header["payload_length"] = len(payload)
    for _ in range(rng.randint(0, 3)):
        rng.choice((header, data))[rng.choice(KEYS)] = rng.choice(VALUES)
    line = bytearray(json.dumps(header).encode() + b"\n" + payload)
    kind = rng.random()
    if kind < 0.2:  # some bytes are others
        for _ in range(rng.randint(1, 8)):
            line[rng.randrange(len(line))] = rng.randrange(256)
    elif kind < 0.3:  # cut off
        del line[rng.randrange(len(line)) :]
    elif kind < 0.4:  # noise
        line = bytearray(rng.randbytes(rng.randint(1, 3000)))
    elif kind < 0.42:  # endless
        line = bytearray(b"[" * 40_000)
    return bytes(line)


async def fuzz(host: str, port: int, frames: int, seed: int) -> int:
    """Send them, some on one connection; after every hundred a healthy client must be answered. How many connections that took."""
    left = frames
    connections = 0

    async def worker(rng: random.Random) -> None:
        nonlocal left, connections
        while left > 0:
            count = min(left, rng.randint(1, 5))
            left -= count
            connections += 1
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"".join(frame(rng) for _ in range(count)))
                if rng.random() < 0.7:
                    writer.write_eof()
                    while await asyncio.wait_for(reader.read(65_536), 30):
                        pass
            except ConnectionError:
                pass
            finally:
                writer.transport.abort()
            if connections % 100 == 0:
                await healthy(host, port)

    await asyncio.gather(*(worker(random.Random(seed * 1000 + i)) for i in range(AT_ONCE)))
    await healthy(host, port)
    return connections


async def healthy(host: str, port: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b'{"type": "ping", "data": {"text": "well?"}}\n')
    line = await asyncio.wait_for(reader.readline(), 30)
    writer.close()
    if json.loads(line)["type"] != "pong":
        raise AssertionError(f"a healthy client got {line!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=10400)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start_s = time.monotonic()
    connections = asyncio.run(fuzz(options.host, options.port, options.frames, options.seed))
    print(json.dumps({"frames": options.frames, "connections": connections, "s": round(time.monotonic() - start_s, 1), "healthy": True}))


if __name__ == "__main__":
    main()
