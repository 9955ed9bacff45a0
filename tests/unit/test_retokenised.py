"""Drafting for a target of another tokenizer: alignment of two token sequences, and the drafter around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from actors.drafting.errors import DrafterError
from actors.drafting.foreign import ForeignTarget, foreign_target
from actors.drafting.interface import SCOPE_SHIFT, DraftQuery, SessionDraft, SessionOpen
from actors.drafting.retokenised import CATCH_UP, CHUNK, RetokenisedDrafter
from actors.sampling.params import DraftSampling
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
# SentencePiece vocabularies write spaces as U+2581 and cannot tell it from one.
any_text = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=60),
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
        draft = tables[names[0]]
        expected = draft.decode(draft.encode(expected, add_special_tokens=False))
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
    spelled = aligned(both, tables["pieces"].encode("</s>", add_special_tokens=False))
    assert spelled.draft_ids == [EOS]


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
    theirs = tables["pieces"].encode("aé", False)[-1]
    assert [t.token_id for t in aligned(pair, []).same_text(ours)] == [theirs]
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


def test_the_drafts_end_alone_stands_for_the_targets_end(tables) -> None:  # type: ignore[no-untyped-def]
    """Also where the draft has a token that is spelled like the target's, and ends its texts with another."""
    backend = copy(tables["pieces"]).backend
    backend.add_special_tokens(["<end>"])
    end = backend.token_to_id("<end>")
    target = TokenTable(backend, eos_token_ids=(end,))
    draft = copy(tables["toy"])
    alike, ours = draft.backend.token_to_id("<end>"), draft.eos_token_ids[0]
    pair = VocabularyPair(Vocabulary(draft, draft.vocab_size), Vocabulary(target, target.vocab_size))
    assert pair.target_of[ours] == end
    assert alike not in pair.target_of
    assert len(set(pair.target_of.values())) == len(pair.target_of)
    assert pair.special_of[end] == alike, "a text that the target has ended is read as it is spelled"
    shared = foreign_target(pair).shared
    assert len(shared.target_ids.unique()) == len(shared.target_ids)


def test_ids_past_the_logits_are_never_proposed(tables) -> None:  # type: ignore[no-untyped-def]
    draft, target = tables["bytes"], tables["toy"]
    size = 200
    pair = VocabularyPair(Vocabulary(copy(draft), draft.vocab_size), Vocabulary(copy(target), size))
    assert max(pair.target_of.values()) < size
    (the,) = target.encode(" the")
    assert the >= size
    assert aligned(pair, target.encode("a")).same_text(pair.draft_encoder.encode(" the")) == []


# The drafter


class Oracle:
    """A drafter in the draft's vocabulary that knows the whole text: proposes how its tokens go on."""

    name = "nested"
    learns = False
    exits = (1,)
    kv_blocks_used = kv_blocks_free = 0

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair = pair
        self.text = ""
        self.tokens: dict[int, list[int]] = {}
        self.queries: list[DraftQuery] = []
        self.sampling: dict[int, DraftSampling] = {}
        self.refuses = False

    def open(self, session: SessionOpen) -> None:
        if self.refuses:
            raise DrafterError("capacity", "full")
        assert session.token_ids
        self.tokens[session.session_id] = list(session.token_ids)
        self.sampling[session.session_id] = session.sampling

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None:
        self.tokens[session_id].extend(new_tokens)

    def rewind(self, session_id: int, num_tokens: int) -> None:
        assert 1 <= num_tokens < len(self.tokens[session_id])
        del self.tokens[session_id][num_tokens:]

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.queries = list(queries)
        answers = []
        for query in queries:
            known = self.pair.draft.table.decode(self.tokens[query.session_id])
            rest = self.text[len(known) :] if self.text.startswith(known) else ""
            ids = self.pair.draft_encoder.encode(rest[:60])[: query.budget]
            answers.append(
                SessionDraft(
                    query.session_id,
                    query.epoch,
                    tuple(ids),
                    drafter="nested",
                    exit_depth=1,
                    confidence=(0.5,) * len(ids),
                )
            )
        return answers

    def close(self, session_id: int) -> None:
        self.tokens.pop(session_id, None)

    def reset(self, scope: str = "all") -> None: ...

    def work(self) -> bool:
        return False


class Rig:
    def __init__(self, pair: VocabularyPair) -> None:
        self.foreign: ForeignTarget = foreign_target(pair)
        self.pair, self.oracle = pair, Oracle(pair)
        self.drafter = RetokenisedDrafter(self.oracle, pair.draft.size)
        self.epoch = 0

    def open(self, ids: Sequence[int], sampling: DraftSampling | None = None, sid: int = 1) -> None:
        sampling = sampling or DraftSampling(key=3)
        self.drafter.open(SessionOpen(sid, tuple(ids), len(ids), sampling, foreign=self.foreign))

    def ask(self, budget: int = 4, sid: int = 1) -> SessionDraft:
        self.epoch += 1
        (draft,) = self.drafter.propose([DraftQuery(sid, self.epoch, budget)])
        assert (draft.session_id, draft.epoch) == (sid, self.epoch)
        return draft


@pytest.fixture
def rig(pairs) -> Callable[[str, str], Rig]:  # type: ignore[no-untyped-def]
    return lambda draft, target: Rig(pairs[draft, target])


@pytest.mark.parametrize("names", [("toy", "pieces"), ("pieces", "bytes"), ("bytes", "toy")], ids="-".join)
@given(text=any_text, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_inner_drafter_holds_the_text_after_every_round(pairs, tables, names, text, seed) -> None:  # type: ignore[no-untyped-def]
    """Rounds of any length, right and wrong: the context equals that of the whole sequence told at once."""
    rng, rig, target = random.Random(seed), Rig(pairs[names]), tables[names[1]]
    ids = target.encode("a" + text, add_special_tokens=False)
    rig.oracle.text = "a" + text
    told = ids[:1]
    rig.open(told)
    while len(told) < len(ids):
        rig.ask(rng.randint(1, 6))
        expected = aligned(rig.pair, told).draft_ids
        assert rig.oracle.tokens.get(1, []) == expected
        new = ids[len(told) : len(told) + rng.randint(1, 5)]
        if rng.random() < 0.3:  # the target goes its own way
            new = [*new[:-1], rng.randrange(3, target.vocab_size)]
            ids = told + new + ids[len(told) + len(new) :]
        rig.drafter.commit(1, new)
        told = told + new


@pytest.mark.parametrize("names", [("toy", "pieces"), ("toy", "bytes"), ("bytes", "toy"), ("pieces", "toy")])
def test_a_draft_that_knows_the_text_is_accepted(pairs, tables, names) -> None:  # type: ignore[no-untyped-def]
    rig, target = Rig(pairs[names]), tables[names[1]]
    rig.oracle.text = (TEXTS[0] + " ") * 4
    ids = target.encode(rig.oracle.text, add_special_tokens=False)
    rig.open(ids[:3])
    at = 3
    accepted = proposed = 0
    while at < len(ids) - 8:
        draft = rig.ask(4)
        right = 0
        while right < len(draft.token_ids) and draft.token_ids[right] == ids[at + right]:
            right += 1
        accepted, proposed = accepted + right, proposed + len(draft.token_ids)
        rig.drafter.commit(1, ids[at : at + right + 1])
        at += right + 1
    # Wrong are only last tokens, where the draft stops inside a token of the target.
    assert accepted > 0.6 * proposed > 0


def test_sampling_targets_are_followed_by_their_own_noise(rig, tables) -> None:  # type: ignore[no-untyped-def]
    made, target = rig("toy", "bytes"), tables["bytes"]
    sampling = DraftSampling(key=9, temperature=0.8, top_k=7, rule="leviathan")
    made.oracle.text = "ok the €!"
    ids = target.encode("ok the", add_special_tokens=False)
    made.open(ids, sampling)
    draft = made.ask(2)
    (query,) = made.oracle.queries
    assert query.coupling is not None
    assert (query.coupling.sampling, query.coupling.position) == (sampling, len(ids))
    assert query.coupling.shared is made.foreign.shared
    spelled = made.pair.draft_encoder.encode(" €!")[:2]
    assert draft.token_ids == tuple(made.pair.target_of[i] for i in spelled)
    assert draft.confidence == (0.5, 0.5)
    assert made.oracle.sampling[1] == DraftSampling(key=9, rule="leviathan"), "greedy but for its couplings"
    # In the middle of a character the sequences do not align: drafted greedily, and the text mapped.
    euro = target.encode("€", add_special_tokens=False)
    made.drafter.commit(1, [*target.encode(" "), euro[0]])
    draft = made.ask(4)
    assert made.oracle.queries[0].coupling is None
    assert draft.token_ids[:2] == (euro[1], *target.encode("!"))


def test_confidence_belongs_to_the_token_that_holds_the_first_byte(rig, tables) -> None:  # type: ignore[no-untyped-def]
    made, target = rig("bytes", "toy"), tables["toy"]
    made.oracle.text = "a the dog"
    made.open(target.encode("a"))
    draft = made.ask(9)
    assert draft.token_ids == tuple(target.encode(" the dog"))
    drafted = made.pair.draft_encoder.encode(" the dog")
    product = 1.0
    for value in draft.confidence:
        product *= value
    assert len(draft.confidence) == len(draft.token_ids) < len(drafted)
    assert product == pytest.approx(0.5 ** len(drafted))
    assert draft.exit_depth == 1
    assert len(made.ask(1).token_ids) == 1


def test_a_long_prompt_is_absorbed_in_the_background(rig, tables) -> None:  # type: ignore[no-untyped-def]
    made, target = rig("toy", "pieces"), tables["pieces"]
    text = TEXTS[0] * 40
    ids = target.encode(text, add_special_tokens=False)
    made.open(ids)
    assert not made.drafter.work(), "nobody has asked yet"
    before = made.pair.draft_encoder.chars
    assert made.ask().token_ids == ()
    assert made.pair.draft_encoder.chars == before
    steps = 0
    while made.drafter.work():
        spent = made.pair.draft_encoder.chars - before
        before += spent
        assert spent <= CHUNK * 8 + HARD_CHARS
        steps += 1
    assert steps == -(-len(ids) // CHUNK)
    made.oracle.text = text + "ok then"
    assert made.ask().token_ids != ()
    assert made.pair.draft_encoder.chars - before <= HARD_CHARS + 60


def test_prompts_of_several_targets_are_absorbed_in_turns(rig, tables) -> None:  # type: ignore[no-untyped-def]
    """Three long prompts of one target, of which another with a shorter one does not wait for more than as
    many pieces as it has itself."""
    made, target = rig("toy", "pieces"), tables["pieces"]
    long = target.encode(TEXTS[0] * 80, add_special_tokens=False)
    short = target.encode(TEXTS[0] * 30, add_special_tokens=False)
    assert len(long) > len(short) > 2 * CHUNK
    pieces = -(-len(short) // CHUNK)
    many, few = ([(stream << SCOPE_SHIFT) + n for n in range(3)] for stream in (1, 2))
    for sid in (*many, few[0]):
        made.open(long if sid in many else short, sid=sid)
        made.ask(sid=sid)
    steps = 0
    while few[0] not in made.oracle.tokens:
        assert made.drafter.work()
        steps += 1
    assert steps == 2 * pieces
    assert not made.oracle.tokens.keys() & set(many), "nothing of the others is done yet"
    while made.drafter.work():
        steps += 1
    assert steps == pieces + 3 * -(-len(long) // CHUNK), "one after the other in the end, and no piece twice"
    assert list(made.oracle.tokens) == [few[0], *many]


def test_sessions_without_room_say_so_and_are_opened_later(rig, tables) -> None:  # type: ignore[no-untyped-def]
    made, target = rig("toy", "pieces"), tables["pieces"]
    made.oracle.text, made.oracle.refuses = "the end", True
    made.open(target.encode("the"))
    assert (made.ask().error, made.ask().error) == ("capacity", "capacity")
    made.oracle.refuses = False
    assert made.ask().token_ids != ()
    made.drafter.close(1)
    assert made.oracle.tokens == {}


def test_own_sessions_pass_unchanged_and_ids_of_padding_are_refused(rig) -> None:  # type: ignore[no-untyped-def]
    made = rig("toy", "pieces")
    size = made.pair.draft.size
    made.oracle.text = "the end"
    own = tuple(made.pair.draft_encoder.encode("the"))
    made.drafter.open(SessionOpen(5, own, len(own), DraftSampling(key=1)))
    assert made.oracle.tokens[5] == list(own)
    assert made.ask(2, sid=5).token_ids == tuple(made.pair.draft_encoder.encode(" end")[:2])
    assert made.oracle.queries[0].coupling is None
    with pytest.raises(DrafterError, match=rf"{size} is past the draft's {size}"):
        made.drafter.open(SessionOpen(6, (1, size), 2, DraftSampling(key=1)))
    with pytest.raises(DrafterError, match="past"):
        made.drafter.commit(5, [size + 7])
