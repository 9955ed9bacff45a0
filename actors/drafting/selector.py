"""All drafters of one process behind one door: who is told, who is asked, and what happens when one fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar, runtime_checkable

from actors.drafting.draft_ahead import AheadCounts
from actors.drafting.errors import DrafterError
from actors.drafting.interface import (
    TREE,
    Drafter,
    DraftErrorCode,
    DraftQuery,
    ResetScope,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.drafting.tree import Continuation, first_tokens, grow
from actors.drafting.worth import DraftWorth
from actors.models.runner import StateRow
from actors.sampling.params import MAX_DRAFT_TOKENS

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

FAILING_AFTER = 3
"""Sessions that a drafter fails one after the other from which on it is not theirs but its own failure."""

CANDIDATES_WANTED = 8
"""Candidates a verified row for drafters that learn (Token Recycling's k)."""


@runtime_checkable
class BackgroundWorker(Protocol):
    """A drafter with work that may wait for idle moments (prompt prefill)."""

    def work(self) -> bool:
        """Do one bounded piece; False when there was none."""
        ...


@runtime_checkable
class NestedExits(Drafter, Protocol):
    """A drafter whose sub-models a request may pin by depth."""

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit depths in layers, ascending."""
        ...


@runtime_checkable
class Continuer(Drafter, Protocol):
    """A drafter that can go on below any token of a tree, by that token alone."""

    def continuations(self, session_id: int, token: int) -> Sequence[tuple[int, float]]:
        """What may follow, best first, each with its probability."""
        ...


@runtime_checkable
class TimedExits(Protocol):
    """A drafter that measures what its exits cost."""

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        """Seconds of a draft step that adds a token to each of n sessions, by exit depth and n. Safe from any
        thread."""
        ...


@runtime_checkable
class PreparingDrafter(Drafter, Protocol):
    """A drafter that prepares drafts while the target verifies."""

    @property
    def ahead_counts(self) -> AheadCounts:
        """Safe from any thread."""
        ...

    def prepared(self, query: DraftQuery) -> bool:
        """Whether the whole draft is there."""
        ...


@runtime_checkable
class StateReader(Drafter, Protocol):
    """A drafter that may read the target's hidden states."""

    @property
    def reads_states(self) -> bool: ...

    def note_states(self, session_id: int, states: Sequence[StateRow]) -> None:
        """Of the last committed tokens, in order."""
        ...


@runtime_checkable
class PagedDrafter(Protocol):
    """A drafter with a KV pool, for reports."""

    @property
    def kv_blocks_used(self) -> int: ...

    @property
    def kv_blocks_free(self) -> int: ...


@dataclass(slots=True)
class _Session:
    """`missing` names drafters that do not hold the session, with the reason."""

    epoch: int
    last_token: int
    trees: bool
    missing: dict[str, DrafterError] = field(default_factory=dict)


class DrafterPool:
    """The drafters of one process, driven from one thread.

    Every session is opened in, and every verdict told to, all drafters, so that any may be asked next. A
    session is served by the drafter it pins, otherwise by the one whose guess promises most (`DraftWorth`): a
    drafter is asked where no earlier one has a guess, or where it promises more than that. A session whose
    target verifies trees is given the likeliest tokens of all drafters together; a drafter is asked for it
    where it adds enough to what the earlier ones guess. A drafter that raises loses the sessions concerned
    (they can be opened again); the others go on.

    Args:
        drafters: distinct names, in the order in which they are asked: the cheapest first. Without any,
            no session is taken.
        max_sessions: open sessions at most; one more is refused with code "capacity".
        clock: seconds; replaying a trace gives its own.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        max_sessions: int = 1024,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        names = [d.name for d in drafters]
        if len(set(names)) != len(names):
            raise ValueError("drafters need distinct names")
        self._drafters = tuple(drafters)
        self._by_name = dict(zip(names, self._drafters, strict=True))
        # Found once: checking a protocol costs more than the drafts of a lookup.
        self._nested = next((d for d in self._drafters if isinstance(d, NestedExits)), None)
        self._background = [(d.name, d.work) for d in self._drafters if isinstance(d, BackgroundWorker)]
        self._continuers: tuple[Continuer, ...] = tuple(d for d in self._drafters if isinstance(d, Continuer))
        self._reader = next(
            (d for d in self._drafters if isinstance(d, StateReader) and d.reads_states), None
        )
        self._preparing = next((d for d in self._drafters if isinstance(d, PreparingDrafter)), None)
        self._max_sessions = max_sessions
        self._sessions: dict[int, _Session] = {}
        self._clock = clock
        self._worth = DraftWorth(clock)
        self._failed_for: dict[str, set[int]] = {name: set() for name in names}
        """Sessions that a drafter failed since it last drafted."""

    @property
    def drafters(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def wants_candidates(self) -> int:
        return CANDIDATES_WANTED if any(d.learns for d in self._drafters) else 0

    @property
    def wants_states(self) -> bool:
        return self._reader is not None

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit depths a session may pin; empty without a nested drafter."""
        return self._nested.exits if self._nested is not None else ()

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        """See `TimedExits`; empty without such a drafter."""
        return next((d.step_s_by_exit() for d in self._drafters if isinstance(d, TimedExits)), {})

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def failing(self) -> tuple[str, ...]:
        """Drafters that fail whatever session they draft for. Safe from any thread."""
        return tuple(name for name, failed in self._failed_for.items() if len(failed) >= FAILING_AFTER)

    @property
    def kv_blocks(self) -> tuple[int, int]:
        """(used, free) over all drafters with a KV pool."""
        paged = [d for d in self._drafters if isinstance(d, PagedDrafter)]
        return sum(d.kv_blocks_used for d in paged), sum(d.kv_blocks_free for d in paged)

    @property
    def ahead_counts(self) -> AheadCounts:
        """Zeros where nothing is prepared. Safe from any thread."""
        return AheadCounts() if self._preparing is None else self._preparing.ahead_counts

    def open(self, session: SessionOpen) -> None:
        """Open, or open again, in every drafter. Raises `DrafterError` when no drafter takes the session."""
        sid = session.session_id
        if sid not in self._sessions and len(self._sessions) >= self._max_sessions:
            raise DrafterError("capacity", f"{self._max_sessions} sessions are open already")
        if not session.token_ids:
            raise DrafterError("unsupported", "a session needs at least one token")
        if not self._drafters:
            raise DrafterError("unsupported", "there are no drafters here")
        self.close(sid)
        state = _Session(session.epoch, session.token_ids[-1], session.trees)
        for drafter in self._drafters:
            error = self._guarded(drafter.name, partial(drafter.open, session))
            if isinstance(error, DrafterError):
                self._note_failure(drafter, sid, error)
                state.missing[drafter.name] = error
        if len(state.missing) == len(self._drafters):
            raise next(iter(state.missing.values()))
        self._sessions[sid] = state
        self._worth.opened(sid, session.sampling.temperature)

    def apply(self, update: SessionUpdate) -> None:
        """Commit a verdict in every drafter. Raises `DrafterError` "unknown_session" or "stale_epoch"."""
        sid = update.session_id
        state = self._sessions.get(sid)
        if state is None:
            raise DrafterError("unknown_session", f"session {sid} is not open")
        if update.epoch != state.epoch + 1:
            raise DrafterError("stale_epoch", f"epoch {update.epoch} does not follow {state.epoch}")
        state.epoch = update.epoch
        self._worth.committed(sid, update.new_tokens, update.drafted)
        if update.new_tokens:
            state.last_token = update.new_tokens[-1]
        for drafter in self._drafters:
            if drafter.name in state.missing:
                continue
            error = self._guarded(drafter.name, partial(self._tell, drafter, update))
            if isinstance(error, DrafterError):
                self._drop(drafter, sid, state, error)

    def _tell(self, drafter: Drafter, update: SessionUpdate) -> None:
        drafter.commit(update.session_id, update.new_tokens, update.candidates)
        if drafter is self._reader and update.states:
            self._reader.note_states(update.session_id, update.states)

    def prepared(self, update: SessionUpdate) -> bool:
        """Whether a draft can be given without a pass of the model: it was prepared before."""
        drafter = self._preparing
        if drafter is None or self._refusal(update) is not None or not self._eligible(drafter, update):
            return False
        return drafter.prepared(self._query(drafter, update))

    def propose(self, updates: Sequence[SessionUpdate], together: int = 0) -> list[SessionDraft]:
        """One draft an update, in order; the updates were applied before. Budgets are capped at
        `MAX_DRAFT_TOKENS`; a budget of 0 gives an empty draft. together: sessions that wait for the drafts,
        where they are more than those which want one."""
        drafts: dict[int, SessionDraft] = {}
        waiting: dict[int, SessionUpdate] = {}
        for i, update in enumerate(updates):
            error = self._refusal(update)
            if error is not None:
                drafts[i] = _failed(update, error)
            elif update.budget > 0:
                waiting[i] = update
        chains = {i: u for i, u in waiting.items() if u.chain or not self._sessions[u.session_id].trees}
        trees = {i: u for i, u in waiting.items() if i not in chains}
        drafts |= self._chains(chains, max(together, len(chains)))
        drafts |= self._trees(trees, max(together, len(trees)))
        return [drafts.get(i) or SessionDraft(u.session_id, u.epoch) for i, u in enumerate(updates)]

    def _chains(self, waiting: Mapping[int, SessionUpdate], together: int) -> dict[int, SessionDraft]:
        """For each the chain that promises most, or why there can be none. One that was drawn from a q is
        taken, whatever it says: kept for what was drawn, it would not be a sample of that q any more."""
        failed: dict[int, dict[str, SessionDraft]] = {}
        held: dict[int, SessionDraft] = {}
        for drafter in self._drafters:
            asked = {
                i: u
                for i, u in waiting.items()
                if self._eligible(drafter, u)
                and not (i in held and held[i].q)
                and self._worth.wants(
                    drafter.name, u.session_id, u.budget, held.get(i), together, len(waiting)
                )
            }
            if not asked:
                continue
            started = self._clock()
            wishes = list(asked.values())
            answers = self._ask(drafter, wishes, [self._query(drafter, u) for u in wishes])
            self._worth.drafted(drafter.name, answers, self._clock() - started)
            for i, draft in zip(asked, answers, strict=True):
                if draft.token_ids:
                    before = held.get(i)
                    if before is None or draft.q or self._worth.of(draft) > self._worth.of(before):
                        held[i] = draft
                elif draft.error is not None:
                    failed.setdefault(i, {})[drafter.name] = draft
        for draft in held.values():
            self._worth.taken(draft)
        return self._failures(waiting, failed) | held

    def _trees(self, waiting: Mapping[int, SessionUpdate], together: int) -> dict[int, SessionDraft]:
        """For each the likeliest tokens of all drafters that are worth asking, or why there can be none."""
        failed: dict[int, dict[str, SessionDraft]] = {}
        held: dict[int, list[SessionDraft]] = {i: [] for i in waiting}
        going_on = {i: self._continuations(u) for i, u in waiting.items()}
        for drafter in self._drafters:
            eligible = {i: u for i, u in waiting.items() if self._eligible(drafter, u)}
            # Who pins an exit pins the drafter that has it.
            pinned = {i for i, u in eligible.items() if u.drafter is not None or u.exit_depth is not None}
            covered = {
                u.session_id: self._covered(drafter, u.session_id, held[i], going_on[i])
                for i, u in eligible.items()
                if i not in pinned
            }
            worth_it = self._worth.adding(drafter.name, covered, together) if covered else ()
            chosen = [i for i, u in eligible.items() if i in pinned or u.session_id in worth_it]
            asked: dict[int, DraftQuery] = {}
            for i in chosen:
                sid, others = waiting[i].session_id, bool(going_on[i])
                least = self._worth.least_survival(drafter.name, sid, others, together, len(chosen))
                asked[i] = replace(self._query(drafter, waiting[i]), tree=True, min_survival=least)
            if not asked:
                continue
            started = self._clock()
            answers = self._ask(drafter, [waiting[i] for i in asked], list(asked.values()))
            self._worth.guessed(drafter.name, answers, self._clock() - started)
            for i, draft in zip(asked, answers, strict=True):
                if draft.token_ids:
                    held[i].append(draft)
                elif draft.error is not None:
                    failed.setdefault(i, {})[drafter.name] = draft
        grown = {i: self._grown(u, held[i], going_on[i]) for i, u in waiting.items()}
        joined = {i: draft for i, draft in grown.items() if draft.token_ids}
        return self._failures(waiting, failed) | joined

    def _failures(
        self, waiting: Mapping[int, SessionUpdate], failed: Mapping[int, Mapping[str, SessionDraft]]
    ) -> dict[int, SessionDraft]:
        """What all drafters that may draft for an update failed with, by `failed`. Where one is left there is
        no failure: a session that met one is not asked for again for a while."""
        return {
            i: next(iter(errors.values()))
            for i, errors in failed.items()
            if not any(d.name not in errors and self._eligible(d, waiting[i]) for d in self._drafters)
        }

    def _covered(
        self,
        drafter: Drafter,
        sid: int,
        proposals: Sequence[SessionDraft],
        going_on: Mapping[str, Continuation],
    ) -> Mapping[int, float]:
        """What the others guess to come next, each with a probability."""
        last = self._sessions[sid].last_token
        others = (after(last) for name, after in going_on.items() if name != drafter.name)
        return first_tokens(proposals, chain.from_iterable(others))

    def _continuations(self, update: SessionUpdate) -> dict[str, Continuation]:
        sid = update.session_id
        return {d.name: partial(d.continuations, sid) for d in self._continuers if self._eligible(d, update)}

    def _grown(
        self,
        update: SessionUpdate,
        proposals: Sequence[SessionDraft],
        going_on: Mapping[str, Continuation],
    ) -> SessionDraft:
        budget = min(update.budget, MAX_DRAFT_TOKENS)
        tree = grow(proposals, going_on, self._sessions[update.session_id].last_token, budget)
        return SessionDraft(
            update.session_id,
            update.epoch,
            tuple(tree.token_ids),
            parents=tuple(tree.parents),
            drafter=update.drafter or TREE,
            exit_depth=next((p.exit_depth for p in proposals if p.exit_depth is not None), None),
            confidence=tuple(tree.confidence),
            sources=tuple(tree.sources) if update.drafter is None else (),
        )

    def shadow(self, update: SessionUpdate) -> SessionDraft | None:
        """What `update.nested.shadow_exit` would have drafted, for scoring; None when it cannot be drafted,
        or the session has gone on since the update."""
        state = self._sessions.get(update.session_id)
        nested, wish = self._nested, update.nested
        if state is None or state.epoch != update.epoch or nested is None or nested.name in state.missing:
            return None
        if wish is None or wish.shadow_exit not in nested.exits:
            return None
        length = min(wish.shadow_length, MAX_DRAFT_TOKENS)
        query = DraftQuery(update.session_id, update.epoch, length, wish.shadow_exit, shadow=True)
        answer = self._guarded(nested.name, partial(nested.propose, [query]))
        if isinstance(answer, DrafterError):
            self._drop(nested, update.session_id, state, answer)
            return None
        return answer[0] if answer[0].token_ids else None

    def close(self, session_id: int) -> None:
        """Forget a session; unknown ids are ignored."""
        state = self._sessions.pop(session_id, None)
        self._worth.closed(session_id)
        if state is not None:
            for drafter in self._drafters:
                if drafter.name not in state.missing:
                    self._guarded(drafter.name, partial(drafter.close, session_id))

    def reset(self, scope: ResetScope = "all") -> None:
        """Forget what sessions share, in every drafter, and of `all` also what these are worth."""
        if scope == "all":
            self._worth.reset()
        for drafter in self._drafters:
            self._guarded(drafter.name, partial(drafter.reset, scope))

    def work(self) -> bool:
        """Do one bounded piece of background work; False when there is none."""
        done = False
        for name, work in self._background:
            done = self._guarded(name, work) is True or done
        return done

    def _refusal(self, update: SessionUpdate) -> DrafterError | None:
        state = self._sessions.get(update.session_id)
        if state is None:
            return DrafterError("unknown_session", f"session {update.session_id} is not open")
        name = update.drafter
        if name is not None and name not in self._by_name:
            return DrafterError("unsupported", f"no drafter {name!r}; there are {', '.join(self._by_name)}")
        if update.exit_depth is not None:
            named = self._nested if name is None else self._by_name[name]
            exits = self.exits if named is self._nested else ()
            if update.exit_depth not in exits:
                return DrafterError("unsupported", f"no exit at depth {update.exit_depth}; there are {exits}")
        if name is not None and name in state.missing:
            return state.missing[name]
        return None

    def _eligible(self, drafter: Drafter, update: SessionUpdate) -> bool:
        if update.drafter is not None and update.drafter != drafter.name:
            return False
        if drafter is self._nested:
            if update.nested is not None and update.nested.cap == 0:
                return False
        elif update.exit_depth is not None:
            return False
        return drafter.name not in self._sessions[update.session_id].missing

    def _ask(
        self, drafter: Drafter, updates: Sequence[SessionUpdate], queries: Sequence[DraftQuery]
    ) -> list[SessionDraft]:
        """Ask one drafter for a batch; when the batch fails, each session alone, to find the culprit."""
        answer = self._guarded(drafter.name, partial(drafter.propose, queries))
        if not isinstance(answer, DrafterError):
            self._failed_for[drafter.name].clear()
            return answer
        if len(updates) > 1:
            return [self._ask(drafter, [u], [q])[0] for u, q in zip(updates, queries, strict=True)]
        update = updates[0]
        self._drop(drafter, update.session_id, self._sessions[update.session_id], answer)
        return [_failed(update, answer)]

    def _query(self, drafter: Drafter, update: SessionUpdate) -> DraftQuery:
        budget, depth = min(update.budget, MAX_DRAFT_TOKENS), update.exit_depth
        wish = update.nested if drafter is self._nested else None
        if wish is not None:
            if wish.cap is not None:
                budget = min(budget, wish.cap)
            if depth is None and wish.exit in self.exits:
                depth = wish.exit
        return DraftQuery(update.session_id, update.epoch, budget, depth)

    def _drop(self, drafter: Drafter, sid: int, state: _Session, error: DrafterError) -> None:
        """The drafter lost step with the session: say so once, then ask for it to be opened again."""
        self._note_failure(drafter, sid, error)
        self._guarded(drafter.name, partial(drafter.close, sid))
        code: DraftErrorCode = error.code if error.code == "capacity" else "unknown_session"
        state.missing[drafter.name] = DrafterError(code, f"{drafter.name} lost the session: {error.message}")

    def _note_failure(self, drafter: Drafter, sid: int, error: DrafterError) -> None:
        failed = self._failed_for[drafter.name]
        if error.code == "internal" and len(failed) < FAILING_AFTER:
            failed.add(sid)

    def _guarded(self, name: str, call: Callable[[], _T]) -> _T | DrafterError:
        """Run a method of drafter `name`; whatever it raises concerns this drafter alone."""
        try:
            return call()
        except DrafterError as error:
            return error
        except Exception as error:
            logger.exception("drafter %s failed", name)
            return DrafterError("internal", f"{name}: {type(error).__name__}: {error}")


def _failed(update: SessionUpdate, error: DrafterError) -> SessionDraft:
    return SessionDraft(update.session_id, update.epoch, error=error.code, error_message=error.message)
