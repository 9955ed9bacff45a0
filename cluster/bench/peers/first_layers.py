"""A draft model for peers that want one as a folder: the first layers of the model itself, written once."""

from __future__ import annotations

from pathlib import Path

from actors.cache import cache_dir
from actors.files import complete_or_absent_folder
from actors.models.tokenizer import load_tokenizer


def num_layers(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers)


def first_layers(folder: Path, layers: int, content_hash: str) -> Path:
    """The folder of `folder`'s model cut to `layers` layers, its embedding, last norm and head kept, in
    bfloat16. Named by `content_hash` in the user's cache."""
    target = cache_dir() / "drafts" / f"{content_hash[:32]}-first-{layers}"
    if target.is_dir():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, local_files_only=True
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with complete_or_absent_folder(target) as partial:
        model.save_pretrained(partial)
        load_tokenizer(folder).save_pretrained(partial)
    return target
