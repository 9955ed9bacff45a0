"""Decoding speed of one engine, in this process: plain, with each drafter, and Hugging Face `generate`.

    python -m cluster.bench.decode --dtype bfloat16 --out bench-results/decode

The arms run one after the other on the same prompt, in an order that rotates from pair to pair. What requests
share (prefix cache, recycling matrix, averages) is reset before each. Ratios are taken within a pair, so that
a slow minute of the machine hits both sides; the table gives their median and range. The draft worker runs in
a process of its own and is asked over gRPC, as in a cluster.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from actors.drafting.interface import TargetIdentity
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.placed_source import PlacedDraftSource
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import CANDIDATES_WANTED
from actors.engine.build import build_engine
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.models.load import LoadedModel, load_runner
from actors.models.native_llama import NativeLlamaRunner
from actors.sampling.grammar import GrammarCompiler
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import pack
from cluster.bench.draft_process import draft_process
from cluster.bench.environment import cpu_name, read_floor_seconds
from cluster.bench.plot import plot_ratios
from cluster.bench.prompts import PROMPTS
from cluster.config import (
    EMBEDDED_MODEL,
    DraftPoolConfig,
    DTypeName,
    EngineConfig,
    NestedDrafterConfig,
    SpeculationConfig,
)
from cluster.deployments.wiring import local_drafters

Run = Callable[[Sequence[tuple[int, ...]], int], int]
"""Generate so many tokens for each prompt; returns the tokens generated."""
_MAX_SESSIONS = 64
_SLOW_PAIRS = 3
"""Pairs in which Hugging Face `generate` takes part at eight streams: it takes most of the time there."""


@dataclass(slots=True)
class Arm:
    """One way to decode, and what it took: tokens per second by pair. `max_pairs` bounds how often a slow arm
    is measured."""

    name: str
    run: Run
    max_pairs: int = 1 << 30
    rates: dict[int, float] = field(default_factory=dict)
    accepted: int = 0
    drafted: int = 0


class EngineArm:
    """Runs prompts through the engine with fixed speculation parameters."""

    def __init__(self, engine: TorchEngine, speculation: SpeculationParams) -> None:
        self._engine = engine
        self._speculation = speculation
        self.outputs: list[list[int]] = []
        self.drafted = self.accepted = 0

    def reset(self) -> None:
        """Forget what earlier requests left behind: prefix cache, recycling matrix, averages."""
        self._engine.reset_shared_state()

    def __call__(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> int:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
        self.drafted = self.accepted = 0
        ids: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            self._engine.add(EngineRequest(f"bench-{index}", prompt, sampling, self._speculation))
            ids[f"bench-{index}"] = []
        while self._engine.has_work():
            for output in self._engine.step():
                ids[output.request_id].extend(output.token_ids)
                if output.round is not None:
                    self.drafted += output.round.drafted
                    self.accepted += output.round.accepted
        self.outputs = list(ids.values())
        return sum(len(out) for out in self.outputs)


def _hugging_face(loaded: LoadedModel, dtype: torch.dtype) -> Run:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loaded.tokenizer_folder, dtype=dtype).eval()

    def run(prompts: Sequence[tuple[int, ...]], tokens: int) -> int:
        width = max(len(p) for p in prompts)
        ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        return int(out[:, width:].numel())

    return run


def _pools(source: str, dtype: DTypeName, nested: bool) -> dict[str, DraftPoolConfig]:
    """The default draft pool, and one with the nested drafter: measured apart, since a drafter that computes
    on the target's cores costs time even where it is not chosen."""
    pools = {"model-free": DraftPoolConfig()}
    if nested:
        layers = NestedDrafterConfig(source=source, exits=(2, 4), dtype=dtype, kv_blocks=256)
        drafters = (*pools["model-free"].drafters, "nested")
        pools["nested"] = DraftPoolConfig.model_validate(
            {"drafters": drafters, "nested": layers.model_dump()}
        )
    return pools


@contextmanager
def drafting_engine(
    loaded: LoadedModel, identity: TargetIdentity, pool: DraftPoolConfig, compiler: GrammarCompiler
) -> Iterator[TorchEngine]:
    """An engine on the loaded model that asks a draft worker of its own. Engines share the model's KV blocks:
    use one at a time, and reset it first."""
    with draft_process(pool) as leases:
        remote = RemoteDraftSource(
            lambda: leases,
            identity,
            expected_drafters=pool.drafters,
            expected_candidates=CANDIDATES_WANTED,
        )
        local = LocalDraftSource(local_drafters(pool.drafters, _MAX_SESSIONS))
        source = PlacedDraftSource(remote, local, adaptive=pool.local_drafting)
        engine = build_engine(loaded.runner, EngineConfig(), SpeculationConfig(), source, compiler.compile)
        try:
            yield engine
        finally:
            engine.close()


def _arms(engines: Mapping[str, TorchEngine], loaded: LoadedModel) -> list[Arm]:
    engine = engines["model-free"]
    arms = [
        Arm("plain", EngineArm(engine, SpeculationParams(enabled=False))),
        Arm("hf generate", _hugging_face(loaded, loaded.info.dtype)),
        Arm("automatic", EngineArm(engine, SpeculationParams())),
        Arm("prompt_lookup", EngineArm(engine, SpeculationParams(drafter="prompt_lookup"))),
        Arm("token_recycling", EngineArm(engine, SpeculationParams(drafter="token_recycling"))),
    ]
    if "nested" in engines:
        arms.append(
            Arm("nested (untrained)", EngineArm(engines["nested"], SpeculationParams(drafter="nested")))
        )
    return arms


def _measure(arms: list[Arm], groups: list[list[tuple[int, ...]]], tokens: int) -> int:
    """A pair for each prompt group: every arm once, in rotating order. Returns how many outputs differ from
    those of plain decoding."""
    differing = 0
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(groups) * len(arms))
        for pair, prompts in enumerate(groups):
            outputs: dict[str, list[list[int]]] = {}
            for arm in arms[pair % len(arms) :] + arms[: pair % len(arms)]:
                progress.advance(task)
                if pair >= arm.max_pairs:
                    continue
                if isinstance(arm.run, EngineArm):
                    arm.run.reset()
                started = time.perf_counter()
                count = arm.run(prompts, tokens)
                arm.rates[pair] = count / (time.perf_counter() - started)
                if isinstance(arm.run, EngineArm):
                    outputs[arm.name] = arm.run.outputs
                    arm.drafted += arm.run.drafted
                    arm.accepted += arm.run.accepted
            plain = outputs["plain"]
            differing += sum(
                mine != theirs for out in outputs.values() for mine, theirs in zip(out, plain, strict=True)
            )
    return differing


def _summary(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    plain = next(arm for arm in arms if arm.name == "plain")
    rows = []
    for arm in arms:
        ratios = [rate / plain.rates[pair] for pair, rate in arm.rates.items()]
        rows.append(
            {
                "arm": arm.name,
                "tokens_per_s": statistics.median(arm.rates.values()),
                "ratio_to_plain": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "pairs": len(ratios),
                "drafted": arm.drafted,
                "accepted": arm.accepted,
            }
        )
    return rows


def _print(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("arm", "tokens/s (median)", "ratio to plain (median, range)", "accepted / drafted"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["arm"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio_to_plain']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})",
            f"{row['accepted']} / {row['drafted']}",
        )
    console.print(table)


def main(
    dtype: Annotated[
        Literal["bfloat16", "float32", "int8"], typer.Option(help="Weights of every arm.")
    ] = "bfloat16",
    backend: Annotated[Literal["auto", "native", "torch"], typer.Option(help="Forward pass.")] = "auto",
    source: Annotated[str, typer.Option(help="Model.")] = EMBEDDED_MODEL,
    tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 96,
    pairs: Annotated[int, typer.Option(help="Pairs at one stream.")] = 12,
    pairs8: Annotated[int, typer.Option(help="Pairs at eight streams.")] = 4,
    nested: Annotated[bool, typer.Option(help="Add the nested drafter (untrained first layers).")] = True,
    threads: Annotated[int, typer.Option(help="Compute threads; 0 takes the physical cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and PNG.")] = None,
) -> None:
    """Compare plain decoding, every drafter and Hugging Face `generate` in one run."""
    console = Console()
    loaded = load_runner(
        source,
        dtype=dtype,
        backend=backend,
        device="auto",
        kv_blocks=0,
        kv_memory_gib=0.5,
        max_model_len=2048,
        threads=threads,
        progress=lambda text: console.print(text, markup=False),
    )
    tokenizer = TextTokenizer(loaded.tokenizer_folder)
    chat = [
        tuple(
            tokenizer.hf.apply_chat_template(
                [{"role": "user", "content": p.text}], add_generation_prompt=True, return_dict=False
            )
        )
        for p in PROMPTS
    ]
    compiler = GrammarCompiler(tokenizer.hf, loaded.info.vocab_size, tokenizer.eos_token_ids)
    identity = TargetIdentity(
        "bench", "bench", loaded.info.vocab_size, tokenizer.vocab_hash, partial(pack, tokenizer)
    )
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(drafting_engine(loaded, identity, pool, compiler))
            for name, pool in _pools(source, dtype, nested).items()
        }
        arms = _arms(engines, loaded)
        for arm in arms:
            arm.run(chat[:1], 8)  # warm up
        ones = [[chat[i % len(chat)]] for i in range(pairs)]
        differing = _measure(arms, ones, tokens)
        single = _summary(arms)
        eights = [
            Arm(arm.name, arm.run) if isinstance(arm.run, EngineArm) else Arm(arm.name, arm.run, _SLOW_PAIRS)
            for arm in arms
        ]
        shifted = [[chat[(i + shift) % len(chat)] for i in range(8)] for shift in range(pairs8)]
        differing += _measure(eights, shifted, tokens)
        batched = _summary(eights)
        costs = engines["model-free"].stats().controller["cost_ms_by_rows"]
    weight_bytes = _weight_bytes(loaded)
    runner = loaded.runner
    floor = (
        min(runner.weight_read_seconds() for _ in range(9))
        if isinstance(runner, NativeLlamaRunner)
        else read_floor_seconds(weight_bytes)
    )
    result = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "dtype": dtype,
        "backend": loaded.backend,
        "tokens": tokens,
        "one_stream": single,
        "eight_streams": batched,
        "outputs_differing_from_plain": differing,
        "cost_ms_by_rows": costs,
        "weight_bytes": weight_bytes,
        "read_floor_ms": floor * 1e3,
    }
    _print(console, f"one stream, {dtype}, {loaded.backend}", single)
    _print(console, f"eight streams, {dtype}, {loaded.backend}", batched)
    console.print(f"outputs differing from plain decoding: {differing}")
    console.print(
        f"step ms by rows: {costs}; reading {weight_bytes / 1e6:.0f} MB once takes {floor * 1e3:.1f} ms"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "decode.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        plot_ratios({"one stream": single, "eight streams": batched}, out / "decode.png")
        console.print(f"written to {out}", markup=False)


def _weight_bytes(loaded: LoadedModel) -> int:
    """Bytes of weights that one step reads: all layers and the head."""
    if isinstance(loaded.runner, NativeLlamaRunner):
        return loaded.runner.weight_bytes
    from safetensors import safe_open

    size = torch.empty(0, dtype=loaded.info.dtype).element_size()
    total = 0
    for file in sorted(Path(loaded.tokenizer_folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                count = 1
                for extent in tensors.get_slice(name).get_shape():
                    count *= extent
                total += count * size
    return total


if __name__ == "__main__":
    typer.run(main)
