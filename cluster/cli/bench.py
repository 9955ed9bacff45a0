"""`s2d bench`: this system and others on the same prompts, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actors.engine.messages import ResetScope
from cluster.bench.peers.install import install_command
from cluster.cli.bench_choice import choice, replay, trace
from cluster.cli.bench_common import checked, run_measurement
from cluster.cli.bench_own import soak, start, step

bench = typer.Typer(
    name="bench",
    help="Measure this system, and others on the same prompts, in one run.",
    no_args_is_help=True,
)
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        help="s2d-plain, s2d-auto, s2d-all, s2d-model-free, s2d-DRAFTER, a peer, or NAME=URL; repeatable.",
    ),
]
Baseline = Annotated[str | None, typer.Option(help="Engine that ratios refer to; the first by default.")]
Dataset = Annotated[str, typer.Option(help="builtin or spec-bench.")]
DataPath = Annotated[Path | None, typer.Option("--path", help="Spec-Bench's question.jsonl.")]
PerTask = Annotated[int | None, typer.Option(min=1, help="Questions a task group; all by default.")]
Source = Annotated[str | None, typer.Option(help="The model: folder, hub id, or package:NAME.")]
DType = Annotated[str, typer.Option(help="Precision of the weights.")]
ServerConfig = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML of `s2d serve` for our own server.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens a request.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses questions and arrivals.")]
Threshold = Annotated[float, typer.Option(help="Ratio that comparisons are tested against.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds a request may take.")]
Threads = Annotated[int, typer.Option(min=0, help="Compute threads of every engine; 0: its own choice.")]
Exclusive = Annotated[
    bool, typer.Option("--exclusive", help="Stop the other engines' processes during an engine's turn.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="S2D_BENCH_API_KEY", help="For endpoints given by URL.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for JSON, Markdown and PNG.")]


@bench.command()
def spec(
    engine: Engines = None,
    baseline: Baseline = None,
    dataset: Dataset = "builtin",
    path: DataPath = None,
    per_task: PerTask = None,
    source: Source = None,
    dtype: DType = "bfloat16",
    config: ServerConfig = None,
    max_tokens: MaxTokens = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate exactly --max-tokens tokens.")
    ] = False,
    all_turns: Annotated[
        bool, typer.Option("--all-turns", help="Also later turns, on the engine's own answers.")
    ] = False,
    temperature: Temperature = 0.0,
    pairs: Annotated[int, typer.Option(min=1, help="Times every question is asked.")] = 1,
    seed: Seed = 0,
    threshold: Threshold = 1.0,
    timeout: Timeout = 300.0,
    threads: Threads = 0,
    exclusive: Exclusive = False,
    api_key: ApiKey = None,
    out: Out = Path("bench-results/spec"),
) -> None:
    """Spec-Bench protocol: tokens/s, speed-up, mean accepted tokens and equality by task group."""
    from cluster.bench.config import SpecSettings
    from cluster.bench.session import measure_spec

    settings = _settings(
        SpecSettings, engine, baseline=baseline, dataset=dataset, path=path, per_task=per_task, source=source,
        dtype=dtype, server_config=config, max_tokens=max_tokens, ignore_eos=ignore_eos, all_turns=all_turns,
        temperature=temperature, pairs=pairs, seed=seed, threshold=threshold, request_timeout_s=timeout,
        threads=threads, exclusive=exclusive,
    )  # fmt: skip
    _run(measure_spec, settings, out, api_key)


@bench.command()
def load(
    engine: Engines = None,
    baseline: Baseline = None,
    dataset: Dataset = "builtin",
    path: DataPath = None,
    per_task: PerTask = None,
    source: Source = None,
    dtype: DType = "bfloat16",
    config: ServerConfig = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Closed loop: requests in flight; may be repeated.")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Open loop: Poisson arrivals a second; may be repeated.")
    ] = None,
    max_tokens: MaxTokens = 64,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Let answers end early; all have --max-tokens otherwise.")
    ] = False,
    requests_per_stream: Annotated[
        int, typer.Option(min=1, help="Closed loop: requests a block, per stream.")
    ] = 2,
    requests_per_rate: Annotated[int, typer.Option(min=2, help="Open loop: requests a block.")] = 16,
    reset: Annotated[
        ResetScope,
        typer.Option(help="Of our own server, before each block; caches keeps what was measured of drafts."),
    ] = "all",
    temperature: Temperature = 0.0,
    pairs: Annotated[int, typer.Option(min=1, help="Blocks of every engine, at every point.")] = 15,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: longest time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Goodput: longest time per token.")] = None,
    seed: Seed = 0,
    threshold: Threshold = 1.0,
    timeout: Timeout = 300.0,
    threads: Threads = 0,
    exclusive: Exclusive = False,
    api_key: ApiKey = None,
    out: Out = Path("bench-results/load"),
) -> None:
    """Serving load: TTFT, TPOT, throughput and goodput at given concurrencies and arrival rates."""
    from cluster.bench.config import LoadSettings
    from cluster.bench.session import measure_load

    points: dict[str, Any] = {"rate": tuple(rate or ())}
    if concurrency or rate:
        points["concurrency"] = tuple(concurrency or ())
    settings = _settings(
        LoadSettings, engine, baseline=baseline, dataset=dataset, path=path, per_task=per_task, source=source,
        dtype=dtype, server_config=config, max_tokens=max_tokens, ignore_eos=not stop_at_eos,
        reset=reset, requests_per_stream=requests_per_stream, requests_per_rate=requests_per_rate,
        temperature=temperature, pairs=pairs, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, seed=seed,
        threshold=threshold, request_timeout_s=timeout, threads=threads, exclusive=exclusive,
        **points,
    )  # fmt: skip
    _run(measure_load, settings, out, api_key)


@bench.command()
def profile(
    engine: Engines = None,
    source: Source = None,
    dtype: DType = "bfloat16",
    config: ServerConfig = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests in flight; may be repeated.")
    ] = None,
    max_tokens: MaxTokens = 64,
    requests_per_stream: Annotated[int, typer.Option(min=1, help="Requests a block, per stream.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="Blocks of every engine, added up.")] = 3,
    timeout: Timeout = 300.0,
    threads: Threads = 0,
    out: Out = Path("bench-results/profile"),
) -> None:
    """Split our own rounds into forward passes, sampling, wire, scheduling and Serve, as a stacked plot."""
    from cluster.bench.config import ProfileSettings
    from cluster.bench.session import measure_profile

    settings = _settings(
        ProfileSettings, engine, source=source, dtype=dtype, server_config=config, max_tokens=max_tokens,
        requests_per_stream=requests_per_stream, pairs=pairs, request_timeout_s=timeout, threads=threads,
        concurrency=tuple(concurrency) if concurrency else None,
    )  # fmt: skip
    _run(measure_profile, settings, out, None)


bench.command("install")(install_command)
bench.command("step")(step)
bench.command("soak")(soak)
bench.command("start")(start)
bench.command("trace")(trace)
bench.command("replay")(replay)
bench.command("choice")(choice)


def _settings(kind: Any, engines: list[str] | None, **given: Any) -> Any:
    if engines:
        given["engines"] = tuple(engines)
    return checked(kind, **given)


def _run(measure: Any, settings: Any, out: Path, api_key: str | None) -> None:
    run_measurement(lambda: measure(settings, out, api_key))
