"""A prefill connector that misplaces what it sends, on request: the negative control of the end-to-end tests."""

from __future__ import annotations

from dataclasses import replace

from pd_backend.vllm.connector import PdConnector, PdMetadata
from pd_backend.vllm.step import ProducerStep


class SwappingConnector(PdConnector):
    """Of requests that the router calls `swap-...`, the first two chunks are exchanged on their way; all others are not
    touched.
    """

    def bind_connector_metadata(self, connector_metadata: PdMetadata) -> None:
        step = connector_metadata.step
        if isinstance(step, ProducerStep):
            for plan in step.plans:
                if plan.spec.req_id.startswith("swap-"):
                    self._swap(step, plan.request_id)
        super().bind_connector_metadata(connector_metadata)

    @staticmethod
    def _swap(step: ProducerStep, request_id: str) -> None:
        first, second = (
            next(i for i, told in enumerate(step.chunks) if (told.request_id, told.chunk) == (request_id, chunk))
            for chunk in (0, 1)
        )
        one, other = step.chunks[first], step.chunks[second]
        step.chunks[first] = replace(one, block_ids=other.block_ids)
        step.chunks[second] = replace(other, block_ids=one.block_ids)
