"""Lets stopped processes go on when the benchmark that stopped them is gone. Standard library only.

Standard input has one JSON list of process ids a line, the last of which counts: those that are stopped now.
At its end, however it came about, these get SIGCONT, and this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable


def guard(lines: Iterable[str]) -> None:
    held: list[int] = []
    for line in lines:
        held = json.loads(line)
    for pid in held:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    guard(sys.stdin)
