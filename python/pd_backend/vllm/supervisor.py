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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..client import Client
from ..daemon import Daemon, ReadyLine
from ..errors import DaemonGone, DaemonStartError, PdError

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
        echo_log: bool = True,
    ) -> None:
        """Starts it and returns when it is ready. Raises `DaemonStartError`, with the end of its log.

        `wait_timeout_s`: the longest that the daemon's configuration lets it wait for others.
        """
        self._binary = binary
        self._given_args = self._args = list(args)
        self._layout = dict(layout)
        self._client_type = client_type
        self._ready_timeout_s = ready_timeout_s
        self._restarts_max = restarts_max
        self._restart_window_s = restart_window_s
        self._wait_timeout_s = wait_timeout_s
        self._echo_log = echo_log
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._daemon: Daemon | None = None
        self._error: PdError | None = None
        #: Set while there is news that `client` has not looked at: a daemon that came, or that will not come back.
        self._first = threading.Event()
        self._client: C | None = None
        self._client_of: Daemon | None = None
        self._thread = threading.Thread(target=self._watch, name=f"{binary.name}-supervisor", daemon=True)
        self._thread.start()
        # The daemon's own deadline ends this wait.
        self._first.wait()
        if self._daemon is None:
            self._thread.join()
            raise self._error or DaemonStartError(f"{binary} did not start", None, "")

    @property
    def ready(self) -> ReadyLine:
        """Of the daemon that runs. Raises `DaemonGone` while there is none."""
        return self._running().ready

    def client(self) -> C:
        """A client of the daemon that runs, attached anew after a restart; for one thread.

        Raises `DaemonGone` while there is none, which is soon over or, after too many restarts, final.
        """
        daemon = self._running()
        if self._client is None or self._client_of is not daemon:
            self._drop_client()
            self._client = self._client_type(
                daemon.ready.connector,
                name=f"vllm pid {os.getpid()}",
                wait_timeout_s=self._wait_timeout_s,
                pid=daemon.ready.pid,
            )
            self._client_of = daemon
        return self._client

    @property
    def failed(self) -> bool:
        """Whether it has ended too often, and is not started again."""
        return self._error is not None

    def close(self) -> None:
        """Detaches, ends the daemon, and returns when it has ended. Closing twice does nothing."""
        self._drop_client()
        self._stop.set()
        with self._lock:
            daemon = self._daemon
        if daemon is not None:
            daemon.close()
        self._thread.join(timeout=15.0)

    def _running(self) -> Daemon:
        with self._lock:
            daemon, error = self._daemon, self._error
        if error is not None:
            # A new one each time, for an error that is raised again and again grows by its tracebacks; and without the
            # daemon's log, which was shown once and is nothing for a request's answer.
            raise DaemonStartError(error.text, getattr(error, "exit_code", None), "")
        if daemon is None or daemon.exit_code() is not None:
            raise DaemonGone(f"{self._binary.name} has ended and is being started again")
        return daemon

    def _drop_client(self) -> None:
        client, self._client, self._client_of = self._client, None, None
        if client is not None:
            client.close()

    def _watch(self) -> None:
        """The thread: start, wait for the end, start again."""
        restarts: deque[float] = deque()
        while not self._stop.is_set():
            try:
                daemon = self._start()
            except PdError as error:
                self._give_up(error)
                return
            except Exception as error:  # A thread that ends in silence would leave the engine waiting.
                self._give_up(DaemonStartError(f"{self._binary} could not be started: {error}", None, ""))
                return
            with self._lock:
                self._daemon = daemon
            self._first.set()
            code = daemon.wait()
            with self._lock:
                self._daemon = None
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
                ready_timeout_s=self._ready_timeout_s,
                echo_stderr=self._echo_log,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        ready = daemon.ready
        if ready.init_port and ready.alloc_port:
            # Routers know the ports by now: a later daemon takes those of the first, also where any were asked for.
            # It looks for them where its rank is in the list.
            ports = [
                f"{key}=[{', '.join([str(port)] * (1 + int(self._layout.get('tp_rank', 0))))}]"
                for key, port in (("pd_peer_init_port", ready.init_port), ("pd_peer_alloc_port", ready.alloc_port))
            ]
            self._args = [*self._given_args, *(word for port in ports for word in ("--set", port))]
        logger.info("%s is ready: %s", self._binary.name, ready)
        return daemon

    def _give_up(self, error: PdError) -> None:
        logger.error("%s", error)
        with self._lock:
            self._error = error
        self._first.set()
