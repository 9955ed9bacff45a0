"""The nested drafter: sub-models are the first n_1 < n_2 < ... layers of a model (S2D, arXiv 2407.01955)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from actors.drafting.coupling import SharedColumns, SharedTokens, shared_columns
from actors.drafting.deferred_kv import DeferredKv, DeferredSequence
from actors.drafting.draw import CutVocabulary, Draw, draw_tokens
from actors.drafting.early_stop import EarlyStop
from actors.drafting.errors import DrafterError
from actors.drafting.exit_heads import ExitHeads
from actors.drafting.interface import (
    NESTED,
    SCOPE_SHIFT,
    DraftQuery,
    ResetScope,
    SessionDraft,
    SessionOpen,
)
from actors.drafting.nested_session import Proposal, Session
from actors.drafting.step_times import StepTimes
from actors.models.runner import ChainWish, LayeredRunner, StateRow
from actors.sampling.params import GREEDY_TEMPERATURE
from actors.verification.trees import ROOT

WINDOWS_KEPT = 2
"""The states of one window were themselves computed from the one before it."""
STATES_CONTEXT = 256
"""Tokens of a session that a draft which reads states sees, unless told otherwise: their states are kept."""
SIBLINGS = 6
"""Alternatives to a drafted token that a tree offers at most."""
CATCH_UP = 32
"""Waiting tokens of a session that a proposal runs itself, unless told otherwise."""
ABSORB_FROM = 8
"""Waiting tokens that background work leaves to the next proposal, unless told otherwise."""
SELDOM = 4
"""Verdicts without being asked after which a session's tokens wait for the next proposal: where draft and
target share cores, background work costs the target time."""


class NestedDrafter:
    """Drafts with the first layers of a model, all sessions of a call together.

    A proposal costs one ragged pass per draft position and layer block. Prompts are absorbed by `work` in
    chunks, off the critical path, once somebody asks: until few enough tokens are left, `propose` gives an
    empty draft. When the KV pool is full, sessions not asked for during the last `keep_rounds` calls lose
    their KV, least recently used first (they are absorbed again when asked for); if there are none, the
    asking session gets error "capacity" and the others go on. So sessions in use never evict one another in
    turn.

    Args:
        runner: the model, with its KV pool.
        exits: depths in layers that may draft, ascending; the last may be the whole model.
        thresholds: S2D's tau, one for each exit but the last: a token without a pinned exit leaves at the
            first exit whose largest probability (at temperature 1) exceeds its tau. None: `default_exit`.
        default_exit: depth used without a pinned exit; None takes the shallowest.
        max_sessions: sessions held; one more is refused with code "capacity".
        prefill_chunk: tokens a `work` call runs at most, in each layer block.
        catch_up: waiting tokens of one session that a proposal runs itself, at most.
        absorb_from: waiting tokens of one session that `work` leaves to the next proposal.
        keep_rounds: see above.
        heads: how exits are read; None: through the runner's own norm and head.
        window: the draft's attention window in tokens. Of a session, KV of the last `WINDOWS_KEPT` windows is
            kept, however long it grows; a longer prompt is absorbed from there.
        context: tokens of a session that are read at most, in whole KV blocks; None for all that there are,
            or for `STATES_CONTEXT` of them with `state_in`.
            The same bound for a draft without a window: it drafts from what came last, at its own positions.
        state_in: float32 [H, S], from a target's normalised last hidden state to what is added to the
            embedding of the token that the target emitted there; None for a draft that reads no states.
        early_stop: turns confidence into acceptance, and says when a draft ends before its budget.
    """

    name = NESTED
    learns = False

    def __init__(
        self,
        runner: LayeredRunner,
        exits: Sequence[int],
        *,
        thresholds: Sequence[float] | None = None,
        default_exit: int | None = None,
        max_sessions: int = 256,
        prefill_chunk: int = 64,
        catch_up: int = CATCH_UP,
        absorb_from: int = ABSORB_FROM,
        keep_rounds: int = 64,
        heads: ExitHeads | None = None,
        window: int | None = None,
        context: int | None = None,
        state_in: Tensor | None = None,
        early_stop: EarlyStop | None = None,
    ) -> None:
        self._runner, self._heads = runner, heads or ExitHeads()
        self._kv = DeferredKv(runner, exits, own_layers=self._heads.own_layers, state_in=state_in)
        ids = self._heads.token_ids
        self._vocabulary = None if ids is None else CutVocabulary(ids, self._heads.vocab_size)
        self.exits = tuple(exits)
        if thresholds is not None and len(thresholds) != len(exits) - 1:
            raise ValueError("thresholds must hold one value for each exit but the last")
        if default_exit is not None and default_exit not in self.exits:
            raise ValueError(f"default_exit {default_exit} is not among the exits {self.exits}")
        if min(max_sessions, prefill_chunk, keep_rounds, absorb_from) < 1 or catch_up < absorb_from:
            raise ValueError("limits must be positive, catch_up at least absorb_from")
        self._thresholds = None if thresholds is None else tuple(thresholds)
        self._default = 0 if default_exit is None else self.exits.index(default_exit)
        self._max_model_len = runner.info.max_model_len
        bounds = [n for n in (window and WINDOWS_KEPT * window, context) if n]
        self._kept = min(bounds, default=None if state_in is None else STATES_CONTEXT)
        self.reads_states = state_in is not None
        self._early_stop = early_stop or EarlyStop()
        if self._early_stop.curves and len(self._early_stop.curves) != len(exits):
            raise ValueError("early_stop needs curves for every exit, or none")
        self._curves = [
            torch.tensor([c.greedy.confidence, c.greedy.acceptance], dtype=torch.float64)
            for c in self._early_stop.curves
        ]
        self._max_sessions = max_sessions
        self._prefill_chunk = prefill_chunk
        self._catch_up, self._absorb_from = catch_up, absorb_from
        self._keep_rounds = keep_rounds
        self._sessions: dict[int, Session] = {}
        self._shared: WeakKeyDictionary[SharedTokens, SharedColumns] = WeakKeyDictionary()
        self._clock = 0
        self._turns: dict[int, int] = {}
        """By stream: when its prompts were last absorbed; only of streams with prompts that wait."""
        self._steps = StepTimes(self.exits)

    @property
    def kv_blocks_used(self) -> int:
        return self._kv.blocks_total - self._kv.blocks_free

    @property
    def kv_blocks_free(self) -> int:
        return self._kv.blocks_free

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        """Measured seconds of a draft step by exit depth and number of sessions in it."""
        return self._steps.seconds()

    def profile(self) -> None:
        """Measure steps at every exit, before the first session."""
        self._steps.profile(self, min(self._max_sessions, self._kv.blocks_free))

    def open(self, session: SessionOpen) -> None:
        if session.session_id not in self._sessions and len(self._sessions) >= self._max_sessions:
            raise DrafterError("capacity", f"nested holds {self._max_sessions} sessions already")
        if not session.token_ids:
            raise DrafterError("unsupported", "a session needs at least one token")
        self.close(session.session_id)
        self._sessions[session.session_id] = Session(
            seq=self._kv.new_sequence(session.token_ids),
            sampling=session.sampling,
            committed=len(session.token_ids),
            goal=self._default if self._thresholds is None else len(self.exits) - 1,
            last_used=self._clock,
            # Absorbed once somebody asks: most sessions are served by the drafters before this one.
            parked=True,
        )

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        session = self._get(session_id)
        session.commit(new_tokens)
        self._slide(session)

    def note_states(self, session_id: int, states: Sequence[StateRow]) -> None:
        """States [S] of the target for the last committed tokens, as it emitted them. Those of tokens that
        the draft no longer sees are not kept."""
        if not self.reads_states:
            return
        session = self._get(session_id)
        first = session.committed - len(states)
        if first < 0:
            raise ValueError(f"{len(states)} states for {session.committed} committed tokens")
        seen = max(first, session.seq.first)
        # What was drafted without them is run again, with them.
        session.seq.rollback(seen)
        session.seq.states.update(zip(range(seen, session.committed), states[seen - first :], strict=True))

    def rewind(self, session_id: int, num_tokens: int) -> None:
        """Forget the committed tokens after the first `num_tokens`, at least one of which must stay."""
        session = self._get(session_id)
        if not 1 <= num_tokens <= session.committed:
            raise ValueError(f"cannot keep {num_tokens} of {session.committed} tokens")
        del session.seq.tokens[num_tokens:]
        for index in [i for i in session.seq.states if i >= num_tokens]:
            del session.seq.states[index]
        session.committed = num_tokens
        if num_tokens <= session.seq.first:  # what the window has dropped: absorbed again when asked for
            self._kv.release(session.seq)
            session.parked = True
        else:
            session.seq.rollback(num_tokens)

    def close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._kv.release(session.seq)

    def reset(self, scope: ResetScope = "all") -> None:
        """Sessions share nothing but the weights."""

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self._clock += 1
        for query in queries:
            session = self._get(query.session_id)
            session.last_used, session.unasked = self._clock, 0
        return self.look_ahead(queries)

    def look_ahead(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        """As `propose`, for nobody who waits: it does not count as a use of the sessions."""
        answers = [self._begin(query, self._get(query.session_id)) for query in queries]
        active = [a for a in answers if isinstance(a, Proposal)]
        with torch.inference_mode():
            while active:
                started = time.perf_counter()
                waiting = sum(1 if p.draws else self._backlog(p) for p in active)
                places = 1
                if self._is_greedy(active):
                    self._draft_greedily(active)
                    places = max(len(p.draws) for p in active)
                else:
                    self._draft_position(active)
                # Steps that mix exits, or catch up with much, are not what a step of one exit costs.
                if len({p.exit for p in active}) == 1 and waiting <= 2 * len(active):
                    took = (time.perf_counter() - started) / places
                    self._steps.observe(active[0].exit, len(active), took)
                active = [
                    p for p in active if len(p.draws) < p.budget and not self._ended(p.query, p.survival)
                ]
        return [self._finish(a) if isinstance(a, Proposal) else a for a in answers]

    def _ended(self, query: DraftQuery, survival: float) -> bool:
        """Whether a draft ends before its budget, with tokens that are accepted with this probability."""
        return survival < self._floor(query)

    def _floor(self, query: DraftQuery) -> float:
        """Probability of being accepted, all tokens together, below which a draft ends."""
        return max(query.min_survival, self._early_stop.floor)

    def work(self) -> bool:
        """Run one chunk of waiting prompt tokens; False when none could be run."""
        room = self._prefill_chunk
        chosen: list[Session] = []
        ends: list[int] = []
        for session in self._next_to_absorb():
            if room <= 0:
                break
            goal = self._kv.exit_segment(session.goal)
            start = session.seq.lengths[goal]
            # The last committed token stays: the next proposal needs its logits.
            end = min(start + room, session.committed - 1)
            session.starved = not self._make_room(session, end, keep=chosen)
            if not session.starved:
                chosen.append(session)
                ends.append(end)
                room -= end - start
        with torch.inference_mode():
            for segment in range(self._kv.num_segments):
                todo = [
                    (s.seq, end - s.seq.lengths[segment])
                    for s, end in zip(chosen, ends, strict=True)
                    if end > s.seq.lengths[segment] and self._wants(s, segment)
                ]
                if todo:
                    self._kv.advance([seq for seq, _ in todo], segment, [count for _, count in todo])
        return bool(chosen)

    def _next_to_absorb(self) -> Sequence[Session]:
        """Sessions with waiting tokens, by stream, those first whose turn it is: many prompts of one target
        do not keep those of another waiting."""
        waiting: dict[int, list[Session]] = {}
        for sid, session in self._sessions.items():
            goal = self._kv.exit_segment(session.goal)
            seldom = session.unasked > SELDOM
            if session.parked or seldom or session.committed > self._max_model_len:
                continue
            if session.backlog(goal, session.committed) > self._absorb_from:
                waiting.setdefault(sid >> SCOPE_SHIFT, []).append(session)
        self._turns = {scope: turn for scope, turn in self._turns.items() if scope in waiting}
        order = sorted(waiting, key=lambda scope: self._turns.get(scope, 0))
        if order:
            self._turns[order[0]] = 1 + max(self._turns.values(), default=0)
        return [session for scope in order for session in waiting[scope]]

    def _backlog(self, proposal: Proposal) -> int:
        """Tokens that the first step of a proposal runs."""
        session = proposal.session
        return session.backlog(self._kv.exit_segment(proposal.exit or 0), len(session.seq.tokens))

    def _wants(self, session: Session, segment: int) -> bool:
        """Whether the session's proposals need the segment: with thresholds they may be read anywhere."""
        return self._thresholds is not None or segment in self._kv.path(session.goal)

    def _slide(self, session: Session) -> None:
        """Keep nothing of what the draft no longer sees."""
        if self._kept is not None:
            self._kv.slide(session.seq, session.committed - self._kept)

    def _get(self, session_id: int) -> Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise DrafterError("unknown_session", f"nested knows no session {session_id}") from None

    def _begin(self, query: DraftQuery, session: Session) -> SessionDraft | Proposal:
        if query.exit_depth is not None and query.exit_depth not in self.exits:
            error = DrafterError("unsupported", f"no exit at depth {query.exit_depth}; have {self.exits}")
            return self._refuse(query, error)
        exit_block = self._default if self._thresholds is None else None
        if query.exit_depth is not None:
            exit_block = self.exits.index(query.exit_depth)
        session.goal = len(self.exits) - 1 if exit_block is None else exit_block
        session.parked = False
        session.assume(query.after)
        self._slide(session)
        total = session.committed + len(query.after)
        # The drafted token at index i < max_model_len is the last one that the target can emit.
        budget = min(query.budget, self._max_model_len - total)
        if budget <= 0 or self._ended(query, query.survival):
            return SessionDraft(query.session_id, query.epoch, drafter=self.name)
        ready = session.backlog(self._kv.exit_segment(exit_block or 0), total) <= self._catch_up
        if not ready and not session.starved:
            return SessionDraft(query.session_id, query.epoch, drafter=self.name)
        if not ready or not self._make_room(session, total + budget - 1):
            return self._refuse(query, DrafterError("capacity", "no KV blocks left for the session"))
        return Proposal(query, session, budget, exit_block)

    def _refuse(self, query: DraftQuery, error: DrafterError) -> SessionDraft:
        return SessionDraft(
            query.session_id, query.epoch, drafter=self.name, error=error.code, error_message=error.message
        )

    def _make_room(self, session: Session, num_tokens: int, keep: Sequence[Session] = ()) -> bool:
        """Reserve KV for `num_tokens` tokens of the session, from idle ones not in `keep` if need be."""
        missing = self._kv.missing_blocks(session.seq, num_tokens)
        if missing > self._kv.blocks_free:
            idle = [
                s
                for s in self._sessions.values()
                if s.seq.blocks
                and s.last_used < self._clock - self._keep_rounds
                and not any(s is k for k in (session, *keep))
            ]
            if missing > self._kv.blocks_free + sum(len(s.seq.blocks) for s in idle):
                return False
            for victim in sorted(idle, key=lambda s: s.last_used):
                self._kv.release(victim.seq)
                victim.parked = True
                if missing <= self._kv.blocks_free:
                    break
        self._kv.reserve(session.seq, num_tokens)
        return True

    def _draft_position(self, active: Sequence[Proposal]) -> None:
        """Draft one more token for every proposal, shallow to deep, each block once."""
        going = list(active)
        for block in range(len(self.exits)):
            seqs = [p.session.seq for p in going]
            hidden = self._kv.advance(seqs, block, [seq.waiting(block) for seq in seqs])
            stop = [p.exit == block or (p.exit is None and self._must_stop(p, block)) for p in going]
            tests = [p.exit is None and not s for p, s in zip(going, stop, strict=True)]
            rows = [r for r in range(len(going)) if stop[r] or tests[r]]
            if rows:
                logits = self._read(hidden, [seqs[r] for r in rows], rows, block)
                if any(tests):
                    logits, rows = self._confident(logits, rows, tests, block)
                self._draw(logits, [going[r] for r in rows], block)
            leaving = set(rows)
            going = [p for r, p in enumerate(going) if r not in leaving]
            if not going:
                return

    def _is_greedy(self, active: Sequence[Proposal]) -> bool:
        """Whether all proposals begin, and take the likeliest tokens of one exit: one call drafts them."""
        block = active[0].exit
        return (
            block is not None
            and self._heads.norms is None
            and all(
                p.exit == block
                and not p.draws
                and p.query.coupling is None
                and p.sampling.temperature < GREEDY_TEMPERATURE
                and self._kv.runs_through(p.session.seq, block)
                for p in active
            )
        )

    def _draft_greedily(self, active: Sequence[Proposal]) -> None:
        """Whole drafts in one call. Their early end is the one that `_ended` would find."""
        block = active[0].exit
        assert block is not None
        wish = ChainWish(
            budgets=[p.budget for p in active],
            floors=[self._floor(p.query) / max(p.survival, 1e-9) for p in active],
            best=1 + (SIBLINGS if any(p.query.tree for p in active) else 0),
            ids=None if self._vocabulary is None else self._vocabulary.ids,
            curve=self._curves[block] if self._curves else None,
        )
        found = self._kv.draft([p.session.seq for p in active], block, wish)
        for proposal, chain in zip(active, found, strict=True):
            for token, share in zip(chain.token_ids, chain.probabilities, strict=True):
                others = tuple(zip(token[1:], share[1:], strict=True))
                self._take(proposal, Draw(token[0], share[0], others=others), block)

    def _read(
        self, hidden: Tensor, seqs: Sequence[DeferredSequence], rows: Sequence[int], block: int
    ) -> Tensor:
        """Logits of some rows of a block's output at its exit, through the exit's own layer if it has one."""
        segment = self._kv.exit_segment(block)
        if segment != block:
            hidden = self._kv.advance(seqs, segment, [seq.waiting(segment) for seq in seqs])
        elif len(rows) != hidden.shape[0]:
            hidden = hidden[list(rows)]
        return self._heads.logits(self._runner, hidden, block)

    def _must_stop(self, proposal: Proposal, block: int) -> bool:
        """Without a pinned exit: at the last block, or where going on would run too many waiting states."""
        seq = proposal.session.seq
        return block + 1 == len(self.exits) or seq.waiting(block + 1) > self._catch_up

    def _confident(
        self, logits: Tensor, rows: Sequence[int], tests: Sequence[bool], block: int
    ) -> tuple[Tensor, list[int]]:
        """Keep rows that must stop here and those that pass S2D's test, which looks at the distribution only:
        testing the drawn token would bias what it is drawn from."""
        assert self._thresholds is not None
        top = (logits.amax(dim=-1) - torch.logsumexp(logits, dim=-1)).exp().tolist()
        keep = [i for i, r in enumerate(rows) if not tests[r] or top[i] > self._thresholds[block]]
        return logits[keep], [rows[i] for i in keep]

    def _draw(self, logits: Tensor, proposals: Sequence[Proposal], block: int) -> None:
        samplings = [p.sampling for p in proposals]
        positions = [p.position for p in proposals]
        shared = [self._columns(p, logits.device) for p in proposals]
        others = SIBLINGS if any(p.query.tree for p in proposals) else 0
        drawn = draw_tokens(logits, samplings, positions, self._vocabulary, shared, others)
        for proposal, draw in zip(proposals, drawn, strict=True):
            self._take(proposal, draw, block)

    def _take(self, proposal: Proposal, draw: Draw, block: int) -> None:
        proposal.draws.append(draw)
        greedy = proposal.sampling.temperature < GREEDY_TEMPERATURE
        likely = self._early_stop.acceptance(block, draw.confidence, greedy=greedy)
        proposal.acceptance.append(likely)
        proposal.survival *= likely
        proposal.deepest = max(proposal.deepest, block)
        proposal.session.seq.tokens.append(draw.token_id)

    def _columns(self, proposal: Proposal, device: torch.device) -> SharedColumns | None:
        coupling = proposal.query.coupling
        if coupling is None:
            return None
        found = self._shared.get(coupling.shared)
        if found is None:
            found = self._shared[coupling.shared] = shared_columns(coupling.shared, self._vocabulary, device)
        return found

    def _finish(self, proposal: Proposal) -> SessionDraft:
        draws = proposal.draws
        if proposal.query.tree:
            return self._tree(proposal)
        sampled = all(d.q is not None for d in draws)
        return SessionDraft(
            proposal.query.session_id,
            proposal.query.epoch,
            tuple(d.token_id for d in draws),
            drafter=self.name,
            exit_depth=self.exits[proposal.deepest],
            confidence=tuple(proposal.acceptance),
            q=tuple(d.q for d in draws if d.q is not None) if sampled else (),
        )

    def _tree(self, proposal: Proposal) -> SessionDraft:
        """The chain and, beside each of its tokens, the alternatives that the same pass gave for nothing."""
        token_ids: list[int] = []
        parents: list[int] = []
        confidence: list[float] = []
        last = ROOT
        for draw, likely in zip(proposal.draws, proposal.acceptance, strict=True):
            place = len(token_ids)
            # What calibration takes from the best token, the others get.
            rest = (1.0 - likely) / max(1.0 - draw.confidence, 1e-6)
            token_ids += [draw.token_id, *(token for token, _ in draw.others)]
            parents += [last] * (1 + len(draw.others))
            confidence += [likely, *(min(likely, p * rest) for _, p in draw.others)]
            last = place
        return SessionDraft(
            proposal.query.session_id,
            proposal.query.epoch,
            tuple(token_ids),
            parents=tuple(parents),
            drafter=self.name,
            exit_depth=self.exits[proposal.deepest],
            confidence=tuple(confidence),
        )
