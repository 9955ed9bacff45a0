"""What a benchmark is asked to do. Unknown fields are errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engine.messages import ResetScope
from cluster.bench.metrics import Slo
from cluster.config import EMBEDDED_MODEL, DTypeName

MIN_CONTEXTS = 4
"""A parabola goes through any three points."""


class SettingsModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CommonSettings(SettingsModel):
    """Model, prompts and engines: what both kinds of measurement share."""

    engines: tuple[str, ...] = Field(
        ("s2d-plain", "s2d-auto"), min_length=1, description="Names of the registry, or NAME=URL."
    )
    baseline: str | None = Field(None, description="Engine that ratios refer to; the first one by default.")
    dataset: Literal["builtin", "spec-bench"] = "builtin"
    path: Path | None = Field(None, description="Spec-Bench's question.jsonl.")
    per_task: int | None = Field(None, ge=1, description="Questions a task group; null takes all.")
    source: str = Field(EMBEDDED_MODEL, description="The model, as in the server's configuration.")
    dtype: DTypeName = "bfloat16"
    server_config: Path | None = Field(
        None, description="YAML of `s2d serve` that our own server starts from; its first model is measured."
    )
    max_tokens: int = Field(128, ge=1, description="Tokens a request, at most.")
    ignore_eos: bool = Field(False, description="Generate exactly max_tokens.")
    temperature: float = Field(0.0, ge=0.0)
    pairs: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, description="Chooses questions, arrivals and, above temperature 0, samples.")
    threshold: float = Field(1.0, gt=0, description="Ratio that a comparison is tested against.")
    request_timeout_s: float = Field(300.0, gt=0)
    reset: ResetScope = Field("all", description="What our own server forgets where engines are reset.")
    exclusive: bool = Field(False, description="Stop the other engines' processes during an engine's turn.")
    threads: int = Field(0, ge=0, description="Compute threads of every engine; 0 lets each choose.")

    @model_validator(mode="after")
    def _consistent(self) -> CommonSettings:
        if (self.dataset == "spec-bench") != (self.path is not None):
            raise ValueError("path: required by, and only allowed with, dataset spec-bench")
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError("engines: names must be unique")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline: {self.baseline!r} is not one of the engines")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(engine.partition("=")[0] for engine in self.engines)

    @property
    def baseline_name(self) -> str:
        return self.baseline if self.baseline is not None else self.names[0]

    @property
    def concurrency_limit(self) -> int:
        """Requests that may be in flight at once; engines are sized for it."""
        return 1


class SpecSettings(CommonSettings):
    """Spec-Bench protocol. `pairs` repeats every question."""

    all_turns: bool = Field(False, description="Also later turns, on the engine's own answers.")


class LoadSettings(CommonSettings):
    """Serving load. `pairs` blocks are measured per engine at every concurrency and rate."""

    ignore_eos: bool = True
    pairs: int = Field(15, ge=1)
    concurrency: tuple[int, ...] = Field((1, 2, 4, 8), description="Closed loop: requests in flight.")
    rate: tuple[float, ...] = Field((), description="Open loop: Poisson arrivals, requests/s.")
    requests_per_stream: int = Field(2, ge=1, description="Closed loop: requests a block, per stream.")
    requests_per_rate: int = Field(16, ge=2, description="Open loop: requests a block.")
    open_loop_limit: int = Field(64, ge=1, description="Open loop: requests that engines are sized for.")
    slo_ttft_ms: float | None = Field(None, gt=0, description="Goodput: longest time to first token.")
    slo_tpot_ms: float | None = Field(None, gt=0, description="Goodput: longest time per output token.")

    @model_validator(mode="after")
    def _points(self) -> LoadSettings:
        if not self.concurrency and not self.rate:
            raise ValueError("concurrency: at least one concurrency or rate is needed")
        if any(not 1 <= c <= 1024 for c in self.concurrency):
            raise ValueError("concurrency: must be 1 to 1024")
        if any(r <= 0 for r in self.rate):
            raise ValueError("rate: must be positive")
        return self

    @property
    def slo(self) -> Slo:
        ttft, tpot = self.slo_ttft_ms, self.slo_tpot_ms
        return Slo(None if ttft is None else ttft / 1e3, None if tpot is None else tpot / 1e3)

    @property
    def concurrency_limit(self) -> int:
        return max((*self.concurrency, self.open_loop_limit if self.rate else 1))


class ProfileSettings(LoadSettings):
    """Where our own time goes. `pairs` blocks a configuration and concurrency, added up."""

    concurrency: tuple[int, ...] = Field((1, 8), min_length=1, description="Requests in flight.")
    rate: tuple[()] = ()
    pairs: int = Field(3, ge=1)


class StepSettings(SettingsModel):
    """The engine's forward pass alone, in one process."""

    source: str = EMBEDDED_MODEL
    dtypes: tuple[DTypeName, ...] = Field(("bfloat16", "int8", "float32"), min_length=1)
    rows: tuple[int, ...] = Field((1, 2, 3, 4, 5, 8, 16, 32), description="Rows of one sequence in a pass.")
    row_context: int = Field(200, ge=1, description="KV entries before these rows.")
    contexts: tuple[int, ...] = Field(
        (128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192),
        description="KV entries that a decoding row attends to, itself included.",
    )
    batches: tuple[int, ...] = Field((1, 2, 4, 8), description="Sequences in a pass, one row each.")
    repeats: int = Field(15, ge=3, description="Times that every point is measured, interleaved.")
    threads: int = Field(0, ge=0, description="Compute threads; 0 takes the physical cores.")
    seed: int = Field(0, ge=0, description="Order of the points.")
    row_invariance_price: bool = False
    agreement: bool = False
    agreement_tokens: int = Field(16, ge=1, description="Tokens of every answer.")

    @model_validator(mode="after")
    def _points(self) -> StepSettings:
        for name in ("dtypes", "rows", "contexts", "batches"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: each value once")
            if name != "dtypes" and any(value < 1 for value in values):
                raise ValueError(f"{name}: must be at least 1")
        if self.contexts and len(self.contexts) < MIN_CONTEXTS:
            raise ValueError(f"contexts: a fit needs {MIN_CONTEXTS} lengths, or none")
        if bool(self.contexts) != bool(self.batches):
            raise ValueError("batches: go with contexts")
        return self


class SoakSettings(SettingsModel):
    """Memory of our own server under mixed requests."""

    source: str = EMBEDDED_MODEL
    dtype: DTypeName = "bfloat16"
    server_config: Path | None = None
    requests: int = Field(2000, ge=20)
    concurrency: int = Field(8, ge=1, le=1024)
    kv_blocks: int = Field(
        272, ge=0, description="KV pool of the server; small, so that the warm-up fills it. 0 leaves it."
    )
    sample_s: float = Field(3.0, gt=0, description="Seconds between two readings of memory.")
    limit: float = Field(2.0, gt=0, description="Growth of the total, in percent, that is still flat.")
    request_timeout_s: float = Field(120.0, gt=0)
    threads: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, description="Chooses the requests.")


class StartSettings(SettingsModel):
    """From `s2d serve` to the first token."""

    source: str = EMBEDDED_MODEL
    dtype: DTypeName = "bfloat16"
    server_config: Path | None = None
    repeats: int = Field(3, ge=1)
    threads: int = Field(0, ge=0)
