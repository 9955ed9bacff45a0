"""How a sampling drafter turns its logits into tokens, so that its guess tends to be the target's token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.drafting.interface import DraftSampling
from actors.sampling.noise import DRAFT
from actors.sampling.params import GREEDY_TEMPERATURE
from actors.sampling.reduce import best_ids
from actors.sampling.truncation import survival_threshold
from actors.verification.coupled import sample

MAX_Q = 64
"""Support of a distribution that crosses the wire, at most (DESIGN: rules that need q)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """`confidence` is the draft's own probability of the token; `q` what it was drawn from, where needed."""

    token_id: int
    confidence: float
    q: tuple[tuple[int, ...], tuple[float, ...]] | None = None


def draw_tokens(logits: Tensor, samplings: Sequence[DraftSampling], positions: Sequence[int]) -> list[Draw]:
    """Draw one token a row.

    Args:
        logits: float32 [N, V].
        samplings: one a row.
        positions: absolute index of each token drawn.
    """
    best, confidence = _greedy(logits)
    draws: list[Draw] = []
    for row, sampling in enumerate(samplings):
        if sampling.temperature < GREEDY_TEMPERATURE:
            draws.append(Draw(best[row], confidence[row]))
        elif sampling.rule == "leviathan":
            draws.append(_with_q(logits[row], sampling, positions[row]))
        else:
            draws.append(_coupled(logits[row], sampling, positions[row]))
    return draws


def _greedy(logits: Tensor) -> tuple[list[int], list[float]]:
    """Each row's best token and its probability at temperature 1 (S2D's confidence)."""
    best = best_ids(logits)
    top = logits[torch.arange(len(best)), best]
    return best, (top - torch.logsumexp(logits, dim=-1)).exp().tolist()


def _processed(logits: Tensor, sampling: DraftSampling) -> Tensor:
    """float32 [V]: the target's own arithmetic (`actors.sampling.pipeline`), so that equal logits give equal
    tokens. Masks and penalties are the target's alone."""
    row = logits.clone()
    if sampling.temperature != 1.0:
        row /= sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
        threshold = survival_threshold(row, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        row.masked_fill_(row < threshold, -math.inf)
    return row


def _coupled(logits: Tensor, sampling: DraftSampling, position: int) -> Draw:
    """The target's rule on the draft's scores, with the target's noise."""
    row = _processed(logits, sampling)
    token = sample(row, sampling.key, position)
    return Draw(token, float((row[token] - torch.logsumexp(row, dim=-1)).exp()))


def _with_q(logits: Tensor, sampling: DraftSampling, position: int) -> Draw:
    """A sample of the renormalised top `MAX_Q` survivors, with noise of its own: the verifier's acceptance
    tests must be independent of the draw. What is shipped is, to float32, what was drawn from."""
    scores, ids = _processed(logits, sampling).topk(min(MAX_Q, logits.numel()))
    probabilities = torch.softmax(scores.to(torch.float64), dim=-1).to(torch.float32)
    kept = probabilities > 0
    ids, probabilities = ids[kept], probabilities[kept]
    row = torch.full_like(logits, -math.inf)
    row[ids] = probabilities.log()
    token = sample(row, sampling.key, position, DRAFT)
    listed_ids, listed = tuple(ids.tolist()), tuple(probabilities.tolist())
    return Draw(token, listed[listed_ids.index(token)], (listed_ids, listed))
