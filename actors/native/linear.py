"""One matrix product on the native core, for any linear layer on the CPU.

Row-invariant in every format: each output has one fixed order of summation (actors/native/kernels.h).
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.native.blocked import Memory, NotPackableError, blocked, keep
from actors.native.library import FORMAT_CODES, NativeLibrary, WeightFormat, load_library, pointer


class NativeLinear:
    """y = x W^T + b over a weight in the core's blocked layout, bfloat16 packed where possible (packed.h).

    Args:
        weight: [N, K], float32 or bfloat16; copied, or shared with other processes (`actors.native.blocked`).
        bias: [N] or None; copied.
        int8: quantise the weight and the inputs (see kernels.h) to int8.
        threads: of a product; None takes as many as torch uses now. Linears of one thread count share a team.
        isa: instruction set (see `load_library`).

    Raises:
        NativeUnavailableError: the core is not there.
        ValueError: the weight is of another dtype or device.
        MemoryError: it does not fit.
    """

    row_invariant = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        self._library: NativeLibrary = load_library(isa)
        if weight.dtype not in (torch.float32, torch.bfloat16) or weight.dim() != 2:
            raise ValueError(f"a weight must be float32 or bfloat16 [N, K], not {weight.dtype}")
        self._outputs, self._inputs = weight.shape
        weight = weight.detach().contiguous()
        bias = None if bias is None else bias.detach().float().contiguous()
        threads = torch.get_num_threads() if threads is None else threads
        formats = self._library.weight_formats(weight.dtype, int8=int8)
        self.format: WeightFormat
        for self.format in formats:
            try:
                (matrix,) = keep([blocked(self._library, weight, self.format, threads)])
                break
            except NotPackableError:  # never of the last
                continue
        handle = self._library.c.s2d_linear_create(
            matrix.address,
            None if bias is None else pointer(bias, torch.float32),
            self._outputs,
            self._inputs,
            FORMAT_CODES[self.format],
            threads,
            self._library.isa_code,
        )
        if not handle:
            raise MemoryError("no thread could be started, or no memory for a bias")
        self._handle: int = handle
        weakref.finalize(self, _destroy, self._library, handle, matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K], any float dtype. Returns float32 [M, N]. Raises ValueError for another width."""
        x = x.detach().float().contiguous()
        if x.dim() != 2 or x.shape[1] != self._inputs:
            raise ValueError(f"inputs are {tuple(x.shape)}, not [M, {self._inputs}]")
        out = torch.empty(x.shape[0], self._outputs)
        status = self._library.c.s2d_linear_run(
            self._handle, pointer(x, torch.float32), x.shape[0], out.data_ptr()
        )
        _check(status)
        return out

    def of_normalised(self, rows: Sequence[tuple[Tensor, int]], eps: float) -> Tensor:
        """As a call with row i of x for each (x, i), divided by the root of its mean square and `eps`; the x
        are float32 [N, K]. Raises ValueError for another width or a row that is not there."""
        addresses = array("q")
        for x, row in rows:
            if x.dim() != 2 or x.size(1) != self._inputs or not 0 <= row < x.size(0):
                raise ValueError(f"no row {row} of {self._inputs} in {tuple(x.shape)}")
            addresses.append(pointer(x, torch.float32) + 4 * row * self._inputs)
        out = torch.empty(len(rows), self._outputs)
        _check(
            self._library.c.s2d_linear_run_normalised(
                self._handle, addresses.buffer_info()[0], len(rows), eps, out.data_ptr()
            )
        )
        return out


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("no memory for converted inputs")


def _destroy(library: NativeLibrary, handle: int, _matrix: Memory) -> None:
    library.c.s2d_linear_destroy(handle)
