"""What the nested drafter holds of a session, and of a query under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.drafting.acceptance import confirmed_prefix
from actors.drafting.deferred_kv import DeferredSequence
from actors.drafting.draw import Draw
from actors.drafting.interface import DraftQuery
from actors.sampling.params import DraftSampling


@dataclass(slots=True)
class Session:
    """`seq.tokens[:committed]` is truth, what follows is the last query's `after` and draft. `goal` is the
    deepest layer block that proposals want; `parked` sessions hold no KV and wait to be asked for; `starved`
    ones lack room. `unasked`: verdicts since somebody asked."""

    seq: DeferredSequence
    sampling: DraftSampling
    committed: int
    goal: int
    last_used: int
    parked: bool = False
    starved: bool = False
    unasked: int = 0

    def backlog(self, segment: int, num_tokens: int) -> int:
        """Of the first `num_tokens` tokens, those to run before a proposal after them that is read after
        `segment`, the last one included."""
        return num_tokens - min(self.seq.lengths[segment], num_tokens - 1)

    def assume(self, after: Sequence[int]) -> None:
        """Let `after` follow the committed tokens, keeping the KV of what already did."""
        tokens, committed = self.seq.tokens, self.committed
        total = committed + len(after)
        kept, _ = confirmed_prefix(tokens[committed:], after)
        tokens[committed:] = after
        # The last token is run again: its logits are what a draft begins with.
        self.seq.rollback(min(committed + kept, total - 1))

    def commit(self, new_tokens: Sequence[int]) -> None:
        """Append to the committed tokens, keeping the KV of a draft that foresaw them."""
        tokens, committed = self.seq.tokens, self.committed
        kept, _ = confirmed_prefix(tokens[committed:], new_tokens)
        self.seq.rollback(committed + kept)
        tokens[committed:] = new_tokens
        self.committed += len(new_tokens)
        self.unasked += 1


@dataclass(slots=True)
class Proposal:
    """A query under way. `exit` is the layer block to stop after, None to decide by confidence."""

    query: DraftQuery
    session: Session
    budget: int
    exit: int | None
    draws: list[Draw] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    deepest: int = 0
    survival: float = field(init=False)

    def __post_init__(self) -> None:
        self.survival = self.query.survival

    @property
    def sampling(self) -> DraftSampling:
        coupling = self.query.coupling
        return self.session.sampling if coupling is None else coupling.sampling

    @property
    def position(self) -> int:
        """Absolute index, in the target's sequence, of the token drawn next."""
        coupling = self.query.coupling
        return len(self.session.seq.tokens) if coupling is None else coupling.position + len(self.draws)
