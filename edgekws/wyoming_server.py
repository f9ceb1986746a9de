"""A wake service for the Wyoming protocol: others send audio, and are told what woke. The only module that knows the library.

    describe → info          detect (names) → audio-start → audio-chunk … → detection … → audio-stop → not-detected if nothing woke
    ping → pong

Each connection has a stream, a network's state and names of its own. A version that is promoted, and what is enrolled, is taken up while
they last. Frames are read here and not by the library: it waits for as many bytes as a client announces, and takes junk for the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekws import __version__
from edgekws.audio.resampling import To16k, mono
from edgekws.engines import Engine
from edgekws.enrolment import as_enrolled
from edgekws.errors import EdgekwsError, EngineUnavailable, ModelError, NotInstalled
from edgekws.pipeline import Pipeline
from edgekws.promotion import CALM_HOPS, LOOK_AROUND_S, PATIENCE_HOPS, Newcomer, Version, flaw
from edgekws.sinks import Complaints, Delivery
from edgekws.values import HOP_MS, SAMPLE_RATE_HZ, AudioChunk, Detection, Event

log = logging.getLogger(__name__)

CLIENTS = 64  # each needs 2 MB for its network's state (measured)
SPARE = 4  # engines that are kept for the next streams
IDLE_S = 30.0  # without a frame, after which a connection may be ended for another's sake
LINE_BYTES = 16 * 1024  # of a frame's first line
DATA_BYTES = 64 * 1024
PAYLOAD_BYTES = 256 * 1024  # 8 s at 16 kHz; Home Assistant sends 0.06 s
WRITE_S = 5.0  # for a client to take an answer
ANNOUNCE_S = (10.0, 300.0)  # between attempts to be announced: the first, the longest
RATES_HZ = (4_000, 384_000)
WIDTHS = {1: "<i1", 2: "<i2", 4: "<i4"}  # bytes of a sample; all signed, as in the library
CHANNELS = 8


class Frame(NamedTuple):
    """One message of the protocol."""

    type: str
    data: dict[str, Any]
    payload: bytes


class WyomingServer:
    """Serves until its task is cancelled. One thread: a client that sends as fast as it can gets its turn after each hop, as all do."""

    def __init__(
        self,
        start: Callable[[], Version],
        load: Callable[[bool], Version],
        again: Callable[[Path], Version],
        stamp: Callable[[], object],
        new_engine: Callable[[Version], Engine],
        delivery: Delivery,
    ) -> None:
        """
        Args:
            start: gives what is served first.
            load: gives what should be served by now, with True from settings that are read again. On a thread of its own.
            again: gives the version of that directory with the enrolments of now, where what should be served cannot be had.
            stamp: differs when what `load` gives does. Asked once a second.
            new_engine: one more of what that version runs on, for each stream beyond those that already ended. Raises ModelError: what
                it was loaded from is not there any more, so what is there should be served.
            delivery: gets each wake and stays open.
        """
        try:
            import wyoming  # noqa: F401
        except ImportError as error:
            raise NotInstalled("the package wyoming", "wyoming") from error
        self._load, self._again, self._stamp, self._new_engine = load, again, stamp, new_engine
        self._seen = stamp()
        self.version = start()
        """What streams that begin now are given; the others go over to it."""
        self._idle: list[Engine] = [self.version.engine]
        self.delivery = delivery
        self._loading = asyncio.Lock()
        self._reread = asyncio.Event()
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.complaints = Complaints()

    @property
    def keywords(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(one.keyword for one in self.version.detector.enrolled))

    def line(self) -> str:
        """For people, as `systemctl status` shows it."""
        return f"{len(self._clients)} clients, {self.version.model.id}, {', '.join(self.keywords)}"

    def reload(self) -> None:
        """Read settings, enrolments and model again."""
        self._reread.set()

    async def serve(
        self,
        host: str,
        port: int,
        ready: Callable[[int], None] = lambda port: None,
        announce: str | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            ready: is told the port, which the system chose where it was 0.
            announce: a name for mDNS ("" = from the hardware address).
            alive: called once a second, on the thread that all clients wait for.

        Raises:
            EdgekwsError: that address cannot be listened on.
            NotInstalled: it should be announced, and zeroconf is not there.
        """
        try:
            server = await asyncio.start_server(self._client, host, port, limit=LINE_BYTES)
        except OSError as error:
            raise EdgekwsError(
                f"cannot listen on {host} port {port}: {error.strerror}. Is another wake service running? Try another --uri"
            ) from None
        port = server.sockets[0].getsockname()[1]
        try:
            beside = [] if announce is None else [asyncio.ensure_future(_announce(_announcer(host, port, announce)))]
            ready(port)
            beside += [asyncio.ensure_future(self._follow()), asyncio.ensure_future(_each_look(alive))]
            try:
                # Not `serve_forever`: since Python 3.12.1 it waits, cancelled, for all clients to go.
                await asyncio.Event().wait()
            finally:
                for task in beside:
                    task.cancel()
        finally:
            server.close()
            for client in self._clients:
                client.writer.transport.abort()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=WRITE_S)
            for engine in self._idle:
                engine.close()

    async def _follow(self) -> None:
        """Take up what is promoted or enrolled from now on. What has a flaw is said, and the version in use stays."""
        last = self._seen
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reread.wait(), LOOK_AROUND_S)
            try:
                reread, now = self._reread.is_set(), self._stamp()
                self._reread.clear()
                # It must stay so for a look, because `edgekws enroll` makes the prototypes after the recordings.
                settled, last = now == last, now
                if not reread and (now == self._seen or not settled):
                    continue
                self._seen = now
                version = await asyncio.to_thread(self._newer, reread)
                before, self.version = self.version, version
                for engine in self._idle:
                    engine.close()
                self._idle = [version.engine]
                what = f"before it {before.model.id}" if before.model.id != version.model.id else "with what was read again"
                what += f" (on {version.engine.name}, before on {before.engine.name})" if version.engine.name != before.engine.name else ""
                heard = ", ".join(f'"{one}"' for one in self.keywords) or "nothing"
                log.warning("wyoming: %s serves %s now, %s", version.model.id, heard, what)
            except Exception as error:  # whatever a damaged file makes NumPy, zipfile or a vendor's library raise
                known = isinstance(error, EdgekwsError)
                log.error("wyoming: %s goes on: %s", self.version.model.id, error, exc_info=None if known else error)
                await asyncio.sleep(LOOK_AROUND_S)  # what it was told to read again is not waited for above

    def _newer(self, reread: bool) -> Version:
        """What should be served by now; where that cannot be had, what is, as who was removed, or is new, is so for that too."""
        here = self.version.model
        try:
            return self._sound(self._load(reread))
        except (ModelError, EngineUnavailable) as error:
            log.error("wyoming: %s goes on: %s", here.id, error)
        return self._sound(self._again(here.path))

    def _sound(self, version: Version) -> Version:
        if version.model != self.version.model and (reason := flaw(version)) is not None:
            version.engine.close()
            raise ModelError(f"{version.model.id} is refused: {reason}")
        return version

    def info(self) -> dict[str, Any]:
        """What Home Assistant shows: one program with a model a keyword."""
        from wyoming.info import Attribution, Info, WakeModel, WakeProgram

        whose = Attribution(name="edgekws", url="")
        common: dict[str, Any] = {"attribution": whose, "installed": True}
        models = [
            WakeModel(name=keyword, description=keyword, phrase=keyword, languages=[], version=self.version.model.id, **common)
            for keyword in self.keywords
        ]
        program = WakeProgram(name="edgekws", description="edgekws wake words", version=__version__, models=models, **common)
        return Info(wake=[program]).event().data

    async def take(self) -> tuple[Version, Version]:
        """What is served now, and the same with an engine and a detector of a stream's own; to be given back."""
        async with self._loading:  # 12 ms on a thread, one after the other
            served = self.version
            try:
                engine = self._idle.pop() if self._idle else await asyncio.to_thread(self._new_engine, served)
            except ModelError:
                self._seen = object()  # so that the next look takes up what is there
                raise
        engine.reset()
        return served, replace(served, engine=engine, detector=served.detector.anew())

    def give_back(self, served: Version, engine: Engine) -> None:
        if served is self.version and len(self._idle) < SPARE:
            self._idle.append(engine)
        else:
            engine.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._admit(_Client(self, reader, writer))
        finally:
            self._tasks.discard(task)

    async def _admit(self, client: _Client) -> None:
        if len(self._clients) >= CLIENTS:
            idlest = min(self._clients, key=lambda one: one.active_s)
            if time.monotonic() - idlest.active_s < IDLE_S:
                self.complaints.say(f"wyoming: {CLIENTS} clients are connected, so {client.name} was refused", kind="full")
                await client.refuse(f"{CLIENTS} clients are connected, which is all that may be")
                return
            self._clients.discard(idlest)
            idlest.writer.transport.abort()
        self._clients.add(client)
        try:
            await client.run()
        finally:
            self._clients.discard(client)


class _Client:
    """One connection."""

    def __init__(self, server: WyomingServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.name = "{}:{}".format(*(writer.get_extra_info("peername") or ("?", "?"))[:2])
        self.active_s = time.monotonic()
        self._server = server
        self._names: frozenset[str] | None = None  # None = all
        self._context: object = None
        self._pipeline: Pipeline | None = None
        self._served = server.version
        self._newcomer: Newcomer | None = None
        self._woke = False

    async def run(self) -> None:
        """Answer until the connection ends, whoever ends it."""
        try:
            while (frame := await _read(self.reader)) is not None:
                self.active_s = time.monotonic()
                await self._obey(frame)
        except (_Junk, UnicodeEncodeError) as junk:  # or it wants half a surrogate pair back, in a pong or a context
            log.info("wyoming: %s: %s", self.name, junk)
            await self.refuse(str(junk))
        except (OSError, asyncio.TimeoutError):  # it went away, or took no answer
            pass
        except EdgekwsError as error:  # no engine
            log.error("wyoming: %s: %s", self.name, error)
            await self.refuse(str(error))
        finally:
            self._stop()
            self.writer.transport.abort()
            with contextlib.suppress(OSError, asyncio.TimeoutError):  # why it was lost, which asyncio would tell with a traceback
                await asyncio.wait_for(self.writer.wait_closed(), WRITE_S)

    async def refuse(self, why: str) -> None:
        """Tell a client why, and end it."""
        try:
            await self._tell("error", text=why)
            self.writer.close()
            await asyncio.wait_for(self.writer.wait_closed(), WRITE_S)
        except (OSError, asyncio.TimeoutError):
            self.writer.transport.abort()

    async def _obey(self, frame: Frame) -> None:
        """What is not known is passed over, as newer clients may say more."""
        data = frame.data
        if frame.type == "audio-chunk":
            await self._hear(frame.payload, data)
        elif frame.type == "audio-start":
            await self._start(_format(data))
        elif frame.type == "audio-stop":
            if self._pipeline is not None:
                await self._feed(self._to_16k.flush(), None)
                if not self._woke:
                    await self._tell("not-detected", **self._told())
                self._stop()
        elif frame.type == "detect":
            await self._detect(data.get("names"), data.get("context"))
        elif frame.type == "describe":
            await self._tell("info", **self._server.info())
        elif frame.type == "ping":
            await self._tell("pong", text=data.get("text"))

    async def _detect(self, names: object, context: object) -> None:
        if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise _Junk('"names" of detect must be a list of strings, or null')
        self._names = frozenset(names) if names else None
        self._context = context if isinstance(context, dict) else None
        await self._tell_if_deaf()

    async def _tell_if_deaf(self) -> None:
        if self._names and not any(map(self._asked, self._server.keywords)):
            known = ", ".join(f'"{one}"' for one in self._server.keywords)
            text = f"none of {sorted(self._names)} is enrolled, so nothing will wake. Enrolled: {known}"
            self._server.complaints.say(f"wyoming: {self.name}: {text}", kind="names")
            await self._tell("error", text=text)

    def _asked(self, keyword: str) -> str | None:
        """The name by which the client wants it, as Home Assistant passes over any other; None = it does not."""
        if self._names is None or keyword in self._names:
            return keyword
        return next((name for name in self._names if as_enrolled(name, self._server.keywords) == keyword), None)

    async def _start(self, format: tuple[int, int, int]) -> None:
        self._stop()
        before = self._served
        self._served, own = await self._server.take()
        self._offered = self._served
        self._pipeline = Pipeline(own.engine, own.detector)
        self._set(format)
        self._heard = 0  # samples at 16 kHz
        self._woke = False
        if self._served is not before:
            await self._tell_if_deaf()

    def _set(self, format: tuple[int, int, int]) -> None:
        self._format = format
        self._to_16k = To16k(format[0])

    def _stop(self) -> None:
        if self._pipeline is not None:
            self._server.give_back(self._served, self._pipeline.engine)
            self._pipeline = None
        self._dismiss()

    def _dismiss(self) -> None:
        if self._newcomer is not None:
            self._server.give_back(self._offered, self._newcomer.version.engine)
            self._newcomer = None

    async def _renew(self, pipeline: Pipeline) -> None:
        """In the middle of a stream: go over to what is served now, when neither hears a word. Refractory times hold."""
        if self._offered is not self._server.version:
            self._dismiss()
            try:
                self._offered, own = await self._server.take()
                self._newcomer, self._since = Newcomer(own), pipeline.hops
            except EdgekwsError as error:  # no engine, as memory is short: what listens goes on
                self._offered = self._server.version
                self._server.complaints.say(f"wyoming: {self.name}: goes on with {self._served.model.id}: {error}", kind="newcomer")
        if (newcomer := self._newcomer) is None:  # gone over to, or refused for this stream
            return
        newcomer.follow(list(pipeline.recent))
        if newcomer.calm_hops >= CALM_HOPS and newcomer.flaw is None:
            self._newcomer = None
            self._server.give_back(self._served, pipeline.engine)
            pipeline.replace(newcomer.version.engine, newcomer.version.detector)
            self._served = self._offered
            await self._tell_if_deaf()
        elif newcomer.flaw is not None or pipeline.hops - self._since > PATIENCE_HOPS:
            why = newcomer.flaw or f"it was not below its threshold for {CALM_HOPS} hops in a row within {PATIENCE_HOPS}"
            self._server.complaints.say(f"wyoming: {self.name}: goes on with {self._served.model.id}: {why}", kind="newcomer")
            self._dismiss()

    async def _hear(self, payload: bytes, data: dict[str, Any]) -> None:
        format = rate_hz, width, channels = _format(data)
        if self._pipeline is None:
            await self._start(format)
        elif format != self._format:
            await self._feed(self._to_16k.flush(), None)
            self._set(format)
        frame_bytes = width * channels
        if len(payload) % frame_bytes:
            raise _Junk(f"{len(payload)} bytes of audio are no whole number of samples ({frame_bytes} bytes)")
        samples = np.frombuffer(payload, WIDTHS[width]).reshape(-1, channels)
        at_ms = data.get("timestamp")
        step = rate_hz * HOP_MS // 1000
        for start in range(0, len(samples), step):
            floats = samples[start : start + step].astype(np.float32) / np.float32(1 << (8 * width - 1))
            await self._feed(self._to_16k.feed(mono(floats)), at_ms if type(at_ms) is int else None)

    async def _feed(self, samples: np.ndarray, at_ms: int | None) -> None:
        """int16 at 16 kHz, about a hop; then it is somebody else's turn."""
        pipeline = self._pipeline
        assert pipeline is not None
        if self._newcomer is not None or self._offered is not self._server.version:
            await self._renew(pipeline)
        arrived_s = time.perf_counter()
        if len(samples):
            found = pipeline.feed(AudioChunk(samples, self._heard))
            self._heard += len(samples)
            for one in found:
                if (name := self._asked(one.keyword)) is not None:
                    self._woke = True
                    self._remember(one, (time.perf_counter() - arrived_s) * 1000)
                    at = at_ms if at_ms is not None else one.end_sample * 1000 // SAMPLE_RATE_HZ
                    await self._tell("detection", name=name, timestamp=at, speaker=one.speaker or None, **self._told())
        await asyncio.sleep(0)

    def _remember(self, one: Detection, latency_ms: float) -> None:
        stream_s = one.end_sample / SAMPLE_RATE_HZ
        facts = (one.keyword, one.speaker, one.score, one.threshold, time.time(), stream_s, latency_ms, self._served.model.id)
        self._server.delivery.put(Event(*facts, extra={"client": self.name}))

    def _told(self) -> dict[str, object]:
        return {} if self._context is None else {"context": self._context}

    async def _tell(self, type: str, **data: object) -> None:
        from wyoming.event import Event, async_write_event

        await asyncio.wait_for(async_write_event(Event(type, data), self.writer), WRITE_S)


class _Junk(Exception):
    """What no client of this protocol sends."""


async def _read(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None at the end, also in the middle of one.

    Raises:
        _Junk: no frame, or one beyond the bounds.
    """
    try:
        line = await reader.readline()
    except ValueError:
        raise _Junk(f"a first line of more than {LINE_BYTES} bytes") from None
    if not line.endswith(b"\n"):
        return None
    header = _object(line, "a frame's first line")
    type, data = header.get("type"), header.get("data")
    if not isinstance(type, str):
        raise _Junk('a frame needs a "type"')
    if data is not None and not isinstance(data, dict):
        raise _Junk('"data" must be an object')
    data = data or {}
    try:
        if size := _size(header, "data_length", DATA_BYTES):
            data.update(_object(await reader.readexactly(size), "data"))
        size = _size(header, "payload_length", PAYLOAD_BYTES)
        return Frame(type, data, await reader.readexactly(size) if size else b"")
    except asyncio.IncompleteReadError:
        return None


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _Junk(f"{what} must be a JSON object, and is {text[:40]!r}")
    return found


def _size(header: dict[str, Any], key: str, limit: int) -> int:
    size = header.get(key)
    if size is None:
        return 0
    if type(size) is not int or not 0 <= size <= limit:
        raise _Junk(f"{key} must be a number from 0 to {limit}")
    return size


def _format(data: dict[str, Any]) -> tuple[int, int, int]:
    """Rate in Hz, bytes of a sample, channels."""
    rate_hz, width, channels = (data.get(name) for name in ("rate", "width", "channels"))
    low, high = RATES_HZ
    if type(rate_hz) is not int or not low <= rate_hz <= high:
        raise _Junk(f'"rate" must be a number from {low} to {high}')
    if type(width) is not int or width not in WIDTHS:
        raise _Junk(f'"width" must be one of {", ".join(map(str, WIDTHS))} (bytes of a signed sample)')
    if type(channels) is not int or not 1 <= channels <= CHANNELS:
        raise _Junk(f'"channels" must be a number from 1 to {CHANNELS}')
    return rate_hz, width, channels


async def _each_look(call: Callable[[], None]) -> None:
    while True:
        call()
        await asyncio.sleep(LOOK_AROUND_S)


def _announcer(host: str, port: int, name: str) -> Callable[[], Any]:
    """Makes what announces it to Home Assistant, by mDNS."""
    try:
        from wyoming.zeroconf import HomeAssistantZeroconf
    except ImportError as error:
        raise NotInstalled("the package zeroconf", "zeroconf") from error
    return lambda: HomeAssistantZeroconf(port=port, name=name or None, host=None if host in ("0.0.0.0", "::") else host)


async def _announce(make: Callable[[], Any]) -> None:
    """Until it succeeds: at boot the network may come later. What was made is kept, as its sockets are open."""
    announcer, (wait_s, longest_s) = None, ANNOUNCE_S
    while True:
        try:
            announcer = announcer or make()
            await announcer.register_server()
            return
        except Exception as error:  # zeroconf has a dozen kinds, and whoever knows the address is served all the same
            log.warning("wyoming: cannot be announced by mDNS yet (%s: %s)", type(error).__name__, error)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, longest_s)
