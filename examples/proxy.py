#!/usr/bin/env python3
"""A small router for prefill and decode servers that run PdConnector; it speaks NIXL's dialect.

    proxy.py --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

`--prefill` and `--decode` may be repeated; requests go round. A completion goes to a prefill server with `max_tokens: 1`,
which answers with `kv_transfer_params`: where the KV is. With these it goes to a decode server, whose answer is passed on
as it comes. If a prefill server's answers say `transfer_mode: push`, its later requests go to both servers at once, and
decode waits for the KV by itself: the first token comes sooner, and decode has the request while it is in prefill's queue.
What a server refuses is passed on. Every other path goes to a decode server as it is. A client that leaves takes its
requests to both servers along.

`--dialect lmcache` speaks what LMCache's routers speak: proxy_lmcache.py. For production, use a real router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

logger = logging.getLogger("proxy")

#: How long a connection that nobody uses is kept: for less than the five seconds after which vLLM closes it.
_KEPT_S = 3.0

#: `kv_transfer_params` of a request.
Params = dict[str, Any]

#: Headers that are true of one connection alone.
_OF_ONE_HOP = {"connection", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
#: Of a request, those that are not passed on either.
_OF_A_REQUEST = _OF_ONE_HOP | {"accept-encoding", "content-length", "expect", "host"}


@dataclass(frozen=True)
class Asked:
    """A client's request, and who is to answer it."""

    req_id: str
    path: str
    body: dict[str, Any]
    headers: CIMultiDict[str]
    prefill: str
    decode: str


class NotSent(Exception):
    """No KV of a request comes from prefill."""

    def __init__(self, why: str, params: Params | None) -> None:
        """`params`: what decode is asked with instead."""
        super().__init__(why)
        self.params = params


class Dialect(Protocol):
    """What the two servers are told of a request. Each of these raises `web.HTTPException` for one that cannot go on."""

    def at_once(self, asked: Asked) -> Params | None:
        """What decode is asked with while prefill computes; None if it is asked after prefill."""

    def for_prefill(self, asked: Asked) -> Params:
        """What prefill is asked with."""

    async def in_turn(self, asked: Asked, answered: Params) -> Params:
        """What decode is asked with after prefill has answered. Raises `NotSent`."""

    def given_up(self, asked: Asked, answered: Params | None) -> Params | None:
        """What decode is told of a request that it is not going to be asked for, or has refused; None if it keeps nothing of it."""

    def ended(self, asked: Asked) -> None:
        """Nobody waits for the request any more."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """For as long as the proxy serves."""


class Nixl:
    """Prefill answers where the KV is. A prefill server that says `push` may be asked together with decode."""

    #: What is true of one request alone. By `remote_num_tokens` decode knows that prefill has ended.
    _OF_ONE_REQUEST = {
        "remote_block_ids", "remote_blocks_expiry_time", "remote_num_tokens", "remote_prefill_cached_tokens", "remote_request_id",
    }

    def __init__(self) -> None:
        #: Of each prefill server that pushes, the rest of its last answer.
        self._pushing: dict[str, Params] = {}

    def at_once(self, asked: Asked) -> Params | None:
        known = self._pushing.get(asked.prefill)
        return None if known is None else {**known, "remote_request_id": asked.req_id}

    def for_prefill(self, asked: Asked) -> Params:
        nobody = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        return {"do_remote_decode": True, "do_remote_prefill": False, **nobody}

    async def in_turn(self, asked: Asked, answered: Params) -> Params:
        if answered.get("transfer_mode") == "push":
            self._pushing[asked.prefill] = {name: answered[name] for name in answered.keys() - self._OF_ONE_REQUEST}
        elif answered:
            self._pushing.pop(asked.prefill, None)
        if not answered:
            raise NotSent("prefill keeps nothing", None)
        return answered

    def given_up(self, asked: Asked, answered: Params | None) -> Params | None:
        # Of what has not been answered nobody knows where it is: it ends with its lease.
        return answered

    def ended(self, asked: Asked) -> None:
        pass

    def running(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()


class Refused(Exception):
    """An answer of prefill that ends the request, to be passed on."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Proxy:
    """The endpoints that are worth disaggregating, and all others."""

    def __init__(self, prefill: list[str], decode: list[str], dialect: Dialect) -> None:
        self._prefill, self._decode = cycle(prefill), cycle(decode)
        self._urls = [*prefill, *decode]
        self._dialect = dialect
        #: Of requests that were given up: decode is being told.
        self._telling: set[asyncio.Task[None]] = set()
        self.session: aiohttp.ClientSession

    async def disaggregated(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions` and `/v1/chat/completions`."""
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            return _error(400, f"the request is not JSON: {error}")
        # Where decode asks for KV is not a client's to say.
        body.pop("kv_transfer_params", None)
        headers = _passed(request.headers, _OF_A_REQUEST)
        # What a client calls its requests need be neither unique nor short.
        req_id = f"{headers.pop('X-Request-Id', 'proxy')[:128]}-{uuid.uuid4().hex}"
        headers["X-Request-Id"] = req_id
        asked = Asked(req_id, str(request.rel_url), body, headers, next(self._prefill), next(self._decode))
        try:
            return await _relayed(request, await self._answered(asked))
        except Refused as refused:
            logger.warning("%s: prefill answers %s", req_id, refused)
            return await _relayed(request, refused.answer)
        except web.HTTPException as refused:
            logger.warning("%s: %s", req_id, refused.text)
            return _error(refused.status, refused.text or refused.reason)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.warning("%s: %s", req_id, error or "not answered in time")
            return _unanswered(error)
        finally:
            self._dialect.ended(asked)

    async def passed_on(self, request: web.Request) -> web.StreamResponse:
        """Every other path, to a decode server."""
        url, body = next(self._decode) + str(request.rel_url), _without_params(await request.read())
        headers = _passed(request.headers, _OF_A_REQUEST)
        try:
            answer = await self.session.request(request.method, url, data=body or None, headers=headers, allow_redirects=False)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return _unanswered(error)
        return await _relayed(request, answer)

    async def health(self, _request: web.Request) -> web.Response:
        """200 when every server answers so."""
        for url in self._urls:
            try:
                async with self.session.get(url + "/health") as answer:
                    if answer.status != 200:
                        return _error(503, f"{url} answers {answer.status}")
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                return _error(503, f"{url}: {error or 'not answered in time'}")
        return web.Response()

    async def close(self) -> None:
        """Nobody is told anything any more."""
        for telling in self._telling:
            telling.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)

    async def _answered(self, asked: Asked) -> aiohttp.ClientResponse:
        """Decode's answer, as soon as it begins, which is its reader's to close."""
        if _is_decodes_alone(asked.body):
            return await self._decoded(asked, None)
        params = self._dialect.at_once(asked)
        if params is None:
            try:
                params = await self._prefilled(asked)
            except NotSent as not_sent:
                logger.warning("%s: %s", asked.req_id, not_sent)
                params = not_sent.params
            return await self._decoded(asked, params)
        prefilling = asyncio.create_task(self._prefilled(asked))
        decoding = asyncio.create_task(self._decoded(asked, params))
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if prefilling.done() or decoding.result().ok:
                # Of one that prefill fails, or sends nothing of, decode would wait for the KV. A stream begins before it has that.
                try:
                    await prefilling
                except NotSent as not_sent:
                    logger.warning("%s: %s", asked.req_id, not_sent)
                    if asked.body.get("stream") or not decoding.done():
                        _give_up(decoding)
                        decoding = asyncio.create_task(self._decoded(asked, not_sent.params))
            return await decoding
        except BaseException:
            _give_up(decoding)
            raise
        finally:
            prefilling.cancel()

    async def _prefilled(self, asked: Asked) -> Params:
        """What decode is to be asked with after prefill. Raises `NotSent`."""
        answered: Params | None = None
        try:
            answered = await self._asked_of_prefill(asked)
            return await self._dialect.in_turn(asked, answered)
        except (NotSent, Refused) as error:
            # What prefill refuses before it begins has left nothing anywhere.
            if isinstance(error, Refused) and error.answer.status >= 500:
                self._tell_given_up(asked, answered)
            raise
        except BaseException:  # Its client has left, or prefill has gone.
            self._tell_given_up(asked, answered)
            raise

    async def _asked_of_prefill(self, asked: Asked) -> Params:
        """`kv_transfer_params` of prefill's answer."""
        prefill = {**asked.body, "max_tokens": 1, "n": 1, "stream": False}
        for option in ("stream_options", "min_tokens"):
            prefill.pop(option, None)
        if "max_completion_tokens" in prefill:  # The newer name of max_tokens.
            prefill["max_completion_tokens"] = 1
        prefill["kv_transfer_params"] = self._dialect.for_prefill(asked)
        answer = await self._post(asked.prefill + asked.path, prefill, asked.headers)
        if answer.status != 200:
            raise Refused(answer)
        async with answer:
            answered = await answer.json()
        return answered.get("kv_transfer_params") or {}

    async def _decoded(self, asked: Asked, params: Params | None) -> aiohttp.ClientResponse:
        body = asked.body if params is None else {**asked.body, "kv_transfer_params": params}
        answer = await self._post(asked.decode + asked.path, body, asked.headers)
        if 400 <= answer.status < 500:
            # vLLM tells its connector of some of these alone.
            self._tell_given_up(asked, params)
        return answer

    def _tell_given_up(self, asked: Asked, answered: Params | None) -> None:
        """Decode keeps nothing for a request that nobody asks it for. Nobody waits for this."""
        params = self._dialect.given_up(asked, answered)
        if params is None:
            return
        telling = asyncio.create_task(self._told_given_up(asked, params))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _told_given_up(self, asked: Asked, params: Params) -> None:
        # vLLM refuses this, and tells its connector of the `kv_transfer_params` of what it refuses: that is its way to be told.
        body = {"model": "given up by its router", "prompt": [0], "max_tokens": 2**31 - 1, "kv_transfer_params": params}
        try:
            (await self._post(asked.decode + "/v1/completions", body, asked.headers)).close()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.warning("%s: decode cannot be told that it was given up: %s", asked.req_id, error)

    async def _post(self, url: str, body: Any, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        """An answer, as soon as it begins. What a server closes that it has kept it may have closed before it was asked: then it
        is asked again, by another connection. A completion that it computes twice after all is none the worse.
        """
        while True:
            attempt = Attempt()
            try:
                return await self.session.post(url, json=body, headers=headers, trace_request_ctx=attempt)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not attempt.by_kept:
                    raise


def _is_decodes_alone(body: dict[str, Any]) -> bool:
    """Whether decode computes the prompt in any case: it needs more of it than KV, or vLLM asks for its parts without parameters."""
    # In a chat vLLM takes the echo for one with log probabilities.
    shows_prompt = body.get("echo") and ("messages" in body or body.get("logprobs") is not None)
    return bool(shows_prompt or any(body.get(name) is not None for name in ("prompt_logprobs", "prompt_embeds")) or body.get("use_beam_search"))


@dataclass
class Attempt:
    """One connection's part in a question."""

    #: Whether the connection was there before.
    by_kept: bool = False


async def _reused(_session: aiohttp.ClientSession, context: Any, _params: Any) -> None:
    if isinstance(context.trace_request_ctx, Attempt):
        context.trace_request_ctx.by_kept = True


def _give_up(decoding: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Closes its connection, by which the server knows."""
    decoding.cancel()
    decoding.add_done_callback(lambda task: task.cancelled() or task.exception() or task.result().close())


def _without_params(content: bytes) -> bytes:
    """A request at a path that is not known here. Where decode asks for KV is not a client's to say there either."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(body, dict) or "kv_transfer_params" not in body:
        return content
    del body["kv_transfer_params"]
    return json.dumps(body).encode()


def _passed(headers: Mapping[str, str], without: set[str]) -> CIMultiDict[str]:
    """Those that are passed on."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in without)


async def _relayed(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """To the client, as it comes. Closes the answer."""
    response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers, _OF_ONE_HOP))
    try:
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        # The head is out: that the answer is not whole can only be told by not ending it.
        logger.warning("an answer broke off: %s", error or "not whole in time")
        if request.transport is not None:
            request.transport.close()
        return response
    finally:
        answer.close()
    await response.write_eof()
    return response


def _error(status: int, text: str) -> web.Response:
    """In the form that the servers give their errors."""
    return web.json_response({"error": {"message": text, "type": "proxy_error", "code": status}}, status=status)


def _unanswered(error: BaseException) -> web.Response:
    if isinstance(error, asyncio.TimeoutError):
        return _error(504, "a server has not answered within the time of --request-timeout")
    return _error(502, f"a server cannot be reached, or has gone: {error}")


def application(proxy: Proxy, dialect: Dialect, request_timeout_s: float) -> web.Application:
    """The proxy as an aiohttp application."""
    app = web.Application(client_max_size=256 * 1024 * 1024)
    app.router.add_post("/v1/completions", proxy.disaggregated)
    app.router.add_post("/v1/chat/completions", proxy.disaggregated)
    app.router.add_get("/health", proxy.health)
    app.router.add_route("*", "/{path:.*}", proxy.passed_on)

    async def running(_app: web.Application) -> AsyncIterator[None]:
        kept = aiohttp.TraceConfig()
        kept.on_connection_reuseconn.append(_reused)
        async with dialect.running(), aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=request_timeout_s, connect=10),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            trace_configs=[kept],
        ) as proxy.session:
            yield
            await proxy.close()

    app.cleanup_ctx.append(running)
    return app


def _this_machine() -> list[str]:
    """Its own addresses, that of IPv6 if it has one."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return ["127.0.0.1", "::1"]
    except OSError:
        return ["127.0.0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="append", help="127.0.0.1 and ::1; for every address 0.0.0.0 and ::, or one of them")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument("--decode", action="append", required=True, metavar="URL[,HOST,INIT_PORTS,ALLOC_PORTS]")
    parser.add_argument("--request-timeout", type=float, default=3600.0, help="seconds, of one request to one server")
    parser.add_argument("--dialect", choices=("nixl", "lmcache"), default="nixl")
    lmcache = parser.add_argument_group("LMCache's dialect, which is told the ports of the receivers beside each decode server")
    lmcache.add_argument("--notify-port", type=int, help="pd_proxy_port of the pd-senders; 7500, none with --overlap")
    lmcache.add_argument("--notify-timeout", type=float, default=30.0, help="seconds from prefill's answer")
    lmcache.add_argument("--overlap", action="store_true", help="ask decode together with prefill; nobody need notify")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    hosts = given.host or _this_machine()
    dialect: Dialect = Nixl()
    if given.dialect == "lmcache":
        from proxy_lmcache import Lmcache

        port = given.notify_port
        if port is None and not given.overlap:
            port = 7500
        listen = None if port is None else (hosts, port)
        dialect = Lmcache(given.decode, listen, given.notify_timeout, given.overlap, NotSent)
    elif any("," in decode for decode in given.decode):
        parser.error("--decode names ports of receivers, which are for --dialect lmcache alone")
    decode = [text.split(",")[0].rstrip("/") for text in given.decode]
    proxy = Proxy([url.rstrip("/") for url in given.prefill], decode, dialect)
    # A client that hangs up has its handler cancelled, which closes the connections to both servers.
    app = application(proxy, dialect, given.request_timeout)
    web.run_app(app, host=hosts, port=given.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
