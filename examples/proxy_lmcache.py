"""LMCache's dialect for proxy.py: prefill is told where the KV goes, and says when it is there.

    proxy.py --dialect lmcache --port 8000 --prefill http://127.0.0.1:8100 \
             --decode http://127.0.0.1:8200,127.0.0.1,7300,7400 --notify-port 7500

A decode server is given as URL, host of its pd-receivers, their init ports, their alloc ports; with tensor parallelism
the ports are lists by rank, joined by +: 7300+7301. Prefill gets the address of a decode server's receivers. When prefill
has answered and the pd-senders of all its ranks have said that the KV is across (ProxyNotif), decode is asked. Where one of
them says that it does not come, decode is told why, and computes the prompt or fails, by its kv_load_failure_policy. With
`--overlap` both are asked at once, decode waits for the KV by itself, and nobody need notify; with `--notify-port` as well,
decode hears of a failure that its own receiver cannot know.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator, Callable
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


class Failure(msgspec.Struct):
    """Why a request's chunks do not come."""

    kind: str
    text: str


class Extension(msgspec.Struct):
    """What LMCache's ProxyNotif lacks."""

    failure: Failure


class ProxyNotif(msgspec.Struct, tag_field="type", tag="ProxyNotif"):
    """What a pd-sender says when a request's chunks are committed, or will not be: then with `pd`."""

    req_id: str
    pd: Extension | None = None


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

    def __init__(
        self,
        decode: list[str],
        listen: tuple[list[str], int] | None,
        notify_timeout_s: float,
        overlap: bool,
        not_sent: Callable[[str, dict[str, Any] | None], Exception],
    ) -> None:
        """`listen`: addresses and port for notifications. `overlap`: both servers are asked at once. `not_sent`: what to raise of a
        request whose KV does not come: why, and what decode is asked with."""
        self._receivers = dict(Receivers.parse(text) for text in decode)
        self._listen = listen
        self._notify_timeout_s = notify_timeout_s
        self._overlap = overlap
        self._not_sent = not_sent
        #: By request: how many ranks have not reported, and what they will have reported, a failure if there was one.
        self._waiting: dict[str, tuple[int, asyncio.Future[Failure | None]]] = {}

    def at_once(self, asked: Asked) -> dict[str, Any] | None:
        prompt = asked.body.get("prompt")
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise web.HTTPBadRequest(text=f"{len(prompt)} prompts in one request; LMCache's dialect has one name for one prompt")
        return self._spec(asked) if self._overlap else None

    def for_prefill(self, asked: Asked) -> dict[str, Any]:
        if self._listen is not None:
            ranks = len(self._receivers[asked.decode].init_ports)
            self._waiting[asked.req_id] = (ranks, asyncio.get_running_loop().create_future())
        return self._receivers[asked.decode].spec(asked.req_id)

    async def in_turn(self, asked: Asked, answered: dict[str, Any]) -> dict[str, Any]:
        if "not_sent" in answered:
            raise self._not_sent(f"prefill has not sent it: {answered['not_sent']}", None)
        if not answered:
            # Of what it sends it says how much of it was cached.
            raise self._not_sent("prefill sends nothing", None)
        if answered.get("error"):
            raise self._failed(asked, str(answered["error"]))
        spec = self._spec(asked)
        # Clients are billed by it, and decode does not know what prefill had computed before.
        if "remote_prefill_cached_tokens" in answered:
            spec["remote_prefill_cached_tokens"] = answered["remote_prefill_cached_tokens"]
        if self._listen is None:
            return spec
        try:
            failure = await asyncio.wait_for(self._waiting[asked.req_id][1], self._notify_timeout_s)
        except asyncio.TimeoutError:
            # It waits for room, or the notification was lost. Decode waits as well, and knows its receiver.
            logger.warning("%s was not reported across within %g s", asked.req_id, self._notify_timeout_s)
            return spec
        if failure is not None:
            raise self._failed(asked, f"{failure.kind}: {failure.text}")
        return spec | {"sent": True}

    def _failed(self, asked: Asked, why: str) -> Exception:
        """Decode is told why: it computes the prompt, or answers with that, as it is configured."""
        return self._not_sent(f"prefill has not sent it: {why}", self._spec(asked) | {"error": why})

    def given_up(self, asked: Asked, _answered: dict[str, Any] | None) -> dict[str, Any]:
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
        """What decode is asked with. By `do_remote_prefill` vLLM tells its connector of a request that it refuses, and takes prefill's
        count of cached tokens."""
        return {"do_remote_prefill": True, **self._receivers[asked.decode].spec(asked.req_id)}

    async def _notified(self, socket: zmq.asyncio.Socket) -> None:
        """Takes notifications in, for ever."""
        while True:
            frames = await socket.recv_multipart()
            try:
                notification = msgspec.msgpack.decode(frames[-1], type=ProxyNotif)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                # Besides its own errors msgspec lets those of a text that is no UTF-8, and of deep nesting, through.
                logger.warning("a notification that is none: %s", error)
                continue
            req_id, failure = notification.req_id, notification.pd and notification.pd.failure
            if req_id in self._waiting:
                ranks, reported = self._waiting[req_id]
                self._waiting[req_id] = (ranks - 1, reported)
                if (ranks == 1 or failure) and not reported.done():
                    reported.set_result(failure)
