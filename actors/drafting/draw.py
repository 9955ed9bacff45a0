"""How a sampling drafter turns its logits into tokens, so that its guess tends to be the target's token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.drafting.interface import DraftSampling
from actors.sampling.noise import DRAFT, gumbel
from actors.sampling.params import GREEDY_TEMPERATURE

MAX_Q = 64
"""Support of a distribution that crosses the wire, at most (DESIGN: rules that need q)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """`confidence` is the draft's own probability of the token. `q` is what it was drawn from, where needed."""

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
