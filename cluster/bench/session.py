"""A whole measurement: model and prompts, engines up, progress, files, engines down."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from actors.models.convert import model_folder
from actors.models.llama_load import UnsupportedModelError
from actors.models.source import ModelSourceError, resolve_source
from actors.native.library import NativeUnavailableError
from actors.sampling.params import ParameterError
from cluster.bench import load, spec_bench
from cluster.bench.config import CommonSettings, LoadSettings, ProfileSettings, SpecSettings
from cluster.bench.datasets import DatasetError, Question, builtin, read_spec_bench, sample
from cluster.bench.engines.interface import BenchEngine, EngineUnavailableError
from cluster.bench.engines.registry import EngineContext, check, create
from cluster.bench.environment import environment
from cluster.bench.load import Block
from cluster.bench.profile import ProfileRow, require_psutil, run_profile
from cluster.bench.records import Record
from cluster.bench.rendering import PromptRenderer
from cluster.bench.report import write_load, write_profile, write_spec
from cluster.bench.running import BenchError, running
from cluster.bench.turns import Turns
from cluster.config import EMBEDDED_MODEL, ClusterConfig, DTypeName, ModelConfig
from cluster.reporting.table import Table

EXPECTED_ERRORS = (
    BenchError, DatasetError, EngineUnavailableError, ModelSourceError, ParameterError, TimeoutError, OSError,
    UnsupportedModelError, NativeUnavailableError, yaml.YAMLError, ValidationError,
)  # fmt: skip
"""What ends a run with one line instead of a traceback."""

S = TypeVar("S", bound=CommonSettings)
F = TypeVar("F")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Session:
    engines: Sequence[BenchEngine]
    questions: tuple[Question, ...]
    renderer: PromptRenderer
    machine: Mapping[str, Any]
    console: Console
    turns: Turns

    def descriptions(self) -> dict[str, Mapping[str, Any]]:
        return {engine.name: engine.describe() for engine in self.engines}


def run_to_end(work: Coroutine[Any, Any, R]) -> R:
    """Like asyncio.run; SIGTERM cancels the work as Ctrl-C does, so that what was started is stopped."""

    async def guarded() -> R:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    return asyncio.run(guarded())


async def measure_spec(settings: SpecSettings, out: Path, api_key: str | None = None) -> None:
    """Raises one of `EXPECTED_ERRORS`. An interrupted run writes what it has and says so in the files."""
    records: list[Record] = []

    def total(session: Session) -> int:
        turns = sum(len(q.turns) if settings.all_turns else 1 for q in session.questions)
        return turns * settings.pairs * len(session.engines)

    async with _measurement(settings, out, api_key, records, total, write_spec) as (session, advance):
        await spec_bench.run_spec_bench(
            session.engines,
            session.questions,
            session.renderer,
            settings,
            advance,
            records,
            session.turns,
        )


async def measure_load(settings: LoadSettings, out: Path, api_key: str | None = None) -> None:
    """As `measure_spec`."""
    blocks: list[Block] = []

    def total(session: Session) -> int:
        return len(load.points(settings)) * settings.pairs * len(session.engines)

    async with _measurement(settings, out, api_key, blocks, total, write_load) as (session, advance):
        await load.run_load(
            session.engines,
            session.questions,
            session.renderer,
            settings,
            advance,
            blocks,
            session.turns,
        )


async def measure_profile(settings: ProfileSettings, out: Path, api_key: str | None = None) -> None:
    """As `measure_spec`, but an interrupted run writes nothing: its shares would not be comparable."""
    require_psutil()
    rows: list[ProfileRow] = []

    def total(session: Session) -> int:
        return len(settings.concurrency) * settings.pairs * len(session.engines)

    async with _measurement(settings, out, api_key, rows, total, write_profile) as (session, advance):
        rows += await run_profile(session.engines, session.questions, session.renderer, settings, advance)


@asynccontextmanager
async def _measurement(
    settings: S,
    out: Path,
    api_key: str | None,
    found: Sequence[F],
    total: Callable[[Session], int],
    write: Callable[
        [Path, S, Sequence[F], Mapping[str, Any], Mapping[str, Mapping[str, Any]], str | None], list[Table]
    ],
) -> AsyncIterator[tuple[Session, Callable[[object], None]]]:
    """Yields a session and what to call after each of `total` steps. `found` is filled meanwhile; at the end,
    also an early one, it is written by `write`."""
    async with _session(settings, api_key) as session:

        def save(interrupted: str | None) -> list[Table]:
            return write(out, settings, found, session.machine, session.descriptions(), interrupted)

        with saving(session.console, out, save, lambda: bool(found)), progress_bar(session.console) as bar:
            task = bar.add_task("measuring", total=total(session))
            yield session, lambda _: bar.advance(task)


class saving:
    """Writes the files when the block ends, also when it ends early, and shows the tables."""

    def __init__(
        self,
        console: Console,
        out: Path,
        save: Callable[[str | None], list[Table]],
        anything: Callable[[], bool],
    ) -> None:
        self._console, self._out, self._save, self._anything = console, out, save, anything

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._anything():
            return
        results = Console()
        for table in self._save(None if kind is None else f"{kind.__name__}: {error}"):
            shown = RichTable(title=Text(table.title))
            for column in table.columns:
                shown.add_column(Text(column))
            for row in table.rows:
                shown.add_row(*map(Text, row))
            results.print(shown)
        self._console.print(f"written to {self._out}", markup=False)


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


@asynccontextmanager
async def _session(settings: CommonSettings, api_key: str | None) -> AsyncIterator[Session]:
    console = Console(stderr=True)
    for engine in settings.engines:
        check(engine, settings.concurrency_limit)  # before anything that takes time
    questions = sample(_questions(settings), settings.per_task, settings.seed)
    config = server_config(settings)
    source = config.models[0].source
    folder = await asyncio.to_thread(
        lambda: model_folder(resolve_source(source), progress=lambda text: console.print(text, markup=False))
    )
    renderer = PromptRenderer(folder)
    context = EngineContext(
        folder=folder,
        source=source,
        dtype=settings.dtype,
        server_config=config,
        concurrency=settings.concurrency_limit,
        threads=settings.threads,
        max_model_len=context_needed(questions, renderer, settings),
        api_key=api_key,
        reset=settings.reset,
        request_timeout_s=settings.request_timeout_s,
    )
    engines = [create(engine, context) for engine in settings.engines]
    # Before any engine runs: the bandwidth is that of an idle machine.
    machine = await asyncio.to_thread(environment)
    async with running(engines, lambda text: console.print(text, markup=False)):
        with Turns(engines, settings.exclusive) as turns:
            await turns.begin()
            yield Session(engines, questions, renderer, machine, console, turns)


def context_needed(questions: Sequence[Question], renderer: PromptRenderer, settings: CommonSettings) -> int:
    """Tokens of the longest conversation with answers of full length, in steps of 256 and at least 2048."""
    longest = 0
    for question in questions:
        turns = (
            question.turns
            if isinstance(settings, SpecSettings) and settings.all_turns
            else question.turns[:1]
        )
        prompt = renderer.render(turns, [""] * (len(turns) - 1))
        longest = max(longest, len(prompt.ids) + len(turns) * settings.max_tokens)
    return max(2048, -(-longest // 256) * 256)


def _questions(settings: CommonSettings) -> tuple[Question, ...]:
    return builtin() if settings.path is None else read_spec_bench(settings.path)


def server_config(settings: CommonSettings) -> ClusterConfig:
    """The given file with the precision of this run, or one model of the given source. Raises OSError,
    yaml.YAMLError and pydantic.ValidationError."""
    return own_server_config(settings.source, settings.dtype, settings.server_config)


def own_server_config(source: str, dtype: DTypeName, file: Path | None, **engine: int) -> ClusterConfig:
    """As `server_config`; `engine`: fields of the first model's engine, where 0 keeps what they are."""
    if file is not None:
        config = ClusterConfig.from_yaml(file)
    else:
        default = ClusterConfig.default()
        own = ClusterConfig(models=(ModelConfig(name="model", source=source),))
        config = default if source == EMBEDDED_MODEL else own
    first = config.models[0]
    changed = first.engine.model_copy(update={k: v for k, v in engine.items() if v})
    first = first.model_copy(update={"dtype": dtype, "engine": changed})
    return config.model_copy(update={"models": (first, *config.models[1:])})
