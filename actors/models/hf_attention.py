"""Our paged attention as an attention function of transformers, how it learns windows from the model's masks,
and what it needs the model to keep still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.models.attention import AttentionOptions, AttentionPlan, attend
from actors.models.llama_load import UnsupportedModelError
from actors.models.runner import BLOCK_SIZE

ATTENTION_NAME = "s2d_paged"
WINDOWS_NAME = "s2d_windows"
REFUSED_ARGUMENTS = ("position_bias", "indices", "block_indices", "head_mask")
LONGEST_WINDOW = 1 << 20
"""Masks are looked at this far: a longer window is none."""


@dataclass(slots=True)
class PagedPass:
    """One forward pass, handed to every attention layer as the keyword `s2d_pass`.

    pools: (keys, values) by layer, [num_blocks, BLOCK_SIZE, kv_heads, D]; a layer seen for the first time
    gets its own, of the shape it shows (`kv_shapes`: kv_heads, D of keys, D of values). windows: attention
    windows by layer, None for a layer that sees everything before it.
    """

    plan: AttentionPlan
    num_blocks: int
    pools: dict[int, tuple[Tensor, Tensor]]
    windows: dict[int, int | None]
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
    layer, s2d_pass = _called_by(module, s2d_pass)
    if attention_mask is not None:
        raise ValueError("it builds its own attention mask")
    refused = [name for name in REFUSED_ARGUMENTS if kwargs.get(name) is not None]
    if refused or kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"its attention needs {', '.join(refused) or 'bidirectional context'}")
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
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=s2d_pass.windows[layer],
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux", kwargs.get("sinks")),
    )
    return attend(s2d_pass.plan, query[0].transpose(0, 1), keys, values, options).unsqueeze(0), None


def _note_window(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    s2d_pass: PagedPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under `WINDOWS_NAME`: notes the window that stands in place of the mask; returns zeros."""
    layer, s2d_pass = _called_by(module, s2d_pass)
    if attention_mask is not None and attention_mask.dtype != torch.int64:
        raise ValueError("it builds its own attention mask")
    s2d_pass.windows[layer] = None if attention_mask is None else int(attention_mask.flatten()[0]) or None
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _window_of_mask(*, mask_function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
    """transformers' mask interface under `WINDOWS_NAME`: int64 [1, 1, 1, 1], the mask's window, 0 for none.
    Raises ValueError for a mask that is not causal with a window."""
    keys = torch.arange(LONGEST_WINDOW)
    window = int(mask_function(0, 0, keys[-1], keys).sum())
    for query in (keys[-1], keys[-2], keys[LONGEST_WINDOW // 3]):
        seen = mask_function(0, 0, query, keys)
        if not torch.equal(seen, (keys <= query) & (keys > query - window)):
            raise ValueError("its attention is bidirectional, or hides more than a sliding window does")
    return torch.tensor(window % LONGEST_WINDOW).view(1, 1, 1, 1)


def _called_by(module: nn.Module, s2d_pass: PagedPass | None) -> tuple[int, PagedPass]:
    layer = getattr(module, "layer_idx", None)
    if s2d_pass is None:
        raise ValueError("its layers do not hand keyword arguments down to attention")
    if layer is None:
        raise ValueError("its attention layers are not numbered")
    return int(layer), s2d_pass


def register_attention() -> None:
    """Make `ATTENTION_NAME` and `WINDOWS_NAME` known to transformers.

    A pass under `WINDOWS_NAME` computes nothing: it fills `PagedPass.windows` with what the model's own masks
    let each layer see. Some models tell attention of a window too, others do not (PhiMoE), and a probe is too
    short to show one.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionInterface.register(WINDOWS_NAME, _note_window)
    AttentionMaskInterface.register(WINDOWS_NAME, _window_of_mask)


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Give every rotary embedding one set of frequencies, whatever is in the batch.

    transformers picks LongRoPE's long or short factors by the longest position of a call, so that a row would
    depend on its neighbours, and cached keys would be turned by other factors than new ones. As in other
    servers, the served context limit decides: long factors when it exceeds the original training length.
    "dynamic" scaling starts beyond the model's limit, which is never served.

    Raises `UnsupportedModelError` for a rotary embedding that does not keep to it.
    """
    name = type(model).__name__
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict) and "longrope" in rope_type.values():
            raise UnsupportedModelError(f"{name} is not supported: LongRoPE in some layers only")
        if rope_type != "longrope":
            continue
        rotary: Any = module
        rotary.rope_type = "default"
        original = rotary.config.rope_parameters["original_max_position_embeddings"]
        if max_model_len <= original:
            continue
        near, far = original - 1, max_model_len - 1
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](
            rotary.config, device=rotary.inv_freq.device, seq_len=max_model_len
        )
        differ, turned = not torch.equal(rotary.inv_freq, long), _turned(rotary, far)
        rotary.inv_freq.copy_(long)
        ignored = differ and torch.equal(_turned(rotary, far), turned)
        if ignored or not torch.allclose(_turned(rotary, near), _turned(rotary, near, far), atol=1e-5):
            raise UnsupportedModelError(
                f"{name} is not supported beyond {original} tokens: its LongRoPE cannot be kept to the long "
                f"factors; set max_model_len"
            )


def _turned(rotary: Any, *positions: int) -> Tensor:
    """What a rotary embedding gives the first of the positions of a call."""
    device = rotary.inv_freq.device
    given = rotary(torch.zeros(1, device=device), torch.tensor([positions], device=device))
    turned: Tensor = given[0] if isinstance(given, tuple) else given
    return turned[0, 0]
