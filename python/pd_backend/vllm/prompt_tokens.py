"""How many tokens of a prompt vLLM says were cached: clients are billed by it."""

from __future__ import annotations

from typing import Any


def transferred_are_not_cached(request: Any) -> None:
    """Counts what decode's own cache had, and not what prefill has sent, as `cached_tokens` of the answer's usage. After vLLM has
    counted both, before it tells anybody. Metrics by source stay as they are.

    A router that passes on prefill's `remote_prefill_cached_tokens` with `do_remote_prefill` has vLLM say that instead.
    """
    stats = getattr(request, "prefill_stats", None)
    if stats is not None and hasattr(stats, "num_local_cached_tokens"):
        stats.num_cached_tokens = stats.num_local_cached_tokens
