"""Two tokenizers side by side: which tokens they share, and text of either in tokens of the other.

Sources: universal assisted generation, and the token-level intersection (TLI) and string-level exact match of
"Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies"
(arXiv 2502.05202).
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.text.piecewise_encoder import PieceEncoder
from actors.text.token_table import TokenTable


class IncompatibleVocabulariesError(ValueError):
    """A draft cannot serve a target; the message names both sizes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer and the `size` of its model's vocabulary, in tokens: its logits, padding included."""

    table: TokenTable
    size: int

    def by_bytes(self) -> dict[bytes, int]:
        """What the tokens add to a text -> id. Of tokens with equal bytes the one that spells them as text
        wins over a byte token, then the lowest id."""
        table = self.table
        found: dict[bytes, int] = {}
        for token_id in range(min(table.vocab_size, self.size)):
            data = table.token_bytes(token_id)
            if not data:
                continue
            rival = found.get(data)
            if rival is None or (table.is_byte_fallback(rival) and not table.is_byte_fallback(token_id)):
                found[data] = token_id
        return found

    def specials(self) -> dict[str, int]:
        """Special tokens by their spelling."""
        ids = sorted(i for i in self.table.special_ids if i < min(self.table.vocab_size, self.size))
        return {name: i for i in ids if (name := self.table.token(i)) is not None}


class VocabularyPair:
    """What a draft and a target have in common. Used from one thread: the encoders count.

    Tokens are the same when they add the same bytes to a text. Special tokens are the same when they are
    spelled alike; ids that end an output are the draft's first such id, and the target's first. Other special
    tokens of the target leave no trace in the draft's context.

    Raises IncompatibleVocabulariesError when no text token is shared.
    """

    def __init__(self, draft: Vocabulary, target: Vocabulary) -> None:
        self.draft, self.target = draft, target
        text = target.by_bytes()
        self.target_of: dict[int, int] = {
            ours: text[data] for data, ours in draft.by_bytes().items() if data in text
        }
        """Draft id -> target id of the shared tokens, one to one, special ones included."""
        if not self.target_of:
            raise IncompatibleVocabulariesError(
                f"the target's vocabulary of {target.size} tokens and the draft's of {draft.size} have no "
                "token in common"
            )
        named = target.specials()
        special = {ours: named[name] for name, ours in draft.specials().items() if name in named}
        self.special_of: dict[int, int] = {theirs: ours for ours, theirs in special.items()}
        """Special target id -> the draft id that stands for it in the draft's context."""
        self.target_of.update(special)
        ends = draft.table.eos_token_ids
        if ends and target.table.eos_token_ids:
            self.special_of.update(
                (theirs, ends[0]) for theirs in target.table.eos_token_ids if theirs not in self.special_of
            )
            if ends[0] not in special:
                end = target.table.eos_token_ids[0]
                # The draft may have a token that is spelled like it too, but ends its texts with another.
                self.target_of = {ours: theirs for ours, theirs in self.target_of.items() if theirs != end}
                self.target_of[ends[0]] = end
        self.draft_encoder = PieceEncoder(draft.table)
        self.target_encoder = PieceEncoder(target.table)
