"""Daemons that die beside a worker, are started again, or are not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import binary, children
from fake_daemon import FakeDaemon
from free_ports import free_ports
from pd_backend import Client, PdBuffer, ReceiverClient, SenderClient
from pd_backend.errors import DaemonLost, DaemonStartError, MappingError, ReplyTimeout
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.layout import EngineLayout
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep, ReceivePlan
from pd_backend.vllm.supervisor import Supervisor
from pd_backend.vllm.weights import Weights
from pd_backend.vllm.whereabouts import DaemonAt, Whereabouts
from vllm_pair import BLOCK, BLOCK_BYTES, CHUNK, LAYERS, LAYOUT, Pair, load, pair, restarted
from waiting import eventually


def test_a_daemon_that_dies_fails_its_requests_and_comes_back(pair: Callable[..., Pair]) -> None:
    # Broken in production: an engine hangs, or has to be restarted, because its daemon died.
    both = pair()
    tokens = list(range(16))
    first = both.receiver.ready
    weights = Weights("w", None)
    whereabouts = Whereabouts(0, both.receiver, weights)
    assert (whereabouts.news(), whereabouts.news()) == (DaemonAt.here(0, first, "w"), None)
    both.consumer.begin_step(load("a", tokens, [5, 6]))
    os.kill(first.pid, signal.SIGKILL)
    assert both.consume(ConsumerStep(), "a") == {5, 6}
    restarted(both.receiver, first.pid)
    # Where it was, for routers know its ports.
    again = both.receiver.ready
    assert (again.init_port, again.alloc_port) == (first.init_port, first.alloc_port)
    # The scheduler, which looks chunks up there, is told before anybody asks for anything.
    assert (whereabouts.news(), whereabouts.news()) == (DaemonAt.here(0, again, "w"), None)
    # And of other weights, by which it has to ask.
    weights.last = "v"
    assert (whereabouts.news(), whereabouts.news()) == (DaemonAt.here(0, again, "v"), None)
    old_sender = both.sender.ready.pid
    both.produce(ProducerStep(plans=[both.plan("b", tokens)]))
    os.kill(old_sender, signal.SIGKILL)
    error = both.ended("b")
    assert error is not None and "daemon_gone" in error
    assert both.produce(ProducerStep(finishing=["b"])) == {"b"}
    restarted(both.sender, old_sender)
    both.produce(ProducerStep(plans=[both.plan("c", tokens)], chunks=[ChunkBlocks("c", 0, [0, 1])], finishing=["c"]))
    assert both.ended("c") is None
    assert both.consume(load("c", tokens, [3, 4]), "c") == set()
    assert whereabouts.news() is None
    assert (both.target.kv[:, 3:5] == both.source.kv[:, :2]).all()
    both.nothing_left()


def test_a_receiver_of_another_rank_comes_back_where_it_was() -> None:
    # Broken in production: only the first rank's receiver is started again, and every request fails from then on.
    layout = EngineLayout("tests/worker", CHUNK, BLOCK, BLOCK_BYTES, LAYERS, tp_rank=1, tp_size=2)
    ports = free_ports(4)
    arguments = ["--rank", "1"]
    for key in (
        "transfer_channel=local", f"pd_buffer_size={layout.chunk_bytes}", "pd_peer_host=127.0.0.1",
        f"pd_peer_init_port={ports[:2]}", f"pd_peer_alloc_port={ports[2:]}",
    ):
        arguments += ["--set", key]
    with ExitStack() as stack:
        watched = Supervisor(binary("pd-receiver"), arguments, layout.json(), ReceiverClient, echo_log=False)
        stack.callback(watched.close)
        for _ in range(2):
            pid = watched.ready.pid
            os.kill(pid, signal.SIGKILL)
            restarted(watched, pid)
            assert (watched.ready.init_port, watched.ready.alloc_port) == (ports[1], ports[3])


def test_a_sender_comes_back_where_it_was_asked_for_parked_chunks() -> None:
    # Broken in production: after a restart decode servers ask at a port where nobody is, of which prefill has told them.
    arguments = []
    for key in ("transfer_channel=local", f"pd_buffer_size={LAYOUT.chunk_bytes}", "pd_rendezvous_port=0"):
        arguments += ["--set", key]
    with ExitStack() as stack:
        watched = Supervisor(binary("pd-sender"), arguments, LAYOUT.json(), SenderClient, echo_log=False)
        stack.callback(watched.close)
        port, pid = watched.ready.rendezvous_port, watched.ready.pid
        os.kill(pid, signal.SIGKILL)
        restarted(watched, pid)
        assert watched.ready.rendezvous_port == port


def test_nothing_is_loaded_from_a_receiver_started_later(pair: Callable[..., Pair]) -> None:
    # Broken in production: chunks that were ready before a crash are read from the slots of the next receiver, where
    # nothing or another request's KV is, and the answer is wrong.
    both = pair()
    tokens, keys = list(range(16)), ("a", "c")
    for request_id in keys:
        plan = both.plan(request_id, tokens)
        both.produce(ProducerStep(plans=[plan], chunks=[ChunkBlocks(request_id, 0, [0, 1])], finishing=[request_id]))
        assert both.ended(request_id) is None
        # The engine has no blocks for it yet.
        both.consumer.begin_step(ConsumerStep(announced=[(request_id, f"router-{request_id}")]))
    eventually(lambda: all(both.consumer._requests[request_id].arriving.done() for request_id in keys))
    pid = both.receiver.ready.pid
    os.kill(pid, signal.SIGKILL)
    restarted(both.receiver, pid)
    both.consumer.begin_step(ConsumerStep(announced=[("b", "router-b")]))
    # Its lease cannot be given back, which is no trouble of the engine's.
    both.consumer.begin_step(ConsumerStep(unneeded=["c"]))
    plan = ReceivePlan("a", "router-a", chunk_hashes(tokens, CHUNK), len(tokens), 0, [5, 6])
    assert both.consume(ConsumerStep(loads=[plan]), "a") == {5, 6}
    both.consumer.begin_step(ConsumerStep(dropped=["b"]))
    both.nothing_left()


def test_nothing_is_written_for_a_sender_that_has_gone_into_the_next_ones_buffer(pair: Callable[..., Pair]) -> None:
    # Broken in production: a request that had slots of a sender that crashed fills those of another request at the
    # next sender, and that one is answered from the wrong KV.
    both = pair()
    tokens = list(range(16))
    both.producer.begin_step(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [0, 1])]))
    both.polled_until(lambda: both.producer._requests["a"].chunks[0].slot)
    pid = both.sender.ready.pid
    os.kill(pid, signal.SIGKILL)
    restarted(both.sender, pid)
    both.produce(ProducerStep(plans=[both.plan("b", tokens)]))
    assert both.source.gathered == []
    error = both.ended("a")
    assert error is not None and "daemon_gone" in error


def test_a_sender_that_dies_again_at_once_fails_its_requests_alone(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken in production: the engine ends because the daemon ended a second time, while it attached to it.
    both = pair()
    pid = both.sender.ready.pid
    both.produce(ProducerStep(plans=[both.plan("a", list(range(16)))]))
    asked = threading.Event()

    def refuse(*_: Any, **__: Any) -> SenderClient:
        asked.set()
        raise ReplyTimeout("nobody answers")

    with monkeypatch.context() as patched:
        patched.setattr(both.sender, "_client_type", refuse)
        os.kill(pid, signal.SIGKILL)
        assert asked.wait(20)
        both.produce(ProducerStep(plans=[both.plan("b", list(range(16)))]))
        outcomes = both.producer.outcomes()
        assert outcomes is not None and set(outcomes.ended) == {"a", "b"}
    restarted(both.sender, pid)
    both.produce(ProducerStep(finishing=["a", "b"]))
    plan = both.plan("c", list(range(16)))
    both.produce(ProducerStep(plans=[plan], chunks=[ChunkBlocks("c", 0, [0, 1])], finishing=["c"]))
    assert both.ended("c") is None


def test_a_daemon_that_dies_too_often_stays_down(pair: Callable[..., Pair]) -> None:
    # Broken in production: a daemon that cannot run is started for ever, and nobody is told.
    both = pair()
    for _ in range(2):
        pid = both.sender.ready.pid
        os.kill(pid, signal.SIGKILL)
        restarted(both.sender, pid)
    os.kill(both.sender.ready.pid, signal.SIGKILL)
    eventually(lambda: both.sender.failed)
    plan = both.plan("a", list(range(16)))
    for _ in range(2):
        pid = both.receiver.ready.pid
        os.kill(pid, signal.SIGKILL)
        restarted(both.receiver, pid)
    os.kill(both.receiver.ready.pid, signal.SIGKILL)
    eventually(lambda: both.receiver.failed)
    # The engine goes on, and its requests fail by themselves.
    assert both.consume(load("a", list(range(16)), [5, 6]), "a") == {5, 6}
    assert both.consume(load("b", list(range(16)), [3, 4], named=False), "b") == {3, 4}
    both.produce(ProducerStep(plans=[plan]))
    error = both.ended("a")
    assert error is not None and "has ended 3 times within 3600 s" in error and "restart the engine" in error
    # Each request is told so in a line, and none makes the error longer: a leak for as long as it is down.
    assert "\n" not in error
    raised = []
    for _ in range(2):
        with pytest.raises(DaemonStartError) as refused:
            both.sender.client()
        raised.append(len(refused.traceback))
    assert raised[0] == raised[1]


def test_whoever_has_to_know_is_told_when_a_daemon_is_given_up_and_not_while_it_restarts() -> None:
    # Broken in production: a server answers 200 to /health for days while its every request fails; or it is taken down because
    # its daemon was started again.
    told: list[DaemonLost | DaemonStartError] = []
    arguments = ["--set", "pd_buffer_size=1MiB", "--set", "transfer_channel=local"]
    watched: Supervisor[Any] = Supervisor(
        binary("pd-sender"), arguments, LAYOUT.json(), SenderClient, echo_log=False, restarts_max=1, restart_window_s=3600,
        given_up=told.append,
    )
    pid = watched.ready.pid
    os.kill(pid, signal.SIGKILL)
    restarted(watched, pid)
    assert not told and not watched.failed
    os.kill(watched.ready.pid, signal.SIGKILL)
    eventually(lambda: told)
    assert len(told) == 1 and "restart the engine" in str(told[0]) and watched.failed
    watched.close()
    # One that has never run is an error of the start, which says so itself.
    with pytest.raises(DaemonStartError):
        Supervisor(
            binary("pd-sender"), ["--set", "pd_buffer_size=none"], LAYOUT.json(), SenderClient, echo_log=False,
            given_up=told.append,
        )
    assert len(told) == 1


def test_a_daemon_that_cannot_start_says_why() -> None:
    # Broken in production: the engine waits for a daemon that has told nobody why it ended.
    with pytest.raises(DaemonStartError) as refused:
        Supervisor(binary("pd-sender"), ["--set", "pd_bufer_size=1GiB"], LAYOUT.json(), SenderClient, echo_log=False)
    assert refused.value.exit_code == 2 and "pd_buffer_size" in str(refused.value)


@pytest.fixture
def played(fake: Callable[..., FakeDaemon], tmp_path: Path) -> Callable[..., Supervisor[Any]]:
    """A supervisor of a script whose connector is that of a fake daemon. Started again, it is never ready."""
    daemon = fake("sender")
    path = tmp_path / "pd-played"
    path.write_text(
        f"""#!{sys.executable}
import json, os, sys, time
pids = {str(tmp_path / "pids")!r}
again = os.path.exists(pids)
print(os.getpid(), file=open(pids, "a"), flush=True)
if not again:
    ready = dict(event="ready", role="sender", pid=os.getpid(), connector={daemon.endpoint!r}, chunk_bytes=1, slot_count=1)
    print(json.dumps(ready), flush=True)
time.sleep(600)
"""
    )
    path.chmod(0o700)
    return lambda **options: Supervisor(path, [], LAYOUT.json(), SenderClient, echo_log=False, **options)


def pids_of(tmp_path: Path, count: int) -> list[int]:
    """Of the processes of a played daemon, once there are so many."""
    path = tmp_path / "pids"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(pid) for pid in path.read_text().split()]


def test_closing_ends_a_daemon_that_is_being_started_again(
    played: Callable[..., Supervisor[Any]], tmp_path: Path
) -> None:
    # Broken in production: an engine that stops while its daemon starts again stops later, and leaves the daemon with
    # the memory of its buffer.
    # It would wait for its ready line for far longer than the test takes.
    watched = played(ready_timeout_s=600.0)
    os.kill(pids_of(tmp_path, 1)[0], signal.SIGKILL)
    _, starting = pids_of(tmp_path, 2)
    watched.close()
    assert not Path(f"/proc/{starting}").exists()
    assert not [thread for thread in threading.enumerate() if "pd-played" in thread.name]
    with pytest.raises(DaemonLost):
        watched.client()


def test_no_step_attaches_to_a_daemon(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken in production: an engine serves nobody for seconds, because a daemon beside it was started again and its step
    # waits until it has answered, and until its buffer is mapped and the old one unmapped.
    here: list[str] = []
    for made, name in ((Client, "_attach"), (Client, "_map_buffer"), (Client, "close"), (PdBuffer, "populate")):

        def seen(self: Any, *args: Any, name: str = name, made: Any = getattr(made, name), **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                here.append(name)
            return made(self, *args, **kwargs)

        monkeypatch.setattr(made, name, seen)
    both = pair()
    tokens = list(range(16))
    for supervisor in (both.sender, both.receiver):
        old = supervisor.client()
        pid = supervisor.ready.pid
        os.kill(pid, signal.SIGKILL)
        restarted(supervisor, pid)
        plan = both.plan(str(pid), tokens)
        chunks = [ChunkBlocks(str(pid), 0, [0, 1])]
        both.produce(ProducerStep(plans=[plan], chunks=chunks, finishing=[str(pid)]))
        assert both.ended(str(pid)) is None
        assert both.consume(load(str(pid), tokens, [5, 6]), str(pid)) == set()
        deadline = time.monotonic() + 20
        while old._channel._socket is not None:
            assert time.monotonic() < deadline, "it was not closed"
            time.sleep(0.001)
    assert here == []


def test_a_client_that_cannot_be_made_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: an engine that does not start leaves a daemon behind, with the memory of its buffer.
    def refuse(*_: object, **__: object) -> None:
        raise MappingError("it lies in another namespace")

    monkeypatch.setattr(PdBuffer, "__init__", refuse)
    arguments = ["--set", "pd_buffer_size=1MiB", "--set", "transfer_channel=local"]
    with pytest.raises(MappingError, match="another namespace"):
        Supervisor(binary("pd-sender"), arguments, LAYOUT.json(), SenderClient, echo_log=False)
    assert children("pd-sender") == []


def test_closing_ends_the_daemon_and_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: an engine that stops leaves its daemon and a folder in /tmp behind.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    watched = Supervisor(
        binary("pd-sender"),
        ["--set", "pd_buffer_size=1MiB", "--set", "transfer_channel=local"],
        LAYOUT.json(),
        SenderClient,
        echo_log=False,
    )
    assert watched.client().attached.role == "sender"
    pid = watched.ready.pid
    watched.close()
    watched.close()
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.iterdir()) == []
