"""Trees of tokens as verification sees them: a list of tokens, and of the index of each one's parent."""

from __future__ import annotations

from collections.abc import Sequence

ROOT = -1
"""Parent of the tokens that follow the last committed one."""


def find_child(token_ids: Sequence[int], parents: Sequence[int], at: int, token: int) -> int | None:
    """Index of the child of token `at` (or of `ROOT`) that is `token`; the first of several."""
    below = range(at + 1, len(token_ids))
    return next((i for i in below if parents[i] == at and token_ids[i] == token), None)
