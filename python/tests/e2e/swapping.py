"""Connectors that misplace KV, on request: the negative controls of the end-to-end tests."""

from __future__ import annotations

from dataclasses import replace

from pd_backend.vllm.connector import PdConnector, PdMetadata
from pd_backend.vllm.step import ReceivePlan

_CHUNK_BLOCKS = 2
#: A block that vLLM gives to no request.
_NULL_BLOCK = 0


class SwappingConnector(PdConnector):
    """Decode: of requests with `swap-` in their names, the first two chunks are exchanged, as far as the second one
    has blocks. All others are not touched.
    """

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.loads
        if step is not None:
            step.loads = [
                _exchanged(plan) if "swap-" in (plan.req_id or "") else plan for plan in step.loads
            ]
        super().bind_connector_metadata(connector_metadata)


class MisplacingConnector(PdConnector):
    """Prefill: in place of the first block of each request another one is sent."""

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.sends
        if step is not None:
            step.chunks = [
                replace(told, block_ids=[_NULL_BLOCK, *told.block_ids[1:]]) if told.chunk == 0 else told
                for told in step.chunks
            ]
        super().bind_connector_metadata(connector_metadata)


def _exchanged(plan: ReceivePlan) -> ReceivePlan:
    blocks = plan.block_ids
    first, second, others = blocks[:_CHUNK_BLOCKS], blocks[_CHUNK_BLOCKS : 2 * _CHUNK_BLOCKS], blocks[2 * _CHUNK_BLOCKS :]
    count = len(second)
    return replace(plan, block_ids=[*second, *first[count:], *first[:count], *others])
