"""A model's tokenizer: text to ids, and what each id contributes to the text."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from actors.models.tokenizer import eos_token_ids, load_tokenizer
from actors.sampling.params import ParameterError
from actors.text.token_table import TokenTable

INLINE_CHARS = 4096
"""Shorter texts are encoded on the event loop (well under a millisecond), longer ones in a thread."""


class TextTokenizer(TokenTable):
    """Wraps the fast tokenizer in `folder` (a local Hugging Face model folder).

    Raises ValueError when the folder has no fast tokenizer, or one whose text cannot be streamed (see
    `actors.text.pieces`). Encoding is thread-safe: truncation and padding are switched off once, here.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        hf: Any = load_tokenizer(folder)
        self.hf = hf
        """The transformers tokenizer, for grammars and chat templates."""
        super().__init__(hf.backend_tokenizer, hf.all_special_ids, eos_token_ids(folder, hf))

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
