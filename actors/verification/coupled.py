"""Coupled sampling: the target's own sample decides, a draft is accepted when it is the same token.

By the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka, "A* Sampling", NeurIPS 2014, section 2)
`argmax_v(score[v] + g_v)` with independent standard Gumbel `g_v` is an exact sample of softmax(score). The
noise is a pure function of (key, position, token), so what is emitted does not depend on any draft; a drafter
that adds the same noise to its own scores guesses the same token often (a coupling of the two distributions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from actors.sampling.noise import GUMBEL, gumbel
from actors.sampling.reduce import best_ids
from actors.sampling.truncation import surviving_ids
from actors.verification.rule import DraftDistribution, Verdict
from actors.verification.trees import ROOT, find_child

_FEW = 4
"""Noise is computed for survivors alone when they are less than a `_FEW`th of the vocabulary: random access
costs one Philox call a token instead of one every four."""
_SMALL_VOCABULARY = 256
"""Up to this size computing all the noise is faster than looking for survivors."""


def sample(row: Tensor, key: int, position: int, stream: int = GUMBEL) -> int:
    """Draw a token of softmax(row) with the noise of `position`.

    Args:
        row: float32 [V]; -inf for tokens that cannot be drawn. Of equal sums the lowest id wins.

    Raises:
        ValueError: no token can be drawn.
    """
    vocab_size = row.numel()
    if vocab_size > _SMALL_VOCABULARY:
        ids = surviving_ids(row)
        if 0 < ids.numel() < vocab_size // _FEW:
            noisy = row[ids] + gumbel(key, position, vocab_size, ids, stream)
            return int(ids[noisy.argmax()])
    token = int((row + gumbel(key, position, vocab_size, None, stream, row.device)).argmax())
    if float(row[token]) == -math.inf:
        raise ValueError("no token survives")
    return token


def accept_equal(tokens: Sequence[int], drafts: Sequence[int]) -> Verdict:
    """The verdict when row j's token is `tokens[j]` (K + 1 of them): accept while drafts equal them.

    Plain greedy requests use this with the argmax ids of a whole batch.
    """
    for j, draft in enumerate(drafts):
        if tokens[j] != draft:
            return Verdict(j, tokens[j])
    return Verdict(len(drafts), tokens[len(drafts)])


def accept_path(decide: Callable[[int, int], int], drafts: Sequence[int], parents: Sequence[int]) -> Verdict:
    """The verdict over a tree: follow the target's own tokens down from the root while they are drafted.

    Args:
        decide: (row, depth) -> the target's token after draft `row - 1`, which has `depth` tokens above and
            with it; row 0 follows the last committed token. Called for the rows on the path only.
        drafts: K token ids.
        parents: index of each draft's parent, which comes before it; -1 for the last committed token.
    """
    path: list[int] = []
    at = ROOT
    while True:
        token = decide(at + 1, len(path))
        found = find_child(drafts, parents, at, token)
        if found is None:
            return Verdict(len(path), token, tuple(path))
        path.append(found)
        at = found


def verify_greedy(scores: Tensor, drafts: Sequence[int]) -> Verdict:
    """Accept while a draft is the best-scoring token; the lowest id wins ties."""
    return accept_equal(best_ids(scores), drafts)


class CoupledRule:
    """Drafter-invariant verification: the default."""

    @property
    def name(self) -> str:
        return "coupled"

    @property
    def needs_q(self) -> bool:
        return False

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
        """See `VerificationRule.verify`; q is not used. Rows after the first difference are not looked at."""
        if greedy:
            return verify_greedy(scores, drafts)
        for j, draft in enumerate(drafts):
            token = sample(scores[j], key, first_position + j)
            if token != draft:
                return Verdict(j, token)
        last = len(drafts)
        return Verdict(last, sample(scores[last], key, first_position + last))

    def verify_tree(
        self,
        scores: Tensor,
        drafts: Sequence[int],
        parents: Sequence[int],
        *,
        key: int,
        first_position: int,
        greedy: bool,
    ) -> Verdict:
        """Judge a tree of K drafts (`parents` as in `accept_path`); the rest is as in `verify`."""
        if greedy:
            best = best_ids(scores)
            return accept_path(lambda row, depth: best[row], drafts, parents)
        return accept_path(
            lambda row, depth: sample(scores[row], key, first_position + depth), drafts, parents
        )
