"""A connector of the soak, in a process of its own: prefills or decodes what it is told on stdin, one line each.

    python soak_connector.py prefill|decode

A line in is an order, a line out is how it went. It ends when its stdin does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pd_backend import PdError, PeerAddress, ReceiverClient, SenderClient


class Order(msgspec.Struct):
    """A request, as a router tells it to both of its connectors."""

    name: str
    keys: list[str]
    groups: list[int]
    #: Tokens of each chunk.
    tokens: list[int]
    last_tokens: int
    receiver: PeerAddress
    #: The connector API of the daemon, which changes with every restart.
    connector: str
    #: What the prefill connector does: `send`, `parts`, `cancel`, or `vanish` with slots in its hands.
    act: str


class Outcome(msgspec.Struct):
    """How an order ended."""

    name: str
    #: `sent`, `verified`, `cancelled`, `vanished`, or the kind of an error.
    end: str
    bytes: int = 0
    #: What is not as it should be.
    wrong: str = ""


def content(key: str, len_bytes: int) -> np.ndarray:
    """What a chunk holds: a function of its key, so that equal keys mean equal bytes."""
    start = int.from_bytes(key.encode()[-8:].rjust(8), "little") % 251
    return ((np.arange(len_bytes, dtype=np.uint32) * 7 + start) % 253).astype(np.uint8)


def prefill(sender: SenderClient, order: Order) -> Outcome:
    opened = sender.open(
        order.name,
        order.keys,
        last_chunk_tokens=order.last_tokens,
        receiver=order.receiver,
        groups=order.groups,
        wait_s=2,
    )
    if order.act == "cancel":
        sender.cancel(order.name)
        return Outcome(order.name, "cancelled")
    missing = [at for at in range(len(order.keys)) if at not in opened.already_sent]
    slots = sender.stage(order.name, missing, wait_s=2) if missing else []
    if order.act == "vanish":
        sender._channel.close()
        return Outcome(order.name, "vanished")
    for at, slot in enumerate(slots):
        sender.view(slot)[:] = content(order.keys[slot.chunk], slot.len_bytes)
        if order.act == "parts" and at % 2 == 0:
            sender.send(order.name, [slot], last=False)
    left = slots[1::2] if order.act == "parts" else slots
    sender.send(order.name, left, last=True)
    sent = sender.wait_sent(order.name, 6)
    return Outcome(order.name, "sent", sent.bytes)


def decode(receiver: ReceiverClient, order: Order) -> Outcome:
    wrong, read_bytes = "", 0
    with receiver.wait(order.name, wait_s=2) as lease:
        if len(lease.chunks) != len(order.keys):
            wrong = f"{order.name} has {len(lease.chunks)} chunks of {len(order.keys)}"
        for at, chunk in enumerate(lease.chunks):
            token_bytes = receiver.attached.groups[order.groups[at]].token_bytes
            expected = content(order.keys[at], order.tokens[at] * token_bytes)
            if chunk.key != order.keys[at] or not np.array_equal(lease.view(at), expected):
                wrong = f"chunk {at} of {order.name}: {chunk}"
            read_bytes += chunk.len_bytes
    return Outcome(order.name, "verified", read_bytes, wrong)


def main() -> None:
    make, carry_out = {"prefill": (SenderClient, prefill), "decode": (ReceiverClient, decode)}[sys.argv[1]]
    client, attached_to = None, ""
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        try:
            if client is None or attached_to != order.connector:
                if client is not None:
                    client.close()
                client, attached_to = make(order.connector, reply_timeout_s=2), order.connector
            outcome = carry_out(client, order)
            if outcome.end == "vanished":
                client = None
        except PdError as error:
            outcome = Outcome(order.name, str(error.kind))
            # Another attempt, another connector.
            if client is not None:
                client.close()
            client = None
        sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
