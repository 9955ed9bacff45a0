"""What is simulated: how many targets, sessions and draft workers, for how long."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Scenario(BaseModel):
    """Each target serves models in turn, sessions arrive as Poisson processes, and their number of tokens is
    geometric. `load` spreads the arrival rates of targets between 0.5 and 1.5 times the mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: int = Field(200, ge=1, description="Target workers.")
    draft_workers: int = Field(4, ge=1, description="Workers of the shared draft pool.")
    sessions: int = Field(2000, ge=1, description="Sessions that arrive, in all, on average.")
    tokens: float = Field(24.0, ge=1, description="Mean tokens of an answer.")
    max_running: int = Field(8, ge=1, description="Requests that a target runs at once.")
    duration_s: float = Field(60.0, gt=0, description="Simulated seconds.")
    warmup_s: float = Field(15.0, ge=0, description="Seconds at the start that do not count.")
    max_draft: int = Field(6, ge=1, le=16, description="Draft tokens a round, at most.")
    noise: float = Field(0.05, ge=0, lt=1, description="Standard deviation of a round's time, as a share.")
    seed: int = Field(0, ge=0)
