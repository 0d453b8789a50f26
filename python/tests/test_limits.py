"""Requests as large as a configuration allows, through both daemons and this client."""

import subprocess

import numpy as np
import pytest

from conftest import CHUNK_BYTES, CHUNK_TOKENS, TOP, binary
from pd_backend import Kind, RequestRefused

#: The largest `pd_max_request_chunks`.
CHUNKS = 16_384
#: The longest key.
KEY_LEN_BYTES = 1024


def keys_of(count):
    return [f"{number:0{KEY_LEN_BYTES}}" for number in range(count)]


def test_the_largest_request_that_is_allowed_arrives(start_pair):
    # Broken in production: `--check` accepts a limit, and a request within it ends at one of six decoders.
    sets = [f"pd_max_request_chunks={CHUNKS}", "pd_checksum=full"]
    pair = start_pair("local", CHUNKS, CHUNKS, sender_sets=sets, receiver_sets=sets)
    keys = keys_of(CHUNKS)
    data = np.random.default_rng(1).integers(0, 256, (CHUNKS, CHUNK_BYTES), dtype=np.uint8)
    opened = pair.sender.open("long", keys, last_chunk_tokens=CHUNK_TOKENS, receiver=pair.address)
    assert not opened.already_sent
    slots = pair.sender.stage("long", range(CHUNKS))
    for slot in slots:
        pair.sender.view(slot)[:] = data[slot.chunk]
    pair.sender.send("long", slots, last=True)
    assert pair.sender.wait_sent("long", 60).chunks == CHUNKS
    with pair.receiver.wait("long", wait_s=60) as lease:
        assert all(np.array_equal(lease.view(index), data[index]) for index in range(CHUNKS))
    with pair.receiver.lookup(keys) as lease:
        assert sum(chunk is not None for chunk in lease.chunks) == CHUNKS
    # All of it is there already, which is another answer.
    again = pair.sender.open("again", keys, last_chunk_tokens=CHUNK_TOKENS, receiver=pair.address)
    assert len(again.already_sent) == CHUNKS
    pair.sender.cancel("again")
    # One more than may be is refused by name, and nothing else is disturbed.
    with pytest.raises(RequestRefused) as caught:
        pair.sender.open("longer", keys_of(CHUNKS + 1), last_chunk_tokens=CHUNK_TOKENS, receiver=pair.address)
    assert caught.value.kind == Kind.LIMIT
    assert "16385" in caught.value.text and "16384" in caught.value.text, caught.value.text
    pair.sender.open("short", keys[:1], last_chunk_tokens=CHUNK_TOKENS, receiver=pair.address)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_limit_that_no_message_can_carry_is_refused_at_the_check(role, layout_file):
    # Broken in production: the limit is accepted, and the first long prompt fails instead.
    command = [binary(f"pd-{role}"), "--check", "--config", TOP / "configs" / "loopback.yaml", "--kv-layout", layout_file]
    checked = subprocess.run([*command, "--set", "pd_max_request_chunks=32768"], capture_output=True, text=True)
    assert checked.returncode == 2
    assert "pd_max_request_chunks = 32768; expected a number from 1 to 16384" in checked.stderr, checked.stderr
    subprocess.run([*command, "--set", f"pd_max_request_chunks={CHUNKS}"], check=True, capture_output=True)
