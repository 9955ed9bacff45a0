"""int8 products in torch: the arithmetic of the native core, on any device.

Weights are int8 with one scale an output. Inputs are quantised to 16 bits with one scale a row: in 8 bits
the outliers of a row drown the rest of it. The sum over `SPAN` inputs fits 32 bits, and float64 holds it
exactly in any order; spans are rounded to float32 and added first to last. So the bits are those of the
native core (actors/native/kernels.h), and a row's depend on that row alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 512
WEIGHT_LIMIT, INPUT_LIMIT = 127, 32767
TINY = 1e-30
"""Greatest magnitude of a row (or of an output's weights) that still quantises to zeros."""


def quantize(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """x: float32 [N, K]. Returns integers -limit..limit in float32 [N, K] and scales [N, 1].

    Their product is near x. A row with an infinity or NaN has the scale NaN and zeros.
    """
    top = x.abs().amax(-1, keepdim=True)  # NaN where a value is
    usable = top.isfinite() & (top >= TINY)
    wide = torch.full_like(top, limit)  # a number over a tensor is a product with the reciprocal in torch
    scale = torch.where(usable, top / wide, torch.where(top.isfinite(), 0.0, torch.nan))
    factor = torch.where(usable, wide / top, 0.0)
    return torch.where(usable, (x * factor).round(), 0.0), scale


def _spans(x: Tensor) -> list[Tensor]:
    return [x[:, start : start + SPAN] for start in range(0, x.shape[1], SPAN)]


class Int8Product:
    """`MatrixProduct` with int8 weights [N, K]; float32 output.

    Weights are widened at every call, which is slow: this is for machines without the compiled core.
    """

    row_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        values, scale = quantize(weight.float(), WEIGHT_LIMIT)
        self._spans = [part.to(torch.int8).contiguous() for part in _spans(values)]
        self._scale = scale[:, 0]
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K]. Returns float32 [M, N]."""
        values, scales = quantize(x.float(), INPUT_LIMIT)
        out = torch.zeros(x.shape[0], self._scale.numel(), device=x.device)
        for part, weight in zip(_spans(values.double()), self._spans, strict=True):
            out += F.linear(part, weight.double()).float()
        out *= self._scale * scales
        return out if self._bias is None else out.add_(self._bias)
