"""The student: the first layers of a Llama-family base as a trainable module, read at every exit.

Its arithmetic is that of `actors.models.torch_llama`, without a cache: whole packed rows, masked so that
sequences in one row do not see one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.models.draft_artifact import DraftWeights
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    eps: float


class StudentLayer(nn.Module):
    """One pre-norm decoder layer with the fused weights of `LlamaLayerWeights`."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor

    def __init__(self, weights: LlamaLayerWeights, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        self._names = [f.name for f in fields(weights) if getattr(weights, f.name) is not None]
        for name in self._names:
            self.register_parameter(name, nn.Parameter(getattr(weights, name).detach().float().clone()))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """hidden: [B, L, H]; cos, sin: [B, 1, L, D]; mask: bool [B, 1, L, L]."""
        hidden = hidden + F.linear(self._attend(self._norm(hidden, "input_norm"), cos, sin, mask), self.o)
        gate, up = F.linear(self._norm(hidden, "post_norm"), self.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.get_parameter(name), self._shape.eps)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        s = self._shape
        qkv = F.linear(x, self.qkv, self.qkv_bias if "qkv_bias" in self._names else None)
        parts = qkv.view(*x.shape[:2], -1, s.dim).transpose(1, 2)
        q, k, v = torch.split(parts, [s.heads, s.kv_heads, s.kv_heads], dim=1)
        if "q_norm" in self._names:
            q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
        q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
        if s.kv_heads != s.heads:
            k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def take(self, weights: LlamaLayerWeights) -> None:
        for name in self._names:
            self.get_parameter(name).copy_(getattr(weights, name))

    def weights(self) -> LlamaLayerWeights:
        return LlamaLayerWeights(**{name: self.get_parameter(name).detach() for name in self._names})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] turned: element d with d + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class SortedStudent(nn.Module):
    """Layers 1 .. n_E of the base, norms and a cut head; the embedding is the base's and does not learn.

    Args:
        base: float32 weights with at least exits[-1] layers, and all of them with `exit_layers`, whose layers
            start as copies of the base's last.
        head_ids: int64 [D], ascending.
        states: width of the target's states that it reads; 0 for none.
    """

    embed: Tensor
    inv_freq: Tensor
    head_ids: Tensor

    def __init__(
        self,
        base: LlamaWeights,
        exits: Sequence[int],
        head_ids: Tensor,
        *,
        exit_layers: bool = False,
        exit_norms: bool = False,
        train_head: bool = True,
        window: int | None = None,
        states: int = 0,
    ) -> None:
        super().__init__()
        shape = Shape(base.num_heads, base.num_kv_heads, base.head_dim, base.rms_norm_eps)
        self.exits, self.window, self._eps = tuple(exits), window, base.rms_norm_eps
        self._scaling = base.attention_scaling
        self.register_buffer("embed", base.embed.detach().float(), persistent=False)
        self.register_buffer("inv_freq", base.inv_freq.float(), persistent=False)
        self.register_buffer("head_ids", head_ids.clone(), persistent=False)
        self.layers = nn.ModuleList(StudentLayer(base.layers[i], shape) for i in range(exits[-1]))
        own = len(self.exits) if exit_layers else 0
        self.exit_layers = nn.ModuleList(StudentLayer(base.layers[-1], shape) for _ in range(own))
        norms = base.final_norm.detach().float().repeat(len(self.exits) if exit_norms else 1, 1)
        self.norms = nn.Parameter(norms)
        head = base.head.detach().float()[head_ids].clone()
        self.head = nn.Parameter(head, requires_grad=train_head)
        # Zero to begin with: a draft that learned without states goes on from what it can.
        self.state_in = nn.Parameter(torch.zeros(base.embed.shape[1], states)) if states else None

    def forward(
        self, ids: Tensor, positions: Tensor, sequence: Tensor, states: Tensor | None = None
    ) -> list[Tensor]:
        """Hidden states at every exit, not normalised, [B, L, H] each.

        ids, positions: int64 [B, L]. sequence: int64 [B, L], which sequence of its row a token belongs to.
        states: [B, L, S], the target's where it emitted a token, zeros for tokens without.
        """
        cos, sin = rotation(positions, self.inv_freq, self._scaling)
        mask = visible(sequence, self.window)
        hidden = F.embedding(ids, self.embed)
        if self.state_in is not None and states is not None:
            hidden = hidden + F.linear(states.to(self.state_in.dtype), self.state_in)
        read: list[Tensor] = []
        for depth, layer in enumerate(self.layers, 1):
            hidden = layer(hidden, cos, sin, mask)
            if depth in self.exits:
                own = self.exit_layers[len(read)] if len(self.exit_layers) else None
                read.append(hidden if own is None else own(hidden, cos, sin, mask))
        return read

    def logits(self, hidden: Tensor, exit_index: int) -> Tensor:
        """float32 [N, D] of hidden [N, H] at one exit, in float32 under autocast too: rounded to bfloat16,
        close ones would be equal, and the first of them the likeliest."""
        normed = self._normed(hidden, exit_index)
        with torch.autocast(normed.device.type, enabled=False):
            return F.linear(normed, self.head)

    def loss_logits(self, hidden: Tensor, exit_index: int) -> Tensor:
        """As `logits`, but in autocast's dtype if it is on: faster, and enough to learn from."""
        return F.linear(self._normed(hidden, exit_index), self.head).float()

    def _normed(self, hidden: Tensor, exit_index: int) -> Tensor:
        norm = self.norms[exit_index if self.norms.shape[0] > 1 else 0]
        return rms_norm(hidden, norm, self._eps)

    @torch.no_grad()
    def take(self, weights: DraftWeights) -> None:
        """Start from another draft's weights: of equal shape, and with the same tokens in the head."""
        layers = zip((*self.layers, *self.exit_layers), (*weights.layers, *weights.exit_layers), strict=True)
        for own, other in layers:
            own.take(other)
        self.norms.copy_(weights.norms)
        self.head.copy_(weights.head)
        if self.state_in is not None and weights.state_in is not None:
            self.state_in.copy_(weights.state_in)

    def draft_weights(self) -> DraftWeights:
        return DraftWeights(
            layers=tuple(layer.weights() for layer in self.layers),  # type: ignore[operator]
            exit_layers=tuple(layer.weights() for layer in self.exit_layers),  # type: ignore[operator]
            norms=self.norms.detach(),
            head=self.head.detach(),
            head_ids=self.head_ids,
            state_in=None if self.state_in is None else self.state_in.detach(),
        )


def rotation(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, 1, L, D] each, of positions [B, L]."""
    angles = positions.float()[:, None, :, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def visible(sequence: Tensor, window: int | None) -> Tensor:
    """bool [B, 1, L, L]: a token sees itself and earlier tokens of its sequence, `window` in all at most."""
    index = torch.arange(sequence.shape[1], device=sequence.device)
    age = index[:, None] - index[None, :]
    seen = (age >= 0) & (age < (window or sequence.shape[1]))
    return (seen & (sequence[:, :, None] == sequence[:, None, :]))[:, None]
