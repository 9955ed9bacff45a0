"""Requests go on where a lost replica stopped: same tokens, nothing twice, each choice by itself, N times at
most, and also where the other replica's queue is full just then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.sampling.params import SamplingParams
from actors.target_worker.messages import GenerationChunk, GenerationRequest, RequestError, Usage
from cluster.gateway import resume
from cluster.gateway.errors import ApiError, invalid, not_ready, overloaded
from tests.unit.fake_target import FakeTarget

LENGTH = 6
GONE = RequestError("unavailable", "the engine was closed")


@dataclass
class Replicas(FakeTarget):
    """Token i of choice c is 97 + 10 c + i, whoever writes it. The replica of call n is lost after `lives[n]`
    chunks: the call raises, its stream ends early, or the worker says that it is unavailable. Calls of `full`
    find the queue full."""

    lives: tuple[int, ...] = ()
    how: str = "raises"
    full: frozenset[int] = frozenset()
    retry_after_s: float = 0.001
    seen: list[GenerationRequest] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.seen.append(request)
        if len(self.seen) - 1 in self.full:
            if self.how == "raises":
                raise overloaded("the queue is full", self.retry_after_s)
            error = RequestError("overloaded", "the queue is full", retry_after_s=self.retry_after_s)
            yield GenerationChunk(error=error)
            return
        call = len(self.seen) - 1
        left = self.lives[call] if call < len(self.lives) else 1000
        for chunk in self._written(request):
            if left == 0:
                if self.how == "raises":
                    raise not_ready("the target worker is not available")
                if self.how == "says":
                    yield GenerationChunk(error=GONE)
                return
            left -= 1
            await asyncio.sleep(0)
            yield chunk

    def _written(self, request: GenerationRequest) -> list[GenerationChunk]:
        done = request.output_ids_so_far
        chunks = []
        for i in range(len(done or ()), LENGTH):
            for choice in range(request.first_choice, request.first_choice + request.n):
                token, last = 97 + 10 * choice + i, i == LENGTH - 1
                chunks.append(
                    GenerationChunk(
                        index=choice,
                        text=chr(token),
                        token_ids=(token,),
                        prompt_token_ids=(1, 2) if i == 0 and done is None else None,
                        finish_reason="length" if last else None,
                        usage=Usage(0 if choice else 2, LENGTH) if last else None,
                    )
                )
        return chunks


def ask(n: int = 1) -> GenerationRequest:
    return GenerationRequest("r", SamplingParams(seed=1, prompt_logprobs=1), prompt_ids=(1, 2), n=n)


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "FIRST_DELAY_S", 0.0)


async def collect(target: Replicas, n: int = 1, max_resumes: int = 3) -> tuple[list[str], int, list[int]]:
    """Text of each choice, prompts delivered, and resumes counted."""
    texts, prompts, resumes = [""] * n, 0, [0]

    def count() -> None:
        resumes[0] += 1

    async for chunk in resume.generate(target, ask(n), max_resumes, count):
        texts[chunk.index] += chunk.text
        prompts += chunk.prompt_token_ids is not None
    return texts, prompts, resumes


def expected(n: int) -> list[str]:
    return ["".join(chr(97 + 10 * c + i) for i in range(LENGTH)) for c in range(n)]


@pytest.mark.parametrize("how", ["raises", "ends", "says"])
@pytest.mark.parametrize("lives", [(), (0,), (1,), (5,), (2, 0, 3), (0, 0, 0)])
async def test_a_lost_replica_costs_a_pause(how: str, lives: tuple[int, ...]) -> None:
    target = Replicas(lives=lives, how=how)
    assert await collect(target) == (expected(1), 1, [len(lives)])
    emitted = 0
    for request, lived in zip(target.seen[1:], lives, strict=True):
        emitted += lived
        ids = tuple(ord(c) for c in expected(1)[0][:emitted])
        assert request.output_ids_so_far == (ids if emitted else None)
        # The prompt's log-probabilities came with the first chunk and would cost a pass over it.
        assert request.sampling.prompt_logprobs == (None if emitted else 1)


@given(n=st.integers(1, 4), lives=st.lists(st.integers(0, 9), max_size=3).map(tuple))
def test_every_choice_goes_on_by_itself(n: int, lives: tuple[int, ...]) -> None:
    texts, prompts, resumes = asyncio.run(collect(Replicas(lives=lives), n, max_resumes=20))
    assert texts == expected(n)
    assert prompts == n
    assert resumes[0] <= len(lives)


async def test_at_most_so_many_times() -> None:
    target = Replicas(lives=(1, 0, 0, 0))
    with pytest.raises(ApiError) as caught:
        await collect(target, max_resumes=2)
    assert caught.value.status == 503
    assert len(target.seen) == 3
    with pytest.raises(ApiError):
        await collect(Replicas(lives=(0,)), max_resumes=0)


@pytest.mark.parametrize("how", ["raises", "says"])
async def test_a_full_queue_is_waited_for_once_a_replica_was_lost(how: str) -> None:
    target = Replicas(lives=(2,), how=how, full=frozenset(range(1, 8)))
    # Such a wait is no loss: it counts neither as a resume nor against `max_resumes`.
    assert await collect(target, max_resumes=1) == (expected(1), 1, [1])
    assert len(target.seen) == 9
    assert {request.output_ids_so_far for request in target.seen[1:]} == {(97, 98)}

    before_the_first_token = Replicas(lives=(0,), how=how, full=frozenset({1, 2}))
    assert await collect(before_the_first_token) == (expected(1), 1, [1])


async def test_a_choice_that_finds_the_queue_full_waits_alone() -> None:
    target = Replicas(lives=(3,), full=frozenset({1, 4}))
    assert await collect(target, 3) == (expected(3), 3, [1])
    # The others went on: only the choice that was refused was asked for again.
    assert [request.first_choice for request in target.seen[1:]] == [0, 1, 2, 0, 0]


@pytest.mark.parametrize("how", ["raises", "says"])
async def test_a_full_queue_refuses_a_fresh_request_at_once(how: str) -> None:
    target = Replicas(how=how, full=frozenset({0}))
    if how == "raises":
        with pytest.raises(ApiError) as caught:
            await collect(target)
        assert caught.value.status == 429
    else:
        chunks = [chunk async for chunk in resume.generate(target, ask(), 3)]
        assert [chunk.error is not None and chunk.error.kind for chunk in chunks] == ["overloaded"]
    assert len(target.seen) == 1


async def test_the_wait_for_a_full_queue_is_as_long_as_told_and_ends_with_the_request() -> None:
    target = Replicas(lives=(1,), full=frozenset(range(1, 99)), retry_after_s=30.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(target), 0.1)
    assert len(target.seen) == 2


async def test_other_failures_are_not_retried() -> None:
    async def refused(request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        target.seen.append(request)
        raise invalid("prompt", "no")
        yield GenerationChunk()

    target = Replicas()
    target.generate = refused  # type: ignore[method-assign]
    with pytest.raises(ApiError) as caught:
        await collect(target)
    assert (caught.value.status, len(target.seen)) == (400, 1)

    broken = replace(GONE, kind="internal")
    failing = FakeTarget(script=lambda request: [GenerationChunk(error=broken)])
    chunks = [chunk async for chunk in resume.generate(failing, ask(), 3)]
    assert [chunk.error for chunk in chunks] == [broken]
    assert len(failing.requests) == 1


async def test_closing_cancels_every_choice() -> None:
    hold = asyncio.Event()
    target = FakeTarget(hold=hold)
    stream = resume.generate(target, ask(), 3)
    await anext(stream)
    await stream.aclose()
    assert (target.running, target.cancelled) == (0, 1)

    waiting = Replicas(lives=(3,))
    stream = resume.generate(waiting, ask(3), 3)
    async for _ in stream:
        if len(waiting.seen) > 2:
            break
    await stream.aclose()
    assert len(waiting.seen) == 4
