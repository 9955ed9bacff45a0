"""The vocabularies of the targets that a draft worker serves."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.drafting.foreign import ForeignTarget
    from actors.text.token_table import TokenTable
    from actors.text.tokenizer_file import TokenizerFile

logger = logging.getLogger(__name__)

MAX_TARGETS = 16
"""Tokenizers kept for targets that connect again, and refusals remembered; streams hold their own."""


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """What a drafter with a model of its own speaks. `tokenizer_hash` is empty when unknown; without
    `tokenizer` nothing can be drafted for targets of another vocabulary."""

    vocab_size: int
    tokenizer_hash: str = ""
    tokenizer: TokenTable | None = None


class VocabularyRefusedError(ValueError):
    """The draft cannot serve a target's vocabulary; the message names both sizes."""


class TokenizerWantedError(LookupError):
    """The target's tokenizer has to be sent first; the message names both sizes."""


class TargetVocabularies:
    """Args:
    own: of the nested drafter; None when every drafter takes any vocabulary.
    """

    def __init__(self, own: DraftVocabulary | None) -> None:
        self._own = own
        self._known: OrderedDict[tuple[str, int], ForeignTarget | str] = OrderedDict()
        self._building = asyncio.Lock()

    @property
    def draft_size(self) -> int:
        return 0 if self._own is None else self._own.vocab_size

    def find(self, vocab_size: int, tokenizer_hash: str) -> ForeignTarget | None:
        """How to read a target's tokens; None when they are the drafter's own, padding aside.

        Raises VocabularyRefusedError, or TokenizerWantedError when `add` has to come first.
        """
        own = self._own
        if own is None:
            return None
        if own.tokenizer_hash and tokenizer_hash:
            if tokenizer_hash == own.tokenizer_hash:
                return None
        elif vocab_size == own.vocab_size:
            return None
        sizes = self._sizes(vocab_size, tokenizer_hash)
        if own.tokenizer is None or not tokenizer_hash:
            raise VocabularyRefusedError(f"{sizes}: they are not both known, so nothing can be re-tokenised")
        found = self._known.get((tokenizer_hash, vocab_size))
        if found is None:
            raise TokenizerWantedError(f"{sizes}: the target's tokenizer must be sent first")
        self._known.move_to_end((tokenizer_hash, vocab_size))
        if isinstance(found, str):
            raise VocabularyRefusedError(found)
        return found

    async def add(self, vocab_size: int, file: TokenizerFile) -> int:
        """Take a target's tokenizer (seconds, in a thread); returns how many tokens are shared.

        Raises VocabularyRefusedError, and ValueError for a tokenizer that is not what it is announced as.
        """
        own = self._own
        if own is None or own.tokenizer is None:
            sizes = self._sizes(vocab_size, file.vocab_hash)
            raise VocabularyRefusedError(f"{sizes}: this worker re-tokenises for nobody")
        key = (file.vocab_hash, vocab_size)
        async with self._building:
            found = self._known.get(key)
            if found is None:
                found = await asyncio.to_thread(self._build, own, own.tokenizer, vocab_size, file)
                self._known[key] = found
                while len(self._known) > MAX_TARGETS:
                    self._known.popitem(last=False)
        if isinstance(found, str):
            raise VocabularyRefusedError(found)
        return len(found.pair.target_of)

    def _build(
        self, own: DraftVocabulary, table: TokenTable, vocab_size: int, file: TokenizerFile
    ) -> ForeignTarget | str:
        # Imported here because a worker without a model needs neither torch nor tokenizers.
        from actors.drafting.foreign import foreign_target
        from actors.text.tokenizer_file import TokenizerFileError, copy, unpack
        from actors.text.vocabulary_pair import IncompatibleVocabulariesError, Vocabulary, VocabularyPair

        try:
            target = Vocabulary(unpack(file), vocab_size)
            pair = VocabularyPair(Vocabulary(copy(table), own.vocab_size), target)
        except IncompatibleVocabulariesError as error:
            return str(error)
        except TokenizerFileError:
            raise
        except ValueError as error:  # a tokenizer whose text cannot be streamed
            return f"{self._sizes(vocab_size, file.vocab_hash)}: {error}"
        logger.info("%s: %d are shared", self._sizes(vocab_size, file.vocab_hash), len(pair.target_of))
        return foreign_target(pair)

    def _sizes(self, vocab_size: int, tokenizer_hash: str) -> str:
        ours = "" if self._own is None else self._own.tokenizer_hash[:12]
        return (
            f"the target has {vocab_size} tokens (tokenizer {tokenizer_hash[:12] or 'unknown'}), "
            f"the nested drafter {self.draft_size} (tokenizer {ours or 'unknown'})"
        )
