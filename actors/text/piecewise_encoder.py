"""Text to ids piece by piece, so that a text that grows is never tokenised again from its start.

A tokenizer reads a whole text. Here a text is cut into pieces at places that depend on the characters up to
them alone, and every piece is encoded by itself; the ids of a text are those of its pieces. So ids of closed
pieces never change, however the text comes in, and only the open piece at the end is encoded again.

A piece ends before a space that follows something else, once it is `SOFT_CHARS` long. Byte-level
pre-tokenizers (GPT-2, Llama 3, Qwen, SmolLM2) split there anyway and SentencePiece tokens begin with the
space, so the ids are those of the whole text. A piece without such a space ends at `HARD_CHARS`, which may
cut through a token.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from actors.text.token_table import TokenTable

SOFT_CHARS, HARD_CHARS = 48, 96


def piece_end(text: str, start: int = 0) -> int | None:
    """Index after the piece that begins at `start`; None while it is open. Looks no further than
    `HARD_CHARS` past `start`."""
    limit = start + HARD_CHARS
    at = start + SOFT_CHARS - 1
    while (at := text.find(" ", at + 1, limit + 1)) >= 0:
        if not text[at - 1].isspace():
            return at
    return limit if len(text) > limit else None


class PieceEncoder:
    """Encodes pieces with the tokenizer of a table. Text that looks like a special token stays text.

    Args:
        table: its backend is used as it is and must belong to nobody else.
    """

    def __init__(self, table: TokenTable) -> None:
        backend = table.backend
        eos = frozenset(table.eos_token_ids)
        self.prefix: tuple[int, ...] = tuple(
            i for i in backend.encode("", add_special_tokens=True).ids if i not in eos
        )
        """Special ids that begin a sequence."""
        backend.encode_special_tokens = True
        self._first = backend
        self._later = _without_prefix(backend) or backend
        self.chars = 0
        """Characters encoded so far."""

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Ids of a piece; `first` for the one at the start of a text, where SentencePiece adds a space."""
        self.chars += len(text)
        backend = self._first if first else self._later
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """The operations of a normalizer or pre-tokenizer, nested sequences flattened."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()), key)


def _flat(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [step for inner in state[key] for step in _flat(inner, key)] if key in state else [state]


def _without_prefix(backend: Any) -> Tokenizer | None:
    """A copy that adds no space before a text; None where the tokenizer adds none."""
    normalize = _steps(backend.normalizer, "normalizers")
    split = _steps(backend.pre_tokenizer, "pretokenizers")
    kept = [step for step in normalize if step["type"] != "Prepend"]
    plain = [
        {**step, "prepend_scheme": "never"}
        if step["type"] == "Metaspace"
        else {**step, "add_prefix_space": False}
        if step["type"] == "ByteLevel"
        else step
        for step in split
    ]
    if (kept, plain) == (normalize, split):
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    normalizer, pre_tokenizer = normalizers.Sequence([]), pre_tokenizers.Sequence([])
    normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": kept}).encode())
    pre_tokenizer.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": plain}).encode())
    copy.normalizer, copy.pre_tokenizer = normalizer, pre_tokenizer
    return copy
