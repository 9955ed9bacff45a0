"""What workers tell the router once a second, and how a target follows the answer.

All of it runs on the workers' event loops, never on the engine's or the drafting thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from actors.draft_worker.batcher import BatcherState
from actors.drafting.assignment import DraftAssignment, Shadow
from actors.drafting.interface import NESTED, ServedRounds
from actors.engine.async_engine import EngineUnavailable
from actors.engine.messages import EngineStats
from actors.sampling.params import MAX_DRAFT_TOKENS
from cluster.config import DraftPoolConfig, SpeculationConfig
from cluster.named_actor import ActorUnavailableError
from cluster.router.reports import Assignment, DraftReport, DraftService, ExitAcceptance, TargetReport
from cluster.router_actor import RouterClient

logger = logging.getLogger(__name__)


class AssignableTarget(Protocol):
    """A target worker, see `actors.target_worker.worker.TargetWorker`."""

    async def stats(self) -> EngineStats: ...

    def assign(self, assignment: DraftAssignment) -> None: ...


class MeasuredDrafts(Protocol):
    """A draft worker, see `actors.draft_worker.server.DraftServer`."""

    @property
    def state(self) -> BatcherState: ...

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]: ...


def engine_assignment(
    assignment: Assignment, *, only_nested: bool, holds_draft: bool = False
) -> DraftAssignment:
    """A router's assignment as an engine obeys it.

    The router knows the nested drafter only: its cap is that of the nested drafter, unless there is no other
    in the pool, or an operator fixed it. Without a draft worker the drafters in the target's own process are
    not its business either. The copy of a target that `holds_draft` never is, with a worker or without: what
    it costs there is measured there, and only what an operator fixed holds for it. The router plans no shadow
    scoring for such a target; an assignment from before it said what it holds may have one.
    """
    remote = assignment.worker_id is not None
    everything = assignment.cap_pinned or (only_nested and remote and not holds_draft)
    shadow = None if holds_draft else assignment.shadow
    return DraftAssignment(
        worker_id=assignment.worker_id,
        exit_depth=None if holds_draft and not assignment.exits_pinned else assignment.depth or None,
        nested_cap=None if holds_draft and not assignment.cap_pinned else assignment.cap,
        cap=assignment.cap if everything else MAX_DRAFT_TOKENS,
        shadow=None if shadow is None else Shadow(shadow.exit, shadow.length, shadow.share),
    )


@dataclass(slots=True)
class _Rates:
    """Counters at the last report, to turn counts into rates."""

    at: float
    rounds: int
    asked_tokens: int
    served: ServedRounds


class TargetReports:
    """Turns engine statistics into reports.

    Args:
        target_id: unique in the cluster. model: its public name.
    """

    def __init__(self, target_id: str, model: str, speculation: SpeculationConfig) -> None:
        self._target_id = target_id
        self._model = model
        self._max_draft = speculation.max_draft_tokens if speculation.enabled else 0
        self._weight = speculation.weight
        self._last: _Rates | None = None

    def build(self, now: float, stats: EngineStats) -> TargetReport | None:
        """None while nothing has been measured. `now` is monotonic time in seconds; rates are those since the
        last report, 0 in the first."""
        drafting = stats.drafting
        if not drafting.cost_s_by_rows:
            return None
        last, self._last = self._last, _Rates(now, stats.steps, drafting.asked_tokens, drafting.served)
        seconds = max(now - last.at, 1e-3) if last is not None else 1.0
        return TargetReport(
            target_id=self._target_id,
            model=self._model,
            cost_s_by_rows={rows: max(s, 1e-9) for rows, s in drafting.cost_s_by_rows.items()},
            acceptance={
                depth: ExitAcceptance(rates, trials)
                for depth, (rates, trials) in drafting.acceptance_by_exit.items()
            },
            running=stats.running,
            rounds_per_s=(stats.steps - last.rounds) / seconds if last is not None else 0.0,
            draft_tokens_per_s=(drafting.asked_tokens - last.asked_tokens) / seconds if last else 0.0,
            service=DraftService.between(
                last.served if last is not None else drafting.served, drafting.served, seconds
            ),
            latency_s=drafting.latency_s,
            max_draft=self._max_draft,
            weight=self._weight,
            holds_draft=drafting.holds_draft,
        )


class TargetRouting:
    """Reports of one target worker, and its obedience. `run` is a task of the worker's event loop."""

    def __init__(
        self,
        worker: AssignableTarget,
        client: RouterClient,
        reports: TargetReports,
        *,
        only_nested: bool,
    ) -> None:
        self._worker = worker
        self._client = client
        self._reports = reports
        self._only_nested = only_nested
        self._assigned: DraftAssignment | None = None
        self._answers = True

    async def run(self) -> None:
        while True:
            await self.once()
            await asyncio.sleep(self._client.interval_s)

    async def once(self) -> None:
        """One report and its answer. While the router does not answer, the last assignment stays."""
        try:
            stats = await self._worker.stats()
            report = self._reports.build(time.monotonic(), stats)
            answer = await self._client.report_target(report) if report is not None else None
            if answer is not None:
                self._follow(
                    engine_assignment(
                        answer, only_nested=self._only_nested, holds_draft=stats.drafting.holds_draft
                    )
                )
        except ActorUnavailableError as error:
            self._say(f"the router does not answer ({error}); the last assignment stays")
        except (EngineUnavailable, TimeoutError) as error:
            self._say(f"nothing was reported to the router: {type(error).__name__}: {error}")
        except Exception:  # reporting goes on whatever it was
            logger.exception("a report to the router failed")
        else:
            self._answers = True

    def _follow(self, assignment: DraftAssignment) -> None:
        if assignment != self._assigned:
            self._worker.assign(assignment)
            self._assigned = assignment

    def _say(self, message: str) -> None:
        """Once for each time that it stops working."""
        logger.log(logging.WARNING if self._answers else logging.DEBUG, message)
        self._answers = False


class Utilisation:
    """Share of its time that a worker is busy, between two looks."""

    def __init__(self) -> None:
        self._at, self._busy_s = time.monotonic(), 0.0

    def since_last(self, now: float, busy_s: float) -> float:
        """0 .. 1. `now` is monotonic time, `busy_s` what the worker has been busy in all, both in seconds."""
        spent, passed = busy_s - self._busy_s, now - self._at
        self._at, self._busy_s = now, busy_s
        return min(1.0, max(0.0, spent) / max(passed, 1e-3))


class DraftReports:
    """Reports of one draft worker."""

    def __init__(self, worker_id: str, drafts: MeasuredDrafts, pool: DraftPoolConfig) -> None:
        self._worker_id = worker_id
        self._drafts = drafts
        self._pool = pool
        self._utilisation = Utilisation()

    def build(self, now: float) -> DraftReport:
        """`now` is monotonic time in seconds; utilisation is that since the last report."""
        state = self._drafts.state
        return DraftReport(
            worker_id=self._worker_id,
            step_s_by_exit=self._drafts.step_s_by_exit(),
            drafters=tuple(self._pool.drafters),
            open_sessions=state.sessions,
            max_sessions=self._pool.max_sessions,
            utilisation=self._utilisation.since_last(now, state.busy_s),
        )

    async def run(self, client: RouterClient) -> None:
        """Report for ever; a router that is away is told when it is back."""
        while True:
            try:
                await client.report_draft(self.build(time.monotonic()))
            except ActorUnavailableError as error:
                logger.debug("the router does not answer: %s", error)
            except Exception:  # reporting goes on whatever it was
                logger.exception("a report to the router failed")
            await asyncio.sleep(client.interval_s)


def only_nested(pool: DraftPoolConfig) -> bool:
    """Whether the pool drafts with the nested drafter alone."""
    return set(pool.drafters) == {NESTED}
