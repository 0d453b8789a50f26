"""The simplest thing that works, to be measured against: chunks as files in /dev/shm, and nothing else.

Scheduling and copies are `PdConnector`'s own, so what differs is how the bytes get across. No deadlines, no failures:
for the bench alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pd_backend.paged import PagedKv
from pd_backend.vllm.connector import PdConnector
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.step import ConsumerStep, ProducerStep, ReceivePlan, SendOutcomes


class FileConnector(PdConnector):
    """Both roles; `folder` in the extra configuration is where the files go."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # Taken out for `PdConnector` alone, which knows no such option: the next instance looks for it as well.
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._folder = Path(extra.pop("folder"))
        super().__init__(vllm_config, role, kv_cache_config)
        extra["folder"] = str(self._folder)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        paged = self.make_paged(kv_caches)
        if self._produces:
            self._producer = _Producer(paged, self._folder)
        else:
            self._consumer = _Consumer(paged, self._folder, self._groups)


class _Producer:
    def __init__(self, paged: PagedKv, folder: Path) -> None:
        self._paged, self._folder = paged, folder
        self._names: dict[str, str] = {}
        self._step = ProducerStep()
        self._ended: dict[str, list[str | None]] = {}

    def begin_step(self, step: ProducerStep) -> None:
        self._step = step
        self._names.update((plan.request_id, plan.spec.req_id) for plan in step.plans)

    def layer_computed(self, _name: str) -> None:
        pass

    def end_step(self) -> None:
        for told in self._step.chunks:
            slot = np.empty(self._paged.chunk_bytes(len(told.block_ids)), dtype=np.uint8)
            self._paged.gather(told.block_ids, slot)
            path = self._folder / f"{self._names[told.request_id]}-{told.chunk}"
            part = path.with_suffix(".part")
            slot.tofile(part)
            os.replace(part, path)
        self._step.chunks = []

    def finished_sending(self) -> set[str]:
        done, self._step.finishing = set(self._step.finishing), []
        self._ended.update((request_id, [None]) for request_id in done)
        return done

    def outcomes(self) -> SendOutcomes | None:
        ended, self._ended = self._ended, {}
        return SendOutcomes(ended) if ended else None

    def close(self) -> None:
        pass


class _Consumer:
    def __init__(self, paged: PagedKv, folder: Path, groups: Groups) -> None:
        self._paged, self._folder, self._groups = paged, folder, groups
        self._plans: dict[str, ReceivePlan] = {}
        self._here: list[str] = []
        self._returned: list[str] = []

    def begin_step(self, step: ConsumerStep) -> None:
        self._here += [request_id for request_id, _ in step.announced]
        self._returned += step.unneeded + step.dropped
        self._plans.update((plan.request_id, plan) for plan in step.loads)

    def progress(self) -> tuple[set[str], set[int]]:
        done = set()
        for request_id, plan in list(self._plans.items()):
            files = [self._folder / f"{plan.req_id}-{chunk}" for chunk in range(len(plan.hashes))]
            if not all(file.exists() for file in files):
                continue
            for piece, file in zip(self._groups.pieces(plan.tokens), files, strict=True):
                self._paged.scatter(self._groups.block_ids(piece, [plan.block_ids]), np.fromfile(file, dtype=np.uint8))
                file.unlink()
            del self._plans[request_id]
            done.add(request_id)
        return done, set()

    def failed_requests(self) -> set[str]:
        return set()

    def here(self) -> list[str]:
        here, self._here = self._here, []
        return here

    def returned(self) -> list[str]:
        returned, self._returned = self._returned, []
        return returned

    def close(self) -> None:
        pass
