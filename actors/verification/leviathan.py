"""Speculative sampling with rejection (Leviathan, Kalman, Matias, arXiv 2211.17192, algorithm 1).

A draft x drawn from q is accepted with probability min(1, p(x) / q(x)); the first rejected place emits a
sample of norm(max(0, p - q)), and a block without rejection emits one more sample of p. Then every emitted
token follows p exactly (theorem in their appendix A.1), *provided x was really drawn from q*. A drafter that
chose x without chance has a one-hot q: x is accepted with p(x), and the residual is p without x.

Compared with coupled sampling more drafts are accepted, but which tokens a seed gives depends on the draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.sampling.noise import ACCEPTANCE, RESIDUAL, uniform
from actors.verification.coupled import sample, verify_greedy
from actors.verification.rule import DraftDistribution, Verdict


class LeviathanRule:
    """Rejection sampling: lossless for a fixed draft, not drafter-invariant."""

    @property
    def name(self) -> str:
        return "leviathan"

    @property
    def needs_q(self) -> bool:
        return True

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
        """See `VerificationRule.verify`.

        Acceptance uniforms and residual samples have noise streams of their own, independent of the
        drafter's. A q that cannot have produced its draft (malformed, or without mass on it) is not judged:
        its draft ends the block and the place emits a plain sample of p, which is exact whatever the reason.

        Raises:
            ValueError: q is neither empty nor one a draft.
        """
        if greedy:
            return verify_greedy(scores, drafts)
        if q and len(q) != len(drafts):
            raise ValueError("q must be empty or one a draft")
        for j, draft in enumerate(drafts):
            row, position = scores[j], first_position + j
            drawn_from = _one_hot(draft) if not q else _normalised(q[j], draft, row.numel())
            if drawn_from is None:
                return Verdict(j, sample(row, key, position))
            p = torch.softmax(row, dim=-1)
            # u q < p is "u < min(1, p / q)" without the division; a draft of probability 0 never passes.
            if uniform(key, position, ACCEPTANCE) * drawn_from[draft] < float(p[draft]):
                continue
            return Verdict(j, sample(_log_residual(p, drawn_from), key, position, RESIDUAL))
        last = len(drafts)
        return Verdict(last, sample(scores[last], key, first_position + last))


def _one_hot(draft: int) -> dict[int, float]:
    return {draft: 1.0}


def _normalised(q: DraftDistribution, draft: int, vocab_size: int) -> dict[int, float] | None:
    """q as a map with sum one, or None when the draft cannot come from it."""
    ids, probabilities = q
    if not ids:
        return _one_hot(draft)
    table = dict(zip(ids, probabilities, strict=False))
    well_formed = (
        len(table) == len(ids) == len(probabilities)
        and all(0 <= token < vocab_size for token in table)
        and all(math.isfinite(value) and value >= 0.0 for value in table.values())
        and table.get(draft, 0.0) > 0.0
    )
    if not well_formed:
        return None
    total = sum(table.values())
    return {token: value / total for token, value in table.items()}


def _log_residual(p: Tensor, q: dict[int, float]) -> Tensor:
    """log max(0, p - q), float32 [V], not normalised: Gumbel-max does not need it."""
    ids = torch.tensor(list(q), dtype=torch.int64, device=p.device)
    residual = p.clone()
    residual[ids] -= torch.tensor(list(q.values()), dtype=torch.float32, device=p.device)
    residual.clamp_(min=0.0)
    # p equal to q up to rounding: a rejection has probability zero, and p is the right limit.
    return (residual if float(residual.max()) > 0.0 else p).log()
