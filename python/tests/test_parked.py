"""Requests whose prefill server does not know who will decode them: parked, asked for, given up."""

import os
import signal

import numpy as np
import pytest
from pd_backend import RequestRefused, SourceAddress

from conftest import CHUNK_TOKENS, TOKEN_BYTES
from test_end_to_end import ENGINES, check_arrived, content, fill, keys_of, open_request, refused, refused_kind
from waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.parametrize("engine", ENGINES)

RENDEZVOUS = "pd_rendezvous_port=0"


@pytest.fixture
def pair(start_pair, engine):
    return start_pair(engine, sender_sets=[RENDEZVOUS])


def source(pair):
    return SourceAddress(host="127.0.0.1", port=pair.prefill.ready.rendezvous_port)


def begin(pair, name, data, keys=None, ids=()):
    """Parks a request that is not filled yet; its slots."""
    keys = keys_of(name, len(data)) if keys is None else keys
    last_tokens = len(data[-1]) // TOKEN_BYTES
    opened = pair.sender.park(name, keys, last_chunk_tokens=last_tokens, ids=ids, wait_s=PATIENCE_S)
    missing = [index for index in range(len(data)) if index not in opened.already_sent]
    assert [slot.chunk for slot in opened.slots] == missing
    return opened.slots


def finish(pair, name, data, slots):
    for slot in slots:
        pair.sender.view(slot)[:] = data[slot.chunk]
    pair.sender.send(name, slots, last=True)
    parked = pair.sender.wait_sent(name, PATIENCE_S)
    assert parked.chunks == len(data)


def park(pair, name, data, keys=None, ids=()):
    finish(pair, name, data, begin(pair, name, data, keys, ids))


def check(lease, data, keys):
    with lease:
        assert [chunk.key for chunk in lease.chunks] == keys
        for index, expected in enumerate(data):
            assert np.array_equal(lease.view(index), expected), f"chunk {index} differs"


def test_what_is_parked_comes_when_it_is_asked_for(pair):
    # Broken in production: behind a router that names no receiver, decode computes every prompt once more.
    for number, (chunks, last_tokens) in enumerate([(1, 1), (3, 16), (5, 7)]):
        name, data = f"r{number}", content(number, chunks, last_tokens)
        keys = keys_of(name, chunks)
        park(pair, name, data, ids=[f"cmpl-{name}"])
        assert pair.sender.status().slots_parked > 0
        check(pair.receiver.fetch(f"f{number}", source(pair), keys, ids=[f"cmpl-{name}"], wait_s=PATIENCE_S), data, keys)
        # Another sample of the same prompt, or the same decode server again: it is still there.
        lease = pair.receiver.fetch(f"g{number}", source(pair), keys, wait_s=PATIENCE_S)
        check(lease, data, keys)
        pair.receiver.start_release_parked(f"f{number}", source(pair), [f"cmpl-{name}"]).result()
        eventually(lambda: pair.sender.status().slots_parked == 0)


def test_a_list_of_which_decode_knows_one_name_makes_room(start_pair, engine):
    # Broken in production: prefill answers for a list with the name of one of its prompts, and keeps the chunks of the others until
    # their leases end, sent or not.
    pair = start_pair(engine, sender_sets=[RENDEZVOUS, "pd_lease_sec=3600"])
    prompts = [(f"r{number}", content(number, 2, 5), keys_of(f"r{number}", 2)) for number in range(3)]
    for name, data, keys in prompts:
        park(pair, name, data, ids=[f"cmpl-{name}"])
    # Two are fetched, and the third decode has itself.
    for name, data, keys in prompts[:2]:
        check(pair.receiver.fetch(f"f-{name}", source(pair), keys, ids=["cmpl-r2"], wait_s=PATIENCE_S), data, keys)
    eventually(lambda: pair.sender.status().slots_parked == 2)
    _, _, keys = prompts[2]
    pair.receiver.start_release_parked("f-r2", source(pair), ["cmpl-r0"], keys[-1]).result()
    eventually(lambda: pair.sender.status().slots_parked == 0)


def test_chunks_go_out_while_the_rest_is_being_computed(pair):
    # Broken in production: nothing moves before prefill has ended, and decode waits for all of it afterwards.
    data, keys = content(1, 3, 5), keys_of("r", 3)
    slots = begin(pair, "r", data)
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S)
    pair.sender.view(slots[0])[:] = data[0]
    pair.sender.send("r", slots[:1], last=False)
    # The first is written before the others are there.
    eventually(lambda: pair.receiver.status().slots_reserved == 3)
    assert not asked.done()
    finish(pair, "r", data, slots[1:])
    check(asked.result(PATIENCE_S), data, keys)


def test_decode_may_ask_before_prefill_has_heard_of_it(pair):
    # Broken in production: asked at once, as routers do in push mode, decode is told that there is nothing.
    data, keys = content(2, 2, 9), keys_of("r", 2)
    assert refused_kind(lambda: pair.receiver.fetch("early", source(pair), keys, wait_s=PATIENCE_S)) == "unknown"
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S, register_wait_s=60)
    held = pair.receiver.start_hold("h", source(pair), keys, register_wait_s=60)
    held.result(PATIENCE_S)
    assert not asked.done()
    park(pair, "r", data)
    check(asked.result(PATIENCE_S), data, keys)


def test_what_is_here_of_a_prompt_comes_and_the_rest_is_a_miss(pair):
    # Broken in production: one chunk that prefill had to drop costs decode the whole prompt.
    data, keys = content(3, 2, CHUNK_TOKENS), keys_of("r", 4)
    park(pair, "r", data, keys[:2])
    lease = pair.receiver.fetch("f", source(pair), keys, ids=["anybody's"], wait_s=PATIENCE_S)
    check(lease, data, keys[:2])
    # A name alone brings nothing, whoever's it is.
    other = keys_of("other", 2)
    call = lambda: pair.receiver.fetch("g", source(pair), other, ids=["r"], wait_s=PATIENCE_S, register_wait_s=0.2)  # noqa: E731
    park(pair, "named", content(4, 1, 3), ids=["r"])
    assert refused_kind(call) == "unknown"


def test_prefixes_are_kept_once_and_sent_to_each(pair):
    # Broken in production: a shared prompt takes a buffer's room once for each request that has it.
    data = content(5, 3, CHUNK_TOKENS)
    park(pair, "a", data, ["k0", "k1", "k2"])
    used = pair.sender.status().slots_parked
    park(pair, "b", [*data[:2], content(6, 1, 4)[0]], ["k0", "k1", "b2"])
    assert pair.sender.status().slots_parked == used + 1
    keys = ["k0", "k1", "b2"]
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), [*data[:2], content(6, 1, 4)[0]], keys)


def test_a_lease_ends_and_room_is_there_again(start_pair, engine):
    # Broken in production: a client that left before decode was asked keeps prefill's buffer full.
    pair = start_pair(engine, sender_slots=2, sender_sets=[RENDEZVOUS, "pd_lease_sec=0.5"])
    park(pair, "a", content(7, 2, CHUNK_TOKENS))
    # No room but that of the first, and it is waited for.
    park(pair, "b", content(8, 2, CHUNK_TOKENS))
    assert refused_kind(lambda: pair.receiver.fetch("f", source(pair), keys_of("a", 2))) == "unknown"
    eventually(lambda: pair.sender.status().slots_parked == 0)
    eventually(lambda: pair.sender.status().slots_ready == 0)


def test_what_is_held_is_kept_beyond_its_lease(start_pair, engine):
    # Broken in production: a decode server that is busy for longer than the lease computes what was there for it.
    pair = start_pair(engine, sender_slots=2, sender_sets=[RENDEZVOUS, "pd_lease_sec=3"])
    data, keys = content(9, 2, 3), keys_of("a", 2)
    park(pair, "a", data)
    pair.receiver.start_hold("f", source(pair), keys).result(PATIENCE_S)
    # Nobody else gets the room, though the request's own lease ends meanwhile.
    text = refused("no_slots", lambda: pair.sender.park("b", keys_of("b", 2), last_chunk_tokens=1, wait_s=5))
    assert "sender has" in text
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)


def test_a_hold_leaves_what_is_asked_for_alone(pair):
    # Broken in production: a scheduler that holds what its worker fetches already makes the fetch run into its deadline.
    data, keys = content(19, 2, 3), keys_of("r", 2)
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S, register_wait_s=60)
    pair.receiver.start_hold("f", source(pair), keys, register_wait_s=60).result(PATIENCE_S)
    slots = begin(pair, "r", data)
    eventually(lambda: pair.receiver.status().slots_reserved == 2)
    pair.receiver.start_hold("f", source(pair), keys).result(PATIENCE_S)
    finish(pair, "r", data, slots)
    check(asked.result(PATIENCE_S), data, keys)


def test_a_release_ends_the_question_at_another_sender(pair):
    # Broken in production: what was asked for arrives for nobody, and holds slots until the retention time is over.
    data, keys = content(20, 1, 3), keys_of("r", 1)
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S, register_wait_s=60)
    # Its answer says that the sender has heard of the other as well.
    pair.receiver.start_hold("h", source(pair), keys, register_wait_s=60).result(PATIENCE_S)
    elsewhere = SourceAddress(host="127.0.0.1", port=1)
    pair.receiver.start_release_parked("f", elsewhere, []).result(PATIENCE_S)
    assert refused_kind(lambda: asked.result(PATIENCE_S)) == "cancelled"
    park(pair, "r", data)
    # The next question comes after what the first would have brought.
    check(pair.receiver.fetch("g", source(pair), keys, wait_s=PATIENCE_S), data, keys)
    assert pair.receiver.status().requests_active == 0


def test_a_request_that_prefill_gives_up_is_told_at_once(pair):
    # Broken in production: decode waits for its whole time for what nobody computes any more.
    data, keys = content(10, 2, 3), keys_of("r", 2)
    slots = begin(pair, "r", data, ids=["x"])
    pair.sender.view(slots[0])[:] = data[0]
    pair.sender.send("r", slots[:1], last=False)
    asked = pair.receiver.start_fetch("f", source(pair), keys, ids=["x"], wait_s=PATIENCE_S)
    eventually(lambda: pair.receiver.status().slots_reserved == 2)
    pair.sender.cancel("r")
    with pytest.raises(RequestRefused) as caught:
        asked.result(PATIENCE_S)
    assert caught.value.kind == "cancelled"
    eventually(lambda: pair.receiver.status().slots_quarantined == pair.receiver.status().slots_reserved == 0)
    eventually(lambda: pair.sender.status().slots_parked == 0)


def test_a_request_that_prefill_gave_up_before_decode_asked_is_told_at_once(pair):
    # Broken in production: decode waits its whole time for what prefill has aborted.
    begin(pair, "r", content(21, 2, 3), ids=["x"])
    pair.sender.cancel("r")
    asked = pair.receiver.start_fetch("f", source(pair), keys_of("r", 2), ids=["x"], wait_s=600, register_wait_s=600)
    text = refused("cancelled", lambda: asked.result(PATIENCE_S))
    assert "prefill gave r up" in text


def test_a_place_that_cannot_be_asked_is_refused_by_what_was_seen(pair):
    # Broken in production: a router leaves out a host or a port, and decode says that nobody answers there.
    for at in (SourceAddress(host="", port=5600), SourceAddress(host="127.0.0.1", port=0)):
        text = refused("bad_request", lambda at=at: pair.receiver.fetch("f", at, keys_of("r", 1), wait_s=PATIENCE_S))
        assert f'"{at.host}:{at.port}"; expected a host and a port that is not 0' in text


def test_a_decode_server_that_gives_up_or_goes_leaves_nothing(pair):
    # Broken in production: each client that hangs up costs slots at both ends.
    data, keys = content(11, 2, 3), keys_of("r", 2)
    slots = begin(pair, "r", data)
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S)
    eventually(lambda: pair.receiver.status().slots_reserved == 2)
    pair.receiver.cancel("f")
    with pytest.raises(RequestRefused):
        asked.result(PATIENCE_S)
    eventually(lambda: pair.receiver.status().slots_reserved == 0)
    finish(pair, "r", data, slots)
    pair.receiver.start_hold("h", source(pair), keys).result(PATIENCE_S)
    pair.receiver.start_fetch("never", source(pair), keys_of("never", 2), register_wait_s=60, wait_s=PATIENCE_S)
    pair.receiver.close()
    eventually(lambda: pair.sender.status().requests_active == 0)


def test_a_sender_that_dies_is_noticed_and_one_that_is_gone_is_named(pair, start_pair, engine):
    # Broken in production: after a restart of prefill, decode waits for what is lost.
    data, keys = content(12, 2, 3), keys_of("r", 2)
    begin(pair, "r", data)
    at = source(pair)
    asked = pair.receiver.start_fetch("f", at, keys, wait_s=PATIENCE_S)
    eventually(lambda: pair.receiver.status().slots_reserved == 2)
    waits = pair.receiver.start_fetch("w", at, keys_of("other", 2), wait_s=PATIENCE_S, register_wait_s=60)
    os.kill(pair.prefill.pid, signal.SIGKILL)
    for pending in (asked, waits):
        with pytest.raises(RequestRefused) as caught:
            pending.result(PATIENCE_S)
        assert caught.value.kind in ("peer_lost", "peer_unreachable"), caught.value
    text = refused("peer_unreachable", lambda: pair.receiver.fetch("g", at, keys, wait_s=PATIENCE_S))
    assert f"{at.host}:{at.port}" in text


def test_a_reset_voids_what_is_parked(pair):
    # Broken in production: after an update of the weights decode reads what the former ones computed.
    data, keys = content(13, 2, 3), keys_of("r", 2)
    park(pair, "r", data)
    pair.sender.reset()
    assert refused_kind(lambda: pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S)) == "unknown"
    assert pair.sender.status().slots_ready == 0
    park(pair, "r", data)
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)


def test_a_pair_that_does_not_fit_is_refused_by_name(start_pair, engine):
    # Broken in production: decode reads another layout's bytes, or waits for what cannot come.
    other = {"model": "tests/tiny", "dtype": "float16", "layers": 2, "kv_heads": 1, "head_size": 8, "kv_planes": 2}
    other |= {"chunk_tokens": 16, "tp_rank": 0, "tp_size": 1}
    pair = start_pair(engine, sender_sets=[RENDEZVOUS], receiver_layout=other)
    park(pair, "r", content(14, 1, 3))
    text = refused("layout_mismatch", lambda: pair.receiver.fetch("f", source(pair), keys_of("r", 1)))
    assert "dtype is float16" in text
    text = refused("too_large", lambda: pair.sender.park("big", keys_of("big", 9), last_chunk_tokens=16))
    assert "is to be parked" in text


def test_only_hosts_of_the_list_are_asked(start_pair, engine):
    # Broken in production: whoever reaches decode's HTTP port has its daemon connect to any host of the network.
    pair = start_pair(engine, sender_sets=[RENDEZVOUS], receiver_sets=["pd_prefill_hosts=[10.1.0.0/16, 127.0.0.1]"])
    data, keys = content(17, 1, 3), keys_of("r", 1)
    park(pair, "r", data)
    at = source(pair)
    for host in ("localhost", "10.2.0.1", "example.invalid"):
        elsewhere = SourceAddress(host=host, port=at.port)
        text = refused("bad_request", lambda: pair.receiver.fetch("f", elsewhere, keys, wait_s=PATIENCE_S))
        assert f"{host} is not among pd_prefill_hosts" in text
        with pytest.raises(RequestRefused):
            pair.receiver.start_release_parked("f", elsewhere, []).result()
    check(pair.receiver.fetch("f", at, keys, wait_s=PATIENCE_S), data, keys)


def test_a_request_has_so_many_names_and_no_more(pair):
    # Broken in production: whoever asks fills the sender's memory with names.
    data, keys, ids = content(18, 1, 3), keys_of("r", 1), [f"id-{number}" for number in range(17)]
    text = refused("limit", lambda: pair.sender.park("r", keys, last_chunk_tokens=3, ids=ids, wait_s=PATIENCE_S))
    assert "17 names, the limit is 16" in text
    park(pair, "r", data, ids=ids[:16])
    text = refused("limit", lambda: pair.receiver.fetch("f", source(pair), keys, ids=ids, wait_s=PATIENCE_S))
    assert "17 names, the limit is 16" in text
    check(pair.receiver.fetch("f", source(pair), keys, ids=ids[:16], wait_s=PATIENCE_S), data, keys)


def test_other_requests_go_on_beside_parked_ones(pair):
    # Broken in production: a router of each kind in front of one prefill server, and one of them is not served.
    data, keys = content(15, 2, 3), keys_of("parked", 2)
    park(pair, "parked", data)
    sent = content(16, 3, 4)
    open_request(pair, "sent", 3, 4)
    pair.sender.send("sent", fill(pair, "sent", sent), last=True)
    assert pair.sender.wait_sent("sent", PATIENCE_S).chunks == 3
    check_arrived(pair, "sent", sent)
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)
