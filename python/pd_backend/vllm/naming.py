"""Which requests can be named: a chunk's key has to name everything that its KV depends on.

A request that cannot be named is not sent and not asked for. It is computed where it arrived, and the log says so once
for each reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapters import Adapter, Adapters
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


@dataclass(frozen=True)
class Named:
    """A request that can be named."""

    context: Context
    #: What the worker must have loaded for the names to be true.
    adapter: Adapter | None = None
    #: Whether what the engine's own cache has for it may be of another adapter.
    stale_hits: bool = False


class Naming:
    """What a server's requests are called, for its scheduler."""

    def __init__(
        self, *, last_is_computed: bool = False, images_by_count: bool = False, adapters: Adapters | None = None
    ) -> None:
        """`last_is_computed`: the last token of a prompt is not sent, and decode computes it. `images_by_count`: the
        engine calls multimodal inputs by a counter of its process, not by what they are. `adapters`: None where it is not
        known which the workers have loaded.
        """
        self._last_is_computed = last_is_computed
        self._images_by_count = images_by_count
        self._adapters = adapters
        #: By vLLM's number: what the workers have said.
        self._loaded: dict[int, str] = {}
        #: What vLLM's own cache calls adapters, with what each was when it was last used.
        self._last_digests: dict[tuple[str, str], str] = {}
        #: Those that were something else since the cache was empty.
        self._replaced: set[tuple[str, str]] = set()
        self._logged: set[str] = set()

    def adapters_loaded(self, signatures: Mapping[int, str]) -> None:
        """So said the workers."""
        self._loaded.update(signatures)

    def cache_reset(self) -> None:
        """The engine's own cache is empty."""
        self._replaced.clear()

    def name(self, request: Any, tokens: int) -> Named:
        """What changes the KV of the request's first `tokens` tokens besides these tokens. Raises `Unnamed`."""
        try:
            return self._name(request, tokens)
        except Unnamed as unnamed:
            if unnamed.reason not in self._logged:
                self._logged.add(unnamed.reason)
                logger.warning(
                    "request %s is computed where it arrived, and so are others like it (said once): %s",
                    request.request_id, unnamed,
                )
            raise

    def _name(self, request: Any, tokens: int) -> Named:
        if not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
            raise Unnamed("embeddings", "prompts given as embeddings have no names for their chunks")
        if self._last_is_computed and tokens < 2:
            raise Unnamed("one token", "decode computes the last token of a prompt, and this one has no other")
        features = getattr(request, "mm_features", None) or ()
        if features and self._images_by_count:
            raise Unnamed(
                "images",
                "with prefix caching and the multimodal cache both off, vLLM names multimodal inputs by a counter; switch "
                "one of them on (--enable-prefix-caching, --mm-processor-cache-gb) at both servers",
            )
        items = [Item(int(feature.mm_position.offset), str(feature.identifier)) for feature in features]
        salt = getattr(request, "cache_salt", None) or ""
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return Named(Context("", salt, tuple(items)))
        adapter = self._adapter(lora)
        called = (lora.lora_name, lora.lora_path)
        if self._last_digests.setdefault(called, adapter.digest) != adapter.digest:
            self._last_digests[called] = adapter.digest
            self._replaced.add(called)
        return Named(Context(adapter.digest, salt, tuple(items)), adapter, called in self._replaced)

    def _adapter(self, lora: Any) -> Adapter:
        if self._adapters is None:
            raise Unnamed("adapters", "it is not known when this vLLM loads LoRA adapters, so they have no names")
        try:
            adapter = self._adapters.of(lora)
        except OSError as error:
            raise Unnamed(
                f"adapter {lora.lora_path}", f"the files of LoRA adapter {lora.lora_name} cannot be read: {error}"
            ) from error
        if self._loaded.get(adapter.lora_id, adapter.signature) != adapter.signature:
            raise Unnamed(
                f"adapter {lora.lora_path}",
                f"the files of LoRA adapter {lora.lora_name} in {lora.lora_path} have changed since it was loaded; load "
                "it anew",
            )
        return adapter
