"""LMCache's dialect for proxy.py: prefill is told where the KV goes, and says when it is there.

    proxy.py --dialect lmcache --port 8000 --prefill http://127.0.0.1:8100 \
             --decode http://127.0.0.1:8200,127.0.0.1,7300,7400 --notify-port 7500

A decode server is given as URL, host of its pd-receivers, their init ports, their alloc ports; with tensor parallelism
the ports are lists by rank, joined by +: 7300+7301. Prefill gets the address of a decode server's receivers. When prefill
has answered and the pd-senders of all its ranks have said that the KV is across (ProxyNotif), decode is asked. With
`--overlap` both are asked at once, decode waits for the KV by itself, and nobody need notify.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

logger = logging.getLogger("proxy")


class Asked(Protocol):
    """Of a client's request, what this dialect needs."""

    req_id: str
    body: dict[str, Any]
    decode: str


class ProxyNotif(msgspec.Struct, tag_field="type", tag="ProxyNotif"):
    """What a pd-sender says when a request's chunks are committed."""

    req_id: str


@dataclass(frozen=True)
class Receivers:
    """Those beside a decode server, by rank."""

    host: str
    init_ports: list[int]
    alloc_ports: list[int]

    @classmethod
    def parse(cls, text: str) -> tuple[str, Receivers]:
        """A decode server's URL, and its receivers, from the command line."""
        try:
            url, host, init, alloc = text.split(",")
            ports = [[int(port) for port in ports.split("+")] for ports in (init, alloc)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected URL,HOST,INIT_PORTS,ALLOC_PORTS") from None
        return url.rstrip("/"), cls(host, *ports)

    def spec(self, req_id: str) -> dict[str, Any]:
        """`kv_transfer_params` of a request that goes there."""
        spec = {"req_id": req_id, "receiver_host": self.host}
        return {"disagg_spec": {**spec, "receiver_init_port": self.init_ports, "receiver_alloc_port": self.alloc_ports}}


class Lmcache:
    """The dialect, and who waits for which request's notifications: one comes from the sender of every rank."""

    def __init__(self, decode: list[str], listen: tuple[list[str], int] | None, notify_timeout_s: float) -> None:
        """`listen`: addresses and port for notifications; without, both servers are asked at once."""
        self._receivers = dict(Receivers.parse(text) for text in decode)
        self._listen = listen
        self._notify_timeout_s = notify_timeout_s
        self._waiting: dict[str, tuple[int, asyncio.Future[None]]] = {}

    def at_once(self, asked: Asked) -> dict[str, Any] | None:
        prompt = asked.body.get("prompt")
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise web.HTTPBadRequest(text=f"{len(prompt)} prompts in one request; LMCache's dialect has one name for one prompt")
        return self._spec(asked) if self._listen is None else None

    def for_prefill(self, asked: Asked) -> dict[str, Any]:
        if self._listen is not None:
            ranks = len(self._receivers[asked.decode].init_ports)
            self._waiting[asked.req_id] = (ranks, asyncio.get_running_loop().create_future())
        return self._spec(asked)

    async def in_turn(self, asked: Asked, answered: dict[str, Any]) -> dict[str, Any] | None:
        if answered.get("error"):
            text = f"prefill could not send the KV of request {asked.req_id}: {answered['error']}"
            raise web.HTTPBadGateway(text=text)
        if "not_sent" in answered:
            return None
        if self._listen is not None:
            try:
                await asyncio.wait_for(self._waiting[asked.req_id][1], self._notify_timeout_s)
            except asyncio.TimeoutError:
                text = f"the KV of request {asked.req_id} was not reported across within {self._notify_timeout_s:g} s"
                raise web.HTTPGatewayTimeout(text=text) from None
        return self._spec(asked)

    def ended(self, asked: Asked) -> None:
        self._waiting.pop(asked.req_id, None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        if self._listen is None:
            yield
            return
        hosts, port = self._listen
        with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as socket:
            socket.setsockopt(zmq.MAXMSGSIZE, 64 * 1024)
            # ZeroMQ's :: has the addresses of IPv4 as well.
            for host in ["::"] if "::" in hosts else hosts:
                socket.setsockopt(zmq.IPV6, int(":" in host))
                socket.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            listening = asyncio.create_task(self._notified(socket))
            yield
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def _spec(self, asked: Asked) -> dict[str, Any]:
        return self._receivers[asked.decode].spec(asked.req_id)

    async def _notified(self, socket: zmq.asyncio.Socket) -> None:
        """Takes notifications in, for ever."""
        while True:
            frames = await socket.recv_multipart()
            try:
                req_id = msgspec.msgpack.decode(frames[-1], type=ProxyNotif).req_id
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                # Besides its own errors msgspec lets those of a text that is no UTF-8, and of deep nesting, through.
                logger.warning("a notification that is none: %s", error)
                continue
            if req_id in self._waiting:
                ranks, across = self._waiting[req_id]
                self._waiting[req_id] = (ranks - 1, across)
                if ranks == 1 and not across.done():
                    across.set_result(None)
