"""How long a worker took to start, by phase."""

from __future__ import annotations

import time

BEGAN = "began"
PHASES = ("imports", "weights", "tokenizer and drafts", "engine costs")
"""In their order. imports: of torch and what needs it; engine costs: measuring what rounds cost here."""


class StartupClock:
    """Seconds from one mark to the next; the first begins with the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {BEGAN: time.time()}
        self._last = time.monotonic()

    def mark(self, phase: str) -> None:
        """The phase ends now."""
        now = time.monotonic()
        self.seconds[phase] = now - self._last
        self._last = now
