"""The daemon of one worker: launched, watched, started again within a bound, and taken down with the engine."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from ..client import Client
from ..daemon import Daemon, ReadyLine
from ..errors import DaemonGone, DaemonStartError, PdError
from .attacher import Attacher
from .rank import port_args

logger = logging.getLogger("vllm.pd_backend")

C = TypeVar("C", bound=Client)


class Supervisor(Generic[C]):
    """Keeps one daemon running, and a client attached to it.

    The daemon is started, watched and restarted by a thread of its own: Linux ends a daemon with the thread that
    started it, and an idle engine runs no code of ours that could notice that it has gone.
    """

    def __init__(
        self,
        binary: Path,
        args: Sequence[str],
        layout: Mapping[str, Any],
        client_type: type[C],
        *,
        ready_timeout_s: float = 60.0,
        restarts_max: int = 3,
        restart_window_s: float = 60.0,
        wait_timeout_s: float = 120.0,
        silence_timeout_s: float = 10.0,
        echo_log: bool = True,
        given_up: Callable[[PdError], None] = lambda _why: None,
    ) -> None:
        """Starts it and returns when it is ready and attached to. Raises `DaemonStartError`, with the end of its log, or
        why it cannot be attached to. `given_up` is called, in a thread, when a daemon that has run is not started again.

        `wait_timeout_s`: the longest that the daemon's configuration lets it wait for others. `silence_timeout_s`: how
        long it may answer nothing.
        """
        self._binary = binary
        self._given_args = self._args = list(args)
        self._layout = dict(layout)
        self._client_type = client_type
        self._ready_timeout_s = ready_timeout_s
        self._restarts_max = restarts_max
        self._restart_window_s = restart_window_s
        self._wait_timeout_s = wait_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._echo_log = echo_log
        self._given_up = given_up
        #: Whether a daemon has been ready.
        self._has_run = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._daemon: Daemon | None = None
        self._error: PdError | None = None
        self._attacher: Attacher[C] = Attacher(binary.name, self._attach)
        self._thread = threading.Thread(target=self._watch, name=f"{binary.name}-supervisor", daemon=True)
        try:
            self._thread.start()
            # The deadlines of the daemon's start and of the client end this wait.
            self._attacher.wait()
            if self._error is not None:
                raise self._error
            self._attacher.ready()
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> ReadyLine:
        """Of the daemon that `client` is a client of. Raises as `client` does."""
        return self._attacher.ready()

    def client(self) -> C:
        """A client of the daemon that runs, for one thread. Never waits.

        Raises `DaemonLost` while there is none, which is soon over; or, after too many restarts, `DaemonStartError`.
        """
        return self._attacher.client()

    def lost(self, client: C, why: PdError) -> None:
        """Nobody uses this client any more, and nothing of its buffer. It is closed beside the engine's steps, and the
        daemon, where it lives, attached to anew; until then `client` raises `why`."""
        self._attacher.lost(client, why)

    @property
    def metrics_port(self) -> int | None:
        """Where the daemon of the latest start serves its metrics; None if it serves none."""
        with self._lock:
            daemon = self._daemon
        url = daemon.ready.metrics if daemon is not None and daemon.is_ready else None
        return None if url is None else urlsplit(url).port

    @property
    def failed(self) -> bool:
        """Whether it has ended too often, and is not started again."""
        return self._error is not None

    def close(self) -> None:
        """Detaches, ends the daemon, one that is being started as well, and returns when it has ended. Closing twice does
        nothing."""
        self._stop.set()
        self._attacher.detach()
        with self._lock:
            daemon = self._daemon
        if daemon is not None:
            # One that is not ready serves nobody yet, and does not listen yet either.
            daemon.close() if daemon.is_ready else daemon.interrupt()
        if self._thread.ident is not None:
            self._thread.join()
        self._attacher.join()

    def _attach(self, ready: ReadyLine) -> C:
        return self._client_type(
            ready.connector,
            name=f"vllm pid {os.getpid()}",
            wait_timeout_s=self._wait_timeout_s,
            silence_timeout_s=self._silence_timeout_s,
            pid=ready.pid,
            populate=False,
        )

    def _watch(self) -> None:
        """The thread: start, wait for the end, start again."""
        restarts: deque[float] = deque()
        while not self._stop.is_set():
            try:
                daemon = self._start()
            except PdError as error:
                if not self._stop.is_set():
                    self._give_up(error)
                return
            except Exception as error:  # A thread that ends in silence would leave the engine waiting.
                self._give_up(DaemonStartError(f"{self._binary} could not be started: {error}", None, ""))
                return
            self._has_run = True
            self._attacher.started(daemon.ready)
            code = daemon.wait()
            self._attacher.ended(DaemonGone(f"{self._binary.name} has ended and is being started again"))
            daemon.close()
            if self._stop.is_set():
                return
            now = time.monotonic()
            restarts.append(now)
            while restarts and now - restarts[0] > self._restart_window_s:
                restarts.popleft()
            if len(restarts) > self._restarts_max:
                self._give_up(
                    DaemonStartError(
                        f"{self._binary.name} has ended {len(restarts)} times within {self._restart_window_s:g} s, the "
                        f"last time with exit code {code}, and is not started again "
                        f"(restarts_max = {self._restarts_max}); restart the engine",
                        code,
                        daemon.stderr(),
                    )
                )
                return
            logger.error(
                "%s has ended with exit code %s; starting it again (%d of %d within %g s)",
                self._binary.name, code, len(restarts), self._restarts_max, self._restart_window_s,
            )

    def _start(self) -> Daemon:
        folder = Path(tempfile.mkdtemp(prefix="pd-layout-"))
        try:
            layout = folder / "layout.json"
            layout.write_text(json.dumps(self._layout), encoding="utf-8")
            daemon = Daemon(
                self._binary,
                [*self._args, "--kv-layout", str(layout)],
                ready_timeout_s=None,
                echo_stderr=self._echo_log,
            )
            try:
                with self._lock:
                    self._daemon = daemon
                if self._stop.is_set():
                    daemon.interrupt()
                self._keep_ports(daemon.wait_ready(self._ready_timeout_s))
            except BaseException:
                daemon.kill()
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        logger.info("%s is ready: %s", self._binary.name, daemon.ready)
        return daemon

    def _keep_ports(self, ready: ReadyLine) -> None:
        """Routers and other servers know the ports by now: a later daemon takes those of the first, also where any were asked
        for."""
        ports = {
            "pd_peer_init_port": ready.init_port,
            "pd_peer_alloc_port": ready.alloc_port,
            "pd_rendezvous_port": ready.rendezvous_port,
        }
        self._args = list(self._given_args)
        for key, port in ports.items():
            if port is not None:
                self._args += port_args(key, port, int(self._layout.get("tp_rank", 0)))

    def _give_up(self, error: PdError) -> None:
        logger.error("%s", error)
        self._error = error
        # Without the daemon's log, which was shown once and is nothing for a request's answer.
        self._attacher.ended(DaemonStartError(error.text, getattr(error, "exit_code", None), ""))
        if self._has_run:
            self._given_up(error)
