"""The seam to whatever runs a target model: our torch engine now, vLLM's AsyncLLM later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from actors.drafting.assignment import DraftAssignment
from actors.engine.messages import EngineRequest, EngineStats, RequestOutput, ResetScope


class TargetEngine(Protocol):
    """A continuous-batching engine, owned by one thread. None of its methods may be called from another."""

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises `ParameterError` when it can never be served."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request and free everything it holds; unknown ids are ignored."""
        ...

    def step(self) -> Sequence[RequestOutput]:
        """Run one round over the batch and return what it emitted."""
        ...

    def has_work(self) -> bool: ...

    def idle(self, waiting: Callable[[], bool]) -> bool:
        """Do a little of what can wait until no request is inside; whether there is more. Returns after one
        forward pass at most once something is `waiting`."""
        ...

    def stats(self) -> EngineStats: ...

    def assign(self, assignment: DraftAssignment) -> None:
        """Draft as assigned from the next round on."""
        ...

    def reset_shared_state(self, scope: ResetScope = "all") -> None:
        """Drop what requests share, see `ResetScope`."""
        ...

    def close(self) -> None: ...
