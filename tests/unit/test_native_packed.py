"""bfloat16 weights in 12 bits: which are kept so, and that none is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.models.llama_load import load_llama_weights
from actors.models.native_llama import NativeLlamaRunner
from actors.native.library import load_library
from actors.native.linear import NativeLinear
from tests.unit.test_native import (
    ISAS,
    folders,  # noqa: F401 - a fixture
    in_chunks,
    random_ids,
)

PACKING = [isa for isa in ISAS if load_library(isa).packs]


@pytest.mark.parametrize("isa", PACKING)
@pytest.mark.parametrize("shape", [(576, 960), (1100, 40), (33, 50), (1, 3), (7, 16)])
def test_packed_weights_are_the_weights(isa: str, shape: tuple[int, int]) -> None:
    """Inputs of one 1 among zeros give back every weight, those of rare magnitude too."""
    k, n = shape
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    rare = torch.randperm(n * k, generator=torch.Generator().manual_seed(1))[: n * k // 1500]
    w.view(-1)[rare] *= 1e-12
    w[0, 0] = 0.0
    product = NativeLinear(w, threads=2, isa=isa)
    assert product.format == "packed"
    assert torch.equal(product(torch.eye(k)), w.float().T)


@pytest.mark.parametrize("isa", PACKING)
def test_weights_of_all_magnitudes_are_not_packed(
    isa: str,
    folders: Callable[[str], Path],  # noqa: F811
) -> None:
    w = (torch.randn(32, 64) * 2.0 ** torch.linspace(-100, 100, 64)).bfloat16()
    x = torch.zeros(3, 64)
    x[:, 7] = 1.5
    product = NativeLinear(w, threads=2, isa=isa)
    assert product.format == "bfloat16"
    assert torch.equal(product(x)[2], w[:, 7].float() * 1.5)
    weights, info = load_llama_weights(folders("grouped"), torch.bfloat16, torch.device("cpu"))
    assert NativeLlamaRunner(weights, info, 24, threads=1, isa=isa).weight_format == "packed"
    weights.layers[1].down[:, :] *= (2.0 ** torch.linspace(-60, 60, 176)).bfloat16()
    runner = NativeLlamaRunner(weights, info, 24, threads=1, isa=isa)
    assert runner.weight_format == "bfloat16"
    ids = random_ids(20)
    assert torch.equal(in_chunks(runner, ids, [20]), in_chunks(runner, ids, [3]))
