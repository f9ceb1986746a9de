"""The wake service as Home Assistant or a satellite uses it: the library's own client on one side, the real command on the other."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr

pytest.importorskip("wyoming")
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.wake import Detect, Detection, NotDetected

import edgekws
from edgekws import wyoming_server
from edgekws.detector import Detector
from edgekws.engines import load_engine
from edgekws.errors import NotInstalled
from edgekws.model import find_model, load_model, rewrite_manifest
from edgekws.promotion import Version
from edgekws.sinks import Delivery
from edgekws.store import Store
from edgekws.wyoming_server import CLIENTS, LINE_BYTES, PAYLOAD_BYTES, WyomingServer

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
KEYWORD = TRUTH["keyword"]
STREAM, RATE_HZ = soundfile.read(DEMO / "stream.flac", dtype="int16")
ONCE = STREAM[3 * RATE_HZ : 7 * RATE_HZ]  # one keyword
FORMAT = {"rate": 16_000, "width": 2, "channels": 1}


class Service:
    """`edgekws wyoming` as a process; its port, and its memory."""

    def __init__(self, root, *options):
        command = [sys.executable, "-m", "edgekws"]
        self.root = root
        self.env = env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}
        takes = sorted(map(str, DEMO.glob("enrol-*.flac")))
        if not (root / "enrolments").exists():
            self.tell("enroll", KEYWORD, "--speaker", "ann", *takes)
        self.process = subprocess.Popen(
            [*command, "wyoming", "--uri", "tcp://127.0.0.1:0", "--json", *options],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:  # ends if it dies
            if found := re.search(r"serving .* on tcp://127.0.0.1:(\d+)$", line):
                self.port = int(found[1])
                return
        self.process.wait()
        raise AssertionError("it did not start")

    def tell(self, *arguments):
        """Another command on the same state."""
        subprocess.run([sys.executable, "-m", "edgekws", *arguments], env=self.env, check=True, capture_output=True, timeout=120)

    def says(self, text):
        """Waits until it does."""
        assert any(text in line for line in self.process.stderr), f"it ended without saying {text!r}"

    def rss_mb(self):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024

    def stop(self):
        """What it printed, and its exit code."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=30)
        return out, err, self.process.returncode


def promote_broken(root, scratch, later=False):
    shutil.copytree(DEMO.parent / "models" / "edge-small", scratch / "broken")
    (scratch / "broken" / "model.onnx").write_bytes(b"damaged")
    if later:
        (scratch / "broken" / "manifest.json").write_text('{"format": 99}')
    Store(root).promote(scratch / "broken", "broken")


def turn_about(path):
    """Put another network of the same shape in a model's place, which hears as well: each of its embeddings is minus the one before."""
    import onnx

    parts = onnx.load(path / "model.onnx")
    for part in parts.graph.initializer:
        if part.name in ("head.weight", "head.bias"):
            part.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(part), part.name))
    onnx.save(parts, path / "model.onnx")
    for name, turned in (("parity", ["embeddings"]), ("negatives", ["steps"]), ("prototypes", ["cohort", "prototypes_0"])):
        with np.load(path / f"{name}.npz") as data:
            arrays = dict(data)
        np.savez(path / f"{name}.npz", **{key: -one if key in turned else one for key, one in arrays.items()})
    rewrite_manifest(path)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("wyoming") / "state")
    yield service
    if service.process.poll() is None:
        service.process.kill()


def client(service):
    return AsyncTcpClient("127.0.0.1", service.port)


async def answer(connection):
    """The next event; None at the end."""
    try:
        return await asyncio.wait_for(connection.read_event(), 60)
    except ConnectionError:
        return None


async def send(connection, samples, rate_hz=RATE_HZ, chunk=1024, **more):
    """int16 samples (n,) or (n, channels), as a microphone's program sends them."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    for start in range(0, len(samples), chunk):
        audio = samples[start : start + chunk].tobytes()
        await connection.write_event(AudioChunk(rate_hz, 2, channels, audio, start * 1000 // rate_hz, **more).event())


async def heard(connection, samples, rate_hz=RATE_HZ, chunk=1024):
    """What is detected in a stream, until all of it was heard."""
    await connection.write_event(AudioStart(rate_hz, 2, 1 if samples.ndim == 1 else samples.shape[1]).event())
    sending = asyncio.ensure_future(send(connection, samples, rate_hz, chunk))
    sending.add_done_callback(lambda _: asyncio.ensure_future(finish()))

    async def finish():
        await connection.write_event(AudioStop().event())
        await connection.write_event(Ping("end").event())

    found = []
    while not Pong.is_type((event := await answer(connection)).type):
        found.append(event)
    return found


async def two_at_once(service):
    """What each of two is told of a keyword, where both have begun before either is heard."""
    async with client(service) as one, client(service) as other:
        for connection in (one, other):
            await connection.write_event(AudioStart(RATE_HZ, 2, 1).event())
            await connection.write_event(Ping("begun").event())
            await answer(connection)
        for connection in (one, other):
            await send(connection, ONCE)
            await connection.write_event(AudioStop().event())
        return [(await answer(connection)).type for connection in (one, other)]


def near(timestamps_ms):
    """Each spoken keyword is reported once, and nothing else: at its end or within the second after it."""
    wanted = TRUTH["spoken"]
    return len(timestamps_ms) == len(wanted) and all(
        one["start_s"] < at / 1000 < one["end_s"] + 1.0 for one, at in zip(wanted, timestamps_ms, strict=True)
    )


def test_it_describes_itself(service):
    async def talk():
        async with client(service) as connection:
            await connection.write_event(Describe().event())
            return Info.from_event(await answer(connection))

    program = asyncio.run(talk()).wake[0]
    assert (program.name, program.installed, program.version) == ("edgekws", True, edgekws.__version__)
    assert [(one.name, one.phrase, one.installed) for one in program.models] == [(KEYWORD, KEYWORD, True)]


@pytest.mark.parametrize(("rate_hz", "channels", "chunk"), [(16_000, 1, 1024), (48_000, 2, 480), (44_100, 1, 4096), (22_050, 1, 333)])
def test_every_keyword_is_detected_at_any_rate(service, rate_hz, channels, chunk):
    samples = STREAM if rate_hz == RATE_HZ else soxr.resample(STREAM, RATE_HZ, rate_hz).astype(np.int16)
    if channels == 2:
        samples = np.stack([samples, samples], 1)

    async def talk():
        async with client(service) as connection:
            await connection.write_event(Detect(names=[KEYWORD]).event())
            return [Detection.from_event(event) for event in await heard(connection, samples, rate_hz, chunk)]

    detections = asyncio.run(talk())
    assert {(one.name, one.speaker) for one in detections} == {(KEYWORD, "ann")}
    assert near([one.timestamp for one in detections])


def test_nothing_detected_is_said_at_the_end_of_the_audio(service):
    async def talk():
        async with client(service) as connection:
            silence = await heard(connection, np.zeros(RATE_HZ, np.int16))
            speech = await heard(connection, ONCE)
            return [[event.type for event in events] for events in (silence, speech)]

    assert asyncio.run(talk()) == [["not-detected"], ["detection"]]


def test_names_are_each_connections_own(service):
    async def talk():
        async with client(service) as one, client(service) as other:
            await one.write_event(Detect(names=["alexa"]).event())
            error = await answer(one)
            await other.write_event(Detect(names=[KEYWORD.upper(), "alexa"], context={"room": 3}).event())
            return error, await asyncio.gather(heard(one, ONCE), heard(other, ONCE))

    error, (none, all_of_it) = asyncio.run(talk())
    assert error.data["text"] == f"none of ['alexa'] is enrolled, so nothing will wake. Enrolled: \"{KEYWORD}\""
    assert [event.type for event in none] == ["not-detected"]
    assert [event.data["context"] for event in all_of_it] == [{"room": 3}]
    assert NotDetected.from_event(none[0]).context is None


@pytest.mark.parametrize(
    ("names", "told"), [(None, KEYWORD), (["Open  SESAME "], "Open  SESAME "), ([KEYWORD.upper(), KEYWORD, KEYWORD.title()], KEYWORD)]
)
def test_a_detection_bears_the_name_that_was_asked_for(service, names, told):
    async def talk():
        async with client(service) as connection:
            await connection.write_event(Detect(names=names).event())
            return [Detection.from_event(event).name for event in await heard(connection, ONCE)]

    assert asyncio.run(talk()) == [told]


def test_audio_without_a_start_is_heard_too(service):
    async def talk():
        async with client(service) as connection:
            await send(connection, ONCE)
            return await answer(connection)

    assert asyncio.run(talk()).type == "detection"


def test_what_is_new_to_it_is_passed_over(service):
    async def talk():
        async with client(service) as connection:
            await connection.write_event(Event("run-satellite", {"x": 1}, b"yz"))
            await connection.write_event(Ping("still here?").event())
            return Pong.from_event(await answer(connection)).text

    assert asyncio.run(talk()) == "still here?"


JUNK = [
    b"junk\n",
    b"[]\n",
    b"null\n",
    b"\xff\xfe\n",
    b'{"data": {}}\n',
    b'{"type": 3}\n',
    b'{"type": "detect", "data": []}\n',
    b'{"type": "detect", "data": {"names": "alexa"}}\n',
    b'{"type": "detect", "data_length": 3}\n[1]',
    b'{"type": "detect", "data_length": -1}\n',
    b'{"type": "detect", "data_length": true}\n',
    b'{"type": "detect", "data_length": 1e3}\n',
    b'{"type": "ping", "data_length": 99999999999}\n',
    b'{"type": "audio-chunk", "payload_length": %d}\n' % (PAYLOAD_BYTES + 1),
    b'{"type": "audio-chunk", "data": {"rate": 16000, "width": 2, "channels": 1}, "payload_length": 3}\nabc',
    b'{"type": "audio-chunk", "data": {"rate": 16000, "width": 2}}\n',
    b'{"type": "audio-start", "data": {"rate": 0, "width": 2, "channels": 1}}\n',
    b'{"type": "audio-start", "data": {"rate": 16000, "width": 3, "channels": 1}}\n',
    b'{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1000}}\n',
    b'{"type": "audio-start", "data": {"rate": NaN, "width": 2, "channels": 1}}\n',
    b'{"type": "ping", "data": ' + b"[" * 5000 + b"}\n",
    b'{"type": "ping", "data": {"text": "\\ud800"}}\n',  # half a surrogate pair
    b'{"type": "detect", "data": {"context": {"\\udfff": 1}}}\n{"type": "audio-start", "data": %b}\n{"type": "audio-stop"}\n'
    % json.dumps(FORMAT).encode(),
    b"x" * (2 * LINE_BYTES),
]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_told_and_ends_the_connection(service, junk):
    async def talk():
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(junk)
        got = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return got

    assert b'"error"' in asyncio.run(talk())


def test_fifty_clients_of_which_ten_are_mad(service):
    """The forty get every detection; the ten stall, send junk, flood, or drop in the middle of a frame."""
    done = asyncio.Event()

    async def healthy():
        async with client(service) as connection:
            await connection.write_event(Detect(names=[KEYWORD]).event())
            return [event.type for event in await heard(connection, ONCE)]

    async def mad(kind):
        while not done.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
                if kind == "stalls":
                    writer.write(b'{"type": "audio-chunk", "payload_length": 1000}\nhalf')
                    await done.wait()
                elif kind == "junk":
                    writer.write(random.randbytes(5000))
                    await reader.read()
                elif kind == "drops":
                    writer.write(b'{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}\n{"type": "audio')
                    await writer.drain()
                elif kind == "never reads":
                    for _ in range(10_000):
                        writer.write(b'{"type": "describe"}\n')
                        await asyncio.wait_for(writer.drain(), 1)
                else:  # floods
                    line = json.dumps({"type": "audio-chunk", "data": FORMAT, "payload_length": 64_000}).encode()
                    while not done.is_set():
                        writer.write(line + b"\n" + bytes(64_000))
                        await writer.drain()
                writer.transport.abort()
            except (OSError, asyncio.TimeoutError):
                pass
            await asyncio.sleep(0.01)

    async def all_of_them():
        mads = [asyncio.ensure_future(mad(kind)) for kind in ("stalls", "junk", "drops", "never reads", "floods") * 2]
        good = await asyncio.gather(*(healthy() for _ in range(40)))
        done.set()
        await asyncio.wait(mads, timeout=30)
        return good

    assert asyncio.run(all_of_them()) == [["detection"]] * 40


def test_beyond_the_bound_a_client_is_told_so(service):
    async def talk():
        connections = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(CLIENTS)]
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        told = await asyncio.wait_for(reader.read(), 30)
        for _, one in [*connections, (reader, writer)]:
            one.close()
        return told

    assert b"all that may be" in asyncio.run(talk())


def test_a_fuzz_of_malformed_frames_stops_nothing_and_leaks_nothing(service):
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from wyoming_fuzz import fuzz

    asyncio.run(fuzz("127.0.0.1", service.port, 500, seed=1))
    before_mb = service.rss_mb()
    asyncio.run(fuzz("127.0.0.1", service.port, 1500, seed=2))

    assert service.rss_mb() - before_mb < 20
    assert service.process.poll() is None


def test_a_new_enrolment_and_a_new_version_are_taken_up_by_a_stream_that_goes_on(tmp_path):
    """Five keywords are spoken: enrolled anew after the first, another network after the second, a broken one after the third."""
    service = Service(tmp_path / "state")
    takes = sorted(map(str, DEMO.glob("enrol-*.flac")))
    cuts = [int((one["end_s"] + 1.5) * RATE_HZ) for one in TRUTH["spoken"][:3]]

    async def talk():
        async with client(service) as connection:

            async def hear(part):
                await send(connection, part)
                await connection.write_event(Ping("end").event())
                found = []
                while not Pong.is_type((event := await answer(connection)).type):
                    found.append(event.data["name"])
                return found

            await connection.write_event(AudioStart(RATE_HZ, 2, 1).event())
            names = [await hear(STREAM[: cuts[0]])]
            service.tell("enroll", "another name", *takes)
            service.says(f'serves "another name", "{KEYWORD}" now')
            names.append(await hear(STREAM[cuts[0] : cuts[1]]))
            service.tell("models", "promote", "edge-small")
            service.says("edge-small-4 serves")
            names.append(await hear(STREAM[cuts[1] : cuts[2]]))
            promote_broken(service.root, tmp_path)
            service.says("edge-small-4 goes on: ")
            names.append(await hear(STREAM[cuts[2] :]))
            await connection.write_event(Describe().event())
            return names, Info.from_event(await answer(connection)).wake[0].models

    names, models = asyncio.run(talk())
    out, _, _ = service.stop()
    both = ["another name", KEYWORD]

    assert [sorted(found) for found in names] == [[KEYWORD], both, both, sorted(both * 2)]
    assert [json.loads(line)["model"] for line in out.splitlines()] == ["edge-3"] * 3 + ["edge-small-4"] * 6
    assert {(one.name, one.version) for one in models} == {(name, "edge-small-4") for name in both}


@pytest.mark.parametrize("later", [False, True])
def test_beside_a_version_that_cannot_be_had_who_is_removed_is_gone_and_who_is_new_is_heard(tmp_path, later):
    service = Service(tmp_path / "state")
    promote_broken(service.root, tmp_path, later)
    service.says("edge-3 goes on: ")
    service.tell("enroll", "--model", "edge", "another name", *sorted(map(str, DEMO.glob("enrol-*.flac"))))
    service.tell("enroll", "--remove", KEYWORD)

    async def keywords():
        async with client(service) as connection:
            await connection.write_event(Describe().event())
            return [one.name for one in Info.from_event(await answer(connection)).wake[0].models]

    until_s = time.monotonic() + 30
    while (served := asyncio.run(keywords())) != ["another name"] and time.monotonic() < until_s:
        time.sleep(0.2)
    service.stop()

    assert served == ["another name"]


def test_no_stream_gets_a_network_that_took_the_place_of_what_is_served_until_all_get_it(tmp_path):
    """As an upgrade of the package does: its prototypes are of another space."""
    pytest.importorskip("onnx")
    path, config = tmp_path / "model", tmp_path / "edgekws.toml"
    shutil.copytree(find_model(), path)
    config.write_text(f'[model]\nid = "{path}"\n')
    service = Service(tmp_path / "state", "--config", str(config))

    async def talk():
        async with client(service) as before, client(service) as meanwhile:
            await before.write_event(AudioStart(RATE_HZ, 2, 1).event())
            await before.write_event(Ping("begun").event())
            await answer(before)
            turn_about(path)
            await meanwhile.write_event(AudioStart(RATE_HZ, 2, 1).event())
            await meanwhile.write_event(Ping("begun").event())
            told = await answer(meanwhile)
            assert told.type == "error"  # and no pong
            service.says(f'serves "{KEYWORD}" now')
            async with client(service) as after:
                woke = [event.type for event in await heard(after, ONCE)]
            await send(before, ONCE)
            return told.data["text"], woke, (await answer(before)).type

    text, woke, before = asyncio.run(talk())

    assert "another network took the place of edge-3" in text
    assert (woke, before) == (["detection"], "detection")
    assert service.stop()[2] == 0


@pytest.mark.parametrize("between_streams", [False, True])
def test_a_stream_whose_keyword_is_removed_is_told(tmp_path, between_streams):
    service = Service(tmp_path / "state")

    async def talk():
        async with client(service) as connection:
            await connection.write_event(Detect(names=[KEYWORD]).event())
            await send(connection, ONCE)
            woke = await answer(connection)
            if between_streams:
                await connection.write_event(AudioStop().event())
            service.tell("enroll", "another name", *sorted(map(str, DEMO.glob("enrol-*.flac"))))
            service.tell("enroll", "--remove", KEYWORD)
            service.says('serves "another name" now')
            await send(connection, np.zeros(3 * RATE_HZ, np.int16))
            await connection.write_event(Ping("end").event())
            return woke.type, await answer(connection)

    woke, told = asyncio.run(talk())
    _, err, _ = service.stop()
    text = f"none of ['{KEYWORD}'] is enrolled, so nothing will wake. Enrolled: \"another name\""

    assert (woke, told.type, told.data["text"]) == ("detection", "error", text)
    assert text in err


def test_it_starts_with_the_version_before_one_that_is_broken(tmp_path):
    first = Service(tmp_path / "state")
    first.tell("models", "promote", "edge-small")
    first.stop()
    promote_broken(first.root, tmp_path)
    service = Service(tmp_path / "state")

    async def talk():
        async with client(service) as connection:
            await connection.write_event(Describe().event())
            info = Info.from_event(await answer(connection))
            return info.wake[0].models[0].version, [event.type for event in await heard(connection, ONCE)]

    assert asyncio.run(talk()) == ("edge-small-4", ["detection"])
    assert service.stop()[2] == 0
    assert not (first.root / "starts").exists()


def test_settings_are_read_again_when_it_is_told_to(tmp_path):
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[detector]\nthreshold_offset = 3.0\n[keyword."{KEYWORD}"]\nthreshold_offset = 3.0\n')
    service = Service(tmp_path / "state", "--config", str(config))

    async def talk():
        async with client(service) as connection:
            deaf = await heard(connection, ONCE)
            config.write_text("")
            service.process.send_signal(signal.SIGHUP)
            service.says("with what was read again")
            return [event.type for event in (*deaf, *await heard(connection, ONCE))]

    assert asyncio.run(talk()) == ["not-detected", "detection"]
    assert service.stop()[2] == 0


def test_after_a_reload_every_stream_gets_the_engine_that_is_served_now(tmp_path):
    config = tmp_path / "edgekws.toml"
    config.write_text('[model]\nengine = "null"\n')
    service = Service(tmp_path / "state", "--config", str(config))
    config.write_text('[model]\nengine = "onnxruntime"\n')
    service.process.send_signal(signal.SIGHUP)
    service.says("with what was read again (on onnxruntime, before on null)")

    assert asyncio.run(two_at_once(service)) == ["detection", "detection"]
    assert service.stop()[2] == 0


# What the interpreter of the service runs first: a TensorRT whose library takes the process with it.
ABORTS = """
import os, sys, types
double = types.ModuleType("edgekws.engines.tensorrt_engine")
double.why_unavailable = lambda: None
double.load = double.load_prepared = lambda model: os.abort()
sys.modules[double.__name__] = double
"""


def test_an_engine_that_ended_the_process_is_not_loaded_for_a_second_client_either(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ABORTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    config = tmp_path / "edgekws.toml"
    config.write_text('[model]\nengine = "tensorrt"\n')
    with pytest.raises(AssertionError, match="it did not start"):
        Service(tmp_path / "state", "--config", str(config))
    service = Service(tmp_path / "state", "--config", str(config))

    assert asyncio.run(two_at_once(service)) == ["detection", "detection"]
    assert service.stop()[2] == 0


def test_it_ends_when_told_while_clients_are_connected(tmp_path):
    """One says nothing, one is in the middle of a frame, one in a stream."""
    service = Service(tmp_path / "state")

    async def talk():
        idle = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(2)]
        idle[1][1].write(b'{"type": "audio-chunk", "payload_length": 1000}\nhalf')
        stream = client(service)
        await stream.connect()
        await send(stream, ONCE)
        await answer(stream)
        return await asyncio.to_thread(service.stop)

    _, err, code = asyncio.run(talk())
    assert code == 0
    assert "Traceback" not in err


def test_each_wake_is_printed_and_stored_and_it_ends_when_told(service):
    """The last of this service."""
    out, err, code = service.stop()
    wakes = [json.loads(line) for line in out.splitlines()]

    assert code == 0
    assert "Traceback" not in err
    assert {(wake["kind"], wake["keyword"], wake["extra"]["client"].split(":")[0]) for wake in wakes} == {("wake", KEYWORD, "127.0.0.1")}


async def serve_until(true, stamp=lambda: 1, told=lambda server: None, **more):
    """In this process; nothing of it goes on at the end."""
    model = load_model(find_model())
    delivery = Delivery([])

    def version(reread=False):
        return Version(model, load_engine(model), Detector([]))

    async def look():
        while not true() and not serving.done():
            await asyncio.sleep(0.01)

    server = WyomingServer(version, version, version, stamp, lambda served: load_engine(served.model), delivery)
    told(server)
    serving = asyncio.ensure_future(server.serve("127.0.0.1", 0, **more))
    await asyncio.wait_for(look(), 60)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    delivery.close()
    await asyncio.wait_for(asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True), 60)


def test_a_look_that_fails_is_said_and_what_it_was_told_is_read_again_at_the_next(monkeypatch, caplog):
    monkeypatch.setattr(wyoming_server, "LOOK_AROUND_S", 0.01)
    looks = iter([1, OSError("no process to be had")])

    def stamp():
        if isinstance(look := next(looks, 1), OSError):
            raise look
        return look

    asyncio.run(serve_until(lambda: "now, with what was read again" in caplog.text, stamp, WyomingServer.reload))

    assert "edge-3 goes on: no process to be had" in caplog.text


def announcer(monkeypatch, *troubles):
    """A fake for a network that is not there yet, or a unit that shuts it off: what is raised at each attempt. Those that succeeded."""
    left, announced = iter(troubles), []

    class Announcer:
        def __init__(self, port, **_):
            self.port = port
            if trouble := next(left, None):
                raise trouble

        async def register_server(self):
            if trouble := next(left, None):
                raise trouble
            announced.append(self.port)

    monkeypatch.setitem(sys.modules, "wyoming.zeroconf", SimpleNamespace(HomeAssistantZeroconf=Announcer))
    return announced


def test_who_cannot_be_announced_is_served_all_the_same(monkeypatch, caplog):
    announcer(monkeypatch, OSError(97, "Address family not supported by protocol"))
    ports = []

    asyncio.run(serve_until(lambda: ports and "cannot be announced" in caplog.text, ready=ports.append, announce=""))

    assert "cannot be announced by mDNS yet (OSError: [Errno 97]" in caplog.text


def test_it_is_announced_once_the_network_is_there(monkeypatch):
    monkeypatch.setattr(wyoming_server, "ANNOUNCE_S", (0.0, 0.0))
    announced, ports = announcer(monkeypatch, *[OSError(101, "Network is unreachable")] * 3), []

    asyncio.run(serve_until(lambda: announced, ready=ports.append, announce=""))

    assert announced == ports


def test_without_the_package_it_is_said_how_to_get_it_before_anybody_is_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "wyoming.zeroconf", None)
    ports = []

    with pytest.raises(NotInstalled, match=r"pip install 'edgekws\[zeroconf\]'"):
        asyncio.run(serve_until(lambda: ports, ready=ports.append, announce=""))

    assert ports == []


def test_the_extra_that_announces_it_asks_for_a_wyoming_that_can():
    """1.7 has another class."""
    (extra,) = re.findall(r"^zeroconf = (.*)$", (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.M)

    assert '"wyoming>=1.8"' in extra
