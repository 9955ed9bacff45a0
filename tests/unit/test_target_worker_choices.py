"""From outputs to chunks: where a choice ends and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.messages import EngineRequest, RequestOutput
from actors.sampling.params import SamplingParams
from actors.target_worker.messages import (
    GenerationChunk,
    SpeculationStats,
    Usage,
)
from actors.target_worker.output import ChoiceStream, Prompt, merge
from actors.text.tokenizer import TextTokenizer
from tests.scripted_engine import rounds, until
from tests.toy_tokenizers import EOS, byte_level_folder
from tests.worker_rig import Rig, ask, blocks_of, scripted

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


# -- where a choice ends ------------------------------------------------------------------------------------


async def test_plain_text_usage_and_finish(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("ok 👍 end!")
    async with Rig(folder, scripted(blocks_of(ids, [3, 1, 2]))) as rig:
        chunks = await rig.chunks(ask())
        whole = await rig.choice(ask())
    assert "".join(c.text for c in chunks) == whole.text == "ok 👍 end!"
    assert whole.token_ids == tuple(ids)
    assert [n for n, _ in whole.rounds] == [len(b) for b in blocks_of(ids, [3, 1, 2])]
    assert whole.usage == Usage(len(tokenizer.encode("the end")), len(ids))
    assert (whole.finish_reason, whole.stop_reason, whole.seed) == ("length", None, 7)
    assert chunks[0].seed == 7
    assert all(c.seed is None and c.usage is None for c in chunks[1:-1])
    assert [c.prompt_usage for c in chunks] == [
        Usage(len(tokenizer.encode("the end")), 0),
        None,
        None,
        *[None] * (len(chunks) - 3),
    ]


@pytest.mark.parametrize("sizes", [[], [2, 3], [5, 5, 5], [40]])
async def test_stop_string_split_over_tokens_and_rounds(
    folder: Path, tokenizer: TextTokenizer, sizes: list[int]
) -> None:
    ids = tokenizer.encode("ok and <stop> more")
    async with Rig(folder, scripted(blocks_of(ids, sizes), logprobs=True, finish=None)) as rig:
        chunks = await rig.chunks(
            ask(stop=("<stop>", "zzz"), max_tokens=40, sampling=SamplingParams(logprobs=1))
        )
        await until(lambda: not rig.fake.running)  # the engine is told that the choice has ended
    shown = [c.text for c in chunks]
    assert "".join(shown) == "ok and "
    assert not any("<" in text for text in shown)
    last = chunks[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "<stop>")
    delivered = [t for c in chunks for t in c.token_ids]
    assert tokenizer.decode(delivered).endswith("<stop>")
    assert len([p for c in chunks for p in c.logprobs or ()]) == len(delivered)
    assert last.usage is not None
    assert last.usage.completion_tokens == len(delivered) == sum(n for c in chunks for n, _ in c.rounds)


async def test_statistics_count_what_was_delivered_of_a_cut_block(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("abX12")
    assert len(ids) == 5
    async with Rig(folder, scripted([ids[:1], ids[1:]], drafted=6)) as rig:
        whole = await rig.choice(ask(stop=("X",)))
    assert whole.text == "ab"
    assert whole.token_ids == tuple(ids[:3])
    assert whole.rounds == ((1, 0), (2, 2))
    assert whole.speculation == SpeculationStats(2, 12, 2, (1, 0, 1, 0, 0, 0, 0), (("scripted", 12, 2),))


async def test_eos_in_the_middle_of_a_block_ends_everything(folder: Path, tokenizer: TextTokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    async with Rig(folder, scripted([[a], [b, EOS, c, c]], drafted=3, logprobs=True)) as rig:
        whole = await rig.choice(ask(sampling=SamplingParams(logprobs=1)))
    assert whole.text == "ab"
    assert whole.token_ids == (a, b, EOS)
    assert [p.chosen.token for p in whole.logprobs or ()] == ["a", "b", "</s>"]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", None)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    assert whole.speculation == SpeculationStats(2, 6, 2, (1, 0, 1, 0), (("scripted", 6, 2),))


@pytest.mark.parametrize(("ignore_eos", "reason"), [(False, None), (True, "length")])
async def test_ignore_eos(
    folder: Path, tokenizer: TextTokenizer, ignore_eos: bool, reason: str | None
) -> None:
    a, b = tokenizer.encode("ab")
    async with Rig(folder, scripted([[a, EOS, b]])) as rig:
        whole = await rig.choice(ask(sampling=SamplingParams(ignore_eos=ignore_eos)))
    assert whole.text == ("ab" if ignore_eos else "a")
    assert whole.finish_reason == (reason or "stop")


async def test_stop_token_ids_name_themselves(folder: Path, tokenizer: TextTokenizer) -> None:
    a, b = tokenizer.encode("ab")
    async with Rig(folder, scripted([[a, b]])) as rig:
        whole = await rig.choice(ask(sampling=SamplingParams(stop_token_ids=(b,))))
    assert (whole.text, whole.token_ids) == ("a", (a, b))
    assert (whole.finish_reason, whole.stop_reason) == ("stop", b)


@pytest.mark.parametrize("sizes", [[], [2, 3], [40]])
async def test_what_stops_may_stay_in_the_text(
    folder: Path, tokenizer: TextTokenizer, sizes: list[int]
) -> None:
    ids = tokenizer.encode("ok <stop> more")
    async with Rig(folder, scripted(blocks_of(ids, sizes), finish=None)) as rig:
        whole = await rig.choice(ask(stop=("<stop>",), include_stop=True))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("ok <stop>", "stop", "<stop>")
    ids = tokenizer.encode("ok <sto!")
    (mark,) = tokenizer.encode("!")
    for stop, said in ((mark, "ok <sto!"), (EOS, "ok <sto")):
        sampling = SamplingParams(seed=7, stop_token_ids=(mark,))
        script = scripted(blocks_of([*ids[:-1], stop, *ids], sizes), finish=None)
        async with Rig(folder, script) as rig:  # "<sto" is held back until then
            whole = await rig.choice(ask(stop=("<stop>",), include_stop=True, sampling=sampling))
        assert (whole.text, whole.finish_reason) == (said, "stop")
        assert whole.token_ids[-1] == stop


async def test_stop_strings_wait_for_min_tokens(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("aXbXcX")
    async with Rig(folder, scripted([ids])) as rig:
        whole = await rig.choice(ask(stop=("X",), sampling=SamplingParams(min_tokens=3)))
    assert whole.text == "aXb"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 4


async def test_held_text_is_shown_when_the_choice_ends_otherwise(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("ab<st")
    async with Rig(folder, scripted([[i] for i in ids])) as rig:
        assert (await rig.choice(ask(stop=("<stop>",)))).text == "ab<st"
    async with Rig(folder, scripted([[*ids, EOS]])) as rig:
        assert (await rig.choice(ask(stop=("<stop>",)))).text == "ab<st"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_choices_do_not_depend_on_how_tokens_are_grouped(
    tokenizer: TextTokenizer, data: st.DataObject
) -> None:
    """Drafting changes the size of rounds and nothing else: text, ids, logprobs, usage, finish."""
    ids = data.draw(
        st.lists(
            st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from([100, 101])),
            min_size=1,
            max_size=25,
        )
    )
    stops = data.draw(st.lists(st.sampled_from(["ab", "b", "aab", "end", "�"]), max_size=3))
    sampling = SamplingParams(
        max_tokens=25, min_tokens=data.draw(st.integers(0, 6)), logprobs=1, eos_token_ids=(EOS,)
    )
    request = EngineRequest("r", (1,), sampling)

    def run(sizes: list[int]) -> tuple[object, ...]:
        choice = ChoiceStream(tokenizer, 0, Prompt((1,)), sampling, stops)
        whole: GenerationChunk | None = None
        for output in rounds(request, blocks_of(ids, sizes), logprobs=True):
            whole = merge(whole, choice.push(output))
            if choice.finished:
                break
        assert whole is not None
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(whole.token_ids) == len(whole.logprobs or ())
        return (
            whole.text,
            whole.token_ids,
            whole.logprobs,
            whole.usage,
            whole.finish_reason,
            whole.stop_reason,
        )

    assert run([]) == run(data.draw(st.lists(st.integers(1, 9), max_size=10)))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_resuming_continues_the_same_text(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    """The first part on one worker, the rest on another, equals one run; usage covers both parts."""
    ids = [*tokenizer.encode("ab 👍<stop end"), EOS]
    stops = data.draw(st.lists(st.sampled_from(["<stop>", "<", "👍<s", "p end"]), max_size=2))
    cut = data.draw(st.integers(1, len(ids)))
    sampling = SamplingParams(max_tokens=99, eos_token_ids=(EOS,))
    request = EngineRequest("r", (1,), sampling)

    def run(tokens: list[int], so_far: list[int]) -> GenerationChunk:
        choice = ChoiceStream(tokenizer, 0, Prompt((1,)), sampling, stops, so_far)
        return choice.push(
            RequestOutput(request.request_id, tuple(tokens), finish_reason="length" if not tokens else None)
        )

    whole, first = run(ids, []), run(ids[:cut], [])
    rest = run(ids[cut:], list(first.token_ids)) if first.finish_reason is None else None
    parts = [first, rest] if rest is not None else [first]
    assert "".join(p.text for p in parts) == whole.text
    assert tuple(t for p in parts for t in p.token_ids) == whole.token_ids
    assert (parts[-1].usage, parts[-1].stop_reason) == (whole.usage, whole.stop_reason)
