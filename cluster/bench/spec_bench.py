"""The Spec-Bench protocol: one request at a time, each question on every engine in turn, shared state reset
before each, figures by task group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from cluster.bench.config import SpecSettings
from cluster.bench.datasets import TASKS, Question
from cluster.bench.engines.interface import BenchEngine, BenchRequest, BenchResponse
from cluster.bench.metrics import Acceptance, Percentiles, tokens_per_second, tpot
from cluster.bench.paired import Comparison, compare, with_plain
from cluster.bench.records import Record
from cluster.bench.rendering import PromptRenderer, RenderedPrompt
from cluster.bench.running import ask, reset, rotated, warm_up
from cluster.bench.turns import Turns

OVERALL = "overall"


async def run_spec_bench(
    engines: Sequence[BenchEngine],
    questions: Sequence[Question],
    renderer: PromptRenderer,
    settings: SpecSettings,
    advance: Callable[[Record], None] = lambda record: None,
    keep: list[Record] | None = None,
    turns: Turns | None = None,
) -> list[Record]:
    """A record a turn. They are appended to `keep` as they come, so that an interrupted run keeps what it
    has. Raises BenchError when an engine cannot be warmed up or reset."""
    records = [] if keep is None else keep
    turns = turns or Turns()
    first = _request("warm-up", renderer.render(questions[0].turns[:1]), settings)
    for engine in engines:
        await turns.give_to(engine)
        await warm_up(engine, [first], settings.request_timeout_s)
    step = 0
    for pair in range(settings.pairs):
        for question in questions:
            for order, engine in enumerate(rotated(engines, step)):
                await turns.give_to(engine)
                await reset(engine)
                for record in await _conversation(engine, question, renderer, settings, pair, order):
                    records.append(record)
                    advance(record)
            step += 1
    return records


def _request(request_id: str, prompt: RenderedPrompt, settings: SpecSettings) -> BenchRequest:
    return BenchRequest(
        request_id,
        prompt.ids,
        prompt.text,
        settings.max_tokens,
        settings.ignore_eos,
        settings.temperature,
        settings.seed,
    )


async def _conversation(
    engine: BenchEngine,
    question: Question,
    renderer: PromptRenderer,
    settings: SpecSettings,
    pair: int,
    order: int,
) -> list[Record]:
    """All turns that are asked for, each on the engine's own earlier answers; a failed turn ends it."""
    records: list[Record] = []
    answers: list[str] = []
    for turn in range(len(question.turns) if settings.all_turns else 1):
        prompt = renderer.render(question.turns, answers)
        request_id = f"{engine.name}/{question.question_id}/{pair}/{turn}"
        response = await ask(engine, _request(request_id, prompt, settings), settings.request_timeout_s)
        records.append(
            Record(
                engine.name,
                pair,
                order,
                question.question_id,
                question.task,
                len(prompt.ids),
                response,
                turn=turn,
            )
        )
        if response.error is not None:
            break
        answers.append(response.text)
    return records


@dataclass(frozen=True, slots=True)
class Equality:
    """Answers compared with the baseline's. ids: of those whose ids both engines tell."""

    compared: int
    bytes_equal: int
    ids_compared: int
    ids_equal: int


@dataclass(frozen=True, slots=True)
class SpecRow:
    """One engine on one task group, or on all (`task` is "overall").

    tokens_per_s: mean over requests, as Spec-Bench reports it. speedup: ratio of these means to the
    baseline's (Spec-Bench's definition; for "overall" the mean over the task groups). tpot_ms: median.
    paired: ratios within pairs, with their bound. mean_accepted_tokens is None where the engine does not
    report acceptance; paired and equality of the baseline itself are None.
    """

    engine: str
    task: str
    requests: int
    errors: int
    output_tokens: int
    tokens_per_s: float | None
    tpot_ms: float | None
    mean_accepted_tokens: float | None
    acceptance: Acceptance | None
    speedup: float | None
    paired: Comparison | None
    equality: Equality | None


def summarize(records: Sequence[Record], baseline: str, threshold: float = 1.0) -> list[SpecRow]:
    """Rows for every engine: each task group in Spec-Bench's order, then all together."""
    rows: list[SpecRow] = []
    for engine in dict.fromkeys(r.engine for r in records):
        mine: list[SpecRow] = []
        for task in (t for t in TASKS if any(r.task == t for r in records)):
            of_task = [r for r in records if r.task == task]
            mine.append(_row(of_task, engine, baseline, task, threshold))
        speedups = [row.speedup for row in mine if row.speedup is not None]
        mean = sum(speedups) / len(speedups) if speedups else None
        rows += [*mine, _row(records, engine, baseline, OVERALL, threshold, mean)]
    return rows


def speeds(records: Sequence[Record], engine: str) -> dict[Hashable, float]:
    """Tokens/s of an engine's requests that ended well, by what was asked in which pair."""
    found: dict[Hashable, float] = {}
    for record in records:
        speed = tokens_per_second(record.response)
        if record.engine == engine and record.response.error is None and speed is not None:
            found[_key(record)] = speed
    return found


def _key(record: Record) -> tuple[int, str, int]:
    return record.pair, record.question_id, record.turn


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _row(
    records: Sequence[Record],
    engine: str,
    baseline: str,
    task: str,
    threshold: float,
    speedup: float | None = None,
) -> SpecRow:
    mine = [r.response for r in records if r.engine == engine]
    good = [r for r in mine if r.error is None]
    our_speeds, base_speeds = speeds(records, engine), speeds(records, baseline)
    ours, base = _mean(list(our_speeds.values())), _mean(list(base_speeds.values()))
    if speedup is None and ours is not None and base is not None:
        speedup = ours / base
    acceptance = Acceptance.of(good)
    per_token = Percentiles.of(map(tpot, good))
    return SpecRow(
        engine=engine,
        task=task,
        requests=len(mine),
        errors=len(mine) - len(good),
        output_tokens=sum(r.num_tokens for r in good),
        tokens_per_s=ours,
        tpot_ms=None if per_token is None else per_token.p50 * 1e3,
        mean_accepted_tokens=acceptance.mean_accepted_tokens if acceptance else None,
        acceptance=acceptance,
        speedup=speedup,
        paired=None if engine == baseline else compare(our_speeds, base_speeds, threshold),
        equality=None if engine == baseline else equality(records, engine, baseline),
    )


def equality(records: Sequence[Record], engine: str, baseline: str) -> Equality:
    """Counts over the requests that both answered."""
    ours, theirs = _answers(records, engine), _answers(records, baseline)
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    with_ids = [(a.token_ids, b.token_ids) for a, b in both if a.token_ids and b.token_ids]
    return Equality(
        compared=len(both),
        bytes_equal=sum(a.text.encode() == b.text.encode() for a, b in both),
        ids_compared=len(with_ids),
        ids_equal=sum(a == b for a, b in with_ids),
    )


def _answers(records: Sequence[Record], engine: str) -> Mapping[Hashable, BenchResponse]:
    return {_key(r): r.response for r in records if r.engine == engine and r.response.error is None}


@dataclass(frozen=True, slots=True)
class PlainRow:
    """A speculating engine against the same one without speculation, over all tasks."""

    engine: str
    plain: str
    paired: Comparison | None
    equality: Equality


def against_plain(
    records: Sequence[Record], plain_of: Callable[[str], str | None], threshold: float = 1.0
) -> list[PlainRow]:
    """Rows for the engines whose plain counterpart was measured too."""
    return [
        PlainRow(
            engine,
            plain,
            compare(speeds(records, engine), speeds(records, plain), threshold),
            equality(records, engine, plain),
        )
        for engine, plain in with_plain((record.engine for record in records), plain_of)
    ]


def matrix(records: Sequence[Record], threshold: float = 1.0) -> dict[str, dict[str, Comparison | None]]:
    """Every engine against every other, over all tasks: [row][column] is row's speed over column's."""
    of_engine = {engine: speeds(records, engine) for engine in dict.fromkeys(r.engine for r in records)}
    return {
        ours: {
            theirs: compare(of_engine[ours], of_engine[theirs], threshold)
            for theirs in of_engine
            if theirs != ours
        }
        for ours in of_engine
    }
