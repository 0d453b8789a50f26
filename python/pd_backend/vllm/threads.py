"""Threads that wait for servers, of which clients name as many as they like."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from .untrusted import SpecError


class Threads:
    """A bounded number at a time, and of these a bounded number for one host."""

    def __init__(self, name: str, what: str, most: int, most_of_one_host: int) -> None:
        """`name`: of each thread; `what`: of what there are so many, for errors."""
        self._name, self._what = name, what
        self._most, self._most_of_one_host = most, most_of_one_host
        #: By host. Each thread takes its own out.
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def start(self, host: str, work: Callable[[], None]) -> None:
        """Has it done in a thread. Raises `SpecError` where there is none for it."""
        host = host.lower()
        with self._lock:
            count, of_host = self._running.total(), self._running[host]
            if count >= self._most:
                raise SpecError(f"{count} {self._what} already")
            if of_host >= self._most_of_one_host:
                raise SpecError(f"{of_host} {self._what} at {host} already")
            self._running[host] += 1

        def run() -> None:
            try:
                work()
            finally:
                self._ended(host)

        try:
            threading.Thread(target=run, name=self._name, daemon=True).start()
        except RuntimeError as error:
            self._ended(host)
            raise SpecError(f"this machine gives the engine no further thread: {error}") from error

    def _ended(self, host: str) -> None:
        with self._lock:
            self._running[host] -= 1
            if not self._running[host]:
                del self._running[host]
