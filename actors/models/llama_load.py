"""Read the weights of a Llama-family model from a Hugging Face folder, without building its modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.models.runner import ModelInfo

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rope types with one set of frequencies for every length up to the model's own. "dynamic" changes them only
past `max_position_embeddings`, which is never served. "longrope" has two sets and is left to the generic
path."""


class UnsupportedModelError(ValueError):
    """A backend cannot run a model; the message names the model's architecture and the reason."""


def load_config(folder: Path) -> Any:
    """The `transformers` config of a local folder. Raises ValueError when it names no known architecture."""
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def architecture_of(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def context_limit(config: Any, max_model_len: int | None) -> int:
    """Context limit to serve, in tokens. Raises ValueError when `max_model_len` exceeds the model's own."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None:
        if max_model_len is None:
            raise ValueError(f"{architecture_of(config)} states no context limit: set max_model_len")
        return max_model_len
    if max_model_len is not None and max_model_len > own:
        raise ValueError(
            f"max_model_len {max_model_len} exceeds the model's own context limit of {own} tokens"
        )
    return int(own if max_model_len is None else max_model_len)


def llama_unsupported_reason(config: Any, folder: Path, max_model_len: int) -> str | None:
    """Why the lean Llama path cannot run this model up to `max_model_len` tokens; None when it can."""
    if config.model_type not in LLAMA_FAMILY:
        return f"model type {config.model_type!r} is not one of {', '.join(LLAMA_FAMILY)}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    if getattr(config, "mlp_bias", False) or (
        config.model_type in ("llama", "qwen3") and getattr(config, "attention_bias", False)
    ):
        return "its projections have biases"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        return f"rope type {rope.get('rope_type')!r} is not one of {', '.join(STATIC_ROPE)}"
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0) or 1.0) != 1.0:
        return "only part of a head is rotated"
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else config.model_type == "mistral"
    window = getattr(config, "sliding_window", None)
    if slides and window is not None and window < max_model_len:
        return f"its attention window of {window} tokens is shorter than {max_model_len}"
    if (
        not (folder / "model.safetensors").is_file()
        and not (folder / "model.safetensors.index.json").is_file()
    ):
        return "its weights are not in safetensors files"
    return None


def rotary_frequencies(config: Any) -> tuple[Tensor, float]:
    """Inverse frequencies (float32 [head_dim / 2]) with any rope scaling applied, and the factor on cos and
    sin."""
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
        return inv_freq.float(), float(scaling)
    dim = head_dim_of(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class _Checkpoint:
    """Tensors of a folder by name, over one safetensors file or the files that an index lists."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        index = folder / "model.safetensors.index.json"
        self._by_name: dict[str, Any]
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files: dict[str, Any] = {
                file: safe_open(folder / file, framework="pt") for file in sorted(set(names.values()))
            }
            self._by_name = {name: files[file] for name, file in names.items()}
        else:
            handle: Any = safe_open(folder / "model.safetensors", framework="pt")
            self._by_name = dict.fromkeys(handle.keys(), handle)
        self._folder, self._dtype, self._device = folder, dtype, device

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def get(self, *names: str) -> Tensor:
        """The tensors concatenated over their first dimension, in the wanted dtype and on the wanted
        device."""
        missing = [name for name in names if name not in self._by_name]
        if missing:
            raise ValueError(f"{self._folder} holds no tensor {missing[0]!r}")
        parts = [self._by_name[n].get_tensor(n).to(device=self._device, dtype=self._dtype) for n in names]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def load_llama_weights(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str | None = None,
    max_model_len: int | None = None,
    num_layers: int | None = None,
    int8: bool = False,
) -> tuple[LlamaWeights, ModelInfo]:
    """Read a Llama-family folder.

    `num_layers` reads only the first so many decoder layers (what a nested draft needs). `int8` asks the
    runner to quantise (`ModelInfo.int8`). Raises
    `UnsupportedModelError` for every other family, ValueError for an impossible length, depth or folder.
    """
    config = load_config(folder)
    limit = context_limit(config, max_model_len)
    reason = llama_unsupported_reason(config, folder, limit)
    if reason is not None:
        raise UnsupportedModelError(f"{architecture_of(config)} does not run on the Llama path: {reason}")
    depth = config.num_hidden_layers if num_layers is None else num_layers
    if not 1 <= depth <= config.num_hidden_layers:
        raise ValueError(f"num_layers {depth} is not between 1 and the model's {config.num_hidden_layers}")

    tensors = _Checkpoint(folder, dtype, device)
    embed = tensors.get("model.embed_tokens.weight")
    head = tensors.get("lm_head.weight") if "lm_head.weight" in tensors else embed
    if config.tie_word_embeddings and torch.equal(head, embed):
        head = embed  # as transformers: a stored head that differs stands, whatever the configuration says
    inv_freq, scaling = rotary_frequencies(config)
    weights = LlamaWeights(
        embed=embed,
        layers=tuple(_read_layer(tensors, index) for index in range(depth)),
        final_norm=tensors.get("model.norm.weight"),
        head=head,
        inv_freq=inv_freq.to(device),
        attention_scaling=scaling,
        rms_norm_eps=config.rms_norm_eps,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        max_position=config.max_position_embeddings,
    )
    info = ModelInfo(
        name=name or folder.name,
        architecture=architecture_of(config),
        num_layers=depth,
        hidden_size=config.hidden_size,
        num_heads=weights.num_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        vocab_size=weights.head.shape[0],
        max_model_len=limit,
        dtype=dtype,
        device=device,
        int8=int8,
    )
    return weights, info


def _read_layer(tensors: _Checkpoint, index: int) -> LlamaLayerWeights:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."
    biases = [f"{attention}{p}_proj.bias" for p in "qkv"]
    has_norms = f"{attention}q_norm.weight" in tensors
    return LlamaLayerWeights(
        qkv=tensors.get(*(f"{attention}{p}_proj.weight" for p in "qkv")),
        o=tensors.get(f"{attention}o_proj.weight"),
        gate_up=tensors.get(f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
        down=tensors.get(f"{prefix}mlp.down_proj.weight"),
        input_norm=tensors.get(f"{prefix}input_layernorm.weight"),
        post_norm=tensors.get(f"{prefix}post_attention_layernorm.weight"),
        qkv_bias=tensors.get(*biases) if biases[0] in tensors else None,
        q_norm=tensors.get(f"{attention}q_norm.weight") if has_norms else None,
        k_norm=tensors.get(f"{attention}k_norm.weight") if has_norms else None,
    )
