"""Token ids to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from actors.text.token_table import TokenTable

_TAIL = 16
"""Ids before a text that are looked at: more than the bytes of one character, special tokens included."""


class IncrementalDetokenizer:
    """Feeds ids, returns the text each adds.

    The text is a function of the ids alone: bytes pass an incremental UTF-8 decoder (invalid bytes become
    U+FFFD, by maximal subparts as Unicode recommends), so how ids are grouped into calls changes nothing, and
    a text delivered whole is the concatenation of its deltas. Bytes that the last token leaves incomplete are
    never returned. Special tokens add nothing.

    A text that continues another one is given the ids `after` which it comes: it then keeps the space that
    SentencePiece tokenizers drop at the start of a text, and completes a character that those ids left
    incomplete. Without them the result equals the tokenizer's own `decode`.
    """

    def __init__(self, tokenizer: TokenTable, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = not after
        self._strip_left, self._strip_char = tokenizer.leading_strip
        if after:
            self._strip_left = 0
            self._utf8.decode(b"".join(tokenizer.token_bytes(i) for i in after[-_TAIL:]))
        self.chars = 0
        """Characters returned so far."""

    def feed(self, ids: Iterable[int]) -> str:
        """Text that `ids` add; may be empty while a character is incomplete."""
        text = "".join(map(self._one, ids))
        self.chars += len(text)
        return text

    @property
    def incomplete(self) -> bytes:
        """Bytes of a character that has begun and not ended."""
        return self._utf8.getstate()[0]

    def flush(self) -> str:
        """The text ends here: U+FFFD for bytes left incomplete. What is fed afterwards starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self.chars += len(text)
        return text

    def _one(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id, first=self._first)
        if self._first and token_id not in self._tokenizer.special_ids:
            self._first = False
        text = self._utf8.decode(data)
        while self._strip_left and text:
            if not text.startswith(self._strip_char):
                self._strip_left = 0
                break
            text = text[len(self._strip_char) :]
            self._strip_left -= 1
        return text
