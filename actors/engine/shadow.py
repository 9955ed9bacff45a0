"""Shadow scoring: what would an exit that is not in use have drafted, and would the target have accepted it?

In a share of the rounds one session's update also asks for a draft at the shadow exit. It arrives whenever
the draft worker has time, is compared with what the target has emitted since, and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.drafting.acceptance_model import AcceptanceModel
from actors.drafting.assignment import Shadow
from actors.drafting.interface import SessionDraft
from actors.engine.sequence import Sequence as EngineSequence

_PATIENCE_ROUNDS = 64
"""A draft that has not come after so many rounds will not come: the worker had none, or no time."""


@dataclass(slots=True)
class _Pending:
    """The draft continues the first `start` tokens of the sequence."""

    seq: EngineSequence
    epoch: int
    start: int
    rounds: int = 0
    draft: SessionDraft | None = None


class ShadowScorer:
    """At most one draft is under way. Engine thread only."""

    def __init__(self, acceptance: AcceptanceModel) -> None:
        self._acceptance = acceptance
        self._due = 0.0
        self._session = 0
        self._pending: _Pending | None = None
        self.scored = 0
        """Tokens scored since start."""

    def choose(self, shadow: Shadow, decoding: Sequence[EngineSequence]) -> EngineSequence | None:
        """The sequence to ask a shadow draft for in the round that begins, if it is one of those."""
        if not decoding:
            return None
        self._due = min(1.0, self._due + shadow.share)
        if self._due < 1.0 or self._pending is not None:
            return None
        able = [seq for seq in decoding if seq.rule.name == "coupled"]
        if not able:
            return None
        self._due -= 1.0
        # The same one again while it runs: a deeper exit first has to read the whole sequence.
        chosen = next((seq for seq in able if seq.session_id == self._session), able[0])
        self._session = chosen.session_id
        return chosen

    def asked(self, seq: EngineSequence) -> None:
        """The update of `seq` that has just been made asks for a draft."""
        self._pending = _Pending(seq, seq.epoch, len(seq.token_ids))

    @property
    def waiting(self) -> bool:
        return self._pending is not None

    def round(self, arrived: Sequence[SessionDraft]) -> None:
        """Take what arrived, and score what the target has meanwhile decided. Once a round while waiting."""
        pending = self._pending
        if pending is None:
            return
        for draft in arrived:
            if (draft.session_id, draft.epoch) == (pending.seq.session_id, pending.epoch):
                pending.draft = draft
        pending.rounds += 1
        done = pending.draft is not None and self._score(pending, pending.draft)
        if done or pending.rounds > _PATIENCE_ROUNDS or not pending.seq.session_open:
            self._pending = None

    def _score(self, pending: _Pending, draft: SessionDraft) -> bool:
        """False while the target has not emitted enough to judge every token; nothing is recorded then."""
        emitted = pending.seq.token_ids[pending.start :]
        hits: list[bool] = []
        for drafted, token in zip(draft.token_ids, emitted, strict=False):
            hits.append(drafted == token)
            if not hits[-1]:
                break
        if pending.seq.session_open and len(hits) < len(draft.token_ids) and all(hits):
            return False
        if draft.exit_depth is not None:
            for place, hit in enumerate(hits):
                self._acceptance.observe_exit(draft.exit_depth, place, hit)
            self.scored += len(hits)
        return True
