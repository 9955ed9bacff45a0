"""Blocks of serving load as rows: latency and throughput by engine and point, and ratios within pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from cluster.bench.config import LoadSettings
from cluster.bench.engines.interface import BenchResponse
from cluster.bench.load import Block, Point
from cluster.bench.metrics import Acceptance, LatencySummary, e2e, tpot, ttft
from cluster.bench.paired import Comparison, compare, with_plain


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One engine at one point. latency: over all its blocks. block_tokens_per_s: output tokens/s of each
    block, by pair. paired: ratios of these to the baseline's within pairs, None for the baseline itself."""

    engine: str
    point: Point
    latency: LatencySummary
    block_tokens_per_s: tuple[float, ...]
    acceptance: Acceptance | None
    paired: Comparison | None


def summarize(blocks: Sequence[Block], settings: LoadSettings) -> list[LoadRow]:
    """Rows by point, then by engine."""
    rows: list[LoadRow] = []
    for point in dict.fromkeys(b.point for b in blocks):
        here = [b for b in blocks if b.point == point]
        base = _speeds(here, settings.baseline_name)
        for engine in dict.fromkeys(b.engine for b in here if b.pair == here[0].pair):
            mine = [b for b in here if b.engine == engine]
            responses = [r.response for b in mine for r in b.records]
            ours = _speeds(here, engine)
            rows.append(
                LoadRow(
                    engine,
                    point,
                    LatencySummary.of(responses, sum(b.duration_s for b in mine), settings.slo),
                    tuple(ours.values()),
                    Acceptance.of(responses),
                    None if engine == settings.baseline_name else compare(ours, base, settings.threshold),
                )
            )
    return rows


@dataclass(frozen=True, slots=True)
class LoadPlainRow:
    """An engine at one point against plain decoding of the same engine, measured in the same run.

    All are ratios within pairs, above 1 where the engine is faster. paired: of the output tokens/s of their
    blocks. e2e, ttft, tpot: of the mean over a block's requests, plain decoding's time / the engine's; None
    where no block has such a time. A closed loop's block lasts until its slowest stream has ended, while
    others that have ended leave their share of the machine unused, so tokens/s and e2e may differ.
    """

    engine: str
    plain: str
    point: Point
    paired: Comparison
    e2e: Comparison | None
    ttft: Comparison | None
    tpot: Comparison | None


def against_plain(
    blocks: Sequence[Block], plain_of: Callable[[str], str | None], threshold: float = 1.0
) -> list[LoadPlainRow]:
    """Rows for the engines whose plain counterpart was measured too, by engine, then by point; none for a
    point without a pair."""
    points = list(dict.fromkeys(b.point for b in blocks))
    rows = []
    for engine, plain in with_plain((b.engine for b in blocks), plain_of):
        for point in points:
            here = [b for b in blocks if b.point == point]
            paired = compare(_speeds(here, engine), _speeds(here, plain), threshold)
            if paired is not None:
                times = (
                    compare(_rates(here, engine, time), _rates(here, plain, time), threshold)
                    for time in (e2e, ttft, tpot)
                )
                rows.append(LoadPlainRow(engine, plain, point, paired, *times))
    return rows


def _comparable(blocks: Sequence[Block], engine: str) -> dict[Hashable, Block]:
    """The engine's blocks by pair; a block with a failed request is not comparable and left out."""
    return {
        b.pair: b for b in blocks if b.engine == engine and all(r.response.error is None for r in b.records)
    }


def _speeds(blocks: Sequence[Block], engine: str) -> dict[Hashable, float]:
    """Output tokens/s by pair."""
    return {
        pair: tokens / block.duration_s
        for pair, block in _comparable(blocks, engine).items()
        if (tokens := sum(r.response.num_tokens for r in block.records))
    }


def _rates(
    blocks: Sequence[Block], engine: str, time: Callable[[BenchResponse], float | None]
) -> dict[Hashable, float]:
    """1 / the mean `time` of a block's requests, by pair; without the blocks in which no request has one."""
    found: dict[Hashable, float] = {}
    for pair, block in _comparable(blocks, engine).items():
        times = [t for r in block.records if (t := time(r.response)) is not None]
        if times and (mean := statistics.fmean(times)) > 0:
            found[pair] = 1.0 / mean
    return found
