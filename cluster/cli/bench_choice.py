"""`s2d bench trace`, `replay` and `choice`: how good the router's and the controller's choice is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.bench_common import checked, run_blocking, run_measurement
from cluster.cli.common import fail, out

tell = partial(out.print, markup=False)
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder for JSON, Markdown and PNG.")]


def trace(
    file: Annotated[Path, typer.Argument(help="Trace to write (.safetensors).")],
    source: Annotated[str | None, typer.Option(help="The target: folder, hub id, or package:NAME.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the target.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML of `s2d serve` whose nested draft is recorded."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="builtin or spec-bench.")] = None,
    path: Annotated[Path | None, typer.Option("--path", help="Spec-Bench's question.jsonl.")] = None,
    per_task: Annotated[int | None, typer.Option(help="Questions a task group.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.")] = None,
    max_prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt that are kept.")] = None,
    chain: Annotated[int | None, typer.Option(help="Tokens drafted at each place.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads; 0: the physical cores.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses questions.")] = None,
) -> None:
    """Record a target's greedy answers, what every exit would have drafted at every place, and the costs."""
    from cluster.bench.choice.record import record_trace
    from cluster.bench.choice.settings import TraceSettings
    from cluster.config import ClusterConfig
    from cluster.simulator.trace import TraceError, save_trace

    def measure() -> None:
        nested = None
        if config is not None:
            nested = ClusterConfig.from_yaml(config).draft_pool.nested
            if nested is None:
                raise fail(f"{config}: draft_pool.nested: is required")
        settings = checked(
            TraceSettings, source=source, dtype=dtype, nested=nested, dataset=dataset, path=path,
            per_task=per_task, max_tokens=max_tokens, max_prompt=max_prompt, chain=chain, threads=threads,
            seed=seed,
        )  # fmt: skip
        try:
            card = save_trace(record_trace(settings, tell), file)
        except (TraceError, ValueError) as error:
            raise fail(str(error)) from error
        tell(f"{len(card.tasks)} answers of {card.target} in {file}, {card.content_hash[:12]}")

    run_blocking(measure)


def replay(
    traces: Annotated[list[Path], typer.Argument(help="Traces of `s2d bench trace`.")],
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at once; may be repeated.")] = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="What the free choice drafts with, in order; nested by default.")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Factor on the target's costs, as if it were larger; may be repeated."),
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Round trip to the draft worker.")] = None,
    measured: Annotated[float | None, typer.Option(help="Simulated seconds that count.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of answers, and noise.")] = None,
    folder: Folder = Path("bench-results/choice"),
) -> None:
    """Replay traces: router and controller against every fixed (exit, length) and plain decoding.

    Exits with 1 when a cell misses a bound: 0.95 of the best fixed setting, 0.97 of plain decoding.
    """
    from rich.progress import Progress

    from cluster.simulator.choice_quality import measure_cells
    from cluster.simulator.choice_report import write
    from cluster.simulator.replay import ReplaySettings
    from cluster.simulator.trace import TraceError, load_trace

    settings = checked(
        ReplaySettings, concurrency=tuple(concurrency) if concurrency else None,
        drafters=tuple(drafter) if drafter else None, latency_ms=latency_ms, measured_s=measured, seed=seed,
    )  # fmt: skip
    scales = tuple(scale or (1.0,))
    if min(scales) <= 0:
        raise fail("scale: must be greater than 0")
    try:
        loaded = [load_trace(path) for path in traces]
        with Progress(console=out, transient=True) as bar:
            total = sum(len(t.tasks) for t in loaded) * len(settings.concurrency) * len(scales)
            task = bar.add_task("cells", total=total)
            cells = measure_cells(loaded, settings, scales, lambda cell: bar.advance(task))
        result = write(folder, [t.card for t in loaded], settings, cells)
    except (TraceError, ValueError, OSError) as error:
        raise fail(str(error)) from error
    tell(
        f"{result['held']} of {result['cells']} cells hold; lowest {result['lowest_to_best']:.3f} of the "
        f"best fixed setting, {result['lowest_to_plain']:.3f} of plain decoding; files in {folder}"
    )
    if result["held"] < result["cells"]:
        raise typer.Exit(1)


def choice(
    replayed: Annotated[Path, typer.Argument(help="choice.json of `s2d bench replay`.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML of `s2d serve` with that draft.")],
    path: Annotated[Path | None, typer.Option("--path", help="Spec-Bench's question.jsonl.")] = None,
    cells: Annotated[int | None, typer.Option(help="Cells to measure.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Blocks of every setting in every cell.")] = None,
    per_task: Annotated[int | None, typer.Option(help="Questions a task group; all by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.")] = None,
    requests_per_stream: Annotated[int | None, typer.Option(help="Requests a block, per stream.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds a request may take.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses questions.")] = None,
    folder: Folder = Path("bench-results/choice-live"),
) -> None:
    """Live: the free choice against the replay's best fixed settings, paired and alternating.

    Exits with 1 when the 95 % bound of a ratio does not show 0.93.
    """
    from cluster.bench.choice.live import measure_choice, table
    from cluster.bench.choice.settings import LiveSettings

    settings = checked(
        LiveSettings, replayed=replayed, server_config=config, path=path, cells=cells, pairs=pairs,
        per_task=per_task, max_tokens=max_tokens, requests_per_stream=requests_per_stream,
        request_timeout_s=timeout, seed=seed,
    )  # fmt: skip

    async def measure() -> bool:
        rows = await measure_choice(settings, folder, tell)
        tell(table(rows).markdown())
        return all(row.holds for row in rows)

    if not run_measurement(measure):
        raise typer.Exit(1)
