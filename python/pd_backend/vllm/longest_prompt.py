"""Whether the longest prompt that the engine takes can be moved at all, which is said when it starts."""

from __future__ import annotations

from ..messages import Attached

#: Of a buffer for both directions, the part that may hold chunks that arrive, and parked ones.
_ARRIVING_OF_BOTH, _PARKED_OF_BOTH = 2, 4


def warning(attached: Attached, max_tokens: int, *, sends: bool, receives: bool) -> str | None:
    """What to tell the operator where prompts of up to `max_tokens` tokens do not fit the daemon's buffer; None if they do."""
    # A chunk has a slot in each group.
    chunk_bytes = attached.chunk_tokens * sum(group.token_bytes for group in attached.groups)
    needed_bytes = -(-max_tokens // attached.chunk_tokens) * chunk_bytes
    buffer_bytes = attached.slot_count * attached.chunk_bytes
    parts = []
    if receives:
        parts.append(("received", _ARRIVING_OF_BOTH if sends else 1))
    if sends:
        parts.append(("parked for decode", _PARKED_OF_BOTH if receives else 1))
    too_small = [(what, part) for what, part in parts if needed_bytes > buffer_bytes // part]
    if not too_small:
        return None
    what, part = too_small[-1]
    fits = buffer_bytes // part // chunk_bytes * attached.chunk_tokens
    return (
        f"prompts of more than {fits} tokens cannot be {what}, and max_model_len is {max_tokens}: longer ones are computed at decode "
        "with kv_load_failure_policy recompute, and fail with fail. "
        f"Set pd_buffer_size to at least {needed_bytes * part} bytes, or --max-model-len to what fits"
    )
