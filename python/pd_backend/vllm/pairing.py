"""Before an engine serves: whether its pd-sender can talk to the receivers that its configuration names."""

from __future__ import annotations

import logging
import time

from ..errors import PdError
from ..messages import Failure
from ..sender_client import SenderClient

logger = logging.getLogger("vllm.pd_backend")

#: How long is waited for a receiver that has not answered: it is met later, and decode servers start as they like.
WAIT_S = 2.0
_PAUSE_S = 0.01


#: Refused for now: a receiver that has no place left may have one later.
_FOR_NOW = ("limit",)


class ReceiverRefused(PdError):
    """None of the receivers that the configuration names, and this sender, will talk to each other."""


def connect_receivers(client: SenderClient, wait_s: float = WAIT_S) -> None:
    """Returns when each receiver of `pd_receivers` is met, or is not there. At once where none is named.

    Raises `ReceiverRefused`, which names what differs and both values, where each of them is reached and refused. One that
    refuses beside others is left alone: in a rolling upgrade decode servers of two versions are named.
    """
    deadline = time.monotonic() + wait_s
    receivers = client.status().receivers
    while any(receiver.state == "connecting" for receiver in receivers) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        receivers = client.status().receivers
    refused: list[Failure] = []
    for receiver in receivers:
        at = receiver.address
        name = f"{at.host}:{at.init_port}/{at.alloc_port}"
        failure = receiver.failure
        if receiver.state == "refused" and failure is not None:
            if failure.kind in _FOR_NOW:
                logger.warning("receiver %s refuses for now (%s); it is asked again", name, failure.text)
            else:
                refused.append(Failure(failure.kind, f"receiver {name}: {failure.text}"))
        elif receiver.state == "connected":
            logger.info("receiver %s is met", name)
        else:
            logger.warning("receiver %s is not there yet (%s); it is met when it is", name, failure or receiver.state)
    if refused and len(refused) < len(receivers):
        for failure in refused:
            logger.error("%s: its requests fail; others are served", failure)
    elif refused:
        raise ReceiverRefused(refused[0].kind, "; ".join(failure.text for failure in refused))
