"""int8 in the native core: products against float64 and against torch's reference bit for bit, on every
instruction set, and whole passes whose rows keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.models.int8 import PART, UNIT, Int8Product, quantize_by
from actors.models.llama_load import load_llama_weights
from actors.models.native_llama import NativeLlamaRunner
from actors.native.linear import NativeLinear
from tests.unit.test_native import (
    FAMILY,
    ISAS,
    VOCAB,
    folders,  # noqa: F401 - a fixture
    in_chunks,
    make_batch,
    random_ids,
    reference,
)

ROW_COUNTS = (*range(18), 64)
SHAPES = [(576, 960), (1536, 64), (33, 50), (1, 3), (65, 16), (130, 31)]


def native(weight: Tensor, isa: str, bias: Tensor | None = None, threads: int = 2) -> NativeLinear:
    return NativeLinear(weight, bias, int8=True, threads=threads, isa=isa)


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """What quantised operands give without rounding in between: float64."""
    rows, weights = (
        (values.double() * scales.double()).flatten(1)
        for values, scales in (quantize_by(x, PART), quantize_by(w.float(), UNIT))
    )
    return rows @ weights.T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    k, n = shape
    torch.manual_seed(k)
    x, w, bias = torch.randn(67, k), torch.randn(n, k).to(dtype), torch.randn(n)
    product = native(w, isa, bias)
    full = product(x)
    expected = exact_product(x, w) + bias
    size = x.abs().double() @ w.abs().double().T + bias.abs()
    assert ((full.double() - expected).abs() <= 2e-6 * size).all()
    assert ((full.double() - x.double() @ w.double().T - bias).abs() <= 0.02 * size).all()
    assert torch.equal(full, Int8Product(w, bias)(x))
    for m in ROW_COUNTS:
        assert torch.equal(product(x[:m]), full[:m]), m
    assert torch.equal(native(w, isa, bias, threads=3)(x), full)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [3 * UNIT + 8, 3 * UNIT + PART, 24 * UNIT])
def test_integer_sums_are_exact_at_the_extremes(isa: str, k: int) -> None:
    """Nothing but the greatest magnitudes: what saturates, or takes the sign of a byte for a value, shows."""
    signs = torch.randint(0, 2, (24, k), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    w = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs]) * 127
    x = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs[:7]]) * 127
    assert torch.equal(native(w, isa)(x), (x.double() @ w.double().T).float())


@pytest.mark.parametrize("isa", ISAS)
def test_an_outlier_takes_the_precision_of_its_own_part_only(isa: str) -> None:
    x, w = torch.ones(1, 2 * UNIT), torch.zeros(16, 2 * UNIT)
    x[0, 3], x[0, PART:] = 1e4, 0.5
    w[:, PART : PART + 8] = 1.0  # the outlier's unit, another part
    w[:, UNIT + 5] = -1.0
    assert torch.allclose(native(w, isa)(x), torch.tensor(3.5), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 1100), n=st.integers(1, 40), m=st.integers(1, 9), exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_all_instruction_sets_and_torch_give_the_same_bits(
    k: int, n: int, m: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10.0**exponent
    x[torch.rand(m, k, generator=generator) < 0.3] = 0.0
    w = torch.randn(n, k, generator=generator)
    w[0] = 0.0
    expected = Int8Product(w)(x)
    for isa in ISAS:
        assert torch.equal(native(w, isa, threads=1)(x), expected), isa


@pytest.mark.parametrize("isa", ISAS)
def test_values_that_no_integer_holds(isa: str) -> None:
    x, k = torch.zeros(6, 70), 70
    x[1] = 1e-38
    x[2] = 3.0e31  # times an integer sum it still is a float32
    x[3, 5], x[4, 69] = torch.inf, torch.nan
    x[5] = 1.0
    out = native(torch.full((20, k), 1e-3), isa)(x)
    assert (out[:2] == 0).all()  # a row of 1e-38 counts as zeros
    assert (out[2] / (k * 3.0e28) - 1).abs().max() < 1e-5
    assert out[3:5].isnan().all()
    assert (out[5] / (k * 1e-3) - 1).abs().max() < 1e-5


# ---- whole passes --------------------------------------------------------------------------------


def make_runner(
    folder: Path, dtype: torch.dtype = torch.bfloat16, *, isa: str | None = None, threads: int = 2
) -> NativeLlamaRunner:
    weights, info = load_llama_weights(folder, dtype, torch.device("cpu"), int8=True)
    return NativeLlamaRunner(weights, info, 24, threads=threads, isa=isa)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_near_transformers(
    folders: Callable[[str], Path],  # noqa: F811
    name: str,
    dtype: torch.dtype,
) -> None:
    ids = random_ids(80)
    expected = reference(folders(name), ids, dtype)
    runner = make_runner(folders(name), dtype)
    got = in_chunks(runner, ids, [80])
    assert (got - expected).square().mean().sqrt() < 0.08 * expected.std()
    weights, _ = load_llama_weights(folders(name), dtype, torch.device("cpu"))
    assert torch.equal(runner.embed(torch.arange(VOCAB)), weights.embed.float())
    assert runner.info.dtype_name == "int8"


@pytest.mark.parametrize("isa", ISAS)
def test_row_invariance(folders: Callable[[str], Path], isa: str) -> None:  # noqa: F811
    folder, ids, other = folders("grouped"), random_ids(150), random_ids(40, seed=9)
    runner = make_runner(folder, isa=isa)
    whole = in_chunks(runner, ids, [150])
    for m in (1, 2, 5, 8, 9, 16, 64):
        assert torch.equal(in_chunks(runner, ids, [m]), whole), m
    assert torch.equal(in_chunks(runner, ids, [37, 3, 50, 11]), whole)
    for threads in (1, 3):
        assert torch.equal(in_chunks(make_runner(folder, isa=isa, threads=threads), ids, [70]), whole)
    logits = runner.forward(make_batch([(2, other, 0), (0, ids[140:145], 140), (1, ids, 0)]))
    assert torch.equal(logits[40:45], whole[140:145])
    assert torch.equal(logits[45:], whole)
    assert torch.equal(logits[:40], in_chunks(runner, other, [40]))


def test_tree_tokens_equal_their_chains(folders: Callable[[str], Path]) -> None:  # noqa: F811
    runner, ids, nodes = make_runner(folders("grouped")), random_ids(45), random_ids(5, seed=4)
    in_chunks(runner, ids, [45])
    tree = make_batch([(0, nodes, 45)])
    paths = [[0], [0, 1], [0, 2], [0, 2, 3], [4]]
    tree.parents = torch.tensor([-1, 0, 0, 2, -1])
    tree.positions = torch.tensor([45 + len(path) - 1 for path in paths])
    logits = runner.forward(tree)
    for row, path in zip(logits, paths, strict=True):
        chain = torch.cat([ids, nodes[path]])
        assert torch.equal(in_chunks(runner, chain, [45, 1], sequence=1)[-1], row), path
