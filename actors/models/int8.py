"""int8 products in torch: the arithmetic of the native core, on any device.

Weights have one scale an output, inputs one scale for every `SPAN` of a row; both are symmetric, -127..127. The
sum of a span is an integer below 2^24, which float32 holds exactly whatever its order; spans are added first to
last. So the bits are those of the native core (actors/native/kernels.h), and a row's depend on that row alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 64
TINY = 1e-30
"""Greatest magnitude of a span (or of an output's weights) that still quantises to zeros."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: float32 [..., S]. Returns integers in float32 [..., S] and scales [..., 1] with x ~ integers * scale.

    A row with an infinity or NaN has the scale NaN and zeros.
    """
    top = x.abs().amax(-1, keepdim=True)  # NaN where a value is
    usable = top.isfinite() & (top >= TINY)
    scale = torch.where(usable, top / 127.0, torch.where(top.isfinite(), 0.0, torch.nan))
    factor = torch.where(usable, 127.0 / top, 0.0)
    return torch.where(usable, (x * factor).round(), 0.0), scale


class Int8Product:
    """`MatrixProduct` with int8 weights [N, K]; float32 output. Weights are widened at every call."""

    row_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._outputs, self._inputs = weight.shape
        values, scale = quantize(weight.float())
        self._padding = -self._inputs % SPAN
        spans = F.pad(values.to(torch.int8), (0, self._padding)).view(self._outputs, -1, SPAN)
        self._spans = spans.transpose(0, 1).contiguous()  # [K / SPAN, N, SPAN]
        self._scale = scale[:, 0]
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K]. Returns float32 [M, N]."""
        padded = F.pad(x.float(), (0, self._padding)).view(x.shape[0], -1, SPAN)
        values, scales = quantize(padded)
        out = torch.zeros(x.shape[0], self._outputs, device=x.device)
        for index, weight in enumerate(self._spans):
            out += F.linear(values[:, index], weight.float()) * scales[:, index]
        out *= self._scale
        return out if self._bias is None else out.add_(self._bias)
