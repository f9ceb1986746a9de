"""A page at http://HOST:PORT/ that shows what the listener does just now, and takes "this wake was wrong"; on threads of its own.

    GET  /                 the page; /page.css, /live.js
    GET  /state            JSON: what `Status.report` has, engine, scores, the last events, power
    POST /wrong {"event"}  that wake was wrong, as `edgekws clips reject` says it; only on loopback

The browser is the way in for strangers, so each request is looked at: its Host must be an address or one of this machine's own names
(a site that makes its name point here is refused), it must come from this page, and what changes something must bring the page's token.
A client may take few seconds and few bytes, and all of them together some milliseconds of each second: the listener shares the process.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from edgekws import __version__
from edgekws.errors import ConfigError, EdgekwsError, StoreError
from edgekws.few_clients import REQUEST_S, FewClients
from edgekws.pipeline import Pipeline
from edgekws.power.gauge import Gauge
from edgekws.sinks import words
from edgekws.store import Store
from edgekws.values import Event

log = logging.getLogger(__name__)

BODY_BYTES = 200
PAUSE_S = 0.02  # before each answer, of all clients together: at most fifty a second
EVENTS = 60  # that are shown
FILES = {"/page.css": "text/css", "/live.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class LivePage:
    """Serves from its making to `close()`.

    Raises:
        ConfigError: that address cannot be listened on.
    """

    def __init__(self, host: str, port: int, report: Callable[[], Mapping[str, Any]], pipeline: Pipeline, store: Store) -> None:
        """
        Args:
            host: an address or name of this machine; beyond loopback nothing can be changed by the page.
            port: 0 takes any that is free; then `port` says which.
            report: `Status.report`.
            pipeline: what listens; only looked at.
            store: for this object alone.
        """
        self.token = secrets.token_urlsafe(16)
        self._report, self._pipeline, self._store = report, pipeline, store
        self._gauge: Gauge | None = None
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._wrong: set[int] = set()
        self._last = -1
        self._one, self._pace = threading.Lock(), threading.Lock()
        pages = Path(__file__).parent / "pages"
        self._files = {path: (pages / path[1:]).read_bytes() for path in FILES}
        self._page = (pages / "live.html").read_text()
        try:
            self._server = _Server(host, port, self)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            accepted = "Accepted is a free port of this machine; under systemd the unit must be let (systemd/network.conf)"
            raise ConfigError(f"[web] cannot listen on {host} port {port} ({reason}). {accepted}") from error
        self.port = int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self.local = self._server.local
        if not self.local:
            log.warning(
                "[web] %s is beyond loopback: everybody on that network can see, without a password, what woke and when. To look from"
                ' another machine it is safer to leave host = "127.0.0.1" and use ssh -L %d:127.0.0.1:%d',
                self.url,
                self.port,
                self.port,
            )
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody can ask any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._one:
            self._store.close()

    # What a request gets; called on its thread.

    def get(self, path: str) -> tuple[str, bytes]:
        """Content type and content. Raises KeyError: there is no such page."""
        if path == "/":
            text = self._page.replace("{{token}}", self.token if self.local else "").replace("{{version}}", html.escape(__version__))
            return "text/html", text.encode()
        if path == "/state":
            with self._one:
                return "application/json", json.dumps(self._state()).encode()
        return FILES[path], self._files[path]

    def wrong(self, event: int) -> dict[str, object]:
        """Raises StoreError where that is no wake."""
        with self._one:
            wake, clip = self._store.reject_wake(event)
        return {"rejected": {"event": wake.id, "keyword": wake.keyword, "clip": clip and clip.id}}

    def pause(self) -> None:
        """Until the next one may be answered."""
        with self._pace:
            time.sleep(PAUSE_S)

    def _state(self) -> dict[str, object]:
        trouble = None
        try:
            self._look()
        except StoreError as error:
            trouble = str(error)
        if self._gauge is None:  # looked for when somebody first asks
            self._gauge = Gauge()
        detector = self._pipeline.detector
        report = self._report()
        latest = dict(detector.latest) if report["listening"] else {}  # else they are of the last moment that it heard
        return {
            **report,
            "engine": self._pipeline.engine.name,
            "scores": [
                {
                    "keyword": one.keyword,
                    "speaker": one.speaker,
                    "threshold": one.threshold,
                    "score": _finite(latest.get((one.keyword, one.speaker))),
                }
                for one in detector.enrolled
            ],
            "margins": [[hop.number, _finite(hop.margin)] for hop in self._pipeline.snapshot()],
            "events": [
                {
                    "id": event.id,
                    "kind": event.kind,
                    "time_s": event.time_s,
                    "words": words(event),
                    "wrong": event.id in self._wrong,
                }
                for event in reversed(self._events)
            ],
            "trouble": trouble,
            "power": {"mw": self._gauge.mw(), "by": self._gauge.name, "why": self._gauge.why},
        }

    def _look(self) -> None:
        """Take up what is new in the store: whoever wrote it, this listener, a round or a person."""
        newest = self._store.last_event()
        if newest < self._last or self._last < 0:  # the first look, or a damaged database gave way to a new one
            self._events.clear()
            self._last = max(0, newest - 10 * EVENTS)
        while found := self._store.events(after=self._last):
            self._last = found[-1].id
            self._events += [one for one in found if one.kind != "reject"]
        # Anew at each look: a rejection that is taken back is gone.
        self._wrong = self._store.rejected(self._events[0].id) if self._events else set()


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return round(float(value), 3) if value is not None and abs(value) < 1e6 else None


class _Server(FewClients):
    def __init__(self, host: str, port: int, page: LivePage) -> None:
        self.page = page
        super().__init__(host, port, _Handler, name="web page")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_S

    def do_GET(self) -> None:
        if self._refused():
            return
        try:
            kind, body = self.server.page.get(self.path.partition("?")[0])
        except KeyError:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
            return
        self._answer(HTTPStatus.OK, f"{kind}; charset=utf-8", body)

    def do_POST(self) -> None:
        page = self.server.page
        if self._refused():
            return
        if self.path != "/wrong":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
            return
        token = self.headers.get("X-Edgekws-Token", "")
        origin = self.headers.get("Origin")
        same = origin is None or origin == f"http://{self.headers['Host']}"
        if not page.local or not same or not secrets.compare_digest(token.encode(), page.token.encode()):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"only the page itself may say that, on loopback\n")
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= BODY_BYTES:
                raise ValueError
            event = json.loads(self.rfile.read(length))["event"]
            if type(event) is not int or not 0 < event < 2**63:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b'accepted is {"event": the number of a wake}\n')
            return
        try:
            answer = page.wrong(event)
        except EdgekwsError as error:
            self._answer(HTTPStatus.CONFLICT, "text/plain", f"{error}\n".encode())
            return
        self._answer(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    def _refused(self) -> bool:
        """Whether the request is none of this page's own; it was told so. Here each one waits for its turn."""
        self.server.page.pause()
        if not self.server.known(self.headers.get_all("Host", [])):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"that is no name of this machine\n")
            return True
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"only the page itself may ask\n")
            return True
        return False

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._answer(code, "text/plain", b"not understood\n")

    def version_string(self) -> str:
        return "edgekws"

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants a line a second."""
