"""How long a daemon has said nothing while its client listened."""

from __future__ import annotations

import time

# Parts of the time that a daemon may be silent: after how much of it the daemon is asked whether it is there, how much is
# counted for one look at most, and how long a wait goes on without a look.
_PING_PART, _COUNTED_PART, _LOOK_PART = 4, 4, 16


class Silence:
    """Counts only time in which somebody looked for news: an engine that computes for a minute has not been listening,
    and neither has one that was stopped itself.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long a ping may go unanswered."""
        self.timeout_s = timeout_s
        #: The longest that may be waited without looking again.
        self.look_s = timeout_s / _LOOK_PART
        self._looked = time.monotonic()
        self._silent_s = 0.0
        self._pinged_at_s: float | None = None

    def heard(self) -> None:
        """The daemon has said something."""
        self._looked = time.monotonic()
        self._silent_s, self._pinged_at_s = 0.0, None

    def looked(self) -> None:
        """Nothing was there."""
        now = time.monotonic()
        self._silent_s += min(now - self._looked, self.timeout_s / _COUNTED_PART)
        self._looked = now

    def wants_ping(self) -> bool:
        """Whether the daemon has to be asked now; once for each silence."""
        if self._pinged_at_s is not None or self._silent_s < self.timeout_s / _PING_PART:
            return False
        self._pinged_at_s = self._silent_s
        return True

    @property
    def over(self) -> bool:
        """Whether a ping has been unanswered for too long."""
        return self._pinged_at_s is not None and self._silent_s - self._pinged_at_s >= self.timeout_s
