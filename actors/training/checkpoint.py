"""Checkpoints of a training run: everything that the next step depends on, in one file written whole."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.files import complete_or_absent

KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be continued; the message names the file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`step` steps are done. `identity` digests the settings and data that the weights depend on."""

    step: int
    identity: str
    student: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float
    labels: int


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it, and drop all but the last `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, checkpoint.step)
    values = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    with complete_or_absent(path) as partial:
        torch.save(values, partial)
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink(missing_ok=True)


def load_latest(folder: Path, identity: str) -> Checkpoint | None:
    """The last checkpoint of a folder, None when there is none. Raises CheckpointError for one that is
    damaged or was made with other settings or data."""
    found = sorted(folder.glob("step-*.pt"))
    if not found:
        return None
    path = found[-1]
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(**values)
    except (RuntimeError, EOFError, OSError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if checkpoint.identity != identity:
        raise CheckpointError(
            f"{path} was made with other settings or data ({checkpoint.identity[:12]}, not {identity[:12]}): "
            "choose another folder, or restore the settings"
        )
    return checkpoint
