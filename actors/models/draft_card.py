"""The model card of a draft artifact: what it was made from, for whom, and how. It travels in the file."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.models.llama_weights import LlamaWeights

METADATA_KEY = "s2d_draft"
"""Where a safetensors file keeps the card, as JSON."""
StorageName = Literal["bfloat16", "int8"]


class ArtifactError(ValueError):
    """A draft artifact cannot be used; the message names the file and, where two things disagree, both."""


class _CardModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingRecord(_CardModel):
    """How the weights came about. `targets` maps the name of each teacher to the hash of its source."""

    data: str = Field("", description="Names of the data sets.")
    data_hash: str = Field("", description="Of their token ids.")
    objective: str = ""
    steps: int = 0
    tokens: int = Field(0, description="Labels seen, repetitions included.")
    hours: float = 0.0
    seed: int = 0
    targets: dict[str, str] = Field(default_factory=dict)
    heldout_agreement: dict[str, float] = Field(
        default_factory=dict, description="Exit depth to top-1 agreement on held-out labels, at the end."
    )
    earlier: TrainingRecord | None = Field(None, description="Of the draft that this training began with.")


class CalibrationCurve(_CardModel):
    """Knots of a non-decreasing curve, confidences strictly ascending."""

    confidence: tuple[float, ...] = Field(min_length=1, description="The draft's probability of its token.")
    acceptance: tuple[float, ...] = Field(min_length=1, description="How often such a token is accepted.")

    @model_validator(mode="after")
    def _ascending(self) -> CalibrationCurve:
        xs, ys = self.confidence, self.acceptance
        if len(xs) != len(ys):
            raise ValueError("one acceptance a confidence")
        if any(b <= a for a, b in pairwise(xs)) or any(b < a for a, b in pairwise(ys)):
            raise ValueError("a calibration curve must ascend")
        return self


class ExitCalibration(_CardModel):
    """One exit's curves: for its best token under greedy decoding, and for a token drawn from it."""

    greedy: CalibrationCurve
    sampled: CalibrationCurve | None = None


class StatesCard(_CardModel):
    """The target whose last hidden states a draft reads beside the tokens."""

    model: str = Field(description="The target's name, for people.")
    source_hash: str = Field(description="Of the target's weights and tokenizer.")
    width: int = Field(ge=1, description="Numbers a state.")


class DraftCard(_CardModel):
    """Everything that must fit before the weights may draft."""

    format: Literal[1] = 1
    base: str = Field(description="The base model's name, for people.")
    base_hash: str = Field(description="See `base_hash`.")
    tokenizer_hash: str = Field(description="`TextTokenizer.vocab_hash` of the base.")
    vocab_size: int = Field(ge=1, description="Logits of the targets, and rows of the base's embedding.")
    hidden_size: int = Field(ge=1)
    exits: tuple[int, ...] = Field(min_length=1, description="Depths in layers of the base, ascending.")
    exit_layers: bool = Field(False, description="Whether each exit has one layer of its own on top.")
    exit_norms: bool = Field(False, description="Whether each exit has a final norm of its own.")
    draft_vocab: int = Field(ge=1, description="Rows of the head.")
    window: int | None = Field(None, ge=1, description="Attention window in tokens; null for none.")
    states: StatesCard | None = Field(None, description="Whose states it reads; null for none.")
    dtype: StorageName = "bfloat16"
    calibration: tuple[ExitCalibration, ...] = Field((), description="One an exit, or none.")
    training: TrainingRecord = Field(default_factory=TrainingRecord)

    @model_validator(mode="after")
    def _consistent(self) -> DraftCard:
        if list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError("exits must be positive and strictly ascending")
        if self.draft_vocab > self.vocab_size:
            raise ValueError("draft_vocab exceeds vocab_size")
        if self.calibration and len(self.calibration) != len(self.exits):
            raise ValueError("calibration must be empty or one an exit")
        return self

    @property
    def num_layers(self) -> int:
        """Decoder layers in the file."""
        return self.exits[-1] + (len(self.exits) if self.exit_layers else 0)


def base_hash(weights: LlamaWeights) -> str:
    """Identifies what a draft borrows from its base: the embedding, the shape of a layer, and rotation.

    Taken over the embedding in bfloat16, so that one model has one hash as a GGUF file, a package or a
    folder, loaded as float32 or bfloat16.
    """
    shape = (weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.layers[0].down.shape[1])
    digest = hashlib.sha256(repr((tuple(weights.embed.shape), shape, weights.rms_norm_eps)).encode())
    digest.update(weights.inv_freq.float().cpu().numpy().tobytes())
    table = weights.embed.detach().to("cpu", torch.bfloat16).contiguous()
    digest.update(table.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
