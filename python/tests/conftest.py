"""Fixtures: a fake daemon in this process, and real ones in processes of their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
# The package need not be installed to be tested.
sys.path[:0] = [str(TOP / "python"), str(TOP / "python" / "tests")]

from fake_daemon import FakeDaemon
from free_ports import free_ports
from pd_backend import Daemon, PeerAddress, ReceiverClient, SenderClient, find_binary
from pd_backend.errors import DaemonStartError
from waiting import DEADLINES, PATIENCE_S

# 2 planes x 2 layers x 1 head x 8 elements x 2 bytes = 64 bytes a token, 1024 bytes a chunk.
LAYOUT = {
    "model": "tests/tiny",
    "dtype": "bfloat16",
    "layers": 2,
    "kv_heads": 1,
    "head_size": 8,
    "kv_planes": 2,
    "chunk_tokens": 16,
    "tp_rank": 0,
    "tp_size": 1,
}
TOKEN_BYTES = 64
CHUNK_TOKENS = 16
CHUNK_BYTES = TOKEN_BYTES * CHUNK_TOKENS

#: How clients wait for daemons that get little of the processors.
PATIENTLY = {"reply_timeout_s": PATIENCE_S}


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeDaemon]]:
    """Makes fake daemons, and ends them after the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(FakeDaemon(*args, **kwargs))


def binary(name: str) -> Path:
    """The daemon under test: PD_BIN_DIR, then target/debug, then target/release. Absent: the test fails."""
    if "PD_BIN_DIR" in os.environ:
        return find_binary(name)
    for build in ("debug", "release"):
        try:
            return find_binary(name, TOP / "target" / build)
        except DaemonStartError:
            continue
    pytest.fail(f"{name} is in neither target/debug nor target/release: run `scripts/cargo build`, or set PD_BIN_DIR")


def children(name: str) -> list[int]:
    """This process's children that run such a program."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except OSError:
            continue  # It has ended meanwhile.
        program, rest = rest.rsplit(") ", 1)
        if program == name and rest.split()[1] == str(os.getpid()):
            found.append(int(pid))
    return found


@dataclass
class Pair:
    """A pd-sender and a pd-receiver with their clients."""

    prefill: Daemon
    decode: Daemon
    sender: SenderClient
    receiver: ReceiverClient
    address: PeerAddress
    start_sender: Callable[[], Daemon]
    start_receiver: Callable[[PeerAddress], Daemon]
    stack: ExitStack

    def restart_receiver(self) -> None:
        """Another receiver on the ports of the first, which has ended."""
        self.receiver.close()
        self.decode = self.start_receiver(self.address)
        self.receiver = self.stack.enter_context(ReceiverClient(self.decode.ready.connector, **PATIENTLY))

    def restart_sender(self) -> None:
        """Another sender in the place of the first, which has ended."""
        self.sender.close()
        self.prefill = self.start_sender()
        self.sender = self.stack.enter_context(SenderClient(self.prefill.ready.connector, **PATIENTLY))


@pytest.fixture
def layout_file(tmp_path: Path) -> Path:
    """The tiny layout."""
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    return path


@pytest.fixture
def start_pair(layout_file: Path) -> Iterator[Callable[..., Pair]]:
    """Starts pairs with the given engine and slots, and ends them after the test."""

    with ExitStack() as stack:

        def start(
            engine: str,
            sender_slots: int = 8,
            receiver_slots: int = 8,
            *,
            sender_sets: Sequence[str] = (),
            receiver_engine: str | None = None,
            receiver_layout: dict[str, object] | None = None,
            layout: dict[str, object] | None = None,
            receiver_sets: Sequence[str] = (),
            env: dict[str, str] | None = None,
            receiver_env: dict[str, str] | None = None,
            told: bool = False,
        ) -> Pair:
            def daemon(
                role: str, engine: str, slots: int, layout: Path, sets: Sequence[str], env: dict[str, str] | None
            ) -> Daemon:
                arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(layout)]
                for key in (f"transfer_channel={engine}", f"pd_buffer_size={slots * CHUNK_BYTES}", *DEADLINES, *sets):
                    arguments += ["--set", key]
                return stack.enter_context(Daemon(binary(f"pd-{role}"), arguments, ready_timeout_s=PATIENCE_S, env=env))

            ours = layout_file
            ours.write_text(json.dumps(LAYOUT | (layout or {})))
            theirs = layout_file.with_name("receiver.json")
            theirs.write_text(json.dumps(LAYOUT | (layout or {}) | (receiver_layout or {})))

            def start_receiver(at: PeerAddress) -> Daemon:
                ports = [f"pd_peer_init_port={at.init_port}", f"pd_peer_alloc_port={at.alloc_port}"]
                engine_there = receiver_engine or engine
                env_there = receiver_env or env
                return daemon("receiver", engine_there, receiver_slots, theirs, [*ports, *receiver_sets], env_there)

            def start_sender() -> Daemon:
                named = [f"pd_receivers=[127.0.0.1:{init_port}:{alloc_port}]"] if told else []
                return daemon("sender", engine, sender_slots, layout_file, [*named, *sender_sets], env)

            # Ports that it can have again when it is restarted.
            init_port, alloc_port = free_ports(2)
            address = PeerAddress(host="127.0.0.1", init_port=init_port, alloc_port=alloc_port)
            decode = start_receiver(address)
            prefill = start_sender()
            return Pair(
                prefill,
                decode,
                stack.enter_context(SenderClient(prefill.ready.connector, **PATIENTLY)),
                stack.enter_context(ReceiverClient(decode.ready.connector, **PATIENTLY)),
                address,
                start_sender,
                start_receiver,
                stack,
            )

        yield start


def nixl_found() -> bool:
    """Whether NIXL's library is where the daemons look for it."""
    return bool(os.environ.get("NIXL_LIB_DIR")) or (TOP / ".deps" / "nixl").is_dir()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nixl: needs NIXL: skipped without it, or failed where PD_REQUIRE_NIXL=1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nixl") is not None:
        need_nixl()


def need_nixl() -> None:
    """Skips the running test where NIXL is missing, or fails it with PD_REQUIRE_NIXL=1."""
    if nixl_found():
        return
    if os.environ.get("PD_REQUIRE_NIXL") == "1":
        pytest.fail("PD_REQUIRE_NIXL=1, but there is no NIXL in .deps/nixl, and NIXL_LIB_DIR names none")
    pytest.skip("no NIXL: run `scripts/setup-deps nixl` or set NIXL_LIB_DIR, then again")
