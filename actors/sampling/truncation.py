"""min_p, top_k and top_p of one row of scores, as one threshold on the score.

The three are applied one after the other, each on the renormalised survivors of the one before (the order of
vLLM and Hugging Face after temperature). All cut the tail of the sorted distribution, so their composition is
"keep every score that is at least t". Working with t instead of ranks keeps tied tokens together, whatever
order a sort would leave them in.

Sums of probabilities are taken in float64: a token whose membership in the nucleus depends on the order of
summation is then practically impossible. Sorting and compaction use numpy on the CPU, where they are five to
fifteen times faster than torch's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_SAFETY = 0.5
"""Margin of the pre-selection of nucleus candidates against rounding."""
_TINY = float(np.finfo(np.float32).tiny)


def survival_threshold(row: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> float:
    """The lowest score that survives.

    Args:
        row: float32 [V] scores, already divided by temperature; -inf for masked tokens.
        top_k: keep the k best, 0 for all.
        top_p: keep the smallest head with at least this mass.
        min_p: keep tokens at least this fraction as probable as the best.

    Returns:
        t, a float32 value, such that the survivors are `row >= t`; -inf when nothing is cut. The best token
        always survives.
    """
    threshold = -math.inf
    best = float(row.max())
    if best == -math.inf:
        return threshold
    if min_p > 0.0:
        threshold = float(np.float32(best + math.log(min_p)))
    if 0 < top_k < row.numel():
        # min_p never cuts between equal scores, so the k-th best of its survivors is the k-th best of all.
        threshold = max(threshold, float(torch.topk(row, top_k).values[-1]))
    if top_p < 1.0:
        threshold = _nucleus_threshold(row, best, threshold, top_p)
    return threshold


def keep_at_least(row: Tensor, threshold: float) -> None:
    """Set every score below `threshold` (a float32 value) to -inf, in place."""
    if threshold == -math.inf:
        return
    # torch's threshold keeps what is strictly greater; it takes a fifth of the time of a masked fill. The
    # float below zero is subnormal, and a library may have told the processor to take those for zero.
    below = float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
    torch.threshold_(row, -_TINY if -_TINY < below < _TINY else below, -math.inf)


def surviving_ids(row: Tensor) -> Tensor:
    """Ids, ascending, of the tokens of `row` [V] that are not -inf; int64 on its device."""
    return _where_at_least(row, -float(np.finfo(np.float32).max))


def _nucleus_threshold(row: Tensor, best: float, threshold: float, top_p: float) -> float:
    kept = row if threshold == -math.inf else row[_where_at_least(row, threshold)]
    total = float((kept - best).to(torch.float64).exp_().sum())
    # Tokens of probability at most (1 - top_p) / n hold less than 1 - top_p together, so the nucleus lies
    # within the others: usually a few hundred, and the vocabulary need not be sorted.
    cut = best + math.log(total * (1.0 - top_p) / kept.numel() * _SAFETY)
    head = _descending(kept[_where_at_least(kept, min(cut, best))])
    mass = (head - best).to(torch.float64).exp_().cumsum_(0)
    # The nucleus ends with the first token at which the mass reaches top_p.
    last = int(torch.searchsorted(mass, top_p * total))
    return float(head[min(last, head.numel() - 1)])


def _where_at_least(row: Tensor, threshold: float) -> Tensor:
    if row.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(row.numpy() >= np.float32(threshold)))
    return (row >= threshold).nonzero().squeeze(1)


def _descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy())[::-1].copy())
    return values.sort(descending=True).values
