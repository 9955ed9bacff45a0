"""Figures of single responses and of many: latency, throughput, goodput, acceptance.

Definitions are in `docs/benchmarking.md`; times are seconds here and milliseconds in tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.bench.engines.interface import BenchResponse, SpeculationCounts


def ttft(response: BenchResponse) -> float | None:
    """Time to first token: from sending the request to the first chunk that holds a token."""
    return next((t - response.started for t, count in response.arrivals if count), None)


def tpot(response: BenchResponse) -> float | None:
    """Time per output token after the first chunk: (last - first arrival) / (tokens - tokens of the first
    chunk). None when everything came in one chunk. Gaps between chunks are not used: a chunk may hold
    several tokens."""
    arrivals = [(t, count) for t, count in response.arrivals if count]
    if len(arrivals) < 2:
        return None
    later = sum(count for _, count in arrivals[1:])
    return (arrivals[-1][0] - arrivals[0][0]) / later


def e2e(response: BenchResponse) -> float:
    """End to end: from sending the request to its last token."""
    return response.finished - response.started


def tokens_per_second(response: BenchResponse) -> float | None:
    """Output tokens over the end-to-end time, prompt processing included, as Spec-Bench's wall time."""
    seconds = e2e(response)
    return response.num_tokens / seconds if response.num_tokens and seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Linear interpolation between order statistics (numpy's default)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Percentiles | None:
        """None values are left out; None when nothing is left."""
        known = [v for v in values if v is not None]
        if not known:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(known, (50, 90, 99)))
        return cls(len(known), float(np.mean(known)), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objectives in seconds; None is not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, response: BenchResponse) -> bool:
        """A failed request and one without a token meet nothing. One chunk has no TPOT to violate."""
        first = ttft(response)
        if response.error is not None or first is None:
            return False
        per_token = tpot(response)
        in_time = self.ttft_s is None or first <= self.ttft_s
        return in_time and (self.tpot_s is None or per_token is None or per_token <= self.tpot_s)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Speculation over many requests.

    mean_accepted_tokens: Spec-Bench's figure, tokens per verification round, the target's own token included
    (1.0 is plain decoding). rate: accepted / drafted tokens. by_position[j]: share of verification rounds
    whose draft token j was accepted. by_exit: acceptance rate by drafter or exit.
    """

    requests: int
    rounds: int
    drafted: int
    accepted: int
    mean_accepted_tokens: float
    rate: float | None
    by_position: tuple[float, ...] = ()
    by_exit: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, responses: Iterable[BenchResponse]) -> Acceptance | None:
        """Pooled over requests that report it; None when none does."""
        known = [(r.num_tokens, r.speculation) for r in responses if r.speculation and r.error is None]
        rounds = sum(s.rounds for _, s in known)
        if not rounds:
            return None
        drafted, accepted = sum(s.drafted for _, s in known), sum(s.accepted for _, s in known)
        return cls(
            requests=len(known),
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            mean_accepted_tokens=sum(tokens for tokens, _ in known) / rounds,
            rate=accepted / drafted if drafted else None,
            by_position=_by_position([s for _, s in known], rounds),
            by_exit=_by_exit([s for _, s in known]),
        )


def _by_position(counts: Sequence[SpeculationCounts], rounds: int) -> tuple[float, ...]:
    longest = max(len(s.accepted_by_position) for s in counts)
    return tuple(
        sum(s.accepted_by_position[j] for s in counts if j < len(s.accepted_by_position)) / rounds
        for j in range(longest)
    )


def _by_exit(counts: Sequence[SpeculationCounts]) -> dict[str, float]:
    totals: dict[str, tuple[int, int]] = {}
    for speculation in counts:
        for name, (drafted, accepted) in speculation.by_exit.items():
            before = totals.get(name, (0, 0))
            totals[name] = (before[0] + drafted, before[1] + accepted)
    return {name: accepted / drafted for name, (drafted, accepted) in totals.items() if drafted}


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Of requests that ended well, apart from `errors`, `goodput` and `duration_s`, which cover all."""

    requests: int
    errors: int
    duration_s: float
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    goodput: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None

    @classmethod
    def of(cls, responses: Sequence[BenchResponse], duration_s: float, slo: Slo) -> LatencySummary:
        """`duration_s`: over which the responses came, the denominator of every rate."""
        good = [r for r in responses if r.error is None]
        tokens = sum(r.num_tokens for r in good)
        per_second = 1.0 / duration_s if duration_s > 0 else 0.0
        return cls(
            requests=len(responses),
            errors=len(responses) - len(good),
            duration_s=duration_s,
            output_tokens=tokens,
            output_tokens_per_s=tokens * per_second,
            requests_per_s=len(good) * per_second,
            goodput=sum(map(slo.met_by, responses)) * per_second,
            ttft=Percentiles.of(map(ttft, good)),
            tpot=Percentiles.of(map(tpot, good)),
            e2e=Percentiles.of(map(e2e, good)),
        )
