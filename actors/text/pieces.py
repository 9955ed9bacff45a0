"""Bytes of a token, read off a fast tokenizer's decoder.

A fast tokenizer's decoder is a short list of string operations (tokenizers library, `decoders`). Each is
followed here on single tokens, in bytes, so that text can be assembled token by token without decoding
again what came before. Operations whose effect on a token depends on later tokens have no such form, and a
tokenizer that uses one is refused when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN_LENGTH = len("<0x00>")
SPACE_MARK = "▁"


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2, `bytes_to_unicode`): printable bytes stand for themselves,
    the other 68 for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_level_alphabet()

    def convert(piece: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in piece])
        except KeyError:  # the library then takes the whole token literally
            return piece.encode("utf-8")

    return convert


def is_byte_piece(piece: str) -> bool:
    """Whether a piece is spelled like a byte token, `<0xE2>`."""
    return len(piece) == _BYTE_TOKEN_LENGTH and piece.startswith("<0x") and piece.endswith(">")


def _byte_fallback(piece: str) -> bytes:
    """`<0xE2>` is one byte, everything else is text."""
    if is_byte_piece(piece):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass  # e.g. "<0xZZ>": ordinary text that looks like a byte token
    return piece.encode("utf-8")


def _literal(piece: str) -> bytes:
    return piece.encode("utf-8")


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How pieces become bytes.

    Attributes:
        replacements: (old, new) on the piece's text, in order.
        to_bytes: the piece's bytes after that.
        strip: at the start of a text, up to this many `strip_char` are dropped (SentencePiece's first space).
        first_drops_mark: at the start of a text, the first token loses all its space marks (`Metaspace`).
    """

    replacements: tuple[tuple[str, str], ...] = ()
    to_bytes: Callable[[str], bytes] = _literal
    strip: int = 0
    strip_char: str = " "
    first_drops_mark: str = ""

    def piece(self, token: str, first: bool = False) -> bytes:
        """Bytes of a token; `first` for the first token of a text."""
        if first and self.first_drops_mark:
            token = token.replace(self.first_drops_mark, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        return self.to_bytes(token)


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def piece_decoder(decoder: Any) -> PieceDecoder:
    """Read a `tokenizers` decoder. Raises ValueError when it has no token-by-token form."""
    if decoder is None:
        raise ValueError("the tokenizer has no decoder: its tokens do not say where spaces go")
    replacements: list[tuple[str, str]] = []
    to_bytes: Callable[[str], bytes] = _literal
    strip, strip_char, mark = 0, " ", ""
    for step in _steps(json.loads(decoder.__getstate__())):
        kind = step["type"]
        if kind == "ByteLevel":
            to_bytes = _byte_level()
        elif kind == "ByteFallback":
            to_bytes = _byte_fallback
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                mark = step["replacement"]
        elif kind == "Strip" and step["stop"] == 0:
            strip, strip_char = step["start"], step["content"]
        elif kind != "Fuse":
            raise ValueError(f"the tokenizer's decoder uses {kind!r}, which cannot be applied token by token")
    return PieceDecoder(tuple(replacements), to_bytes, strip, strip_char, mark)
