"""A simulated target worker: the engine's own Controller decides, tokens and times are drawn from the
profile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from actors.drafting.acceptance_model import RequestAcceptance
from actors.drafting.interface import ServedRounds, SessionDraft
from actors.engine.controller import Candidate, Controller, ControlState
from cluster.router.goodput import cost_model
from cluster.router.reports import Assignment, DraftService, ExitAcceptance, TargetReport
from cluster.simulator.draft_pool import DraftJob, SimulatedDraftWorker
from cluster.simulator.events import Clock
from cluster.simulator.guesses import RIGHT, SessionGuesses
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import ModelTraits

_WRONG = 0


def drafter_name(exit_depth: int) -> str:
    return f"nested@{exit_depth}"


@dataclass(slots=True, eq=False)
class Session:
    session_id: int
    task: str
    tokens_left: int
    control: ControlState = field(default_factory=ControlState)
    shadow: RequestAcceptance = field(default_factory=RequestAcceptance)
    guesses: SessionGuesses | None = None


class SimulatedTarget:
    """Rounds follow each other while there are requests: plan, wait for drafts, trim, verify, emit."""

    def __init__(
        self, target_id: str, model: ModelTraits, profile: CostProfile, clock: Clock, rng: random.Random,
        workers: dict[str, SimulatedDraftWorker], max_running: int, max_draft: int, noise: float,
        draft_ahead: bool = False,
    ) -> None:  # fmt: skip
        self.target_id, self.model = target_id, model
        self._profile, self._clock, self._rng, self._workers = profile, clock, rng, workers
        self._max_running, self._max_draft, self._noise = max_running, max_draft, noise
        self._draft_ahead = draft_ahead
        self.prepared: Counter[str] = Counter()
        """Drafts after the first of a session, by what was prepared of them: foreseen, partly, missed."""
        self._true_cost = cost_model(profile.verify_s(model.size))
        self.controller = Controller(cost_model(profile.verify_s(model.size)))
        self.assignment: Assignment | None = None
        self.waiting: list[Session] = []
        self.running: list[Session] = []
        self.emitted = self.rounds = self.drafted = 0
        self.busy_s = 0.0
        self._in_round = False
        self._reported = (0, 0)
        self._served = self._served_before = ServedRounds()

    @property
    def true_cost_s(self) -> float:
        """Seconds of a round of one row."""
        return self._true_cost.seconds(1)

    def arrive(self, session: Session) -> None:
        self.waiting.append(session)
        if not self._in_round:
            self._round()

    def report(self, seconds: float) -> TargetReport:
        """For the router; rates are since the previous report, `seconds` ago."""
        rounds, drafted = self.rounds - self._reported[0], self.drafted - self._reported[1]
        self._reported = (self.rounds, self.drafted)
        service = DraftService.between(self._served_before, self._served, seconds)
        self._served_before = self._served
        costs = self.controller.costs
        acceptance = {
            int(name.partition("@")[2]): ExitAcceptance(rates, trials)
            for name, (rates, trials) in self.controller.acceptance.evidence().items()
        }
        return TargetReport(
            self.target_id, self.model.name,
            {rows: costs.seconds(rows) for rows in self._profile.verify_s(self.model.size)},
            acceptance, len(self.running), rounds / seconds, drafted / seconds, service,
            dict.fromkeys(self._workers, self._profile.latency_ms / 1e3), self._max_draft,
        )  # fmt: skip

    def _round(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            self.running.append(self.waiting.pop(0))
        self._in_round = bool(self.running)
        if not self._in_round:
            return
        started = self._clock.now
        a = self.assignment
        wishes: dict[Session, tuple[Candidate, int, int]] = {}
        if a is not None and a.worker_id in self._workers:
            self._score_in_shadow(a)
            # As in the engine, a request that may emit one more token only cannot use a draft.
            candidates = [
                Candidate(s.control, min(a.cap, s.tokens_left - 1), (drafter_name(a.depth),))
                for s in self.running
            ]
            budgets = self.controller.plan(candidates)
            for session, candidate, budget in zip(self.running, candidates, budgets, strict=True):
                if budget > 0:
                    wishes[session] = (candidate, a.depth, budget)
        if not wishes or a is None or a.worker_id is None:
            self._verify(started, {})
            return
        worker, half = self._workers[a.worker_id], self._profile.latency_ms / 2e3

        def ask() -> None:
            asked = self._clock.now
            groups: Counter[tuple[int, int]] = Counter()
            for session, (_, depth, budget) in wishes.items():
                self.drafted += budget
                groups[depth, budget - self._known(session, depth, budget)] += 1
            jobs = [(depth, count, length) for (depth, length), count in groups.items() if length > 0]
            worker.ask(DraftJob(jobs, lambda: answered(self._clock.now - asked)))

        def answered(seconds: float) -> None:
            s, lengths = self._served, [length for _, _, length in wishes.values()]
            self._served = ServedRounds(
                s.rounds + 1, s.seconds + seconds, s.steps + max(lengths), s.tokens + sum(lengths)
            )
            drafts = {s: self._draft(s, depth, length) for s, (_, depth, length) in wishes.items()}
            for session in drafts:
                if session.guesses is not None:
                    worker.prepare(session.guesses)
            self._clock.after(half, lambda: self._drafts_came(started, wishes, drafts))

        self._clock.after(half, ask)

    def _known(self, session: Session, depth: int, length: int) -> int:
        """Tokens of a session's next draft that its worker has prepared."""
        if not self._draft_ahead:
            return 0
        if session.guesses is None:
            decay, other = self._profile.acceptance_decay, self._profile.alternative
            session.guesses = SessionGuesses(self.model.rates[session.task], decay, other, self._rng)
        known = session.guesses.known(depth, length)
        if session.guesses.counted:
            self.prepared["foreseen" if known == length else "partly" if known else "missed"] += 1
        return known

    def _score_in_shadow(self, a: Assignment) -> None:
        """Draft a few tokens of one session at an exit not in use. Nobody waits: they are scored against what
        the target emits, if it has not emitted more by the time they are there."""
        if a.shadow is None or a.worker_id not in self._workers or self._rng.random() >= a.shadow.share:
            return
        session = self._rng.choice(self.running)
        depth, length, at = a.shadow.exit, a.shadow.length, session.tokens_left

        def done() -> None:
            if session.tokens_left == at:
                draft = self._drawn(session, depth, length)[0]
                self.controller.acceptance.proposed(session.shadow, draft, ())

        worker, half = self._workers[a.worker_id], self._profile.latency_ms / 2e3
        back = partial(self._clock.after, half, done)
        self._clock.after(half, lambda: worker.score(depth, length, back))

    def _draft(self, session: Session, depth: int, length: int) -> tuple[SessionDraft, int]:
        """A proposal, and how many of its tokens are right."""
        if session.guesses is None:
            return self._drawn(session, depth, length)
        tokens = session.guesses.answer(length)
        right = next((i for i, token in enumerate(tokens) if token != RIGHT), length)
        return SessionDraft(session.session_id, 1, tuple(tokens), drafter=drafter_name(depth)), right

    def _drawn(self, session: Session, depth: int, length: int) -> tuple[SessionDraft, int]:
        right, rate = 0, self.model.rates[session.task][depth]
        while right < length and self._rng.random() < rate:
            right += 1
            rate *= self._profile.acceptance_decay
        tokens = (RIGHT,) * right + (_WRONG,) * (length - right)
        return SessionDraft(session.session_id, 1, tokens, drafter=drafter_name(depth)), right

    def _drafts_came(
        self,
        started: float,
        wishes: Mapping[Session, tuple[Candidate, int, int]],
        found: Mapping[Session, tuple[SessionDraft, int]],
    ) -> None:
        waited = self._clock.now - started
        self.controller.observe_wait(waited, len(wishes))
        drafts: list[tuple[Candidate, SessionDraft, int]] = []
        hits: list[int] = []
        for session, (candidate, _, length) in wishes.items():
            draft, right = found[session]
            self.controller.acceptance.proposed(session.control.acceptance, draft, candidate.drafters)
            drafts.append((candidate, draft, length))
            hits.append(right)
        lengths = self.controller.trim(drafts, len(self.running), len(self.running))
        verified = {
            session: (length, min(right, length))
            for session, length, right in zip(wishes, lengths, hits, strict=True)
            if length > 0
        }
        self._verify(started, verified)

    def _verify(self, started: float, verified: dict[Session, tuple[int, int]]) -> None:
        rows = len(self.running) + sum(length for length, _ in verified.values())
        jitter = max(0.5, 1.0 + self._noise * self._rng.gauss(0.0, 1.0)) if self._noise else 1.0
        seconds = self._true_cost.seconds(rows) * jitter

        def commit() -> None:
            self.controller.costs.ended(rows, seconds)
            self._commit(verified)
            self.busy_s += self._clock.now - started
            self.rounds += 1
            self._round()

        self._clock.after(seconds, commit)

    def _commit(self, verified: dict[Session, tuple[int, int]]) -> None:
        for session in self.running:
            _, accepted = verified.get(session, (0, 0))
            if session in verified:
                self.controller.observe_accepted(accepted)
            count = min(session.tokens_left, 1 + accepted)
            self.controller.acceptance.emitted(session.control.acceptance, [RIGHT] * count)
            self.controller.acceptance.emitted(session.shadow, [RIGHT] * count)
            if session.guesses is not None:
                session.guesses.emitted(count)
            session.tokens_left -= count
            self.emitted += count
        self.running = [s for s in self.running if s.tokens_left > 0]
