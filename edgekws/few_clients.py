"""An HTTP server for a few clients at a time, none of which may stay: the listener shares its process, and the unit's bound of threads."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edgekws.sinks import Complaints

CLIENTS = 8
REQUEST_S = 5.0  # from connection to answer


class FewClients(ThreadingHTTPServer):
    """A thread for each client; who finds no room, or takes too long, is let go.

    Raises:
        OSError, OverflowError: no such host, or the port is taken or out of range.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = CLIENTS

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler], *, name: str) -> None:
        """`name` is what complaints say it is."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self.local = all(ipaddress.ip_address(one[4][0]).is_loopback for one in found)
        own = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), own, f"{own}.local"}  # another name in .local is whose machine says so
        self.name = name
        self._complaints = Complaints()
        self._due_s: dict[Any, float] = {}
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look for the name of the address, which may take as long as a name server likes."""
        socketserver.TCPServer.server_bind(self)

    def known(self, hosts: list[str]) -> bool:
        """Whether a request's Host headers are one that names this machine: an address cannot be somebody else's name for it."""
        if len(hosts) != 1:
            return False
        name, _, port = hosts[0].rpartition(":")
        name = name if port.isdigit() else hosts[0]
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return name.lower() in self._names

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._due_s) >= CLIENTS:
            super().shutdown_request(request)
            return
        self._due_s[request] = time.monotonic() + REQUEST_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._due_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: who has had their time is let go, wherever their thread waits."""
        for request, due_s in list(self._due_s.items()):
            if time.monotonic() > due_s:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; what else went wrong is."""
        if not isinstance(error := sys.exc_info()[1], OSError):
            self._complaints.say(f"a request of the {self.name} failed ({type(error).__name__}: {error})", kind="request")
