"""LMCache's PD backend as a decode worker has it: finds, reads and frees chunks.

contains  {keys} -> {contains: [bool]}
read      {keys} -> {chunks: [{sha256, len_bytes, shape, page, ref_count}]}; a key that is not there is an error
free      {keys}: what the engine does after it has copied a chunk out -> {free: pages}
status    pages, keys, CPU seconds.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from stock import Stock


class Receiver(Stock):
    def contains(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"contains": [self.backend.contains(self.key(text)) for text in command["keys"]]}

    def read(self, command: dict[str, Any]) -> dict[str, Any]:
        chunks = []
        for text in command["keys"]:
            memory = self.backend.get_blocking(self.key(text))
            held = memory.tensor.view(torch.uint8).numpy().reshape(-1)
            chunks.append(
                {
                    "sha256": hashlib.sha256(held).hexdigest(),
                    "len_bytes": held.size,
                    "shape": list(memory.meta.shape),
                    "page": memory.meta.address,
                    "ref_count": memory.get_ref_count(),
                }
            )
        return {"chunks": chunks}

    def free(self, command: dict[str, Any]) -> dict[str, Any]:
        for text in command["keys"]:
            key = self.key(text)
            memory = self.backend.get_blocking(key)
            self.backend.remove(key)
            # As LMCacheEngine.retrieve: the synchronous remove leaves the reference to its caller.
            if self.mode == "sync":
                memory.ref_count_down()
        return {"pages_free": len(self.allocator.free_blocks)}


if __name__ == "__main__":
    receiver = Receiver("receiver")
    receiver.run({"contains": receiver.contains, "read": receiver.read, "free": receiver.free})
