"""LMCache's PD backend as a prefill worker has it: puts chunks, cancels, tells of callbacks.

put     {keys, seeds, last_tokens, spec: {req_id, receiver_host, receiver_init_port, receiver_alloc_port, total_chunks,
        is_last_prefill}} -> {pages, submit_s, submitted_s}: when batched_submit_put_task was called and when it returned.
        Then one `callback` event for each key, and in sync mode a `future` event with what was written, or the error.
        With `hold`, memory is taken and filled, and `submit` does the rest; `cpu_of` are processes whose CPU seconds
        at the time of the call the `submitted` event has.
submit  {req_id}: puts what was held.
cancel  {req_id}: async only, PDBackendAsync.cancel_request.
query   {keys, spec}: sync only, asks the receiver's query port, and reads what it has -> {read, sha256}.
status  pages, CPU seconds.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from stock import Stock, pattern

# A command, its keys and their memory objects.
Work = tuple[dict[str, Any], list[Any], list[Any]]


def bytes_of(memory: Any) -> np.ndarray:
    """A memory object's bytes, as they lie."""
    return memory.tensor.view(torch.uint8).numpy().reshape(-1)


def cpu_s(pid: int) -> float:
    """As in bench.py."""
    return time.clock_gettime((~pid << 3) | 2)


class Sender(Stock):
    def __init__(self) -> None:
        super().__init__("sender")
        # vLLM's worker submits from one thread; it blocks there, and standard input must still be read.
        self.work: queue.Queue[Work] = queue.Queue()
        self.held: dict[str, Work] = {}
        threading.Thread(target=self.submit_loop, daemon=True).start()

    def stage(self, command: dict[str, Any]) -> list[Any]:
        memories = []
        for index, seed in enumerate(command["seeds"]):
            last = index == len(command["seeds"]) - 1
            tokens = command["last_tokens"] if last else self.layout.chunk_tokens
            memory = self.backend.allocate(self.layout.object_shape(tokens), self.dtype)
            if memory is None:
                raise RuntimeError("no free page at the sender")
            memories.append(memory)
            if seed is not None:
                view = bytes_of(memory)
                view[:] = np.frombuffer(pattern(seed, view.size), np.uint8)
        return memories

    def put(self, command: dict[str, Any]) -> dict[str, Any]:
        keys = [self.key(text) for text in command["keys"]]
        memories = self.stage(command)
        if command.get("hold"):
            self.held[command["spec"]["req_id"]] = command, keys, memories
        else:
            self.work.put((command, keys, memories))
        return {"pages": [memory.meta.address for memory in memories]}

    def submit(self, command: dict[str, Any]) -> dict[str, Any]:
        self.work.put(self.held.pop(command["req_id"]))
        return {}

    def submit_loop(self) -> None:
        while True:
            command, keys, memories = self.work.get()
            spec = SimpleNamespace(**command["spec"])
            req_id = spec.req_id

            def done(key: Any, req_id: str = req_id) -> None:
                self.say(event="callback", req_id=req_id, key=key.to_string(), at_s=time.monotonic())

            if command.get("hold"):
                # The answer to `submit` is on its way first: it is not part of what is measured.
                time.sleep(0.002)
            began_cpu = [cpu_s(pid) for pid in command.get("cpu_of", ())]
            began = time.monotonic()
            try:
                futures = self.backend.batched_submit_put_task(
                    keys, memories, transfer_spec=spec, on_complete_callback=done if command.get("callbacks") else None
                )
            except Exception as error:
                self.say(event="submit_failed", req_id=req_id, error=f"{type(error).__name__}: {error}")
                continue
            self.say(event="submitted", req_id=req_id, began_s=began, began_cpu_s=began_cpu, at_s=time.monotonic())
            # As StorageManager.batched_put does once a backend has taken its own references.
            for memory in memories:
                memory.ref_count_down()
            for future in futures or []:
                future.add_done_callback(lambda future, req_id=req_id: self.tell_future(req_id, future))

    def tell_future(self, req_id: str, future: Any) -> None:
        error = future.exception()
        if error is None:
            self.say(event="future", req_id=req_id, written=future.result(), at_s=time.monotonic())
        else:
            self.say(event="future", req_id=req_id, error=f"{type(error).__name__}: {error}", at_s=time.monotonic())

    def cancel(self, command: dict[str, Any]) -> dict[str, Any]:
        self.backend.cancel_request(command["req_id"])
        return {}

    def query(self, command: dict[str, Any]) -> dict[str, Any]:
        keys = [self.key(text) for text in command["keys"]]
        shape = self.layout.object_shape(self.layout.chunk_tokens)
        memories = [self.backend.allocate(shape, self.dtype) for _ in keys]
        read = self.backend.batched_submit_read_task(keys, memories, transfer_spec=SimpleNamespace(**command["spec"]))
        sums = [hashlib.sha256(bytes_of(memory)).hexdigest() for memory in memories]
        for memory in memories:
            memory.ref_count_down()
        return {"read": read, "sha256": sums}


if __name__ == "__main__":
    sender = Sender()
    sender.run({"put": sender.put, "submit": sender.submit, "cancel": sender.cancel, "query": sender.query})
