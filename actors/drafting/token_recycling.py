"""Token Recycling (arXiv 2408.08696): a matrix of the candidates last seen after each token.

Row t holds the k most probable next tokens of the last verified row whose input token was t, rejected drafts
included. The matrix is shared by all sessions of a vocabulary: ids mean nothing in another. A chain follows
each row's best entry. For a tree, `continuations` gives whole rows, each entry with the share of tokens that
were the one at its rank, instead of the paper's fixed template.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.drafting.acceptance import RunningAcceptance, confirmed_prefix
from actors.drafting.errors import DrafterError
from actors.drafting.interface import DraftQuery, ResetScope, SessionDraft, SessionOpen

MAX_VOCAB = 1 << 20
"""Token ids at or above this are not learned, which bounds the matrix at 32 MiB for k = 8."""
MAX_VOCABULARIES = 16
"""Of which the drafter keeps a matrix; beyond, the one that was opened longest ago is forgotten."""
UNKNOWN = -1
_RANKS = (0.35, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""Before anything was measured: P(the next token is the entry at this rank)."""


class _Successors:
    """What is known of one vocabulary: the matrix, and how often its entries were right."""

    def __init__(self, rows: int, width: int) -> None:
        self.matrix = np.full((rows, width), UNKNOWN, dtype=np.int32)
        self.acceptance = RunningAcceptance([0.5] * 16)
        self.ranks = RunningAcceptance(_RANKS)

    def row(self, token: int) -> list[int]:
        """The entries of a token, best first; empty where nothing is known."""
        if not 0 <= token < len(self.matrix):
            return []
        entries: list[int] = self.matrix[token].tolist()
        return [entry for entry in entries if entry != UNKNOWN]

    def learn(self, token: int, next_ids: Sequence[int]) -> None:
        if not 0 <= token < MAX_VOCAB or not next_ids:
            return
        rows, width = self.matrix.shape
        if token >= rows:
            grown = np.full((min(MAX_VOCAB, max(token + 1, 2 * rows)), width), UNKNOWN, dtype=np.int32)
            grown[:rows] = self.matrix
            self.matrix = grown
        ids = tuple(next_ids[:width])
        self.matrix[token, : len(ids)] = ids
        self.matrix[token, len(ids) :] = UNKNOWN

    def score(self, token: int, followers: Sequence[int]) -> None:
        """Count at which rank the tokens that came after `token`, one after the other, stood so far."""
        for follower in followers:
            for rank, entry in enumerate(self.row(token)):
                self.ranks.observe(rank, entry == follower)
            token = follower


@dataclass(slots=True)
class _Session:
    last_token: int
    vocabulary: str
    known: _Successors
    draft: tuple[int, ...] = ()


class TokenRecyclingDrafter:
    """Args:
    width: candidates kept a row (the paper's k).
    vocab_size: rows to start with; a matrix grows with the ids it sees, up to `MAX_VOCAB`.
    max_sessions: sessions held; one more is refused with code "capacity".
    """

    name = "token_recycling"
    learns = True

    def __init__(self, width: int = 8, vocab_size: int = 1024, max_sessions: int = 1024) -> None:
        if width < 1 or not 1 <= vocab_size <= MAX_VOCAB or max_sessions < 1:
            raise ValueError("width, vocab_size and max_sessions must be positive, vocab_size bounded")
        self.width = width
        self._rows = vocab_size
        self._known: OrderedDict[str, _Successors] = OrderedDict()
        self._max_sessions = max_sessions
        self._sessions: dict[int, _Session] = {}

    @property
    def known_rows(self) -> int:
        """Tokens whose successors are known, of all vocabularies."""
        return sum(int((known.matrix[:, 0] != UNKNOWN).sum()) for known in self._known.values())

    def open(self, session: SessionOpen) -> None:
        if not session.token_ids:
            raise DrafterError("unsupported", "a session needs at least one token")
        if session.session_id not in self._sessions and len(self._sessions) >= self._max_sessions:
            raise DrafterError("capacity", f"token_recycling holds {self._max_sessions} sessions already")
        known = self._of(session.vocabulary)
        self._sessions[session.session_id] = _Session(session.token_ids[-1], session.vocabulary, known)

    def _of(self, vocabulary: str) -> _Successors:
        known = self._known.get(vocabulary)
        if known is None:
            known = self._known[vocabulary] = _Successors(self._rows, self.width)
        self._known.move_to_end(vocabulary)
        while len(self._known) > MAX_VOCABULARIES:
            self._known.popitem(last=False)
        return known

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        state = self._get(session_id)
        state.known.score(state.last_token, new_tokens)
        for token, next_ids in candidates:
            state.known.learn(token, next_ids)
        if not new_tokens:
            return
        if state.draft:
            confirmed, refuted = confirmed_prefix(state.draft, new_tokens)
            state.known.acceptance.observe_draft(range(len(state.draft)), confirmed, refuted)
            state.draft = ()
        state.last_token = new_tokens[-1]

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [self._propose(query) for query in queries]

    def close(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def reset(self, scope: ResetScope = "all") -> None:
        if scope == "caches":
            for known in self._known.values():
                known.matrix.fill(UNKNOWN)
            return
        self._known.clear()
        for session in self._sessions.values():
            session.known = self._of(session.vocabulary)

    def continuations(self, session_id: int, token: int) -> list[tuple[int, float]]:
        """What was last seen after a token, best first, each with the probability that it comes next."""
        known = self._get(session_id).known
        return [(follower, known.ranks.probability(r)) for r, follower in enumerate(known.row(token))]

    def _get(self, session_id: int) -> _Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise DrafterError("unknown_session", f"token_recycling knows no session {session_id}") from None

    def _propose(self, query: DraftQuery) -> SessionDraft:
        state = self._get(query.session_id)
        if query.tree:  # `continuations` says it all
            state.draft = ()
            return SessionDraft(query.session_id, query.epoch, drafter=self.name)
        draft: list[int] = []
        token = state.last_token
        while len(draft) < query.budget and (row := state.known.row(token)):
            token = row[0]
            draft.append(token)
        state.draft = tuple(draft)
        confidence = tuple(state.known.acceptance.probability(j) for j in range(len(draft)))
        return SessionDraft(
            query.session_id, query.epoch, state.draft, drafter=self.name, confidence=confidence
        )
