"""Whether an engine starts whose pd-sender is told of receivers: against scripted daemons and a real pair."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from conftest import binary
from fake_daemon import FakeDaemon
from free_ports import free_ports
from pd_backend import Client, NodeClient, PeerAddress, ReceiverClient, ReceiverStatus, SenderClient, Status
from pd_backend import messages as m
from pd_backend.vllm.layout import EngineLayout
from pd_backend.vllm.pairing import ReceiverRefused, connect_receivers
from pd_backend.vllm.supervisor import Supervisor
from waiting import DEADLINES, PATIENCE_S


def status(states: Iterable[str]) -> Status:
    """Of a sender that was told of one receiver for each of these: a state, and where it has one its failure."""
    usage = m.BufferUsage(0, 0, 0, 0, 0, 0, [])
    receivers = []
    for i, (state, *why) in enumerate(said.split(": ", 2) for said in states):
        receivers.append(ReceiverStatus(PeerAddress("10.0.0.2", 7300 + i, 7400), state, m.Failure(*why) if why else None))
    return Status("sender", "local", 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, usage, receivers=receivers)


def says(*answers: list[str]) -> Callable[[m.Request], Iterator[m.Reply]]:
    """Answers each status with the next of these, and then with the last for ever."""
    left = list(answers)

    def script(request: m.Request) -> Iterator[m.Reply]:
        states = left.pop(0) if len(left) > 1 else left[0]
        yield m.StatusReply(id=request.id, status=status(states))

    return script


def asked(fake: Callable[..., FakeDaemon], *answers: list[str], wait_s: float = PATIENCE_S) -> int:
    """How often the daemon was asked until it was known."""
    daemon = fake("sender", says(*answers))
    with SenderClient(daemon.endpoint) as client:
        connect_receivers(client, wait_s)
    return len(daemon.seen_of(m.StatusQuery))


def test_who_is_told_of_nobody_waits_for_nobody(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: every engine starts two seconds later, whether it was told of receivers or not.
    assert asked(fake, []) == 1


def test_an_engine_waits_for_an_answer_and_not_for_a_receiver_that_is_not_there(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: the engine serves before it is known whether it can, or never where decode starts later.
    nobody = "unreachable: peer_unreachable: nobody listens"
    assert asked(fake, ["connecting", "connecting"], ["connecting", "connected"], ["connected", "connected"]) == 3
    assert asked(fake, ["connecting", "connected"], [nobody, "connected"]) == 2
    began = time.monotonic()
    asked(fake, ["connecting"], wait_s=0.2)
    assert time.monotonic() - began < PATIENCE_S, "a receiver that does not answer holds the engine up"


def test_all_that_refuse_are_named_with_both_values(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: an engine serves whose every request fails, or is restarted once for each wrong receiver.
    first = "refused: layout_mismatch: dtype is float16 at r and bfloat16 at s"
    second = "refused: handshake_refused: the secret is another"
    with pytest.raises(ReceiverRefused) as caught:
        asked(fake, ["connecting", second], [first, second])
    assert caught.value.kind == "layout_mismatch"
    assert caught.value.text == (
        "receiver 10.0.0.2:7300/7400: dtype is float16 at r and bfloat16 at s; "
        "receiver 10.0.0.2:7301/7400: the secret is another"
    )


@pytest.mark.parametrize("other", ["connected", "unreachable: peer_unreachable: nobody listens", "refused: limit: it is full"])
def test_a_receiver_that_refuses_beside_others_is_left_alone(
    fake: Callable[..., FakeDaemon], caplog: pytest.LogCaptureFixture, other: str
) -> None:
    # Broken in production: decode servers are upgraded one after the other, and until the last of them no prefill server starts.
    newer = "refused: layout_mismatch: engine.vllm is 0.33.0 at r and 0.32.0 at s"
    with caplog.at_level(logging.ERROR, "vllm.pd_backend"):
        assert asked(fake, [newer, other]) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == (
        "layout_mismatch: receiver 10.0.0.2:7300/7400: engine.vllm is 0.33.0 at r and 0.32.0 at s: its requests fail; others are "
        "served"
    )


def test_a_receiver_that_is_full_is_no_reason_not_to_start(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: a prefill server cannot be restarted while a decode server is busy.
    assert asked(fake, ["refused: limit: 8 senders are connected and busy, the limit; raise pd_max_peers"]) == 1


@pytest.fixture
def start() -> Iterator[Callable[..., Supervisor[Any]]]:
    """Starts a daemon with a release of vLLM's beside it, as the connector does."""
    with ExitStack() as stack:

        def supervisor(role: str, client: type[Client], release: str, *sets: str) -> Supervisor[Any]:
            layout = EngineLayout("tests/worker", 16, 8, 64, 4, engine={"vllm": release})
            arguments = []
            for key in ("transfer_channel=local", "pd_buffer_size=1MiB", *DEADLINES, *sets):
                arguments += ["--set", key]
            watched = Supervisor(binary(role), arguments, layout.json(), client, echo_log=False)
            stack.callback(watched.close)
            return watched

        yield supervisor


@pytest.mark.parametrize("both", [False, True], ids=["one part", "both parts"])
def test_a_real_pair_meets_or_refuses_without_a_request(start: Callable[..., Supervisor[Any]], both: bool) -> None:
    # Broken in production: two releases of vLLM are paired, and users find out.
    init_port, alloc_port = free_ports(2)
    ports = (f"pd_peer_init_port={init_port}", f"pd_peer_alloc_port={alloc_port}")
    sends, receives = SenderClient, ReceiverClient
    named_both: tuple[str, ...] = ()
    if both:
        sends = receives = NodeClient
        ports += ("pd_role=both",)
        named_both = ("pd_role=both", "pd_peer_init_port=0", "pd_peer_alloc_port=0")
    named = f"pd_receivers=[127.0.0.1:{init_port}:{alloc_port}]"
    alone = start("pd-sender", sends, "0.32.0", named, *named_both)
    began = time.monotonic()
    connect_receivers(alone.client(), wait_s=10 * PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S, "nobody is there, and it waits all the same"
    assert [receiver.state for receiver in alone.client().status().receivers] == ["unreachable"]
    start("pd-receiver", receives, "0.32.0", *ports)
    connect_receivers(start("pd-sender", sends, "0.32.0", named, *named_both).client(), wait_s=PATIENCE_S)
    newer = start("pd-sender", sends, "0.33.0", named, *named_both)
    with pytest.raises(ReceiverRefused) as caught:
        connect_receivers(newer.client(), wait_s=PATIENCE_S)
    assert caught.value.kind == "layout_mismatch"
    assert f"receiver 127.0.0.1:{init_port}/{alloc_port}: engine.vllm is " in caught.value.text
    assert "0.32.0 at " in caught.value.text and "0.33.0 at " in caught.value.text, caught.value.text
