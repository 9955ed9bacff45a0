"""Loading the native CPU core: a shared library with a plain C interface, called through ctypes.

ctypes releases the interpreter lock during a call. Building the core is optional; `unavailable_reason` says
why it is not there. The environment variable S2D_NATIVE_ISA (plain, avx2, avx512, avx512_bf16 or amx) forces
an instruction set, which is otherwise the widest that the machine has.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ABI_VERSION = 9
ISA_VARIABLE = "S2D_NATIVE_ISA"
WeightFormat = Literal["float32", "bfloat16", "int8", "packed"]
FORMAT_CODES: dict[WeightFormat, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "packed": 3}
"""How weights are kept (`Format` in kernels.h); packed is bfloat16 in fewer bytes."""
ISA_CODES = {"auto": 0, "plain": 1, "avx2": 2, "avx512": 3, "amx": 4, "avx512_bf16": 5}
NO_MEMORY, NOT_PACKABLE = 8, 9
"""Of what functions return (`Status` in model.h)."""
MAX_TOP = 32
"""Most entries a row that `NativeLibrary.topk` returns."""


class NativeUnavailableError(RuntimeError):
    """The native core cannot be used here; the message says why."""


class Shape(ctypes.Structure):
    """Sizes of a model, as `struct Shape` of model.h has them."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                "layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "intermediate",
                "vocab",
                "blocks",
                "max_position",
            )
        ),
        ("bf16", c_int32),
        ("tied", c_int32),
        ("weights", c_int32),
        ("eps", c_float),
    )


class Batch(ctypes.Structure):
    """The packed tokens of a pass, as `struct Batch` of model.h has them."""

    _fields_ = (
        ("tokens", c_int64),
        ("seqs", c_int64),
        ("table_width", c_int64),
        ("positions", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("tables", c_void_p),
        ("parents", c_void_p),
    )


class Chain(ctypes.Structure):
    """Greedy drafts, as `struct Chain` of model.h has them."""

    _fields_ = (
        ("tokens", c_void_p),
        ("added_rows", c_void_p),
        ("added", c_void_p),
        ("added_count", c_int64),
        ("ids", c_void_p),
        ("most", c_int64),
        ("best", c_int64),
        ("budgets", c_void_p),
        ("floors", c_void_p),
        ("knots", c_int64),
        ("confidence", c_void_p),
        ("acceptance", c_void_p),
        ("drafted", c_void_p),
        ("probability", c_void_p),
        ("counts", c_void_p),
        ("states", c_void_p),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "s2d_abi_version": (c_int32, ()),
    "s2d_isa_name": (c_char_p, (c_int32,)),
    "s2d_packs": (c_int32, (c_int32,)),
    "s2d_create": (c_void_p, (POINTER(Shape), c_int32, c_int32)),
    "s2d_destroy": (None, (c_void_p,)),
    "s2d_layout_version": (c_int32, ()),
    "s2d_matrix_bytes": (c_int64, (c_int64, c_int64, c_int32)),
    "s2d_put_matrix": (
        c_int32,
        (c_void_p, c_int32, c_int64, c_int64, c_int32, c_int32, c_int32, c_void_p),
    ),
    "s2d_set_matrix": (c_int32, (c_void_p, c_int64, c_int64, c_void_p)),
    "s2d_set_vector": (c_int32, (c_void_p, c_int64, c_int64, c_void_p)),
    "s2d_set_table": (None, (c_void_p, c_void_p, c_int64)),
    "s2d_forward": (
        c_int32,
        (c_void_p, c_void_p, POINTER(Batch), c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "s2d_embed": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "s2d_run_layers": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, POINTER(Batch))),
    "s2d_logits": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "s2d_draft_chain": (c_int32, (c_void_p, c_int64, POINTER(Batch), POINTER(Chain))),
    "s2d_copy_slots": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64)),
    "s2d_weight_bytes": (c_int64, (c_void_p,)),
    "s2d_read_weights": (c_float, (c_void_p,)),
    "s2d_linear_create": (
        c_void_p,
        (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32, c_int32),
    ),
    "s2d_linear_destroy": (None, (c_void_p,)),
    "s2d_linear_run": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "s2d_linear_run_normalised": (c_int32, (c_void_p, c_void_p, c_int64, c_float, c_void_p)),
    "s2d_gumbel": (c_int32, (c_int32, c_uint64, c_int64, c_uint32, c_void_p, c_int64, c_void_p)),
    "s2d_topk": (c_int32, (c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "s2d_argmax": (c_int32, (c_int32, c_void_p, c_int64, c_int64, c_void_p)),
}


def pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    """Address of a contiguous CPU tensor's data. Raises ValueError for any other: C code cannot check."""
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"need a contiguous {dtype} tensor on cpu, got {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()


class NativeLibrary:
    """The loaded core on one instruction set (`isa`, a name)."""

    def __init__(self, path: Path, isa: str) -> None:
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(f"the native core {path.name} does not load: {error}") from error
        try:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise NativeUnavailableError(
                f"the native core {path.name} is another version: {error}"
            ) from error
        if (version := self.c.s2d_abi_version()) != ABI_VERSION:
            raise NativeUnavailableError(
                f"the native core {path.name} has interface {version}, not {ABI_VERSION}: build it again"
            )
        self.isa_code = ISA_CODES[isa]
        name = self.c.s2d_isa_name(self.isa_code)
        if name is None:
            raise NativeUnavailableError(f"this machine has no {isa}")
        self.isa: str = name.decode()
        self.packs = bool(self.c.s2d_packs(self.isa_code))
        """Whether it has products over packed bfloat16 weights (actors/native/packed.h)."""
        self.layout_version = int(self.c.s2d_layout_version())
        """Another one: blocked matrices of the same weights have other bytes."""

    def weight_formats(self, dtype: torch.dtype, *, int8: bool) -> tuple[WeightFormat, ...]:
        """How weights of this dtype (float32 or bfloat16) may be kept, best first; those that cannot be
        packed take the next."""
        if int8:
            return ("int8",)
        if dtype == torch.float32:
            return ("float32",)
        return ("packed", "bfloat16") if self.packs else ("bfloat16",)

    def gumbel(self, key: int, position: int, stream: int, ids: Tensor | None, out: Tensor) -> None:
        """Position-keyed Gumbel noise of `actors.sampling.noise` into `out` (float32, any shape): of tokens
        `ids` (int64, as many as `out`), or of 0..n-1. The same bits on every instruction set."""
        if ids is not None and ids.numel() != out.numel():
            raise ValueError(f"{ids.numel()} ids, but room for {out.numel()} values")
        self.c.s2d_gumbel(
            self.isa_code,
            key,
            position,
            stream,
            None if ids is None else pointer(ids, torch.int64),
            out.numel(),
            pointer(out, torch.float32),
        )

    def argmax(self, rows: Tensor) -> Tensor:
        """Index of the greatest value of each row of float32 [N, V], the first of equal ones: int64 [N].
        NaN is never the greatest; a row of NaN gives 0."""
        out = torch.empty(rows.shape[0], dtype=torch.int64)
        self.c.s2d_argmax(self.isa_code, pointer(rows, torch.float32), *rows.shape, out.data_ptr())
        return out

    def topk(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of each row of float32 [N, V], best first, equal ones by lower index: values float32
        [N, k] and indices int64 [N, k]. NaN is never taken; where a row has fewer than k numbers the rest is
        -inf at index -1. Raises ValueError unless 1 <= k <= `MAX_TOP`."""
        if not 1 <= k <= MAX_TOP:
            raise ValueError(f"k must be between 1 and {MAX_TOP}, not {k}")
        values = torch.empty(rows.shape[0], k)
        indices = torch.empty(rows.shape[0], k, dtype=torch.int64)
        self.c.s2d_topk(
            self.isa_code, pointer(rows, torch.float32), *rows.shape, k, indices.data_ptr(), values.data_ptr()
        )
        return values, indices


def load_library(isa: str | None = None) -> NativeLibrary:
    """The core on the given instruction set; None takes S2D_NATIVE_ISA, or what the machine does best.

    Raises:
        NativeUnavailableError: it was not built, does not load, or the machine lacks the instruction set.
        ValueError: the name is none of `ISA_CODES`.
    """
    chosen = isa if isa is not None else os.environ.get(ISA_VARIABLE, "auto")
    if chosen not in ISA_CODES:
        raise ValueError(f"{ISA_VARIABLE}={chosen!r}: use one of {', '.join(ISA_CODES)}")
    return _load(chosen)


@cache
def _load(isa: str) -> NativeLibrary:
    built = sorted(Path(__file__).parent.glob("_core*.so"))
    if not built:
        raise NativeUnavailableError(
            "the native core was not built (no C++ compiler at installation); "
            "`python setup.py build_ext --inplace` builds it"
        )
    return NativeLibrary(built[0], isa)


def unavailable_reason() -> str | None:
    """Why the native core cannot be used here; None when it can."""
    try:
        load_library()
    except NativeUnavailableError as error:
        return str(error)
    return None


def available() -> bool:
    return unavailable_reason() is None


def _gumbel() -> Callable[[int, int, int, Tensor | None, Tensor], None] | None:
    return load_library().gumbel if available() else None


gumbel = _gumbel()
"""`NativeLibrary.gumbel`, or None where the core is not available."""
