"""A simulated draft worker: what waits when it becomes free is drafted as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actors.engine.costs import CostModel
from cluster.router.goodput import cost_model
from cluster.simulator.events import Clock


@dataclass(slots=True)
class DraftJob:
    """One message: `sessions` at `exit`, `length` tokens each, and the few of shadow scoring."""

    wishes: list[tuple[int, int, int]]  # exit, sessions, length
    done: Callable[[], None]


@dataclass(slots=True)
class SimulatedDraftWorker:
    """`slowness` multiplies every step: 1.0 for a whole worker, more for a share of one."""

    clock: Clock
    step_s: Mapping[int, Mapping[int, float]]
    slowness: float = 1.0
    queue: list[DraftJob] = field(default_factory=list)
    costs: dict[int, CostModel] = field(init=False, repr=False)
    busy: bool = False
    busy_s: float = 0.0
    total_busy_s: float = 0.0

    def __post_init__(self) -> None:
        self.costs = {depth: cost_model(table) for depth, table in self.step_s.items()}

    def ask(self, job: DraftJob) -> None:
        self.queue.append(job)
        if not self.busy:
            self._start()

    def _start(self) -> None:
        jobs, self.queue = self.queue, []
        seconds = self.slowness * self._seconds(jobs)
        self.busy = True
        self.busy_s += seconds
        self.total_busy_s += seconds

        def finish() -> None:
            self.busy = False
            for job in jobs:
                job.done()
            if self.queue and not self.busy:
                self._start()

        self.clock.after(seconds, finish)

    def _seconds(self, jobs: list[DraftJob]) -> float:
        """Steps one after the other; in a step, the sessions of an exit are one batch."""
        total = 0.0
        by_exit: dict[int, list[tuple[int, int]]] = {}
        for job in jobs:
            for depth, sessions, length in job.wishes:
                by_exit.setdefault(depth, []).append((sessions, length))
        for depth, wishes in by_exit.items():
            for place in range(max(length for _, length in wishes)):
                active = sum(sessions for sessions, length in wishes if length > place)
                total += self.costs[depth].seconds(active)
        return total
