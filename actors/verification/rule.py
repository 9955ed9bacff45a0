"""Verification: which drafted tokens the target emits. Rules are pure functions of one sequence's block.

The processed scores a rule sees already went through masks, biases, penalties, temperature and truncation
(`actors.sampling.pipeline`); what does not survive is -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

DraftDistribution = tuple[Sequence[int], Sequence[float]]
"""(token ids, probabilities summing to one) that one draft token was drawn from."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`accepted` draft tokens are emitted, then `next_token`: the target's correction or bonus token. Of a
    tree, `path` are the indices of the accepted tokens; of a chain they are the first ones."""

    accepted: int
    next_token: int
    path: tuple[int, ...] | None = None

    @property
    def accepted_at(self) -> Sequence[int]:
        """Indices of the accepted draft tokens."""
        return range(self.accepted) if self.path is None else self.path


class VerificationRule(Protocol):
    """Judge a chain of K drafts with K + 1 rows of processed scores."""

    @property
    def name(self) -> str: ...

    @property
    def needs_q(self) -> bool:
        """Whether a sampling drafter has to ship the distribution its tokens were drawn from."""
        ...

    def verify(
        self,
        scores: Tensor,
        drafts: Sequence[int],
        q: Sequence[DraftDistribution],
        *,
        key: int,
        first_position: int,
        greedy: bool,
    ) -> Verdict:
        """
        Args:
            scores: float32 [K + 1, V]; row j scores the token after drafts[:j].
            drafts: K token ids.
            q: one distribution a draft, or empty for deterministic drafts (one-hot).
            key: 64-bit noise key of the request.
            first_position: absolute index of the token that row 0 decides.
            greedy: emit the best-scoring survivor, without noise.
        """
        ...
