"""A simulated draft worker: what waits when it becomes free is drafted as one batch, place by place.

As in `actors.drafting.nested`, a place of a batch runs each block of layers once, for all sessions whose exit
is at the block's end or deeper. Shadow scoring and drafting ahead run one step at a time, and only while no
round waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from actors.costs import CostModel
from actors.drafting.guess_tree import next_outcomes
from cluster.router.goodput import cost_model
from cluster.simulator.events import Clock
from cluster.simulator.guesses import SessionGuesses

Wish = tuple[int, int, int]
"""(exit, sessions, tokens each)."""


@dataclass(slots=True)
class DraftJob:
    """One message of a target: the wishes of its sessions, and whom to tell."""

    wishes: Sequence[Wish]
    done: Callable[[], None]


@dataclass(slots=True)
class _Shadow:
    exit: int
    left: int
    done: Callable[[], None]


class SimulatedDraftWorker:
    """`batches`: whether all that waits is one batch; else messages take turns, as they must where each
    target has a draft of its own."""

    def __init__(
        self,
        clock: Clock,
        step_s: Mapping[int, Mapping[int, float]],
        batches: bool = True,
    ) -> None:
        self.costs: dict[int, CostModel] = {depth: cost_model(table) for depth, table in step_s.items()}
        self.total_busy_s = 0.0
        """Without drafting ahead, which yields to everything."""
        self._clock = clock
        self._batches = batches
        self._busy = False
        self._queue: list[DraftJob] = []
        self._shadows: deque[_Shadow] = deque()
        self._ahead: dict[SessionGuesses, SessionGuesses] = {}

    def ask(self, job: DraftJob) -> None:
        self._queue.append(job)
        self._next()

    def score(self, exit_depth: int, length: int, done: Callable[[], None]) -> None:
        """Draft for one session when there is time."""
        self._shadows.append(_Shadow(exit_depth, length, done))
        self._next()

    def prepare(self, guesses: SessionGuesses) -> None:
        """Draft ahead for a session, whose verdict is under way, when there is time."""
        self._ahead[guesses] = guesses
        self._next()

    def seconds(self, wishes: Sequence[Wish]) -> float:
        """Time of a batch."""
        total = 0.0
        for place in range(max((length for _, _, length in wishes), default=0)):
            going = sorted((depth, count) for depth, count, length in wishes if length > place)
            sessions, below = sum(count for _, count in going), None
            for depth in sorted({depth for depth, _ in going}):
                total += self.costs[depth].seconds(sessions)
                if below is not None:
                    total -= self.costs[below].seconds(sessions)
                sessions -= sum(count for d, count in going if d == depth)
                below = depth
        return total

    def _next(self) -> None:
        if self._busy:
            return
        # What is prepared is answered at once.
        ready = [job for job in self._queue if not job.wishes]
        self._queue = [job for job in self._queue if job.wishes]
        for job in ready:
            job.done()
        if self._busy:  # who was told has asked for more
            return
        if self._queue:
            count = len(self._queue) if self._batches else 1
            jobs, self._queue = self._queue[:count], self._queue[count:]
            seconds = self.seconds([wish for job in jobs for wish in job.wishes])
            self.total_busy_s += seconds
            self._work(seconds, [j.done for j in jobs])
        elif self._shadows:
            shadow = self._shadows[0]
            shadow.left -= 1
            done = [self._shadows.popleft().done] if shadow.left == 0 else []
            seconds = self.seconds([(shadow.exit, 1, 1)])
            self.total_busy_s += seconds
            self._work(seconds, done)
        elif self._ahead:
            self._step_ahead()

    def _step_ahead(self) -> None:
        """One step for some sessions, those served longest ago first."""
        chosen = next_outcomes(self._ahead, SessionGuesses.next)
        if chosen:
            depths = Counter(guesses.exit_depth for _, guesses, _ in chosen)
            seconds = self.seconds([(depth, count, 1) for depth, count in depths.items()])
            self._work(seconds, [partial(guesses.prepared, outcome) for _, guesses, outcome in chosen])

    def _work(self, seconds: float, done: Sequence[Callable[[], None]]) -> None:
        self._busy = True

        def finish() -> None:
            self._busy = False
            for tell in done:
                tell()
            self._next()

        self._clock.after(seconds, finish)
