"""Our paged attention as an attention function of transformers, and what it needs the model to keep still."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.models.attention import AttentionOptions, AttentionPlan, attend
from actors.models.llama_load import UnsupportedModelError
from actors.models.runner import BLOCK_SIZE

ATTENTION_NAME = "s2d_paged"
REFUSED_ARGUMENTS = ("position_bias", "indices", "block_indices", "head_mask")


@dataclass(slots=True)
class PagedPass:
    """One forward pass, handed to every attention layer as the keyword `s2d_pass`.

    pools: (keys, values) by layer, [num_blocks, BLOCK_SIZE, kv_heads, D]; a layer seen for the first time
    gets its own, of the shape it shows (`kv_shapes`: kv_heads, D of keys, D of values). windows: attention
    windows by layer.
    """

    plan: AttentionPlan
    num_blocks: int
    pools: dict[int, tuple[Tensor, Tensor]]
    windows: tuple[int | None, ...]
    called: list[int] = field(default_factory=list)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s2d_pass: PagedPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, D], key and value [1, kv_heads, T, D]; returns
    [1, T, heads, D of value]. Raises ValueError for what the paged pool cannot express."""
    if s2d_pass is None:
        raise ValueError("its layers do not hand keyword arguments down to attention")
    if attention_mask is not None:
        raise ValueError("it builds its own attention mask")
    refused = [name for name in REFUSED_ARGUMENTS if kwargs.get(name) is not None]
    if refused or kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"its attention needs {', '.join(refused) or 'bidirectional context'}")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError("its attention layers are not numbered")
    s2d_pass.called.append(layer)
    if layer not in s2d_pass.pools:
        shape = (s2d_pass.num_blocks, BLOCK_SIZE, key.shape[1])
        s2d_pass.pools[layer] = (
            key.new_zeros(*shape, key.shape[-1]),
            value.new_zeros(*shape, value.shape[-1]),
        )
    keys, values = s2d_pass.pools[layer]
    keys.flatten(0, 1).index_copy_(0, s2d_pass.plan.slots, key[0].transpose(0, 1).to(keys.dtype))
    values.flatten(0, 1).index_copy_(0, s2d_pass.plan.slots, value[0].transpose(0, 1).to(values.dtype))
    window = kwargs.get("sliding_window")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=s2d_pass.windows[layer] if window is None else window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux", kwargs.get("sinks")),
    )
    return attend(s2d_pass.plan, query[0].transpose(0, 1), keys, values, options).unsqueeze(0), None


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Give every rotary embedding one set of frequencies, whatever is in the batch.

    transformers picks LongRoPE's long or short factors by the longest position of a call, so that a row would
    depend on its neighbours, and cached keys would be turned by other factors than new ones. As in other
    servers, the served context limit decides: long factors when it exceeds the original training length.
    "dynamic" scaling starts beyond the model's limit, which is never served.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict) and "longrope" in rope_type.values():
            raise UnsupportedModelError(
                f"{type(model).__name__} is not supported: LongRoPE in some layers only"
            )
        if rope_type != "longrope":
            continue
        rotary: Any = module
        original = rotary.config.rope_parameters["original_max_position_embeddings"]
        if max_model_len > original:
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](
                rotary.config, device=rotary.inv_freq.device, seq_len=original + 1
            )
            rotary.inv_freq.copy_(long)
        rotary.rope_type = "default"
