"""A drafter with a model, for targets of any tokenizer: their text is re-tokenised as it grows.

Sources: universal assisted generation; token-level intersection (TLI) and string-level exact match of
"Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies"
(arXiv 2502.05202). There, exactness needs care; here a draft cannot change what a target emits, so both are
only ways to guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from actors.drafting.coupling import Coupling
from actors.drafting.errors import DrafterError
from actors.drafting.foreign import ForeignTarget
from actors.drafting.interface import SCOPE_SHIFT, DraftQuery, SessionDraft, SessionOpen
from actors.drafting.wrapping import ModelDrafter, WrappingDrafter
from actors.sampling.params import GREEDY_TEMPERATURE, DraftSampling
from actors.text.alignment import Alignment

CATCH_UP = 64
"""Target tokens of one session that a proposal re-tokenises itself, at most."""
CHUNK = 128
"""Target tokens that one piece of background work re-tokenises; rounds that come meanwhile wait for it."""


class RewindableDrafter(ModelDrafter, Protocol):
    """A drafter with a model that can take committed tokens back."""

    def rewind(self, session_id: int, num_tokens: int) -> None:
        """Forget the committed tokens after the first `num_tokens` >= 1."""
        ...


@dataclass(slots=True)
class _Session:
    """`asked`: somebody has wanted a draft; before, nothing is re-tokenised. `told`: tokens of the draft's
    context that the inner drafter holds, 0 while the session is not open there."""

    session_id: int
    alignment: Alignment
    foreign: ForeignTarget
    sampling: DraftSampling
    asked: bool = False
    told: int = 0


class RetokenisedDrafter(WrappingDrafter[RewindableDrafter]):
    """`inner`, told each session in its own tokens. Sessions with its vocabulary pass unchanged.

    A session of a foreign target that samples is drafted for with the tokens that both vocabularies have, by
    the target's noise on the target's ids (TLI). Greedy ones, and those whose last token ends inside a
    character, are drafted for greedily; the drafted text is then put into the target's tokens (string
    alignment), which leaves tokens that both have as they are, where the target would use them.

    A round re-tokenises the new tokens, `CATCH_UP` at most, and one open piece of text; more (a prompt) is
    left to `work`, and until it is done the session's drafts are empty.

    Args:
        inner: the nested drafter.
        vocab_size: of its model. A padded target may have more ids; a session that uses them is refused.
    """

    def __init__(self, inner: RewindableDrafter, vocab_size: int) -> None:
        super().__init__(inner)
        self._vocab_size = vocab_size
        self._foreign: dict[int, _Session] = {}
        self._turns: dict[int, int] = {}
        """By stream whose prompts wait: when it was served last, in pieces of work."""

    def open(self, session: SessionOpen) -> None:
        self.close(session.session_id)
        if session.foreign is None:
            self._check(session.token_ids)
            self._inner.open(session)
            return
        alignment = Alignment(session.foreign.pair)
        alignment.append(session.token_ids)
        self._foreign[session.session_id] = _Session(
            session.session_id, alignment, session.foreign, session.sampling
        )

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        session = self._foreign.get(session_id)
        if session is None:
            self._check(new_tokens)
            self._inner.commit(session_id, new_tokens, candidates)
        else:
            session.alignment.append(new_tokens)

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        answers: dict[int, SessionDraft] = {}
        asked: dict[int, DraftQuery] = {}
        for place, query in enumerate(queries):
            session = self._foreign.get(query.session_id)
            try:
                if session is None:
                    asked[place] = query
                elif self._prepare(session):
                    asked[place] = replace(query, coupling=_coupling(session), tree=False)
                else:
                    answers[place] = SessionDraft(query.session_id, query.epoch, drafter=self.name)
            except DrafterError as error:
                answers[place] = SessionDraft(
                    query.session_id, query.epoch, error=error.code, error_message=error.message
                )
        drafts = self._inner.propose([*asked.values()])
        for (place, query), draft in zip(asked.items(), drafts, strict=True):
            session = self._foreign.get(query.session_id)
            answers[place] = draft if session is None else _mapped(session, query, draft)
        return [answers[place] for place in range(len(queries))]

    def look_ahead(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        """The inner drafter's, for sessions with its vocabulary."""
        return self._inner.look_ahead(queries)

    def close(self, session_id: int) -> None:
        self._foreign.pop(session_id, None)
        self._inner.close(session_id)

    def work(self) -> bool:
        """One piece of re-tokenising and one of the inner drafter's work; False when there was neither."""
        behind = self._next_to_advance()
        if behind is not None:
            behind.alignment.advance(CHUNK)
            if not behind.alignment.waiting:
                try:
                    self._tell(behind)
                except DrafterError:
                    behind.asked = False  # no room: the next proposal tries again, and says so
        return self._inner.work() or behind is not None

    def _next_to_advance(self) -> _Session | None:
        """The session that was opened first of the stream whose turn it is: many prompts of one target do not
        keep those of another waiting."""
        waiting: dict[int, _Session] = {}
        for sid, session in self._foreign.items():
            if session.asked and session.alignment.waiting:
                waiting.setdefault(sid >> SCOPE_SHIFT, session)
        self._turns = {scope: turn for scope, turn in self._turns.items() if scope in waiting}
        if not waiting:
            return None
        scope = min(waiting, key=lambda scope: self._turns.get(scope, 0))
        self._turns[scope] = 1 + max(self._turns.values(), default=0)
        return waiting[scope]

    def _check(self, token_ids: Sequence[int]) -> None:
        highest = max(token_ids, default=0)
        if highest >= self._vocab_size:
            message = f"token {highest} is past the draft's {self._vocab_size} tokens"
            raise DrafterError("unsupported", message)

    def _prepare(self, session: _Session) -> bool:
        """Bring the inner drafter up to date; False when it cannot draft now."""
        session.asked = True
        if session.alignment.waiting > CATCH_UP:
            return False
        session.alignment.advance(CATCH_UP)
        self._tell(session)
        return session.told > 0

    def _tell(self, session: _Session) -> None:
        """Pass the changes of the draft's context on. Raises DrafterError; the next call then starts anew."""
        sid, tokens = session.session_id, session.alignment.draft_ids
        kept, new = session.alignment.take_change()
        told, session.told = session.told, 0
        if told and kept:
            if kept < told:
                self._inner.rewind(sid, kept)
            if new:
                self._inner.commit(sid, new)
        else:
            self._inner.close(sid)
            if tokens:
                greedy = DraftSampling(session.sampling.key, rule=session.sampling.rule)
                self._inner.open(SessionOpen(sid, tuple(tokens), len(tokens), greedy))
        session.told = len(tokens)


def _coupling(session: _Session) -> Coupling | None:
    """How to sample like the target; None to draft greedily."""
    sampling, alignment = session.sampling, session.alignment
    if sampling.temperature < GREEDY_TEMPERATURE or not alignment.aligned:
        return None
    return Coupling(sampling, alignment.target_len, session.foreign.shared)


def _mapped(session: _Session, query: DraftQuery, draft: SessionDraft) -> SessionDraft:
    """A draft in the target's tokens, `budget` at most."""
    if not draft.token_ids:
        return draft
    confidence = draft.confidence or (1.0,) * len(draft.token_ids)
    if query.coupling is not None:
        ids = session.alignment.same_tokens(draft.token_ids)
        return replace(draft, token_ids=tuple(ids), confidence=confidence[: len(ids)], q=draft.q[: len(ids)])
    aligned = session.alignment.same_text(draft.token_ids)[: query.budget]
    return replace(
        draft,
        token_ids=tuple(token.token_id for token in aligned),
        # A draft token counts where its first byte lies.
        confidence=tuple(math.prod(confidence[token.first : token.last]) for token in aligned),
    )
