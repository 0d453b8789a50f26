"""Both daemons in processes of their own, driven through the connector API: the bytes that arrive are the bytes sent."""

import time

import numpy as np
import pytest

from conftest import CHUNK_BYTES, CHUNK_TOKENS, TOKEN_BYTES
from pd_backend import Kind, PdError, RequestFailed, RequestRefused, SendPart
from waiting import eventually

ENGINES = ["local", pytest.param("nixl", marks=pytest.mark.nixl)]
pytestmark = pytest.mark.parametrize("engine", ENGINES)


def content(seed, chunks, last_tokens):
    """Random bytes of a request, chunk by chunk."""
    random = np.random.default_rng(seed)
    lengths = [CHUNK_BYTES] * (chunks - 1) + [last_tokens * TOKEN_BYTES]
    return [random.integers(0, 256, length, dtype=np.uint8) for length in lengths]


def keys_of(name, count):
    return [f"tests/tiny@1@0@{name}-{index}@bfloat16" for index in range(count)]


def open_request(pair, name, chunks, last_tokens=CHUNK_TOKENS, keys=None, **more):
    keys = keys_of(name, chunks) if keys is None else keys
    return pair.sender.open(name, keys, last_chunk_tokens=last_tokens, receiver=pair.address, **more)


def fill(pair, name, data, positions=None):
    """Stages and fills these chunks, all of them by default."""
    positions = range(len(data)) if positions is None else positions
    slots = pair.sender.stage(name, positions)
    assert [slot.chunk for slot in slots] == list(positions)
    for slot in slots:
        assert slot.len_bytes == len(data[slot.chunk])
        pair.sender.view(slot)[:] = data[slot.chunk]
    return slots


def ship(pair, name, data, keys=None):
    """A whole request, from `open` to `sent`."""
    last_tokens = len(data[-1]) // TOKEN_BYTES
    opened = open_request(pair, name, len(data), last_tokens, keys)
    missing = [index for index in range(len(data)) if index not in opened.already_sent]
    slots = fill(pair, name, data, missing) if missing else []
    pair.sender.send(name, slots, last=True)
    return pair.sender.wait_sent(name, 30)


def check_arrived(pair, name, data):
    """Waits for the request at the receiver and compares every byte."""
    with pair.receiver.wait(name, wait_s=30) as lease:
        assert len(lease.chunks) == len(data)
        for index, expected in enumerate(data):
            seen = lease.view(index)
            assert len(seen) == len(expected)
            assert np.array_equal(seen, expected), f"chunk {index} differs at {np.flatnonzero(seen != expected)[0]}"


def refused(kind, call):
    with pytest.raises(RequestRefused) as caught:
        call()
    assert caught.value.kind == kind, str(caught.value)
    return caught.value.text


def refused_kind(call):
    with pytest.raises(RequestRefused) as caught:
        call()
    return caught.value.kind


HYBRID = {
    "groups": [{"name": "full", "layers": 4}, {"name": "sliding", "layers": 5, "kv_heads": 1, "head_size": 3}],
}


def test_chunks_of_several_groups_arrive_and_are_granted_together(start_pair, engine):
    # Broken in production: a hybrid model's sliding-window layers are cut, or only half of a prompt gets slots.
    pair = start_pair(engine, layout=HYBRID)
    token_bytes = [group.token_bytes for group in pair.sender.attached.groups]
    assert [group.name for group in pair.receiver.attached.groups] == ["full", "sliding"]
    assert token_bytes == [128, 60] and pair.sender.attached.chunk_bytes == 128 * CHUNK_TOKENS
    groups, last_tokens = [0, 1, 0, 1], 3
    lengths = [tokens * token_bytes[group] for group, tokens in zip(groups, [16, 16, 3, 3])]
    random = np.random.default_rng(1)
    data = [random.integers(0, 256, length, dtype=np.uint8) for length in lengths]
    keys = keys_of("hybrid", 4)
    open_request(pair, "hybrid", 4, last_tokens, keys, groups=groups)
    pair.sender.send("hybrid", fill(pair, "hybrid", data), last=True)
    assert pair.sender.wait_sent("hybrid", 30).bytes == sum(lengths)
    with pair.receiver.wait("hybrid", wait_s=30) as lease:
        assert [chunk.group for chunk in lease.chunks] == groups
        assert all(np.array_equal(lease.view(index), expected) for index, expected in enumerate(data))
    # The same keys of another group are other chunks.
    opened = open_request(pair, "again", 4, last_tokens, keys, groups=[0, 0, 0, 1])
    assert opened.already_sent == [0, 2, 3]
    refused("bad_request", lambda: open_request(pair, "unknown", 1, groups=[2]))
    # All or nothing: 8 slots hold no 9 whole chunks, whatever their groups.
    many = keys_of("many", 18)
    refused("too_large", lambda: open_request(pair, "many", 18, keys=many, groups=[0] * 9 + [1] * 9))


def test_short_chunks_share_slots_at_both_ends(start_pair, engine):
    # Broken in production: each prompt of a few tokens costs a whole slot, and a buffer for thousands holds hundreds.
    pair = start_pair(engine, sender_slots=2, receiver_slots=2)
    # Every slot starts at a multiple of 256 bytes, here four tokens.
    names = [f"short-{index}" for index in range(8)]
    data = {name: content(index, 1, 4) for index, name in enumerate(names)}
    for name in names:
        open_request(pair, name, 1, 4)
    staged = [fill(pair, name, data[name]) for name in names]
    assert pair.sender.status().buffer.chunks_fit == [0]
    for name, slots in zip(names, staged):
        pair.sender.send(name, slots, last=True)
    for name in names:
        pair.sender.wait_sent(name, 30)
    usage = pair.receiver.status().buffer
    assert (usage.used_bytes, usage.free_bytes, usage.len_bytes) == (2 * CHUNK_BYTES, 0, 2 * CHUNK_BYTES)
    for name in names:
        check_arrived(pair, name, data[name])


def test_a_lazy_buffer_grows_while_peers_are_connected(start_pair, engine):
    # Broken in production: a buffer that starts small stays small, or a chunk beyond its first step never arrives.
    lazy = [f"pd_buffer_initial_size={2 * CHUNK_BYTES}", f"pd_buffer_growth_step={CHUNK_BYTES}"]
    pair = start_pair(engine, sender_slots=6, receiver_slots=6, sender_sets=lazy, receiver_sets=lazy)
    assert pair.sender.status().buffer.len_bytes == pair.receiver.status().buffer.len_bytes == 2 * CHUNK_BYTES
    assert pair.receiver.status().buffer.len_max_bytes == 6 * CHUNK_BYTES
    first = content(1, 2, 7)
    ship(pair, "first", first)
    with pair.receiver.wait("first", wait_s=30) as held:
        # Five more chunks, while two are held: four steps, with a sender that knew of two slots.
        data = content(2, 4, 16)
        ship(pair, "second", data)
        check_arrived(pair, "second", data)
        assert all(np.array_equal(held.view(index), expected) for index, expected in enumerate(first))
    assert pair.receiver.status().buffer.len_bytes == 6 * CHUNK_BYTES
    assert pair.sender.status().buffer.len_bytes == 4 * CHUNK_BYTES
    refused("too_large", lambda: open_request(pair, "seven", 7))


def damage(pair, offset):
    """Flips a bit of the receiver's buffer, as a faulty link or memory would."""
    handle = pair.receiver.attached.buffer
    with open(f"/proc/{handle.pid}/fd/{handle.fd}", "r+b", buffering=0) as memory:
        memory.seek(offset)
        byte = memory.read(1)[0]
        memory.seek(offset)
        memory.write(bytes([byte ^ 1]))


def test_a_flipped_bit_fails_the_request_with_the_chunk_named(start_pair, engine):
    # Broken in production: success is reported on a corrupted page, and a decode worker reads it.
    checked = ["pd_checksum=full"]
    pair = start_pair(engine, sender_sets=checked, receiver_sets=checked)
    data = content(1, 3, 5)
    ship(pair, "good", data)
    check_arrived(pair, "good", data)
    # Other bytes than the chunks that are kept for reuse, so that they are found where this request's are.
    data = content(2, 3, 5)
    keys = keys_of("bad", 3)
    open_request(pair, "bad", 3, 5, keys)
    slots = fill(pair, "bad", data)
    half = CHUNK_BYTES // 2
    pair.sender.send("bad", [SendPart(slot=slots[1].slot, offset_bytes=half)], last=False)
    whole = [SendPart(slot=slot.slot) for slot in (slots[0], slots[2])]
    eventually(lambda: pair.receiver.status().slots_reserved == 3)
    sent = data[1][half:].tobytes()

    def written():
        return pair.receiver.buffer.range(0, 8 * CHUNK_BYTES).tobytes().find(sent)

    eventually(lambda: written() >= 0)
    damage(pair, written())
    pair.sender.send("bad", [*whole, SendPart(slot=slots[1].slot, len_bytes=half)], last=True)
    with pytest.raises(RequestFailed) as caught:
        pair.sender.wait_sent("bad", 30)
    assert caught.value.kind == Kind.CORRUPTED and keys[1] in caught.value.text
    assert Kind.CORRUPTED == refused_kind(lambda: pair.receiver.wait("bad", wait_s=30))
    eventually(lambda: pair.receiver.status().slots_reserved + pair.receiver.status().slots_quarantined == 0)
    ship(pair, "bad", data, keys)
    check_arrived(pair, "bad", data)


def test_a_failure_that_is_acknowledged_late_leaves_the_next_attempt(start_pair, engine):
    # Broken in production: a request that is sent again is cancelled by what its client says about the first attempt.
    pair = start_pair(engine)
    open_request(pair, "r", 2, 5)
    pair.receiver.cancel("r")
    eventually(lambda: pair.sender.status().requests_failed == 1)
    open_request(pair, "r", 2, 5)
    assert [event.kind for event in pair.sender.poll_events()] == [Kind.CANCELLED]
    data = content(1, 2, 5)
    pair.sender.send("r", fill(pair, "r", data), last=True)
    pair.sender.wait_sent("r", 30)
    check_arrived(pair, "r", data)


def test_a_receiver_that_wants_checksums_takes_nothing_without(start_pair, engine):
    # Broken in production: an operator turns checks on at one side and believes that they are made.
    pair = start_pair(engine, receiver_sets=["pd_checksum=full"])
    with pytest.raises(RequestRefused, match="pd_checksum is full at"):
        open_request(pair, "r", 1)


def test_status_shows_how_fragmented_the_buffer_is(start_pair, engine):
    # Broken in production: a buffer has room for ten chunks and grants none, and nobody can see why.
    pair = start_pair(engine, sender_slots=4)
    open_request(pair, "r", 3, 4)
    slots = pair.sender.stage("r", [0, 2])
    usage = pair.sender.status().buffer
    assert usage.used_bytes == CHUNK_BYTES + 4 * TOKEN_BYTES and usage.len_max_bytes == usage.len_bytes == 4 * CHUNK_BYTES
    assert usage.free_bytes == usage.len_bytes - usage.used_bytes
    assert usage.chunks_fit == [2] and usage.largest_free_bytes >= 2 * CHUNK_BYTES and usage.free_range_count >= 1
    assert {slot.len_bytes for slot in slots} == {CHUNK_BYTES, 4 * TOKEN_BYTES}
    pair.sender.cancel("r")
    usage = pair.sender.status().buffer
    assert (usage.used_bytes, usage.largest_free_bytes, usage.free_range_count) == (0, usage.len_bytes, 1)


def test_a_request_with_a_short_last_chunk_arrives_byte_for_byte(start_pair, engine):
    # Broken in production: the one thing that this project is for.
    pair = start_pair(engine)
    assert pair.sender.attached.chunk_bytes == pair.receiver.attached.chunk_bytes == CHUNK_BYTES
    assert pair.sender.attached.chunk_tokens == CHUNK_TOKENS
    assert pair.sender.status().engine == engine
    data = content(1, 3, 5)
    sent = ship(pair, "r1", data)
    assert (sent.chunks, sent.bytes) == (3, 2 * CHUNK_BYTES + 5 * TOKEN_BYTES)
    check_arrived(pair, "r1", data)
    assert pair.sender.poll_events() == []
    status = pair.receiver.status()
    assert (status.role, status.requests_done, status.requests_failed) == ("receiver", 1, 0)
    assert status.bytes == sent.bytes


def test_a_wait_that_comes_before_the_sender_is_answered(start_pair, engine):
    # Broken in production: the decode side is told first, as routers do, and its wait is refused.
    pair = start_pair(engine)
    data = content(2, 2, 1)
    waiting = pair.receiver.start_wait("early", wait_s=30)
    assert not waiting.done()
    ship(pair, "early", data)
    with waiting.result() as lease:
        assert all(np.array_equal(lease.view(index), data[index]) for index in range(2))


def test_chunks_that_are_there_already_are_not_sent_again(start_pair, engine):
    # Broken in production: shared prefixes cross the network once for each request.
    pair = start_pair(engine)
    data = content(3, 3, CHUNK_TOKENS)
    keys = keys_of("shared", 3)
    assert ship(pair, "first", data, keys).chunks == 3
    # The first request's lease is what keeps its chunks in place.
    with pair.receiver.wait("first", wait_s=30):
        more = content(4, 2, 7)
        longer = [*keys, *keys_of("own", 2)]
        opened = open_request(pair, "second", 5, 7, longer)
        assert opened.already_sent == [0, 1, 2]
        slots = fill(pair, "second", [*data, *more], [3, 4])
        pair.sender.send("second", slots, last=True)
        assert pair.sender.wait_sent("second", 30).chunks == 2
        check_arrived(pair, "second", [*data, *more])
        assert ship(pair, "third", data, keys).bytes == 0
        check_arrived(pair, "third", data)
        with pair.receiver.lookup(["nobody's", keys[1]]) as found:
            assert found.chunks[0] is None
            assert np.array_equal(found.view(1), data[1])


def test_slots_can_be_sent_layer_by_layer(start_pair, engine):
    # Broken in production: layer-wise pushing delivers the layers of the last message alone.
    pair = start_pair(engine)
    data = content(5, 2, CHUNK_TOKENS)
    open_request(pair, "layers", 2)
    slots = pair.sender.stage("layers", [0, 1])
    quarter = CHUNK_BYTES // 4
    for layer in (2, 0, 3, 1):
        parts = []
        for slot in slots:
            start = layer * quarter
            pair.sender.view(slot)[start : start + quarter] = data[slot.chunk][start : start + quarter]
            parts.append(SendPart(slot=slot.slot, offset_bytes=start, len_bytes=quarter))
        pair.sender.send("layers", parts, last=False)
    pair.sender.send("layers", [], last=True)
    assert pair.sender.wait_sent("layers", 30).bytes == 2 * CHUNK_BYTES
    check_arrived(pair, "layers", data)


def test_a_request_is_opened_and_staged_at_once(start_pair, engine):
    # Broken in production: the shorter way moves other bytes than the longer one, or loses slots when there are too few.
    pair = start_pair(engine, sender_slots=4, receiver_slots=16)
    data = content(14, 4, 3)
    for turn, keys in enumerate([keys_of("same", 2) + keys_of("first", 2), keys_of("same", 2) + keys_of("second", 2)]):
        opened = open_request(pair, f"r{turn}", 4, 3, keys, stage=True)
        assert [slot.chunk for slot in opened.slots] == [at for at in range(4) if at not in opened.already_sent]
        for slot in opened.slots:
            pair.sender.view(slot)[:] = data[slot.chunk]
        if turn == 0:
            late = open_request(pair, "late", 1, keys=keys_of("late", 1), stage=True)
            assert late.slots == [], "the sender has no slot left"
        pair.sender.send(f"r{turn}", opened.slots, last=True)
        pair.sender.wait_sent(f"r{turn}", 30)
        check_arrived(pair, f"r{turn}", data)
    pair.sender.send("late", fill(pair, "late", [data[0]]), last=True)
    pair.sender.wait_sent("late", 30)
    check_arrived(pair, "late", [data[0]])


def test_a_request_without_a_name_is_fetched_by_its_chunks(start_pair, engine):
    # Broken in production: with a router that names no requests the receiver's buffer fills with what decode has had.
    pair = start_pair(engine)
    data = content(15, 2, 3)
    ship(pair, "unnamed", data)
    keys = keys_of("unnamed", 2)
    with pair.receiver.lookup(keys) as lease:
        assert None not in lease.chunks
    assert pair.receiver.status().slots_held == 2, "somebody may wait for it by its name"
    with pair.receiver.lookup(keys, fetch=True) as lease:
        for index, expected in enumerate(data):
            assert np.array_equal(lease.view(index), expected)
    assert pair.receiver.status().slots_held == 0


def test_last_with_bytes_missing_is_refused_and_the_request_goes_on(start_pair, engine):
    # Broken in production: half a chunk is committed, and the decode side computes on garbage.
    pair = start_pair(engine)
    data = content(6, 2, 3)
    open_request(pair, "holes", 2, 3)
    slots = fill(pair, "holes", data)
    refused(Kind.BAD_REQUEST, lambda: pair.sender.send("holes", slots[:1], last=True))
    half = SendPart(slot=slots[1].slot, offset_bytes=0, len_bytes=TOKEN_BYTES)
    refused(Kind.BAD_REQUEST, lambda: pair.sender.send("holes", [slots[0], half], last=True))
    beyond = SendPart(slot=slots[1].slot, offset_bytes=0, len_bytes=CHUNK_BYTES)
    refused(Kind.BAD_REQUEST, lambda: pair.sender.send("holes", [beyond], last=False))
    pair.sender.send("holes", slots, last=True)
    pair.sender.wait_sent("holes", 30)
    check_arrived(pair, "holes", data)


def test_slots_of_others_are_refused(start_pair, engine):
    # Broken in production: one request's mistake sends another's bytes.
    pair = start_pair(engine)
    data = content(7, 1, CHUNK_TOKENS)
    for name in ("mine", "yours"):
        open_request(pair, name, 1)
    mine = fill(pair, "mine", data)
    yours = fill(pair, "yours", data)
    for stranger in (yours[0].slot, 7, 10_000):
        text = refused(Kind.UNKNOWN, lambda: pair.sender.send("mine", [SendPart(slot=stranger)], last=True))
        assert str(stranger) in text
    refused(Kind.UNKNOWN, lambda: pair.sender.send("nobody's", mine, last=True))
    refused(Kind.UNKNOWN, lambda: pair.sender.stage("nobody's", [0]))
    refused(Kind.BAD_REQUEST, lambda: pair.sender.stage("mine", [1]))
    for name, slots in (("mine", mine), ("yours", yours)):
        pair.sender.send(name, slots, last=True)
        pair.sender.wait_sent(name, 30)
        check_arrived(pair, name, data)


def test_more_chunks_than_the_receiver_has_are_refused_at_once(start_pair, engine):
    # Broken in production: the request waits for slots that can never be free.
    pair = start_pair(engine, sender_slots=16, receiver_slots=4)
    # A day: an answer within the client's own bound cannot have been waited for.
    pending = pair.sender.start_open(
        "large", keys_of("large", 5), last_chunk_tokens=1, receiver=pair.address, wait_s=86_400
    )
    text = refused(Kind.TOO_LARGE, lambda: pending.result(30))
    assert "5" in text and "4" in text
    data = content(8, 4, 1)
    ship(pair, "fits", data)
    check_arrived(pair, "fits", data)


def test_a_full_receiver_says_so_after_the_wait(start_pair, engine):
    # Broken in production: a full receiver is waited for without end.
    pair = start_pair(engine, receiver_slots=4)
    data = content(9, 4, 4)
    open_request(pair, "holder", 4, 4)
    refused(Kind.NO_SLOTS, lambda: open_request(pair, "late", 1, wait_s=0.2))
    slots = fill(pair, "holder", data)
    pair.sender.send("holder", slots, last=True)
    pair.sender.wait_sent("holder", 30)
    check_arrived(pair, "holder", data)


def test_a_cancelled_request_gives_its_slots_back(start_pair, engine):
    # Broken in production: every abort loses slots, until nothing can be sent.
    pair = start_pair(engine, sender_slots=4, receiver_slots=4)
    data = content(10, 4, CHUNK_TOKENS)
    for attempt in range(3):
        name = f"aborted-{attempt}"
        open_request(pair, name, 4)
        slots = fill(pair, name, data)
        if attempt:
            pair.sender.send(name, slots[:attempt], last=False)
        pair.sender.cancel(name)
        refused(Kind.UNKNOWN, lambda: pair.sender.cancel(name))
        refused(Kind.UNKNOWN, lambda: pair.sender.send(name, [], last=True))
    # All slots of both buffers are needed for this one.
    eventually(lambda: pair.receiver.status().slots_free == 4 and pair.sender.status().slots_free == 4)
    ship(pair, "after", data)
    check_arrived(pair, "after", data)
    assert pair.sender.poll_events() == []


def test_a_wait_can_be_cancelled_and_runs_out(start_pair, engine):
    # Broken in production: an aborted decode leaves a wait behind for good.
    pair = start_pair(engine)
    waiting = pair.receiver.start_wait("never", wait_s=60)
    pair.receiver.cancel("never")
    refused(Kind.CANCELLED, waiting.result)
    refused(Kind.DEADLINE, lambda: pair.receiver.wait("never", wait_s=0.1))


def test_two_requests_side_by_side_do_not_mix(start_pair, engine):
    # Broken in production: two prompts in one batch get each other's KV.
    pair = start_pair(engine, sender_slots=8, receiver_slots=8)
    names = ("a", "b")
    data = {name: content(seed, 3, 2 + seed % 5) for seed, name in enumerate(names, start=20)}
    opens = [
        pair.sender.start_open(
            name, keys_of(name, 3), last_chunk_tokens=len(data[name][-1]) // TOKEN_BYTES, receiver=pair.address
        )
        for name in names
    ]
    assert [pending.result().already_sent for pending in opens] == [[], []]
    slots = {name: {} for name in names}
    for position in (2, 0, 1):
        for name in names:
            slots[name][position] = fill(pair, name, data[name], [position])
    for position in (1, 2, 0):
        for name in reversed(names):
            pair.sender.send(name, slots[name][position], last=position == 0)
    assert {pair.sender.wait_sent(name, 30).req_id for name in names} == set(names)
    for name in names:
        check_arrived(pair, name, data[name])


def test_staging_waits_for_slots_and_goes_on(start_pair, engine):
    # Broken in production: an engine that computes faster than bytes leave fails instead of waiting.
    pair = start_pair(engine, sender_slots=4, receiver_slots=16)
    first, second = content(30, 3, 1), content(31, 3, 9)
    open_request(pair, "first", 3, 1)
    open_request(pair, "second", 3, 9)
    held = fill(pair, "first", first)
    refused(Kind.NO_SLOTS, lambda: pair.sender.stage("second", [0, 1], wait_s=0.1))
    refused(Kind.TOO_LARGE, lambda: open_and_stage_too_much(pair))
    waiting = pair.sender.start_stage("second", [0, 1, 2], wait_s=30)
    assert not waiting.done()
    pair.sender.send("first", held, last=True)
    for slot in waiting.result():
        pair.sender.view(slot)[:] = second[slot.chunk]
        pair.sender.send("second", [slot], last=False)
    pair.sender.send("second", [], last=True)
    for name, data in (("first", first), ("second", second)):
        pair.sender.wait_sent(name, 30)
        check_arrived(pair, name, data)


def open_and_stage_too_much(pair):
    open_request(pair, "too much", 5)
    try:
        pair.sender.stage("too much", range(5), wait_s=60)
    finally:
        pair.sender.cancel("too much")


def test_many_requests_leave_no_slot_behind(start_pair, engine):
    # Broken in production: a slot lost in a thousand requests stops the service after a day.
    pair = start_pair(engine, sender_slots=4, receiver_slots=4)
    for number in range(40):
        data = content(100 + number, 1 + number % 4, 1 + number % CHUNK_TOKENS)
        ship(pair, f"r{number}", data)
        check_arrived(pair, f"r{number}", data)
    sender, receiver = pair.sender.status(), pair.receiver.status()
    assert (sender.requests_done, sender.requests_active, sender.slots_free) == (40, 0, 4)
    assert (receiver.requests_done, receiver.requests_active) == (40, 0)
    assert receiver.slots_reserved == receiver.slots_quarantined == 0


def test_a_client_that_vanishes_loses_its_request_and_the_daemon_stays(start_pair, engine):
    # Broken in production: an engine that crashes takes the sidecar's slots with it.
    pair = start_pair(engine, sender_slots=4, receiver_slots=4)
    open_request(pair, "orphan", 4)
    pair.sender.stage("orphan", range(4))
    pair.sender._channel.close()
    with type(pair.sender)(pair.prefill.ready.connector) as again:
        pair.sender = again
        eventually(lambda: again.status().slots_free == 4 and pair.receiver.status().slots_free == 4)
        data = content(40, 4, 2)
        ship(pair, "next", data)
        check_arrived(pair, "next", data)


def test_daemons_end_cleanly_on_sigterm(start_pair, engine):
    # Broken in production: a service manager has to kill the sidecar, and takes that for a crash.
    pair = start_pair(engine)
    data = content(50, 1, 1)
    ship(pair, "r", data)
    check_arrived(pair, "r", data)
    for client in (pair.sender, pair.receiver):
        client.close()
    assert (pair.prefill.terminate(), pair.decode.terminate()) == (0, 0)
    with pytest.raises(PdError):
        pair.sender.status()
