"""The engine thread and its asyncio side: cancellation, admission, failures, bounded waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from actors.engine.async_engine import AsyncEngine, EngineUnavailable, Overloaded
from actors.engine.loop import Add, EngineLoop, Event, Stop
from actors.engine.messages import EngineRequest, RequestOutput
from actors.sampling.params import ParameterError, SamplingParams
from actors.turn_watch import MAX_CONSECUTIVE_FAILURES
from tests.scripted_engine import ScriptedEngine, StepClock, rounds, until

pytestmark = pytest.mark.timeout(30)


def request(name: str, tokens: int = 3) -> EngineRequest:
    return EngineRequest(name, (1, 2), SamplingParams(max_tokens=tokens))


def counting(req: EngineRequest) -> list[RequestOutput]:
    return rounds(req, [[10 + i] for i in range(req.sampling.max_tokens)])


class Rig:
    def __init__(self, step_s: float = 0.0, **options: float) -> None:
        self.fake = ScriptedEngine(counting, step_s)
        limits = {"max_running": 4, "max_queued": 4, "call_timeout_s": 5.0} | options
        self.engine = AsyncEngine(self.fake, **limits)  # type: ignore[arg-type]

    async def ids(self, req: EngineRequest) -> list[int]:
        return [token async for output in self.engine.generate(req) for token in output.token_ids]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.fake.gate.set()
    assert await rig.engine.close(5.0)
    assert rig.fake.closed


async def test_outputs_arrive_in_order_for_many_requests_at_once(rig: Rig) -> None:
    results = await asyncio.gather(*(rig.ids(request(f"r{i}", tokens=5)) for i in range(8)))
    assert results == [[10, 11, 12, 13, 14]] * 8
    assert rig.engine.live == 0
    assert rig.fake.aborted == []


def test_outputs_are_held_back_for_as_long_as_a_request_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first leaves at once, the last with what was held; another request's output takes all along."""
    batches: list[list[Event]] = []
    engine, clock = ScriptedEngine(counting), StepClock()
    engine.on_step = clock.tick
    monkeypatch.setattr("actors.engine.loop.time", clock)
    loop = EngineLoop(engine, batches.append)
    for name, interval_s in (("held", 5.0), ("eager", 0.0)):
        sampling = SamplingParams(max_tokens=30 if name == "held" else 3)
        loop.send(Add(EngineRequest(name, (1, 2), sampling, delivery_interval_s=interval_s)))
    loop.start()
    outputs: list[RequestOutput] = []
    deadline = time.monotonic() + 10.0
    while not any(output.request_id == "held" and output.finished for output in outputs):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        outputs = [event for batch in list(batches) for event in batch if isinstance(event, RequestOutput)]
    loop.send(Stop())
    assert loop.join(5.0)
    held = [
        [e for e in batch if isinstance(e, RequestOutput) and e.request_id == "held"] for batch in batches
    ]
    assert [token for batch in held for e in batch for token in e.token_ids] == [10 + i for i in range(30)]
    with_eager = [
        len(batch)
        for batch, mine in zip(batches, held, strict=True)
        if any(e.request_id == "eager" for e in batch if isinstance(e, RequestOutput)) and mine
    ]
    assert with_eager[:3] == [2, 2, 2]
    # 27 steps of a second, every five seconds.
    assert [len(batch) for batch in held[3:]] == [5, 5, 5, 5, 5, 2]


async def test_an_idle_engine_sleeps(rig: Rig) -> None:
    await rig.ids(request("a"))
    await rig.engine.stats()
    asked = rig.fake.asked
    await asyncio.sleep(0.3)
    assert rig.fake.steps == 3
    assert rig.fake.asked - asked <= 2


async def test_idle_work_ends_when_a_message_comes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = 0, 0

    def idle(waiting: Callable[[], bool]) -> bool:
        nonlocal begun, ended
        begun += 1
        deadline = time.monotonic() + 10.0
        while not waiting():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        ended += 1
        return True

    monkeypatch.setattr("actors.engine.loop.IDLE_WORK_EVERY_S", 0.01)
    monkeypatch.setattr(rig.fake, "idle", idle)
    await rig.engine.stats()
    for _ in range(2):
        await until(lambda: begun > ended)
        before = begun
        assert await rig.ids(request("a")) == [10, 11, 12]
        assert ended >= before


async def test_cancelling_the_consumer_aborts_at_once(rig: Rig) -> None:
    rig.fake.step_s = 0.005
    got: list[int] = []

    async def consume() -> None:
        async for output in rig.engine.generate(request("a", tokens=2000)):
            got.extend(output.token_ids)

    task = asyncio.create_task(consume())
    await until(lambda: len(got) >= 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: rig.fake.aborted == ["a"], 1.0)
    assert rig.engine.live == 0
    assert (await rig.engine.stats()).running == 0


async def test_closing_the_iterator_aborts_at_once(rig: Rig) -> None:
    rig.fake.step_s = 0.005
    outputs = rig.engine.generate(request("a", tokens=2000))
    await anext(outputs)
    await outputs.aclose()
    await until(lambda: rig.fake.aborted == ["a"], 1.0)


async def test_hundred_cancels_leave_nothing() -> None:
    rig = Rig(step_s=0.02, max_running=100)
    tasks = [asyncio.create_task(rig.ids(request(f"r{i}", tokens=400))) for i in range(100)]
    await until(lambda: len(rig.fake.added) == 100)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: not rig.fake.running)
    assert rig.engine.live == 0
    assert await rig.engine.close()


async def test_admission_is_bounded_and_all_or_nothing(rig: Rig) -> None:
    rig.fake.gate.clear()
    stream = rig.engine.submit([request(f"r{i}") for i in range(7)])
    with pytest.raises(Overloaded) as caught:
        rig.engine.submit([request("x"), request("y")])
    assert caught.value.retry_after_s >= 1.0
    assert rig.engine.live == 7
    with pytest.raises(ParameterError) as too_many:
        rig.engine.submit([request(f"z{i}") for i in range(9)])
    assert too_many.value.param == "n"
    last = rig.engine.submit([request("x")])
    rig.fake.gate.set()
    async with asyncio.timeout(5):
        while await stream.get() is not None or await last.get() is not None:
            pass
    assert rig.engine.live == 0


async def test_ids_must_be_unique(rig: Rig) -> None:
    rig.fake.gate.clear()
    stream = rig.engine.submit([request("a")])
    with pytest.raises(ValueError, match="unique"):
        rig.engine.submit([request("a")])
    stream.close()
    rig.engine.submit([request("a")]).close()


async def test_get_gives_none_after_its_timeout(rig: Rig) -> None:
    rig.fake.gate.clear()
    stream = rig.engine.submit([request("a", tokens=1)])
    start = time.monotonic()
    assert await stream.get(0.05) is None
    assert time.monotonic() - start < 1.0
    assert stream.open
    rig.fake.gate.set()
    output = await stream.get(5.0)
    assert output is not None
    assert output.finished
    assert await stream.get(5.0) is None


async def test_a_rejected_request_raises_its_parameter_error(rig: Rig) -> None:
    rig.fake.add_error = ParameterError("response_format", "invalid schema")
    with pytest.raises(ParameterError) as caught:
        await rig.ids(request("a"))
    assert (caught.value.param, caught.value.message) == ("response_format", "invalid schema")
    rig.fake.add_error = None
    assert await rig.ids(request("a")) == [10, 11, 12]


async def test_an_unexpected_error_in_add_fails_that_request_only(rig: Rig) -> None:
    rig.fake.add_error = KeyError("surprise")
    outputs = [o async for o in rig.engine.generate(request("a"))]
    assert [o.finish_reason for o in outputs] == ["error"]
    assert "surprise" in (outputs[0].error or "")
    rig.fake.add_error = None
    assert await rig.ids(request("b")) == [10, 11, 12]


async def test_a_failing_step_is_fatal_for_its_requests_not_for_the_loop(rig: Rig) -> None:
    rig.fake.fail_at = {2}
    outputs = [o async for o in rig.engine.generate(request("a"))]
    assert outputs[0].token_ids == (10,)
    assert outputs[-1].finish_reason == "error"
    assert "scripted failure" in (outputs[-1].error or "")
    assert rig.fake.aborted == ["a"]
    assert rig.engine.live == 0
    assert await rig.ids(request("b")) == [10, 11, 12]
    assert rig.engine.healthy()


async def test_steps_that_keep_failing_make_it_unhealthy(rig: Rig) -> None:
    rig.fake.fail_at = set(range(1, MAX_CONSECUTIVE_FAILURES + 1))
    for i in range(MAX_CONSECUTIVE_FAILURES):
        assert rig.engine.healthy()
        await rig.ids(request(f"r{i}"))
    assert not rig.engine.healthy()
    assert await rig.ids(request("b")) == [10, 11, 12]  # a good step heals it
    assert rig.engine.healthy()


async def test_a_thread_that_dies_ends_its_requests_and_is_unhealthy() -> None:
    rig = Rig()
    rig.fake.fail_at = {1}
    rig.fake.abort_error = OSError("beyond repair")
    outputs = [o async for o in rig.engine.generate(request("a"))]
    assert [o.finish_reason for o in outputs] == ["error"]
    await until(lambda: not rig.engine.healthy())
    assert rig.fake.closed
    with pytest.raises(EngineUnavailable):
        rig.engine.submit([request("b")])
    with pytest.raises(EngineUnavailable):
        await rig.engine.stats()
    assert await rig.engine.close()


async def test_a_hanging_step_is_noticed_and_waits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.async_engine.HEALTH_POLL_S", 0.02)
    rig = Rig(step_limit_s=0.1, call_timeout_s=0.1)
    rig.fake.gate.clear()
    with pytest.raises(EngineUnavailable):
        await rig.ids(request("a"))
    assert not rig.engine.healthy()
    with pytest.raises(TimeoutError):
        await rig.engine.stats()
    assert not await rig.engine.close(0.05)
    rig.fake.gate.set()
    assert await rig.engine.close()


async def test_stats_and_reset_are_answered_while_it_runs(rig: Rig) -> None:
    rig.fake.step_s = 0.005
    outputs = rig.engine.generate(request("a", tokens=2000))
    await anext(outputs)
    first, second = await rig.engine.stats(), await rig.engine.stats()
    assert first.running == 1
    assert second.steps >= first.steps > 0
    await rig.engine.reset()
    await rig.engine.reset("caches")
    assert rig.fake.resets == ["all", "caches"]
    await outputs.aclose()


async def test_idle_time_is_told_with_the_clock_that_counted_it(rig: Rig) -> None:
    first = await rig.engine.stats()
    await asyncio.sleep(0.05)
    second = await rig.engine.stats()
    assert 0.0 < second.idle_s - first.idle_s <= second.clock_s - first.clock_s


async def test_drain_waits_for_what_runs_and_admits_nothing(rig: Rig) -> None:
    rig.fake.step_s = 0.01
    running = asyncio.create_task(rig.ids(request("a", tokens=10)))
    await until(lambda: rig.engine.live == 1)
    draining = asyncio.create_task(rig.engine.drain(5.0))
    await asyncio.sleep(0.01)
    with pytest.raises(EngineUnavailable):
        rig.engine.submit([request("b")])
    assert await draining
    assert len(await running) == 10


async def test_drain_aborts_what_takes_too_long(rig: Rig) -> None:
    rig.fake.step_s = 0.005
    stream = rig.engine.submit([request("a", tokens=5000)])
    assert not await rig.engine.drain(0.05)
    last = None
    async with asyncio.timeout(5):
        while (output := await stream.get()) is not None:
            last = output
    assert last is not None
    assert last.finish_reason == "abort"
    await until(lambda: rig.fake.aborted == ["a"])


async def test_close_ends_running_requests(rig: Rig) -> None:
    rig.fake.step_s = 0.005
    stream = rig.engine.submit([request("a", tokens=5000)])
    await stream.get()
    assert await rig.engine.close()
    last = None
    async with asyncio.timeout(5):
        while (output := await stream.get()) is not None:
            last = output
    assert last is not None
    assert last.finish_reason == "abort"
