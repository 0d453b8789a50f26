"""What strangers can do to every open socket of both daemons, while an honest pair works."""

import random
import socket
import threading
from urllib.parse import urlsplit

import pytest

from test_end_to_end import check_arrived, content, ship
from waiting import PATIENCE_S

#: What a daemon may need beyond what it needed before, in KiB: the budget of a port for unfinished messages (128 MiB) on
#: each of its three ports, and what decoding takes.
GROWTH_KIB_MAX = 528 * 1024
LONGEST = 19 << 20
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
HTTP = b"GET /healthz HTTP/1.1\r\nHost: "


def frame(flags, announced, content=b""):
    return bytes([flags | 2]) + announced.to_bytes(8, "big") + content


def peak_kib(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def connect(where):
    if isinstance(where, int):
        return socket.create_connection(("127.0.0.1", where), timeout=PATIENCE_S)
    stranger = socket.socket(socket.AF_UNIX)
    stranger.settimeout(PATIENCE_S)
    stranger.connect(where.removeprefix("ipc://").replace("@", "\0", 1))
    return stranger


def throw(where, data, kept):
    """Says this on a connection of its own, which stays; that the daemon hangs up meanwhile is fine."""
    try:
        stranger = connect(where)
        kept.append(stranger)
        stranger.sendall(data)
    except OSError:
        pass


def garbage(seed):
    """One of everything, in an order of its own."""
    noise = random.Random(seed)
    shaken = GREETING + READY
    things = [noise.randbytes(noise.randrange(1, 3000)) for _ in range(10)]
    things += [shaken + noise.randbytes(noise.randrange(1, 300)) for _ in range(10)]
    things += [shaken + b"\x01\x00" + frame(0, 200, noise.randbytes(200)) for _ in range(20)]
    things += [shaken + frame(flags, length) for flags in (0, 1, 4) for length in (1 << 24, 1 << 36, (1 << 64) - 1)]
    things += [shaken[:cut] for cut in range(0, len(shaken), 9)]
    things += [HTTP, HTTP + b"x\r\n\r\n", b"GET /" + b"x" * 20_000, b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"]
    noise.shuffle(things)
    # Long ones that never end: far more than a daemon may take.
    return things + [shaken + b"\x01\x00" + frame(0, LONGEST, bytes(LONGEST - 1000)) for _ in range(12)]


@pytest.mark.parametrize("secret", [False, True], ids=["open", "secret"])
def test_garbage_at_every_socket_disturbs_nobody_and_fills_nothing(start_pair, secret, tmp_path):
    # Broken in production: a scan, or somebody who means harm, and requests fail or the host is out of memory.
    sets = ["pd_metrics_port=0", "pd_metrics_host=127.0.0.1"]
    if secret:
        path = tmp_path / "secret"
        path.write_text("a secret that nobody else has, 0123456789abcdef")
        path.chmod(0o600)
        sets.append(f"pd_shared_secret_file={path}")
    pair = start_pair("local", sender_sets=sets, receiver_sets=[*sets, "pd_peer_query_port=0"])
    daemons = (pair.prefill, pair.decode)
    ship(pair, "before", content(0, 2, 3))
    check_arrived(pair, "before", content(0, 2, 3))
    before = {daemon: peak_kib(daemon.ready.pid) for daemon in daemons}

    ports = pair.decode.ready
    sockets = [ports.init_port, ports.alloc_port, ports.query_port]
    assert all(sockets)
    sockets += [daemon.ready.connector for daemon in daemons]
    sockets += [urlsplit(daemon.ready.metrics).port for daemon in daemons]
    kept = []
    threads = [
        threading.Thread(target=lambda where=where, seed=seed: [throw(where, data, kept) for data in garbage(seed)])
        for seed, where in enumerate(sockets * 2)
    ]
    for thread in threads:
        thread.start()
    shipped = 0
    while shipped < 20 or (shipped < 2000 and any(thread.is_alive() for thread in threads)):
        data = content(shipped, 2, 3)
        ship(pair, f"r{shipped}", data)
        check_arrived(pair, f"r{shipped}", data)
        shipped += 1
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for daemon in daemons:
        address = urlsplit(daemon.ready.metrics)
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as probe:
            probe.sendall(HTTP + b"x\r\n\r\n")
            assert probe.recv(12) == b"HTTP/1.1 200"
        growth = peak_kib(daemon.ready.pid) - before[daemon]
        assert growth < GROWTH_KIB_MAX, f"{growth} KiB more"
    data = content(1, 2, 3)
    ship(pair, "after", data)
    check_arrived(pair, "after", data)
    for stranger in kept:
        stranger.close()
