"""The card of a data set, from the settings that made it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from actors.text.tokenizer import TextTokenizer
from actors.training.settings import DataSettings
from actors.training.token_store import DataCard

_FREE = frozenset(
    {"out", "samples", "teacher_out", "teacher_top", "batch", "part", "threads", "device", "source"}
)
"""What may change when a data set is continued: more samples, another machine. A file of prompts may grow:
each shard keeps what it answers."""


def data_card(
    settings: DataSettings, kind: str, model: str, source_hash: str, tokenizer: TextTokenizer, vocab_size: int
) -> DataCard:
    """Raises OSError for a text that cannot be read."""
    made_with = "".join((settings.digest(*_FREE), source_hash, *map(_file_hash, settings.texts)))
    return DataCard(
        name=settings.out.name,
        kind=kind,
        model=model,
        source_hash=source_hash,
        tokenizer_hash=tokenizer.vocab_hash,
        vocab_size=vocab_size,
        made_with=hashlib.sha256(made_with.encode()).hexdigest(),
        settings=_recorded(settings),
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(settings: DataSettings) -> dict[str, object]:
    """Settings as the card keeps them: no paths of this machine."""
    values = settings.model_dump(mode="json", exclude=set(_FREE))
    values["prompts"] = None if settings.prompts is None else settings.prompts.name
    values["texts"] = [path.name for path in settings.texts]
    return values
