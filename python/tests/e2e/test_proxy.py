"""The example proxy between servers that only pretend: no vLLM is started for these."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import harness
from conftest import TOP
from harness import HttpError, Process


class Backend:
    """A prefill and a decode server in one, and the pd-sender that notifies."""

    def __init__(self, notify_port: int) -> None:
        self._context = zmq.Context()
        self.sender = self._context.socket(zmq.PUSH)
        self.sender.setsockopt(zmq.LINGER, 0)
        self.sender.connect(f"tcp://127.0.0.1:{notify_port}")
        #: What they answer.
        self.prefill: Callable[[BaseHTTPRequestHandler], None] = lambda handler: _whole(handler, {})
        self.decode: Callable[[BaseHTTPRequestHandler], None] = lambda handler: _whole(handler, {"decoded": True})
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _whole(self, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.startswith("/decode"):
                    backend.decode(self)
                    return
                req_id = body["kv_transfer_params"]["disagg_spec"]["req_id"]
                backend.sender.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": req_id}))
                backend.prefill(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._context.destroy()


def _whole(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def backend_and_proxy(tmp_path: Path) -> Iterator[tuple[Backend, str]]:
    """What stands behind the proxy, and the proxy's URL."""
    notify_port, port = harness.free_ports(2)
    backend = Backend(notify_port)
    command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port)]
    command += ["--prefill", f"{backend.url}/prefill", "--decode", f"{backend.url}/decode,127.0.0.1,7300,7400"]
    command += ["--notify-port", str(notify_port), "--notify-timeout", "10", "--request-timeout", "3"]
    process = Process(command, tmp_path / "proxy.log", dict(os.environ))
    try:
        process.wait_healthy(f"http://127.0.0.1:{port}", 60)
        yield backend, f"http://127.0.0.1:{port}"
    finally:
        process.close()
        backend.close()


def ask(url: str, **more: Any) -> dict[str, Any]:
    return harness.post(url + "/v1/completions", harness.completion_body([1, 2, 3], 5, **more), 30)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": 7}),
        # A text that is no UTF-8.
        b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa2\xff\xfe",
        # Lists in lists.
        b"\x83\xa4type\xaaProxyNotif\xa1x" + b"\x91" * 50_000 + b"\x01\xa6req_id\xa1a",
    ],
    ids=["empty", "no-msgpack", "number", "no-utf-8", "deep"],
)
def test_garbage_at_the_notify_port_is_passed_over(backend_and_proxy: tuple[Backend, str], garbage: bytes) -> None:
    # Broken in production: one message that anybody can send ends the listener, and every later request is told that
    # its KV was not reported across.
    backend, url = backend_and_proxy
    backend.sender.send(garbage)
    assert ask(url) == {"decoded": True}


@pytest.mark.parametrize("slow", ["prefill", "decode"])
def test_a_server_that_is_too_slow_is_told_from_kv_that_was_not_sent(
    backend_and_proxy: tuple[Backend, str], slow: str
) -> None:
    # Broken in production: the operator looks for KV that was not sent, where a server was slow.
    backend, url = backend_and_proxy
    over = threading.Event()
    setattr(backend, slow, lambda _handler: over.wait(30) and None)
    try:
        with pytest.raises(HttpError) as refused:
            ask(url)
    finally:
        over.set()
    assert refused.value.status == 504 and "--request-timeout" in refused.value.text


def test_a_stream_that_breaks_off_does_not_end_well(backend_and_proxy: tuple[Backend, str]) -> None:
    # Broken in production: a client takes the half of an answer for the whole of it, or reads a second head inside it.
    backend, url = backend_and_proxy

    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"data: half\n\n")
        handler.close_connection = True

    backend.decode = half
    port = int(url.rsplit(":", 1)[1])
    body = json.dumps(harness.completion_body([1], 5, stream=True)).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
    assert b"data: half" in seen and seen.count(b"HTTP/1.1") == 1 and not seen.endswith(b"0\r\n\r\n")
