"""What each id of a fast tokenizer contributes to the text. Needs the `tokenizers` library only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from actors.text.pieces import PieceDecoder, is_byte_piece, piece_decoder


class TokenTable:
    """Args:
        backend: a `tokenizers.Tokenizer`; truncation and padding are switched off.
        special_ids: ids that add nothing to the text, besides the tokens that the backend calls special.
        eos_token_ids: ids that end an output.

    Raises ValueError when the tokenizer's text cannot be streamed (see `actors.text.pieces`).
    """

    def __init__(
        self, backend: Any, special_ids: Iterable[int] = (), eos_token_ids: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._decoder: PieceDecoder = piece_decoder(backend.decoder)
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        """Largest id + 1. A model's logits may have more columns; those ids have no text."""
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        self.special_ids: frozenset[int] = frozenset(
            [i for i, token in added.items() if token.special] + list(special_ids)
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

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`; not to be changed by readers."""
        return self._backend

    def _bytes_of(self, token_id: int, first: bool = False) -> bytes:
        token = self._tokens[token_id]
        if token is None:
            return b""
        return token.encode("utf-8") if token_id in self._added else self._decoder.piece(token, first)

    @property
    def leading_strip(self) -> tuple[int, str]:
        """(count, character): what a text loses at its start, by SentencePiece's first-space rule."""
        return self._decoder.strip, self._decoder.strip_char

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id; None for ids without a token."""
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else None

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the id spells one byte (`<0x0A>`), for text that no other token covers."""
        token = self.token(token_id)
        return token is not None and is_byte_piece(token) and self._bytes[token_id] != token.encode("utf-8")

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
