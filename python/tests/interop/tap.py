"""Prints every message between two peers: a man in the middle on the init and alloc ports of one receiver.

    python3 tap.py LISTEN_INIT LISTEN_ALLOC RECEIVER_INIT RECEIVER_ALLOC

Senders are given the first two ports. Frames are passed on as they are; any kind of peer can be at either end. Chunks do
not come this way: NIXL moves them by itself.
"""

from __future__ import annotations

import pickletools
import struct
import sys
from typing import Any

import msgspec
import zmq


def describe_descriptors(pickled: bytes) -> str:
    """Class, memory type and descriptors of a pickled NIXL list, without unpickling it."""
    strings = [op[1] for op in pickletools.genops(pickled) if isinstance(op[1], str)]
    raw = next(op[1] for op in pickletools.genops(pickled) if isinstance(op[1], bytes))
    return f"{'.'.join(strings)}, {len(raw)} bytes: {parse_serdes(raw)}"


def parse_serdes(raw: bytes) -> str:
    """`nixlSerDes|`, then records: tag, length (u64), bytes, `|`. Tags are one of those below."""
    at = len(b"nixlSerDes|")
    seen = []
    while at < len(raw):
        for tag in (b"nixlDList", b"t", b"n", b""):
            (length,) = struct.unpack_from("<Q", raw, at + len(tag)) if at + len(tag) + 8 <= len(raw) else (1 << 62,)
            end = at + len(tag) + 8 + length
            if raw.startswith(tag, at) and end < len(raw) and raw[end : end + 1] == b"|":
                break
        else:
            return f"{seen} and {raw[at:]!r}"
        value = raw[at + len(tag) + 8 : end]
        if tag == b"" and length % 24 == 0:
            descriptors = [struct.unpack_from("<QQQ", value, offset) for offset in range(0, length, 24)]
            shown = [f"({hex(a)}, {n}, {device})" for a, n, device in descriptors]
            seen.append(f"{len(shown)} descriptors: {', '.join(shown[:2])} ... {shown[-1]}")
        else:
            seen.append(f"{tag.decode()}={value!r}")
        at = end + 1
    return "; ".join(seen)


def show(value: Any) -> str:
    if isinstance(value, bytes):
        if value.startswith(b"\x80\x04"):
            return f"pickle of {describe_descriptors(value)}"
        return repr(value) if len(value) < 80 else f"{len(value)} bytes, {value[:48]!r}..."
    if isinstance(value, list) and len(value) > 6:
        return f"[{value[0]!r}, {value[1]!r}, ... {len(value)} of them]"
    return repr(value)


def tell(port: str, direction: str, frames: list[bytes]) -> None:
    before = "".join(f"[{frame!r}]" for frame in frames[:-1])
    message = msgspec.msgpack.decode(frames[-1])
    fields = "\n".join(f"    {name}: {show(value)}" for name, value in message.items() if name != "type")
    print(f"{port} {direction} {before} {message['type']}\n{fields}", flush=True)


def main() -> None:
    listen = {"init": sys.argv[1], "alloc": sys.argv[2]}
    onward = {"init": sys.argv[3], "alloc": sys.argv[4]}
    context = zmq.Context()
    poller = zmq.Poller()
    fronts = {}
    # One socket onward for each peer, so that a receiver can tell them apart and answers find their way.
    backs: dict[Any, tuple[str, bytes, Any]] = {}
    by_peer: dict[tuple[str, bytes], Any] = {}
    for name, port in listen.items():
        front = context.socket(zmq.ROUTER)
        front.bind(f"tcp://127.0.0.1:{port}")
        poller.register(front, zmq.POLLIN)
        fronts[front] = name
    while True:
        for ready, _ in poller.poll():
            if ready in fronts:
                name = fronts[ready]
                identity, *frames = ready.recv_multipart()
                back = by_peer.get((name, identity))
                if back is None:
                    back = context.socket(zmq.DEALER)
                    back.setsockopt(zmq.IDENTITY, identity if identity[0] else b"tap" + identity.hex().encode())
                    back.connect(f"tcp://127.0.0.1:{onward[name]}")
                    poller.register(back, zmq.POLLIN)
                    by_peer[name, identity] = back
                    backs[back] = (name, identity, ready)
                tell(name, f"-> from {identity!r}", frames)
                back.send_multipart(frames)
            else:
                name, identity, front = backs[ready]
                frames = ready.recv_multipart()
                tell(name, f"<- to {identity!r}", frames)
                front.send_multipart([identity, *frames])


if __name__ == "__main__":
    main()
