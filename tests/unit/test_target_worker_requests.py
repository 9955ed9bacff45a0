"""What is refused, what a failing engine means, resuming, and the worker's other calls."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llguidance import LLMatcher

from actors.drafting.interface import TargetIdentity
from actors.sampling.grammar import GrammarCompiler
from actors.sampling.params import (
    GrammarKind,
    GrammarSpec,
    ParameterError,
    SamplingParams,
    SpeculationParams,
)
from actors.target_worker.messages import GenerationRequest
from actors.text.messages import ChatMessage
from actors.text.tokenizer import INLINE_CHARS, TextTokenizer
from tests.scripted_engine import rounds, until
from tests.toy_tokenizers import EOS, byte_level_folder
from tests.worker_rig import CONTEXT, Rig, ask, scripted

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


# -- refusals -----------------------------------------------------------------------------------------------


def ask_under(text: str, kind: GrammarKind = "regex") -> GenerationRequest:
    return ask(sampling=SamplingParams(grammar=GrammarSpec(kind, text)))


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
    (lambda: ask(sampling=SamplingParams(allowed_token_ids=(9999,))), "allowed_token_ids", "9999"),
    (lambda: ask(bad_words=("x", " ")), "bad_words", "blank"),
    (lambda: ask(bad_words=("x", "y" * 257)), "bad_words", "256 characters"),
    (lambda: ask(bad_words=("\ud800",)), "bad_words", "Unicode"),
    (lambda: ask(output_ids_so_far=(9999,)), "output_ids_so_far", "9999"),
    (lambda: ask(output_ids_so_far=(5,), n=2), "n", "resumed"),
    (lambda: ask(speculation=SpeculationParams(drafter="eagle")), "speculation.drafter", "eagle"),
    (lambda: ask(speculation=SpeculationParams(exit_depth=3)), "speculation.exit_depth", "2, 4"),
    (
        lambda: ask(speculation=SpeculationParams(drafter="prompt_lookup", exit_depth=2)),
        "speculation.exit_depth",
        "no exits",
    ),
    (lambda: ask_under("\ud800"), "response_format", "Unicode"),
    (lambda: ask_under("[" * 100_000, "json_schema"), "response_format", "nested too deeply"),
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


async def test_the_engine_gets_the_ids_of_bad_words(folder: Path, tokenizer: TextTokenizer) -> None:
    def ids(*texts: str) -> set[tuple[int, ...]]:
        return {tuple(tokenizer.encode(text)) for text in texts}

    async with Rig(folder, scripted([[60]])) as rig:
        await rig.choice(ask(bad_words=("end", " two", "en!", "two")))
        sampling = rig.fake.added[0].sampling
    # " end" is a space and "end"; " two" begins with the token " t".
    assert set(sampling.bad_sequences) == ids("end", "two", " two", "en!")
    assert len(sampling.bad_sequences) == 4


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
    async with Rig(folder, lambda r: rounds(r, [[60]] * 3000)) as rig:
        rig.fake.step_by_step()
        running = asyncio.create_task(rig.chunks(ask(max_tokens=None)))
        await until(lambda: rig.fake.steps == 1)
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


async def test_a_resumed_choice_keeps_its_number(folder: Path) -> None:
    """Which is that of its noise."""
    async with Rig(folder, scripted([[60]])) as rig:
        whole = await rig.choice(ask(first_choice=2, output_ids_so_far=(61,)))
        assert [request.choice for request in rig.fake.added] == [2]
    assert whole.index == 2


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
    assert rig.identity == TargetIdentity("r0", "toy", tokenizer.vocab_size, tokenizer.vocab_hash)
    state = await rig.worker.state()
    assert (state.info, state.replica_id, state.engine["running"]) == (info, "r0", 0)
    assert state.draft_workers == ({"id": "w0", "late": 0},)
    await rig.worker.reset()
    assert rig.fake.resets == ["all"]


async def test_exits_are_refused_where_nobody_drafts_at_them(folder: Path) -> None:
    """The configuration names exits, but the nested draft has another tokenizer than this model."""
    async with Rig(folder, scripted([[5]]), drafters=("prompt_lookup",)) as rig:
        (chunk,) = await rig.chunks(ask(speculation=SpeculationParams(exit_depth=4)))
        assert rig.fake.added == []
    assert chunk.error is not None
    assert (chunk.error.kind, chunk.error.param) == ("invalid", "speculation.exit_depth")
    assert "this model has: none" in chunk.error.message


@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_never_more_than_max_tokens(folder: Path, max_tokens: int) -> None:
    """Whatever the engine sends."""
    async with Rig(folder, scripted([[60] * 9], finish=None)) as rig:
        whole = await rig.choice(ask(max_tokens=max_tokens))
    assert len(whole.token_ids) == max_tokens
    assert whole.finish_reason == "length"


# -- grammars -----------------------------------------------------------------------------------------------


async def test_a_burst_of_new_grammars_holds_up_neither_known_ones_nor_long_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, let_through, building = GrammarCompiler._build, threading.Event(), threading.Event()

    def held(self: GrammarCompiler, spec: GrammarSpec) -> LLMatcher:
        if spec.text != "known":
            building.set()
            assert let_through.wait(20.0)
        return build(self, spec)

    monkeypatch.setattr(GrammarCompiler, "_build", held)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with Rig(folder, scripted([[5]])) as rig:
        assert (await rig.choice(ask_under("known"))).error is None
        burst = [asyncio.create_task(rig.choice(ask_under(f"new{i}"))) for i in range(4)]
        try:
            await until(building.is_set)
            assert (await rig.choice(ask_under("known"))).error is None
            assert len(await rig.worker.tokenize("x" * (INLINE_CHARS + 1))) > 0
            assert not any(task.done() for task in burst)
        finally:
            let_through.set()
        assert [chunk.error for chunk in await asyncio.gather(*burst)] == [None] * 4
