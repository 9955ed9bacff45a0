"""Matrices in the core's blocked layout (actors/native/kernels.h): made here, and shared by processes.

Matrices are stored in files, which processes map, and found by what they were made from. So replicas of a
model, models that share a base (a LoRA adapter changes some matrices and leaves the others) and a draft
worker that uses its target's head have them in memory once, in the system's page cache, and the next start
makes nothing anew. Where there is no room for files, they lie in memory of this process.

Matrices that are made together go to one file: a large one is mapped in huge pages, where the system has them
for files, and read a tenth faster than many small ones. Beside it a note by the key of each matrix says where
it lies.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.cache import cache_dir
from actors.files import complete_or_absent
from actors.native.library import (
    FORMAT_CODES,
    NO_MEMORY,
    NOT_PACKABLE,
    NativeLibrary,
    WeightFormat,
    pointer,
)

SHARE_VARIABLE = "S2D_SHARE_WEIGHTS"
"""Environment variable: "0" keeps weights in memory of their process."""
SMALLEST_BYTES = 128 << 10
"""Smaller matrices are not worth a place in a file."""
UNUSED_DAYS = 30
"""A file that no start has used for so long is removed when another one is written."""

_NOTE = ".at"
_PAGE = 4096
_SLAB_BYTES = 64 << 20
_HUGE_BYTES = 2 << 20
_WRITTEN_BYTES = 32 << 20
"""At a time: what is written together lies together in the page cache, in pages as large as that allows."""
_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
"""None on other systems than Linux."""
_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, which `mmap` does not name."""
_libc = ctypes.CDLL(None)
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A weight in some layout: `write` fills zeroed memory of `size` bytes at an address."""

    weight: Tensor
    layout: str
    size: int
    write: Callable[[int], object]

    def key(self) -> str:
        """Equal for equal rows in the same layout."""
        digest = hashlib.sha256(f"{self.layout} {self.weight.dtype} {tuple(self.weight.shape)}".encode())
        digest.update(self.weight.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def blocked(
    library: NativeLibrary, weight: Tensor, weight_format: WeightFormat, threads: int, *, halves: bool = False
) -> Wanted:
    """A weight [N, K], contiguous float32 or bfloat16, as a matrix of the core. Formats but int8 are those of
    one dtype. `halves`: groups of outputs of its first and its second half take turns, as the core wants gate
    and up.

    Raises ValueError for a weight of another dtype or device, or one that is not contiguous.
    """
    n, k = weight.shape
    code = FORMAT_CODES[weight_format]
    dtype = {"float32": torch.float32, "int8": weight.dtype}.get(weight_format, torch.bfloat16)
    if weight.dtype != dtype or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a weight of {weight.dtype} cannot be kept as {weight_format}")
    source = pointer(weight, dtype)

    def write(address: int) -> None:
        bf16 = dtype == torch.bfloat16
        status = library.c.s2d_put_matrix(source, bf16, n, k, code, halves, threads, address)
        if status == NOT_PACKABLE:
            raise NotPackableError
        if status == NO_MEMORY:
            raise MemoryError("the native core got no memory")

    layout = f"{weight_format}{'-halves' if halves else ''}-v{library.layout_version}"
    return Wanted(weight, layout, int(library.c.s2d_matrix_bytes(n, k, code)), write)


def table(weight: Tensor) -> Wanted:
    """The rows of a weight as they are, contiguous float32 or bfloat16 on the CPU."""
    size = weight.numel() * weight.element_size()
    source = pointer(weight, weight.dtype)
    return Wanted(weight, "rows", size, lambda address: ctypes.memmove(address, source, size))


def keep(wanted: Sequence[Wanted]) -> list[Memory]:
    """Memory of each, found in files or made.

    Raises:
        NotPackableError: a weight is to be "packed", and cannot be.
        MemoryError: they do not fit.
    """
    found: dict[int, Memory] = {}
    if os.environ.get(SHARE_VARIABLE) != "0":
        folder = cache_dir() / "blocked"
        keys = {place: w.key() for place, w in enumerate(wanted) if w.size >= SMALLEST_BYTES}
        files = _Files(folder)
        try:
            found = _found(files, wanted, keys)
            if missing := [place for place in keys if place not in found]:
                _store(folder, [(keys[place], wanted[place]) for place in missing])
                found |= _found(files, wanted, {place: keys[place] for place in missing})
        except OSError as error:
            _say_not_shared(folder, error.strerror or str(error))
    return [found[place] if place in found else _private(w) for place, w in enumerate(wanted)]


class _Files:
    """The store's files, each mapped once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[str, mmap.mmap] = {}

    def find(self, key: str, size: int) -> Memory | None:
        """None where no file holds it, or one that was cut short."""
        note = self._folder / (key + _NOTE)
        try:
            name, offset, noted = note.read_text("ascii").split()
            start, held = int(offset), int(noted)
            pages = self._mapped.get(name) or self._map(name)
        except (FileNotFoundError, ValueError):
            return None
        if held != size or start + size > len(pages):
            return None
        _touch(note)
        return Memory(_address(pages) + start, size, True, pages)

    def _map(self, name: str) -> mmap.mmap:
        path = self._folder / name
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        if _HUGE_PAGES is not None:
            # Not by `mmap.madvise`, which keeps the interpreter's lock while the file is read. A kernel that
            # knows neither gives small pages, when they are needed.
            for advice in (_HUGE_PAGES, _POPULATE_READ):
                _libc.madvise(ctypes.c_void_p(_address(pages)), ctypes.c_size_t(len(pages)), advice)
        _touch(path)
        self._mapped[name] = pages
        return pages


def _found(files: _Files, wanted: Sequence[Wanted], keys: dict[int, str]) -> dict[int, Memory]:
    found = ((place, files.find(key, wanted[place].size)) for place, key in keys.items())
    return {place: memory for place, memory in found if memory is not None}


def _store(folder: Path, made: Sequence[tuple[str, Wanted]]) -> None:
    """One file of all, named after their keys, and their notes. Two processes that store the same write the
    same: the first file with the name stays, and both map that."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unused(folder)
    name = hashlib.sha256(" ".join(key for key, _ in made).encode()).hexdigest()
    places: dict[str, int] = {}
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", buffering=_WRITTEN_BYTES) as file:
        for key, wanted in made:
            if key in places:
                continue
            places[key] = file.tell()
            with mmap.mmap(-1, -(-wanted.size // _PAGE) * _PAGE) as pages:
                wanted.write(_address(pages))
                file.write(pages)
        file.flush()
        os.fsync(file.fileno())  # before it has its name: a file that is long enough is taken to be right
        _give_name(Path(file.name), folder / name)
    for key, wanted in made:
        with complete_or_absent(folder / (key + _NOTE)) as partial:
            partial.write_text(f"{name} {places[key]} {wanted.size}", "ascii")


def _give_name(file: Path, path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.stat().st_size != file.stat().st_size:
            path.unlink()  # cut short by something else
    with suppress(FileExistsError):
        path.hardlink_to(file)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # by another process meanwhile
            if file.stat().st_mtime < oldest:
                file.unlink()


def _touch(path: Path) -> None:
    with suppress(OSError):  # a store that is read only does as well
        os.utime(path)


def _private(wanted: Wanted) -> Memory:
    address, owner = _slabs.take(wanted.size)
    wanted.write(address)
    return Memory(address, wanted.size, False, owner)


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
    if _HUGE_PAGES is not None:
        pages.madvise(_HUGE_PAGES)
    return -(-_address(pages) // _HUGE_BYTES) * _HUGE_BYTES, pages


_slabs = _Slabs()
