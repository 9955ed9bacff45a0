"""What a draft reads of its target's states: rows that lie apart, normalised and multiplied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from actors.drafting.state_input import StateInput
from actors.models.runner import normalised, state_rows
from actors.native import library
from actors.native.linear import NativeLinear

GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(24, 40, generator=GENERATOR)
PASSES = [torch.randn(n, 40, generator=GENERATOR) for n in (5, 1, 3)]
NAMED = [(PASSES[0], 4), (PASSES[2], 0), (PASSES[0], 1), (PASSES[1], 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_rows_are_those_that_were_named(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("actors.drafting.state_input.available", lambda: False)
    rows = [(states.to(dtype), row) for states, row in NAMED]
    expected = F.linear(normalised(torch.stack([states[row] for states, row in rows])), WEIGHT)
    torch.testing.assert_close(StateInput(WEIGHT)(rows), expected)


def test_all_rows_of_a_pass() -> None:
    torch.testing.assert_close(
        StateInput(WEIGHT)(state_rows(PASSES[0])), F.linear(normalised(PASSES[0]), WEIGHT)
    )


@pytest.mark.skipif(not library.available(), reason="no compiled core")
def test_rows_that_are_not_there_are_refused() -> None:
    product = NativeLinear(WEIGHT)
    for rows in ([(PASSES[0], 5)], [(PASSES[0], -1)], [(torch.zeros(2, 41), 0)], [(torch.zeros(40), 0)]):
        with pytest.raises(ValueError, match="no row"):
            product.of_normalised(rows, 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        product.of_normalised([(torch.zeros(40, 4).t(), 0)], 1e-6)
