"""LoRA adapters (arXiv 2106.09685) in PEFT's format, merged into the weights once: W + (alpha / r) B A.

A merged model costs what its base costs, runs on every backend and in every precision, and keeps the base's
tokenizer, so that the base's nested draft drafts for it too. Where an adapter changes only one of a tied
embedding and head, the merged model has both.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.models.convert import cached_model
from actors.models.source import ADAPTER_WEIGHTS, ModelSourceError, ResolvedSource, resolve_adapter

MERGE_VERSION = 2
"""Raised when a merge writes other numbers than before, so that older folders are left aside."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def adapted(
    base: ResolvedSource, folder: Path, adapter: str, progress: Callable[[str], None] | None = None
) -> ResolvedSource:
    """The base, in `folder` as Hugging Face has it, with an adapter merged in float32.

    `adapter`: a folder or hub id with PEFT's adapter_config.json and safetensors. Raises ModelSourceError
    when it is none, or does not fit the base, naming both; TimeoutError as `cached_model`.
    """
    found = resolve_adapter(adapter)
    say = progress or (lambda message: None)
    parts = f"{base.content_hash} + {found.content_hash}, merge {MERGE_VERSION}"
    both = hashlib.sha256(parts.encode()).hexdigest()
    name = f"{base.name}+{found.name}"

    def write(merged: Path) -> None:
        say(f"merging adapter {found.name} into {base.name} (once)")
        _merge(base, folder, found, merged)

    return ResolvedSource(f"{base.source} + {adapter}", "folder", cached_model(both, write), name, both)


def _merge(base: ResolvedSource, folder: Path, adapter: ResolvedSource, merged: Path) -> None:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelSourceError(
            f"adapter {adapter.source!r}: peft is not installed; run: pip install 's2d-serve[adapters]'"
        ) from error
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    try:
        wrapped = PeftModel.from_pretrained(model, adapter.path, autocast_adapter_dtype=False)
        # PEFT itself is content with an adapter that fits a part of the model, or has more than the model.
        with safe_open(adapter.path / ADAPTER_WEIGHTS, "pt") as stored:
            differ = set(stored.keys()) ^ set(get_peft_model_state_dict(wrapped))
        if differ:
            raise ValueError(f"{len(differ)} tensors are in one of them only, {min(differ)} among them")
        _untie(model)
        whole = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelSourceError(
            f"adapter {adapter.source!r} does not fit {base.name}: {str(error).splitlines()[0]}"
        ) from error
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        whole.config.tie_word_embeddings = False
    whole.save_pretrained(merged)
    # The rest of the folder is the base's: tokenizer, chat template, generation settings.
    for path in folder.iterdir():
        if path.is_file() and not (merged / path.name).exists() and not any(path.match(p) for p in _WEIGHTS):
            shutil.copy(path, merged / path.name)


def _untie(model: Any) -> None:
    """Give a head that shares the embedding's weight one of its own, if an adapter changes either: PEFT
    computes them apart, but would merge the change into both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_output_embeddings(), model.get_input_embeddings()]
    head, embedding = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if [head, embedding] != ends and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
