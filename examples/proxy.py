#!/usr/bin/env python3
"""A small router for prefill and decode servers that run PdConnector; it speaks what LMCache's routers speak.

    proxy.py --port 8000 --prefill http://127.0.0.1:8100 \
             --decode http://127.0.0.1:8200,127.0.0.1,7300,7400 --notify-port 7500

A decode server is given as URL, host of its pd-receivers, their init ports, their alloc ports; with tensor parallelism
the ports are lists by rank, joined by +: 7300+7301. `--prefill` and `--decode` may be repeated; requests go round.

A request goes to a prefill server with `max_tokens: 1` and the address of a decode server's receivers. When prefill has
answered and the pd-senders of all its ranks have said that the KV is across (ProxyNotif), the same request goes to that
decode server, whose answer is passed on as it comes. What either of them refuses is passed on as well. With `--overlap`
both are asked at once, and decode waits for the KV by itself: the first token comes sooner, and decode keeps blocks for
the request while it is in prefill's queue. For production, use a real router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import cycle

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

logger = logging.getLogger("proxy")

#: Of the headers of a request, those that are passed on.
_HEADERS = ("Authorization", "X-Request-Id")


@dataclass(frozen=True)
class DecodeServer:
    """A decode server and the receivers beside it."""

    url: str
    host: str
    init_ports: list[int]
    alloc_ports: list[int]

    @classmethod
    def parse(cls, text: str) -> DecodeServer:
        """From the command line."""
        try:
            url, host, init, alloc = text.split(",")
            ports = [[int(port) for port in ports.split("+")] for ports in (init, alloc)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected URL,HOST,INIT_PORTS,ALLOC_PORTS") from None
        return cls(url.rstrip("/"), host, *ports)

    def spec(self, req_id: str) -> dict[str, object]:
        """`disagg_spec` of a request that it is to continue."""
        return {
            "req_id": req_id,
            "receiver_host": self.host,
            "receiver_init_port": self.init_ports,
            "receiver_alloc_port": self.alloc_ports,
        }


class ProxyNotif(msgspec.Struct, tag_field="type", tag="ProxyNotif"):
    """What a pd-sender says when a request's chunks are committed."""

    req_id: str


class Notifications:
    """Who waits for which request's notifications: one comes from the sender of every rank."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[int, asyncio.Future[None]]] = {}

    def expect(self, req_id: str, ranks: int) -> asyncio.Future[None]:
        """Done when so many have come."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[req_id] = (ranks, future)
        return future

    def forget(self, req_id: str) -> None:
        """Nobody waits any more."""
        self._waiting.pop(req_id, None)

    async def listen(self, socket: zmq.asyncio.Socket) -> None:
        """Takes them in, for ever."""
        while True:
            frames = await socket.recv_multipart()
            try:
                req_id = msgspec.msgpack.decode(frames[-1], type=ProxyNotif).req_id
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                # Besides its own errors msgspec lets those of a text that is no UTF-8, and of deep nesting, through.
                logger.warning("a notification that is none: %s", error)
                continue
            ranks, future = self._waiting.pop(req_id, (0, None))
            if future is None or future.done():
                continue
            if ranks > 1:
                self._waiting[req_id] = (ranks - 1, future)
            else:
                future.set_result(None)


class Refused(Exception):
    """A server's answer that ends the request, to be passed on."""

    def __init__(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        super().__init__(status)
        self.status, self.body, self.content_type = status, body, content_type

    @classmethod
    def because(cls, status: int, text: str) -> Refused:
        """In the form that the servers give their errors."""
        return cls(status, json.dumps({"error": {"message": text, "type": "proxy_error", "code": status}}).encode())


class Proxy:
    """The two endpoints of an OpenAI-compatible server that are worth disaggregating."""

    def __init__(
        self, prefill: list[str], decode: list[DecodeServer], notify_timeout_s: float, overlap: bool = False
    ) -> None:
        self._prefill = cycle(prefill)
        self._decode = cycle(decode)
        self._urls = [*prefill, *(server.url for server in decode)]
        self._notify_timeout_s = notify_timeout_s
        self._overlap = overlap
        self.notifications = Notifications()
        self.session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions` and `/v1/chat/completions`."""
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            return _response(Refused.because(400, f"the request is not JSON: {error}"))
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            return _response(Refused.because(400, f"{len(prompt)} prompts in one request; this proxy takes one"))
        headers = {name: request.headers[name] for name in _HEADERS if name in request.headers}
        server = next(self._decode)
        req_id = f"proxy-{uuid.uuid4().hex}"
        answers = self._overlapped if self._overlap else self._in_turn
        try:
            async with await answers(request.path, body, headers, server, req_id) as answer:
                return await _passed_on(request, bool(body.get("stream")), answer)
        except Refused as refused:
            logger.warning("%s: %s %s", req_id, refused.status, refused.body[:500])
            return _response(refused)
        except aiohttp.ClientError as error:
            logger.warning("%s: %s", req_id, error)
            return _response(Refused.because(502, f"a server cannot be reached, or has gone: {error}"))
        except asyncio.TimeoutError:
            logger.warning("%s: not answered in time", req_id)
            return _response(Refused.because(504, "a server has not answered within the time of --request-timeout"))

    async def _in_turn(
        self, path: str, body: dict[str, object], headers: dict[str, str], server: DecodeServer, req_id: str
    ) -> aiohttp.ClientResponse:
        """Decode's answer; it is asked when the KV is across."""
        notified = self.notifications.expect(req_id, len(server.init_ports))
        try:
            sent = await self._prefilled(path, body, headers, server, req_id)
            try:
                if sent:
                    await asyncio.wait_for(notified, self._notify_timeout_s)
            except asyncio.TimeoutError:
                text = f"the KV of request {req_id} was not reported across within {self._notify_timeout_s:g} s"
                raise Refused.because(504, text) from None
        finally:
            self.notifications.forget(req_id)
        return await self._decoding(path, body, headers, server, req_id if sent else None)

    async def _overlapped(
        self, path: str, body: dict[str, object], headers: dict[str, str], server: DecodeServer, req_id: str
    ) -> aiohttp.ClientResponse:
        """Decode's answer; it is asked together with prefill, given up where prefill fails, and asked again, for an answer
        that it computes alone, where prefill sends nothing.
        """
        prefilling = asyncio.create_task(self._prefilled(path, body, headers, server, req_id))
        decoding = asyncio.create_task(self._decoding(path, body, headers, server, req_id))
        try:
            waiting: set[asyncio.Task[object]] = {prefilling, decoding}
            while waiting:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                # The one that failed says why; the other is waited for no longer.
                for task in (prefilling, decoding):
                    if task.done():
                        task.result()
                if prefilling.done() and not prefilling.result() and not decoding.done():
                    decoding.cancel()
                    await asyncio.wait({decoding})
                    decoding = asyncio.create_task(self._decoding(path, body, headers, server, None))
                    await decoding
                    break
            return decoding.result()
        except BaseException:
            prefilling.cancel()
            decoding.cancel()
            for answer in await asyncio.gather(prefilling, decoding, return_exceptions=True):
                if isinstance(answer, aiohttp.ClientResponse):
                    answer.close()
            raise

    async def _prefilled(
        self, path: str, body: dict[str, object], headers: dict[str, str], server: DecodeServer, req_id: str
    ) -> bool:
        """Whether the KV is sent; decode computes what prefill cannot name."""
        params = {"disagg_spec": server.spec(req_id)}
        prefill = {**body, "max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": params}
        for option in ("stream_options", "min_tokens"):
            prefill.pop(option, None)
        if "max_completion_tokens" in body:  # The newer name of it.
            prefill["max_completion_tokens"] = 1
        assert self.session is not None
        async with self.session.post(next(self._prefill) + path, json=prefill, headers=headers) as answer:
            content = await answer.read()
            if answer.status != 200:
                raise Refused(answer.status, content, answer.content_type)
        answered = json.loads(content).get("kv_transfer_params") or {}
        if answered.get("error"):
            raise Refused.because(502, f"prefill could not send the KV of request {req_id}: {answered['error']}")
        return "not_sent" not in answered

    async def _decoding(
        self, path: str, body: dict[str, object], headers: dict[str, str], server: DecodeServer, req_id: str | None
    ) -> aiohttp.ClientResponse:
        """The answer, as soon as it begins, which is its reader's to close. Without a `req_id` it waits for no KV."""
        decode = body if req_id is None else {**body, "kv_transfer_params": {"disagg_spec": server.spec(req_id)}}
        assert self.session is not None
        answer = await self.session.post(server.url + path, json=decode, headers=headers)
        if answer.status != 200:
            async with answer:
                raise Refused(answer.status, await answer.read(), answer.content_type)
        return answer

    async def health(self, _request: web.Request) -> web.Response:
        """200 when every server answers so."""
        assert self.session is not None
        for url in self._urls:
            try:
                async with self.session.get(url + "/health") as answer:
                    if answer.status != 200:
                        return web.Response(status=503, text=f"{url} answers {answer.status}\n")
            except aiohttp.ClientError as error:
                return web.Response(status=503, text=f"{url}: {error}\n")
        return web.Response(text="")


async def _passed_on(request: web.Request, stream: bool, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """To the client, as it comes where that was asked for."""
    if not stream:
        return web.Response(body=await answer.read(), content_type=answer.content_type)
    response = web.StreamResponse(status=200, headers={"Content-Type": answer.headers["Content-Type"]})
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        # The head is out: that the answer is not whole can only be told by not ending it.
        logger.warning("an answer broke off: %s", error or "not whole in time")
        if request.transport is not None:
            request.transport.close()
        return response
    await response.write_eof()
    return response


def _response(refused: Refused) -> web.Response:
    return web.Response(status=refused.status, body=refused.body, content_type=refused.content_type)


def application(given: argparse.Namespace) -> web.Application:
    """The proxy as an aiohttp application, with its listener for notifications."""
    proxy = Proxy([url.rstrip("/") for url in given.prefill], given.decode, given.notify_timeout, given.overlap)
    app = web.Application(client_max_size=256 * 1024 * 1024)
    app.router.add_post("/v1/completions", proxy.handle)
    app.router.add_post("/v1/chat/completions", proxy.handle)
    app.router.add_get("/health", proxy.health)

    async def running(_app: web.Application) -> AsyncIterator[None]:
        context = zmq.asyncio.Context()
        listeners: list[asyncio.Task[None]] = []
        if not given.overlap:
            socket = context.socket(zmq.PULL)
            socket.setsockopt(zmq.MAXMSGSIZE, 64 * 1024)
            socket.bind(f"tcp://{given.host}:{given.notify_port}")
            listeners.append(asyncio.create_task(proxy.notifications.listen(socket)))
        timeout = aiohttp.ClientTimeout(total=given.request_timeout, connect=10)
        proxy.session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        yield
        for listener in listeners:
            listener.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)
        await proxy.session.close()
        context.destroy(linger=0)

    app.cleanup_ctx.append(running)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument(
        "--decode", action="append", required=True, type=DecodeServer.parse, metavar="URL,HOST,INIT_PORTS,ALLOC_PORTS"
    )
    parser.add_argument("--notify-port", type=int, default=7500, help="pd_proxy_port of the pd-senders")
    parser.add_argument("--notify-timeout", type=float, default=30.0, help="seconds from prefill's answer")
    parser.add_argument("--overlap", action="store_true", help="ask decode together with prefill; nobody need notify")
    parser.add_argument("--request-timeout", type=float, default=3600.0, help="seconds, of one request to one server")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    # A client that hangs up takes its requests to both servers along.
    web.run_app(application(given), host=given.host, port=given.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
