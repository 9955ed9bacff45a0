"""`s2d draft`: data for a nested draft, its training, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cluster.cli.common import err, fail, out, say

T = TypeVar("T")
draft = typer.Typer(
    name="draft",
    help="Train nested drafts: data, sorted fine-tuning, evaluation.",
    no_args_is_help=True,
)
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML of all settings; options given here win.")
]
Exits = Annotated[list[int] | None, typer.Option("--exit", help="Depth in layers; may be repeated.")]
DType = Annotated[str | None, typer.Option(help="bfloat16, float32 or int8.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or auto.")]
Threads = Annotated[int | None, typer.Option(min=0, help="Compute threads; 0 takes the physical cores.")]
Seed = Annotated[int | None, typer.Option(min=0)]


@draft.command()
def data(
    config: Config = None,
    source: Annotated[str | None, typer.Option(help="The target: folder, hub id or package:NAME.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the data set.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Conversations to generate.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts to answer instead.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text or chat JSONL; may be repeated.")] = None,
    max_len: Annotated[int | None, typer.Option(min=16, help="Tokens of a sequence.")] = None,
    greedy_share: Annotated[float | None, typer.Option(help="Share of greedy answers.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences generated at once.")] = None,
    part: Annotated[str | None, typer.Option(help="I/N: the I-th of N processes on one folder.")] = None,
    resident: Annotated[bool | None, typer.Option(help="One fixed batch on the device, for a GPU.")] = None,
    teacher_top: Annotated[int | None, typer.Option(min=0, help="Log-probabilities kept a token.")] = None,
    teacher_out: Annotated[Path | None, typer.Option(help="Folder of the log-probabilities.")] = None,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
    seed: Seed = None,
) -> None:
    """Make a data set: the target's own conversations, its answers to given prompts, or files. Run it again
    to go on where it stopped."""
    from actors.training.collect import collect_data
    from actors.training.settings import DataSettings

    def work() -> None:
        settings = DataSettings.read(
            config,
            {
                "source": source, "out": folder, "samples": samples, "prompts": prompts,
                "texts": tuple(text) if text else None, "max_len": max_len, "greedy_share": greedy_share,
                "batch": batch, "part": part, "resident": resident, "teacher_top": teacher_top,
                "teacher_out": teacher_out,
                "dtype": dtype, "device": device, "threads": threads, "seed": seed,
            },
        )  # fmt: skip
        total = None if settings.prompts or settings.texts else settings.samples
        with _counting("conversations", total) as advance:
            collect_data(settings, say, advance)
        out.print(f"data set: {settings.out}", markup=False)

    _guard(work)


@draft.command()
def prompts(
    source: Annotated[str, typer.Option(help="The target, for its tokenizer.")],
    folder: Annotated[Path, typer.Option("--data", "-d", help="Data set whose answers become passages.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="JSONL to write.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts to write.")] = 1200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write user turns for tasks (translation, summaries, questions, ...) around texts that a target wrote.

    `s2d draft data --prompts` then has the target answer them."""
    import json

    from actors.files import complete_or_absent
    from actors.models.convert import model_folder
    from actors.models.source import resolve_source
    from actors.text.tokenizer import TextTokenizer
    from actors.training.tasks import TaskWriter
    from actors.training.token_store import iter_shards

    def work() -> None:
        tokenizer = TextTokenizer(model_folder(resolve_source(source), say))
        texts = [
            tokenizer.decode(s.ids[s.labels_from :], skip_special_tokens=True)
            for _, shard in iter_shards(folder)
            for s in shard
        ]
        lines = [
            json.dumps({"task": p.task, "prompt": p.prompt}, ensure_ascii=False)
            for p in TaskWriter(texts, seed).prompts(count)
        ]
        with complete_or_absent(target) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        out.print(f"{len(lines)} prompts: {target}", markup=False)

    _guard(work)


@draft.command()
def teach(
    config: Config = None,
    folder: Annotated[Path | None, typer.Option("--data", "-d", help="Folder of the data set.")] = None,
    source: Annotated[str | None, typer.Option(help="The target.")] = None,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Tokens kept a position.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens of one pass.")] = None,
    states: Annotated[
        bool | None, typer.Option("--states", help="Keep the target's hidden states too, to draft from.")
    ] = None,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Store a target's top log-probabilities over a data set: for texts, and for further targets."""
    from actors.training.collect import teach as run_teacher
    from actors.training.settings import TeacherSettings

    def work() -> None:
        settings = TeacherSettings.read(
            config,
            {
                "data": folder, "source": source, "out": target, "top": top, "batch_tokens": batch_tokens,
                "states": states, "dtype": dtype, "device": device, "threads": threads,
            },
        )  # fmt: skip
        with _counting("sequences", None) as advance:
            written = run_teacher(settings, say, advance)
        out.print(f"teacher: {written}", markup=False)

    _guard(work)


@draft.command()
def train(
    config: Config = None,
    base: Annotated[str | None, typer.Option(help="Model whose first layers become the draft.")] = None,
    folders: Annotated[
        list[Path] | None, typer.Option("--data", "-d", help="Folder of a data set; may be repeated.")
    ] = None,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Checkpoints, curves, artifact.")] = None,
    init: Annotated[str | None, typer.Option(help="Artifact to go on from; else the base.")] = None,
    exits: Exits = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Folder of log-probabilities; may be repeated.")
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="Target that teaches as training goes, instead of stored teachers.")
    ] = None,
    states: Annotated[
        bool | None, typer.Option("--states", help="Read the first teacher's hidden states.")
    ] = None,
    teacher_cache_gb: Annotated[
        float | None, typer.Option(help="Memory of the device for what the teacher found.")
    ] = None,
    withheld: Annotated[float | None, typer.Option(help="Share of tokens without states.")] = None,
    draft_vocab: Annotated[int | None, typer.Option(min=0, help="Tokens in the head; 0: all.")] = None,
    exit_layers: Annotated[bool | None, typer.Option(help="A layer of its own for each exit.")] = None,
    exit_norms: Annotated[bool | None, typer.Option(help="A norm of its own for each exit.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="End by then, whatever the step.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="Packed rows a step.")] = None,
    row_tokens: Annotated[int | None, typer.Option(min=8, help="Tokens of a row.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast.")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile", help="torch.compile, for a GPU.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Attention window in tokens.")] = None,
    max_offset: Annotated[int | None, typer.Option(min=0, help="Random shift of positions.")] = None,
    storage: Annotated[str | None, typer.Option(help="bfloat16 or int8.")] = None,
    device: Device = None,
    threads: Threads = None,
    seed: Seed = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Train on Ray with so many workers; not given: here.")
    ] = None,
    ray_gpu: Annotated[bool, typer.Option("--ray-gpu", help="One GPU a worker.")] = False,
    ray_cpus: Annotated[float | None, typer.Option(help="CPUs a worker reserves.")] = None,
    ray_max_failures: Annotated[
        int | None, typer.Option(min=0, help="Restarts, each from the last checkpoint.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster.")] = None,
) -> None:
    """Sorted fine-tuning. Run it again to go on from the last checkpoint."""
    from actors.training.settings import TrainSettings

    def work() -> None:
        settings = TrainSettings.read(
            config,
            {
                "base": base, "data": tuple(folders) if folders else None, "out": target, "init": init,
                "exits": tuple(exits) if exits else None,
                "teachers": tuple(teacher) if teacher else None, "draft_vocab": draft_vocab,
                "teacher_model": teacher_model, "states": states, "withheld": withheld, "compile": compiled,
                "teacher_cache_gb": teacher_cache_gb, "minutes": minutes,
                "exit_layers": exit_layers, "exit_norms": exit_norms, "steps": steps,
                "batch_rows": batch_rows, "row_tokens": row_tokens, "lr": lr, "warmup": warmup, "bf16": bf16,
                "window": window, "max_offset": max_offset, "storage": storage, "device": device,
                "threads": threads, "seed": seed,
            },
        )  # fmt: skip
        if ray_workers is None:
            _train_here(settings)
        else:
            from actors.training.on_ray import RaySettings, train_on_ray

            cluster = RaySettings.read(
                None,
                {
                    "workers": ray_workers, "gpu": ray_gpu, "cpus": ray_cpus, "address": ray_address,
                    "max_failures": ray_max_failures,
                },
            )  # fmt: skip
            train_on_ray(settings, cluster)
        out.print(f"artifact: {settings.out / 'draft.safetensors'}", markup=False)

    _guard(work)


def _train_here(settings: Any) -> None:
    import torch

    from actors.models.threads import physical_cores
    from actors.training.loop import train as run_training
    from actors.training.run import build_run

    torch.set_num_threads(settings.threads or physical_cores())
    run = build_run(settings, say)
    with _progress() as progress:
        task = progress.add_task("training", total=settings.steps, note="")

        def on_step(record: dict[str, Any]) -> None:
            note = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}" if "loss" in record else ""
            progress.update(task, completed=record["step"], note=note)
            if "heldout" in record:
                shares = record["heldout"]["teacher_agreement"]
                shown = ", ".join(
                    f"{depth}: {100 * v:.1f} %" for depth, v in zip(settings.exits, shares, strict=True)
                )
                err.print(f"step {record['step']}: held-out agreement by exit {shown}")

        run_training(run, on_step=on_step)


@draft.command("eval")
def evaluate(
    config: Config = None,
    base: Annotated[str | None, typer.Option(help="The artifact's base.")] = None,
    artifact: Annotated[str | None, typer.Option(help="Not given: the base's own layers.")] = None,
    exits: Exits = None,
    folder: Annotated[Path | None, typer.Option("--data", "-d", help="Held-out data set.")] = None,
    heldout: Annotated[
        float | None, typer.Option(help="Only what training with this held-out share did not see.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The target, to measure its cost.")] = None,
    results: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of table and picture.")] = None,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Answers measured.")] = None,
    states: Annotated[Path | None, typer.Option(help="Folder of the target's states.")] = None,
    draft_context: Annotated[
        int | None, typer.Option(min=32, help="Tokens that the draft reads at most (nested.context).")
    ] = None,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Agreement, acceptance, chain lengths, cost and predicted speed-up, exit by exit."""
    from actors.training.eval_run import run_evaluation
    from actors.training.settings import EvalSettings

    def work() -> None:
        settings = EvalSettings.read(
            config,
            {
                "base": base, "artifact": artifact, "exits": tuple(exits) if exits else None, "data": folder,
                "heldout": heldout, "target": target, "out": results, "max_sequences": max_sequences,
                "states": states, "draft_context": draft_context,
                "dtype": dtype, "device": device, "threads": threads,
            },
        )  # fmt: skip
        out.print(run_evaluation(settings, say), markup=False)
        out.print(f"written to {settings.out}", markup=False)

    _guard(work)


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as progress:
        yield progress


@contextmanager
def _counting(what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """A bar over pieces of work that also shows tokens a second."""
    import time

    started, tokens = time.monotonic(), 0
    with _progress() as progress:
        task = progress.add_task(what, total=total, note="")

        def advance(done: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            speed = tokens / max(1e-3, time.monotonic() - started)
            progress.update(task, advance=done, note=f"{tokens} tokens, {speed:.0f}/s")

        yield advance


def _guard(work: Callable[[], T]) -> T:
    """What is expected to go wrong ends the program with one line."""
    import yaml
    from pydantic import ValidationError

    try:
        return work()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise fail(f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}") from error
    except (ValueError, OSError, RuntimeError, FloatingPointError, yaml.YAMLError) as error:
        raise fail(str(error) or type(error).__name__) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
