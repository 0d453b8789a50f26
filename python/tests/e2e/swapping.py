"""Connectors that do otherwise on request: the negative controls of the end-to-end tests, and a prefill server for routers of
both kinds. A request says so by its cache salt, which every router passes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pd_backend.vllm.connector import PdConnector, PdMetadata
from pd_backend.vllm.step import ReceivePlan

#: In the salt of a request whose chunks decode exchanges.
EXCHANGED = "exchanged"
#: How the salt begins of a request to which prefill answers that it pulls.
PULLED = "pull"
#: How the salt begins of a request of which a group is not sent from its place: the group's number follows.
BLANKED = "blanked "

_CHUNK_BLOCKS = 2
#: A block that vLLM gives to no request.
_NULL_BLOCK = 0

#: The scheduler and the only worker are in one process.
_exchanged: set[str] = set()
#: Requests, and which of their groups.
_blanked: dict[str, int] = {}


class SwappingConnector(PdConnector):
    """Decode: the first two chunks of some requests are exchanged, as far as the second one has blocks."""

    def on_new_request(self, request: Any) -> None:
        if EXCHANGED in (request.cache_salt or ""):
            _exchanged.add(request.request_id)
        super().on_new_request(request)

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.loads
        if step is not None:
            step.loads = [_swapped(plan) if plan.request_id in _exchanged else plan for plan in step.loads]
        super().bind_connector_metadata(connector_metadata)


class AnsweringConnector(PdConnector):
    """Prefill: what it tells the router of `transfer_mode` differs from request to request."""

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        deferred, answer = super().request_finished(request, block_ids)
        if answer and "transfer_mode" in answer and (request.cache_salt or "").startswith(PULLED):
            answer["transfer_mode"] = "pull"
        return deferred, answer


class MisplacingConnector(AnsweringConnector):
    """Prefill: in place of the first block of each request another one is sent."""

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.sends
        if step is not None:
            step.chunks = [
                replace(told, block_ids=[_NULL_BLOCK, *told.block_ids[1:]]) if told.chunk == 0 else told
                for told in step.chunks
            ]
        super().bind_connector_metadata(connector_metadata)


def _swapped(plan: ReceivePlan) -> ReceivePlan:
    blocks = plan.block_ids
    first, second, others = blocks[:_CHUNK_BLOCKS], blocks[_CHUNK_BLOCKS : 2 * _CHUNK_BLOCKS], blocks[2 * _CHUNK_BLOCKS :]
    count = len(second)
    return replace(plan, block_ids=[*second, *first[count:], *first[:count], *others])


class BlankingConnector(PdConnector):
    """Prefill: in place of the blocks of one group of some requests, whose salt names it, vLLM's null block is sent."""

    def on_new_request(self, request: Any) -> None:
        said = (request.cache_salt or "").partition(BLANKED)
        if said[1]:
            _blanked[request.request_id] = int(said[2])
        super().on_new_request(request)

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.sends
        if step is not None:
            step.chunks = [
                replace(told, block_ids=[_NULL_BLOCK] * len(told.block_ids))
                if told.group == _blanked.get(told.request_id) else told
                for told in step.chunks
            ]
        super().bind_connector_metadata(connector_metadata)
