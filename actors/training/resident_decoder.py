"""A Llama-family decoder for generating in bulk: a fixed number of rows, one token each a step, in buffers of
a fixed size. A step asks nothing of the host, so that on a GPU a CUDA graph replays it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.linear import pack
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.training.student import rotate, rotation


class ResidentDecoder:
    """KV of `rows` sequences of `length` tokens, and a step over all of them.

    Attention is a product over the whole of a row's buffer with what lies after the row's token masked: for
    rows of a few hundred tokens that is cheaper than anything that must look lengths up.

    Args:
        weights: in the dtype and on the device to compute with.
    """

    def __init__(self, weights: LlamaWeights, rows: int, length: int) -> None:
        self._weights, self.rows = weights, rows
        self._dtype, device = weights.embed.dtype, weights.embed.device
        shape = (len(weights.layers), rows, weights.num_kv_heads, length, weights.head_dim)
        self._keys = torch.zeros(shape, dtype=self._dtype, device=device)
        self._values = torch.zeros(shape, dtype=self._dtype, device=device)
        self._places = torch.arange(length, device=device)
        # Greedy answers are the largest logit: rounded to bfloat16, close ones would be equal.
        self._head = pack(weights.head, float32_output=True)
        turns = rotation(self._places[None], weights.inv_freq.float(), weights.attention_scaling)
        self._cos, self._sin = (turn[0, 0] for turn in turns)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits, float32 [rows, V], after token `tokens[r]` at `positions[r]` (int64 [rows])
        of row r. What the row holds at later positions is as if it were not there."""
        w = self._weights
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        seen = (self._places <= positions[:, None])[:, None, None]
        seen = seen.expand(-1, w.num_kv_heads, w.num_heads // w.num_kv_heads, -1)
        slots = positions[:, None, None, None].expand(-1, w.num_kv_heads, 1, w.head_dim)
        hidden = F.embedding(tokens, w.embed).float()
        for index, layer in enumerate(w.layers):
            attended = self._attend(layer, index, self._norm(hidden, layer.input_norm), cos, sin, slots, seen)
            hidden = hidden + F.linear(attended, layer.o)
            gate, up = F.linear(self._norm(hidden, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        return self._head(self._norm(hidden, w.final_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.float(), self._weights.rms_norm_eps).to(self._dtype)

    def _attend(
        self,
        layer: LlamaLayerWeights,
        index: int,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """[rows, heads * D] of x [rows, H]. slots: int64 [rows, kv_heads, 1, D]; seen: bool [rows, kv_heads,
        heads / kv_heads, length]."""
        w = self._weights
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(self.rows, -1, w.head_dim)
        q, k, v = torch.split(qkv, [w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q.float(), layer.q_norm), self._norm(k.float(), layer.k_norm)
        q, k = rotate(q.float(), cos, sin).to(self._dtype), rotate(k.float(), cos, sin).to(self._dtype)
        keys, values = self._keys[index], self._values[index]
        keys.scatter_(2, slots, k[:, :, None])
        values.scatter_(2, slots, v[:, :, None])
        # The query heads of a key are the queries of one product.
        grouped = q.view(self.rows, w.num_kv_heads, -1, w.head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen).flatten(1)
