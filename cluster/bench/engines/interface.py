"""What a benchmark asks of an engine, ours or a peer: the same prompt ids in, timed token ids out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Greedy unless `temperature` says otherwise. `prompt_ids` is the rendered prompt, equal for every
    engine; `prompt_text` the same prompt for endpoints that take text only. With `ignore_eos` exactly
    `max_tokens` tokens are generated."""

    request_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class BenchResponse:
    """Times are `time.perf_counter()` seconds of the benchmark's process.

    arrivals: (time, tokens that arrived then), one entry a chunk. token_ids is None where an endpoint does
    not tell ids. speculation is None where the engine does not report it.
    """

    request_id: str
    started: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: tuple[int, ...] | None = None
    text: str = ""
    finish_reason: str | None = None
    speculation: SpeculationCounts | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def finished(self) -> float:
        return self.arrivals[-1][0] if self.arrivals else self.started


@dataclass(frozen=True, slots=True)
class SpeculationCounts:
    """Of one request. rounds: verification rounds; accepted_by_position[j]: rounds whose j-th draft token was
    accepted; by_exit: (drafted, accepted) by the name of the drafter or its exit."""

    rounds: int
    drafted: int
    accepted: int
    accepted_by_position: tuple[int, ...] = ()
    by_exit: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class BenchEngine(Protocol):
    """One engine in one configuration. `start` may take minutes; `stop` ends every process it started."""

    @property
    def name(self) -> str:
        """Names the configuration in tables, for example "llama.cpp BF16"."""
        ...

    @property
    def pid(self) -> int | None:
        """Of the process whose tree is the started engine, the same where engines share it; None when none of
        it is ours."""
        ...

    async def start(self) -> None:
        """Raises `EngineUnavailableError` when the engine is not installed or does not come up."""
        ...

    async def stop(self) -> None: ...

    async def reset(self) -> None:
        """Forget what requests share (prefix cache, learned drafts), as far as the engine can."""
        ...

    async def generate(self, request: BenchRequest) -> BenchResponse:
        """Never raises for a failed request: `error` says what happened. Cancelling cancels the request."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Versions, precision, threads and options, for the record. Complete after `start`."""
        ...


class EngineUnavailableError(RuntimeError):
    """The engine cannot run here; the message says why and how to install it."""
