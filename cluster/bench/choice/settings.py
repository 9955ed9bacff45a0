"""Settings of recording, replaying and live checks of the router's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import EMBEDDED_DRAFT, EMBEDDED_MODEL, DTypeName, NestedDrafterConfig

DEFAULT_NESTED = NestedDrafterConfig(
    source=EMBEDDED_MODEL,
    artifact=EMBEDDED_DRAFT,
    context=64,
)
"""The shipped draft as traces are recorded from it: in bfloat16, every draft to its full length."""


class TraceSettings(BaseModel):
    """What a trace is recorded from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(EMBEDDED_MODEL, description="The target, as in the server's configuration.")
    dtype: DTypeName = Field("bfloat16", description="Precision of the target.")
    nested: NestedDrafterConfig = Field(DEFAULT_NESTED, description="The nested draft.")
    dataset: Literal["builtin", "spec-bench"] = Field("builtin", description="Where prompts come from.")
    path: Path | None = Field(None, description="Spec-Bench's question.jsonl.")
    per_task: int = Field(4, ge=1, description="Questions a task group, at most.")
    max_tokens: int = Field(64, ge=2, description="Tokens of an answer, at most.")
    max_prompt: int = Field(2048, ge=1, description="Tokens of a prompt that are kept, its last ones.")
    chain: int = Field(8, ge=1, le=16, description="Tokens drafted at each place.")
    repeats: int = Field(25, ge=1, description="Times that each cost is measured.")
    threads: int = Field(0, ge=0, description="Compute threads; 0 takes the physical cores.")
    seed: int = Field(0, ge=0, description="Chooses questions.")

    @model_validator(mode="after")
    def _consistent(self) -> TraceSettings:
        if (self.dataset == "spec-bench") != (self.path is not None):
            raise ValueError("path: required by, and only allowed with, dataset spec-bench")
        return self


class LiveSettings(BaseModel):
    """The live check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replayed: Path = Field(description="choice.json of `s2d bench replay`.")
    server_config: Path = Field(description="YAML of `s2d serve` with the recorded draft.")
    path: Path | None = Field(None, description="Spec-Bench's question.jsonl; else the built-in prompts.")
    cells: int = Field(8, ge=1, description="Cells to measure, from least to greatest gain of drafting.")
    best: int = Field(2, ge=1, description="Fixed settings a cell, the replay's best.")
    pairs: int = Field(20, ge=1, description="Blocks of every setting in every cell.")
    per_task: int | None = Field(None, ge=1, description="Questions a task group; all by default.")
    max_tokens: int = Field(64, ge=1, description="Tokens of an answer, at most.")
    requests_per_stream: int = Field(2, ge=1, description="Requests a block, per stream.")
    request_timeout_s: float = Field(300.0, gt=0, description="Seconds a request may take.")
    seed: int = Field(0, ge=0, description="Chooses questions.")
