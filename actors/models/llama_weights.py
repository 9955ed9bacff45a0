"""Weights of a Llama-family decoder, fused and named once, for every implementation of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LlamaLayerWeights:
    """One decoder layer. Linear weights are [out, in]. H hidden, I intermediate, D head_dim.

    qkv: [(heads + 2 * kv_heads) * D, H], query rows first, then key, then value rows.
    gate_up: [2 * I, H], gate rows first. o: [H, heads * D]. down: [H, I].
    input_norm, post_norm: [H]. q_norm, k_norm: [D] where the family normalises heads (Qwen3).
    qkv_bias: [(heads + 2 * kv_heads) * D] where the family has one (Qwen2).
    """

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole decoder in one dtype (norms included), on one device.

    embed: [V, H]; head: [V, H], the same storage as embed where tied; final_norm: [H].
    inv_freq: float32 [D / 2], rotary frequencies with any rope scaling applied; attention_scaling multiplies
    cos and sin (1.0 for plain rope). Rotation pairs element d with d + D / 2 (Hugging Face's layout).
    """

    embed: Tensor
    layers: tuple[LlamaLayerWeights, ...]
    final_norm: Tensor
    head: Tensor
    inv_freq: Tensor
    attention_scaling: float
    rms_norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
