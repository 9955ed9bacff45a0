"""An engine obeys its assignment: exit, caps, draft worker, shadow scoring; pins of requests stay."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.draft_worker.server import DraftServer
from actors.drafting.assignment import UNRESTRICTED, DraftAssignment, Shadow
from actors.drafting.interface import (
    DraftQuery,
    NestedWish,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
    TargetIdentity,
)
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.nested import NestedDrafter
from actors.drafting.placed_source import PlacedDraftSource
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.remote_link import LinkOptions
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import DrafterPool
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.sampling.params import MAX_DRAFT_TOKENS, DraftSampling, SamplingParams, SpeculationParams
from cluster.deployments.routing import engine_assignment
from cluster.router.reports import Assignment, ShadowScoring
from tests.draft_rig import SlowDrafter, session, wish
from tests.exactness.harness import Result, make_engine, run, tiny_llama, torch_runner

LAYERS = 4
EXITS = (1, 2, LAYERS)
PROMPT = tuple(i * 7 % 320 for i in range(20))
WAIT_S = 10.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def nested(folder: Path) -> NestedDrafter:
    return NestedDrafter(torch_runner(folder, num_blocks=64), exits=EXITS)


@pytest.fixture
def engine(folder: Path) -> Iterator[TorchEngine]:
    built = make_engine(torch_runner(folder), [nested(folder)])
    yield built
    built.close()


def generate(engine: TorchEngine, tokens: int = 40, **speculation: object) -> Result:
    engine.reset_shared_state()  # a drafter that just lost time would not be asked
    one = EngineRequest(
        "r", PROMPT, SamplingParams(max_tokens=tokens, seed=3), SpeculationParams(**speculation)
    )  # type: ignore[arg-type]
    return run(engine, [one])["r"]


def depths(result: Result) -> set[int | None]:
    return {r.exit_depth for r in result.rounds if r.drafted}


def test_the_assigned_exit_drafts_and_pinned_exits_stay(engine: TorchEngine) -> None:
    plain = generate(engine, enabled=False).token_ids
    for assigned, expected in ((None, 1), (2, 2), (4, 4), (3, 1)):  # there is no exit at 3
        engine.assign(DraftAssignment(exit_depth=assigned))
        result = generate(engine, force=True, max_draft_tokens=3)
        assert depths(result) == {expected}
        assert result.token_ids == plain
    assert depths(generate(engine, force=True, max_draft_tokens=3, exit_depth=2)) == {2}
    assert engine.stats().assignment == DraftAssignment(exit_depth=3)


def test_caps_bind_all_but_what_a_request_pins(engine: TorchEngine) -> None:
    engine.assign(DraftAssignment(exit_depth=4, nested_cap=0, cap=0))
    before = engine.stats().drafting.asked_tokens
    result = generate(engine)
    assert not depths(result)
    assert engine.stats().drafting.asked_tokens == before, "nobody was asked"
    assert depths(generate(engine, force=True, max_draft_tokens=2)) == {4}
    pinned = generate(engine, exit_depth=2)
    assert engine.stats().drafting.asked_tokens > before, "a pinned exit is asked for"
    assert depths(pinned) <= {2}

    engine.assign(UNRESTRICTED)
    before = engine.stats().drafting.asked_tokens
    unbound = generate(engine)
    assert engine.stats().drafting.asked_tokens > before
    assert unbound.token_ids == result.token_ids == pinned.token_ids


@pytest.mark.parametrize("count", [1, 2])
def test_a_cap_bounds_the_length_of_chains(folder: Path, count: int) -> None:
    drafter = SlowDrafter()
    engine = make_engine(torch_runner(folder), [drafter])
    engine.assign(DraftAssignment(exit_depth=4, nested_cap=2, cap=2))
    batch = [
        EngineRequest(f"r{i}", PROMPT, SamplingParams(max_tokens=60, seed=i), SpeculationParams(tree=False))
        for i in range(count)
    ]
    results = run(engine, batch)
    assert max(query.budget for query in drafter.queries) == 2
    drafted = [r.drafted for result in results.values() for r in result.rounds]
    assert max(drafted) <= 2
    if count == 1:  # a batch may verify nothing of what it asks for
        assert max(drafted) > 0
    assert max(r.drafted for r in generate(engine, force=True, max_draft_tokens=5).rounds) == 5
    engine.close()


def update(budget: int = 4, **fields: object) -> SessionUpdate:
    return SessionUpdate(1, 1, (), budget, **fields)  # type: ignore[arg-type]


def test_the_nested_cap_leaves_other_drafters_alone(folder: Path) -> None:
    repeats, new = (1, 2, 3, 1, 2, 3, 1, 2), (1, 2, 3, 4, 5, 6, 7, 8)

    def drafted(prompt: tuple[int, ...], **fields: object) -> tuple[str, int]:
        pool = DrafterPool([nested(folder), PromptLookupDrafter()])
        pool.open(SessionOpen(1, prompt, len(prompt), DraftSampling(key=1)))
        pool.apply(update(**fields))
        (draft,) = pool.propose([update(**fields)])
        return draft.drafter, len(draft.token_ids)

    assert drafted(new) == ("nested", 4)
    assert drafted(new, nested=NestedWish(cap=2)) == ("nested", 2)
    assert drafted(new, nested=NestedWish(cap=0)) == ("", 0)
    assert drafted(repeats, nested=NestedWish(cap=0)) == ("prompt_lookup", 4)
    assert drafted(repeats, nested=NestedWish(cap=0), budget=0) == ("", 0)


def test_sessions_the_nested_drafter_passes_over_may_be_drafted_here() -> None:
    class Remote(LocalDraftSource):
        connected = True
        drafters = ("nested", "prompt_lookup")

        def refuses(self, session_id: int) -> bool:
            return False

    local = LocalDraftSource(DrafterPool([PromptLookupDrafter()]))
    placed = PlacedDraftSource(Remote(DrafterPool([PromptLookupDrafter()])), local)
    assert not placed._served_by_both(update())
    assert placed._served_by_both(update(nested=NestedWish(cap=0)))
    assert not placed._served_by_both(update(nested=NestedWish(cap=0), exit_depth=2))


def test_what_the_router_says_becomes_what_the_engine_obeys() -> None:
    shadow = ShadowScoring(exit=4, length=2, share=0.5, load=0.01)
    said = Assignment("t", "d0", (2,), 3, "why", shadow=shadow)
    mixed = engine_assignment(said, only_nested=False)
    assert mixed == DraftAssignment("d0", 2, 3, MAX_DRAFT_TOKENS, Shadow(4, 2, 0.5))
    assert engine_assignment(said, only_nested=True).cap == 3
    off = Assignment("t", "d0", (), 0, "why", cap_pinned=True)
    assert engine_assignment(off, only_nested=False) == DraftAssignment("d0", None, 0, 0)
    # A target that drafts itself knows better what its copy costs; an operator's word holds for it too.
    assert engine_assignment(said, only_nested=True, holds_draft=True) == DraftAssignment("d0")
    assert engine_assignment(off, only_nested=False, holds_draft=True) == DraftAssignment("d0", None, 0, 0)
    fixed = Assignment("t", "d0", (2,), 3, "why", exits_pinned=True)
    assert engine_assignment(fixed, only_nested=False, holds_draft=True).exit_depth == 2
    alone = Assignment("t", None, (), 0, "no draft worker lives")
    assert engine_assignment(alone, only_nested=True).cap == MAX_DRAFT_TOKENS, "local drafters go on"
    assert engine_assignment(alone, only_nested=True, holds_draft=True) == UNRESTRICTED, "its copy too"
    banned = replace(alone, cap_pinned=True)
    assert engine_assignment(banned, only_nested=True, holds_draft=True) == DraftAssignment(None, None, 0, 0)


class DraftWorkers:
    """Draft servers by name on one loop of their own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.servers: dict[str, DraftServer] = {}
        self.addresses: dict[str, str] = {}

    def start(self, name: str, pool: DrafterPool, token: str | None = None) -> None:
        server = DraftServer(pool, name, port_range=(0, 0), token=token)
        self.addresses[name] = asyncio.run_coroutine_threadsafe(server.start(), self._loop).result(WAIT_S)
        self.servers[name] = server

    def stop(self, name: str) -> None:
        server = self.servers.pop(name)
        asyncio.run_coroutine_threadsafe(server.stop(0.0), self._loop).result(WAIT_S)

    def leases(self) -> list[dict[str, object]]:
        return [
            {"id": name, "address": self.addresses[name], "load": i} for i, name in enumerate(self.servers)
        ]

    def close(self) -> None:
        for name in list(self.servers):
            self.stop(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


@pytest.fixture
def workers() -> Iterator[DraftWorkers]:
    made = DraftWorkers()
    yield made
    made.close()


def connect(workers: DraftWorkers, **options: float) -> RemoteDraftSource:
    made = replace(
        LinkOptions(backoff_s=0.05, max_backoff_s=0.2, lease_poll_s=0.05, avoid_s=1.0),
        **options,  # type: ignore[arg-type]
    )
    return RemoteDraftSource(workers.leases, TargetIdentity("t", "m", 320), made)


def test_the_assigned_worker_drafts_and_another_while_it_is_away(workers: DraftWorkers) -> None:
    for name in ("a", "b"):
        workers.start(name, DrafterPool([PromptLookupDrafter()]))
    source = connect(workers)
    try:
        until(lambda: source.stats()["worker_id"] == "a")
        source.assign("b")
        until(lambda: source.stats()["worker_id"] == "b")
        source.assign("nobody")
        time.sleep(0.3)
        assert source.stats()["worker_id"] == "b", "a worker that is not there changes nothing"
        source.assign("b")
        workers.stop("b")
        until(lambda: source.stats()["worker_id"] == "a")
        workers.start("b", DrafterPool([PromptLookupDrafter()]))
        until(lambda: source.stats()["worker_id"] == "b")
        workers.addresses["c"], workers.servers["c"] = "127.0.0.1:1", workers.servers["a"]
        source.assign("c")  # it has a lease and cannot be reached
        until(lambda: source.stats()["worker_id"] == "a")
        del workers.servers["c"]
    finally:
        source.close()


@pytest.mark.parametrize("assigned", [None, "a"])
@pytest.mark.parametrize("fault", ["unreachable", "refuses", "hangs"])
def test_a_worker_that_cannot_be_used_keeps_nobody_from_a_healthy_one(
    workers: DraftWorkers, fault: str, assigned: str | None
) -> None:
    """Nobody drafts with it, so it has the lowest load of all."""
    drafter = SlowDrafter()
    workers.start("a", DrafterPool([drafter]), token="secret" if fault == "refuses" else None)
    workers.start("b", DrafterPool([PromptLookupDrafter()]))
    if fault == "unreachable":
        workers.addresses["a"] = "127.0.0.1:1"
    source = connect(workers, stuck_s=0.3, avoid_s=60.0)
    try:
        source.assign(assigned)
        if fault == "hangs":
            until(lambda: source.stats()["worker_id"] == "a")
            drafter.gate.clear()
            source.open(session(1, [5]))
            source.submit([wish(1, 1)])
        until(lambda: source.stats()["worker_id"] == "b")
        source.assign("nobody")  # another word of the router mends nothing
        source.assign("a")
        time.sleep(0.3)
        assert source.stats()["worker_id"] == "b"
    finally:
        drafter.gate.set()
        source.close()


def test_workers_that_all_failed_are_tried_in_turns(workers: DraftWorkers) -> None:
    for name in ("a", "b"):
        workers.start(name, DrafterPool([PromptLookupDrafter()]))
    addresses = dict(workers.addresses)
    workers.addresses |= dict.fromkeys(addresses, "127.0.0.1:1")
    source = connect(workers, avoid_s=60.0)
    try:
        until(lambda: len(source._link._avoided_until) == 2)
        workers.addresses["b"] = addresses["b"]
        until(lambda: source.stats()["worker_id"] == "b")
    finally:
        source.close()


def test_what_a_worker_did_for_a_target_is_counted(workers: DraftWorkers) -> None:
    class Nested(SlowDrafter):
        def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
            return [replace(draft, exit_depth=2) for draft in super().propose(queries)]

    drafter = Nested()
    drafter.delay_s = 0.02
    workers.start("a", DrafterPool([drafter]))
    source = connect(workers)

    def asked(epoch: int, budgets: tuple[int, int], **fields: object) -> tuple[int, int, int]:
        source.submit([replace(wish(s, epoch, [5], b), **fields) for s, b in enumerate(budgets)])  # type: ignore[arg-type]
        source.collect({s: epoch for s, b in enumerate(budgets) if b}, WAIT_S)
        counted = source.served()
        return counted.rounds, counted.steps, counted.tokens

    try:
        until(lambda: source.connected)
        for sid in (0, 1):
            source.open(session(sid, [5]))
        assert asked(1, (4, 0)) == (1, 4, 4), "one of two asks"
        assert asked(2, (2, 3)) == (2, 7, 9)
        assert 0.04 <= source.served().seconds < WAIT_S
        assert asked(3, (1, 0), drafter="nobody") == (2, 7, 9), "an error is no draft"
    finally:
        source.close()


def test_shadow_scoring_learns_an_exit_that_is_not_in_use(folder: Path, workers: DraftWorkers) -> None:
    workers.start("a", DrafterPool([nested(folder)]))
    source = connect(workers)
    engine = make_engine(torch_runner(folder), source=source)
    try:
        until(lambda: source.connected)
        plain = generate(engine, 120, enabled=False).token_ids
        assert engine.stats().drafting.acceptance_by_exit == {}
        engine.assign(DraftAssignment("a", None, 0, 0, Shadow(LAYERS, 2, 1.0)))
        for _ in range(4):
            one = EngineRequest("r", PROMPT, SamplingParams(max_tokens=120, seed=3))
            # A toy's rounds take less than a message: give drafts time to arrive.
            result = run(engine, [one], on_step=lambda _: time.sleep(0.003))["r"]
            assert result.token_ids == plain
            assert not depths(result), "nothing is verified"
        drafting = engine.stats().drafting
        rates, trials = drafting.acceptance_by_exit[LAYERS]
        assert drafting.acceptance_by_exit.keys() == {LAYERS}
        assert trials[0] >= 8
        assert sum(trials) == drafting.shadow_tokens
        assert rates[0] > 0.8, "the whole model is always right"
        until(lambda: workers.servers["a"].state.sessions == 0)
        assert drafting.latency_s.keys() <= {"a"}
        assert workers.servers["a"].state.busy_s > 0.0
    finally:
        engine.close()


def test_step_times_are_measured_by_exit_and_sessions(folder: Path) -> None:
    drafter = nested(folder)
    assert drafter.step_s_by_exit() == {}
    drafter.profile()
    times = drafter.step_s_by_exit()
    assert list(times) == list(EXITS)
    assert all(list(times[depth]) == [1, 2, 4, 8] for depth in EXITS)
    assert all(seconds > 0.0 for table in times.values() for seconds in table.values())
    assert drafter.kv_blocks_used == 0
    assert DrafterPool([PromptLookupDrafter(), drafter]).step_s_by_exit() == times
    assert DrafterPool([PromptLookupDrafter()]).step_s_by_exit() == {}
