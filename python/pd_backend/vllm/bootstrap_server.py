"""Answers `GET /query` at a prefill server: who it is, and where it is asked for what it has parked.

Each data-parallel rank has such a port of its own, next to that of the rank before. The first rank's is the one that routers
are told, and answers for all of its host: it asks the others.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .bootstrap import EngineAt, query_answer
from .bootstrap_query import ask

logger = logging.getLogger("vllm.pd_backend")

#: Connections at a time; the oldest is closed to make room.
_CONNECTIONS_MAX = 32
#: How long one may last, and how long it may say nothing.
_CONNECTION_S = 5.0
_SILENCE_S = 2.0
#: What vLLM appends to the name of a data-parallel rank's engine, before the rank.
_DP = "_dp"
_RANKS_MAX = 256
#: How long another rank may take to answer.
_OTHERS_S = 1.0


class BootstrapServer:
    """Listens from the moment it is made until it is closed."""

    def __init__(self, host: str, port: int, index: int, engine: Callable[[], EngineAt | None]) -> None:
        """`index`: the data-parallel rank; `engine`: None while it is not known where it is asked. Raises `OSError`."""
        self._host = host.strip("[]").replace("*", "")
        self._index = index
        self._engine = engine
        self._all_listen = False
        self._server = _Server(self._host, port and port + index, self.engines)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.5}, name="pd bootstrap", daemon=True
        )
        self._thread.start()

    def engine_runs(self) -> None:
        """The engine takes requests. vLLM lets it do so once the engines of all ranks have started, which listen since."""
        self._all_listen = True

    def engines(self) -> dict[int, EngineAt] | None:
        """What is answered, by data-parallel rank; None while it is not known of all."""
        engine = self._engine()
        if engine is None:
            return None
        engines, first = {self._index: engine}, f"{_DP}0"
        if self._index or not engine.engine.endswith(first):
            return engines
        if not self._all_listen:
            return None  # Who does not listen yet cannot be told from who is not there.
        name = engine.engine.removesuffix(first)
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        for index in range(1, _RANKS_MAX):
            try:
                other = ask((host, self.port + index), _OTHERS_S).get(index)
            except ConnectionRefusedError:
                break  # There are no more.
            except (OSError, ValueError) as error:
                logger.debug("data-parallel rank %d does not say where it is asked: %s", index, error)
                return None
            if other is None or other.engine != f"{name}{_DP}{index}":
                break  # The next port is another server's.
            engines[index] = other
        return engines

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def close(self) -> None:
        """Nobody is answered any more, and the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENCE_S
    server_version, sys_version = "pd-backend", ""
    server: _Server

    def do_GET(self) -> None:
        if self.path.split("?", 1)[0] != "/query":
            return self._answer(404, {"error": "ask for /query"})
        engines = self.server.engines()
        # Routers take an answer for all there is, and do not ask again.
        if not engines:
            return self._answer(503, {"error": "it is not known yet where parked chunks are asked for; try again"})
        self._answer(200, query_answer(engines))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Whoever asks could fill the log."""


class _Server(ThreadingHTTPServer):
    """A thread for each connection, of which there are not many, and none for long."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, engines: Callable[[], dict[int, EngineAt] | None]) -> None:
        self.engines = engines
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        #: The oldest first, with when they came.
        self._open: dict[Any, float] = {}
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Without the look-up of the host's own name, which may take long and is used for nothing here.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._open) >= _CONNECTIONS_MAX:
                self._cut(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """From time to time: who is slow is not waited for."""
        with self._lock:
            since = time.monotonic() - _CONNECTION_S
            for request in [request for request, came in self._open.items() if came < since]:
                self._cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection to the bootstrap port ended early", exc_info=True)

    def _cut(self, request: Any) -> None:
        """Its thread reads the end of it, and closes it."""
        del self._open[request]
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # It has ended by itself.
