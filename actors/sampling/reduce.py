"""Row reductions over a vocabulary: by the native core on CPU where it is there, by torch otherwise."""

from __future__ import annotations

from torch import Tensor

from actors.native.library import MAX_TOP, available, load_library

_NATIVE = load_library() if available() else None


def best_ids(logits: Tensor) -> list[int]:
    """Index of the greatest of each row of float32 [N, V]; the first of equal ones."""
    if _NATIVE is not None and logits.device.type == "cpu":
        return [int(i) for i in _NATIVE.argmax(logits.contiguous()).tolist()]
    return [int(i) for i in logits.argmax(dim=-1).tolist()]


def top_ids(logits: Tensor, count: int) -> list[list[int]]:
    """Indices of the `count` greatest of each row of float32 [N, V], best first."""
    count = min(count, logits.shape[-1])
    if _NATIVE is not None and logits.device.type == "cpu" and count <= MAX_TOP:
        return [list(row) for row in _NATIVE.topk(logits.contiguous(), count)[1].tolist()]
    return [list(row) for row in logits.topk(count, dim=-1).indices.tolist()]
