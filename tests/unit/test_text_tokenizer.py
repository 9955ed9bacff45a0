"""Tokens to text: what each id adds, and that how ids are grouped into deltas changes nothing."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actors.sampling.params import ParameterError
from actors.text.detokenizer import IncrementalDetokenizer
from actors.text.tokenizer import INLINE_CHARS, TextTokenizer
from tests.toy_tokenizers import BOS, EOS, PAD, byte_fallback_folder, byte_level_folder

SAMPLES = ("the end!", " the  end", "naïve café", "日本語 €5", "👩‍👩‍👧 ok 👍🏽", "a\n\n\tb", "", "é")
KINDS = ("byte_level", "byte_fallback", "metaspace")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    root: Path = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": TextTokenizer(byte_level_folder(root / "level")),
        "byte_fallback": TextTokenizer(byte_fallback_folder(root / "fallback")),
        "metaspace": TextTokenizer(byte_fallback_folder(root / "metaspace", metaspace=True)),
    }


def deltas(
    tokenizer: TextTokenizer, ids: list[int], cuts: list[int], after: tuple[int, ...] = ()
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, after)
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    texts = [detokenizer.feed(ids[a:b]) for a, b in pairwise(bounds)]
    assert detokenizer.chars == sum(map(len, texts))
    return texts


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_deltas_make_the_whole_for_every_split(
    tokenizers: dict[str, TextTokenizer], kind: str, data: st.DataObject
) -> None:
    """Any ids, invalid bytes and special tokens included."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=8))
    one_by_one = deltas(tokenizer, ids, list(range(len(ids))))
    whole = deltas(tokenizer, ids, [])
    assert "".join(one_by_one) == "".join(whole) == "".join(deltas(tokenizer, ids, cuts))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(SAMPLES)), special_at=st.integers(0, 40))
def test_equals_the_tokenizers_own_decode_for_valid_text(
    tokenizers: dict[str, TextTokenizer], kind: str, text: str, special_at: int
) -> None:
    tokenizer = tokenizers[kind]
    text = text.replace("▁", "")  # SentencePiece tokenizers write it as a space
    ids = tokenizer.encode(text)
    ids.insert(special_at % (len(ids) + 1), EOS)
    own = tokenizer.hf.decode(ids, skip_special_tokens=True)
    assert IncrementalDetokenizer(tokenizer).feed(ids) == own
    assert tokenizer.decode(ids, skip_special_tokens=True) == own
    if kind != "metaspace":  # Metaspace drops more than it prepended, so it does not give the text back
        assert own == text


@settings(deadline=None)
@given(data=st.binary(max_size=24))
def test_bytes_decode_as_python_and_the_library_decode_them(
    tokenizers: dict[str, TextTokenizer], data: bytes
) -> None:
    tokenizer = tokenizers["byte_level"]
    by_byte = {tokenizer.token_bytes(i): i for i in range(3, 3 + 256)}
    ids = [by_byte[bytes([b])] for b in data]
    closed = [*ids, by_byte[b"."]]  # nothing is incomplete at the end
    text = IncrementalDetokenizer(tokenizer).feed(closed)
    assert text == (data + b".").decode("utf-8", errors="replace") == tokenizer.hf.decode(closed)


def test_incomplete_bytes_at_the_end_are_dropped(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("ok 👍")
    assert IncrementalDetokenizer(tokenizer).feed(ids) == "ok 👍"
    assert IncrementalDetokenizer(tokenizer).feed(ids[:-1]) == "ok "
    assert tokenizer.decode(ids[:-1]) == "ok �"


def test_every_id_has_bytes(tokenizers: dict[str, TextTokenizer]) -> None:
    level, fallback = tokenizers["byte_level"], tokenizers["byte_fallback"]
    assert sorted(level.token_bytes(i) for i in range(3, 259)) == [bytes([b]) for b in range(256)]
    assert level.token_bytes(EOS) == b""
    assert level.token_text(EOS) == "</s>"
    assert level.token_bytes(10**6) == b""
    assert level.token_bytes(-1) == b""
    assert level.token_text(10**6) == ""
    vocab = fallback.hf.get_vocab()
    assert fallback.token_bytes(vocab["<0xE2>"]) == b"\xe2"
    assert fallback.token_text(vocab["<0xE2>"]) == "�"
    assert fallback.token_bytes(vocab["▁the"]) == b" the"
    assert fallback.token_bytes(vocab["é"]) == "é".encode()


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace"])
def test_first_space_is_dropped_only_at_the_start_of_a_text(
    tokenizers: dict[str, TextTokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the the")
    assert IncrementalDetokenizer(tokenizer).feed([BOS, *ids]) == "the the"
    assert IncrementalDetokenizer(tokenizer, after=[BOS]).feed(ids) == " the the"


def test_a_character_that_the_prompt_began_is_completed(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("x👍!")
    for cut in range(1, len(ids)):
        before = IncrementalDetokenizer(tokenizer).feed(ids[:cut])
        assert before + IncrementalDetokenizer(tokenizer, after=ids[:cut]).feed(ids[cut:]) == "x👍!"


def test_end_ids_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    assert TextTokenizer(byte_level_folder(tmp_path / "a", end_ids=EOS)).eos_token_ids == (EOS,)
    assert TextTokenizer(byte_level_folder(tmp_path / "b", end_ids=[PAD])).eos_token_ids == (EOS, PAD)
    assert TextTokenizer(byte_level_folder(tmp_path / "c", end_ids=None)).eos_token_ids == (EOS,)


def test_vocab_hash_tells_vocabularies_apart(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    same = TextTokenizer(byte_level_folder(tmp_path, template=None, end_ids=[PAD]))
    assert same.vocab_hash == tokenizers["byte_level"].vocab_hash
    assert same.vocab_hash != tokenizers["byte_fallback"].vocab_hash
    assert tokenizers["byte_fallback"].vocab_hash == tokenizers["metaspace"].vocab_hash


def test_offsets_say_where_each_token_begins(tokenizers: dict[str, TextTokenizer]) -> None:
    ids, starts = tokenizers["byte_level"].encode_with_offsets("end 👍!")
    assert len(ids) == len(starts)
    assert starts[0] == 0
    assert starts[-1] == len("end 👍")


async def test_long_texts_are_encoded_in_a_thread(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    text = "the end! " * (INLINE_CHARS // 4)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    ids, _ = await tokenizer.encode_async(text)
    ticker.cancel()
    assert ids == tokenizer.encode(text)
    assert ticks > 1


def test_unpaired_surrogates_are_refused_by_name(tokenizers: dict[str, TextTokenizer]) -> None:
    with pytest.raises(ParameterError) as caught:
        tokenizers["byte_level"].encode("a\ud800b", param="messages")
    assert caught.value.param == "messages"


def test_a_decoder_without_token_by_token_form_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.decoder = decoders.CTC()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CTC"):
        TextTokenizer(tmp_path)
