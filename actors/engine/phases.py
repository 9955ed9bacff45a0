"""Where the engine thread's time goes: cumulative seconds by phase of a round."""

from __future__ import annotations

import time

PHASES = ("drafts", "schedule", "forward", "judge", "learn", "commit", "submit")
"""drafts: waiting for drafts and trimming them; schedule: choosing the work and packing the batch; forward:
the model; judge: sampling and verification; learn: candidates for learning drafters; commit: KV, tokens, log
probabilities; submit: planning the next round and sending it."""


class PhaseClock:
    """Engine thread only. `start` begins a round, `lap` ends a phase of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Book the time since the last call under `phase`, and return it."""
        now = time.perf_counter()
        passed = now - self._last
        self.seconds[phase] += passed
        self._last = now
        return passed
