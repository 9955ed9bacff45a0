"""What the router knows of acceptance by target and exit, used or scored in shadow, and how old that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.router.reports import ExitAcceptance
from cluster.router.settings import RouterSettings


@dataclass(slots=True)
class _Known:
    by_position: tuple[float, ...]
    trials: int
    refreshed: float


class AcceptanceBook:
    """Last report of each (target, exit). A report without new trials does not refresh it."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._known: dict[str, dict[int, _Known]] = {}

    def update(self, now: float, target: str, reported: Mapping[int, ExitAcceptance]) -> None:
        known = self._known.setdefault(target, {})
        for depth, news in reported.items():
            held = known.get(depth)
            if news.trials > 0 and (held is None or held.trials != news.trials):
                known[depth] = _Known(news.by_position, news.trials, now)

    def forget_all_but(self, targets: Iterable[str]) -> None:
        living = set(targets)
        self._known = {t: k for t, k in self._known.items() if t in living}

    def measured(self, target: str) -> bool:
        return bool(self._known.get(target))

    def age(self, now: float, target: str, depth: int) -> float:
        """Seconds since the last news, infinite when there never was any."""
        held = self._known.get(target, {}).get(depth)
        return float("inf") if held is None else max(0.0, now - held.refreshed)

    def conditional(self, target: str, depth: int, length: int) -> list[float]:
        """P(token j accepted | those before it are) for j < length.

        An exit without measurements is taken to be no better than its nearest measured neighbour below, so
        that a deeper exit must prove itself in shadow first; few trials are blended with that."""
        known = self._known.get(target, {})
        held = known.get(depth)
        prior = self._prior(known, depth, length)
        if held is None:
            return prior
        weight = min(1.0, held.trials / self._settings.min_trials)
        values = _stretched(held.by_position, length)
        return [weight * v + (1.0 - weight) * p for v, p in zip(values, prior, strict=True)]

    def _prior(self, known: Mapping[int, _Known], depth: int, length: int) -> list[float]:
        below = max((d for d in known if d < depth), default=None)
        if below is not None:
            return _stretched(known[below].by_position, length)
        above = min((d for d in known if d > depth), default=None)
        limit = [1.0] * length if above is None else _stretched(known[above].by_position, length)
        return [min(self._settings.prior_acceptance, value) for value in limit]

    def to_json(self) -> dict[str, Any]:
        return {
            target: [[d, list(k.by_position), k.trials, k.refreshed] for d, k in sorted(known.items())]
            for target, known in self._known.items()
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        self._known = {
            target: {int(d): _Known(tuple(values), trials, at) for d, values, trials, at in rows}
            for target, rows in data.items()
        }


def _stretched(values: Sequence[float], length: int) -> list[float]:
    return [values[min(j, len(values) - 1)] for j in range(length)]


def survival(conditional: Sequence[float]) -> list[float]:
    """P(the first j + 1 tokens are all accepted)."""
    product, result = 1.0, []
    for value in conditional:
        product *= value
        result.append(product)
    return result
