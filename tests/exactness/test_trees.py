"""Draft trees never change what is emitted: trees that hold the right tokens anywhere, among wrong ones."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.models.load import load_runner
from actors.models.runner import LayeredRunner
from actors.sampling.params import (
    GrammarSpec,
    ParameterError,
    SamplingParams,
    SpeculationParams,
    VerificationName,
)
from tests.exactness.harness import AnyText, make_engine, run, tiny_llama, torch_runner

OFF = SpeculationParams(enabled=False)
VOCAB, LAYERS = 320, 4


class Knowing:
    """Proposes random trees in which the target's own continuation runs down a random branch."""

    name, learns = "knowing", False

    def __init__(self, seed: int) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self._rng = random.Random(seed)
        self._sessions: dict[int, tuple[list[int], int]] = {}
        self.wrong_first = 0

    def open(self, session: SessionOpen) -> None:
        self._sessions[session.session_id] = (list(session.token_ids), session.prompt_len)

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None:
        self._sessions[session_id][0].extend(new_tokens)

    def close(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def reset(self, scope: str = "all") -> None: ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [self._propose(query) for query in queries]

    def _propose(self, query: DraftQuery) -> SessionDraft:
        tokens, prompt_len = self._sessions[query.session_id]
        answer = self.answers[tuple(tokens[:prompt_len])][len(tokens) - prompt_len :]
        assert query.tree
        ids, parents, at = list[int](), list[int](), -1
        rng = self._rng
        while len(ids) < query.budget:
            known = at == -1 or ids[at] == answer[depth_of(at, parents) - 1]
            depth = depth_of(at, parents)
            right = answer[depth] if known and depth < len(answer) and rng.random() < 0.8 else None
            children = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))]
            if right is not None:
                self.wrong_first += bool(children)
                children = [c for c in children if c != right] + [right]
            first = len(ids)
            ids += children
            parents += [at] * len(children)
            if not children:
                break
            at = len(ids) - 1 if right is not None else first
        count = query.budget
        return SessionDraft(
            query.session_id,
            query.epoch,
            tuple(ids[:count]),
            parents=tuple(parents[:count]),
            drafter=self.name,
            # Equal, so that trees keep their wrong tokens, and the right ones their places.
            confidence=(0.9,) * len(ids[:count]),
        )


class Obliging(Knowing):
    """Trees for who takes them, for others the target's own continuation."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.taken: list[bool] = []

    def open(self, session: SessionOpen) -> None:
        self.taken.append(session.trees)
        super().open(session)

    def _propose(self, query: DraftQuery) -> SessionDraft:
        if query.tree:
            return super()._propose(query)
        tokens, prompt_len = self._sessions[query.session_id]
        answer = self.answers[tuple(tokens[:prompt_len])][len(tokens) - prompt_len :]
        return SessionDraft(query.session_id, query.epoch, tuple(answer[: query.budget]), drafter=self.name)


def depth_of(at: int, parents: Sequence[int]) -> int:
    depth = 0
    while at != -1:
        at, depth = parents[at], depth + 1
    return depth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


@pytest.fixture(scope="module", params=["torch", "native"])
def runner(request: pytest.FixtureRequest, folder: Path) -> LayeredRunner:
    if request.param == "torch":
        return torch_runner(folder)
    loaded = load_runner(str(folder), dtype="float32", backend="native", kv_blocks=256, threads=1)
    assert isinstance(loaded.runner, LayeredRunner)
    return loaded.runner


@pytest.fixture
def knowing() -> Knowing:
    return Knowing(seed=3)


@pytest.fixture
def engine(runner: LayeredRunner, knowing: Knowing) -> Iterator[TorchEngine]:
    built = make_engine(runner, [knowing])
    yield built
    built.close()


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 70))) for _ in range(count)]


def trees(nodes: int) -> SpeculationParams:
    return SpeculationParams(max_draft_tokens=nodes, force=True, tree=True)


def request(
    name: str, prompt: tuple[int, ...], speculation: SpeculationParams, **sampling: object
) -> EngineRequest:
    fields = {"max_tokens": 60, "temperature": 0.0, **sampling}
    return EngineRequest(name, prompt, SamplingParams(**fields), speculation)  # type: ignore[arg-type]


SAMPLINGS: list[dict[str, object]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.3, "seed": -2, "top_p": 0.9, "top_k": 60},
    {"temperature": 1.0, "seed": 8, "min_p": 0.02, "logit_bias": {3: 4.0}},
    {"temperature": 0.9, "seed": 4, "allowed_token_ids": tuple(range(0, VOCAB, 3)), "bad_sequences": ((6,),)},
    {"temperature": 0.0, "min_tokens": 20, "stop_token_ids": tuple(range(0, VOCAB, 16))},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("nodes", [2, 7, 16])
def test_trees_change_nothing(
    engine: TorchEngine, knowing: Knowing, nodes: int, sampling: dict[str, object]
) -> None:
    batch = [request(f"t{i}", p, trees(nodes), logprobs=2, **sampling) for i, p in enumerate(prompts(12))]
    plain = {}
    for one in batch:
        alone = run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]
        plain[one.request_id] = alone
        knowing.answers[one.prompt_ids] = alone.token_ids
    together = run(engine, batch, arrive_every=2)
    for one in batch:
        found, expected = together[one.request_id], plain[one.request_id]
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
        for a, b in zip(found.logprobs, expected.logprobs, strict=True):
            assert (a.token_id, [t for t, _ in a.top]) == (b.token_id, [t for t, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert knowing.wrong_first, "right tokens stood behind wrong ones, so that their KV had to move"
    accepted = sum(result.accepted for result in together.values())
    assert accepted > 100, "the right branches were taken"
    # The KV that the trees left behind in the prefix cache is that of plain decoding.
    for one in batch[:4]:
        longer = (*one.prompt_ids, *plain[one.request_id].token_ids)
        again = request("again", longer, OFF, max_tokens=20)
        engine.reset_shared_state()
        cold = run(engine, [again])["again"]
        engine.reset_shared_state()
        run(engine, [one])
        warm = run(engine, [again])["again"]
        assert warm.token_ids == cold.token_ids
        if len(longer) > 64:
            assert warm.cached_tokens > 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11}], ids=str)
def test_all_drafters_joined_change_nothing(
    runner: LayeredRunner, folder: Path, sampling: dict[str, object]
) -> None:
    nested = NestedDrafter(torch_runner(folder), exits=(1, 2, LAYERS), default_exit=LAYERS)
    engine = make_engine(runner, [PromptLookupDrafter(), TokenRecyclingDrafter(), nested])
    pinned = dataclasses.replace(trees(7), drafter="nested")  # unpinned, it is asked only where it pays
    wishes = [trees(7), pinned]
    batch = [request(f"j{i}", p, wishes[i % 2], **sampling) for i, p in enumerate(prompts(8))]
    together = run(engine, batch, arrive_every=1)
    for one in batch:
        alone = run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]
        assert together[one.request_id].token_ids == alone.token_ids
    stats = engine.stats().drafters
    assert stats["nested"].accepted > 100, "its deepest exit is the target itself"
    assert stats["token_recycling"].drafted > 0
    for index, one in enumerate(batch):
        names = {r.drafter for r in together[one.request_id].rounds if r.drafted}
        assert names == {("tree", "nested")[index % 2]}
    engine.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"presence_penalty": 0.5}, "penalties"),
        ({"bad_sequences": ((1, 2),)}, "bad words"),
        ({}, "leviathan"),
    ],
)
def test_who_insists_on_a_tree_that_cannot_be_is_told_why(
    engine: TorchEngine, change: dict[str, object], why: str
) -> None:
    rule = "leviathan" if why == "leviathan" else None
    speculation = dataclasses.replace(trees(4), verification=rule)
    with pytest.raises(ParameterError, match=why) as caught:
        engine.add(request("no", (1, 2, 3), speculation, **change))
    assert caught.value.param == "speculation.tree"


def test_requests_that_cannot_take_trees_are_given_chains(runner: LayeredRunner) -> None:
    engine = make_engine(runner, [PromptLookupDrafter(), TokenRecyclingDrafter()])
    prompt = (5, 6, 7) * 12
    for sampling in ({"presence_penalty": 0.2}, {"repetition_penalty": 1.1, "temperature": 0.7, "seed": 1}):
        one = request("c", prompt, SpeculationParams(max_draft_tokens=4, force=True), **sampling)
        drafted = run(engine, [one])["c"]
        assert drafted.drafted > 0
        assert drafted.token_ids == run(engine, [dataclasses.replace(one, speculation=OFF)])["c"].token_ids
    engine.close()


@pytest.mark.parametrize(
    ("sampling", "rule", "trees"),
    [
        ({}, None, True),
        ({"presence_penalty": 0.2}, None, False),
        ({"bad_sequences": ((7,), (8,))}, None, True),
        ({"bad_sequences": ((7,), (8, 9))}, None, False),
        ({"repetition_penalty": 1.1, "temperature": 0.7, "seed": 1}, None, False),
        ({"grammar": GrammarSpec("json_object")}, None, False),
        ({"grammar": GrammarSpec("json_object"), "temperature": 1.0, "seed": 4}, None, False),
        ({}, "leviathan", False),
        ({"temperature": 1.0, "seed": 2}, "leviathan", False),
    ],
    ids=str,
)
def test_who_does_not_ask_for_trees_is_given_them_where_they_can_be(
    runner: LayeredRunner, sampling: dict[str, object], rule: VerificationName | None, trees: bool
) -> None:
    knowing = Obliging(seed=3)
    engine = make_engine(runner, [knowing], compile_grammar=lambda _: AnyText(VOCAB))
    one = request("u", (5, 6, 7) * 4, SpeculationParams(verification=rule), **sampling)
    plain = run(engine, [dataclasses.replace(one, speculation=OFF)])["u"].token_ids
    knowing.answers[one.prompt_ids] = plain
    result = run(engine, [one])["u"]
    engine.close()
    assert knowing.taken == [trees]
    assert (len(result.token_ids), result.finish_reason) == (60, "length")
    if rule is None:
        assert result.token_ids == plain
    assert trees or result.drafted > 0, "the first draft that is asked for is verified, were it as a probe"
