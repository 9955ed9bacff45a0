"""Draft-ahead in the simulator: the draft worker's own guess tree, with draws in the place of a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from actors.drafting.guess_tree import Guess, GuessTree, Outcome
from actors.drafting.interface import SessionDraft

RIGHT = 1
"""The token that the target emits, always; a guess is right exactly when it equals it."""
_WRONG, _WRONG_TOO = 0, 2


class SessionGuesses:
    """What a draft worker guesses about one session.

    Args:
        rates: P(the best guess is right) by exit depth, at the first place of a draft.
        decay: factor on that of each further place.
        alternative: P(the second best guess is right | the best is wrong).
    """

    def __init__(self, rates: dict[int, float], decay: float, alternative: float, rng: random.Random) -> None:
        self._rates, self._decay, self._alternative, self._rng = rates, decay, alternative, rng
        self._tree = GuessTree()
        self._answered, self._length = False, 0
        self.exit_depth = 0

    def known(self, exit_depth: int, length: int) -> int:
        """Tokens of the next draft that are prepared."""
        if exit_depth != self.exit_depth:
            self.exit_depth, self._tree, self._answered = exit_depth, GuessTree(), False
        return len(self._tree.chain(length))

    @property
    def counted(self) -> bool:
        """Whether something could have been prepared for the next draft."""
        return self._answered

    def answer(self, length: int) -> Sequence[int]:
        """The draft, the tokens that are not known drawn now."""
        chain = self._tree.chain(length)
        while len(chain) < length:
            self._tree.graft(chain[-1] if chain else self._tree.root, self._drawn(chain, len(chain)))
            chain = self._tree.chain(length)
        self._answered, self._length = True, length
        self._tree.expect(chain, length)
        return [guess.token_id for guess in chain]

    def next(self) -> Outcome | None:
        return self._tree.next()

    def prepared(self, outcome: Outcome) -> None:
        """A step below an outcome was computed. One whose verdict has come meanwhile was for nothing."""
        if outcome is self._tree.next():
            # What is prepared is what would be drafted after the verdict, at the same places of that draft.
            path = outcome.at.line()
            place = len(path) if outcome.splits else self._length - outcome.left
            self._tree.prepared(outcome, self._drawn(path, place))

    def emitted(self, count: int) -> None:
        self._tree.follow([RIGHT] * count)

    def _drawn(self, path: Sequence[Guess], place: int) -> SessionDraft:
        """The best guess after a path, for a place of a draft, and an alternative."""
        rate = self._rates[self.exit_depth] * self._decay**place
        best, other = _WRONG, _WRONG_TOO
        if all(guess.token_id == RIGHT for guess in path):
            if self._rng.random() < rate:
                best = RIGHT
            elif self._rng.random() < self._alternative:
                other = RIGHT
        confidence = (rate, (1.0 - rate) * self._alternative)
        return SessionDraft(0, 0, (best, other), parents=(-1, -1), confidence=confidence)
