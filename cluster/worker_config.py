"""What workers have in common in the configuration: devices, Ray's resources, CPUs, and where files are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


class ConfigModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def found_from(given: str, folder: Path) -> str:
    """The whole path of what lies in `folder`, since workers run elsewhere. Anything else stays as it is: hub
    ids, package:NAME, whole paths."""
    return str(folder.resolve() / given) if (folder / given).exists() else given


def _distinct(cpus: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(cpus)) != len(cpus):
        raise ValueError("must be distinct")
    return cpus


Cpus = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    AfterValidator(_distinct),
    Field(
        description="CPUs, by Linux's numbers, that every worker is bound to; empty: all that it is started "
        "with. A draft worker prepares drafts while those targets verify with which it shares none."
    ),
]


class PlacedConfig(ConfigModel):
    """Where Ray puts workers of a kind, and what they compute on."""

    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:N, or auto: cuda where a worker reserves GPUs, else cpu. Where "
        "`s2d serve` finds GPUs, models with auto and no num_gpus reserve them, but for int8 and native.",
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="Ray GPUs that a worker reserves: no other reservation gets them. Null: 1 with device "
        "cuda, else 0. With 0 and device cuda or cuda:N it computes on one that may be reserved by others.",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Ray's custom resources that a worker reserves beside CPUs and GPUs: it starts on a node "
        "that has them (`ray start --resources`).",
    )

    @field_validator("resources")
    @classmethod
    def _custom(cls, resources: dict[str, float]) -> dict[str, float]:
        if named := {"CPU", "GPU", "memory"} & resources.keys():
            raise ValueError(f"{', '.join(sorted(named))}: no custom resource; see num_cpus and num_gpus")
        if any(amount <= 0 for amount in resources.values()):
            raise ValueError("must be positive")
        return resources

    @model_validator(mode="after")
    def _shown_by_ray(self) -> Self:
        if self.device.startswith("cuda:") and self.num_gpus:
            raise ValueError(
                "num_gpus: Ray shows a worker the GPUs that it reserves and numbers them from 0; reserve "
                "with device cuda, or give cuda:N without a reservation"
            )
        return self

    @property
    def gpus(self) -> float:
        """Those that a worker reserves."""
        return self.num_gpus if self.num_gpus is not None else float(self.device == "cuda")

    @property
    def torch_device(self) -> str:
        """`device` without auto."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.gpus else "cpu"
