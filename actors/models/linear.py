"""The matrix-product seam: one weight, packed once for the fastest product that this machine has.

Activations come in as float32; a product converts them to what it computes in. Products differ in the layout
of the weight, in the dtype of their output, and in whether the bits of a row depend on the number of rows.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.int8 import Int8Product
from actors.native.library import available as native_available
from actors.native.linear import NativeLinear

ProductKind = Literal[
    "auto", "plain", "prepacked", "prepacked_float32", "chunked_float32", "cuda_float32", "native", "int8"
]
PREPACK_ROWS = 8
"""Rows oneDNN lays a packed weight out for. Layouts for 2 to 64 rows cost the same; the one for 1 row does
not."""
UPCAST_LIMIT = 2_000_000_000
"""Parameters up to which bfloat16 weights are widened to float32 on a CPU without bfloat16 arithmetic, where
that is faster from two rows on (measured on AVX2: 43 ms against 109 for 8 rows of 133M parameters)."""
CHUNK_ROWS = 4096


class MatrixProduct(Protocol):
    """y = x W^T + b."""

    @property
    def row_invariant(self) -> bool:
        """Whether the bits of an output row depend on its input row alone, whatever the number of rows."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x: float32 [M, K]. Returns [M, N], float32 or the weight's dtype."""
        ...


class PlainProduct:
    """`F.linear` in the weight's dtype, on any device."""

    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias)


class PrepackedProduct:
    """oneDNN with the weight in its blocked layout; output in the weight's dtype.

    From two rows on oneDNN's vector kernels add over K in one fixed order; those on AMX tiles do not. Whether
    one row takes another kernel depends on machine and shape, so it is tried once here, and a single row is
    doubled where it does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._dtype, self._bias = weight.dtype, bias
        self.row_invariant = weight.dtype != torch.bfloat16 or not _has_amx_tiles()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PREPACK_ROWS)
        probe = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        self._double_single_row = not torch.equal(self._run(probe[:1]), self._run(probe)[:1])

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if x.shape[0] == 1 and self._double_single_row:
            return self._run(x.repeat(2, 1))[:1]
        return self._run(x)


class ChunkedFloat32Product:
    """Float32 result of bfloat16 weights kept as they are: a slice of outputs at a time is widened."""

    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], self._weight.shape[0]), dtype=torch.float32)
        for start in range(0, self._weight.shape[0], CHUNK_ROWS):
            part = self._weight[start : start + CHUNK_ROWS]
            out[:, start : start + part.shape[0]] = F.linear(x.float(), part.float())
        return out if self._bias is None else out.add_(self._bias)


class CudaFloat32Product:
    """Tensor-core product of bfloat16 operands, accumulated and returned in float32 (torch 2.8 on CUDA)."""

    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed, self._bias = weight.t(), bias

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.mm(x.to(self._transposed.dtype), self._transposed, out_dtype=torch.float32)
        return out if self._bias is None else out.add_(self._bias)


def _has_amx_tiles() -> bool:
    """Whether oneDNN computes bfloat16 products on AMX tiles here; taken as so where torch cannot tell."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is None or bool(probe())


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype on this CPU (bfloat16 needs AVX-512 or AVX-NE-CONVERT)."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        PrepackedProduct(torch.zeros(16, 16, dtype=dtype))
    except (RuntimeError, AttributeError):  # no such operator in this torch, or no such instructions
        return False
    return True


@cache
def can_return_float32(device: torch.device) -> bool:
    """Whether `torch.mm` of bfloat16 returns float32 on this device."""
    try:
        CudaFloat32Product(torch.zeros(16, 16, dtype=torch.bfloat16, device=device))(
            torch.zeros(16, 16, device=device)
        )
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def choose_kind(
    dtype: torch.dtype, device: torch.device, *, parameters: int, float32_output: bool = False
) -> ProductKind:
    """The fastest product for weights of `dtype`. `parameters` of the whole model bound what widening may
    cost; `float32_output` demands a result that was never rounded to bfloat16."""
    if device.type != "cpu":
        if dtype == torch.float32 or not float32_output:
            return "plain"
        return "cuda_float32" if can_return_float32(device) else "chunked_float32"
    if dtype == torch.float32:
        return "prepacked" if can_prepack(dtype) else "plain"
    if not float32_output and can_prepack(dtype):
        return "prepacked"
    if parameters <= UPCAST_LIMIT and can_prepack(torch.float32):
        return "prepacked_float32"
    return "chunked_float32" if float32_output else "plain"


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    kind: ProductKind = "auto",
    *,
    parameters: int | None = None,
    float32_output: bool = False,
) -> MatrixProduct:
    """Pack a weight [N, K] and a bias [N]. `kind` "auto" asks `choose_kind`; others are taken as they are and
    raise RuntimeError where this machine lacks them. "native" is the compiled core in the weight's dtype;
    "int8" quantises, on the compiled core where it is there and in torch (same bits, slower) elsewhere."""
    if kind == "auto":
        kind = choose_kind(
            weight.dtype,
            weight.device,
            parameters=weight.numel() if parameters is None else parameters,
            float32_output=float32_output,
        )
    match kind:
        case "plain":
            return PlainProduct(weight, bias)
        case "prepacked":
            return PrepackedProduct(weight, bias)
        case "prepacked_float32":
            return PrepackedProduct(weight.float(), None if bias is None else bias.float())
        case "chunked_float32":
            return ChunkedFloat32Product(weight, bias)
        case "cuda_float32":
            return CudaFloat32Product(weight, bias)
        case "native":
            return NativeLinear(weight, bias)
        case "int8":
            if weight.device.type == "cpu" and native_available():
                return NativeLinear(weight, bias, int8=True)
            return Int8Product(weight, bias)
        case _:
            raise ValueError(f"unknown kind of product {kind!r}")
