"""What sampling reports of a token. No torch: requests and answers of other processes hold these too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-softmax (natural log) of one position. `top` holds (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
