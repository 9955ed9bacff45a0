"""A tokenizer as bytes, so that a draft worker on another machine can read a target's text."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from actors.text.token_table import TokenTable

MAX_PACKED_BYTES = 32 << 20
MAX_JSON_BYTES = 192 << 20
"""A vocabulary of 262,000 tokens takes 33 MB of JSON, 5 MB packed."""


class TokenizerFileError(ValueError):
    """The bytes are no tokenizer, too large, or not the tokenizer that they were announced as."""


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """`packed` is a zlib-compressed tokenizer.json; `special_ids` add nothing to a text and `eos_token_ids`
    end an output, which that file does not always say. `vocab_hash` is `TokenTable.vocab_hash`."""

    vocab_hash: str
    packed: bytes
    special_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


def pack(table: TokenTable) -> TokenizerFile:
    """Takes about a second for the largest vocabularies."""
    return TokenizerFile(
        table.vocab_hash,
        zlib.compress(table.backend.to_str().encode("utf-8"), 1),
        tuple(sorted(table.special_ids)),
        table.eos_token_ids,
    )


def unpack(file: TokenizerFile) -> TokenTable:
    """A table with a backend of its own. Raises TokenizerFileError."""
    if len(file.packed) > MAX_PACKED_BYTES:
        raise TokenizerFileError(f"the tokenizer takes more than {MAX_PACKED_BYTES} bytes")
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(file.packed, MAX_JSON_BYTES)
    except zlib.error as error:
        raise TokenizerFileError(f"the tokenizer cannot be unpacked: {error}") from None
    if not inflate.eof:
        raise TokenizerFileError(f"the tokenizer is cut short or takes more than {MAX_JSON_BYTES} bytes")
    table = TokenTable(_read(data), file.special_ids, file.eos_token_ids)
    if table.vocab_hash != file.vocab_hash:
        raise TokenizerFileError(
            f"the tokenizer has the hash {table.vocab_hash[:12]}, announced was {file.vocab_hash[:12]}"
        )
    return table


def _read(data: bytes) -> Any:
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerFileError(f"the tokenizer cannot be read: {error}") from None


def copy(table: TokenTable) -> TokenTable:
    """A table with a backend of its own."""
    return TokenTable(
        Tokenizer.from_str(table.backend.to_str()), sorted(table.special_ids), table.eos_token_ids
    )
