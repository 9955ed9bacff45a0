"""Drafting for a target of another tokenizer: alignment of two token sequences, and the drafter around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from actors.drafting.errors import DrafterError
from actors.drafting.foreign import ForeignTarget, foreign_target
from actors.drafting.interface import DraftQuery, DraftSampling, SessionDraft, SessionOpen
from actors.drafting.retokenised import CATCH_UP, CHUNK, RetokenisedDrafter
from actors.text.alignment import Alignment
from actors.text.piecewise_encoder import HARD_CHARS, SOFT_CHARS, piece_end
from actors.text.token_table import TokenTable
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import copy
from actors.text.vocabulary_pair import IncompatibleVocabulariesError, Vocabulary, VocabularyPair
from tests.toy import toy_tokenizer
from tests.toy_tokenizers import BOS, EOS, byte_fallback_folder, byte_level_folder

TEXTS = (
    "The end! Then the token ends, and the next one begins at the end of the lazy dog.",
    "def f(a, b):\n    return {'a': [a, b]}  # the end\n\n\nprint(f(1, 22))\n",
    "Grüße aus Köln, où l'été est là. Привет, мир! 你好,世界。こんにちは 안녕하세요 مرحبا بالعالم",
    "👩‍👩‍👧‍👦🇩🇪 emoji 🙂🙃 and \u00a0odd\u2003spaces\r\n\t  end",
    "x" * 300 + " " * 150 + "end",
    "",
)
any_text = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="then d!ok\n é€🙂", max_size=250),
    st.lists(st.sampled_from(TEXTS), max_size=3).map("".join),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    toy = toy_tokenizer()
    toy.save_pretrained(root / "toy")
    return {
        "bytes": byte_level_folder(root / "bytes"),
        "pieces": byte_fallback_folder(root / "pieces"),
        "metaspace": byte_fallback_folder(root / "metaspace", metaspace=True),
        "toy": root / "toy",
    }


@pytest.fixture(scope="module")
def tables(folders: dict[str, Path]) -> dict[str, TextTokenizer]:
    return {name: TextTokenizer(folder) for name, folder in folders.items()}


PAIRS = [
    (draft, target)
    for draft in ("bytes", "pieces", "metaspace", "toy")
    for target in ("bytes", "pieces", "metaspace", "toy")
    if draft != target
]


@pytest.fixture(scope="module")
def pairs(tables: dict[str, TextTokenizer]) -> dict[tuple[str, str], VocabularyPair]:
    return {(d, t): make_pair(tables[d], tables[t]) for d, t in PAIRS}


def make_pair(draft: TokenTable, target: TokenTable) -> VocabularyPair:
    return VocabularyPair(
        Vocabulary(copy(draft), draft.vocab_size), Vocabulary(copy(target), target.vocab_size)
    )


def aligned(pair: VocabularyPair, ids: Sequence[int]) -> Alignment:
    made = Alignment(pair)
    made.append(ids)
    made.advance(len(ids))
    return made


# Pieces


@given(st.text(alphabet="ab \n", max_size=400), st.integers(0, 400))
def test_pieces_depend_on_the_text_before_their_end_only(text: str, cut: int) -> None:
    def pieces(whole: str) -> list[str]:
        found, start = [], 0
        while (end := piece_end(whole, start)) is not None:
            found.append(whole[start:end])
            start = end
        return found

    closed = pieces(text)
    assert text.startswith("".join(closed))
    assert len(text) - sum(map(len, closed)) <= HARD_CHARS
    assert all(SOFT_CHARS <= len(piece) <= HARD_CHARS for piece in closed)
    assert pieces(text[:cut]) == closed[: len(pieces(text[:cut]))]


# The draft's context


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@given(text=any_text)
@settings(max_examples=60, deadline=None)
def test_the_mapped_context_decodes_to_the_same_text(pairs, tables, names, text: str) -> None:  # type: ignore[no-untyped-def]
    target, pair = tables[names[1]], pairs[names]
    ids = target.encode(text, add_special_tokens=False)
    mapped = aligned(pair, ids)
    assert mapped.aligned
    expected = target.decode(ids)
    if names[0] == "metaspace":  # a text's leading spaces do not survive its own encode and decode either
        expected = expected.lstrip(" ")
    assert pair.draft.table.decode(mapped.draft_ids) == expected


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_grouping_changes_nothing(pairs, tables, names, data) -> None:  # type: ignore[no-untyped-def]
    """Any ids at all, special ones and broken characters included, told in any groups."""
    target, pair = tables[names[1]], pairs[names]
    ids = data.draw(st.lists(st.integers(0, target.vocab_size + 3), max_size=120)) + target.encode(
        data.draw(any_text), add_special_tokens=False
    )
    mapped, begin, held = Alignment(pair), 0, []
    while begin < len(ids):
        count = data.draw(st.integers(1, 9))
        mapped.append(ids[begin : begin + count])
        begin += count
        mapped.advance(data.draw(st.integers(1, 12)))
        if data.draw(st.booleans()):
            kept, new = mapped.take_change()
            held[kept:] = new
    mapped.advance(len(ids))
    kept, new = mapped.take_change()
    held[kept:] = new
    assert held == mapped.draft_ids == aligned(pair, ids).draft_ids
    assert mapped.target_len == len(ids)


def test_special_tokens_become_their_counterparts_or_nothing(tables, pairs) -> None:  # type: ignore[no-untyped-def]
    target, pair = tables["toy"], pairs["bytes", "toy"]
    eos, end = (target.backend.token_to_id(name) for name in ("<eos>", "<end>"))
    text = target.encode("the end", add_special_tokens=False)
    draft = pair.draft.table.backend.encode("the end", add_special_tokens=False).ids
    assert aligned(pair, [end, *text, eos, *text]).draft_ids == [*draft, EOS, *draft]
    both = pairs["bytes", "pieces"]
    assert aligned(both, [BOS]).draft_ids == [BOS]
    spelled = aligned(both, tables["pieces"].encode("</s>", add_special_tokens=False)[:0])
    assert spelled.draft_ids == []


def test_text_that_looks_like_a_special_token_stays_text(tables, pairs) -> None:  # type: ignore[no-untyped-def]
    ids = tables["toy"].encode("<s> the end", add_special_tokens=False)
    mapped = aligned(pairs["bytes", "toy"], ids)
    assert BOS not in mapped.draft_ids
    assert pairs["bytes", "toy"].draft.table.decode(mapped.draft_ids) == "<s> the end"


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_a_round_encodes_its_own_text_and_one_open_piece(pairs, tables, names) -> None:  # type: ignore[no-untyped-def]
    target, pair = tables[names[1]], pairs[names]
    for text in (TEXTS[0] * 40, "x" * 5000, " " * 3000, TEXTS[2] * 60):
        ids = target.encode(text, add_special_tokens=False)
        mapped, rng, begin = Alignment(pair), random.Random(1), 0
        while begin < len(ids):
            group = ids[begin : begin + rng.randint(1, 8)]
            begin += len(group)
            before = pair.draft_encoder.chars
            mapped.append(group)
            mapped.advance(CATCH_UP)
            new = sum(len(target.token_bytes(i)) for i in group)
            assert pair.draft_encoder.chars - before <= HARD_CHARS + new


# Proposals


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@given(text=any_text, after=any_text)
@settings(max_examples=60, deadline=None)
def test_string_alignment_spells_the_same_text(pairs, tables, names, text: str, after: str) -> None:  # type: ignore[no-untyped-def]
    pair, target = pairs[names], tables[names[1]]
    mapped = aligned(pair, target.encode("a" + text, add_special_tokens=False))
    drafted = pair.draft_encoder.encode(after)
    tokens = mapped.same_text(drafted)
    assert b"".join(target.token_bytes(t.token_id) for t in tokens) == after.encode()
    # Every draft token is charged to one target token, in order.
    assert [i for t in tokens for i in range(t.first, t.last)] == list(range(len(drafted)))


def test_a_token_in_both_vocabularies_crosses_unchanged(pairs, tables) -> None:  # type: ignore[no-untyped-def]
    pair = pairs["bytes", "pieces"]
    ours = pair.draft.table.backend.encode("é").ids
    assert len(ours) == 2
    assert [t.token_id for t in aligned(pair, []).same_text(ours)] == tables["pieces"].encode("aé", False)[-1:]
    (ours,) = pair.draft.table.backend.encode("b").ids
    theirs = pair.target_of[ours]
    assert pair.target.table.token(theirs) == "b", "the letter, not the byte token <0x62>"
    assert aligned(pair, []).same_tokens([ours, EOS]) == [theirs, EOS]
    assert len(set(pair.target_of.values())) == len(pair.target_of)


def test_a_draft_completes_the_character_that_the_target_has_begun(pairs, tables) -> None:  # type: ignore[no-untyped-def]
    pair, target = pairs["toy", "bytes"], tables["bytes"]
    euro = target.encode("€", add_special_tokens=False)
    assert len(euro) == 2
    mapped = aligned(pair, [*target.encode("ok"), euro[0]])
    assert not mapped.aligned
    assert pair.draft.table.decode(mapped.draft_ids) == "ok"
    spelled = pair.draft_encoder.encode("€ ok")
    assert [t.token_id for t in mapped.same_text(spelled)] == [euro[1], *target.encode(" ok")]
    assert mapped.same_text(pair.draft_encoder.encode("ok")) == []
    assert [t.token_id for t in mapped.same_text(spelled[:2])] == [], "an incomplete character is dropped"


def test_an_end_crosses_as_the_targets_end(pairs, tables) -> None:  # type: ignore[no-untyped-def]
    pair, target = pairs["bytes", "toy"], tables["toy"]
    mapped = aligned(pair, target.encode("the"))
    tokens = [t.token_id for t in mapped.same_text([*pair.draft_encoder.encode(" dog"), EOS, EOS])]
    assert tokens == [*target.encode(" dog"), target.eos_token_ids[0]]
    assert [t.token_id for t in mapped.same_text([BOS])] == [], "a special token that only the draft has"


# Pairs


def test_a_pair_without_common_tokens_is_refused_with_both_sizes(tables) -> None:  # type: ignore[no-untyped-def]
    backend = Tokenizer(models.BPE(vocab={"αβγ": 0, "δεζ": 1}, merges=[]))
    backend.decoder = decoders.Fuse()
    with pytest.raises(IncompatibleVocabulariesError, match=r"7\b.*\b264\b"):
        VocabularyPair(Vocabulary(copy(tables["bytes"]), 264), Vocabulary(TokenTable(backend), 7))


def test_ids_past_the_logits_are_never_proposed(tables) -> None:  # type: ignore[no-untyped-def]
    draft, target = tables["bytes"], tables["toy"]
    size = 200
    pair = VocabularyPair(Vocabulary(copy(draft), draft.vocab_size), Vocabulary(copy(target), size))
    assert max(pair.target_of.values()) < size
    (the,) = target.encode(" the")
    assert the >= size
    assert aligned(pair, target.encode("a")).same_text(pair.draft_encoder.encode(" the")) == []
