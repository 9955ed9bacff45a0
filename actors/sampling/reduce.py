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
    return [list(row) for row in top_entries(logits, count)[1].tolist()]


def top_entries(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of float32 [N, V], best first, equal ones by lower index (on torch: in
    any order): values and int64 indices, [N, min(count, V)] each."""
    count = min(count, logits.shape[-1])
    if _NATIVE is not None and logits.device.type == "cpu" and 1 <= count <= MAX_TOP:
        return _NATIVE.topk(logits.contiguous(), count)
    found = logits.topk(count, dim=-1)
    return found.values, found.indices
