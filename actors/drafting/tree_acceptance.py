"""How often the tokens of draft trees are right: by their place in the tree, and by how likely they were said
to be.

A drafter's probabilities need not be calibrated, and joining guesses as if they were independent makes them
less so. Both are corrected by counting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from actors.drafting.acceptance import RunningAcceptance
from actors.drafting.interface import NESTED, SessionDraft
from actors.drafting.tree import first_children, reach
from actors.sampling.params import MAX_DRAFT_TOKENS
from actors.verification.trees import ROOT, find_child

_SMOOTHING = 0.02
_BUCKETS = 14
"""Two a halving: the last holds what is less likely than one in a hundred."""
_WEIGHT, _WINDOW = 24.0, 2000.0
"""The prior is worth so many tokens: a request's own luck is not to count twice, here and in its scale."""
_PRIOR_FIRST, _PRIOR_DECAY = 0.4, 0.8


def _bucket(probability: float) -> int:
    return min(_BUCKETS - 1, int(-2.0 * math.log2(max(probability, 1e-6))))


@dataclass(slots=True)
class PendingTree:
    """A tree being compared with what the target emits: `path` is confirmed, its last token is `at`. `left`:
    the target went on without the tree, or to its end."""

    name: str
    draft: SessionDraft
    path: list[int] = field(default_factory=list)
    at: int = ROOT
    left: bool = False

    def advance(self, token: int) -> bool:
        """Compare one more token; False when the tree says nothing about what follows."""
        parents = self.draft.parents
        found = find_child(self.draft.token_ids, parents, self.at, token)
        if found is not None:
            self.path.append(found)
            self.at = found
        self.left = found is None or found not in parents[found + 1 :]
        return not self.left

    def open_below(self) -> set[int]:
        """Tokens of which nothing is known yet: those below what is confirmed, where the target has not left
        the tree. The rest is right (`path`) or wrong."""
        found: set[int] = set()
        if not self.left:
            for index, parent in enumerate(self.draft.parents):
                if parent == self.at or parent in found:  # parents come first
                    found.add(index)
        return found

    def exit_hits(self) -> list[bool]:
        """Whether the nested drafter's own chain was right, token by token up to the first that was not or is
        not known."""
        draft, unknown = self.draft, self.open_below()
        sources = draft.sources or (draft.drafter,) * len(draft.token_ids)
        hits: list[bool] = []
        for index in first_children(draft.parents, lambda i: sources[i] == NESTED):
            if index in unknown:
                break
            hits.append(index in self.path)
            if not hits[-1]:
                break
        return hits


@dataclass(slots=True)
class TreeRecord:
    """Of one kind of tree (one name): P(the token at a place is accepted), and the calibration."""

    by_place: list[float] = field(
        default_factory=lambda: [_PRIOR_FIRST * _PRIOR_DECAY**place for place in range(MAX_DRAFT_TOKENS)]
    )
    trials: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT_TOKENS)
    calibration: RunningAcceptance = field(
        default_factory=lambda: RunningAcceptance(
            [2.0 ** (-(bucket + 0.5) / 2.0) for bucket in range(_BUCKETS)], _WEIGHT, _WINDOW
        )
    )

    def faded(self) -> TreeRecord:
        """A copy that gives way to what comes."""
        return TreeRecord(list(self.by_place), calibration=self.calibration.faded())

    def expected(self, draft: SessionDraft) -> list[float]:
        """P(token j accepted) of a tree at hand, never rising."""
        return self._expected(reach(draft), len(draft.token_ids))

    def _expected(self, reached: Sequence[float], count: int) -> list[float]:
        """`reached`: what a draft of `count` tokens says itself, empty when it says nothing."""
        likely = [self.calibration.probability(_bucket(r)) for r in reached] or self.by_place[:count]
        return list(accumulate(likely, min))

    def record(self, pending: PendingTree) -> tuple[float, float]:
        """Count a tree; how many of its tokens were accepted, and how many had been expected to be.

        Of a tree that was verified in part, and right so far, nobody knows what would have become of the
        tokens below: they count as accepted as far as that was expected of them, given what is confirmed.
        Left out, the likely ones would be counted only where they were wrong.
        """
        reached, count = reach(pending.draft), len(pending.draft.token_ids)
        expected = self._expected(reached, count)
        hits = [0.0] * count
        for place in pending.path:
            hits[place] = 1.0
        confirmed = 1.0 if pending.at == ROOT else expected[pending.at]
        for place in pending.open_below():
            hits[place] = expected[place] / confirmed
        for place, hit in enumerate(hits):
            self.trials[place] += 1
            step = max(_SMOOTHING, 1.0 / (self.trials[place] + _WEIGHT))
            self.by_place[place] += step * (hit - self.by_place[place])
            if reached:
                self.calibration.observe(_bucket(reached[place]), hit)
        return sum(hits), sum(expected)
