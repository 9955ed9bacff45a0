"""How a sampling drafter turns its logits into tokens, so that its guess tends to be the target's token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.drafting.coupling import SharedColumns
from actors.sampling.noise import DRAFT
from actors.sampling.params import GREEDY_TEMPERATURE, DraftSampling
from actors.sampling.reduce import best_ids, top_entries
from actors.sampling.truncation import survival_threshold
from actors.verification.coupled import sample
from actors.verification.registry import RULES

MAX_Q = 64
"""Support of a distribution that crosses the wire, at most."""
_NEED_Q = frozenset(name for name, rule in RULES.items() if rule.needs_q)


@dataclass(frozen=True, slots=True)
class Draw:
    """`confidence` is the draft's own probability of the token; `q` what it was drawn from, where needed.
    `others`: the next best tokens with theirs, best first, where they were asked for."""

    token_id: int
    confidence: float
    q: tuple[tuple[int, ...], tuple[float, ...]] | None = None
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CutVocabulary:
    """The target's tokens that a draft's logits stand for. `ids`: int64 [D], ascending, of `size` tokens; the
    others have probability 0. Noise is that of the target's ids."""

    ids: Tensor
    size: int


def draw_tokens(
    logits: Tensor,
    samplings: Sequence[DraftSampling],
    positions: Sequence[int],
    vocabulary: CutVocabulary | None = None,
    shared: Sequence[SharedColumns | None] = (),
    others: int = 0,
) -> list[Draw]:
    """Draw one token a row.

    Args:
        logits: float32 [N, V], or [N, D] with a cut vocabulary.
        samplings: one a row.
        positions: absolute index of each token drawn.
        vocabulary: what the columns stand for; None: column v is token v.
        shared: one a row, or empty: where given, a row that samples draws from the tokens shared with a
            target of another vocabulary, by that target's noise. The token is the draft's, q the target's.
        others: alternatives wanted of rows that are drawn greedily.

    Returns:
        Draws in the target's token ids.
    """
    best, confidence = _greedy(logits, 1 + others)
    if vocabulary is not None:
        # Ids ascend, so of equal logits the lowest id still wins.
        best = vocabulary.ids[best.to(vocabulary.ids.device)]
    greedy = list(zip(best.tolist(), confidence.tolist(), strict=True))
    draws: list[Draw] = []
    for row, sampling in enumerate(samplings):
        common = shared[row] if shared else None
        if sampling.temperature < GREEDY_TEMPERATURE or (common is not None and not common.draft_of):
            ids, likely = greedy[row]
            draws.append(Draw(ids[0], likely[0], others=tuple(zip(ids[1:], likely[1:], strict=True))))
            continue
        draw = _with_q if sampling.rule in _NEED_Q else _coupled
        if common is None:
            draws.append(draw(logits[row], sampling, positions[row], vocabulary))
        else:
            drawn = draw(logits[row][common.columns], sampling, positions[row], common.vocabulary)
            draws.append(replace(drawn, token_id=common.draft_of[drawn.token_id]))
    return draws


def _spread(row: Tensor, vocabulary: CutVocabulary | None) -> Tensor:
    """The row over the target's whole vocabulary, -inf where the draft has no token."""
    if vocabulary is None:
        return row
    whole = row.new_full((vocabulary.size,), -math.inf)
    whole[vocabulary.ids] = row
    return whole


def _greedy(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's `count` best columns and their probabilities at temperature 1 (S2D's confidence):
    [N, count] each."""
    if count == 1:
        best = torch.tensor(best_ids(logits), dtype=torch.int64, device=logits.device)[:, None]
        top = logits.gather(1, best)
    else:
        top, best = top_entries(logits, count)
    # Softmax by the greatest logit that is known already: torch.logsumexp takes twice as long.
    greatest = top[:, :1]
    return best, (top - greatest).exp_() / (logits - greatest).exp_().sum(dim=-1, keepdim=True)


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


def _coupled(
    logits: Tensor, sampling: DraftSampling, position: int, vocabulary: CutVocabulary | None
) -> Draw:
    """The target's rule on the draft's scores, with the target's noise."""
    row = _spread(_processed(logits, sampling), vocabulary)
    token = sample(row, sampling.key, position)
    return Draw(token, float((row[token] - torch.logsumexp(row, dim=-1)).exp()))


def _with_q(logits: Tensor, sampling: DraftSampling, position: int, vocabulary: CutVocabulary | None) -> Draw:
    """A sample of the renormalised top `MAX_Q` survivors, with noise of its own: the verifier's acceptance
    tests must be independent of the draw. What is shipped is, to float32, what was drawn from."""
    scores, ids = _processed(logits, sampling).topk(min(MAX_Q, logits.numel()))
    probabilities = torch.softmax(scores.to(torch.float64), dim=-1).to(torch.float32)
    kept = probabilities > 0
    ids, probabilities = ids[kept], probabilities[kept]
    row = torch.full_like(logits, -math.inf)
    row[ids] = probabilities.log()
    if vocabulary is not None:
        row, ids = _spread(row, vocabulary), vocabulary.ids[ids]
    token = sample(row, sampling.key, position, DRAFT)
    listed_ids, listed = tuple(ids.tolist()), tuple(probabilities.tolist())
    return Draw(token, listed[listed_ids.index(token)], (listed_ids, listed))
