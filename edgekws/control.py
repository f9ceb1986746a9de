"""DELIVER and obey: a Unix socket of JSON lines. Every event goes out to whoever is connected; commands come in and are answered.

    → {"kind": "wake", "keyword": …}                   as `edgekws run --json` prints it; gaps, starts and stops too
    ← {"command": "status"}                            → {"reply": "status", "listening": true, "level_dbfs": …}
    ← {"command": "reject"}                            → {"reply": "reject", …}; that last wake was wrong
    ← anything else                                    → {"error": "…"}

The file's mode lets in the user and the group, nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgekws.errors import ConfigError, EdgekwsError, Taken
from edgekws.sinks import Complaints, as_json
from edgekws.values import Event

Command = Callable[[], Mapping[str, object]]

CLIENTS = 32
LINE_BYTES = 4096  # of a command
WAITING_BYTES = 256 * 1024  # that a client may leave unread: some 1000 events
PAUSE_S = 0.05  # after each command of a client, so that none keeps this process busy
CLOSE_S = 1.0  # for the last events to go out
PATH_BYTES = 107  # sun_path of unix(7)


def socket_path(root: Path) -> Path:
    """In systemd's runtime directory, else in the state directory `root`."""
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return (Path(runtime) if runtime else root) / "control.sock"


class ControlSocket:
    """A sink with a thread of its own; a client that does not read, or sends junk, is let go and harms no other.

    Raises:
        ConfigError: the socket cannot be made, or another edgekws has it.
    """

    def __init__(self, path: Path, commands: Mapping[str, Command]) -> None:
        """`commands` are called one at a time on a thread beside; they answer with what JSON can hold, or raise EdgekwsError."""
        self._path = path
        self._commands = dict(commands)
        self._complaints = Complaints()
        self._clients: set[asyncio.StreamWriter] = set()
        self._ear = _bind(path)
        self._inode = path.stat().st_ino
        self._loop = asyncio.new_event_loop()
        # One is all that is used; asyncio's own begins another where the last has answered and not yet gone to wait.
        self._loop.set_default_executor(ThreadPoolExecutor(1, "commands"))
        self._ended = asyncio.Event()
        self._one = asyncio.Lock()  # a command at a time, and meanwhile events go out
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="control", daemon=True)
        self._thread.start()

    def deliver(self, event: Event) -> None:
        """To every client. What one does not take within its bound ends its connection."""
        self._loop.call_soon_threadsafe(self._tell_all, as_json(event).encode(errors="backslashreplace") + b"\n")

    def close(self) -> None:
        """Give clients a moment to take the last events."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # else somebody else's by now
                self._path.unlink()

    async def _serve(self) -> None:
        server = await asyncio.start_unix_server(self._client, sock=self._ear, limit=LINE_BYTES)
        await self._ended.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for end in (asyncio.StreamWriter.close, lambda writer: writer.transport.abort()):
            for writer in list(self._clients):
                end(writer)
            if tasks:
                _, tasks = await asyncio.wait(tasks, timeout=CLOSE_S)
        for task in tasks:  # a command that does not end
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= CLIENTS:
            self._tell(writer, {"error": f"{CLIENTS} clients are connected, which is all that may be"})
            writer.close()
            return
        self._clients.add(writer)
        try:
            while line := await reader.readline():
                async with self._one:
                    self._tell(writer, await asyncio.to_thread(self._answer, line))
                await asyncio.sleep(PAUSE_S)
        except ValueError:  # readline's, past LINE_BYTES
            self._tell(writer, {"error": f"a line of more than {LINE_BYTES} bytes. Accepted is one JSON object a line"})
        except OSError:  # it went away
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    def _answer(self, line: bytes) -> Mapping[str, object]:
        try:
            wanted = json.loads(line)["command"]
            command = self._commands[wanted]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = " or ".join(f'{{"command": "{name}"}}' for name in self._commands)
            return {"error": f"not understood. Accepted is {known} on a line"}
        try:
            return {"reply": wanted, **command()}
        except EdgekwsError as error:
            return {"reply": wanted, "error": str(error)}

    def _tell(self, writer: asyncio.StreamWriter, answer: Mapping[str, object]) -> None:
        self._write(writer, json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n")

    def _tell_all(self, line: bytes) -> None:
        for writer in list(self._clients):
            self._write(writer, line)

    def _write(self, writer: asyncio.StreamWriter, line: bytes) -> None:
        if writer.transport.is_closing():
            return
        writer.write(line)
        if writer.transport.get_write_buffer_size() > WAITING_BYTES:
            self._clients.discard(writer)
            writer.transport.abort()
            self._complaints.say(f"{self._path}: a client left {WAITING_BYTES // 1024} kB unread and was let go", kind="slow")


def _bind(path: Path) -> socket.socket:
    """Listening, and nobody could connect before the mode was set."""
    if len(os.fsencode(path)) > PATH_BYTES:
        raise ConfigError(f"[sinks] socket: {path} is longer than the {PATH_BYTES} bytes of a socket's path. Name a shorter [store] root")
    ear = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
            raise Taken(f"[sinks] socket: another edgekws has {path}. End that, or set socket = false for this one")
        path.unlink(missing_ok=True)  # of one that was killed
        ear.bind(str(path))
        path.chmod(0o660)
        ear.listen()
        return ear
    except OSError as error:
        ear.close()
        raise ConfigError(f"[sinks] socket: {path} cannot be made ({error.strerror}). Its directory must be writable") from error
    except BaseException:
        ear.close()
        raise
