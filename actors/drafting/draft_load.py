"""From a base model and, mostly, a trained artifact to something that drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.drafting.exit_heads import ExitHeads
from actors.models.convert import model_folder
from actors.models.draft_artifact import DraftWeights, load_artifact, resolve_artifact
from actors.models.draft_card import ArtifactError, DraftCard, ExitCalibration, base_hash
from actors.models.llama_load import load_config, load_llama_weights
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.models.load import (
    DTypeName,
    build_llama_runner,
    choose_device,
    load_runner,
    native_unavailable_reason,
)
from actors.models.runner import DraftingRunner, LayeredRunner, ModelInfo, RaggedBatch
from actors.models.source import resolve_source
from actors.models.threads import physical_cores
from actors.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A target shares the hash of `tokenizer`, or is re-tokenised for. `vocab_size` includes padding. `card`
    is None without an artifact. `state_in`: float32 [H, S], None for a draft that reads no states."""

    runner: LayeredRunner
    exits: tuple[int, ...]
    heads: ExitHeads
    vocab_size: int
    tokenizer: TextTokenizer
    card: DraftCard | None
    state_in: Tensor | None = None

    def state_in_for(self, source_hash: str) -> Tensor | None:
        """What reads the states of the target with this hash; None for another than the draft has learned."""
        states = None if self.card is None else self.card.states
        return self.state_in if states is not None and states.source_hash == source_hash else None

    @property
    def window(self) -> int | None:
        """The attention window that the draft was trained with."""
        return None if self.card is None else self.card.window

    @property
    def calibration(self) -> tuple[ExitCalibration, ...]:
        return () if self.card is None else self.card.calibration


class BorrowedEmbedding:
    """A `LayeredRunner` over another whose head is cut: the embedding is the base's, with all its rows."""

    def __init__(self, inner: LayeredRunner, embed: Tensor) -> None:
        self._inner, self._embed = inner, embed
        self.row_invariant, self.supports_trees = inner.row_invariant, inner.supports_trees

    @property
    def info(self) -> ModelInfo:
        return self._inner.info

    @property
    def num_blocks(self) -> int:
        return self._inner.num_blocks

    def embed(self, token_ids: Tensor) -> Tensor:
        """float32 [T, H]. Raises IndexError for an id outside the base's vocabulary."""
        return F.embedding(token_ids.to(self._embed.device), self._embed).float()

    def run_layers(self, hidden: Tensor, first: int, last: int, batch: RaggedBatch) -> Tensor:
        return self._inner.run_layers(hidden, first, last, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, D]: rows of the cut head."""
        return self._inner.logits(hidden)

    def forward(self, batch: RaggedBatch) -> Tensor:
        return self.forward_with_states(batch)[1]

    def forward_with_states(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        hidden = self.run_layers(self.embed(batch.token_ids), 0, self.info.num_layers, batch)
        states = hidden[batch.logit_rows.to(hidden.device)]
        return states, self.logits(states)

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        self._inner.copy_slots(source, target)


def load_draft(
    source: str,
    artifact: str | None = None,
    *,
    exits: Sequence[int] | None = None,
    dtype: DTypeName = "bfloat16",
    kv_blocks: int = 512,
    threads: int = 0,
    device: str = "auto",
) -> LoadedDraft:
    """Load the first layers of `source`, or the draft that `artifact` trained from it.

    The compiled core runs it where it can, torch elsewhere and with an attention window.

    Raises ArtifactError for an artifact that is broken or does not belong to `source` (another base or
    tokenizer, an exit that either does not have), ValueError for what `load_runner` refuses.
    """
    if artifact is None:
        if exits is None:
            raise ValueError("exits are required without an artifact")
        loaded = load_runner(
            source, dtype=dtype, kv_blocks=kv_blocks, threads=threads, num_layers=exits[-1], device=device
        )
        # num_layers is served by the runners that can run layers in ranges only.
        runner = cast("LayeredRunner", loaded.runner)
        tokenizer = TextTokenizer(loaded.tokenizer_folder)
        return LoadedDraft(runner, tuple(exits), ExitHeads(), loaded.info.vocab_size, tokenizer, None)
    path = resolve_artifact(artifact)
    folder = model_folder(resolve_source(source))
    return _load_trained(path, folder, exits, dtype, kv_blocks, threads, choose_device(device, dtype))


def _load_trained(
    path: Path,
    folder: Path,
    exits: Sequence[int] | None,
    dtype: DTypeName,
    kv_blocks: int,
    threads: int,
    device: torch.device,
) -> LoadedDraft:
    kept = torch.float32 if dtype == "float32" else torch.bfloat16
    card, draft = load_artifact(path, kept, exits)
    base, info = load_llama_weights(folder, kept, device, num_layers=1, int8=dtype == "int8")
    tokenizer = TextTokenizer(folder)
    check_base(path, card, base, info.name, load_config(folder).num_hidden_layers, tokenizer.vocab_hash)
    runner = _build_runner(card, draft, base, info, kv_blocks, threads or physical_cores())
    heads = ExitHeads(
        token_ids=draft.head_ids.to(device),
        vocab_size=card.vocab_size,
        norms=draft.norms.float().to(device) if card.exit_norms else None,
        own_layers=card.exit_layers,
        eps=base.rms_norm_eps,
    )
    state_in = None if draft.state_in is None else draft.state_in.float().to(device)
    if not isinstance(runner, DraftingRunner):  # which has the base's rows already
        runner = BorrowedEmbedding(runner, base.embed)
    return LoadedDraft(runner, card.exits, heads, card.vocab_size, tokenizer, card, state_in)


def check_base(
    path: Path, card: DraftCard, base: LlamaWeights, name: str, base_layers: int, tokenizer_hash: str
) -> None:
    """Raises ArtifactError, naming both sides, unless the artifact was made from this base."""
    if card.tokenizer_hash != tokenizer_hash:
        raise ArtifactError(
            f"{path} was trained for the tokenizer {card.tokenizer_hash[:12]} of {card.base}, "
            f"{name} has the tokenizer {tokenizer_hash[:12]}"
        )
    if card.exits[-1] > base_layers:
        raise ArtifactError(f"{path} has an exit at layer {card.exits[-1]}, {name} has {base_layers} layers")
    if (card.vocab_size, card.hidden_size) != (base.embed.shape[0], base.embed.shape[1]):
        raise ArtifactError(
            f"{path} was trained for {card.base}: {card.vocab_size} tokens, hidden size {card.hidden_size}; "
            f"{name} has {base.embed.shape[0]} tokens, hidden size {base.embed.shape[1]}"
        )
    actual = base_hash(base)
    if card.base_hash != actual:
        raise ArtifactError(
            f"{path} was made for another base: {card.base} ({card.base_hash[:12]}), "
            f"not {name} ({actual[:12]})"
        )


def _build_runner(
    card: DraftCard, draft: DraftWeights, base: LlamaWeights, info: ModelInfo, kv_blocks: int, threads: int
) -> LayeredRunner:
    norm = draft.norms[0] if not card.exit_norms else torch.ones_like(draft.norms[0])
    layers = (*draft.layers, *draft.exit_layers)
    moved = _to(replace(base, layers=layers, final_norm=norm, head=draft.head), info.device)
    shape = replace(info, num_layers=len(layers), vocab_size=card.draft_vocab)
    native = native_unavailable_reason(info.device) is None
    return build_llama_runner(moved, shape, kv_blocks, threads, native, window=card.window)[0]


def _to(weights: LlamaWeights, device: torch.device) -> LlamaWeights:
    if device.type == "cpu":
        return weights

    def moved(layer: LlamaLayerWeights) -> LlamaLayerWeights:
        parts: dict[str, Any] = {}
        for name in (f.name for f in fields(layer)):
            value = getattr(layer, name)
            parts[name] = None if value is None else value.to(device)
        return LlamaLayerWeights(**parts)

    layers = tuple(moved(layer) for layer in weights.layers)
    return replace(
        weights, layers=layers, final_norm=weights.final_norm.to(device), head=weights.head.to(device)
    )
