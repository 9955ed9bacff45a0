"""The engine's side of drafting: opens sessions, asks for drafts, reports verdicts; one message a round."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from actors.drafting.assignment import UNRESTRICTED, DraftAssignment
from actors.drafting.interface import (
    NESTED,
    TREE,
    DraftSource,
    NestedWish,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.drafting.tree import best_chain, cut, depths, parents_of
from actors.engine.controller import Candidate, Controller
from actors.engine.messages import DrafterStats, DraftingMeasurements, ResetScope
from actors.engine.sequence import Sequence as EngineSequence
from actors.engine.sequence import Work
from actors.engine.shadow import ShadowScorer
from actors.models.runner import StateRow
from actors.sampling.grammar import GrammarError
from actors.sampling.params import MAX_DRAFT_TOKENS, DraftSampling

_STATES_KEPT = 8
"""Rounds without asking after which a sequence's states are not kept; the draft then goes on without them."""
_LEARN_INTERVAL = 4
"""Of a batch without drafts, drafters learn from a round of one sequence each so many times that it is looked
at, which is seldom itself."""
_HELD_BACK = 64
"""Tokens after which a sequence that wants no draft tells its source of them all the same."""


@dataclass(slots=True)
class _Counts:
    rounds: int = 0
    drafted: list[int] | None = None
    accepted: list[int] | None = None

    def add(self, places: Iterable[tuple[int, bool]]) -> None:
        """One round's tokens: how many stand above each in its draft, and whether it was accepted."""
        self.drafted = self.drafted or [0] * MAX_DRAFT_TOKENS
        self.accepted = self.accepted or [0] * MAX_DRAFT_TOKENS
        self.rounds += 1
        for place, accepted in places:
            self.drafted[place] += 1
            self.accepted[place] += accepted

    def stats(self) -> DrafterStats:
        drafted, accepted = self.drafted or [], self.accepted or []
        used = max((i + 1 for i, n in enumerate(drafted) if n), default=0)
        return DrafterStats(
            self.rounds, sum(drafted), sum(accepted), tuple(drafted[:used]), tuple(accepted[:used])
        )


@dataclass(frozen=True, slots=True)
class DraftTimeouts:
    """Longest wait of a round for its drafts, in seconds; `forced_s` when a request forces its length."""

    round_s: float
    forced_s: float


class Speculator:
    """Between the engine's sequences and a `DraftSource`. Engine thread only. `clock` in seconds."""

    def __init__(
        self,
        source: DraftSource,
        controller: Controller,
        timeouts: DraftTimeouts,
        max_model_len: int,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.source = source
        self.controller = controller
        controller.reads_in_rounds = NESTED in source.own_drafters
        self._timeouts = timeouts
        self._clock = clock
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._shadow = ShadowScorer(controller.acceptance)
        self._assigned = UNRESTRICTED
        self._nested_wish: NestedWish | None = None
        self._asked_tokens = 0
        self._asking, self._waited_s = 0, 0.0
        """Of the round: who asked for drafts, and the wait for them."""
        self._counts: dict[str, _Counts] = {}
        self.drafted_rounds = 0
        """Since start, per request."""
        self._closed_since_submit = False
        self._turn = 0
        self._batch: list[EngineSequence] = []
        """Who rests, for `_resting` rounds more and `_rested` so far."""
        self._resting = self._rested = 0
        self._learner: EngineSequence | None = None

    @property
    def assignment(self) -> DraftAssignment:
        return self._assigned

    def assign(self, assignment: DraftAssignment) -> None:
        """Obey `assignment` from the next round on."""
        if assignment.worker_id != self._assigned.worker_id:
            self.source.assign(assignment.worker_id)
        if assignment.exit_depth not in (None, self._assigned.exit_depth):
            self.controller.adopt(NESTED, assignment.exit_depth)
        self._assigned = assignment
        self._resting = 0
        self._nested_wish = (
            None if assignment == UNRESTRICTED else NestedWish(assignment.exit_depth, assignment.nested_cap)
        )

    def open(self, seq: EngineSequence) -> None:
        """Tell the source about a sequence that speculates (once)."""
        if not seq.speculates or seq.session_open:
            return
        sampling = seq.sampler.draft_sampling(seq.rule.name) if seq.sampler else DraftSampling(key=seq.key)
        self.source.open(
            SessionOpen(seq.session_id, tuple(seq.token_ids), seq.prompt_len, sampling, seq.epoch, seq.trees)
        )
        seq.session_open = True

    def release(self, seq: EngineSequence) -> None:
        """Forget a sequence that ended; the close leaves with the next `submit`."""
        if seq.session_open:
            self.source.close_session(seq.session_id)
            seq.session_open = False
            self._closed_since_submit = True

    def collect(
        self, decoding: Sequence[EngineSequence], prompt_rows: int
    ) -> dict[EngineSequence, tuple[SessionDraft, int]]:
        """Drafts for the coming round and the lengths to verify; waits until the round's deadline at most."""
        asked = [seq for seq in decoding if seq.asked]
        self._asking, self._waited_s = len(asked), 0.0
        if not asked:
            return {}
        started = self._clock()
        drafts = self.source.collect({seq.session_id: seq.epoch for seq in asked}, self._timeout(asked))
        self._waited_s = self._clock() - started
        self.controller.observe_wait(self._waited_s, len(asked))
        usable: list[tuple[EngineSequence, SessionDraft, Candidate, int]] = []
        for seq in asked:
            limit, seq.asked = seq.asked, 0
            draft = self._fitting(seq, drafts.get(seq.session_id))
            if draft is None:
                continue
            candidate = self._candidate(seq)
            candidate = replace(candidate, limit=min(candidate.limit, limit))
            length = min(len(draft.token_ids), candidate.limit)
            if seq.sampler is not None:
                try:
                    length = seq.sampler.admissible(
                        draft.token_ids[:length], tree=seq.tree_now, drawn=bool(draft.q)
                    )
                except GrammarError:
                    length = 0  # judging meets the same error and ends the request
            usable.append((seq, draft, candidate, length))
        lengths = self.controller.trim(
            [(candidate, draft, length) for _, draft, candidate, length in usable],
            len(decoding) + prompt_rows,
            len(decoding),
        )
        return {
            seq: (draft, length)
            for (seq, draft, _, _), length in zip(usable, lengths, strict=True)
            if length > 0
        }

    def _fitting(self, seq: EngineSequence, draft: SessionDraft | None) -> SessionDraft | None:
        """A draft in the form that the sequence takes, noted for scoring; None when nothing is in it."""
        acceptance, request = self.controller.acceptance, seq.control.acceptance
        if draft is not None:
            draft = cut(draft, self._usable(draft.token_ids))
        if draft is not None and (draft.error is not None or not draft.token_ids):
            draft = None
        if seq.tree_now:
            # A tree is what it is also where a worker could only give a chain.
            draft = None if draft is None else replace(draft, parents=parents_of(draft))
            acceptance.proposed_tree(request, draft, self._names(seq)[0])
        else:
            draft = None if draft is None else best_chain(draft)
            acceptance.proposed(request, draft, self._names(seq))
        return draft

    def _usable(self, token_ids: Sequence[int]) -> int:
        """Tokens of a draft before the first that this target has not: its drafter may serve others too."""
        usable = itertools.takewhile(lambda token: 0 <= token < self._vocab_size, token_ids)
        return min(MAX_DRAFT_TOKENS, sum(1 for _ in usable))

    def wants_states(self, seq: EngineSequence) -> bool:
        """Whether the states of what a sequence emits are worth keeping: it has asked for drafts lately."""
        lately = seq.control.rounds_since_asked < _STATES_KEPT
        return lately and seq.session_open and self.source.wants_states

    def learns_from(self, work: Work) -> bool:
        """Whether drafters learn from a sequence's round. What they learn serves all alike: of a batch
        without drafts, a round of one sequence now and then has to do."""
        return work.seq.session_open and (bool(work.drafts) or work.seq is self._learner)

    def committed(
        self,
        seq: EngineSequence,
        emitted: Sequence[int],
        draft: SessionDraft | None,
        drafted: int,
        accepted: Sequence[int],
        states: Sequence[StateRow] = (),
    ) -> None:
        """Record a verdict, to be sent with the next `submit`. accepted: indices of the draft's tokens that
        were, out of the first `drafted`. states: one a token of `emitted`, or none."""
        if draft is not None:
            self.drafted_rounds += 1
            self._count(draft, drafted, accepted)
            if not seq.forced:
                self.controller.observe_accepted(len(accepted))
        if not seq.session_open:
            return
        self.controller.acceptance.emitted(seq.control.acceptance, emitted, drafted)
        seq.unsent_tokens.extend(emitted)
        if not states:
            seq.unsent_states.clear()  # those of tokens that others follow without are of no use
        seq.unsent_states.extend(states)
        seq.unsent_drafted += drafted

    def _count(self, draft: SessionDraft, drafted: int, accepted: Sequence[int]) -> None:
        found: dict[str, list[tuple[int, bool]]] = {}
        for index, depth in enumerate(depths(parents_of(draft)[:drafted])):
            source = draft.sources[index] if draft.sources else draft.drafter
            found.setdefault(source, []).append((depth - 1, index in accepted))
        for source, places in found.items():
            self._counts.setdefault(source, _Counts()).add(places)

    def submit(self, running: Iterable[EngineSequence], prompt_rows: int) -> None:
        """Plan the coming round and send verdicts and wishes in one message.

        A sequence that wants no draft keeps its news to itself for a while, so that plain decoding stays as
        cheap as it is without drafters.
        """
        running = list(running)
        decoding = [seq for seq in running if seq.session_open and seq.decoding]
        if self._resting and decoding == self._batch and not self._closed_since_submit:
            self._resting -= 1
            self._rested += 1
            self._learner = None
            return
        if self._rested:
            self.controller.rested([seq.control for seq in self._batch], self._rested)
        self._turn += 1
        for seq in decoding:
            seq.tree_now = _takes_tree(seq, alone=len(running) == 1)
        turn, waits = divmod(self._turn, _LEARN_INTERVAL if len(decoding) > 1 else 1)
        self._learner = decoding[turn % len(decoding)] if decoding and not waits else None
        plain = [seq.num_computed for seq in running if seq.decoding and not seq.session_open]
        rounds = self._rests(decoding, prompt_rows, len(plain))
        self._batch, self._resting, self._rested = decoding, max(0, rounds - 1), min(1, rounds)
        if rounds:
            budgets: Sequence[int] = [0] * len(decoding)
        else:
            joining = sum(not seq.decoding for seq in running)
            candidates = [self._candidate(seq) for seq in decoding]
            budgets = self.controller.plan(candidates, prompt_rows, joining, plain)
        shadowed = self._shadow_round(decoding)
        updates = []
        for seq, budget in zip(decoding, budgets, strict=True):
            seq.asked = budget
            if seq.asked or len(seq.unsent_tokens) >= _HELD_BACK or seq is shadowed:
                updates.append(self._update(seq, budget, seq is shadowed))
        if updates or self._closed_since_submit:
            self.source.submit(updates, self._timeout(seq for seq in decoding if seq.asked))
            self._closed_since_submit = False

    def ended(self, seconds: float, requests: int) -> None:
        """A round in which so many requests decoded took `seconds` beside the target's pass."""
        self.controller.observe_overhead(seconds - self._waited_s, requests, self._asking)

    def _rests(self, decoding: Sequence[EngineSequence], prompt_rows: int, plain: int) -> int:
        """Coming rounds of a batch in which nobody asks for anything, while it stays as it is, beside `plain`
        requests that never draft. A single sequence does not rest: drafters learn from each of its rounds."""
        if len(decoding) < 2 or self._assigned.shadow is not None or any(seq.forced for seq in decoding):
            return 0
        return self.controller.rests([seq.control for seq in decoding], prompt_rows, plain)

    def _shadow_round(self, decoding: Sequence[EngineSequence]) -> EngineSequence | None:
        """Score what arrived; the sequence that asks for a shadow draft in the coming round."""
        if self._shadow.waiting:
            self._shadow.round(self.source.take_shadows())
        shadow = self._assigned.shadow
        return None if shadow is None else self._shadow.choose(shadow, decoding)

    def _update(self, seq: EngineSequence, budget: int, shadowed: bool) -> SessionUpdate:
        seq.epoch += 1
        speculation, nested = seq.request.speculation, self._nested_wish
        if nested is not None:
            nested = self._wish(seq, nested, shadowed)
        cap = nested.cap if nested is not None else None
        self._asked_tokens += budget if cap is None else min(budget, cap)
        update = SessionUpdate(
            session_id=seq.session_id,
            epoch=seq.epoch,
            new_tokens=tuple(seq.unsent_tokens),
            budget=budget,
            drafted=seq.unsent_drafted,
            candidates=tuple(seq.unsent_candidates),
            drafter=speculation.drafter,
            exit_depth=speculation.exit_depth,
            nested=nested,
            chain=seq.trees and not seq.tree_now,
            states=tuple(seq.unsent_states),
        )
        seq.unsent_tokens.clear()
        seq.unsent_states.clear()
        seq.unsent_candidates.clear()
        seq.unsent_drafted = 0
        return update

    def _wish(self, seq: EngineSequence, wish: NestedWish, shadowed: bool) -> NestedWish:
        """`wish` for one sequence, whose epoch is that of the update."""
        if _pinned(seq):
            wish = replace(wish, cap=None)
        shadow = self._assigned.shadow
        if shadowed and shadow is not None:
            self._shadow.asked(seq)
            wish = replace(wish, shadow_exit=shadow.exit, shadow_length=shadow.length)
        return wish

    def _timeout(self, asked: Iterable[EngineSequence]) -> float:
        return self._timeouts.forced_s if any(seq.forced for seq in asked) else self._timeouts.round_s

    def _names(self, seq: EngineSequence) -> tuple[str, ...]:
        pinned = seq.request.speculation.drafter
        if pinned is not None:
            return (pinned,)
        return (TREE,) if seq.tree_now else tuple(self.source.drafters)

    def _candidate(self, seq: EngineSequence) -> Candidate:
        limit = min(seq.max_draft_tokens, seq.room_for_drafts(self._max_model_len))
        if limit > self._assigned.cap and not _pinned(seq) and (not seq.tree_now or self._assigned.cap == 0):
            # The length of a chain; what a tree has beside it costs the pool nothing.
            limit = self._assigned.cap
        names = self._names(seq)
        return Candidate(seq.control, limit, names, seq.forced, seq.tree_now, context=seq.num_computed)

    def reset(self, scope: ResetScope = "all") -> None:
        self._resting = self._rested = 0
        self.source.reset(scope)
        if scope == "all":
            self.controller.reset()

    def measurements(self) -> DraftingMeasurements:
        """For reports; a copy."""
        return DraftingMeasurements(
            cost_s_by_rows=self.controller.costs.measured(),
            acceptance_by_exit=self.controller.acceptance.exit_evidence(),
            asked_tokens=self._asked_tokens,
            served=self.source.served(),
            latency_s=dict(self.source.latency_s()),
            shadow_tokens=self._shadow.scored,
            holds_draft=NESTED in self.source.own_drafters,
        )

    def drafter_stats(self) -> dict[str, DrafterStats]:
        return {name: counts.stats() for name, counts in self._counts.items()}


def _takes_tree(seq: EngineSequence, *, alone: bool) -> bool:
    """Whether its next draft is a tree. In a batch, also one of prompts that are computed, all wait for each
    other's drafts and rows, and what stands beside the best chain brings less than it takes (measured:
    docs/methods/draft-trees.md)."""
    return seq.trees and (alone or seq.request.speculation.tree is True)


def _pinned(seq: EngineSequence) -> bool:
    """Whether the request decides for itself what is drafted."""
    return seq.forced or seq.request.speculation.exit_depth is not None
