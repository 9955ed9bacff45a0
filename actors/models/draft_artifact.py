"""Draft artifacts on disk: one safetensors file with layers, norms, a cut head and its model card.

The embedding is not in it: it is frozen in training and read from the base. Matrices are bfloat16, or int8
with one scale an output (`<name>.scale`); norms, biases and scales are float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from actors.files import complete_or_absent
from actors.models.draft_card import METADATA_KEY, ArtifactError, DraftCard
from actors.models.int8 import quantize
from actors.models.llama_weights import LlamaLayerWeights
from actors.models.source import PACKAGE_PREFIX

SUFFIX = ".safetensors"
_MATRICES = frozenset({"qkv", "o", "gate_up", "down", "head", "state_in"})
_MAX_HEADER = 100_000_000  # safetensors' own bound


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """Weights of a draft. `exit_layers` is empty or one an exit; `norms` [1 or E, H]; `head` [D, H];
    `head_ids` int64 [D]: the target's token id of each row of the head, ascending. `state_in` [H, S]: from a
    target's normalised state to what is added to the embedding, None for a draft that reads none."""

    layers: tuple[LlamaLayerWeights, ...]
    exit_layers: tuple[LlamaLayerWeights, ...]
    norms: Tensor
    head: Tensor
    head_ids: Tensor
    state_in: Tensor | None = None


def resolve_artifact(source: str) -> Path:
    """The file meant: a path, or "package:NAME" / "package:NAME/FILE" for one that an installed distribution
    or importable package ships. Raises ArtifactError."""
    if not source.startswith(PACKAGE_PREFIX):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ArtifactError(f"draft artifact {source!r}: no such file")
        return path
    package, _, wanted = source.removeprefix(PACKAGE_PREFIX).partition("/")
    found = sorted({p for p in _shipped(package) if not wanted or p.name == wanted})
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ArtifactError(
            f"draft artifact {source!r}: exactly one {wanted or SUFFIX} file is needed, found {names}"
        )
    return found[0]


def _shipped(package: str) -> Iterator[Path]:
    try:
        files = metadata.distribution(package).files or []
        yield from (Path(str(f.locate())).resolve() for f in files if f.suffix == SUFFIX)
    except (metadata.PackageNotFoundError, ValueError):
        pass
    try:  # an editable installation lists no files
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        return
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from (p.resolve() for p in Path(folder).rglob(f"*{SUFFIX}"))


def save_artifact(path: Path, card: DraftCard, weights: DraftWeights) -> None:
    """Write the file, complete or not at all. The same card and weights give the same bytes."""
    stored: dict[str, Tensor] = {}
    for name, tensor in _named(weights):
        value = tensor.detach().to("cpu")
        if name.rpartition(".")[2] not in _MATRICES:
            stored[name] = value.to(torch.int32 if name == "head_ids" else torch.float32).contiguous()
        elif card.dtype == "int8":
            rounded, scale = quantize(value.float())
            stored[name] = rounded.to(torch.int8).contiguous()
            stored[f"{name}.scale"] = scale[:, 0].contiguous()
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    data = save(stored, {"format": "pt", METADATA_KEY: card.model_dump_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(path) as partial:
        partial.write_bytes(data)


def _named(weights: DraftWeights) -> Iterator[tuple[str, Tensor]]:
    for group, layers in (("layers", weights.layers), ("exit_layers", weights.exit_layers)):
        for index, layer in enumerate(layers):
            for part in fields(layer):
                value = getattr(layer, part.name)
                if value is not None:
                    yield f"{group}.{index}.{part.name}", value
    yield from (("norms", weights.norms), ("head", weights.head), ("head_ids", weights.head_ids))
    if weights.state_in is not None:
        yield "state_in", weights.state_in


def read_card(path: Path) -> DraftCard:
    """The card of an artifact, without its weights. Raises ArtifactError for a file that is not one, or that
    ends too early."""
    header = _header(path)
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise ArtifactError(f"{path} holds weights but no {METADATA_KEY} card: it is not a draft artifact")
    try:
        return DraftCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: its card is not valid: {place}: {first['msg']}") from error


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file whose length is what the header promises."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise ArtifactError(f"draft artifact {path}: {error.strerror or error}") from error
    if size < 8 or length > _MAX_HEADER:
        raise ArtifactError(f"{path} is not a safetensors file")
    if len(text) < length:
        raise ArtifactError(f"{path} is truncated: its header has {length} bytes, the file {size} in all")
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        kind = "truncated" if size < expected else "longer than it should be"
        raise ArtifactError(f"{path} is {kind}: its header promises {expected} bytes, the file has {size}")
    return dict(header)


def load_artifact(
    path: Path, dtype: torch.dtype = torch.bfloat16, exits: Sequence[int] | None = None
) -> tuple[DraftCard, DraftWeights]:
    """Card and weights, matrices in `dtype`, norms in it too (what runners expect).

    `exits` keeps only those of the card's, and the layers that they need. Raises ArtifactError.
    """
    card = read_card(path)
    kept = card.exits if exits is None else tuple(exits)
    unknown = [e for e in kept if e not in card.exits]
    if unknown:
        raise ArtifactError(f"{path} has exits {card.exits}, the configuration asks for exit {unknown[0]}")
    places = [card.exits.index(e) for e in kept]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    reader = _Reader(path, tensors, dtype)
    norms = reader.get("norms")
    weights = DraftWeights(
        layers=tuple(reader.layer(f"layers.{i}") for i in range(kept[-1])),
        exit_layers=tuple(reader.layer(f"exit_layers.{i}") for i in places if card.exit_layers),
        norms=norms[places] if card.exit_norms else norms,
        head=reader.get("head"),
        head_ids=reader.get("head_ids").long(),
        state_in=reader.get("state_in") if card.states is not None else None,
    )
    _check_shapes(path, card, weights)
    calibration = tuple(card.calibration[i] for i in places) if card.calibration else ()
    return card.model_copy(update={"exits": kept, "calibration": calibration}), weights


class _Reader:
    def __init__(self, path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._path, self._tensors, self._dtype = path, tensors, dtype

    def get(self, name: str) -> Tensor:
        tensor = self.find(name)
        if tensor is None:
            raise ArtifactError(f"{self._path} holds no tensor {name!r}, which its card promises")
        return tensor

    def find(self, name: str) -> Tensor | None:
        tensor = self._tensors.get(name)
        if tensor is None or name == "head_ids":
            return tensor
        if tensor.dtype == torch.int8:
            tensor = tensor.float() * self._tensors[f"{name}.scale"][:, None]
        return tensor.to(self._dtype)

    def layer(self, prefix: str) -> LlamaLayerWeights:
        optional = {"qkv_bias", "q_norm", "k_norm"}
        return LlamaLayerWeights(
            **{
                part.name: self.find(f"{prefix}.{part.name}")
                if part.name in optional
                else self.get(f"{prefix}.{part.name}")
                for part in fields(LlamaLayerWeights)
            }  # type: ignore[arg-type]
        )


def _check_shapes(path: Path, card: DraftCard, weights: DraftWeights) -> None:
    rows = len(card.exits) if card.exit_norms else 1
    ids = weights.head_ids
    reads = (card.hidden_size, 0 if card.states is None else card.states.width)
    problems = (
        (weights.state_in is not None and weights.state_in.shape != reads, "state_in"),
        (weights.head.shape != (card.draft_vocab, card.hidden_size), "head"),
        (ids.shape != (card.draft_vocab,), "head_ids"),
        (card.exit_norms and weights.norms.shape[0] > rows, "norms"),
        (weights.norms.shape[-1] != card.hidden_size, "norms"),
        (bool((ids[1:] <= ids[:-1]).any()), "head_ids (not ascending)"),
        (bool(((ids < 0) | (ids >= card.vocab_size)).any()), f"head_ids (outside 0..{card.vocab_size - 1})"),
    )
    for wrong, what in problems:
        if wrong:
            raise ArtifactError(f"{path}: its tensor {what} does not fit its card")
