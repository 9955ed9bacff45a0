"""Blocked matrices in files: made once, held in memory once, and never needed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

from actors.models.llama_load import load_llama_weights
from actors.models.native_llama import NativeLlamaRunner
from actors.native import blocked as module
from actors.native.blocked import blocked, keep, table
from actors.native.library import FORMAT_CODES, available, load_library
from actors.native.linear import NativeLinear
from tests.unit.test_native import folders, in_chunks, random_ids  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(not available(), reason="the compiled core is not here")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("S2D_SHARE_WEIGHTS", raising=False)
    return tmp_path / "blocked"


def weight(seed: int = 0, n: int = 512, k: int = 512) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def make(w: Tensor) -> module.Memory:
    (memory,) = keep([blocked(load_library(), w, "float32", 1)])
    return memory


def files(store: Path) -> list[Path]:
    """Those of matrices, without the notes that say where each lies."""
    return sorted(f for f in store.iterdir() if f.suffix != ".at") if store.is_dir() else []


def test_products_are_those_of_private_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), weight(1, 3)
    for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        shared = [NativeLinear(w.to(dtype), int8=int8, threads=2)(x) for _ in range(2)]
        monkeypatch.setenv("S2D_SHARE_WEIGHTS", "0")
        alone = NativeLinear(w.to(dtype), int8=int8, threads=2)(x)
        monkeypatch.delenv("S2D_SHARE_WEIGHTS")
        for product in shared:
            assert torch.equal(product, alone)
    assert len(files(store)) == 3


def test_processes_hold_it_once() -> None:
    here = make(weight())
    script = (
        "import torch\n"
        "from actors.native.blocked import blocked, keep\n"
        "from actors.native.library import load_library\n"
        "w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))\n"
        "(memory,) = keep([blocked(load_library(), w, 'float32', 1)])\n"
        "entry = open('/proc/self/smaps').read().split('/blocked/')[1]\n"
        "print(memory.shared, next(l.split()[1] for l in entry.splitlines() if l.startswith('Pss:')))\n"
    )
    shared, pss_kib = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    assert here.shared
    assert shared == "True"
    assert 0 < int(pss_kib) <= here.size / 1024 / 2 + 4  # each of the two accounts for half


def test_models_that_differ_in_a_matrix_share_the_others(
    store: Path,
    folders: Callable[[str], Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SMALLEST_BYTES", 0)
    weights, info = load_llama_weights(folders("grouped"), torch.bfloat16, torch.device("cpu"))
    base = NativeLlamaRunner(weights, info, 24, threads=1)
    before = files(store)
    changed = replace(weights.layers[0], qkv=weights.layers[0].qkv * 1.5)
    other = replace(weights, layers=(changed, *weights.layers[1:]))
    tuned = NativeLlamaRunner(other, info, 24, threads=1)
    (added,) = set(files(store)) - set(before)
    code = FORMAT_CODES[tuned.weight_format]
    size = load_library().c.s2d_matrix_bytes(*changed.qkv.shape, code)
    assert size <= added.stat().st_size < size + 4096
    assert base.shared_bytes == tuned.shared_bytes > 0
    monkeypatch.setenv("S2D_SHARE_WEIGHTS", "0")
    ids = random_ids(20)
    for runner, source in ((base, weights), (tuned, other)):
        alone = NativeLlamaRunner(source, info, 24, threads=1)
        assert alone.shared_bytes == 0
        assert torch.equal(in_chunks(runner, ids, [20]), in_chunks(alone, ids, [20]))


def test_those_who_store_it_at_once_map_one_file(store: Path) -> None:
    w, together = weight(), Barrier(6)

    def start(_: int) -> module.Memory:
        together.wait(timeout=30)
        return make(w)

    with ThreadPoolExecutor(6) as pool:
        memories = list(pool.map(start, range(6)))
    (file,) = files(store)
    inode = file.stat().st_ino
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [int(line[0].split("-")[0], 16) for line in lines if int(line[4]) == inode]
    assert sorted(m.address for m in memories) == mapped


def test_a_file_cut_short_is_made_anew(store: Path) -> None:
    w, x = weight(), weight(1, 3)
    expected = NativeLinear(w, threads=1)(x)
    (file,) = files(store)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:5000])
    assert torch.equal(NativeLinear(w, threads=1)(x), expected)
    assert file.read_bytes() == whole


def test_without_a_place_for_files_it_is_private_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "file"))
    w = weight()
    assert not make(w).shared
    assert not keep([table(w)])[0].shared
    assert [r.getMessage() for r in caplog.records if "not shared" in r.getMessage()] == [
        f"weights are not shared with other processes: {tmp_path}/file/blocked: Not a directory"
    ]


def test_small_ones_have_no_file(store: Path) -> None:
    assert not make(weight(n=64, k=64)).shared
    assert files(store) == []


def test_files_that_nobody_uses_are_removed(store: Path) -> None:
    make(weight(0))
    (used,) = files(store)
    make(weight(1))
    (unused,) = set(files(store)) - {used}
    long_ago = time.time() - (module.UNUSED_DAYS + 1) * 86400
    for file in (used, unused):
        os.utime(file, (long_ago, long_ago))
    make(weight(0))
    make(weight(2))
    assert used in files(store)
    assert unused not in files(store)


def test_weights_must_be_of_the_format() -> None:
    library = load_library()
    with pytest.raises(ValueError, match="float32 cannot be kept as bfloat16"):
        blocked(library, weight(), "bfloat16", 1)
    with pytest.raises(ValueError, match="float16 cannot be kept as int8"):
        blocked(library, weight().half(), "int8", 1)


def test_private_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2D_SHARE_WEIGHTS", "0")
    memories = [make(weight(seed, n=48, k=33)) for seed in range(4)]
    assert all(memory.address % 64 == 0 for memory in memories)
    ends = sorted((m.address, m.address + m.size) for m in memories)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    alive = weakref.ref(memories[-1].owner)
    del memories
    gc.collect()
    assert alive() is None
