"""Matrices in the core's blocked layout (actors/native/kernels.h): made here, and shared by processes.

A matrix is stored in a file that is named after what it was made from, and mapped. So replicas of a model,
models that share a base (a LoRA adapter changes some matrices and leaves the others) and a draft worker that
uses its target's head have it in memory once, in the system's page cache, and the next start makes nothing
anew. Where there is no room for files, it lies in memory of this process.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.cache import cache_dir
from actors.native.library import FORMAT_CODES, NativeLibrary, WeightFormat, pointer

SHARE_VARIABLE = "S2D_SHARE_WEIGHTS"
"""Environment variable: "0" keeps weights in memory of their process."""
SMALLEST_BYTES = 128 << 10
"""Smaller matrices are not worth a file."""
UNUSED_DAYS = 30
"""A file that no start has used for so long is removed when another one is written."""

_SLAB_BYTES = 64 << 20
_HUGE_BYTES = 2 << 20
_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)
_NO_MEMORY, _NOT_PACKABLE = 8, 9
_log = logging.getLogger(__name__)


class NotPackableError(Exception):
    """These weights cannot be kept as "packed" (actors/native/packed.h)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """`size` bytes from `address` on, there as long as this object. `shared`: they are those of a file."""

    address: int
    size: int
    shared: bool
    owner: object = field(repr=False)


def blocked(
    library: NativeLibrary, weight: Tensor, weight_format: WeightFormat, threads: int, *, halves: bool = False
) -> Memory:
    """A weight [N, K], contiguous float32 or bfloat16, as a matrix of the core. Formats but int8 are those of
    one dtype.

    `halves`: groups of outputs of its first and its second half take turns, as the core wants gate and up.

    Raises:
        ValueError: the weight is of another dtype or device, or not contiguous.
        NotPackableError: `weight_format` is "packed", and it cannot be.
        MemoryError: it does not fit.
    """
    n, k = weight.shape
    code = FORMAT_CODES[weight_format]
    wanted = {"float32": torch.float32, "int8": weight.dtype}.get(weight_format, torch.bfloat16)
    if weight.dtype != wanted or wanted not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a weight of {weight.dtype} cannot be kept as {weight_format}")
    source = pointer(weight, wanted)

    def write(address: int) -> None:
        status = library.c.s2d_put_matrix(
            source, wanted == torch.bfloat16, n, k, code, halves, threads, address
        )
        if status == _NOT_PACKABLE:
            raise NotPackableError
        if status == _NO_MEMORY:
            raise MemoryError("the native core got no memory")

    layout = f"{weight_format}{'-halves' if halves else ''}-v{library.layout_version}"
    return _kept(weight, layout, int(library.c.s2d_matrix_bytes(n, k, code)), write)


def table(weight: Tensor) -> Memory:
    """The rows of a weight as they are, contiguous float32 or bfloat16 on the CPU."""
    size = weight.numel() * weight.element_size()
    source = pointer(weight, weight.dtype)
    return _kept(weight, "rows", size, lambda address: ctypes.memmove(address, source, size))


def _kept(weight: Tensor, layout: str, size: int, write: Callable[[int], object]) -> Memory:
    """`write` fills zeroed memory of `size` bytes at an address, unless a file holds the same already."""
    if size >= SMALLEST_BYTES and os.environ.get(SHARE_VARIABLE) != "0":
        name = f"{layout} {weight.dtype} {tuple(weight.shape)}"
        digest = hashlib.sha256(name.encode())
        digest.update(weight.view(torch.uint8).numpy().data)
        path = cache_dir() / "blocked" / digest.hexdigest()
        try:
            return _mapped(path, size) or _stored(path, size, write)
        except OSError as error:
            _say_not_shared(path.parent, error.strerror or str(error))
    address, owner = _slabs.take(size)
    write(address)
    return Memory(address, size, False, owner)


def _mapped(path: Path, size: int) -> Memory | None:
    """The file's bytes; None where there is none of this size."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a store that is read only does as well
        os.utime(path)
    return Memory(_address(pages), size, True, pages)


def _stored(path: Path, size: int, write: Callable[[int], object]) -> Memory:
    with mmap.mmap(-1, size) as made:
        write(_address(made))
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())  # before it has its name: a file of the right size is taken to be right
            _give_name(Path(file.name), path, size)
    memory = _mapped(path, size)
    if memory is None:
        raise FileNotFoundError(f"{path} was removed as soon as it was written")
    return memory


def _give_name(file: Path, path: Path, size: int) -> None:
    """Links it to `path`. Of two processes that store the same one is first, and both map what that wrote."""
    with suppress(FileNotFoundError):
        if path.stat().st_size != size:
            path.unlink()  # not ours: cut short or grown by something else
    with suppress(FileExistsError):
        path.hardlink_to(file)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # by another process meanwhile
            if file.stat().st_mtime < oldest:
                file.unlink()


@cache
def _say_not_shared(folder: Path, reason: str) -> None:
    _log.warning("weights are not shared with other processes: %s: %s", folder, reason)


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, dtype=np.uint8).ctypes.data)


class _Slabs:
    """Zeroed private memory in huge pages, which many small matrices share. Freed with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: Callable[[], mmap.mmap | None] = lambda: None
        self._next = self._end = 0

    def take(self, size: int) -> tuple[int, mmap.mmap]:
        """Address of `size` bytes, and what keeps them. Raises MemoryError."""
        size = -(-size // 64) * 64
        if size > _SLAB_BYTES:
            return _huge_pages(size)
        with self._lock:
            pages = self._pages()
            if pages is None or self._next + size > self._end:
                self._next, pages = _huge_pages(_SLAB_BYTES)
                self._pages, self._end = weakref.ref(pages), self._next + _SLAB_BYTES
            address = self._next
            self._next += size
            return address, pages


def _huge_pages(size: int) -> tuple[int, mmap.mmap]:
    try:
        pages = mmap.mmap(-1, size + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes of weights") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return -(-_address(pages) // _HUGE_BYTES) * _HUGE_BYTES, pages


_slabs = _Slabs()
