"""Which requests can be named: a chunk's key has to name everything that its KV depends on.

A request that cannot be named is not sent and not asked for. It is computed where it arrived, and the log says so once
for each reason.
"""

from __future__ import annotations

import logging
from typing import Any

from .keys import Context, Item

logger = logging.getLogger("vllm.pd_backend")

#: The engine puts this block in a request's table where it keeps nothing: for tokens outside a window.
NULL_BLOCK = 0


class Unnamed(Exception):
    """Why a request has to be computed where it arrived."""

    def __init__(self, reason: str, text: str) -> None:
        """`reason` is a kind, of which the log has one line; `text` is about this request."""
        super().__init__(text)
        self.reason = reason


class Naming:
    """What a server's requests are called, for its scheduler."""

    def __init__(self, *, window_tokens: int | None = None, images_by_count: bool = False) -> None:
        """`window_tokens`: no layer sees more tokens than these; None where every layer sees all. `images_by_count`: the
        engine calls multimodal inputs by a counter of its process, not by what they are.
        """
        self._window_tokens = window_tokens
        self._images_by_count = images_by_count
        self._logged: set[str] = set()

    def context(self, request: Any, tokens: int) -> Context:
        """What changes the KV of the request's first `tokens` tokens besides these tokens. Raises `Unnamed`."""
        try:
            return self._context(request, tokens)
        except Unnamed as unnamed:
            if unnamed.reason not in self._logged:
                self._logged.add(unnamed.reason)
                logger.warning(
                    "request %s is computed where it arrived, and so are others like it (said once): %s",
                    request.request_id, unnamed,
                )
            raise

    def _context(self, request: Any, tokens: int) -> Context:
        if not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
            raise Unnamed("embeddings", "prompts given as embeddings have no names for their chunks")
        window = self._window_tokens
        if window is not None and tokens >= window:
            raise Unnamed(
                "window",
                f"the prompt's {tokens} tokens are not all inside the window of {window}, and vLLM keeps no KV outside it",
            )
        features = getattr(request, "mm_features", None) or ()
        if features and self._images_by_count:
            raise Unnamed(
                "images",
                "with prefix caching and the multimodal cache both off, vLLM names multimodal inputs by a counter; switch "
                "one of them on (--enable-prefix-caching, --mm-processor-cache-gb) at both servers",
            )
        items = [Item(int(feature.mm_position.offset), str(feature.identifier)) for feature in features]
        lora = getattr(request, "lora_request", None)
        return Context(
            "" if lora is None else str(lora.lora_name), getattr(request, "cache_salt", None) or "", tuple(items)
        )
