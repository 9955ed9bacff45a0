"""Log-probabilities, echo, several choices, coalescing and cancellation."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from actors.engine.messages import EngineRequest, RequestOutput
from actors.sampling.params import SamplingParams
from actors.sampling.results import TokenLogprobs
from actors.target_worker.messages import (
    GenerationRequest,
    Usage,
)
from actors.text.tokenizer import TextTokenizer
from tests.scripted_engine import StepClock, rounds, until
from tests.toy_tokenizers import byte_level_folder
from tests.worker_rig import Rig, ask, blocks_of, scripted

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


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
    folder: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, and begins when all that came before it has been delivered."""
    ids, clock, loop = tokenizer.encode("x" * 40), StepClock(), asyncio.get_running_loop()
    monkeypatch.setattr("actors.engine.loop.time", clock)
    monkeypatch.setattr("actors.target_worker.generation.time", clock)

    async def deliver() -> None:
        for _ in range(20):  # turns of the event loop, of which an output takes a few
            await asyncio.sleep(0)

    def begin() -> None:
        asyncio.run_coroutine_threadsafe(deliver(), loop).result(20.0)
        clock.tick()

    async with Rig(folder, scripted([[i] for i in ids]), interval_ms=12_000.0) as rig:
        rig.fake.on_step = begin
        chunks = await rig.chunks(ask(max_tokens=40))
    assert [len(c.token_ids) for c in chunks] == [1, 12, 12, 12, 3]
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
    async with Rig(folder, lambda r: rounds(r, [[60]] * 3000)) as rig:
        rig.fake.step_by_step()
        stream = rig.worker.generate(ask(n=3, max_tokens=None))
        await anext(stream)
        if how == "close":
            await stream.aclose()
        else:
            running = asyncio.Event()

            async def drain() -> None:
                async for _ in stream:
                    running.set()

            task = asyncio.create_task(drain())
            rig.fake.gate.set()
            async with asyncio.timeout(5):
                await running.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        rig.fake.gate.set()
        await until(lambda: len(rig.fake.aborted) == 3)
        assert (await rig.worker.state()).engine["running"] == 0
