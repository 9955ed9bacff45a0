"""A start as phases that follow each other: from the lines of `s2d serve` and the target worker's own clock.

`s2d serve` prints a line when a phase ends, with its duration; deployments start side by side, and the target
is the longest of them. So the way to the first token is cut at points in time, each of which ends a phase.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from actors.target_worker.startup import BEGAN
from actors.target_worker.startup import PHASES as TARGET_PHASES

PRINTED = re.compile(r"✓\s+(?P<name>.+?)\s+\((?P<seconds>\d+\.\d)\s+s\)")
LIBRARIES, RAY, SERVE, READY = "Ray's libraries", "Ray", "Serve", "ready"
PHASES = (
    "command line",
    LIBRARIES,
    RAY,
    SERVE,
    "target process",
    *(f"target: {name}" for name in TARGET_PHASES),
    READY,
    "first token",
)
"""command line: process start and imports of `s2d`; target process: from the deployment's begin to the begin
of the target's constructor; ready: from its end until /ready says so; first token: one request over HTTP."""


def printed_phases(text: str) -> dict[str, float]:
    """Seconds by name, as `s2d serve` printed them; lines may be wrapped."""
    found = PRINTED.finditer(re.sub(r"\s+", " ", text))
    return {match["name"]: float(match["seconds"]) for match in found}


class Timeline:
    """When each printed phase was first seen to have ended; seconds after the start of the process."""

    def __init__(self) -> None:
        self.ended: dict[str, float] = {}
        self.took: dict[str, float] = {}

    def see(self, text: str, at: float) -> None:
        """`text`: all that was printed until `at`."""
        for name, seconds in printed_phases(text).items():
            if name not in self.ended:
                self.ended[name], self.took[name] = at, seconds


def split_start(
    timeline: Timeline, target: Mapping[str, float], began: float, ready: float, first_token: float
) -> dict[str, float]:
    """Seconds by phase; they add up to `first_token`, the seconds from the start of the process to it.

    target: the worker's startup clock. began: Unix time of the start of the process. ready: seconds after it
    at which /ready answered 200. Raises ValueError naming a phase that was not seen.
    """
    missing = [name for name in (LIBRARIES, RAY, SERVE) if name not in timeline.ended]
    missing += [name for name in (BEGAN, *TARGET_PHASES) if name not in target]
    if missing:
        raise ValueError(f"the server did not tell how long these took: {', '.join(missing)}")
    marks = [
        max(0.0, timeline.ended[LIBRARIES] - timeline.took[LIBRARIES]),
        *(timeline.ended[name] for name in (LIBRARIES, RAY, SERVE)),
        target[BEGAN] - began,
    ]
    for name in TARGET_PHASES:
        marks.append(marks[-1] + target[name])
    marks += [ready, first_token]
    return dict(zip(PHASES, differences(marks), strict=True))


def differences(marks: Sequence[float]) -> list[float]:
    """From each mark to the next, the first from 0; a mark before an earlier one, by the inaccuracy of how it
    was seen, ends a phase of no length."""
    found, last = [], 0.0
    for mark in marks:
        found.append(max(0.0, mark - last))
        last = max(last, mark)
    return found
