"""Who may talk: daemons with and without a shared secret, and strangers at the ports."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
import zmq

from conftest import CHUNK_BYTES, LAYOUT, TOP, binary
from pd_backend import Daemon, DaemonStartError, PeerAddress, SenderClient
from test_end_to_end import ENGINES, check_arrived, content, eventually, open_request, refused, ship
from waiting import PATIENCE_S

SECRET = "a secret that nobody else has, 0123456789abcdef"


@pytest.fixture
def secret_file(tmp_path):
    """Writes secrets into files of their own, and gives the option that names one."""

    def write(text=SECRET, mode=0o600):
        path = tmp_path / f"secret-{len(list(tmp_path.iterdir()))}"
        path.write_text(text + "\n")
        path.chmod(mode)
        return f"pd_shared_secret_file={path}"

    return write


def refused_at_once(pair, name, words):
    """The request is refused for who we are, not by the handshake's deadline, and the log of both daemons says so."""
    text = refused("handshake_refused", lambda: open_request(pair, name, 1))
    assert "pd_shared_secret_file" in text and str(pair.address.init_port) in text, text
    for word in words:
        assert word in text, text
    # Logs are written after the answers.
    for daemon in (pair.decode, pair.prefill):
        assert eventually(lambda daemon=daemon: "pd_shared_secret_file" in daemon.stderr())
    assert pair.receiver.status().peers == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pair_with_one_secret_ships_bytes(start_pair, engine, secret_file):
    # Broken in production: nobody can turn authentication on.
    both = [secret_file()]
    lazy = ["pd_buffer_initial_size=2048", "pd_buffer_growth_step=1024"]
    pair = start_pair(engine, 6, 6, sender_sets=both, receiver_sets=[*both, *lazy])
    for number in range(5):
        data = content(number, 1 + number, 3)
        ship(pair, f"r{number}", data)
        check_arrived(pair, f"r{number}", data)
    assert pair.receiver.status().peers == 1
    pair.decode.kill()
    pair.restart_receiver()
    data = content(9, 2, 5)
    eventually(lambda: pair.sender.status().peers == 0)
    ship(pair, "after a restart", data)
    check_arrived(pair, "after a restart", data)


@pytest.mark.parametrize(
    ("senders", "receivers", "words"),
    [
        (SECRET, SECRET[::-1], ["secret is another one"]),
        (SECRET, None, ["it has no pd_shared_secret_file and this side has one"]),
        (None, SECRET, ["it has a pd_shared_secret_file and this side has none"]),
    ],
    ids=["another", "receiver has none", "sender has none"],
)
def test_a_pair_with_different_secrets_says_so_at_once(start_pair, secret_file, senders, receivers, words):
    # Broken in production: the commonest mistake costs an afternoon, because it looks like a network that is down.
    def sets(secret):
        return [] if secret is None else [secret_file(secret)]

    pair = start_pair("local", sender_sets=sets(senders), receiver_sets=sets(receivers))
    for attempt in range(2):
        refused_at_once(pair, f"r{attempt}", words)


def test_ports_that_were_swapped_are_named(start_pair, secret_file):
    # Broken in production: a router that swaps the two ports of a receiver is found by reading packet dumps.
    both = [secret_file()]
    pair = start_pair("local", sender_sets=both, receiver_sets=both)
    right = pair.address
    pair.address = replace_address(right, init_port=right.alloc_port, alloc_port=right.init_port)
    text = refused("handshake_refused", lambda: open_request(pair, "swapped", 1))
    assert "ports that were swapped" in text, text
    pair.address = right
    ship(pair, "right", content(1, 1, 1))
    check_arrived(pair, "right", content(1, 1, 1))


def replace_address(address, **changes):
    fields = {"host": address.host, "init_port": address.init_port, "alloc_port": address.alloc_port}
    return PeerAddress(**(fields | changes))


class Recorder:
    """Somebody between two daemons, who passes everything on and keeps what went up."""

    def __init__(self, port, stack):
        self.recorded = []
        self._listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(port,), daemon=True).start()

    def _accept(self, port):
        while True:
            try:
                down, _ = self._listener.accept()
            except OSError:
                return
            up = socket.create_connection(("127.0.0.1", port))
            record = bytearray()
            self.recorded.append(record)
            threading.Thread(target=self._pass, args=(down, up, record), daemon=True).start()
            threading.Thread(target=self._pass, args=(up, down, None), daemon=True).start()

    @staticmethod
    def _pass(source, target, record):
        try:
            while piece := source.recv(65536):
                if record is not None:
                    record += piece
                target.sendall(piece)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def throw(port, data):
    """Sends these bytes on a connection of their own, and returns what comes back until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as stranger:
        heard = bytearray()
        try:
            stranger.sendall(data)
            while piece := stranger.recv(65536):
                heard += piece
        except ConnectionError:
            pass
    return bytes(heard)


@pytest.mark.parametrize("engine", ENGINES)
def test_strangers_and_recordings_change_nothing_for_others(start_pair, engine, secret_file, layout_file):
    # Broken in production: whoever has seen one session on the network repeats it, or stops everybody else's.
    both = [secret_file()]
    pair = start_pair(engine, sender_sets=both, receiver_sets=both)
    ports = (pair.address.init_port, pair.address.alloc_port)
    with ExitStack() as stack:
        # A second sender, whose sessions are seen.
        seen_by = [Recorder(port, stack) for port in ports]
        arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(layout_file)]
        for key in (f"transfer_channel={engine}", f"pd_buffer_size={4 * CHUNK_BYTES}", *both):
            arguments += ["--set", key]
        daemon = stack.enter_context(Daemon(binary("pd-sender"), arguments))
        client = stack.enter_context(SenderClient(daemon.ready.connector))
        init_port, alloc_port = (recorder.port for recorder in seen_by)
        through = replace_address(pair.address, init_port=init_port, alloc_port=alloc_port)
        watched = replace(pair, sender=client, address=through)
        ship(watched, "watched", content(1, 2, 3))
        check_arrived(pair, "watched", content(1, 2, 3))
        before = pair.receiver.status()
        assert before.peers == 1 and before.slots_reserved == 0
        recordings = [bytes(record) for recorder in seen_by for record in recorder.recorded]
        assert len(recordings) == 2 and all(len(recording) > 200 for recording in recordings)
        assert any(b"AllocRequest" in recording for recording in recordings)

        noise = random.Random(7)
        harms = [*recordings, *(recording[: len(recording) // 2] for recording in recordings)]
        harms += [noise.randbytes(noise.randrange(1, 2000)) for _ in range(20)]
        # As far as ZeroMQ is concerned all is well with these: the greeting and READY of the recording, then noise.
        start = recordings[0].index(b"PdAuthHello") - 10
        harms += [recordings[0][:start] + noise.randbytes(200) for _ in range(20)]
        throwing = threading.Thread(target=lambda: [throw_quietly(port, harm) for harm in harms for port in ports])
        throwing.start()
        number = 0
        while throwing.is_alive() or number < 10:
            data = content(number, 1 + number % 4, 3)
            ship(pair, f"honest-{number}", data)
            check_arrived(pair, f"honest-{number}", data)
            number += 1
        throwing.join()
        after = pair.receiver.status()
        assert after.requests_done == before.requests_done + number
        assert (after.requests_failed, after.slots_reserved, after.slots_quarantined) == (before.requests_failed, 0, 0)
        assert after.peers == 2, "the two honest senders"
        ship(watched, "still watched", content(5, 2, 3))
        check_arrived(pair, "still watched", content(5, 2, 3))


def throw_quietly(port, data):
    """As `throw`, for what may be the start of something: nobody is waited for."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
        stranger.settimeout(0.05)
        try:
            stranger.sendall(data)
            stranger.recv(65536)
        except (TimeoutError, ConnectionError):
            pass


def test_a_stock_peer_reads_a_refusal_and_nothing_that_it_could_write_with(start_pair, secret_file):
    # Broken in production: LMCache's own sender, or anybody who speaks its protocol, gets a receiver's descriptors.
    both = [secret_file()]
    pair = start_pair("local", sender_sets=both, receiver_sets=both)
    ship(pair, "before", content(1, 1, 1))
    recorded = sorted((TOP / "tests" / "fixtures" / "lmcache-wire").glob("*Request.bin"))
    assert len(recorded) >= 4, "LMCache's recorded messages"
    payloads = [path.read_bytes() for path in recorded] + [b"anything"]
    with zmq.Context() as context:
        for payload in payloads:
            for port in (pair.address.init_port, pair.address.alloc_port):
                with context.socket(zmq.DEALER) as stock:
                    stock.linger = 0
                    stock.rcvtimeo = int(PATIENCE_S * 1000)
                    stock.connect(f"tcp://127.0.0.1:{port}")
                    stock.send(payload)
                    answer = stock.recv()
                    assert answer == b"\x82\xa4type\xadPdAuthRefused\xa6reason\xadsecret_wanted"
    check_arrived(pair, "before", content(1, 1, 1))


def test_a_connection_that_says_nothing_is_closed(start_pair, secret_file):
    # Broken in production: connections that cost nothing take all places of a port.
    both = [secret_file(), "pd_handshake_timeout_sec=3"]
    pair = start_pair("local", sender_sets=both, receiver_sets=both)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    heard = throw(pair.address.alloc_port, greeting + bytes([4, len(ready)]) + ready)
    assert b"READY" in heard, "it was let in as far as ZeroMQ goes"
    assert eventually(lambda: "has not authenticated within 3000 ms" in pair.decode.stderr())
    assert "127.0.0.1" in next(line for line in pair.decode.stderr().splitlines() if "has not authenticated" in line)
    ship(pair, "after", content(1, 1, 1))


@pytest.mark.parametrize("role", ["sender", "receiver"])
@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (SECRET, 0o644, ["mode 0644", "chmod 0600"]),
        ("too short", 0o600, ["secret of 9 bytes", "32"]),
        ("", 0o600, ["secret of 0 bytes"]),
    ],
    ids=["others can read it", "too short", "empty"],
)
def test_a_bad_secret_file_ends_the_daemon_with_code_2(layout_file, secret_file, role, text, mode, words):
    # Broken in production: a daemon starts with a secret that is none, and nobody notices.
    layout_file.write_text(json.dumps(LAYOUT))
    arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(layout_file)]
    arguments += ["--set", "transfer_channel=local", "--set", secret_file(text, mode)]
    with pytest.raises(DaemonStartError) as caught:
        Daemon(binary(f"pd-{role}"), arguments)
    assert caught.value.exit_code == 2
    for word in ["pd_shared_secret_file", *words]:
        assert word in caught.value.stderr, caught.value.stderr
    if text:
        assert text not in caught.value.stderr


def test_the_secret_is_said_nowhere(start_pair, secret_file, layout_file, monkeypatch):
    # Broken in production: a log collector, a status page or a bug report hands the secret on.
    both = [secret_file()]
    monkeypatch.setenv("PD_LOG", "trace")
    pair = start_pair("local", sender_sets=both, receiver_sets=both)
    ship(pair, "r", content(1, 2, 3))
    check_arrived(pair, "r", content(1, 2, 3))
    said = [pair.prefill.stderr(), pair.decode.stderr()]
    said += [repr(pair.sender.status()), repr(pair.receiver.status())]
    said += [repr(pair.sender.attached), repr(pair.prefill.ready), repr(pair.decode.ready)]
    for role in ("sender", "receiver"):
        command = [binary(f"pd-{role}"), "--check", "--config", TOP / "configs" / "loopback.yaml"]
        command += ["--kv-layout", layout_file, "--set", both[0]]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert checked.returncode == 0 and "\npd_shared_secret_file: " in checked.stdout, checked.stderr
        said += [checked.stdout, checked.stderr]
    for text in said:
        assert SECRET not in text and SECRET.encode().hex() not in text
        assert not re.search(re.escape(str(list(SECRET.encode()))[1:40]), text), "as a list of numbers"


def test_another_user_gets_neither_the_connector_nor_the_buffer(start_pair):
    # Broken in production: any account of the machine reads the KV cache, or has it sent somewhere.
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: run the tests as root, in a container, for this one")
    pair = start_pair("local")
    ship(pair, "r", content(1, 1, 1))
    script = """
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[4]))
os.setuid(int(sys.argv[4]))
try:
    os.close(os.open(f"/proc/{sys.argv[2]}/fd/{sys.argv[3]}", os.O_RDONLY))
    print("buffer opened")
except OSError as error:
    print("buffer", error.strerror)
with socket.socket(socket.AF_UNIX) as connector:
    connector.settimeout(60)
    connector.connect(sys.argv[1].replace("ipc://@", "\\0"))
    try:
        print("connector", "greets" if connector.recv(1) else "hangs up")
    except ConnectionResetError:
        print("connector hangs up")
"""
    buffer = pair.receiver.attached.buffer
    for user, expected in (
        (0, "buffer opened\nconnector greets\n"),
        (65534, "buffer Permission denied\nconnector hangs up\n"),
    ):
        arguments = [pair.decode.ready.connector, *map(str, (buffer.pid, buffer.fd, user))]
        seen = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
        assert seen.stdout == expected, (user, seen)
