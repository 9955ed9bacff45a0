"""How the exits of a trained draft are read: which norm, which layer of their own, which part of the
vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.models.runner import LayeredRunner


@dataclass(frozen=True, slots=True)
class ExitHeads:
    """The default reads every exit through the runner's own final norm and whole head.

    token_ids: int64 [D], ascending: the target's id of each of the head's rows (FR-Spec's cut head); tokens
        not listed are never drafted. None: rows are ids.
    vocab_size: the target's, where `token_ids` is given.
    norms: float32 [E, H], a final norm for each exit; the runner's own must then be ones.
    own_layers: each exit has a layer of its own, which follows the trunk in the runner: exit e's is layer
        `depth of the deepest exit + e`.
    eps: of the norms.
    """

    token_ids: Tensor | None = None
    vocab_size: int = 0
    norms: Tensor | None = None
    own_layers: bool = False
    eps: float = 1e-5

    def logits(self, runner: LayeredRunner, hidden: Tensor, exit_index: int) -> Tensor:
        """float32 [N, D] (or [N, V]) of hidden [N, H], not normalised, at one exit."""
        if self.norms is None:
            return runner.logits(hidden)
        scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + self.eps)
        normed = hidden.float() * scale * self.norms[exit_index]
        # The runner normalises once more, with weight one: undone by the factor that it divided by.
        undo = (normed.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return runner.logits(normed) * undo
