"""Protocols of the benchmark against engines of known speed: order, resets, load, limits, files."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import load, load_summary, spec_bench
from cluster.bench.config import LoadSettings, SpecSettings
from cluster.bench.datasets import Question
from cluster.bench.engines.interface import BenchRequest, BenchResponse, EngineUnavailableError
from cluster.bench.engines.registry import FACTORIES, plain_of
from cluster.bench.load import Point, arrival_times, closed_loop, open_loop
from cluster.bench.records import Record
from cluster.bench.rendering import PromptRenderer
from cluster.bench.report import write_load, write_spec
from cluster.bench.running import BenchError, ask, rotated, running, warm_up
from cluster.bench.session import context_needed
from cluster.bench.tables import load_plain_tables
from cluster.bench.turns import Turns
from tests.fake_bench_engine import FakeEngine
from tests.toy_tokenizers import byte_level_folder

QUESTIONS = tuple(
    Question(f"{task}-{i}", task, task, (f"{task} {i}?", "and then?"))
    for task in ("qa", "rag")
    for i in range(3)
)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> PromptRenderer:
    return PromptRenderer(byte_level_folder(tmp_path_factory.mktemp("model")))


def requests(count: int, tokens: int = 4) -> list[BenchRequest]:
    return [BenchRequest(f"r{i}", (1, 2), "x", tokens) for i in range(count)]


def spec_settings(**fields: Any) -> SpecSettings:
    return SpecSettings(engines=("a", "b"), max_tokens=8, **fields)


def load_settings(**fields: Any) -> LoadSettings:
    return LoadSettings(**{"engines": ("a", "b"), "max_tokens": 5, "pairs": 3, "concurrency": (2,), **fields})


def test_rotation_lets_everybody_begin() -> None:
    assert [rotated("abc", i) for i in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert rotated([], 3) == []


async def test_spec_bench_alternates_and_resets_before_every_question(renderer: PromptRenderer) -> None:
    a, b = FakeEngine("a"), FakeEngine("b")
    records = await spec_bench.run_spec_bench([a, b], QUESTIONS, renderer, spec_settings(pairs=2))
    assert [r.engine for r in records] == ["a", "b", "b", "a"] * 6
    assert Counter(r.pair for r in records) == {0: 12, 1: 12}
    assert a.log[0] == ("generate", "warm-up-0")
    measured = [kind for kind, _ in a.log[1:]]
    assert measured == ["reset", "generate"] * 12
    assert not any(r.response.request_id.startswith("warm-up") for r in records)


async def test_second_turns_see_the_engines_own_first_answer(renderer: PromptRenderer) -> None:
    seen: list[str] = []

    class Listening(FakeEngine):
        async def generate(self, request: BenchRequest) -> Any:
            seen.append(request.prompt_text)
            return await super().generate(request)

    engine = Listening("a", answer="mine")
    settings = spec_settings(all_turns=True, baseline="a")
    records = await spec_bench.run_spec_bench([engine], QUESTIONS[:1], renderer, settings)
    assert [r.turn for r in records] == [0, 1]
    assert seen[-1] == "<s>user: qa 0?\n<s>assistant: mine\n<s>user: and then?\n<s>assistant: "
    assert records[1].prompt_tokens > records[0].prompt_tokens
    failing = Listening("a", fail="qa-0")
    assert len(await spec_bench.run_spec_bench([failing], QUESTIONS[:1], renderer, settings)) == 1


def test_engines_are_given_the_context_that_the_longest_conversation_needs(renderer: PromptRenderer) -> None:
    long = Question("1", "qa", "qa", ("x" * 3000, "y" * 500))
    settings = spec_settings()
    first = len(renderer.render(long.turns[:1]).ids)
    assert context_needed(QUESTIONS, renderer, settings) == 2048
    assert first + 8 <= context_needed([long], renderer, settings) < first + 8 + 256
    both = context_needed([long], renderer, spec_settings(all_turns=True))
    assert first + 500 + 16 < both < first + 500 + 16 + 350


async def test_spec_summary_against_known_speeds(renderer: PromptRenderer) -> None:
    slow, fast = FakeEngine("a", gap_s=0.008, accepted=0), FakeEngine("b", gap_s=0.008, chunk=2, accepted=4)
    records = await spec_bench.run_spec_bench([slow, fast], QUESTIONS, renderer, spec_settings(pairs=3))
    rows = {(r.engine, r.task): r for r in spec_bench.summarize(records, "a")}
    assert list(dict.fromkeys(task for _, task in rows)) == ["qa", "rag", "overall"]
    overall = rows["b", "overall"]
    assert overall.paired is not None
    assert (overall.paired.pairs, overall.paired.verdict) == (18, "above")
    assert 1.5 < overall.paired.median < 3.2  # 7 gaps against 3, on a machine that may be busy
    assert overall.speedup is not None
    assert 1.5 < overall.speedup < 3.2
    assert overall.mean_accepted_tokens == 2.0
    assert rows["a", "qa"].mean_accepted_tokens == 1.0
    assert rows["a", "qa"].equality is None
    assert rows["b", "qa"].paired is not None
    assert rows["b", "qa"].paired.verdict == "not resolved"  # 9 pairs are too few
    same = overall.equality
    assert same is not None
    assert (same.compared, same.bytes_equal, same.ids_compared, same.ids_equal) == (18, 18, 18, 18)
    cells = spec_bench.matrix(records)
    assert cells["a"]["b"] is not None
    assert cells["a"]["b"].verdict == "below"


async def test_other_answers_and_failures_are_counted(renderer: PromptRenderer) -> None:
    a, b = FakeEngine("a"), FakeEngine("b", answer="other", fail="rag-1")
    records = await spec_bench.run_spec_bench([a, b], QUESTIONS, renderer, spec_settings())
    row = next(r for r in spec_bench.summarize(records, "a") if (r.engine, r.task) == ("b", "overall"))
    assert (row.requests, row.errors) == (6, 1)
    assert row.equality is not None
    assert (row.equality.compared, row.equality.bytes_equal, row.equality.ids_equal) == (5, 0, 0)
    assert row.paired is not None
    assert row.paired.pairs == 5


async def test_speculation_is_compared_with_its_own_plain_decoding(renderer: PromptRenderer) -> None:
    names = {
        "s2d-plain": "same",
        "s2d-auto": "same",
        "hf": "y",
        "hf-assisted": "z",
        "vllm-bf16-ngram": "same",
    }
    engines = [FakeEngine(name, answer=answer) for name, answer in names.items()]
    records = await spec_bench.run_spec_bench(engines, QUESTIONS, renderer, spec_settings())
    rows = spec_bench.against_plain(records, plain_of)
    found = [(r.engine, r.plain, r.equality.ids_compared, r.equality.ids_equal) for r in rows]
    assert found == [("s2d-auto", "s2d-plain", 6, 6), ("hf-assisted", "hf", 6, 0)]
    assert rows[0].paired is not None
    assert rows[0].paired.pairs == 6


def test_every_engine_of_the_registry_has_a_plain_one_or_is_one() -> None:
    plain = {name: plain_of(name) for name in FACTORIES}
    assert {name for name, of in plain.items() if of is None} == {
        "s2d-plain", "hf", "vllm-bf16", *(f"llama.cpp-{p}" for p in ("bf16", "f16", "q8_0", "q4_0"))
    }  # fmt: skip
    assert plain["llama.cpp-q8_0-prompt-lookup"] == "llama.cpp-q8_0"
    assert plain_of("other") is None


async def test_an_engine_that_does_not_answer_ends_the_run_before_it_begins(renderer: PromptRenderer) -> None:
    dead = FakeEngine("b", fail="warm-up")
    with pytest.raises(BenchError, match="b: told to fail"):
        await spec_bench.run_spec_bench([FakeEngine("a"), dead], QUESTIONS, renderer, spec_settings())


async def test_turns_are_given_before_anything_is_asked(renderer: PromptRenderer) -> None:
    engines = [FakeEngine("a"), FakeEngine("b")]

    class Log(Turns):
        async def give_to(self, engine: Any) -> None:
            engine.log.append(("turn", ""))

    await spec_bench.run_spec_bench(engines, QUESTIONS[:2], renderer, spec_settings(), turns=Log())
    await load.run_load(engines, QUESTIONS, renderer, load_settings(pairs=1), turns=Log())
    for engine in engines:
        kinds = [kind for kind, _ in engine.log]
        assert kinds[:8] == ["turn", "generate", *["turn", "reset", "generate"] * 2]
        assert kinds[8:] == ["turn", "generate", "generate", "turn", "reset", *["generate"] * 4]


async def test_closed_loop_keeps_so_many_requests_in_flight() -> None:
    engine = FakeEngine("a", ttft_s=0.01)
    answers = await closed_loop(engine, requests(12), 3, timeout_s=5.0)
    assert [a.request_id for a in answers] == [f"r{i}" for i in range(12)]
    assert engine.most_running == 3


async def test_a_request_over_its_limit_is_cancelled_and_reported() -> None:
    engine = FakeEngine("a", ttft_s=30.0)
    answers = await closed_loop(engine, requests(2), 2, timeout_s=0.05)
    assert [a.error for a in answers] == ["took longer than 0.05 s"] * 2
    assert (engine.cancelled, engine.running) == (2, 0)


@pytest.mark.parametrize("given", [3, 5])
async def test_an_answer_of_another_length_than_asked_for_has_failed(given: int) -> None:
    (asked,) = requests(1)
    engine = FakeEngine("a", tokens=given)
    free = await ask(engine, asked, timeout_s=5.0)
    assert (free.error, free.num_tokens) == (None, given)
    forced = replace(asked, ignore_eos=True)
    assert (await ask(FakeEngine("a"), forced, timeout_s=5.0)).error is None
    answer = await ask(engine, forced, timeout_s=5.0)
    assert f"gave {given} of 4 tokens: ignore_eos has no effect" in (answer.error or "")
    with pytest.raises(BenchError, match=f"a: gave {given} of 4 tokens"):
        await warm_up(engine, [forced], timeout_s=5.0)
    broken = await ask(FakeEngine("a", fail="r0"), forced, timeout_s=5.0)
    assert broken.error == "told to fail"


def test_arrivals_are_poisson_and_reproducible() -> None:
    times = arrival_times(5.0, 4000, (1, 2))
    assert times == arrival_times(5.0, 4000, (1, 2))
    assert times != arrival_times(5.0, 4000, (1, 3))
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0.0
    assert mean == pytest.approx(0.2, rel=0.06)
    assert sum(g > mean for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exp(-1)


async def test_open_loop_sends_on_time_whatever_has_become_of_the_others() -> None:
    engine = FakeEngine("a", ttft_s=0.4, tokens=1)
    arrivals = [0.0, 0.05, 0.1]
    answers = await open_loop(engine, requests(3), arrivals, timeout_s=5.0)
    sent = [a.started - answers[0].started for a in answers]
    assert sent == sorted(sent)
    assert all(at - 0.01 <= when < at + 0.15 for when, at in zip(sent, arrivals, strict=True))
    assert engine.most_running == 3


async def test_load_blocks_share_requests_within_a_pair_and_rotate(renderer: PromptRenderer) -> None:
    a, b = FakeEngine("a"), FakeEngine("b")
    settings = load_settings(rate=(200.0,), requests_per_rate=4)
    blocks = await load.run_load([a, b], QUESTIONS, renderer, settings)
    assert [(x.point.label, x.engine) for x in blocks[:6]] == [
        ("concurrency 2", e) for e in ("a", "b", "b", "a", "a", "b")
    ]
    assert [x.point for x in blocks[6:]] == [Point(rate=200.0)] * 6
    for ours, theirs in zip(blocks[::2], blocks[1::2], strict=True):
        assert ours.pair == theirs.pair
        assert [r.question_id for r in ours.records] == [r.question_id for r in theirs.records]
    assert len({tuple(r.question_id for r in x.records) for x in blocks[:6:2]}) == 3
    assert [len(x.records) for x in blocks] == [4] * 12
    assert sum(kind == "reset" for kind, _ in a.log) == 6


async def test_load_summary_against_known_latencies(renderer: PromptRenderer) -> None:
    a = FakeEngine("a", ttft_s=0.03, gap_s=0.02, parallel=1)
    b = FakeEngine("b", ttft_s=0.03, gap_s=0.02)
    settings = load_settings(slo_ttft_ms=80.0, slo_tpot_ms=60.0, pairs=2)
    rows = {
        r.engine: r
        for r in load_summary.summarize(await load.run_load([a, b], QUESTIONS, renderer, settings), settings)
    }
    free, queued = rows["b"].latency, rows["a"].latency
    assert (free.requests, free.errors, free.output_tokens) == (8, 0, 40)
    assert free.ttft is not None
    assert free.tpot is not None
    assert 0.03 <= free.ttft.p50 < 0.08
    assert 0.02 <= free.tpot.p50 < 0.06
    assert queued.ttft is not None
    assert queued.ttft.p50 > 0.08
    assert queued.goodput < 0.7 * queued.requests_per_s  # the second request waits for the first
    assert rows["b"].paired is not None
    assert 1.4 < rows["b"].paired.median < 2.8


async def test_load_compares_speculation_with_plain_decoding_of_the_same_engine(
    renderer: PromptRenderer,
) -> None:
    engines = [
        FakeEngine("peer", ttft_s=0.001, gap_s=0.001),
        FakeEngine("plain", ttft_s=0.01, gap_s=0.02),
        FakeEngine("drafting", ttft_s=0.01, gap_s=0.01),
    ]
    blocks = await load.run_load(engines, QUESTIONS, renderer, load_settings(pairs=2, concurrency=(1, 2)))
    rows = load_summary.against_plain(blocks, {"drafting": "plain", "peer": "of no run"}.get)
    assert [(row.engine, row.plain, row.point) for row in rows] == [
        ("drafting", "plain", Point(concurrency=1)),
        ("drafting", "plain", Point(concurrency=2)),
    ]
    assert [row.paired.pairs for row in rows] == [2, 2]
    assert all(1.2 < row.paired.median < 2.8 for row in rows)
    (table,) = load_plain_tables(rows)
    assert [line[:4] for line in table.rows] == [("drafting", "plain", row.point.label, "2") for row in rows]
    assert load_plain_tables([]) == []


def measured_block(
    engine: str, pair: int, *ends: Sequence[tuple[float, int]], error: str | None = None
) -> load.Block:
    """A block of requests sent at once, by the arrivals of each."""
    responses = [BenchResponse("r", 100.0, [(100.0 + at, n) for at, n in end], error=error) for end in ends]
    records = tuple(Record(engine, pair, 0, "q", "qa", 3, r, concurrency=len(ends)) for r in responses)
    return load.Block(engine, pair, Point(concurrency=len(ends)), max(e[-1][0] for e in ends), records)


def test_requests_that_end_early_are_seen_beside_the_slowest_of_a_block() -> None:
    blocks = [
        measured_block("plain", 0, [(0.5, 1), (2.5, 4)], [(0.5, 1), (2.5, 4)]),
        measured_block("drafting", 0, [(0.5, 2), (1.1, 3)], [(0.3, 1), (2.7, 4)]),
        # One that failed is in no ratio.
        measured_block("plain", 1, [(0.5, 1), (2.5, 4)], [(0.5, 1), (2.5, 4)]),
        measured_block("drafting", 1, [(0.5, 1), (0.6, 4)], [(0.5, 1), (0.6, 4)], error="gone"),
    ]
    (row,) = load_summary.against_plain(blocks, {"drafting": "plain"}.get)
    assert row.paired.pairs == 1
    assert row.paired.median == pytest.approx(2.5 / 2.7)
    assert [c and c.median for c in (row.e2e, row.ttft, row.tpot)] == [
        pytest.approx(5.0 / 3.8),
        pytest.approx(1.0 / 0.8),
        pytest.approx(0.5 / statistics.fmean([0.2, 0.6])),
    ]
    one_chunk = [measured_block(e, 0, [(1.0, 5)]) for e in ("plain", "drafting")]
    (row,) = load_summary.against_plain(one_chunk, {"drafting": "plain"}.get)
    assert row.tpot is None
    assert load_plain_tables([row])[0].rows[0][-1] == "-"


async def test_engines_are_stopped_when_one_does_not_start() -> None:
    good, bad = FakeEngine("a"), FakeEngine("b", start_error=EngineUnavailableError("install it"))
    with pytest.raises(EngineUnavailableError, match="install it"):
        async with running([good, bad], lambda text: None):
            pytest.fail("must not run")
    assert ("stop", "") in good.log
    assert ("stop", "") in bad.log


async def test_cancelled_again_while_stopping_all_engines_are_stopped() -> None:
    measuring, stopping = asyncio.Event(), asyncio.Event()

    class Slow(FakeEngine):
        async def stop(self) -> None:
            stopping.set()
            await asyncio.sleep(60.0)

    async def measure() -> None:
        async with running([quick, slow], lambda text: None):
            measuring.set()
            await asyncio.sleep(60.0)

    quick, slow = FakeEngine("a"), Slow("b")
    task = asyncio.create_task(measure())
    await measuring.wait()
    task.cancel()
    await stopping.wait()
    assert quick.log == [("start", "")]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert quick.log == [("start", ""), ("stop", "")]


async def test_interrupted_while_stopping_all_engines_are_stopped() -> None:
    class Interrupted(FakeEngine):
        async def stop(self) -> None:
            raise KeyboardInterrupt

    first = FakeEngine("a")
    with pytest.raises(KeyboardInterrupt):
        async with running([first, Interrupted("b")], lambda text: None):
            pass
    assert first.log[-1] == ("stop", "")


async def test_spec_files_hold_records_tables_and_a_picture(tmp_path: Path, renderer: PromptRenderer) -> None:
    engines = [FakeEngine("a", accepted=0), FakeEngine("b|c", chunk=2, accepted=4)]
    settings = SpecSettings(engines=("a", "b|c"), max_tokens=8)
    records = await spec_bench.run_spec_bench(engines, QUESTIONS, renderer, settings)
    described = {e.name: e.describe() for e in engines}
    write_spec(tmp_path, settings, records, {"cpu": "x"}, described, interrupted="KeyboardInterrupt: ")
    document = json.loads((tmp_path / "spec.json").read_text())
    assert (document["kind"], document["environment"], document["format"]) == ("spec", {"cpu": "x"}, 1)
    assert len(document["records"]) == 12
    first = document["records"][0]
    assert first["prompt_tokens"] > 0
    assert sum(count for _, count in first["arrivals"]) == 8
    assert all(at >= 0 for at, _ in first["arrivals"])
    assert document["matrix"]["a"]["b|c"]["pairs"] == 6
    text = (tmp_path / "spec.md").read_text()
    assert "| b\\|c |" in text
    assert "6 of 6" in text
    assert "not resolved" in text
    assert "Incomplete" in text
    assert (tmp_path / "spec.png").read_bytes().startswith(b"\x89PNG")


async def test_load_files(tmp_path: Path, renderer: PromptRenderer) -> None:
    settings = load_settings(rate=(300.0,), requests_per_rate=3, pairs=1, concurrency=(1, 2))
    blocks = await load.run_load([FakeEngine("a"), FakeEngine("b")], QUESTIONS, renderer, settings)
    tables = write_load(tmp_path, settings, blocks, {}, {"a": {}, "b": {}})
    assert [t.title for t in tables] == ["concurrency 1", "concurrency 2", "300 requests/s"]
    document = json.loads((tmp_path / "load.json").read_text())
    assert [len(b["records"]) for b in document["blocks"]] == [2, 2, 4, 4, 3, 3]
    assert "goodput" in (tmp_path / "load.md").read_text()
    assert (tmp_path / "load.png").stat().st_size > 1000
