"""A lean forward pass of Llama-family models in plain torch, for CPU and CUDA.

The residual stream, norms, rotation and logits are float32; products and the KV pool use the weights' dtype
(on a CPU without bfloat16 arithmetic, products use float32 copies, see `actors.models.linear`). int8 weights
are quantised at construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.attention import AttentionOptions, AttentionPlan, attend, plan_attention
from actors.models.linear import MatrixProduct, ProductKind, can_prepack, choose_kind, pack
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.models.runner import BLOCK_SIZE, ModelInfo, RaggedBatch


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: MatrixProduct
    o: MatrixProduct
    gate_up: MatrixProduct
    down: MatrixProduct
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all layers of one pass share. cos: [T, 1, 1, D / 2]; sin: [T, 1, 2, D / 2], its first half
    negated."""

    plan: AttentionPlan
    cos: Tensor
    sin: Tensor


class TorchLlamaRunner:
    """`LayeredRunner` over `LlamaWeights`.

    Weights are packed at construction; the runner keeps only the packed copies and the embedding, so dropping
    the `LlamaWeights` afterwards frees what packing copied. `threads` is the intra-op thread count it is
    meant to run with (process-wide in torch, set by the loader). With `window`, a token sees the last so many
    tokens, itself included (drafts trained that way).
    """

    row_invariant = False
    """Products are where oneDNN packs them; attention is not: its reductions follow the longest context."""
    supports_trees = True

    def __init__(
        self,
        weights: LlamaWeights,
        info: ModelInfo,
        num_blocks: int,
        threads: int = 0,
        *,
        window: int | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError("num_blocks must be at least 1")
        self._info, self._num_blocks, self.threads = info, num_blocks, threads
        self._weights_dtype = weights.embed.dtype
        self._heads, self._kv_heads, self._dim = weights.num_heads, weights.num_kv_heads, weights.head_dim
        self._eps = weights.rms_norm_eps
        self._embed = weights.embed
        self._final_norm = weights.final_norm.float()
        self._inv_freq, self._rope_scaling = weights.inv_freq.float(), weights.attention_scaling
        parameters = _count(weights)
        self._layers = tuple(self._pack_layer(layer, parameters) for layer in weights.layers)
        head_kind: ProductKind = "int8" if info.int8 else "auto"
        self._head = pack(weights.head, None, head_kind, parameters=parameters, float32_output=True)
        # bfloat16 products on a CPU without the instructions are emulated: attend in float32 there.
        wide = info.device.type == "cpu" and not can_prepack(info.dtype)
        self._attention_dtype = torch.float32 if wide else info.dtype
        shape = (len(weights.layers), num_blocks, BLOCK_SIZE, self._kv_heads, self._dim)
        self._keys = torch.zeros(shape, dtype=info.dtype, device=info.device)
        self._values = torch.zeros(shape, dtype=info.dtype, device=info.device)
        self._options = AttentionOptions(scale=self._dim**-0.5, window=window)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def _pack_layer(self, layer: LlamaLayerWeights, parameters: int) -> _Layer:
        kind: ProductKind = (
            "int8"
            if self._info.int8
            else choose_kind(layer.qkv.dtype, layer.qkv.device, parameters=parameters)
        )
        return _Layer(
            qkv=pack(layer.qkv, layer.qkv_bias, kind),
            o=pack(layer.o, None, kind),
            gate_up=pack(layer.gate_up, None, kind),
            down=pack(layer.down, None, kind),
            input_norm=layer.input_norm.float(),
            post_norm=layer.post_norm.float(),
            q_norm=None if layer.q_norm is None else layer.q_norm.float(),
            k_norm=None if layer.k_norm is None else layer.k_norm.float(),
        )

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """float32 [T, H]."""
        return F.embedding(token_ids.to(self._info.device), self._embed).float()

    @torch.no_grad()
    def run_layers(self, hidden: Tensor, first: int, last: int, batch: RaggedBatch) -> Tensor:
        """Run layers first..last-1 on hidden [T, H] (left as it is), writing their KV; float32 [T, H]."""
        if not 0 <= first <= last <= len(self._layers):
            raise ValueError(f"layers {first}..{last} are not within 0..{len(self._layers)}")
        shared = self._prepare(batch)
        hidden = hidden.to(self._info.device, torch.float32, copy=True)
        for index in range(first, last):
            self._run_layer(self._layers[index], index, hidden, shared)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: float32 [N, V]."""
        return self._head(self._norm(hidden, self._final_norm)).float()

    @torch.no_grad()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """Write the batch's KV, return float32 logits [N, V] of `logit_rows`."""
        return self.forward_with_states(batch)[1]

    @torch.no_grad()
    def forward_with_states(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """See `LayeredRunner`."""
        hidden = self.run_layers(self.embed(batch.token_ids), 0, len(self._layers), batch)
        states = hidden[batch.logit_rows.to(hidden.device)]
        return states, self.logits(states)

    @torch.no_grad()
    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy KV slots in every layer; all sources are read before any target is written."""
        source, target = source.to(self._info.device), target.to(self._info.device)
        for pool in (self._keys, self._values):
            flat = pool.view(pool.shape[0], -1, self._kv_heads, self._dim)
            flat[:, target] = flat[:, source]

    def _prepare(self, batch: RaggedBatch) -> _Pass:
        device = self._info.device
        angles = batch.positions.to(device).float()[:, None] * self._inv_freq
        cos = angles.cos().mul_(self._rope_scaling)
        sin = angles.sin().mul_(self._rope_scaling)
        return _Pass(
            plan=plan_attention(batch, device),
            cos=cos[:, None, None, :],
            sin=torch.stack((-sin, sin), dim=1)[:, None],
        )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _run_layer(self, layer: _Layer, index: int, hidden: Tensor, shared: _Pass) -> None:
        """One pre-norm decoder layer, added to hidden in place."""
        attended = self._attention(layer, index, self._norm(hidden, layer.input_norm), shared)
        hidden.add_(layer.o(attended))
        gate, up = layer.gate_up(self._norm(hidden, layer.post_norm)).chunk(2, dim=-1)
        hidden.add_(layer.down(F.silu(gate).mul_(up)))

    def _attention(self, layer: _Layer, index: int, x: Tensor, shared: _Pass) -> Tensor:
        rotated = self._heads + self._kv_heads
        qkv = layer.qkv(x).view(x.shape[0], rotated + self._kv_heads, self._dim)
        qk = qkv[:, :rotated].float()
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[:, : self._heads], qk[:, self._heads :]
            qk = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)), dim=1)
        # Element d turns with d + D / 2: as halves (a, b), out = (a, b) * cos + (b, a) * (-sin, sin).
        halves = qk.reshape(x.shape[0], rotated, 2, self._dim // 2)
        turned = torch.addcmul(halves * shared.cos, halves.flip(2), shared.sin).view(
            x.shape[0], rotated, self._dim
        )
        keys, values = self._keys[index], self._values[index]
        flat = (-1, self._kv_heads, self._dim)
        keys.view(flat).index_copy_(0, shared.plan.slots, turned[:, self._heads :].to(keys.dtype))
        values.view(flat).index_copy_(0, shared.plan.slots, qkv[:, rotated:].to(values.dtype))
        query = turned[:, : self._heads].to(self._attention_dtype)
        return attend(shared.plan, query, keys, values, self._options).flatten(1)


def _count(weights: LlamaWeights) -> int:
    matrices = sum(w.qkv.numel() + w.o.numel() + w.gate_up.numel() + w.down.numel() for w in weights.layers)
    return matrices + weights.head.numel()
