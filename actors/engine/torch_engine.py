"""The torch target engine: one round judges every draft of the batch in one forward pass.

Plain decoding is the same round with no drafts in it, so speculation on and off share every line here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from actors.costs import CostModel
from actors.drafting.acceptance_model import RequestAcceptance, kind_of
from actors.drafting.assignment import DraftAssignment
from actors.drafting.interface import SessionDraft
from actors.drafting.tree import depths
from actors.engine.batch import RowSpan, build_batch
from actors.engine.controller import ControlState
from actors.engine.messages import EngineRequest, EngineStats, RequestOutput, ResetScope, RoundReport
from actors.engine.phases import PhaseClock
from actors.engine.profiling import CostProfiler
from actors.engine.scheduler import Scheduler
from actors.engine.sequence import Sequence as EngineSequence
from actors.engine.sequence import Work
from actors.engine.speculator import Speculator
from actors.models.runner import BLOCK_SIZE, LayeredRunner, ModelRunner, RaggedBatch, StateRow
from actors.sampling.grammar import GrammarError, GrammarMatcher
from actors.sampling.logprobs import token_logprobs
from actors.sampling.noise import derive_key
from actors.sampling.params import GrammarSpec, ParameterError, SpeculationParams
from actors.sampling.pipeline import SequenceSampler
from actors.sampling.reduce import best_ids, top_ids
from actors.verification.coupled import CoupledRule, accept_equal, accept_path
from actors.verification.registry import get_rule
from actors.verification.rule import Verdict, VerificationRule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """What a request gets that does not say otherwise."""

    enabled: bool
    max_draft_tokens: int
    verification: str
    tree: bool = True


class TorchEngine:
    """`TargetEngine` over a `ModelRunner`. Owned by one thread."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        speculator: Speculator,
        defaults: SpeculationDefaults,
        max_model_len: int,
        compile_grammar: Callable[[GrammarSpec], GrammarMatcher],
    ) -> None:
        capacity = scheduler.pool.num_blocks * scheduler.pool.block_size
        if capacity < max_model_len:
            raise ValueError(
                f"the KV pool holds {capacity} tokens, a sequence may have {max_model_len} (max_model_len): "
                "give the pool more blocks or lower max_model_len"
            )
        self._runner = runner
        self._scheduler = scheduler
        self._speculator = speculator
        self._defaults = defaults
        self._max_model_len = max_model_len
        self._compile_grammar = compile_grammar
        self._profiler = CostProfiler(runner, scheduler.pool, speculator.controller.costs, max_model_len)
        # Found once: checking a protocol takes longer than reading the states.
        self._layered = runner if isinstance(runner, LayeredRunner) else None
        self._clock = PhaseClock()
        self._steps = self._emitted = self._prompt_tokens = self._cached_tokens = 0

    # -- requests ---------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises `ParameterError` for what can never be served."""
        total = len(request.prompt_ids) + len(request.output_ids_so_far)
        vocab = self._runner.info.vocab_size
        emits = request.sampling.max_tokens > len(request.output_ids_so_far)
        if total + emits > self._max_model_len:
            raise ParameterError(
                "prompt", f"has {total} tokens, the model's context holds {self._max_model_len}"
            )
        if not all(0 <= token < vocab for token in (*request.prompt_ids, *request.output_ids_so_far)):
            raise ParameterError("prompt", f"token ids must be in [0, {vocab})")
        if self._scheduler.find(request.request_id) is not None:
            raise ParameterError("request_id", f"{request.request_id!r} is already running")
        self._scheduler.add(self._new_sequence(request))
        self._profiler.interrupted()

    def _new_sequence(self, request: EngineRequest) -> EngineSequence:
        sampling, speculation = request.sampling, request.speculation
        rule = get_rule(speculation.verification or self._defaults.verification)
        sampler = None
        if not sampling.plain_greedy:
            grammar = self._compile_grammar(sampling.grammar) if sampling.grammar is not None else None
            sampler = SequenceSampler(
                request, self._runner.info.vocab_size, grammar, self._runner.info.device
            )
        limit = 0
        if speculation.enabled and (self._defaults.enabled or speculation.force):
            asked = speculation.max_draft_tokens
            limit = self._defaults.max_draft_tokens if asked is None else asked
        key = sampler.key if sampler is not None else derive_key(sampling.seed, request.choice)
        trees = self._takes_trees(speculation, rule, sampler)
        control = ControlState(RequestAcceptance(kind_of(sampling.temperature)))
        return EngineSequence(request, sampler, rule, key, limit, trees, control=control)

    def _takes_trees(
        self, speculation: SpeculationParams, rule: VerificationRule, sampler: SequenceSampler | None
    ) -> bool:
        """Whether a request's drafts are trees. Raises `ParameterError` when it insists in vain."""
        reason = None
        if not self._runner.supports_trees:
            reason = "this model verifies chains only"
        elif not isinstance(rule, CoupledRule):
            reason = f"verification {rule.name!r} judges chains only"
        elif sampler is not None and sampler.remembers:
            reason = "penalties, grammars and bad words allow chains only"
        if speculation.tree is None:
            return reason is None and self._defaults.tree and not speculation.force
        if speculation.tree and reason is not None:
            raise ParameterError("speculation.tree", f"must not be true: {reason}")
        return speculation.tree

    def abort(self, request_id: str) -> None:
        seq = self._scheduler.find(request_id)
        if seq is not None:
            self._remove(seq)
            self._speculator.submit((), 0)

    def _remove(self, seq: EngineSequence) -> None:
        self._scheduler.remove(seq)
        self._speculator.release(seq)

    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    # -- one round --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> Sequence[RequestOutput]:
        """Collect drafts, run one forward pass, judge, emit, and ask for the next round's drafts."""
        clock = self._clock
        clock.start()
        running = list(self._scheduler.running.values())
        decoding = [seq for seq in running if seq.decoding]
        drafts = self._speculator.collect(decoding, self._expected_prompt_rows())
        beside = clock.lap("drafts")
        works = self._scheduler.schedule(drafts)
        if not works:
            return ()
        for work in works:
            self._speculator.open(work.seq)
        batch, spans = build_batch(works, self._runner.info.device)
        beside += clock.lap("schedule")
        logits, states = self._forward(batch, any(self._speculator.wants_states(work.seq) for work in works))
        seconds = clock.lap("forward")
        verdicts = self._judge(works, spans, logits)
        seconds += clock.lap("judge")
        decodes = all(work.seq.decoding for work in works)
        if decodes:
            costs = self._speculator.controller.costs
            costs.ended(batch.num_tokens, seconds, partial(_attention_s, costs, works))
        self._collect_candidates(works, spans, logits)
        beside += clock.lap("learn")
        self._steps += 1
        outputs = [
            output
            for work, span, verdict in zip(works, spans, verdicts, strict=True)
            if (output := self._commit(work, span, verdict, logits, states)) is not None
        ]
        beside += clock.lap("commit")
        self._speculator.submit(self._scheduler.running.values(), self._expected_prompt_rows())
        beside += clock.lap("submit")
        if decodes:
            self._speculator.ended(beside, len(works))
        return outputs

    def _forward(self, batch: RaggedBatch, with_states: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of the batch's rows and, where a drafter reads them, their last hidden states."""
        if not with_states:
            return self._runner.forward(batch), None
        if self._layered is None:
            raise TypeError(f"{type(self._runner).__name__} gives no hidden states")
        states, logits = self._layered.forward_with_states(batch)
        return logits, states

    def _expected_prompt_rows(self) -> int:
        pending = sum(seq.num_pending for seq in self._scheduler.running.values() if not seq.decoding)
        return min(pending, self._scheduler.limits.prefill_chunk)

    def _judge(self, works: Sequence[Work], spans: Sequence[RowSpan], logits: Tensor) -> list[Verdict | None]:
        """A verdict for each work that completes its known tokens. Requests that decode greedily without
        further conditions share one argmax."""
        plain = [
            row
            for work, span in zip(works, spans, strict=True)
            if span.decisions and work.seq.sampler is None
            for row in range(span.last - span.decisions, span.last)
        ]
        chosen: dict[int, int] = {}
        if plain:
            rows = logits if len(plain) == len(logits) else logits[torch.tensor(plain, device=logits.device)]
            chosen = dict(zip(plain, best_ids(rows), strict=True))
        verdicts: list[Verdict | None] = []
        for work, span in zip(works, spans, strict=True):
            if not span.decisions:
                verdicts.append(None)
            elif work.seq.sampler is None:
                tokens = [chosen[row] for row in range(span.last - span.decisions, span.last)]
                verdicts.append(_accept_greedy(tokens, work))
            else:
                verdicts.append(self._judge_sampled(work, work.seq.sampler, span.deciding(logits)))
        return verdicts

    @staticmethod
    def _judge_sampled(work: Work, sampler: SequenceSampler, logits: Tensor) -> Verdict | None:
        """None when the request's grammar fails at run time, or anything else that is its own: that ends the
        request alone, and not those which share the round."""
        try:
            return _verdict(work, sampler, logits)
        except GrammarError as error:
            message = str(error)
        except Exception:
            logger.exception("request %s could not be sampled for", work.seq.request.request_id)
            message = "the next token could not be sampled"
        work.seq.finish_reason, work.seq.error = "error", message
        return None

    def _collect_candidates(self, works: Sequence[Work], spans: Sequence[RowSpan], logits: Tensor) -> None:
        """Most probable next ids of rows, those of rejected drafts included, for learning drafters."""
        count = self._speculator.source.wants_candidates
        learning = [
            (work, span)
            for work, span in zip(works, spans, strict=True)
            if count and span.decisions and self._speculator.learns_from(work)
        ]
        if not learning:
            return
        decisions = sum(span.decisions for _, span in learning)
        rows = (
            logits if decisions == len(logits) else torch.cat([span.deciding(logits) for _, span in learning])
        )
        best = top_ids(rows, count)
        at = 0
        for work, _span in learning:
            inputs = (work.seq.token_ids[-1], *work.drafts)
            for token in inputs:
                work.seq.unsent_candidates.append((token, tuple(best[at])))
                at += 1

    def _commit(
        self,
        work: Work,
        span: RowSpan,
        verdict: Verdict | None,
        logits: Tensor,
        states: Tensor | None,
    ) -> RequestOutput | None:
        """Make a verdict truth: tokens, KV length, sampler state; and say what was emitted."""
        seq = work.seq
        self._add_prompt_logprobs(work, span, logits)
        if seq.error is not None:
            return self._fail(seq)
        if verdict is None:
            self._scheduler.commit(seq, seq.num_computed + work.num_tokens)
            return None
        path = verdict.accepted_at
        emitted = self._cut(seq, [*(work.drafts[i] for i in path), verdict.next_token])
        accepted = path[: len(emitted)]
        # Row 0 decides the first token, the row of an accepted draft the one after it.
        rows = [0, *(i + 1 for i in path)][: len(emitted)]
        self._straighten(seq, accepted)
        top = seq.request.sampling.logprobs
        logprobs = None
        if top is not None:
            logprobs = tuple(token_logprobs(span.deciding(logits)[rows], emitted, top))
        seq.token_ids.extend(emitted)
        if seq.sampler is not None:
            try:
                seq.sampler.commit(emitted)
            except GrammarError as error:
                seq.error = str(error)
                return self._fail(seq)
        self._scheduler.commit(seq, max(seq.num_computed, len(seq.token_ids) - 1))
        read: Sequence[StateRow] = ()
        if states is not None and self._speculator.wants_states(seq):
            deciding = span.last - span.decisions
            read = [(states, deciding + row) for row in rows]
        self._speculator.committed(seq, emitted, work.proposal, len(work.drafts), accepted, read)
        if seq.finish_reason is not None:
            self._remove(seq)
        self._emitted += len(emitted)
        first = not seq.reported_first
        if first:
            seq.reported_first = True
            self._prompt_tokens += seq.prompt_len
            self._cached_tokens += seq.cached_tokens
        return RequestOutput(
            request_id=seq.request.request_id,
            token_ids=tuple(emitted),
            logprobs=logprobs,
            round=_round_report(work.proposal, len(work.drafts), len(accepted)),
            finish_reason=seq.finish_reason,
            stop_token_id=seq.stop_token_id,
            cached_tokens=seq.cached_tokens if first else 0,
            queue_s=seq.started_at - seq.added_at if first else None,
            prompt_logprobs=tuple(seq.prompt_logprobs) if first and seq.wants_prompt_logprobs else None,
        )

    def _straighten(self, seq: EngineSequence, accepted: Sequence[int]) -> None:
        """Move the KV of a tree's accepted drafts to where a chain's is: right after the known tokens."""
        moves = [(i, place) for place, i in enumerate(accepted) if i != place]
        if not moves:
            return
        first = len(seq.token_ids)

        def slots(entries: Iterable[int]) -> Tensor:
            at = [seq.blocks[e // BLOCK_SIZE] * BLOCK_SIZE + e % BLOCK_SIZE for e in entries]
            return torch.tensor(at, dtype=torch.int64, device=self._runner.info.device)

        self._runner.copy_slots(
            slots(first + i for i, _ in moves), slots(first + place for _, place in moves)
        )

    def _fail(self, seq: EngineSequence) -> RequestOutput:
        self._remove(seq)
        return RequestOutput(seq.request.request_id, finish_reason="error", error=seq.error)

    def _cut(self, seq: EngineSequence, tokens: Sequence[int]) -> list[int]:
        """The part of a block that is emitted: up to a stop id or a limit, which ends the request."""
        sampling = seq.request.sampling
        stop_ids = sampling.stop_ids
        emitted: list[int] = []
        for token in tokens:
            if seq.num_outputs + len(emitted) >= sampling.max_tokens:
                break
            emitted.append(token)
            if token in stop_ids:
                seq.finish_reason, seq.stop_token_id = "stop", token
                return emitted
        full = len(seq.token_ids) + len(emitted) >= self._max_model_len
        if full or seq.num_outputs + len(emitted) >= sampling.max_tokens:
            seq.finish_reason = "length"
        return emitted

    def _add_prompt_logprobs(self, work: Work, span: RowSpan, logits: Tensor) -> None:
        seq = work.seq
        top = seq.request.sampling.prompt_logprobs
        if top is None or seq.reported_first or len(seq.prompt_logprobs) >= seq.prompt_len:
            return
        if not seq.prompt_logprobs:
            seq.prompt_logprobs.append(None)
        # Row of token i scores token i + 1; a preempted prompt is computed again, but scored once.
        for row in range(work.num_tokens):
            target = seq.num_computed + row + 1
            if target == len(seq.prompt_logprobs) and target < seq.prompt_len:
                line = logits[span.first + row : span.first + row + 1]
                seq.prompt_logprobs.extend(token_logprobs(line, [seq.token_ids[target]], top))

    # -- the rest ---------------------------------------------------------------------------------------

    def profile(self) -> None:
        """Measure what rounds cost. Call before the first request."""
        self._profiler.profile()

    def idle(self, waiting: Callable[[], bool]) -> bool:
        """Measure again what rounds cost, see `CostProfiler.work`."""
        return self._profiler.work(waiting)

    def stats(self) -> EngineStats:
        pool = self._scheduler.pool
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_cached=pool.num_cached,
            kv_blocks_free=pool.num_free,
            steps=self._steps,
            tokens_emitted=self._emitted,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            preemptions=self._scheduler.num_preemptions,
            phase_seconds=dict(self._clock.seconds),
            drafted_rounds=self._speculator.drafted_rounds,
            drafters=self._speculator.drafter_stats(),
            draft_source=self._speculator.source.stats(),
            controller=self._speculator.controller.table(self._speculator.source.drafters),
            drafting=self._speculator.measurements(),
            assignment=self._speculator.assignment,
        )

    def assign(self, assignment: DraftAssignment) -> None:
        self._speculator.assign(assignment)

    def reset_shared_state(self, scope: ResetScope = "all") -> None:
        self._scheduler.pool.reset_cache()
        self._speculator.reset(scope)

    def close(self) -> None:
        self._speculator.source.close()


def _verdict(work: Work, sampler: SequenceSampler, logits: Tensor) -> Verdict:
    """Of a request that samples, or has conditions on what it emits. Raises GrammarError."""
    rule, greedy = work.seq.rule, work.seq.request.sampling.greedy
    first_position = len(work.seq.token_ids)
    if work.parents and isinstance(rule, CoupledRule):
        scores = sampler.tree_scores(logits, depths(work.parents))
        return rule.verify_tree(
            scores,
            work.drafts,
            work.parents,
            key=sampler.key,
            first_position=first_position,
            greedy=greedy,
        )
    q = work.proposal.q[: len(work.drafts)] if work.proposal is not None else ()
    scores = sampler.scores(logits, work.drafts, drawn=bool(q))
    return rule.verify(scores, work.drafts, q, key=sampler.key, first_position=first_position, greedy=greedy)


def _attention_s(costs: CostModel, works: Sequence[Work]) -> float:
    return sum(costs.attention_s(work.seq.num_computed, work.num_rows, len(works)) for work in works)


def _accept_greedy(tokens: Sequence[int], work: Work) -> Verdict:
    """The verdict where row j's best token is `tokens[j]`."""
    if work.parents:
        return accept_path(lambda row, _: tokens[row], work.drafts, work.parents)
    return accept_equal(tokens, work.drafts)


def _round_report(proposal: SessionDraft | None, drafted: int, accepted: int) -> RoundReport:
    if proposal is None or drafted == 0:
        return RoundReport()
    return RoundReport(drafted, accepted, proposal.drafter, proposal.exit_depth)
