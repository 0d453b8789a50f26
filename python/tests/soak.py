"""Kills, stops and restarts daemons and connectors while requests flow, and checks every byte that arrives.

    make soak SECONDS=120

Both engines in turn. Prints what was done and seen, and exits 1 when a byte was wrong, a daemon ended by itself or with
another code than it should, one that survived holds more files or memory than before, or something was left behind. The
seed it prints, given as PD_SEED, makes the same choices; what the machine makes of them is its own. `test_soak.py` is a
short form of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "python"), str(TOP / "python" / "tests")]

from pd_backend import Daemon, PeerAddress, ReceiverClient, SenderClient
from soak_connector import Order, Outcome

ROUTES = 3
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
    "pd_retention_sec=2",
    "pd_shutdown_timeout_sec=2",
    "pd_max_clients=64",
]
DAEMONS = ("sender", "receiver")
CONNECTORS = ("prefill", "decode")
#: What can happen to whom. A long stop is one after which a daemon's peer has given it up.
HARMS = [(victim, what) for victim in (*DAEMONS, *CONNECTORS) for what in ("KILL", "TERM", "STOP")]
HARMS += [(victim, "long STOP") for victim in DAEMONS]
#: A daemon may come to hold so much more while it lives, in files and in bytes: its buffer grows, allocators keep what
#: they had at the busiest moment.
FILES_MORE = 12
BYTES_MORE = 24 << 20


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


class Connector:
    """A prefill or a decode connector that is restarted when it is dead."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("soak_connector.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, order: Order) -> None:
        """Gives it an order. One that has died is replaced first."""
        with self.lock:
            if self.process.poll() is not None:
                self.bury()
                self.start()
            try:
                self.process.stdin.write(msgspec.json.encode(order) + b"\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass

    def hear(self, name: str) -> Outcome:
        """How the order ended. A connector that dies says nothing."""
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            return Outcome(name, "connector died")
        return msgspec.json.decode(line, type=Outcome)

    def bury(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass

    def finish(self) -> int:
        """Lets it end by itself."""
        with self.lock:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
            try:
                code = self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait()
            self.process.stdout.close()
            return code


@dataclass
class Tally:
    """What was seen, by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.counts[what] += by


class Route(threading.Thread):
    """Tells a prefill and a decode connector about one request after the other, as a router does."""

    def __init__(self, index: int, pair: Pair, seed: int, tally: Tally) -> None:
        super().__init__(name=f"route-{index}")
        self.index, self.pair, self.tally = index, pair, tally
        self.rng = random.Random(seed * ROUTES + index)
        self.connectors = {role: Connector(role) for role in CONNECTORS}
        self.stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            self.one_request(f"{self.index}-{number}")

    def one_request(self, name: str) -> None:
        rng = self.rng
        groups = [group for group in (0, 1) for _ in range(rng.randint(1, 8))]
        rng.shuffle(groups)
        last_tokens = rng.randint(1, CHUNK_TOKENS)
        last = {group: max(at for at, other in enumerate(groups) if other == group) for group in groups}
        tokens = [last_tokens if last[group] == at else CHUNK_TOKENS for at, group in enumerate(groups)]
        shared = rng.random() < 0.3
        of = f"shared-{rng.randint(0, 3)}" if shared else name
        keys = [f"{group}-{count}-{at}-{of}" for at, (group, count) in enumerate(zip(groups, tokens))]
        act = rng.choices(["send", "parts", "cancel", "vanish"], [70, 20, 5, 5])[0]
        receiver = self.pair.address
        order = Order(name, keys, groups, tokens, last_tokens, receiver, "", act)
        for connector, role in zip(CONNECTORS[::-1], DAEMONS[::-1]):
            order.connector = self.pair.daemons[role].ready.connector
            self.connectors[connector].tell(order)
        for connector in CONNECTORS:
            outcome = self.connectors[connector].hear(name)
            self.tally.add(f"{connector}: {outcome.end}")
            if outcome.wrong:
                self.tally.wrong.append(outcome.wrong)
            if outcome.end == "verified":
                self.tally.add("verified")
                self.tally.add("bytes", outcome.bytes)

    def finish(self) -> None:
        self.join(60)
        if self.is_alive():
            self.tally.wrong.append(f"{self.name} hangs")
            for connector in self.connectors.values():
                connector.process.kill()
        for role, connector in self.connectors.items():
            if (code := connector.finish()) not in (0, -signal.SIGKILL, -signal.SIGTERM):
                self.tally.wrong.append(f"a {role} connector ended with {code}")


@dataclass(frozen=True)
class Held:
    """What a daemon holds."""

    pid: int
    files: int
    bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        with open(f"/proc/{pid}/status") as status:
            anonymous = next(line for line in status if line.startswith("RssAnon:"))
        return cls(pid, len(os.listdir(f"/proc/{pid}/fd")), int(anonymous.split()[1]) * 1024)


class Soak:
    """One engine, harmed for a while."""

    def __init__(self, engine: str, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.pair = Pair(engine, folder)
        self.routes = [Route(index, self.pair, seed, self.tally) for index in range(ROUTES)]
        self.harms: Counter[tuple[str, str]] = Counter()
        self.recoveries: list[float] = []
        #: What each daemon held when it had served its first requests.
        self.held: dict[str, Held] = {}
        #: The most that any came to hold beyond that.
        self.files_more = self.bytes_more = 0

    @property
    def wrong(self) -> list[str]:
        return self.tally.wrong

    def choices(self) -> Iterator[tuple[str, str]]:
        """Every harm once, in any order; then every harm again in another."""
        while True:
            yield from self.rng.sample(HARMS, len(HARMS))

    def run(self, seconds: float, harms_min: int = 0) -> None:
        """Harms until the time is over and `harms_min` have been done, then looks at what is left."""
        for route in self.routes:
            route.start()
        self.wait_for_verified(since=0)
        self.weigh()
        until = time.monotonic() + seconds
        for victim, what in self.choices():
            if self.wrong or (time.monotonic() >= until and self.harms.total() >= harms_min):
                break
            self.harm(victim, what)
            self.harms[victim, what] += 1
            self.recoveries.append(self.wait_for_verified(since=self.tally.counts["verified"]))
            self.weigh()
            time.sleep(self.rng.uniform(0.05, 0.3))
        self.finish()

    def wait_for_verified(self, since: int) -> float:
        """How long it took until another request was verified."""
        started = time.monotonic()
        while self.tally.counts["verified"] == since:
            if time.monotonic() > started + 40:
                self.wrong.append("nothing was verified for 40 s")
                break
            time.sleep(0.01)
        return time.monotonic() - started

    def harm(self, victim: str, what: str) -> None:
        length = self.rng.uniform(1.3, 2) if what == "long STOP" else self.rng.uniform(0.05, 0.5)
        if victim in CONNECTORS:
            connector = self.rng.choice(self.routes).connectors[victim]
            # Its route replaces it when it has died.
            with connector.lock:
                process = connector.process
                if process.poll() is not None:
                    return
                if what.endswith("STOP"):
                    self.pause(process.pid, length)
                else:
                    process.send_signal(getattr(signal, f"SIG{what}"))
            return
        daemon = self.pair.daemons[victim]
        if what.endswith("STOP"):
            self.pause(daemon.pid, length)
            if daemon.exit_code() is not None:
                self.wrong.append(f"{victim} ended by itself with {daemon.exit_code()}: {daemon.stderr()[-500:]}")
            return
        if what == "KILL":
            daemon.kill()
        elif (code := daemon.terminate(timeout_s=20)) != 0:
            self.wrong.append(f"{victim} ended with {code} after SIGTERM: {daemon.stderr()[-500:]}")
        if "panicked" in daemon.stderr():
            self.wrong.append(f"{victim} panicked: {daemon.stderr()[-500:]}")
        self.pair.daemons[victim] = self.pair.start(victim)

    @staticmethod
    def pause(pid: int, seconds: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def weigh(self) -> None:
        """Compares what daemons hold with what the same processes held at first."""
        for role, daemon in self.pair.daemons.items():
            try:
                now = Held.by(daemon.pid)
            except FileNotFoundError:
                self.wrong.append(f"{role} ended by itself with {daemon.exit_code()}: {daemon.stderr()[-500:]}")
                continue
            first = self.held.get(role)
            if first is None or first.pid != now.pid:
                self.held[role] = now
                continue
            self.files_more = max(self.files_more, now.files - first.files)
            self.bytes_more = max(self.bytes_more, now.bytes - first.bytes)
            if now.files > first.files + FILES_MORE or now.bytes > first.bytes + BYTES_MORE:
                self.wrong.append(f"{role} held {first}, and now {now}")

    def finish(self) -> None:
        for route in self.routes:
            route.stop.set()
        for route in self.routes:
            route.finish()
        # What nobody fetched goes after the retention time; then nothing may be left.
        deadline, left = time.monotonic() + 30, None
        for role, client in (("sender", SenderClient), ("receiver", ReceiverClient)):
            with client(self.pair.daemons[role].ready.connector) as attached:
                while self.is_held(left := attached.status()) and time.monotonic() < deadline:
                    time.sleep(0.1)
            if self.is_held(left):
                self.wrong.append(f"left in the {role}: {left}")
        self.weigh()
        for role, daemon in self.pair.daemons.items():
            if (code := daemon.terminate(timeout_s=20)) != 0:
                self.wrong.append(f"{role} ended with {code} after SIGTERM")
        if not self.tally.counts["verified"]:
            self.wrong.append("nothing was verified")

    @staticmethod
    def is_held(status: object) -> bool:
        return bool(
            status.buffer.used_bytes or status.slots_reserved or status.slots_quarantined or status.requests_active
        )


def left_behind(before: set[str]) -> list[str]:
    """Shared memory that was not there before, and children of this process, dead or alive.

    What a living process has mapped is another program's, if no child is left.
    """
    deadline = time.monotonic() + 10
    while True:
        left = [f"/dev/shm/{name}" for name in shared_memory() - before if not is_mapped(name)] + children()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def is_mapped(name: str) -> bool:
    """Whether a process that we can see into has this shared memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}\n" in maps.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False


def children() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(") ", 1)[1].split()[1] == str(os.getpid()):
                found.append(f"process {entry.name}: {(entry / 'comm').read_text().strip()}")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def shared_memory() -> set[str]:
    """UCX's, which is all that has a name: other programs on this machine have theirs."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("ucx")}


def engines() -> list[str]:
    """Those that this machine has."""
    if os.environ.get("NIXL_LIB_DIR") or (TOP / ".deps" / "nixl").is_dir():
        return ["local", "nixl"]
    print("no NIXL: run `scripts/setup-deps nixl` or set NIXL_LIB_DIR to soak that engine too")
    return ["local"]


def report(engine: str, seconds: float, seed: int, soak: Soak) -> None:
    done: dict[str, Counter[str]] = {}
    for (victim, what), count in soak.harms.items():
        done.setdefault(what, Counter())[victim] += count
    print(f"{engine}: seed {seed}, {seconds:.0f} s, {soak.harms.total()} harms")
    for what, by_victim in sorted(done.items()):
        print(f"{engine}: {what}: {dict(sorted(by_victim.items()))}")
    print(f"{engine}: {dict(sorted(soak.tally.counts.items()))}")
    recoveries = sorted(soak.recoveries)
    if recoveries:
        print(
            f"{engine}: from a harm's end, or the replacement's ready line, to the next verified request: "
            f"median {recoveries[len(recoveries) // 2]:.2f} s, longest {recoveries[-1]:.2f} s"
        )
    print(f"{engine}: no daemon came to hold more than {soak.files_more} files and {soak.bytes_more} bytes beyond its first")
    for text in soak.wrong:
        print(f"{engine}: WRONG: {text}")


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(os.environ.get("PD_SEED", random.randrange(1 << 30)))
    os.environ.setdefault("PD_LOG", "error")
    good = True
    here = engines()
    for engine in here:
        before = shared_memory()
        with tempfile.TemporaryDirectory() as folder:
            soak = Soak(engine, seed, Path(folder))
            soak.run(seconds / len(here))
        soak.wrong.extend(f"left behind: {what}" for what in left_behind(before))
        report(engine, seconds / len(here), seed, soak)
        good &= not soak.wrong
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
