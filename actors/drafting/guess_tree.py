"""A draft worker's guesses about one session: what was drafted, and below it what may come after the verdict.

Pure bookkeeping, without a model: the drafter that prepares drafts ahead and the simulator use it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from actors.drafting.interface import SessionDraft
from actors.drafting.tree import parents_of
from actors.verification.trees import ROOT

OUTCOMES = 6
LEAST_LIKELY = 0.05
SESSIONS_A_STEP = 8
"""Sessions of one step of preparing: a round that comes meanwhile waits for the step to end."""
K = TypeVar("K")
V = TypeVar("V")
Distribution = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(slots=True, eq=False)
class Guess:
    """A token that may come after `parent`; confidence: P(it is accepted | its parent is), q: what it was
    drawn from, where a rule needs it. `below`: what may follow, best first, if anybody has drafted there."""

    token_id: int
    confidence: float = 1.0
    parent: Guess | None = None
    exit_depth: int | None = None
    q: Distribution | None = None
    below: list[Guess] = field(default_factory=list)

    def line(self) -> list[Guess]:
        """Guesses from the last committed token to this, itself included."""
        found: list[Guess] = []
        guess = self
        while guess.parent is not None:
            found.append(guess)
            guess = guess.parent
        return found[::-1]

    def path(self) -> tuple[int, ...]:
        """Their tokens."""
        return tuple(guess.token_id for guess in self.line())


@dataclass(slots=True)
class Outcome:
    """A verdict that may come, with its probability: the tokens up to `at`, which is where `left` more are to
    be drafted, one below the other. `splits`: `at` ends the draft; what comes after it are the verdicts."""

    probability: float
    at: Guess
    left: int
    splits: bool = False


class GuessTree:
    """Args:
    outcomes: verdicts that are prepared for at most, the likeliest first.
    least: a verdict less likely than this is not prepared for.
    """

    def __init__(self, outcomes: int = OUTCOMES, least: float = LEAST_LIKELY) -> None:
        self._most, self._least = outcomes, least
        self._outcomes: list[Outcome] = []
        self.root = Guess(ROOT)

    def follow(self, new_tokens: Sequence[int]) -> bool:
        """Go on below committed tokens; False when nothing there was guessed. Outcomes are forgotten."""
        self._outcomes.clear()
        foreseen = True
        for token in new_tokens:
            child = next((g for g in self.root.below if g.token_id == token), None)
            foreseen = child is not None
            self.root = child or Guess(ROOT)
        self.root.parent = None
        return foreseen

    def chain(self, length: int) -> list[Guess]:
        """The likeliest guesses, one below the other, `length` at most."""
        found: list[Guess] = []
        guess = self.root
        while guess.below and len(found) < length:
            guess = guess.below[0]
            found.append(guess)
        return found

    def graft(self, at: Guess, draft: SessionDraft) -> None:
        """Put a draft below a guess."""
        placed: list[Guess] = []
        for index, parent in enumerate(parents_of(draft)):
            above = at if parent == ROOT else placed[parent]
            guess = Guess(
                draft.token_ids[index],
                draft.confidence[index] if draft.confidence else 1.0,
                above,
                draft.exit_depth,
                draft.q[index] if draft.q else None,
            )
            above.below.append(guess)
            placed.append(guess)

    def expect(self, answered: Sequence[Guess], length: int) -> None:
        """The chain `answered` is being verified: from now on prepare drafts of `length` tokens for what may
        come of it, which is a rejection at each place, in favour of an alternative, or none."""
        found: list[Outcome] = []
        reached, guess = 1.0, self.root
        for best in answered:
            found += [Outcome(reached * other.confidence, other, length) for other in guess.below[1:]]
            reached *= best.confidence
            guess = best
        if guess.below:
            found += self._ends(reached, guess, length)
        else:
            found.append(Outcome(reached, guess, length, splits=True))
        self._replace(found)

    def next(self) -> Outcome | None:
        """The likeliest outcome that is not prepared for; None when enough is."""
        while self._outcomes:
            outcome = self._outcomes[0]
            # What an earlier round prepared is there already.
            while outcome.left and outcome.at.below and not outcome.splits:
                outcome.at, outcome.left = outcome.at.below[0], outcome.left - 1
            if outcome.left:
                return outcome
            self._outcomes.pop(0)
        return None

    def prepared(self, outcome: Outcome, draft: SessionDraft) -> None:
        """One token, and its alternatives, were drafted at `outcome.at`; an empty draft gives it up."""
        self.graft(outcome.at, draft)
        if not outcome.at.below:
            self._outcomes.remove(outcome)
        elif outcome.splits:
            ends = self._ends(outcome.probability, outcome.at, outcome.left)
            self._replace([*(o for o in self._outcomes if o is not outcome), *ends])
        else:
            outcome.at, outcome.left = outcome.at.below[0], outcome.left - 1

    def give_up(self) -> None:
        """Prepare for nothing more."""
        self._outcomes.clear()

    @staticmethod
    def _ends(reached: float, last: Guess, length: int) -> list[Outcome]:
        return [Outcome(reached * bonus.confidence, bonus, length) for bonus in last.below]

    def _replace(self, outcomes: Iterable[Outcome]) -> None:
        likely = sorted((o for o in outcomes if o.probability >= self._least), key=lambda o: -o.probability)
        self._outcomes = likely[: self._most]


def next_outcomes(waiting: dict[K, V], next_of: Callable[[V], Outcome | None]) -> list[tuple[K, V, Outcome]]:
    """Whose turn it is in one step, with what to prepare. `waiting` holds sessions, those served longest ago
    first: who is served goes to the end, who has nothing left to prepare leaves."""
    chosen: list[tuple[K, V, Outcome]] = []
    for key, session in list(waiting.items()):
        del waiting[key]
        outcome = next_of(session)
        if outcome is None:
            continue
        waiting[key] = session
        chosen.append((key, session, outcome))
        if len(chosen) == SESSIONS_A_STEP:
            break
    return chosen
