"""What a draft reads of its target's hidden states: a linear map of them is added to its embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.models.linear import pack
from actors.models.runner import STATE_EPS, StateRow, normalised
from actors.native.library import available
from actors.native.linear import NativeLinear


class StateInput:
    """Args:
    weight: float32 [H, S].
    """

    def __init__(self, weight: Tensor) -> None:
        # On the compiled core where it is: torch would wake threads of its own for a few rows.
        self._product = pack(
            weight, None, "native" if weight.device.type == "cpu" and available() else "plain"
        )

    def __call__(self, rows: Sequence[StateRow]) -> Tensor:
        """float32 [len(rows), H]: the map of each row of states [S], normalised."""
        product = self._product
        if isinstance(product, NativeLinear) and all(states.dtype == torch.float32 for states, _ in rows):
            return product.of_normalised(rows, STATE_EPS)
        return product(normalised(torch.stack([states[row] for states, row in rows])))
