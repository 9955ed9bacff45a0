"""From outputs to chunks: where a choice ends, what is counted, and what is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.messages import EngineRequest, RequestOutput, TokenLogprobs
from actors.models.load import LoadedModel
from actors.models.runner import ModelInfo
from actors.sampling.params import ParameterError, SamplingParams, SpeculationParams
from actors.target_worker.messages import (
    ChatMessage,
    GenerationChunk,
    GenerationRequest,
    SpeculationStats,
    Usage,
)
from actors.target_worker.output import ChoiceStream, Prompt, merge
from actors.target_worker.worker import TargetIdentity, TargetWorker
from actors.text.tokenizer import TextTokenizer
from cluster.config import EngineConfig, ModelConfig
from tests.scripted_engine import Script, ScriptedEngine, rounds, until
from tests.toy_tokenizers import EOS, byte_level_folder

pytestmark = pytest.mark.timeout(30)
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


class FakeRunner:
    row_invariant = True
    supports_trees = False
    num_blocks = 8

    def __init__(self, info: ModelInfo) -> None:
        self.info = info


class FakeSource:
    drafters = ("prompt_lookup", "nested")


class Rig:
    """A worker around a scripted engine."""

    def __init__(
        self, folder: Path, script: Script, step_s: float = 0.0, interval_ms: float = 0.0, **engine: Any
    ) -> None:
        self.fake = ScriptedEngine(script, step_s)
        self.identity: TargetIdentity | None = None
        vocab = TextTokenizer(folder).vocab_size
        info = ModelInfo(
            "toy", "ToyForCausalLM", 2, 8, 2, 1, 4, vocab, CONTEXT, torch.float32, torch.device("cpu")
        )

        def load(source: str, **options: Any) -> LoadedModel:
            assert (source, options["dtype"], options["max_model_len"]) == ("toy-source", "float32", CONTEXT)
            return LoadedModel(FakeRunner(info), folder, info, "torch", "hash")  # type: ignore[arg-type]

        def source(target: TargetIdentity) -> Any:
            self.identity = target
            return FakeSource()

        self.worker = TargetWorker(
            ModelConfig(
                name="toy",
                source="toy-source",
                dtype="float32",
                max_model_len=CONTEXT,
                engine=EngineConfig(**{"max_num_seqs": 4, "max_queued": 2} | engine),
            ),
            build_draft_source=source,
            build_engine=lambda loaded, config, draft_source, compiler: self.fake,
            load=load,
            exits=(2, 4),
            replica_id="r0",
            stream_interval_ms=interval_ms,
        )

    async def __aenter__(self) -> Rig:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fake.gate.set()
        assert await self.worker.close(5.0)

    async def chunks(self, request: GenerationRequest) -> list[GenerationChunk]:
        async with asyncio.timeout(10):
            return [chunk async for chunk in self.worker.generate(request)]

    async def choice(self, request: GenerationRequest) -> GenerationChunk:
        """All chunks of the only choice, as one."""
        whole: GenerationChunk | None = None
        for chunk in await self.chunks(request):
            whole = merge(whole, chunk)
        assert whole is not None
        return whole


def ask(prompt: str = "the end", max_tokens: int | None = 16, **fields: Any) -> GenerationRequest:
    sampling = fields.pop("sampling", SamplingParams(seed=7))
    return GenerationRequest("req", sampling, prompt_text=prompt, max_tokens=max_tokens, **fields)


def scripted(blocks: Sequence[Sequence[int]], **options: Any) -> Script:
    return lambda request: rounds(request, blocks, **options)


def blocks_of(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut ids into rounds of these sizes; the rest one by one."""
    cuts = [0]
    for size in [*sizes, *[1] * len(ids)]:
        if cuts[-1] < len(ids):
            cuts.append(min(cuts[-1] + size, len(ids)))
    return [list(ids[a:b]) for a, b in pairwise(cuts)]


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
    assert whole.speculation == SpeculationStats(2, 12, 2, (1, 0, 1, 0, 0, 0, 0))


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
    assert whole.speculation == SpeculationStats(2, 6, 2, (1, 0, 1, 0))


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


# -- logprobs and echo --------------------------------------------------------------------------------------


async def test_logprobs_align_with_text(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("é end!")
    async with Rig(folder, scripted(blocks_of(ids, [2, 3]), logprobs=True)) as rig:
        whole = await rig.choice(ask(sampling=SamplingParams(logprobs=2)))
    positions = whole.logprobs or ()
    assert b"".join(p.chosen.token_bytes for p in positions).decode() == whole.text
    for token_id, position in zip(ids, positions, strict=True):
        assert position.chosen.token_id == token_id
        assert position.chosen.logprob == -float(token_id)
        assert [t.token_id for t in position.top] == [token_id, token_id + 1]
    assert [p.text_offset for p in positions] == [0, 0, 1, 2]  # two bytes of é, the space, "end!"


def _with_prompt_logprobs(request: EngineRequest) -> list[RequestOutput]:
    entries = (None, *(TokenLogprobs(t, -1.0, ((t, -1.0),)) for t in request.prompt_ids[1:]))
    outputs = rounds(request, [[50], [51]] if request.sampling.max_tokens else [])
    first = outputs[0] if outputs else RequestOutput(request.request_id, finish_reason="length")
    return [replace(first, prompt_logprobs=entries, cached_tokens=2), *outputs[1:]]


@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_of_the_prompt_with_its_logprobs_only(
    folder: Path, tokenizer: TextTokenizer, as_ids: bool
) -> None:
    ids = tuple(tokenizer.encode("the é end"))
    prompt = {"prompt_ids": ids} if as_ids else {"prompt_text": "the é end"}
    request = GenerationRequest(
        "req",
        SamplingParams(prompt_logprobs=1),
        max_tokens=0,
        echo=True,
        **prompt,
    )
    async with Rig(folder, _with_prompt_logprobs) as rig:
        chunks = await rig.chunks(request)
    assert len(chunks) == 1
    chunk = chunks[0]
    assert (chunk.text, chunk.prompt_token_ids, chunk.token_ids) == ("the é end", ids, ())
    assert (chunk.finish_reason, chunk.usage) == ("length", Usage(len(ids), 0, 2))
    positions = chunk.prompt_logprobs or ()
    assert positions[0] is None
    assert [p.chosen.token_id for p in positions[1:] if p] == list(ids[1:])
    last = positions[-1]
    assert last is not None
    assert chunk.text[last.text_offset :] == last.chosen.token


async def test_echo_comes_first_and_moves_offsets(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(" ok")
    async with Rig(folder, scripted([ids[:1], ids[1:]], logprobs=True)) as rig:
        chunks = await rig.chunks(ask("the end", echo=True, n=2, sampling=SamplingParams(logprobs=1)))
    for index in (0, 1):
        mine = [c for c in chunks if c.index == index]
        text = "".join(c.text for c in mine)
        assert text == "the end ok"
        assert mine[0].prompt_token_ids == tuple(tokenizer.encode("the end"))
        assert all(c.prompt_token_ids is None for c in mine[1:])
        for position in (p for c in mine for p in c.logprobs or ()):
            assert text[position.text_offset :].startswith(position.chosen.token)


async def test_max_tokens_zero_without_logprobs_needs_no_engine(folder: Path) -> None:
    async with Rig(folder, scripted([])) as rig:
        whole = await rig.choice(ask("the end", max_tokens=0, echo=True))
        assert rig.fake.added == []
    assert (whole.text, whole.finish_reason) == ("the end", "length")


# -- choices, coalescing, cancellation ----------------------------------------------------------------------


async def test_three_choices_merge(folder: Path, tokenizer: TextTokenizer) -> None:
    texts = ("ok", "the end!", "a")

    def script(request: EngineRequest) -> list[RequestOutput]:
        return rounds(request, [[i] for i in tokenizer.encode(texts[request.choice])])

    async with Rig(folder, script) as rig:
        chunks = await rig.chunks(ask(n=3, sampling=SamplingParams(seed=-5)))
        assert sorted(r.choice for r in rig.fake.added) == [0, 1, 2]
        assert {r.sampling.seed for r in rig.fake.added} == {-5}
    for index, text in enumerate(texts):
        mine = [c for c in chunks if c.index == index]
        assert "".join(c.text for c in mine) == text
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]
        usage = mine[-1].usage
        assert usage == Usage(
            len(tokenizer.encode("the end")) if index == 0 else 0, len(tokenizer.encode(text))
        )


async def test_rounds_are_coalesced_but_the_first_leaves_at_once(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("x" * 40)
    async with Rig(folder, scripted([[i] for i in ids]), step_s=0.005, interval_ms=60.0) as rig:
        chunks = await rig.chunks(ask(max_tokens=40))
    assert len(chunks[0].token_ids) == 1
    assert 3 <= len(chunks) <= 12
    assert [t for c in chunks for t in c.token_ids] == ids
    assert sum(len(c.rounds) for c in chunks) == 40


async def test_pending_text_leaves_when_it_is_due_though_the_engine_is_silent(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("abc")
    async with Rig(folder, scripted([[i] for i in ids], finish=None), interval_ms=30.0) as rig:
        stream = rig.worker.generate(ask())
        got: list[int] = []
        async with asyncio.timeout(5):
            while len(got) < 3:
                got.extend((await anext(stream)).token_ids)
        await stream.aclose()
    assert got == ids


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_aborts_every_choice(folder: Path, how: str) -> None:
    async with Rig(folder, lambda r: rounds(r, [[60]] * 3000), step_s=0.003) as rig:
        stream = rig.worker.generate(ask(n=3, max_tokens=None))
        await anext(stream)
        if how == "close":
            await stream.aclose()
        else:

            async def drain() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(drain())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: len(rig.fake.aborted) == 3, 2.0)
        assert (await rig.worker.state()).engine["running"] == 0


# -- refusals -----------------------------------------------------------------------------------------------


BAD: list[tuple[Callable[[], GenerationRequest], str, str]] = [
    (lambda: ask("x" * CONTEXT), "prompt", f"{CONTEXT} tokens.*{CONTEXT} tokens"),
    (lambda: ask("x" * (CONTEXT + 9)), "prompt", f"{CONTEXT + 9} tokens.*{CONTEXT} tokens"),
    (lambda: ask(""), "prompt", "at least one token"),
    (lambda: ask("\ud800"), "prompt", "Unicode"),
    (lambda: ask(n=0), "n", "at least 1"),
    (lambda: ask(n=7), "n", "at most 6"),
    (lambda: ask(stop=("",)), "stop", "empty"),
    (lambda: ask(max_tokens=-1), "max_tokens", "negative"),
    (lambda: ask(max_tokens=2, sampling=SamplingParams(min_tokens=3)), "min_tokens", "max_tokens"),
    (lambda: ask(sampling=SamplingParams(logit_bias={9999: 1.0})), "logit_bias", "9999"),
    (lambda: ask(sampling=SamplingParams(stop_token_ids=(-1,))), "stop_token_ids", "-1"),
    (lambda: ask(output_ids_so_far=(9999,)), "output_ids_so_far", "9999"),
    (lambda: ask(output_ids_so_far=(5,), n=2), "n", "resumed"),
    (lambda: ask(speculation=SpeculationParams(drafter="eagle")), "speculation.drafter", "eagle"),
    (lambda: ask(speculation=SpeculationParams(exit_depth=3)), "speculation.exit_depth", "2, 4"),
    (
        lambda: ask(speculation=SpeculationParams(drafter="prompt_lookup", exit_depth=2)),
        "speculation.exit_depth",
        "no exits",
    ),
    (lambda: GenerationRequest("r", SamplingParams(), prompt_ids=(1, 9999)), "prompt", "9999"),
    (lambda: GenerationRequest("r", SamplingParams(), prompt_ids=()), "prompt", "at least one"),
    (lambda: GenerationRequest("r", SamplingParams(), messages=()), "messages", "empty"),
    (
        lambda: GenerationRequest("r", SamplingParams(), messages=(ChatMessage("user", "x" * CONTEXT),)),
        "messages",
        f"{CONTEXT} tokens",
    ),
    (
        lambda: GenerationRequest("r", SamplingParams(), messages=(ChatMessage("user", "x"),), echo=True),
        "echo",
        "",
    ),
]


@pytest.mark.parametrize(("make", "param", "says"), BAD, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD)])
async def test_bad_requests_name_the_field(
    folder: Path, make: Callable[[], GenerationRequest], param: str, says: str
) -> None:
    async with Rig(folder, scripted([[60]])) as rig:
        chunks = await rig.chunks(make())
        assert rig.fake.added == []
    assert len(chunks) == 1
    error = chunks[0].error
    assert error is not None
    assert (error.kind, error.param) == ("invalid", param)
    assert error.message.startswith(param)
    assert re.search(says, error.message), error.message


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 6])
@pytest.mark.parametrize("asked", [None, 1, 50])
async def test_max_tokens_is_cut_to_what_the_context_holds(
    folder: Path, length: int, asked: int | None
) -> None:
    sampling = SamplingParams(min_tokens=1)
    async with Rig(folder, lambda r: rounds(r, [[60]] * r.sampling.max_tokens)) as rig:
        whole = await rig.choice(ask("x" * length, max_tokens=asked, sampling=sampling))
    room = CONTEXT - length
    assert len(whole.token_ids) == (room if asked is None else min(asked, room))
    assert whole.finish_reason == "length"


async def test_the_engine_gets_the_models_end_ids(folder: Path) -> None:
    async with Rig(folder, scripted([[60]])) as rig:
        await rig.choice(ask(speculation=SpeculationParams(drafter="nested", exit_depth=4)))
        assert rig.fake.added[0].sampling.eos_token_ids == (EOS,)
        assert rig.fake.added[0].speculation.exit_depth == 4


async def test_what_the_engine_rejects_is_invalid(folder: Path) -> None:
    async with Rig(folder, scripted([[60]])) as rig:
        rig.fake.add_error = ParameterError("response_format", "invalid json_schema")
        error = (await rig.chunks(ask(n=2)))[-1].error
    assert error is not None
    assert (error.kind, error.param) == ("invalid", "response_format")


async def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    async with Rig(folder, lambda r: rounds(r, [[60]] * 5)) as rig:
        rig.fake.gate.clear()
        running = asyncio.create_task(rig.chunks(ask(n=6)))
        await asyncio.sleep(0.05)
        error = (await rig.chunks(ask()))[-1].error
        assert error is not None
        assert error.kind == "overloaded"
        assert (error.retry_after_s or 0) >= 1.0
        rig.fake.gate.set()
        assert len([c for c in await running if c.finish_reason]) == 6


async def test_a_failing_engine_is_an_internal_error_of_the_request(folder: Path) -> None:
    async with Rig(folder, lambda r: rounds(r, [[60]] * 5)) as rig:
        rig.fake.fail_at = {2}
        chunks = await rig.chunks(ask())
        assert chunks[-1].error is not None
        assert chunks[-1].error.kind == "internal"
        assert (await rig.choice(ask())).finish_reason == "length"
        rig.worker.check_health()


async def test_draining_refuses_as_unavailable(folder: Path) -> None:
    async with Rig(folder, scripted([[60]])) as rig:
        await rig.choice(ask())
        assert await rig.worker.drain(1.0)
        error = (await rig.chunks(ask()))[-1].error
    assert error is not None
    assert error.kind == "unavailable"


async def test_an_aborted_request_is_unavailable(folder: Path) -> None:
    async with Rig(folder, lambda r: rounds(r, [[60]] * 3000), step_s=0.003) as rig:
        running = asyncio.create_task(rig.chunks(ask(max_tokens=None)))
        await asyncio.sleep(0.05)
        assert not await rig.worker.drain(0.01)
        error = (await running)[-1].error
    assert error is not None
    assert error.kind == "unavailable"


async def test_one_request_id_may_be_used_by_two_clients(folder: Path) -> None:
    async with Rig(folder, lambda r: rounds(r, [[60]] * 5)) as rig:
        results = await asyncio.gather(rig.choice(ask()), rig.choice(ask()))
    assert [len(r.token_ids) for r in results] == [5, 5]


# -- resume, chat, and the rest of the worker ---------------------------------------------------------------


async def test_a_resumed_request_emits_only_what_is_new(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("ok 👍!")
    async with Rig(folder, lambda r: rounds(r, [ids[len(r.output_ids_so_far) :]])) as rig:
        whole = await rig.choice(ask(echo=True, output_ids_so_far=tuple(ids[:5])))
        assert rig.fake.added[0].output_ids_so_far == tuple(ids[:5])
    assert tokenizer.decode(ids[:5]).rstrip("�") + whole.text == "ok 👍!"
    assert whole.prompt_token_ids is None
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(ids)


async def test_a_resumed_request_that_had_ended_ends_at_once(folder: Path, tokenizer: TextTokenizer) -> None:
    ids = tuple(tokenizer.encode("a<stop>"))
    async with Rig(folder, scripted([[60]])) as rig:
        stopped = await rig.choice(ask(stop=("<stop>",), output_ids_so_far=ids))
        full = await rig.choice(ask(max_tokens=7, output_ids_so_far=ids))
        assert rig.fake.added == []
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", "stop", "<stop>")
    assert (full.finish_reason, full.token_ids) == ("length", ())


async def test_chat(folder: Path, tokenizer: TextTokenizer) -> None:
    messages = (ChatMessage("user", "the end?"),)
    async with Rig(folder, scripted([tokenizer.encode("ok")])) as rig:
        whole = await rig.choice(GenerationRequest("r", SamplingParams(), messages=messages))
        assert rig.fake.added[0].prompt_ids == await rig.worker.render(messages)
    assert whole.text == "ok"


@pytest.fixture
async def rig(folder: Path) -> AsyncIterator[Rig]:
    async with Rig(folder, scripted([[60]])) as rig:
        yield rig


async def test_tokenize_and_detokenize(rig: Rig) -> None:
    ids = await rig.worker.tokenize("<s>the 👍 end!")
    assert await rig.worker.detokenize(ids) == "<s>the 👍 end!"
    with pytest.raises(ParameterError) as caught:
        await rig.worker.detokenize([1, 9999])
    assert caught.value.param == "tokens"


async def test_info_state_reset(rig: Rig, tokenizer: TextTokenizer) -> None:
    info = rig.worker.info()
    assert (info.id, info.max_model_len, info.dtype, info.backend) == ("toy", CONTEXT, "float32", "torch")
    assert info.drafters == ("prompt_lookup", "nested")
    assert info.row_invariant
    assert rig.identity == TargetIdentity("toy", tokenizer.vocab_size, tokenizer.vocab_hash)
    state = await rig.worker.state()
    assert (state.info, state.replica_id, state.engine["running"]) == (info, "r0", 0)
    assert state.draft_workers == ({"id": "w0", "late": 0},)
    await rig.worker.reset()
    assert rig.fake.resets == 1


@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_never_more_than_max_tokens(folder: Path, max_tokens: int) -> None:
    """Whatever the engine sends."""
    async with Rig(folder, scripted([[60] * 9], finish=None)) as rig:
        whole = await rig.choice(ask(max_tokens=max_tokens))
    assert len(whole.token_ids) == max_tokens
    assert whole.finish_reason == "length"
