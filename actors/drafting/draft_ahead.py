"""Draft-ahead: while the target verifies, the next draft is prepared for the likeliest verdicts.

Sources: verification and drafting overlap as in PEARL (arXiv 2408.11850) and AMUSD (arXiv 2410.17375), and
several verdicts are prepared for as in "Speculative Speculative Decoding" (arXiv 2603.03251). Drafts are
advice here, so a verdict that nobody foresaw costs nothing but time that would have been idle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from actors.drafting.errors import DrafterError
from actors.drafting.guess_tree import LEAST_LIKELY, OUTCOMES, Guess, GuessTree, next_outcomes
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen
from actors.drafting.wrapping import ModelDrafter, WrappingDrafter
from actors.sampling.params import GREEDY_TEMPERATURE
from actors.verification.trees import ROOT


@dataclass(frozen=True, slots=True)
class AheadCounts:
    """Since start. Drafts that followed an earlier one of their session, by what was prepared of them: all
    (foreseen), a part (partly), nothing (missed). steps: draft tokens prepared, over all sessions."""

    foreseen: int = 0
    partly: int = 0
    missed: int = 0
    steps: int = 0


@dataclass(slots=True)
class _Session:
    """`wide`: alternatives are drafted too. `exit_depth`: that of the last query, and of the tree's guesses.
    `answered`: it was asked before."""

    wide: bool
    tree: GuessTree
    exit_depth: int | None = None
    answered: bool = False


@dataclass(frozen=True, slots=True)
class _Asked:
    """A query, and the guesses below the last committed token that answer the beginning of it."""

    query: DraftQuery
    session: _Session
    known: list[Guess]

    @property
    def rest(self) -> DraftQuery:
        """What is left to draft."""
        return replace(
            self.query,
            budget=self.query.budget - len(self.known),
            after=tuple(guess.token_id for guess in self.known),
            survival=math.prod(guess.confidence for guess in self.known),
            tree=self.query.tree or self.session.wide,
        )


class AheadDrafter(WrappingDrafter[ModelDrafter]):
    """`inner`, whose next drafts are prepared by `work` for sessions that were opened with `ahead`.

    A verdict that was foreseen is answered without a pass of the model; one that was foreseen in part by the
    passes that are left. `work` first does the inner drafter's own, then prepares one token for some sessions
    in turns, so that nobody who waits is held up by more than one step. Sessions with another vocabulary are
    drafted for when asked: what they commit seldom continues what was drafted, token by token.

    Args:
        inner: the drafter with the model.
        outcomes, least: see `GuessTree`.
    """

    def __init__(self, inner: ModelDrafter, outcomes: int = OUTCOMES, least: float = LEAST_LIKELY) -> None:
        super().__init__(inner)
        self._new_tree = partial(GuessTree, outcomes, least)
        self._sessions: dict[int, _Session] = {}
        self._waiting: dict[int, _Session] = {}
        """Sessions with a verdict to prepare for, those served longest ago first."""
        self._foreseen = self._partly = self._missed = self._steps = 0

    @property
    def ahead_counts(self) -> AheadCounts:
        return AheadCounts(self._foreseen, self._partly, self._missed, self._steps)

    def open(self, session: SessionOpen) -> None:
        self._forget(session.session_id)
        self._inner.open(session)
        if session.ahead and session.foreign is None:
            # Alternatives come with greedy drafts only: what was sampled says nothing of what else might be.
            greedy = session.sampling.temperature < GREEDY_TEMPERATURE
            self._sessions[session.session_id] = _Session(greedy, self._new_tree())

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        self._inner.commit(session_id, new_tokens, candidates)
        session = self._sessions.get(session_id)
        if session is not None:
            self._waiting.pop(session_id, None)
            session.tree.follow(new_tokens)

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        asked = [self._known(query) for query in queries]
        rests = [query if a is None else a.rest for query, a in zip(queries, asked, strict=True)]
        open_ones = [place for place, rest in enumerate(rests) if rest.budget > 0]
        drafts: dict[int, SessionDraft] = {}
        if open_ones:
            found = self._inner.propose([rests[place] for place in open_ones])
            drafts = dict(zip(open_ones, found, strict=True))
        answers: list[SessionDraft] = []
        for place, (query, a) in enumerate(zip(queries, asked, strict=True)):
            if a is None:
                answers.append(drafts.get(place) or self._empty(query))
            else:
                answers.append(self._answer(a, drafts.get(place)))
        return answers

    def prepared(self, query: DraftQuery) -> bool:
        session = self._sessions.get(query.session_id)
        if session is None or query.exit_depth != session.exit_depth:
            return False
        return len(session.tree.chain(query.budget)) == query.budget

    def close(self, session_id: int) -> None:
        self._forget(session_id)
        self._inner.close(session_id)

    def work(self) -> bool:
        """One piece of the inner drafter's work, otherwise one step of preparing; False when there was
        neither."""
        return self._inner.work() or self._prepare()

    def _forget(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)
        self._waiting.pop(session_id, None)

    def _empty(self, query: DraftQuery) -> SessionDraft:
        return SessionDraft(query.session_id, query.epoch, drafter=self.name)

    def _known(self, query: DraftQuery) -> _Asked | None:
        """None where drafts are not prepared."""
        session = self._sessions.get(query.session_id)
        if session is None or query.shadow:
            return None
        if query.exit_depth != session.exit_depth:
            session.exit_depth, session.tree, session.answered = query.exit_depth, self._new_tree(), False
        return _Asked(query, session, session.tree.chain(query.budget))

    def _answer(self, asked: _Asked, draft: SessionDraft | None) -> SessionDraft:
        query, session, known = asked.query, asked.session, asked.known
        if draft is not None and draft.error is not None and not known:
            return draft
        drafted = draft is not None and bool(draft.token_ids)
        if session.answered and query.budget > 0:
            self._foreseen += bool(known) and not drafted
            self._partly += bool(known) and drafted
            self._missed += not known
        if draft is not None and drafted:
            session.tree.graft(known[-1] if known else session.tree.root, draft)
        chain = session.tree.chain(query.budget)
        if not chain:
            return self._empty(query)
        session.answered = True
        session.tree.expect(chain, query.budget)
        self._waiting.pop(query.session_id, None)
        self._waiting[query.session_id] = session
        return self._assembled(query, session, chain)

    def _assembled(self, query: DraftQuery, session: _Session, chain: Sequence[Guess]) -> SessionDraft:
        """The chain, and for a target that verifies trees the alternatives beside each token."""
        token_ids: list[int] = []
        parents: list[int] = []
        confidence: list[float] = []
        last, above = ROOT, session.tree.root
        for best in chain:
            place = len(token_ids)
            for guess in above.below if query.tree else above.below[:1]:
                token_ids.append(guess.token_id)
                parents.append(last)
                confidence.append(guess.confidence)
            last, above = place, best
        return SessionDraft(
            query.session_id,
            query.epoch,
            tuple(token_ids),
            parents=tuple(parents) if query.tree else (),
            drafter=self.name,
            exit_depth=max((g.exit_depth for g in chain if g.exit_depth is not None), default=None),
            confidence=tuple(confidence),
            q=tuple(g.q for g in chain if g.q is not None),
        )

    def _prepare(self) -> bool:
        """Draft one more token for some sessions whose verdict is under way; False when there is nothing."""
        chosen = next_outcomes(self._waiting, lambda session: session.tree.next())
        if not chosen:
            return False
        queries = [
            DraftQuery(sid, 0, 1, session.exit_depth, tree=session.wide, after=outcome.at.path())
            for sid, session, outcome in chosen
        ]
        try:
            drafts = self._inner.look_ahead(queries)
        except DrafterError:  # whoever is asked next finds out whose session it is, and says so
            for sid, _, _ in chosen:
                self._waiting.pop(sid, None)
            return True
        for (_, session, outcome), draft in zip(chosen, drafts, strict=True):
            if draft.error is not None:
                session.tree.give_up()
            else:
                session.tree.prepared(outcome, draft)
                self._steps += len(draft.token_ids) > 0
        return True
