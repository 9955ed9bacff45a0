"""Draft trees: several guesses for the same places, which the target verifies in one pass (SpecInfer,
arXiv 2305.09781), grown best first by how likely each token is to be accepted (EAGLE-2, arXiv 2406.16858).

A tree is a proposal with `parents` (see `SessionDraft`). Its first n tokens are always a tree too, the best
one of n tokens, so that a budget cuts it anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, heapreplace

from actors.drafting.interface import NESTED, SessionDraft
from actors.verification.trees import ROOT

_LEAST = 0.01
"""A token that is less likely to be accepted is not worth a row."""
_UNSAID = 0.5
"""For the confidence of a drafter that gives none."""
_MOST = 0.98
"""Guesses that agree leave some doubt."""

Continuation = Callable[[int], Sequence[tuple[int, float]]]
"""From a token to what may follow it and with which probability, whatever came before."""


def chain_parents(count: int) -> range:
    """The parents of a chain of `count` tokens."""
    return range(ROOT, ROOT + count)


def parents_of(draft: SessionDraft) -> tuple[int, ...]:
    """A parent for each token, also of a chain."""
    return draft.parents or tuple(chain_parents(len(draft.token_ids)))


def first_children(parents: Sequence[int], allowed: Callable[[int], bool] = lambda index: True) -> list[int]:
    """Indices of the root's first child, its first child, and so on, among those `allowed`."""
    found: list[int] = []
    last = ROOT
    for index, parent in enumerate(parents):
        if parent == last and allowed(index):
            found.append(index)
            last = index
    return found


def depths(parents: Sequence[int]) -> list[int]:
    """Tokens from the root to each token, itself included."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def reach(draft: SessionDraft) -> list[float]:
    """P(token j accepted), from the confidences along its path; empty when the draft has none."""
    if not draft.confidence:
        return []
    found: list[float] = []
    for parent, confidence in zip(parents_of(draft), draft.confidence, strict=True):
        found.append(confidence if parent < 0 else found[parent] * confidence)
    return found


def cut(draft: SessionDraft, length: int) -> SessionDraft:
    """The first `length` tokens of a draft, a chain or a tree."""
    if len(draft.token_ids) <= length:
        return draft
    return replace(
        draft,
        token_ids=draft.token_ids[:length],
        parents=draft.parents[:length],
        confidence=draft.confidence[:length],
        sources=draft.sources[:length],
        q=draft.q[:length],
    )


def best_chain(draft: SessionDraft) -> SessionDraft:
    """The first child of the root, its first child, and so on: the likeliest, as trees are ordered."""
    if not draft.parents:
        return draft
    kept = first_children(draft.parents)
    return replace(
        draft,
        token_ids=tuple(draft.token_ids[i] for i in kept),
        parents=(),
        confidence=tuple(draft.confidence[i] for i in kept) if draft.confidence else (),
        sources=tuple(draft.sources[i] for i in kept) if draft.sources else (),
        q=tuple(draft.q[i] for i in kept) if draft.q else (),
    )


@dataclass(slots=True)
class Grown:
    """A tree being grown: one entry a token."""

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Guess:
    """A token that may come next, and where in each proposal it stands."""

    missed: float = 1.0
    source: str = ""
    strength: float = 0.0
    places: list[tuple[int, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def add(self, source: str, probability: float) -> None:
        if source in self.sources:  # a drafter does not confirm itself
            return
        self.sources.append(source)
        self.missed *= 1.0 - min(probability, _MOST)
        # Exits are judged by what the nested drafter guessed, also where others guessed the same.
        strength = probability + (source == NESTED)
        if strength > self.strength:
            self.source, self.strength = source, strength


def grow(
    proposals: Sequence[SessionDraft],
    continuations: Mapping[str, Continuation],
    last_token: int,
    budget: int,
) -> Grown:
    """The `budget` tokens most likely to be accepted, of what `proposals` (chains or trees) and
    `continuations` (by drafter) guess after `last_token`.

    Guesses of the same token are taken for independent, and the probabilities of all children of a token are
    scaled to sum to one at most.
    """
    children = [_children(parents_of(p)) for p in proposals]
    tree = Grown()
    if budget <= 0:
        return tree
    heap: list[tuple[float, int, int, int, float, _Guess]] = []
    likeliest: list[float] = []
    """Heap of the `budget` greatest of all that was pushed: what is less likely is not in the tree, nor is
    anything below it."""
    pushed = 0

    def push(parent: int, token: int, reached: float, places: Sequence[tuple[int, int]]) -> None:
        nonlocal pushed
        if len(likeliest) >= budget and reached <= likeliest[0]:
            return
        guesses: dict[int, _Guess] = {}
        for which, at in places:
            proposal = proposals[which]
            for child in children[which].get(at, ()):
                guess = guesses.setdefault(proposal.token_ids[child], _Guess())
                guess.places.append((which, child))
                guess.add(proposal.drafter, _confidence(proposal, child))
        for name, after in continuations.items():
            for follower, probability in after(token):
                guesses.setdefault(follower, _Guess()).add(name, probability)
        total = max(1.0, sum(1.0 - guess.missed for guess in guesses.values()))
        for follower, guess in guesses.items():
            confidence = (1.0 - guess.missed) / total
            likely = reached * confidence
            if likely < _LEAST:
                continue
            if len(likeliest) < budget:
                heappush(likeliest, likely)
            elif likely > likeliest[0]:
                heapreplace(likeliest, likely)
            else:
                continue
            pushed += 1
            heappush(heap, (-likely, pushed, parent, follower, confidence, guess))

    push(ROOT, last_token, 1.0, [(which, ROOT) for which in range(len(proposals))])
    while heap and len(tree.token_ids) < budget:
        negative, _, parent, token, confidence, guess = heappop(heap)
        tree.token_ids.append(token)
        tree.parents.append(parent)
        tree.confidence.append(confidence)
        tree.sources.append(guess.source)
        push(len(tree.token_ids) - 1, token, -negative, guess.places)
    return tree


def first_tokens(
    proposals: Sequence[SessionDraft], following: Iterable[tuple[int, float]] = ()
) -> dict[int, float]:
    """What is guessed to come next, by proposals and as (token, probability), each with the greatest
    probability that a guess gives it."""
    found: dict[int, float] = {}
    for proposal in proposals:
        for index, parent in enumerate(parents_of(proposal)):
            if parent == ROOT:
                token = proposal.token_ids[index]
                found[token] = max(found.get(token, 0.0), _confidence(proposal, index))
    for token, likely in following:
        found[token] = max(found.get(token, 0.0), likely)
    return found


def _confidence(proposal: SessionDraft, index: int) -> float:
    return proposal.confidence[index] if proposal.confidence else _UNSAID


def _children(parents: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, parent in enumerate(parents):
        found.setdefault(parent, []).append(index)
    return found
