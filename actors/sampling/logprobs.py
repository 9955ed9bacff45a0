"""Log-probabilities that are reported: log-softmax of the raw logits, before any processing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.sampling.reduce import top_entries
from actors.sampling.results import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top_n: int) -> list[TokenLogprobs]:
    """Logprobs of chosen tokens and of the `top_n` most probable ones (natural log).

    Args:
        logits: float32 [N, V] or [V], raw; not modified. Each row is handled alone, so that its values do not
            depend on how many are asked for together.
        token_ids: N chosen ids, one a row.
        top_n: alternatives a row; 0 for none. Equal ones are ordered by id.
    """
    rows = logits.unsqueeze(0) if logits.dim() == 1 else logits
    if rows.shape[0] != len(token_ids):
        raise ValueError(f"{rows.shape[0]} rows of logits for {len(token_ids)} tokens")
    return [_row_logprobs(row, token, top_n) for row, token in zip(rows, token_ids, strict=True)]


def _row_logprobs(row: Tensor, token: int, top_n: int) -> TokenLogprobs:
    row = row.to(torch.float32)
    norm = torch.logsumexp(row, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if top_n > 0:
        values, ids = _ordered(row, top_n)
        top = tuple(zip(ids.tolist(), (values - norm).tolist(), strict=True))
    return TokenLogprobs(token_id=token, logprob=float(row[token] - norm), top=top)


def _ordered(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the `count` best, equal ones by id: those at the end of the list included."""
    values, ids = (t[0] for t in top_entries(row.unsqueeze(0), count + 1))
    if bool((values[1:] == values[:-1]).any()):
        ids = (row >= values[:count][-1]).nonzero().squeeze(1)
        # ids ascend, and a stable sort keeps them so among equals.
        values, order = row[ids].sort(descending=True, stable=True)
        ids = ids[order]
    return values[:count], ids[:count]
