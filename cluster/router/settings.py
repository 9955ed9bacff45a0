"""What an operator may set of the router."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RouterSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    min_gain: float = Field(
        0.05, ge=0, description="A change must promise this much more than what it replaces."
    )
    dwell_s: float = Field(10.0, ge=0, description="A target keeps a choice this long unless it must change.")
    max_utilisation: float = Field(
        0.75, gt=0, le=0.95, description="Expected draft-seconds a second of a worker above which it sheds."
    )
    grow_utilisation: float = Field(
        0.65, gt=0, description="Nothing grows beyond this, so that what was shed does not return at once."
    )
    max_draft_tokens: int = Field(6, ge=1, le=16, description="Longest cap.")
    cost_step: float = Field(
        0.1, ge=0, description="A target's place in the order moves when its cost changed by this share."
    )
    prior_acceptance: float = Field(0.5, gt=0, lt=1, description="Acceptance of what nobody has measured.")
    min_trials: int = Field(20, ge=1, description="Scored drafts from which a measurement counts in full.")
    probe_tokens: int = Field(2, ge=1, le=16, description="Cap of a target of which nothing is known yet.")
    stale_s: float = Field(30.0, gt=0, description="Acceptance older than this is scored anew in shadow.")
    shadow_share: float = Field(0.1, ge=0, le=1, description="Rounds of a target that score one, at most.")
    explore_share: float = Field(
        0.02, ge=0, le=0.05, description="Draft-seconds a second of a worker spent on shadow scoring, at most."
    )

    @model_validator(mode="after")
    def _growth_below_limit(self) -> RouterSettings:
        if self.grow_utilisation > self.max_utilisation:
            raise ValueError("grow_utilisation: must not exceed max_utilisation")
        return self
