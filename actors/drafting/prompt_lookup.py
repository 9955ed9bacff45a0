"""Prompt lookup: copy what followed the last occurrence of the current suffix.

Input-guided aggressive decoding (arXiv 2205.10350, section 3) aligns the output with its input by a suffix
match and copies the rest; here prompt and output are searched alike. The index is LZ77's hash chain: one
entry a token, so that a round's cost depends on what it commits and proposes, not on the context.

In a tree, what followed single tokens before is guessed too (`continuations`): a match too short to bet a
chain on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.drafting.acceptance import RunningAcceptance, confirmed_prefix
from actors.drafting.errors import DrafterError
from actors.drafting.interface import DraftQuery, ResetScope, SessionDraft, SessionOpen

_FOLLOWERS = (0.25, 0.1, 0.06)
"""Before anything was measured: P(the next token is the last, the last but one, ... that came after this)."""


@dataclass(slots=True)
class _Session:
    """`head[gram]` is the latest index that follows `gram`; `previous[i]` the one before index i, or -1.
    `followers[token]`: what came after it, the latest first."""

    tokens: list[int]
    head: dict[tuple[int, ...], int] = field(default_factory=dict)
    previous: list[int] = field(default_factory=list)
    followers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    draft: tuple[int, ...] = ()
    features: tuple[int, ...] = ()


class PromptLookupDrafter:
    """Longest suffix match in prompt and output, the most recent one among equals.

    Args:
        min_ngram: shortest suffix, in tokens, that counts as a match.
        max_ngram: longest suffix compared; matches this long are taken at once.
        max_candidates: earlier occurrences looked at, newest first.
        max_sessions: sessions held; one more is refused with code "capacity".
    """

    name = "prompt_lookup"
    learns = False

    def __init__(
        self, min_ngram: int = 2, max_ngram: int = 12, max_candidates: int = 32, max_sessions: int = 1024
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError("need 1 <= min_ngram <= max_ngram")
        if max_candidates < 1 or max_sessions < 1:
            raise ValueError("max_candidates and max_sessions must be positive")
        self._min = min_ngram
        self._max = max_ngram
        self._max_candidates = max_candidates
        self._max_sessions = max_sessions
        self._sessions: dict[int, _Session] = {}
        # A priori, each matched token makes a coincidence less likely.
        self._acceptance = RunningAcceptance([0.9 - 0.6 / (1 + n) for n in range(max_ngram + 1)])
        self._followers = RunningAcceptance(_FOLLOWERS)

    def open(self, session: SessionOpen) -> None:
        if session.session_id not in self._sessions and len(self._sessions) >= self._max_sessions:
            raise DrafterError("capacity", f"prompt_lookup holds {self._max_sessions} sessions already")
        state = _Session(tokens=[])
        self._append(state, session.token_ids)
        self._sessions[session.session_id] = state

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        state = self._get(session_id)
        if not new_tokens:
            return
        if state.draft:
            self._acceptance.observe_draft(state.features, *confirmed_prefix(state.draft, new_tokens))
            state.draft = ()
        before = state.tokens[-1]
        for token in new_tokens:
            for rank, follower in enumerate(state.followers.get(before, ())):
                self._followers.observe(rank, follower == token)
            before = token
        self._append(state, new_tokens)

    def continuations(self, session_id: int, token: int) -> list[tuple[int, float]]:
        """What came after a token in this session, each with the probability that it does again."""
        found = self._get(session_id).followers.get(token, ())
        return [(follower, self._followers.probability(rank)) for rank, follower in enumerate(found)]

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [self._propose(query) for query in queries]

    def close(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def reset(self, scope: ResetScope = "all") -> None:
        """Sessions share no texts."""
        if scope == "all":
            self._acceptance.reset()
            self._followers.reset()

    def _get(self, session_id: int) -> _Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise DrafterError("unknown_session", f"prompt_lookup knows no session {session_id}") from None

    def _append(self, state: _Session, new_tokens: Sequence[int]) -> None:
        tokens, head, previous, n = state.tokens, state.head, state.previous, self._min
        for token in new_tokens:
            # Indexed only once it has a continuation: a gram must never match itself at the end.
            i = len(tokens)
            if i:
                known = state.followers.get(tokens[-1], ())
                if not known or known[0] != token:
                    others = tuple(t for t in known if t != token)[: len(_FOLLOWERS) - 1]
                    state.followers[tokens[-1]] = (token, *others)
            if i >= n:
                gram = tuple(tokens[i - n :])
                previous.append(head.get(gram, -1))
                head[gram] = i
            else:
                previous.append(-1)
            tokens.append(token)

    def _match(self, state: _Session) -> tuple[int, int]:
        """(index of the continuation, match length), length 0 without a match."""
        tokens = state.tokens
        end = len(tokens)
        best_at, best_length = -1, 0
        at = state.head.get(tuple(tokens[-self._min :]), -1) if end >= self._min else -1
        for _ in range(self._max_candidates):
            if at < 0:
                break
            length = self._min
            limit = min(self._max, at)
            while length < limit and tokens[at - 1 - length] == tokens[end - 1 - length]:
                length += 1
            if length > best_length:
                best_at, best_length = at, length
                if length == self._max:
                    break
            at = state.previous[at]
        return best_at, best_length

    def _propose(self, query: DraftQuery) -> SessionDraft:
        state = self._get(query.session_id)
        state.draft = state.features = ()
        at, length = self._match(state)
        if length == 0 or query.budget <= 0:
            return SessionDraft(query.session_id, query.epoch, drafter=self.name)
        tokens = state.tokens
        draft = tokens[at : at + query.budget]
        # A match that runs into the end continues into its own draft: periodic text goes on.
        while len(draft) < query.budget:
            draft.append(draft[at + len(draft) - len(tokens)])
        state.draft = tuple(draft)
        state.features = tuple(length + j for j in range(len(draft)))
        confidence = tuple(self._acceptance.probability(f) for f in state.features)
        return SessionDraft(
            query.session_id, query.epoch, state.draft, drafter=self.name, confidence=confidence
        )
