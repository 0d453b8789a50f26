"""Kills, stops and restarts daemons and connectors at random while requests flow, and checks every byte that arrives.

    make soak SECONDS=120

Both engines in turn. Prints what was done and seen, and exits 1 when a byte was wrong, a daemon ended by itself or with
another code than it should, or something was left behind. The seed it prints, given as PD_SEED, makes the same choices;
what the machine makes of them is its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "python"))

from pd_backend import Daemon, PdError, PeerAddress, ReceiverClient, SenderClient

WORKERS = 4
CHUNK_TOKENS = 16
LAYOUT = {
    "model": "tests/soak",
    "dtype": "bfloat16",
    "kv_heads": 2,
    "head_size": 64,
    "kv_planes": 2,
    "chunk_tokens": CHUNK_TOKENS,
    "groups": [{"name": "full", "layers": 8}, {"name": "sliding", "layers": 3}],
}
SETS = [
    "pd_buffer_size=32MiB",
    "pd_buffer_initial_size=2MiB",
    "pd_buffer_growth_step=1MiB",
    "pd_checksum=sampled",
    "pd_heartbeat_interval_sec=0.2",
    "pd_peer_timeout_sec=1",
    "pd_allocation_timeout_sec=5",
    "pd_write_timeout_sec=8",
    "pd_handshake_timeout_sec=3",
    "pd_commit_timeout_sec=3",
    "pd_retention_sec=5",
    "pd_wait_timeout_sec=15",
    "pd_max_clients=64",
]


def content(key: str, len_bytes: int) -> np.ndarray:
    """What a chunk holds: a function of its key, so that equal keys mean equal bytes."""
    start = int.from_bytes(key.encode()[-8:].rjust(8), "little") % 251
    return ((np.arange(len_bytes, dtype=np.uint32) * 7 + start) % 253).astype(np.uint8)


class Pair:
    """A sender and a receiver that are restarted in place."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.layout = folder / "layout.json"
        self.layout.write_text(json.dumps(LAYOUT))
        self.engine = engine
        self.address = PeerAddress(host="127.0.0.1", init_port=0, alloc_port=0)
        self.daemons = {"receiver": self.start("receiver")}
        ready = self.daemons["receiver"].ready
        self.address = PeerAddress(host="127.0.0.1", init_port=ready.init_port, alloc_port=ready.alloc_port)
        self.daemons["sender"] = self.start("sender")

    def start(self, role: str) -> Daemon:
        ports = [f"pd_peer_init_port={self.address.init_port}", f"pd_peer_alloc_port={self.address.alloc_port}"]
        arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(self.layout)]
        for key in (f"transfer_channel={self.engine}", *SETS, *(ports if role == "receiver" else [])):
            arguments += ["--set", key]
        binary = Path(os.environ.get("PD_BIN_DIR", TOP / "target" / "debug")) / f"pd-{role}"
        return Daemon(binary, arguments)


class Traffic:
    """Workers that send, read and check requests until they are told to stop."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.seed = seed
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self.work, args=(index,)) for index in range(WORKERS)]
        for thread in self.threads:
            thread.start()

    def work(self, index: int) -> None:
        rng = random.Random(self.seed * WORKERS + index)
        number = 0
        while not self.stop.is_set():
            try:
                sender_at, receiver_at = (self.pair.daemons[role].ready.connector for role in ("sender", "receiver"))
                with SenderClient(sender_at, reply_timeout_s=1) as sender:
                    with ReceiverClient(receiver_at, reply_timeout_s=1) as receiver:
                        # A connector that comes and goes, with what it holds.
                        for _ in range(rng.randint(1, 40)):
                            number += 1
                            if self.stop.is_set():
                                return
                            self.one_request(rng, sender, receiver, f"{index}-{number}")
            except PdError as error:
                self.count(f"ended: {error.kind}")
                time.sleep(0.02)

    def one_request(self, rng: random.Random, sender: SenderClient, receiver: ReceiverClient, name: str) -> None:
        groups = [group for group in (0, 1) for _ in range(rng.randint(1, 8))]
        rng.shuffle(groups)
        last_tokens = rng.randint(1, CHUNK_TOKENS)
        last = {group: max(at for at, other in enumerate(groups) if other == group) for group in groups}
        tokens = [last_tokens if last[group] == at else CHUNK_TOKENS for at, group in enumerate(groups)]
        shared = rng.random() < 0.3
        of = f"shared-{rng.randint(0, 3)}" if shared else name
        keys = [f"{group}-{count}-{at}-{of}" for at, (group, count) in enumerate(zip(groups, tokens))]
        wait = receiver.start_wait(name, wait_s=15)
        opened = sender.open(
            name, keys, last_chunk_tokens=last_tokens, receiver=self.pair.address, groups=groups, wait_s=4
        )
        missing = [at for at in range(len(keys)) if at not in opened.already_sent]
        if rng.random() < 0.05:
            sender.cancel(name)
            wait.abandon()
            return self.count("cancelled")
        slots = sender.stage(name, missing, wait_s=4) if missing else []
        for slot in slots:
            sender.view(slot)[:] = content(keys[slot.chunk], slot.len_bytes)
        sender.send(name, slots, last=True)
        sender.wait_sent(name, 20)
        with wait.result() as lease:
            for at, chunk in enumerate(lease.chunks):
                token_bytes = receiver.attached.groups[groups[at]].token_bytes
                expected = content(keys[at], tokens[at] * token_bytes)
                if chunk.key != keys[at] or not np.array_equal(lease.view(at), expected):
                    self.wrong.append(f"chunk {at} of {name}: {chunk}")
                self.count("bytes", chunk.len_bytes)
        self.count("verified")

    def count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.counts[what] += by

    def finish(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a connector hangs")


def harm(pair: Pair, rng: random.Random, wrong: list[str]) -> str:
    """Does something to one daemon. Returns what."""
    role = rng.choice(["sender", "receiver"])
    daemon = pair.daemons[role]
    what = rng.choice(["KILL", "KILL", "TERM", "STOP", "long STOP"])
    if what.endswith("STOP"):
        os.kill(daemon.pid, signal.SIGSTOP)
        time.sleep(rng.uniform(1.5, 3) if what == "long STOP" else rng.uniform(0.05, 0.6))
        os.kill(daemon.pid, signal.SIGCONT)
        if daemon.exit_code() is not None:
            wrong.append(f"{role} ended by itself with {daemon.exit_code()}: {daemon.stderr()[-500:]}")
    else:
        if what == "KILL":
            daemon.kill()
        elif (code := daemon.terminate(timeout_s=10)) != 0:
            wrong.append(f"{role} ended with {code} after SIGTERM: {daemon.stderr()[-500:]}")
        if "panicked" in daemon.stderr():
            wrong.append(f"{role} panicked: {daemon.stderr()[-500:]}")
        pair.daemons[role] = pair.start(role)
    return f"{role} {what}"


def soak(engine: str, seconds: float, seed: int) -> bool:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(engine, Path(folder))
        traffic = Traffic(pair, seed)
        harms: Counter[str] = Counter()
        recoveries: list[float] = []
        until = time.monotonic() + seconds
        time.sleep(1)
        while time.monotonic() < until:
            harms[harm(pair, rng, traffic.wrong)] += 1
            verified, harmed = traffic.counts["verified"], time.monotonic()
            while traffic.counts["verified"] == verified and time.monotonic() < harmed + 30:
                time.sleep(0.01)
            recoveries.append(time.monotonic() - harmed)
            time.sleep(rng.uniform(0.1, 1))
        traffic.finish()
        # What nobody fetched goes after the retention time; then nothing may be left.
        deadline, left = time.monotonic() + 20, None
        for role, client in (("sender", SenderClient), ("receiver", ReceiverClient)):
            with client(pair.daemons[role].ready.connector) as attached:
                while (left := attached.status()).buffer.used_bytes and time.monotonic() < deadline:
                    time.sleep(0.1)
            if left.buffer.used_bytes or left.slots_reserved or left.slots_quarantined or left.requests_active:
                traffic.wrong.append(f"left in the {role}: {left}")
        for role, daemon in pair.daemons.items():
            if (code := daemon.terminate(timeout_s=10)) != 0:
                traffic.wrong.append(f"{role} ended with {code} after SIGTERM")
    print(f"{engine}: seed {seed}, {seconds:.0f} s, {sum(harms.values())} harms: {dict(sorted(harms.items()))}")
    print(f"{engine}: {dict(sorted(traffic.counts.items()))}")
    print(
        f"{engine}: from a harm's end, or the replacement's ready line, to the next verified request: "
        f"median {sorted(recoveries)[len(recoveries) // 2]:.2f} s, longest {max(recoveries):.2f} s"
    )
    for text in traffic.wrong:
        print(f"{engine}: WRONG: {text}")
    if not traffic.counts["verified"]:
        print(f"{engine}: WRONG: nothing was verified")
    return bool(traffic.counts["verified"]) and not traffic.wrong


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(os.environ.get("PD_SEED", random.randrange(1 << 30)))
    engines = ["local"]
    if os.environ.get("NIXL_LIB_DIR") or (TOP / ".deps" / "nixl").is_dir():
        engines.append("nixl")
    else:
        print("no NIXL: run `scripts/setup-deps nixl` or set NIXL_LIB_DIR to soak that engine too")
    os.environ.setdefault("PD_LOG", "error")
    return 0 if all([soak(engine, seconds / len(engines), seed) for engine in engines]) else 1


if __name__ == "__main__":
    sys.exit(main())
