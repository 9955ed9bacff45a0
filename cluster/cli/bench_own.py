"""`s2d bench step`, `soak` and `start`: what only our own system is measured for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.bench_common import checked, run_blocking, run_measurement

Source = Annotated[str | None, typer.Option(help="The model: folder, hub id, or package:NAME.")]
DType = Annotated[str, typer.Option(help="Precision of the weights.")]
ServerConfig = Annotated[Path | None, typer.Option("--config", "-c", help="YAML of `s2d serve`.")]
Threads = Annotated[int, typer.Option(min=0, help="Compute threads; 0 takes the physical cores.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws what is random.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for JSON, Markdown and PNG.")]


def step(
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, int8, float32; may be repeated. All by default.")
    ] = None,
    source: Source = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Rows of one sequence in a step; may be repeated.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Context lengths, at least 4; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at each context; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Times that every point is measured.")] = 15,
    row_invariance_price: Annotated[
        bool, typer.Option("--row-invariance-price", help="Also the products of a step against torch's.")
    ] = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Also agreement and KL divergence with float32.")
    ] = False,
    agreement_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer there.")] = 16,
    threads: Threads = 0,
    seed: Seed = 0,
    out: Out = Path("bench-results/step"),
) -> None:
    """Step times of the engine alone: against rows, and against context and batch size."""
    from cluster.bench.config import StepSettings

    def many(values: list[int] | None) -> tuple[int, ...] | None:
        return tuple(values) if values else None

    settings = checked(
        StepSettings, dtypes=tuple(dtype) if dtype else None, source=source, rows=many(rows),
        contexts=many(context), batches=many(batch), repeats=repeats, threads=threads, seed=seed,
        row_invariance_price=row_invariance_price, agreement=agreement, agreement_tokens=agreement_tokens,
    )  # fmt: skip

    def measure() -> None:
        from cluster.bench.step.command import measure_step

        measure_step(settings, out)

    run_blocking(measure)


def soak(
    requests: Annotated[int, typer.Option(min=20, help="Requests in all.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    limit: Annotated[float, typer.Option(help="Growth in percent that still counts as flat.")] = 2.0,
    source: Source = None,
    dtype: DType = "bfloat16",
    config: ServerConfig = None,
    kv_blocks: Annotated[
        int, typer.Option(min=0, help="KV pool, small so that the warm-up fills it; 0 leaves it.")
    ] = 272,
    sample: Annotated[float, typer.Option(help="Seconds between readings of memory.")] = 3.0,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 120.0,
    threads: Threads = 0,
    seed: Seed = 0,
    out: Out = Path("bench-results/soak"),
) -> None:
    """Memory of every process of the server under mixed requests. Exits with 1 when it grows."""
    from cluster.bench.config import SoakSettings

    settings = checked(
        SoakSettings, requests=requests, concurrency=concurrency, limit=limit, source=source, dtype=dtype,
        server_config=config, kv_blocks=kv_blocks, sample_s=sample, request_timeout_s=timeout,
        threads=threads, seed=seed,
    )  # fmt: skip

    async def measure() -> bool:
        from cluster.bench.soak.command import measure_soak

        return await measure_soak(settings, out)

    if not run_measurement(measure):
        raise typer.Exit(1)


def start(
    repeats: Annotated[int, typer.Option(min=1, help="Starts to measure.")] = 3,
    source: Source = None,
    dtype: DType = "bfloat16",
    config: ServerConfig = None,
    threads: Threads = 0,
    out: Out = Path("bench-results/start"),
) -> None:
    """Cold start by phase, from `s2d serve` to the first token of a first request."""
    from cluster.bench.config import StartSettings

    settings = checked(
        StartSettings, repeats=repeats, source=source, dtype=dtype, server_config=config, threads=threads
    )

    async def measure() -> None:
        from cluster.bench.start.command import measure_start

        await measure_start(settings, out)

    run_measurement(measure)
