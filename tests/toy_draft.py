"""A small model folder with a tokenizer and a chat template, and drafts for it with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.models.draft_artifact import DraftWeights, save_artifact
from actors.models.draft_card import DraftCard, StatesCard, StorageName, base_hash
from actors.models.llama_load import load_llama_weights
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.text.tokenizer import TextTokenizer
from tests.exactness.harness import tiny_llama
from tests.toy import toy_tokenizer

TOY_VOCAB = 320
STATE_WIDTH = 24
TOY_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def toy_base(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    tokenizer_vocab: int = TOY_VOCAB,
    learnable: bool = False,
    end_boost: float = 1.0,
) -> Path:
    """`learnable`: what comes next follows mostly from the current token, but not before the last layer has
    run, so that an early exit has something to learn and little to begin with. `end_boost` scales the head's
    row of `<end>`, for a model that ends its turns."""
    tiny_llama(folder, seed=seed, layers=layers, vocab=TOY_VOCAB)
    tensors = load_file(folder / "model.safetensors")
    for index in range(layers if learnable else 0):
        tensors[f"model.layers.{index}.self_attn.o_proj.weight"] *= 0.1
        tensors[f"model.layers.{index}.mlp.down_proj.weight"] *= 10.0 if index == layers - 1 else 1.0
    tensors["lm_head.weight"][1] *= end_boost
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer = toy_tokenizer(tokenizer_vocab)
    tokenizer.chat_template = TOY_CHAT
    tokenizer.save_pretrained(folder)
    return folder


def base_weights(folder: Path) -> LlamaWeights:
    return load_llama_weights(folder, torch.float32, torch.device("cpu"))[0]


def toy_draft(
    path: Path,
    base: Path,
    *,
    exits: tuple[int, ...] = (1, 2),
    exit_layers: bool = False,
    exit_norms: bool = False,
    draft_vocab: int = 100,
    window: int | None = None,
    dtype: StorageName = "bfloat16",
    reads_states: bool = False,
    **card: object,
) -> tuple[DraftCard, DraftWeights]:
    """Write an artifact near the base's own first layers; returns what was written."""
    weights = base_weights(base)
    hidden = weights.embed.shape[1]
    generator = torch.Generator().manual_seed(1)

    def near(tensor: Tensor) -> Tensor:
        # bfloat16 values, so that storing them changes nothing.
        return (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).bfloat16().float()

    def layer(index: int) -> LlamaLayerWeights:
        source = weights.layers[index]
        return replace(
            source,
            qkv=near(source.qkv),
            o=near(source.o),
            gate_up=near(source.gate_up),
            down=near(source.down),
            input_norm=near(source.input_norm),
            post_norm=near(source.post_norm),
        )

    ids = torch.randperm(TOY_VOCAB, generator=generator)[:draft_vocab].sort().values
    made = DraftWeights(
        layers=tuple(layer(i) for i in range(exits[-1])),
        exit_layers=tuple(layer(-1) for _ in exits) if exit_layers else (),
        norms=near(torch.ones(len(exits) if exit_norms else 1, hidden)),
        head=near(weights.head[ids]),
        head_ids=ids,
        state_in=0.3 * torch.randn(hidden, STATE_WIDTH, generator=generator).bfloat16()
        if reads_states
        else None,
    )
    fields: dict[str, object] = {
        "base": "toy",
        "base_hash": base_hash(weights),
        "tokenizer_hash": TextTokenizer(base).vocab_hash,
        "vocab_size": TOY_VOCAB,
        "hidden_size": hidden,
        "exits": exits,
        "exit_layers": exit_layers,
        "exit_norms": exit_norms,
        "draft_vocab": draft_vocab,
        "window": window,
        "dtype": dtype,
        "states": StatesCard(model="toy", source_hash="f00d", width=STATE_WIDTH) if reads_states else None,
    }
    made_card = DraftCard.model_validate({**fields, **card})
    save_artifact(path, made_card, made)
    return made_card, made
