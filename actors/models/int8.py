"""int8 products in torch: the arithmetic of the native core, on any device.

Weights are int8 with one scale for `UNIT` inputs of an output; inputs are quantised on the way, with one
scale for `PART` inputs of a row. The products of a part add up to an integer that float64 holds exactly, in
any order; parts and units are added in float32, first to last. So the bits are those of the native core
(actors/native/kernels.h), and a row's depend on that row alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 64
PART = 32
LIMIT = 127
TINY = 1e-30
"""Greatest magnitude of values under one scale that still quantise to zeros."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: float32 [..., K]. Returns integers -127..127 in float32 [..., K] and scales [..., 1].

    Their product is near x. Values with an infinity or NaN among them get the scale NaN and zeros.
    """
    top = x.abs().amax(-1, keepdim=True)  # NaN where a value is
    usable = top.isfinite() & (top >= TINY)
    wide = torch.full_like(top, LIMIT)  # a number over a tensor is a product with the reciprocal in torch
    scale = torch.where(usable, top / wide, torch.where(top.isfinite(), 0.0, torch.nan))
    factor = torch.where(usable, wide / top, 0.0)
    return torch.where(usable, (x * factor).round(), 0.0), scale


def quantize_by(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`quantize` of every `size` values of a row: x [N, K] to integers [N, K / size, size] and scales
    [N, K / size, 1]; rows are filled up with zeros to whole units."""
    padded = F.pad(x, (0, -x.shape[1] % UNIT))
    return quantize(padded.view(x.shape[0], padded.shape[1] // size, size))


class Int8Product:
    """`MatrixProduct` with int8 weights [N, K]; float32 output.

    Weights are widened at every call, which is slow: this is for machines without the compiled core.
    """

    row_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        values, scales = quantize_by(weight.float(), UNIT)
        self._values = values.to(torch.int8)
        self._scales = scales[:, :, 0]
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K]. Returns float32 [M, N]."""
        values, scales = quantize_by(x.float(), PART)
        values = values.double()
        out = torch.zeros(x.shape[0], self._values.shape[0], device=x.device)
        for unit in range(self._values.shape[1]):
            weights = self._values[:, unit].double()
            first = F.linear(values[:, 2 * unit], weights[:, :PART]).float() * scales[:, 2 * unit]
            second = F.linear(values[:, 2 * unit + 1], weights[:, PART:]).float() * scales[:, 2 * unit + 1]
            out += (first + second) * self._scales[:, unit]
        return out if self._bias is None else out.add_(self._bias)
