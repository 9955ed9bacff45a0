"""The tokenizer of a model folder, and the ids that end its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face fast tokenizer of a folder, chat template included. Raises ValueError when it has
    none."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no fast tokenizer")
    return tokenizer


def eos_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an output: those of generation_config.json (one or several) and the tokenizer's own,
    ascending."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if listed is not None:
            found.update(listed if isinstance(listed, list) else [listed])
            break
    return tuple(sorted(found))
