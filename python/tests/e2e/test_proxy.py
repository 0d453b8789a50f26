"""The example proxy between servers that only pretend: no vLLM is started for these."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import harness
from conftest import TOP
from harness import HttpError, Process, until

PREFILLED = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2]], "remote_engine_id": "one",
    "remote_request_id": "cmpl-one-0-01234567", "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1,
    "remote_num_tokens": 3, "remote_prefill_cached_tokens": 2, "transfer_mode": "pull", "pd": {"v": 1, "ports": [5600]},
}
#: Of these, what is true of a prefill server's every request.
IDENTITY = {
    name: PREFILLED[name]
    for name in ("do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_host", "remote_port", "tp_size", "pd")
}


#: What a prefill server answers that sends its KV.
SENDS = {"kv_transfer_params": {"remote_prefill_cached_tokens": 0}}


@dataclass
class Seen:
    """A request as a server got it."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    #: Set when the connection is closed before an answer.
    left: threading.Event

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.content)

    @property
    def params(self) -> dict[str, Any] | None:
        return self.body.get("kv_transfer_params")


class Handler(BaseHTTPRequestHandler):
    """Of one request, to one of the two servers."""

    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        backend: Backend = self.server.backend  # type: ignore[attr-defined]
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, server, path = self.path.split("/", 2)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Seen(server, self.command, f"/{path}", headers, content, threading.Event())
        if path == "health":
            return self.answer({})
        backend.seen.append(self.seen)
        (backend.prefill if server == "prefill" else backend.decode)(self)

    do_GET = do_POST = do_DELETE = do_HEAD = handle_request

    def answer(self, body: Any, status: int = 200) -> None:
        self.send_response(status)
        content = json.dumps(body).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def wait_until_left(self) -> None:
        """Answers nothing, until whoever asked has gone."""
        self.connection.settimeout(60)
        if self.connection.recv(1) == b"":
            self.seen.left.set()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def prefill_answers(handler: Handler) -> None:
    """What a prefill server answers that parks its KV."""
    handler.answer({"kv_transfer_params": PREFILLED})


def decode_answers(handler: Handler) -> None:
    """What a decode server answers."""
    handler.answer({"decoded": True})


class Backend:
    """A prefill and a decode server in one, and the pd-sender that notifies LMCache's routers."""

    def __init__(self, notify_port: int) -> None:
        self.notify_port = notify_port
        self._context = zmq.Context()
        self.sender = self._context.socket(zmq.PUSH)
        self.sender.setsockopt(zmq.LINGER, 0)
        self.sender.connect(f"tcp://127.0.0.1:{notify_port}")
        #: What they answer.
        self.prefill: Callable[[Handler], None] = prefill_answers
        self.decode: Callable[[Handler], None] = decode_answers
        self.seen: list[Seen] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.backend = self  # type: ignore[attr-defined]
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def at(self, server: str) -> list[Seen]:
        """What one of the two was asked, in order."""
        return [seen for seen in self.seen if seen.server == server]

    def notify(self, handler: Handler) -> None:
        """As a prefill server under LMCache's dialect, with its sender."""
        assert handler.seen.params is not None
        req_id = handler.seen.params["disagg_spec"]["req_id"]
        self.sender.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": req_id}))
        handler.answer(SENDS)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._context.destroy()


@pytest.fixture(scope="module")
def servers() -> Iterator[Backend]:
    backend = Backend(harness.free_ports(1)[0])
    yield backend
    backend.close()


@pytest.fixture
def backend(servers: Backend) -> Backend:
    """With the usual answers, and nothing seen yet."""
    servers.prefill, servers.decode, servers.seen = prefill_answers, decode_answers, []
    return servers


@pytest.fixture(scope="module")
def started(servers: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts a proxy before these servers, and returns its URL. In the end none has lost sight of anything."""
    processes: list[Process] = []
    with ExitStack() as stack:

        def start(decode: str = "", *options: str) -> str:
            (port,) = harness.free_ports(1)
            command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port), *options]
            command += ["--prefill", f"{servers.url}/prefill", "--decode", f"{servers.url}/decode{decode}"]
            process = Process(command, tmp_path_factory.mktemp("proxy") / "proxy.log", dict(os.environ))
            stack.callback(process.close)
            processes.append(process)
            process.wait_healthy(f"http://127.0.0.1:{port}", 60)
            return f"http://127.0.0.1:{port}"

        yield start
    for process in processes:
        assert not re.search("never retrieved|Unclosed|Traceback", process.log()), process.log()


@pytest.fixture(scope="module")
def nixl_proxy(started: Callable[..., str]) -> str:
    return started()


@pytest.fixture
def proxy(backend: Backend, nixl_proxy: str) -> str:
    """The URL of one that speaks NIXL's dialect, and asks prefill first."""
    ask(nixl_proxy)  # At once, if the last test has left it so: by the answer it knows better.
    backend.seen.clear()
    return nixl_proxy


@pytest.fixture(scope="module")
def notified_proxy(started: Callable[..., str], servers: Backend) -> str:
    ports = ["--notify-port", str(servers.notify_port), "--notify-timeout", "10"]
    return started(",127.0.0.1,7300,7400", "--dialect", "lmcache", "--request-timeout", "3", *ports)


@pytest.fixture
def lmcache_proxy(backend: Backend, notified_proxy: str) -> str:
    """The URL of one that speaks LMCache's dialect, and has little patience."""
    backend.prefill = backend.notify
    return notified_proxy


def ask(url: str, **more: Any) -> dict[str, Any]:
    return harness.post(url + "/v1/completions", harness.completion_body([1, 2, 3], 5, **more), 30)


def pushing(backend: Backend, proxy: str) -> None:
    """Lets the proxy know that prefill pushes."""
    backend.prefill = lambda handler: handler.answer({"kv_transfer_params": PREFILLED | {"transfer_mode": "push"}})
    ask(proxy)
    backend.seen.clear()


def is_there(url: str) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5).close()
    except OSError:
        return False
    return True


def left(proxy: str, under_way: Callable[[], bool], **more: Any) -> None:
    """A client that asks, and leaves."""
    harness.hang_up(proxy, harness.completion_body([1, 2, 3], 5, **more), under_way)


def test_prefill_first_and_decode_with_its_answer(backend: Backend, proxy: str) -> None:
    # Broken in production: a server that speaks NIXL's dialect is told something else, and nothing is transferred.
    assert ask(proxy, n=2, stream=False, min_tokens=3, stream_options={"include_usage": True}) == {"decoded": True}
    prefill, decode = backend.seen
    assert (prefill.server, decode.server) == ("prefill", "decode")
    assert prefill.params == {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }
    body = prefill.body
    assert (body["max_tokens"], body["n"], body["stream"]) == (1, 1, False)
    assert not {"min_tokens", "stream_options", "max_completion_tokens"} & body.keys()
    assert decode.params == PREFILLED
    assert (decode.body["max_tokens"], decode.body["n"], decode.body["min_tokens"]) == (5, 2, 3)
    # vLLM makes the request's name of it.
    assert prefill.headers["x-request-id"] == decode.headers["x-request-id"]


def test_the_newer_name_of_max_tokens(backend: Backend, proxy: str) -> None:
    # Broken in production: prefill computes the whole answer to a chat.
    body = {"model": "m", "messages": [], "max_completion_tokens": 7}
    harness.post(proxy + "/v1/chat/completions", body)
    prefill, decode = backend.seen
    assert prefill.path == decode.path == "/v1/chat/completions"
    assert (prefill.body["max_tokens"], prefill.body["max_completion_tokens"]) == (1, 1)
    assert (decode.body.get("max_tokens"), decode.body["max_completion_tokens"]) == (None, 7)


def test_a_list_of_prompts_is_one_request(backend: Backend, proxy: str) -> None:
    # Broken in production: clients that ask for several prompts at a time are refused.
    asked = [[1, 2, 3], [4, 5]]
    harness.post(proxy + "/v1/completions", harness.completion_body([], 5) | {"prompt": asked})
    assert [seen.body["prompt"] for seen in backend.seen] == [asked, asked]


def test_what_prefill_does_not_keep_is_computed_by_decode(backend: Backend, proxy: str) -> None:
    # Broken in production: decode asks for KV that nobody has.
    backend.prefill = lambda handler: handler.answer({"kv_transfer_params": None})
    assert ask(proxy) == {"decoded": True}
    assert "kv_transfer_params" not in backend.at("decode")[0].body


def test_a_client_does_not_say_where_the_kv_is(backend: Backend, proxy: str) -> None:
    # Broken in production: decode connects wherever a client says.
    backend.prefill = lambda handler: handler.answer({})
    ask(proxy, kv_transfer_params={"do_remote_prefill": True, "remote_host": "elsewhere", "remote_port": 1})
    assert backend.at("decode")[0].params is None


def test_both_at_once_where_prefill_pushes(backend: Backend, proxy: str) -> None:
    # Broken in production: the first token waits for decode's part of every request, as if nothing were pushed.
    pushing(backend, proxy)
    both = threading.Barrier(2, timeout=20)

    def prefill(handler: Handler) -> None:
        both.wait()
        handler.answer({"kv_transfer_params": PREFILLED | {"transfer_mode": "push"}})

    def decode(handler: Handler) -> None:
        both.wait()
        handler.answer({"decoded": True})

    backend.prefill, backend.decode = prefill, decode
    for _ in range(2):
        backend.seen.clear()
        assert ask(proxy) == {"decoded": True}
        (asked,) = backend.at("decode")
        # Prefill has not answered: neither its blocks nor its name of the request is known.
        name = backend.at("prefill")[0].headers["x-request-id"]
        assert asked.params == IDENTITY | {"transfer_mode": "push", "remote_request_id": name}
        assert asked.headers["x-request-id"] == name


def test_a_prefill_that_pushes_no_more_is_asked_first(backend: Backend, proxy: str) -> None:
    # Broken in production: after prefill was started again without pushing, decode waits for what is not sent.
    pushing(backend, proxy)
    backend.prefill = lambda handler: handler.answer({"kv_transfer_params": PREFILLED})
    ask(proxy)
    backend.seen.clear()
    ask(proxy)
    assert backend.at("decode")[0].params == PREFILLED


def test_of_what_is_not_kept_decode_is_asked_again(backend: Backend, proxy: str) -> None:
    # Broken in production: decode waits for KV that prefill has said it does not keep.
    pushing(backend, proxy)

    def prefill(handler: Handler) -> None:
        until(lambda: len(backend.at("decode")) == 1, "decode was not asked")
        handler.answer({})

    def decode(handler: Handler) -> None:
        if handler.seen.params is None:
            handler.answer({"decoded": True})
        else:
            handler.wait_until_left()

    backend.prefill, backend.decode = prefill, decode
    assert ask(proxy) == {"decoded": True}
    first, _ = backend.at("decode")
    assert first.left.wait(20)


def test_a_stream_of_what_is_not_kept_is_asked_again(backend: Backend, proxy: str) -> None:
    # Broken in production: a stream begins at once, and waits ten seconds for KV that prefill has said it does not keep.
    pushing(backend, proxy)

    def prefill(handler: Handler) -> None:
        until(lambda: len(backend.at("decode")) == 1, "decode was not asked")
        handler.answer({})

    def decode(handler: Handler) -> None:
        if handler.seen.params is None:
            handler.answer({"decoded": True})
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wait_until_left()

    backend.prefill, backend.decode = prefill, decode
    assert ask(proxy, stream=True) == {"decoded": True}
    first, second = backend.at("decode")
    assert first.left.wait(20) and second.body["stream"]


@pytest.mark.parametrize("push", [False, True], ids=["in turn", "at once"])
def test_what_prefill_refuses_is_passed_on(backend: Backend, proxy: str, push: bool) -> None:
    # Broken in production: a client's mistake is answered with 200, or decode waits for what never comes.
    if push:
        pushing(backend, proxy)

    def refuse(handler: Handler) -> None:
        if push:
            until(lambda: bool(backend.at("decode")), "decode was not asked")
        handler.answer({"error": "no such model"}, 404)

    backend.prefill, backend.decode = refuse, Handler.wait_until_left
    with pytest.raises(HttpError) as refused:
        ask(proxy)
    assert (refused.value.status, json.loads(refused.value.text)) == (404, {"error": "no such model"})
    assert [seen.left.wait(20) for seen in backend.at("decode")] == [True] * push


@pytest.mark.parametrize("push", [False, True], ids=["in turn", "at once"])
def test_what_decode_refuses_is_passed_on(backend: Backend, proxy: str, push: bool) -> None:
    # Broken in production: as above; and prefill goes on with a request that has been answered.
    if push:
        pushing(backend, proxy)
        backend.prefill = Handler.wait_until_left
    backend.decode = lambda handler: handler.answer({"error": "too long"}, 400)
    with pytest.raises(HttpError) as refused:
        ask(proxy)
    assert (refused.value.status, json.loads(refused.value.text)) == (400, {"error": "too long"})
    assert not push or backend.at("prefill")[0].left.wait(20)


def test_what_both_refuse_is_answered_once(backend: Backend, proxy: str) -> None:
    # Broken in production: a mistake of a client that both servers find leaves an error in the proxy's log each time.
    pushing(backend, proxy)
    both = threading.Barrier(2, timeout=20)

    def refuse(handler: Handler) -> None:
        both.wait()
        handler.answer({"error": "too long"}, 400)

    backend.prefill = backend.decode = refuse
    for _ in range(20):
        with pytest.raises(HttpError) as refused:
            ask(proxy)
        assert refused.value.status == 400


def test_a_client_that_leaves_during_prefill(backend: Backend, proxy: str) -> None:
    # Broken in production: prefill computes, and decode is asked, for clients that have gone.
    backend.prefill = Handler.wait_until_left
    left(proxy, lambda: bool(backend.seen))
    assert backend.at("prefill")[0].left.wait(20)
    assert backend.at("decode") == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_during_decode(backend: Backend, proxy: str, stream: bool) -> None:
    # Broken in production: decode generates for clients that have gone.
    def decode(handler: Handler) -> None:
        if stream:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"d\r\ndata: first\n\n\r\n")
        handler.wait_until_left()

    backend.decode = decode
    left(proxy, lambda: bool(backend.at("decode")), stream=stream)
    assert backend.at("decode")[0].left.wait(20)


def test_a_client_that_leaves_both_at_once(backend: Backend, proxy: str) -> None:
    # Broken in production: one of the two servers goes on for a client that has gone.
    pushing(backend, proxy)
    backend.prefill = backend.decode = Handler.wait_until_left
    left(proxy, lambda: len(backend.seen) == 2)
    assert [seen.left.wait(20) for seen in backend.seen] == [True, True]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/v1/embeddings"), ("DELETE", "/a/b?c=d%20e&f"), ("HEAD", "/ping")],
)
def test_other_paths_are_passed_on(backend: Backend, proxy: str, method: str, path: str) -> None:
    # Broken in production: clients that ask what models there are, or count tokens, find nothing behind the proxy.
    backend.decode = lambda handler: handler.answer({"is": handler.seen.path}, 418)
    content = b'{"any": "thing"}' if method == "POST" else b""
    connection = http.client.HTTPConnection(proxy.removeprefix("http://"))
    connection.request(method, path, content or None, {"Authorization": "Bearer key", "X-Other": "header"})
    answer = connection.getresponse()
    seen_text = answer.read()
    assert answer.status == 418 and answer.getheader("Content-Type") == "application/json"
    assert seen_text == (b"" if method == "HEAD" else json.dumps({"is": path}).encode())
    (seen,) = backend.seen
    assert (seen.server, seen.method, seen.path, seen.content) == ("decode", method, path, content)
    assert (seen.headers["authorization"], seen.headers["x-other"]) == ("Bearer key", "header")


@pytest.mark.parametrize("path", ["/v1/responses", "//v1/completions", "/v1/completions/", "/pooling"])
def test_a_client_does_not_say_where_the_kv_is_at_other_paths(backend: Backend, proxy: str, path: str) -> None:
    # Broken in production: any client has the decode server connect wherever it says, by a path that the proxy does not know.
    connection = http.client.HTTPConnection(proxy.removeprefix("http://"))
    body = {"input": "a", "kv_transfer_params": PREFILLED, "other": {"kv_transfer_params": 1}}
    connection.request("POST", path, json.dumps(body).encode("utf-16" if path == "/pooling" else "utf-8"))
    assert connection.getresponse().status == 200
    (seen,) = backend.seen
    assert seen.path.lstrip("/") == path.lstrip("/")
    assert seen.body == {"input": "a", "other": {"kv_transfer_params": 1}}


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    # Broken in production: a client whose server has gone gets no answer, and health says that all is well.
    nobody, port = harness.free_ports(2)
    command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port)]
    command += ["--prefill", f"http://127.0.0.1:{nobody}", "--decode", f"http://127.0.0.1:{nobody}"]
    process = Process(command, tmp_path / "proxy.log", dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_there(url), "the proxy does not listen")
        for path in ("/v1/completions", "/tokenize"):
            with pytest.raises(HttpError) as refused:
                harness.post(url + path, harness.completion_body([1], 5))
            assert refused.value.status == 502 and "cannot be reached" in refused.value.text
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
    finally:
        process.close()


def test_ipv6(proxy: str) -> None:
    # Broken in production: a client that has resolved localhost to ::1 finds nobody.
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert ask(proxy.replace("127.0.0.1", "[::1]")) == ask(proxy) == {"decoded": True}


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_what_is_no_request(backend: Backend, proxy: str, content: bytes) -> None:
    # Broken in production: what a client sends ends the proxy's handler, and it is told nothing of what was wrong.
    connection = http.client.HTTPConnection(proxy.removeprefix("http://"))
    connection.request("POST", "/v1/completions", content)
    answer = connection.getresponse()
    assert answer.status == 400 and b"the request is not JSON" in answer.read()
    assert backend.seen == []


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
def test_garbage_at_the_notify_port_is_passed_over(backend: Backend, lmcache_proxy: str, garbage: bytes) -> None:
    # Broken in production: one message that anybody can send ends the listener, and every later request is told that
    # its KV was not reported across.
    backend.sender.send(garbage)
    assert ask(lmcache_proxy) == {"decoded": True}


SPEC = {"receiver_host": "127.0.0.1", "receiver_init_port": [7300], "receiver_alloc_port": [7400]}


def asked_of_decode(backend: Backend) -> dict[str, Any]:
    """The only parameters that decode was asked with, without what is the same in all of them."""
    (asked,) = backend.at("decode")
    params = dict(asked.params or {})
    spec = params.pop("disagg_spec")
    assert spec == SPEC | {"req_id": asked.headers["x-request-id"]} and params.pop("do_remote_prefill") is True
    return params


@pytest.fixture(scope="module")
def overlapping_proxy(started: Callable[..., str]) -> str:
    """The URL of one that asks both servers at once."""
    return started(",127.0.0.1,7300,7400", "--dialect", "lmcache", "--overlap")


def test_decode_is_told_that_the_kv_was_reported_across(backend: Backend, lmcache_proxy: str) -> None:
    # Broken in production: a receiver that has lost a request since is waited for in vain; clients are billed for cached tokens
    # that were computed.
    def prefill(handler: Handler) -> None:
        assert handler.seen.params is not None and "do_remote_prefill" not in handler.seen.params
        backend.sender.send(notification(handler))
        handler.answer({"kv_transfer_params": {"remote_prefill_cached_tokens": 2}})

    backend.prefill = prefill
    assert ask(lmcache_proxy) == {"decoded": True}
    assert asked_of_decode(backend) == {"sent": True, "remote_prefill_cached_tokens": 2}


def notification(handler: Handler, **more: Any) -> bytes:
    """What the pd-sender says of a request."""
    req_id = handler.seen.params["disagg_spec"]["req_id"]  # type: ignore[index]
    return msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": req_id, **more})


@pytest.mark.parametrize("known", ["before the answer", "after it"])
def test_decode_is_told_why_prefill_has_not_sent(backend: Backend, lmcache_proxy: str, known: str) -> None:
    # Broken in production: a request that cannot be sent is answered 502 at once, or 504 after half a minute, though decode could
    # compute it.
    def prefill(handler: Handler) -> None:
        failure = {"kind": "too_large", "text": "5 chunks"}
        if known == "before the answer":
            return handler.answer({"kv_transfer_params": {"error": "too_large: 5 chunks", "remote_prefill_cached_tokens": 2}})
        handler.answer({"kv_transfer_params": {"remote_prefill_cached_tokens": 2}})
        backend.sender.send(notification(handler, pd={"failure": failure}))

    backend.prefill = prefill
    assert ask(lmcache_proxy) == {"decoded": True}
    assert asked_of_decode(backend) == {"error": "too_large: 5 chunks"}


def test_of_what_is_not_sent_decode_is_asked_again_with_the_reason(backend: Backend, overlapping_proxy: str) -> None:
    # Broken in production: as above, where decode was asked together with prefill.
    def prefill(handler: Handler) -> None:
        until(lambda: len(backend.at("decode")) == 1, "decode was not asked")
        handler.answer({"kv_transfer_params": {"error": "too_large: 5 chunks"}})

    def decode(handler: Handler) -> None:
        if handler.seen.params and "error" in handler.seen.params:
            handler.answer({"decoded": True})
        else:
            handler.wait_until_left()

    backend.prefill, backend.decode = prefill, decode
    assert ask(overlapping_proxy) == {"decoded": True}
    first, second = backend.at("decode")
    assert first.left.wait(20) and second.params is not None and second.params["error"] == "too_large: 5 chunks"


def test_what_is_not_reported_is_left_to_decode(backend: Backend, started: Callable[..., str]) -> None:
    # Broken in production: a request whose sender waits for room, or whose notification was lost, is answered with 504.
    port = str(harness.free_ports(1)[0])
    proxy = started(",127.0.0.1,7300,7400", "--dialect", "lmcache", "--notify-port", port, "--notify-timeout", "0.1")
    backend.prefill = lambda handler: handler.answer(SENDS)
    assert ask(proxy) == {"decoded": True}
    assert asked_of_decode(backend) == {"remote_prefill_cached_tokens": 0}


def test_decode_alone_is_asked_for_what_it_computes_anyway(backend: Backend, proxy: str, lmcache_proxy: str) -> None:
    # Broken in production: prefill computes such prompts for nobody, and what it sends of them holds slots.
    for url in (proxy, lmcache_proxy):
        for more in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0}, {"echo": True, "messages": []}, {"use_beam_search": True, "n": 2}, {"prompt_embeds": "x"}):
            backend.seen.clear()
            assert ask(url, **more) == {"decoded": True}
            assert [(seen.server, seen.params) for seen in backend.seen] == [("decode", None)], more


def test_prefill_that_sends_nothing_is_not_waited_for(backend: Backend, lmcache_proxy: str) -> None:
    # Broken in production: a request that prefill does not send, as the parts of a beam search, waits for a notification in vain.
    backend.prefill = lambda handler: handler.answer({"kv_transfer_params": None})
    assert ask(lmcache_proxy) == {"decoded": True}
    (asked,) = backend.at("decode")
    assert asked.params is None


def told(seen: Seen) -> bool:
    """Whether this request is refused by vLLM, and tells its connector that it is given up."""
    refused = seen.path == "/v1/completions" and seen.body["model"] != harness.MODEL_NAME
    return refused and seen.params is not None and seen.params["do_remote_prefill"] is True


@pytest.mark.parametrize("how", ["prefill fails", "the client leaves", "decode refuses"])
def test_decode_is_told_of_what_it_is_not_asked_for(backend: Backend, lmcache_proxy: str, how: str) -> None:
    # Broken in production: KV that has been sent for a request that was given up holds slots at decode for pd_retention_sec.
    def fail(handler: Handler) -> None:
        handler.answer({"error": "out of order"}, 500)

    def not_reported(handler: Handler) -> None:
        handler.answer(SENDS)

    backend.prefill = {"prefill fails": fail, "the client leaves": not_reported}.get(how, backend.notify)
    backend.decode = lambda handler: handler.answer({"error": "refused"}, 400)
    if how == "the client leaves":
        left(lmcache_proxy, lambda: bool(backend.at("prefill")))
    else:
        with pytest.raises(HttpError):
            ask(lmcache_proxy)
    until(lambda: any(told(seen) for seen in backend.at("decode")), "decode was not told")
    (given_up,) = [seen for seen in backend.at("decode") if told(seen)]
    name = backend.at("prefill")[0].headers["x-request-id"]
    assert given_up.params is not None and given_up.params["disagg_spec"] == SPEC | {"req_id": name}


def test_decode_is_told_of_parked_kv_that_it_refuses(backend: Backend, proxy: str) -> None:
    # Broken in production: what decode refuses before its engine hears of it stays parked at prefill until its lease ends.
    backend.decode = lambda handler: handler.answer({"error": "refused"}, 422)
    with pytest.raises(HttpError):
        ask(proxy)
    until(lambda: any(told(seen) for seen in backend.at("decode")), "decode was not told")
    (given_up,) = [seen for seen in backend.at("decode") if told(seen)]
    assert given_up.params == PREFILLED


@pytest.mark.parametrize("server", ["prefill", "decode"])
def test_a_kept_connection_that_the_server_has_closed(backend: Backend, proxy: str, server: str) -> None:
    # Broken in production: of requests some seconds apart one in sixty is answered with 502, for the server has just closed the
    # connection that was kept.
    ask(proxy)
    backend.seen.clear()
    usual = {"prefill": backend.prefill, "decode": backend.decode}[server]

    def closes(handler: Handler) -> None:
        if len(backend.at(server)) == 1:
            handler.close_connection = True  # And nothing is answered.
        else:
            usual(handler)

    setattr(backend, server, closes)
    assert ask(proxy) == {"decoded": True}
    assert len(backend.at(server)) == 2


def test_a_server_that_ends_a_new_connection_is_not_asked_again(backend: Backend, started: Callable[..., str]) -> None:
    # Broken in production: a server that a request brings down is given the same request for ever.
    proxy = started()
    backend.decode = lambda handler: setattr(handler, "close_connection", True)
    with pytest.raises(HttpError) as refused:
        ask(proxy)
    # Its answer to /health was kept.
    assert refused.value.status == 502 and len(backend.at("decode")) <= 2


def test_ports_of_receivers_are_of_lmcaches_dialect(tmp_path: Path) -> None:
    # Broken in production: somebody who gives them believes that KV goes there.
    command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--prefill", "http://127.0.0.1:1"]
    process = Process([*command, "--decode", "http://127.0.0.1:2,127.0.0.1,3,4"], tmp_path / "log", dict(os.environ))
    try:
        until(lambda: not process.running(), "it runs")
        assert "--dialect lmcache" in process.log()
    finally:
        process.close()


@pytest.mark.parametrize("slow", ["prefill", "decode"])
def test_a_server_that_is_too_slow_is_told_from_kv_that_was_not_sent(
    backend: Backend, lmcache_proxy: str, slow: str
) -> None:
    # Broken in production: the operator looks for KV that was not sent, where a server was slow.
    setattr(backend, slow, Handler.wait_until_left)
    with pytest.raises(HttpError) as refused:
        ask(lmcache_proxy)
    assert refused.value.status == 504 and "--request-timeout" in refused.value.text


def test_a_stream_that_breaks_off_does_not_end_well(backend: Backend, proxy: str) -> None:
    # Broken in production: a client takes the half of an answer for the whole of it, or reads a second head inside it.
    def half(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"c\r\ndata: half\n\n\r\n")
        handler.close_connection = True

    backend.decode = half
    port = int(proxy.rsplit(":", 1)[1])
    body = json.dumps(harness.completion_body([1], 5, stream=True)).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
    assert b"data: half" in seen and seen.count(b"HTTP/1.1") == 1 and not seen.endswith(b"0\r\n\r\n")
