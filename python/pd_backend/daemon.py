"""Launches a pd-sender or pd-receiver, waits for its ready line, and takes it down again."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from .errors import DaemonStartError, PdError
from .messages import UNDECODABLE

_STDERR_LINES_KEPT = 200
_READY_LINE_LEN_BYTES_MAX = 64 * 1024
# Where a build may put the binaries beside the Python that starts them.
_PACKAGED = Path(__file__).parent / "bin"


class ReadyLine(msgspec.Struct, frozen=True):
    """The one line that a daemon prints on its standard output."""

    role: str
    pid: int
    #: Endpoint of the connector API.
    connector: str
    chunk_bytes: int
    slot_count: int
    #: Receiver: port of the handshake.
    init_port: int | None = None
    #: Receiver: port of allocations and commits.
    alloc_port: int | None = None
    #: Receiver: port of LMCache's cache queries, where one is configured.
    query_port: int | None = None
    #: Sender: port at which receivers ask for what is parked, where one is configured.
    rendezvous_port: int | None = None
    #: URL of the metrics, where they are served.
    metrics: str | None = None


def find_binary(name: str, directory: str | os.PathLike[str] | None = None) -> Path:
    """Where the program `name` is: in `directory` or `PD_BIN_DIR` where one is given, else in this package, else in `PATH`.

    Raises `DaemonStartError` that says where it looked.
    """
    given = directory or os.environ.get("PD_BIN_DIR")
    if given:
        found = shutil.which(name, path=os.fspath(given))
        where = f"in {os.fspath(given)}"
    else:
        found = shutil.which(name, path=os.fspath(_PACKAGED)) or shutil.which(name)
        where = f"in {_PACKAGED} or in PATH (PD_BIN_DIR is not set)"
    if found is None:
        raise DaemonStartError(
            f"{name} was not found {where}; build it with `make build` in the repository and set PD_BIN_DIR to its target/release",
            None,
            "",
        )
    return Path(found).absolute()


class Daemon:
    """A running daemon, and a context manager that ends it.

    The daemon is told to exit with its parent. Linux counts the *thread* that started it as the parent where the
    daemon asks for a parent-death signal: start it from a thread that lives as long as the daemon should.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str],
        args: Sequence[str] = (),
        *,
        ready_timeout_s: float | None = 30.0,
        stop_timeout_s: float = 10.0,
        exit_with_parent: bool = True,
        echo_stderr: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        """Starts `binary` with `args` and waits up to `ready_timeout_s` for its ready line. With None it does not wait, and
        `wait_ready` is to be called.

        `stop_timeout_s` is how long `close` lets it drain. `echo_stderr` copies its log to ours as it comes; the last
        lines are kept either way. `env` is added to this process's environment.

        Raises `DaemonStartError` with the exit code and the end of its standard error.
        """
        self.binary = os.fspath(binary)
        self._stop_timeout_s = stop_timeout_s
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES_KEPT)
        command = [self.binary, *args, *(["--exit-with-parent"] if exit_with_parent else [])]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=None if env is None else {**os.environ, **env},
            )
        except OSError as error:
            raise DaemonStartError(f"cannot start {self.binary}: {error.strerror}", None, "") from error
        # A pipe that nobody reads would stop the daemon once it is full.
        self._drain = threading.Thread(target=self._drain_stderr, args=(echo_stderr,), name="pd-stderr", daemon=True)
        try:
            self._drain.start()
            if ready_timeout_s is not None:
                self.wait_ready(ready_timeout_s)
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, timeout_s: float) -> ReadyLine:
        """Waits for its ready line, which is `ready` from then on. Raises as the constructor does, and ends it then."""
        try:
            #: What the daemon said of itself.
            self.ready: ReadyLine = self._read_ready_line(timeout_s)
        except BaseException:
            self.kill()
            raise
        return self.ready

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it is."""
        return hasattr(self, "ready")

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll()

    def wait(self) -> int:
        """Waits for its end, without a deadline. Its exit code."""
        return self._process.wait()

    def stderr(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._lines)

    def terminate(self, timeout_s: float | None = None) -> int:
        """SIGTERM: the daemon drains and exits. Killed when that takes longer than `timeout_s`. Its exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._stop_timeout_s if timeout_s is None else timeout_s)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def interrupt(self) -> None:
        """SIGKILL, from any thread: what waits for it in another one comes back."""
        self._process.kill()

    def kill(self) -> int:
        """SIGKILL, unless it has ended. Its exit code."""
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if self._drain.is_alive():
            self._drain.join(timeout=1.0)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def close(self) -> None:
        """Ends it as `terminate` does. Closing twice does nothing."""
        self.terminate()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _drain_stderr(self, echo: bool) -> None:
        pipe = self._process.stderr
        assert pipe is not None
        with pipe:
            for line in pipe:
                text = line.decode("utf-8", "replace").rstrip("\n")
                self._lines.append(text)
                if echo:
                    print(text, file=sys.stderr, flush=True)

    def _read_ready_line(self, timeout_s: float) -> ReadyLine:
        line = self._read_line(timeout_s)
        try:
            event = msgspec.json.decode(line)
            if not isinstance(event, dict) or event.get("event") != "ready":
                raise self._start_error(f"{self.binary} printed {line[:200]!r}, expected its ready line")
            return msgspec.convert(event, ReadyLine)
        except UNDECODABLE as error:
            raise self._start_error(f"{self.binary} printed {line[:200]!r}, expected its ready line: {error}") from error

    def _read_line(self, timeout_s: float) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in line and len(line) < _READY_LINE_LEN_BYTES_MAX:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise self._start_error(f"{self.binary} was not ready within {timeout_s} s")
                piece = os.read(pipe.fileno(), 4096)
                if not piece:
                    code = self._process.wait()
                    raise self._start_error(f"{self.binary} ended with exit code {code} before it was ready")
                line += piece
        return line.split(b"\n", 1)[0]

    def _start_error(self, text: str) -> PdError:
        code = self._process.poll()
        if code is not None:
            self._drain.join(timeout=1.0)  # What it said last is why it ended.
        return DaemonStartError(text, code, self.stderr())
