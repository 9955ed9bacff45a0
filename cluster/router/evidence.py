"""What is known of acceptance, by model, exit and position: merged over workers, aged, filled where unknown.

Replicas of a model share their evidence. What a model lacks it borrows: the mean of all models at that exit
and position, times its quality, which is how it fares against such means where it was measured; and where no
model was, the position before. Rates never fall with depth (isotonic regression, weighted by trials).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.isotonic import isotonic
from cluster.router.reports import ExitAcceptance, TargetReport

PRIOR = 0.5
PRIOR_TRIALS = 8.0
MAX_TRIALS = 400.0
_QUALITY_TRIALS = 20.0
"""Expected acceptances that a model needs for half of its own quality to count."""
_FIT_TURNS = 4
_LEAST_TRIALS = 1e-6
"""Aged trials that count for nothing any more."""
_SEEN_S = 600.0
"""What a silent target has counted is remembered for so long: forgotten, all of it would be new again."""
_MAX_RATE = 0.98


@dataclass(slots=True)
class _Exit:
    """`trials` is aged, `seen` are the workers' own counts, to tell what is new."""

    rates: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def age(self, keep: float) -> None:
        """Let trials count for the share `keep` of what they did."""
        self.trials = [t if (t := known * keep) >= _LEAST_TRIALS else 0.0 for known in self.trials]
        while self.trials and self.trials[-1] == 0.0:
            self.trials.pop()
        del self.rates[len(self.trials) :]


@dataclass(frozen=True, slots=True)
class _Fit:
    """quality: by model, 1 is the mean. pooled: (trials, rate of a mean model) by (exit, place)."""

    quality: dict[str, float]
    pooled: dict[tuple[int, int], tuple[float, float]]


class Evidence:
    """Acceptance by (model, exit, position). Times in seconds on the caller's clock."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._exits: dict[tuple[str, int], _Exit] = {}
        self._reported: dict[str, float] = {}
        """When each target last did."""
        self._aged_at: float | None = None
        self._fitted: _Fit | None = None

    def update(self, now: float, reports: Iterable[TargetReport]) -> None:
        self._age(now)
        self._fitted = None
        for report in reports:
            self._reported[report.target_id] = now
            for depth, measured in report.acceptance.items():
                self._merge(report, depth, measured)
        self._forget(now)

    def _age(self, now: float) -> None:
        if self._aged_at is not None and now > self._aged_at:
            keep = 0.5 ** ((now - self._aged_at) / self._half_life_s)
            for known in self._exits.values():
                known.age(keep)
        self._aged_at = now

    def _merge(self, report: TargetReport, depth: int, measured: ExitAcceptance) -> None:
        known = self._exits.setdefault((report.model, depth), _Exit())
        total = sum(measured.trials)
        before = known.seen.get(report.target_id, 0)
        # A smaller count than before is a worker that restarted: all of it is new.
        new = total - before if total >= before else total
        known.seen[report.target_id] = total
        if new <= 0:
            return
        for place, (rate, trials) in enumerate(zip(measured.rates, measured.trials, strict=True)):
            if place == len(known.rates):
                known.rates.append(PRIOR)
                known.trials.append(0.0)
            weight = new * trials / total
            if weight > 0.0:
                known.trials[place] = min(MAX_TRIALS, known.trials[place] + weight)
                share = min(1.0, weight / known.trials[place])
                known.rates[place] += share * (rate - known.rates[place])

    def _forget(self, now: float) -> None:
        """Bounds memory: targets that are gone, and exits that nothing is known of any more."""
        self._reported = {k: at for k, at in self._reported.items() if now - at <= _SEEN_S}
        for known in self._exits.values():
            known.seen = {k: v for k, v in known.seen.items() if k in self._reported}
        self._exits = {k: known for k, known in self._exits.items() if known.trials or known.seen}

    def curves(self, model: str, depths: Sequence[int], length: int) -> dict[int, list[float]]:
        """Conditional acceptance by place, `length` places, for each depth (ascending)."""
        fit = self._fit()
        quality, pooled = fit.quality.get(model, 1.0), fit.pooled
        result: dict[int, list[float]] = {depth: [] for depth in depths}
        previous = [PRIOR] * len(depths)
        for place in range(length):
            values, weights = [], []
            for index, depth in enumerate(depths):
                known = self._exits.get((model, depth))
                has = known is not None and place < len(known.rates)
                trials = known.trials[place] if known is not None and has else 0.0
                rate = known.rates[place] if known is not None and has else 0.0
                others, mean = pooled.get((depth, place), (0.0, PRIOR))
                prior = (others * quality * mean + PRIOR_TRIALS * previous[index]) / (others + PRIOR_TRIALS)
                weights.append(trials + PRIOR_TRIALS * 0.05)
                values.append((trials * rate + PRIOR_TRIALS * prior) / (trials + PRIOR_TRIALS))
            previous = [min(_MAX_RATE, v) for v in isotonic(values, weights)]
            for depth, value in zip(depths, previous, strict=True):
                result[depth].append(value)
        return result

    def _fit(self) -> _Fit:
        """Rates as product of a model's quality and a mean by (exit, place), fitted in turns. Not a plain
        mean: models that use a deep exit are not like those that do not."""
        if self._fitted is None:
            rows = [
                (model, (depth, place), trials, trials * rate)
                for (model, depth), known in self._exits.items()
                for place, (rate, trials) in enumerate(zip(known.rates, known.trials, strict=True))
                if trials > 0.0
            ]
            quality = dict.fromkeys((row[0] for row in rows), 1.0)
            pooled: dict[tuple[int, int], tuple[float, float]] = {}
            for _ in range(_FIT_TURNS):
                sums: dict[tuple[int, int], list[float]] = {}
                for model, cell, trials, hits in rows:
                    total = sums.setdefault(cell, [0.0, 0.0, 0.0])
                    total[0] += trials
                    total[1] += hits
                    total[2] += trials * quality[model]
                pooled = {cell: (total[0], total[1] / total[2]) for cell, total in sums.items()}
                found = {model: [_QUALITY_TRIALS, _QUALITY_TRIALS] for model in quality}
                for model, cell, trials, hits in rows:
                    found[model][0] += hits
                    found[model][1] += trials * pooled[cell][1]
                quality = {model: hits / expected for model, (hits, expected) in found.items()}
            self._fitted = _Fit(quality, pooled)
        return self._fitted

    def trials(self, model: str, depth: int) -> float:
        """Aged trials at the first place."""
        known = self._exits.get((model, depth))
        return known.trials[0] if known is not None and known.trials else 0.0

    def stalest(self, model: str, depths: Sequence[int]) -> int | None:
        """The depth with the least evidence, the shallower of two."""
        return min(depths, key=lambda d: (self.trials(model, d), d), default=None)

    def export(self) -> dict[str, Any]:
        rows = [
            {"model": model, "exit": depth, "rates": e.rates, "trials": e.trials, "seen": e.seen}
            for (model, depth), e in self._exits.items()
        ]  # fmt: skip
        return {"aged_at": self._aged_at, "reported": self._reported, "exits": rows}

    def restore(self, data: dict[str, Any]) -> None:
        self._aged_at = data["aged_at"]
        self._fitted = None
        self._exits = {
            (row["model"], int(row["exit"])): _Exit(
                list(row["rates"]), list(row["trials"]), dict(row["seen"])
            )
            for row in data["exits"]
        }  # fmt: skip
        # A state of before these times were kept: whoever is in it reported then.
        seen = {name: data["aged_at"] for row in data["exits"] for name in row["seen"]}
        self._reported = dict(data.get("reported", seen))
