"""Running acceptance of a drafter's guesses, by a small integer feature (match length, position)."""

from __future__ import annotations

from collections.abc import Sequence


def confirmed_prefix(draft: Sequence[int], committed: Sequence[int]) -> tuple[int, bool]:
    """How many leading draft tokens the committed tokens confirm, and whether the next one was refuted.

    Drafts past the end of `committed` were neither: the target may have verified fewer than were proposed.
    """
    for j, (guess, truth) in enumerate(zip(draft, committed, strict=False)):
        if guess != truth:
            return j, True
    return min(len(draft), len(committed)), False


class RunningAcceptance:
    """P(token accepted | its ancestors accepted) per bucket, from decayed counts and a prior.

    Args:
        prior: one probability a bucket; features past the last bucket share it.
        prior_weight: observations that the prior is worth.
        window: observations after which old ones fade (the sum of a geometric decay).
    """

    def __init__(self, prior: Sequence[float], prior_weight: float = 4.0, window: float = 500.0) -> None:
        if not prior or not all(0.0 < p < 1.0 for p in prior):
            raise ValueError("prior must hold probabilities in (0, 1)")
        self._prior = tuple(prior)
        self._weight = prior_weight
        self._window = window
        self._decay = 1.0 - 1.0 / window
        self.reset()

    def reset(self) -> None:
        self._accepted = [p * self._weight for p in self._prior]
        self._tried = [self._weight] * len(self._prior)

    def faded(self) -> RunningAcceptance:
        """A copy in which all that was observed is worth no more than a prior is."""
        copy = RunningAcceptance(self._prior, self._weight, self._window)
        for bucket, tried in enumerate(self._tried):
            share = min(1.0, self._weight / tried)
            copy._accepted[bucket], copy._tried[bucket] = self._accepted[bucket] * share, tried * share
        return copy

    def observe(self, feature: int, accepted: float) -> None:
        """`accepted`: 1 or 0, or how likely it is where nobody knows."""
        b = self._bucket(feature)
        self._accepted[b] = self._accepted[b] * self._decay + accepted
        self._tried[b] = self._tried[b] * self._decay + 1.0

    def observe_draft(self, features: Sequence[int], confirmed: int, refuted: bool) -> None:
        """Count a chain: `confirmed` accepted tokens and, when `refuted`, one rejection after them."""
        for feature in features[:confirmed]:
            self.observe(feature, True)
        if refuted:
            self.observe(features[confirmed], False)

    def probability(self, feature: int) -> float:
        b = self._bucket(feature)
        return self._accepted[b] / self._tried[b]

    def _bucket(self, feature: int) -> int:
        return min(max(feature, 0), len(self._prior) - 1)
