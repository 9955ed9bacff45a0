"""The router's constants in one place, with their units."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RouterSettings(BaseModel):
    """Defaults are meant to be left alone; the simulator and tests vary them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: float = Field(0.9, gt=0, description="Draft-seconds a second of one worker that force shedding.")
    plan: float = Field(0.8, gt=0, description="What a new plan may fill, and what shedding stops at.")
    min_draft_gain: float = Field(1.02, ge=1, description="Drafting must promise this much over none.")
    keep_draft_gain: float = Field(
        1.005,
        ge=1,
        description="A choice that promises less than this is given up without waiting for a better.",
    )
    min_change_gain: float = Field(1.02, gt=1, description="A change must promise this much over no change.")
    dwell_s: float = Field(10.0, ge=0, description="A choice that still fits stays this long, in seconds.")
    smoothing: float = Field(0.3, gt=0, le=1, description="Share of a new report in running averages.")
    cost_tolerance: float = Field(
        0.05, ge=0, description="A target keeps its place in the order until its cost moved by this share."
    )
    shadow_share: float = Field(0.05, ge=0, le=1, description="Rounds in which a target scores in shadow.")
    first_shadow_share: float = Field(
        0.5, ge=0, le=1, description="The same while the exit has fewer than shadow_trials scored tokens."
    )
    shadow_trials: int = Field(100, ge=1, description="Scored first tokens from which an exit is known.")
    shadow_load: float = Field(
        0.05, ge=0, le=0.1, description="Draft-seconds a second of one worker for shadow scoring, at most."
    )
    shadow_length: int = Field(2, ge=1, description="Longest draft of shadow scoring.")
    shadow_age_s: float = Field(
        60.0, gt=0, description="Evidence older than this counts for less, and is renewed, in seconds."
    )
    move_gap: float = Field(0.2, gt=0, description="Gap in load between workers that makes a target move.")

    @model_validator(mode="after")
    def _band(self) -> RouterSettings:
        if self.plan > self.limit:
            raise ValueError("plan: must not exceed limit")
        if self.keep_draft_gain > self.min_draft_gain:
            raise ValueError("keep_draft_gain: must not exceed min_draft_gain")
        return self
