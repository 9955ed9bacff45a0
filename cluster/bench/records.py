"""Raw measurements: one record a request, as they go into the JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench.engines.interface import BenchResponse


@dataclass(frozen=True, slots=True)
class Record:
    """What was asked, in which pair, and what came back.

    pair: runs of the same work on every engine share it. order: the engine's place within its pair.
    question_id, task and turn name the prompt. concurrency or rate (requests/s) is set in serving load.
    """

    engine: str
    pair: int
    order: int
    question_id: str
    task: str
    prompt_tokens: int
    response: BenchResponse
    turn: int = 0
    concurrency: int | None = None
    rate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values. Arrival times are seconds after the request was sent; `started` is on the clock of
        the benchmark's process, so that records can be ordered."""
        data = asdict(self)
        response = data.pop("response")
        started = response["started"]
        response["arrivals"] = [[round(t - started, 6), count] for t, count in response["arrivals"]]
        merged: dict[str, Any] = {**data, **response}
        return merged
