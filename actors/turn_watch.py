"""Whether a thread that works in turns is well. The thread notes its turns; anybody may ask."""

from __future__ import annotations

import threading
import time

MAX_CONSECUTIVE_FAILURES = 3
"""Failed turns in a row after which the thread counts as unhealthy."""


class TurnWatch:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._busy_since: float | None = None
        self._failures = 0

    def begins(self) -> None:
        """A turn."""
        self._busy_since = time.monotonic()

    def rests(self) -> None:
        """Nothing is to be done."""
        self._busy_since = None

    def ended(self, *, failed: bool) -> None:
        """Work that may fail."""
        self._failures = self._failures + 1 if failed else 0

    def healthy(self, turn_limit_s: float) -> bool:
        """False when the thread has ended, one turn takes longer than the limit, or work keeps failing."""
        since = self._busy_since
        hung = since is not None and time.monotonic() - since > turn_limit_s
        return self._thread.is_alive() and not hung and self._failures < MAX_CONSECUTIVE_FAILURES
