"""A model's tokenizer: text to ids, and what each id contributes to the text."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.models.tokenizer import eos_token_ids, load_tokenizer
from actors.sampling.params import ParameterError
from actors.text.pieces import PieceDecoder, piece_decoder

INLINE_CHARS = 4096
"""Shorter texts are encoded on the event loop (well under a millisecond), longer ones in a thread."""


class TextTokenizer:
    """Wraps the fast tokenizer in `folder` (a local Hugging Face model folder).

    Raises ValueError when the folder has no fast tokenizer, or one whose text cannot be streamed (see
    `actors.text.pieces`). Encoding is thread-safe: truncation and padding are switched off once, here.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        hf: Any = load_tokenizer(folder)
        self.hf = hf
        """The transformers tokenizer, for grammars and chat templates."""
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decoder: PieceDecoder = piece_decoder(self._backend.decoder)
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        self.vocab_size: int = max(vocab.values()) + 1
        """Largest id + 1. A model's logits may have more columns; those ids have no text."""
        self.eos_token_ids: tuple[int, ...] = eos_token_ids(folder, hf)
        self.special_ids: frozenset[int] = frozenset(
            [i for i, token in added.items() if token.special] + list(hf.all_special_ids)
        )
        self._tokens: list[str | None] = [None] * self.vocab_size
        for token, index in vocab.items():
            self._tokens[index] = token
        self._added: frozenset[int] = frozenset(added)
        self._bytes: list[bytes] = [
            b"" if i in self.special_ids else self._bytes_of(i) for i in range(self.vocab_size)
        ]
        self.vocab_hash: str = _vocab_hash(vocab)
        """Equal for two tokenizers exactly when every token has the same id (sha256, hex)."""

    def _bytes_of(self, token_id: int, first: bool = False) -> bytes:
        token = self._tokens[token_id]
        if token is None:
            return b""
        return token.encode("utf-8") if token_id in self._added else self._decoder.piece(token, first)

    @property
    def leading_strip(self) -> tuple[int, str]:
        """(count, character): what a text loses at its start, by SentencePiece's first-space rule."""
        return self._decoder.strip, self._decoder.strip_char

    def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Ids of `text`. Raises ParameterError(param) when it holds unpaired surrogates."""
        return list(self._encode(text, add_special_tokens, param).ids)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[list[int], list[int]]:
        """Ids, and for each the index in `text` of its first character."""
        encoding = self._encode(text, add_special_tokens, param)
        return list(encoding.ids), [start for start, _ in encoding.offsets]

    async def encode_async(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[list[int], list[int]]:
        """`encode_with_offsets`, in a thread when the text is long."""
        if len(text) <= INLINE_CHARS:
            return self.encode_with_offsets(text, add_special_tokens, param)
        return await asyncio.to_thread(self.encode_with_offsets, text, add_special_tokens, param)

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> Any:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ParameterError(param, f"is not valid Unicode: {error.reason}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """What the id adds to the text; empty for special tokens and for ids without a token.

        `first` asks for the bytes at the start of a text.
        """
        if not 0 <= token_id < self.vocab_size:
            return b""
        if first and token_id not in self.special_ids:
            return self._bytes_of(token_id, first=True)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The id for people: its text, U+FFFD where it is no whole UTF-8; special tokens by name."""
        if not 0 <= token_id < self.vocab_size:
            return ""
        if token_id in self.special_ids:
            return self._tokens[token_id] or ""
        return self._bytes[token_id].decode("utf-8", errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of a whole sequence; incomplete bytes at its end show as U+FFFD."""
        data = bytearray()
        first = True
        for token_id in ids:
            if token_id in self.special_ids:
                if not skip_special_tokens:
                    data += self.token_text(token_id).encode("utf-8")
                    first = False
                continue
            data += self.token_bytes(token_id, first=first)
            first = False
        text = data.decode("utf-8", errors="replace")
        count, char = self.leading_strip
        while count and text.startswith(char):
            text, count = text[len(char) :], count - 1
        return text


def _vocab_hash(vocab: dict[str, int]) -> str:
    digest = hashlib.sha256()
    for token, index in sorted(vocab.items()):
        data = token.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(4, "little") + data + index.to_bytes(4, "little"))
    return digest.hexdigest()
