"""One target on a recorded trace: the engine's own speculator, controller and shadow scoring, the pool of
drafters and the router that serve, in simulated time. Only the two models and the clock are replaced.

A closed loop: so many requests decode at once, and one that ends is followed by the next answer of the cell.
Prompts are not replayed: what counts is decoding.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.drafting.early_stop import EarlyStop
from actors.drafting.interface import NESTED, Drafter
from actors.drafting.model_free import MODEL_FREE
from actors.drafting.selector import DrafterPool
from actors.engine.controller import Controller
from actors.engine.messages import EngineRequest, EngineStats
from actors.engine.sequence import Sequence as EngineSequence
from actors.engine.speculator import DraftTimeouts, Speculator
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.verification.registry import get_rule
from cluster.config import DrafterName, SpeculationConfig
from cluster.deployments.routing import TargetReports, engine_assignment
from cluster.router.goodput import cost_model
from cluster.router.reports import DraftReport
from cluster.router.router import Router
from cluster.simulator.replay_draft import WORKER_ID, ReplayClock, ReplayedSource, TracedDrafter
from cluster.simulator.trace import Trace, TracedAnswer

_MAX_SESSIONS = 1024
"""Of a drafter: more than run at once."""
_STEP_S = 1.0
_MODEL_LEN = _ANY_TOKEN = 1 << 20


class ReplaySettings(BaseModel):
    """What is replayed, and how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: tuple[int, ...] = Field((1, 4, 16), min_length=1, description="Requests at once.")
    lengths: tuple[int, ...] = Field((1, 2, 3, 4, 6), min_length=1, description="Fixed draft lengths.")
    drafters: tuple[DrafterName, ...] = Field(
        ("nested",), min_length=1, description="What the free choice may draft with, the cheapest first."
    )
    stop_threshold: float | None = Field(
        0.75, gt=0, lt=1, description="The free choice's drafts end at this probability of a rejection."
    )
    scale: float = Field(
        1.0, gt=0, description="Factor on the target's costs: as if it were so many times larger."
    )
    latency_ms: float = Field(0.3, ge=0, description="Round trip between target and draft worker.")
    noise: float = Field(0.05, ge=0, lt=1, description="Standard deviation of a round's time, as a share.")
    warmup_s: float = Field(30.0, ge=0, description="Simulated seconds that do not count.")
    measured_s: float = Field(
        60.0, gt=0, description="Simulated seconds that count, at least: whole passes over the answers do."
    )
    fixed_s: float = Field(15.0, gt=0, description="The same for fixed settings, which learn nothing.")
    seed: int = Field(0, ge=0, description="Order of answers, and noise.")

    @model_validator(mode="after")
    def _can_draft(self) -> ReplaySettings:
        if NESTED not in self.drafters:
            raise ValueError("drafters: must contain nested, whose exits are judged")
        if min(self.concurrency) < 1 or min(self.lengths) < 1:
            raise ValueError("concurrency, lengths: must be at least 1")
        return self


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every round of every request drafts `length` tokens at `exit`, whatever the controller thinks; length 0
    is plain decoding."""

    exit: int = 0
    length: int = 0

    @property
    def name(self) -> str:
        return f"exit {self.exit}, length {self.length}" if self.length else "plain"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """tokens_per_s after the warm-up, in simulated time. accepted: draft tokens emitted a round and request.
    assignment: the router's last, in words; empty for fixed settings."""

    tokens_per_s: float
    accepted: float
    late_rounds: int = 0
    assignment: str = ""


def replay(
    trace: Trace, task: str, concurrency: int, fixed: Fixed | None, settings: ReplaySettings
) -> ReplayResult:
    """`fixed` None leaves the choice to router and controller. Equal inputs give equal results.

    Raises ValueError for a task without answers, an exit or a length that was not recorded."""
    answers = [a for a in trace.of(task) if len(a.token_ids) > 1]
    if not answers:
        raise ValueError(f"task: {trace.card.target} has no answers for {task}")
    if fixed is not None and fixed.length:
        if fixed.exit not in trace.card.exits:
            raise ValueError(f"exit: {fixed.exit} is not among the recorded {trace.card.exits}")
        if fixed.length > trace.card.chain:
            raise ValueError(f"length: {fixed.length} exceeds the recorded chain of {trace.card.chain}")
    return _Replay(trace, answers, concurrency, fixed, settings).run()


class _Replay:
    def __init__(
        self,
        trace: Trace,
        answers: Sequence[TracedAnswer],
        concurrency: int,
        fixed: Fixed | None,
        settings: ReplaySettings,
    ) -> None:
        card = trace.card
        self._fixed, self._settings, self._concurrency = fixed, settings, concurrency
        self._rng = random.Random(f"{settings.seed}/{card.target}/{answers[0].task}/{concurrency}")
        self._answers, self._count = _shuffled_for_ever(answers, self._rng), len(answers)
        self._clock = ReplayClock()
        threshold = None if fixed is not None else settings.stop_threshold
        self._nested = TracedDrafter(trace, self._clock, EarlyStop((), threshold))
        pool = DrafterPool(self._drafters(), clock=self._clock.read)
        self._source = ReplayedSource(pool, self._clock, settings.latency_ms / 1e3)
        speculation = SpeculationConfig()
        timeouts = DraftTimeouts(
            speculation.draft_timeout_ms / 1e3, speculation.forced_draft_timeout_ms / 1e3
        )
        verify_s = {rows: seconds * settings.scale for rows, seconds in card.verify_s.items()}
        self._controller = Controller(cost_model(verify_s))
        self._speculator = Speculator(
            self._source, self._controller, timeouts, _MODEL_LEN, _ANY_TOKEN, clock=self._clock.read
        )
        self._cost = cost_model(verify_s)
        self._max_draft = min(card.chain, speculation.max_draft_tokens)
        self._router = Router()
        self._reports = TargetReports("t0", card.target, speculation)
        self._running: list[tuple[EngineSequence, TracedAnswer]] = []
        self._emitted = self._rounds = self._decoded = self._accepted = 0
        self._busy_before = self._routed_at = 0.0
        self._assignment = ""

    def _drafters(self) -> list[Drafter]:
        names = (NESTED,) if self._fixed is not None else self._settings.drafters
        return [self._nested if name == NESTED else MODEL_FREE[name](_MAX_SESSIONS) for name in names]

    def run(self) -> ReplayResult:
        """Whole passes over the answers are measured: they differ by more than choices do."""
        s = self._settings
        begin = s.warmup_s if self._fixed is None else 0.0
        length = s.measured_s if self._fixed is None else s.fixed_s
        next_step, marked, started = 0.0, None, 0
        while True:
            while len(self._running) < self._concurrency:
                if started % self._count == 0:
                    if marked is None and self._clock.now >= begin:
                        marked = (self._emitted, self._clock.now)
                    elif marked is not None and self._clock.now >= marked[1] + length:
                        return self._result(*marked)
                self._start(next(self._answers))
                started += 1
            if self._fixed is None and self._clock.now >= next_step:
                self._route()
                next_step = self._clock.now + _STEP_S
            self._round()

    def _result(self, emitted: int, at: float) -> ReplayResult:
        """Since so many tokens had been emitted, at that time."""
        return ReplayResult(
            (self._emitted - emitted) / (self._clock.now - at),
            self._accepted / max(1, self._decoded),
            self._source.late_rounds,
            self._assignment,
        )

    def _start(self, answer: TracedAnswer) -> None:
        length = self._max_draft if self._fixed is None else self._fixed.length
        speculation = SpeculationParams()
        if self._fixed is not None and length:
            speculation = SpeculationParams(
                max_draft_tokens=length, force=True, drafter=NESTED, exit_depth=self._fixed.exit
            )
        request = EngineRequest(
            "r",
            answer.prompt_ids,
            SamplingParams(max_tokens=len(answer.token_ids), temperature=0.0),
            speculation,
        )
        seq = EngineSequence(request, None, get_rule("coupled"), 0, length)
        # The first token comes with the prompt's own pass.
        seq.token_ids.append(answer.token_ids[0])
        seq.num_computed = seq.prompt_len
        self._nested.expect(seq.session_id, answer)
        self._speculator.open(seq)
        self._running.append((seq, answer))

    def _round(self) -> None:
        sequences = [seq for seq, _ in self._running]
        self._speculator.submit(sequences, 0)
        chosen = self._speculator.collect(sequences, 0)
        rows = len(sequences) + sum(length for _, length in chosen.values())
        noise = max(0.5, 1.0 + self._settings.noise * self._rng.gauss(0.0, 1.0))
        seconds = self._cost.seconds(rows) * noise
        self._clock.pass_by(seconds)
        self._controller.costs.ended(rows, seconds)
        self._rounds += 1
        going = []
        for seq, answer in self._running:
            draft, length = chosen.get(seq, (None, 0))
            drafted = () if draft is None else draft.token_ids[:length]
            place = seq.num_outputs
            accepted = _agreement(drafted, answer.token_ids[place:])
            emitted = answer.token_ids[place : place + accepted + 1]
            if self._source.wants_candidates and seq.session_open:
                # Rows of rejected drafts were not recorded; Token Recycling learns a little less than live.
                for at in range(place, place + len(emitted)):
                    row = tuple(answer.candidates[at].tolist())
                    seq.unsent_candidates.append((answer.token_ids[at - 1], row))
            seq.token_ids.extend(emitted)
            seq.num_computed += len(emitted)
            self._speculator.committed(seq, emitted, draft, length, range(accepted))
            self._emitted += len(emitted)
            self._decoded += 1
            self._accepted += accepted
            if seq.num_outputs < len(answer.token_ids):
                going.append((seq, answer))
            else:
                self._speculator.release(seq)
        self._running = going

    def _route(self) -> None:
        now = self._clock.now
        stats = EngineStats(
            running=len(self._running), steps=self._rounds, drafting=self._speculator.measurements()
        )
        report = self._reports.build(now, stats)
        busy, self._busy_before = self._nested.busy_s - self._busy_before, self._nested.busy_s
        passed, self._routed_at = now - self._routed_at, now
        if report is None:
            return
        draft = DraftReport(
            WORKER_ID, self._nested.step_s_by_exit(), self._settings.drafters,
            utilisation=min(1.0, busy / passed) if passed else 0.0,
        )  # fmt: skip
        answer = self._router.step(now, [report], [draft])["t0"]
        only_nested = self._settings.drafters == (NESTED,)
        assignment = engine_assignment(answer, only_nested=only_nested)
        if assignment != self._speculator.assignment:
            self._speculator.assign(assignment)
        self._assignment = f"exit {answer.depth}, cap {answer.cap}" if answer.cap else "no draft"


def _shuffled_for_ever(answers: Sequence[TracedAnswer], rng: random.Random) -> Iterator[TracedAnswer]:
    for _ in itertools.count():
        yield from rng.sample(answers, len(answers))


def _agreement(drafted: Sequence[int], truth: Sequence[int]) -> int:
    """Tokens of a draft that are right; the last token of an answer is never drafted."""
    count = 0
    while count < min(len(drafted), len(truth) - 1) and drafted[count] == truth[count]:
        count += 1
    return count
