"""Measured costs and acceptance that drive the simulator; `profile.json` says where its figures come from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_PROFILE = Path(__file__).with_name("profile.json")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetProfile(_Model):
    """A model to serve: the step table of `dtype` times `scale`; `acceptance` multiplies the draft's
    rates."""

    dtype: str
    scale: float = Field(gt=0)
    acceptance: float = Field(gt=0, le=1)


class CostProfile(_Model):
    about: str = Field(description="Where the figures come from: what is measured, scaled, assumed.")
    step_ms: dict[str, dict[int, float]] = Field(description="Milliseconds of a round by rows, by dtype.")
    models: dict[str, TargetProfile] = Field(min_length=1)
    draft_dtype: str = Field(description="Table that draft steps are a share of.")
    draft_scale: float = Field(1.0, gt=0, description="The draft's base, in sizes of the measured model.")
    exits: dict[int, float] = Field(min_length=1, description="Share of a step by exit depth.")
    acceptance: dict[str, dict[int, float]] = Field(
        min_length=1, description="P(first token accepted) by task and exit depth."
    )
    acceptance_decay: float = Field(gt=0, le=1, description="Factor of each further place of a draft.")
    alternative: float = Field(
        0.3, ge=0, le=1, description="P(a draft's second best token is right | its best is wrong)."
    )
    latency_ms: float = Field(ge=0, description="Round trip between target and draft worker.")

    @model_validator(mode="after")
    def _complete(self) -> CostProfile:
        for dtype in (self.draft_dtype, *(m.dtype for m in self.models.values())):
            if not self.step_ms.get(dtype):
                raise ValueError(f"step_ms: no table for {dtype}")
        for task, rates in self.acceptance.items():
            if set(rates) != set(self.exits) or not all(0 <= r <= 1 for r in rates.values()):
                raise ValueError(f"acceptance.{task}: one rate in [0, 1] for each exit")
        return self

    @classmethod
    def from_file(cls, path: Path = DEFAULT_PROFILE) -> CostProfile:
        """Raises OSError or pydantic.ValidationError."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def verify_s(self, model: str) -> dict[int, float]:
        """Seconds of a round by rows."""
        m = self.models[model]
        return {rows: ms * m.scale / 1e3 for rows, ms in self.step_ms[m.dtype].items()}

    @cached_property
    def draft_s(self) -> dict[int, dict[int, float]]:
        """Seconds of a draft step by sessions, by exit depth."""
        table = self.step_ms[self.draft_dtype]
        return {
            d: {n: ms * self.draft_scale * share / 1e3 for n, ms in table.items()}
            for d, share in self.exits.items()
        }
