"""A sequence of one tokenizer, kept as a sequence of another while it grows.

The draft's context is the target's text in the draft's tokens (universal assisted generation; arXiv
2502.05202). Text is cut into bounded pieces (`actors.text.piecewise_encoder`), so a call encodes its own text
and the open piece, never more, and the result does not depend on how the target's tokens were grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from actors.text.detokenizer import IncrementalDetokenizer
from actors.text.piecewise_encoder import piece_end
from actors.text.vocabulary_pair import VocabularyPair


@dataclass(frozen=True, slots=True)
class AlignedToken:
    """A target token of a mapped proposal. Draft tokens `first` .. `last` - 1 begin in it."""

    token_id: int
    first: int
    last: int


class Alignment:
    """One session: the target's tokens come in, `draft_ids` is the same text for the draft.

    A special token ends a piece; it becomes its counterpart, or nothing. Bytes that the target's last token
    leaves incomplete are not in `draft_ids` yet; invalid ones are U+FFFD there.
    """

    def __init__(self, pair: VocabularyPair) -> None:
        self._pair = pair
        self._text = IncrementalDetokenizer(pair.target.table)
        self._waiting: list[int] = []
        self._taken = 0
        self._open = ""
        self._closed = len(pair.draft_encoder.prefix)
        self._at_start = True
        self._unchanged = 0
        self.draft_ids: list[int] = list(pair.draft_encoder.prefix)
        self.target_len = 0
        """Target tokens told so far: the index of the next one."""

    @property
    def waiting(self) -> int:
        """Target tokens told that `draft_ids` does not contain yet."""
        return len(self._waiting) - self._taken

    @property
    def aligned(self) -> bool:
        """Whether both sequences end at the same byte."""
        return not self.waiting and not self._text.incomplete

    def append(self, target_ids: Sequence[int]) -> None:
        """Take note of committed tokens; costs nothing until `advance`."""
        self._waiting.extend(target_ids)
        self.target_len += len(target_ids)

    def advance(self, limit: int) -> None:
        """Take in at most `limit` target tokens that wait; encodes their text and the open piece."""
        batch = self._waiting[self._taken : self._taken + limit]
        self._taken += len(batch)
        if not self.waiting:
            self._waiting.clear()
            self._taken = 0
        specials = self._pair.target.table.special_ids
        begin = 0
        for index, token_id in enumerate(batch):
            if token_id in specials:
                self._grow(self._text.feed(batch[begin:index]) + self._text.flush())
                self._close(self._pair.special_of.get(token_id))
                begin = index + 1
        self._grow(self._text.feed(batch[begin:]))

    def take_change(self) -> tuple[int, list[int]]:
        """(kept, new): since the last call, all but the first `kept` of `draft_ids` became `new`."""
        kept, self._unchanged = self._unchanged, len(self.draft_ids)
        return kept, self.draft_ids[kept:]

    def _grow(self, text: str) -> None:
        if not text:
            return
        text = self._open + text
        start = 0
        while (end := piece_end(text, start)) is not None:
            self._put(text[start:end])
            self._closed = len(self.draft_ids)
            self._at_start = False
            start = end
        self._open = text[start:]
        self._put(self._open)

    def _close(self, special: int | None) -> None:
        self._at_start = self._at_start and not self._open
        self._open = ""
        self._closed = len(self.draft_ids)
        if special is not None:
            self._put_ids([special])
            self._closed += 1

    def _put(self, piece: str) -> None:
        """Make the ids from `_closed` on those of a piece."""
        if piece:
            self._put_ids(self._pair.draft_encoder.encode(piece, first=self._at_start))

    def _put_ids(self, ids: Sequence[int]) -> None:
        common = 0
        for held, token_id in zip(self.draft_ids[self._closed :], ids, strict=False):
            if held != token_id:
                break
            common += 1
        self._unchanged = min(self._unchanged, self._closed + common)
        self.draft_ids[self._closed + common :] = ids[common:]

    def same_tokens(self, drafted: Sequence[int]) -> list[int]:
        """Token-level intersection: the target's ids of drafted tokens, up to the first that it lacks."""
        ids: list[int] = []
        for token_id in drafted:
            theirs = self._pair.target_of.get(token_id)
            if theirs is None:
                break
            ids.append(theirs)
        return ids

    def same_text(self, drafted: Sequence[int]) -> list[AlignedToken]:
        """String alignment: the text of drafted tokens, which follow `draft_ids`, in the target's tokens.

        The text ends before the first special token; one that the target has follows it. A character left
        incomplete is dropped. Empty when the text contradicts the target's own incomplete character.
        """
        table = self._pair.draft.table
        data, starts = bytearray(), []
        end: int | None = None
        for token_id in drafted:
            if token_id in table.special_ids:
                end = self._pair.target_of.get(token_id)
                break
            starts.append(len(data))
            data += table.token_bytes(token_id)
        text, whole = _whole_text(bytes(data))
        begun = self._text.incomplete
        if not data.startswith(begun):
            return []
        aligned = self._tokens_of(text, bytes(data), starts, len(begun))
        covered = aligned[-1].last if aligned else 0
        if end is not None and whole and covered == len(starts) and not (begun and not aligned):
            aligned.append(AlignedToken(end, covered, covered + 1))
        return aligned

    def _tokens_of(self, text: str, data: bytes, starts: Sequence[int], skip: int) -> list[AlignedToken]:
        """Target tokens that spell `data` from byte `skip` on."""
        target = self._pair.target
        aligned: list[AlignedToken] = []
        at = covered = 0
        for token_id in self._pair.target_encoder.encode(text) if text else ():
            piece = target.table.token_bytes(token_id)
            end = at + len(piece)
            if not piece or token_id >= target.size or data[at:end] != piece or at < skip < end:
                break
            if at >= skip:
                first = covered
                while covered < len(starts) and starts[covered] < end:
                    covered += 1
                aligned.append(AlignedToken(token_id, first, covered))
            at = end
        return aligned


def _whole_text(data: bytes) -> tuple[str, bool]:
    """The text of the valid whole characters that `data` begins with, and whether that is all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError as error:
        return data[: error.start].decode("utf-8"), False
    return text, not decoder.getstate()[0]
