"""Hosts of one machine: network namespaces that hang on one switch, each with processes, a name and /dev/shm of its own.

Needs root and iproute2. Nothing outside is touched: the switch is in a namespace too, and no address leads out of it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

AGENT = Path(__file__).with_name("agent.py")

_numbers = itertools.count()


class NotAllowed(Exception):
    """Why this machine cannot make hosts, and what would help."""


class Failed(Exception):
    """What went wrong on a host. `kind` is that of a request that was refused or has failed."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return Failed, (str(self), self.kind)


def run(*command: str) -> str:
    """What the command prints. Raises `RuntimeError` with what it has complained of."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def check_allowed() -> None:
    """Raises `NotAllowed` unless hosts can be made here."""
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        raise NotAllowed(f"{', '.join(missing)} not found: install iproute2 and util-linux")
    if os.geteuid() != 0:
        raise NotAllowed("network namespaces need root: run `sudo make hosts`")
    try:
        Network().close()
    except RuntimeError as error:
        raise NotAllowed(f"this kernel or container does not allow it ({error}): run it on a machine of your own") from None


class Network:
    """A switch, and the hosts on it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.switch = f"pd-{os.getpid()}-{next(_numbers)}-switch"
        self._add_namespace(self.switch)
        try:
            self._ip(self.switch, "link", "add", "bridge", "type", "bridge")
            self._ip(self.switch, "link", "set", "bridge", "up")
        except RuntimeError:
            self.close()
            raise
        self._count = 0

    def host(self, name: str, *, ipv6_only: bool = False, env: Mapping[str, str] | None = None) -> Host:
        """Another host on the switch, with an address of its own."""
        self._count += 1
        namespace = self.switch.replace("-switch", f"-{name}")
        self._add_namespace(namespace)
        port = f"port{self._count}"
        self._ip(self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._ip(self.switch, "link", "set", port, "master", "bridge")
        self._ip(self.switch, "link", "set", port, "up")
        address = f"fd00:7064::{self._count:x}" if ipv6_only else f"10.77.0.{self._count}"
        added = [f"{address}/64", "dev", "eth0", "nodad"] if ipv6_only else [f"{address}/24", "dev", "eth0"]
        self._ip(namespace, "address", "add", *added)
        for device in ("lo", "eth0"):
            self._ip(namespace, "link", "set", device, "up")
        host = Host(name, address, namespace, self.switch, port, env or {})
        self._stack.callback(host.close)
        return host

    def close(self) -> None:
        """Ends the hosts, with all that runs on them."""
        self._stack.close()

    def _add_namespace(self, name: str) -> None:
        run("ip", "netns", "add", name)
        self._stack.callback(run, "ip", "netns", "del", name)

    @staticmethod
    def _ip(namespace: str, *arguments: str) -> None:
        run("ip", "-n", namespace, *arguments)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


@dataclass
class Traffic:
    """Bytes that a host has sent to the switch, and got from it."""

    sent: int
    received: int


class Host:
    """One host. What the tests want of it, its agent does: the connector API is not seen from outside."""

    def __init__(
        self, name: str, address: str, namespace: str, switch: str, port: str, env: Mapping[str, str]
    ) -> None:
        self.name, self.address = name, address
        self._namespace, self._switch, self._port = namespace, switch, port
        self._env = dict(env)
        self._agent: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self.boot()

    def boot(self) -> None:
        """Starts it, or starts it again after `crash`: no process is left of what it was before."""
        ours, theirs = Pipe()
        # /proc and /dev/shm are mounted anew, so that nothing shows a process or a file of another host.
        setup = f"mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && hostname {self.name} && exec \"$@\""
        command = ["ip", "netns", "exec", self._namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount"]
        command += ["--uts", "--ipc", "sh", "-c", setup, "sh", sys.executable, str(AGENT), str(theirs.fileno())]
        environment = {**os.environ, **self._env}
        self._agent = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._pipe = ours
        theirs.close()

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """What this function of the agent returns. Raises `Failed` with what it has raised."""
        assert self._pipe is not None, f"{self.name} is down"
        self._pipe.send((name, arguments, named))
        try:
            ok, result = self._pipe.recv()
        except EOFError:
            raise Failed(f"the agent of {self.name} has ended") from None
        if ok:
            return result
        raise result

    def inside(self) -> list[str]:
        """Before a command of this machine: runs it on the host. It ends with the host."""
        assert self._agent is not None, f"{self.name} is down"
        children = Path(f"/proc/{self._agent.pid}/task/{self._agent.pid}/children").read_text().split()
        (first,) = children
        return ["nsenter", "--target", first, "--net", "--pid", "--mount", "--uts", "--ipc"]

    def crash(self) -> None:
        """The host is gone without a word: its link first, then every process that runs on it."""
        self.link("down")
        self._end(signal.SIGKILL)

    def link(self, state: str) -> None:
        """The switch's end of its cable: `up` or `down`."""
        run("ip", "-n", self._switch, "link", "set", self._port, state)

    def limit(self, rate: str | None) -> None:
        """Limits what it gets from the switch, as `100mbit`; None lifts the limit."""
        device = ["ip", "netns", "exec", self._switch, "tc", "qdisc"]
        if rate is None:
            run(*device, "del", "dev", self._port, "root")
        else:
            run(*device, "replace", "dev", self._port, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")

    def traffic(self) -> Traffic:
        """Counted by the switch, so what two processes of one host say to each other is not in it."""
        folder = ["ip", "netns", "exec", self._switch, "cat"]
        names = [f"/sys/class/net/{self._port}/statistics/{name}_bytes" for name in ("rx", "tx")]
        sent, received = (int(run(*folder, name)) for name in names)
        return Traffic(sent, received)

    def close(self) -> None:
        """Ends every process that runs on it."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._agent is not None:
            # Of `unshare`, whose end is that of the first process of the host, and so of all others.
            self._agent.send_signal(number)
            self._agent.wait(30)
            self._agent = None

