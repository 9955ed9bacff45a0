"""Prometheus metrics, through Ray's own exporter (Ray prefixes every name with `ray_`).

The speculation counters mirror vLLM's `spec_decode_*`: acceptance rate is accepted / drafted, mean accepted
length is 1 + accepted / drafts. They are by drafter.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

from actors.target_worker.messages import GenerationChunk

if TYPE_CHECKING:
    from actors.draft_worker.batcher import BatcherState

_MODEL = ("model_name",)
_SECONDS = [0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 1.0]


def _count(stats: Mapping[str, Any], key: str) -> int:
    return int(stats.get(key) or 0)


class TargetMetrics:
    """Metrics of one target replica; create it inside the replica's process."""

    def __init__(self, model_name: str) -> None:
        tags = {"model_name": model_name}

        counter = partial(_counter, tags)

        def gauge(name: str, text: str) -> Gauge:
            metric = Gauge(name, description=text, tag_keys=_MODEL)
            metric.set_default_tags(tags)
            return metric

        def histogram(name: str, text: str, bounds: list[float]) -> Histogram:
            metric = Histogram(name, description=text, boundaries=bounds, tag_keys=_MODEL)
            metric.set_default_tags(tags)
            return metric

        by_drafter = ("drafter",)
        self._drafts = counter(
            "s2d_spec_decode_num_drafts",
            "Verification rounds with drafts of this drafter, per request.",
            by_drafter,
        )
        self._drafted = counter("s2d_spec_decode_num_draft_tokens", "Draft tokens verified.", by_drafter)
        self._accepted = counter("s2d_spec_decode_num_accepted_tokens", "Draft tokens accepted.", by_drafter)
        self._accepted_at = counter(
            "s2d_spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by position.",
            (*by_drafter, "position"),
        )
        self._prompt_tokens = counter("s2d_prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = counter(
            "s2d_cached_prompt_tokens", "Prompt tokens of finished requests that the prefix cache had."
        )
        self._generation_tokens = counter("s2d_generation_tokens", "Tokens generated.")
        self._success = counter("s2d_request_success", "Choices finished.", ("finish_reason",))
        self._preemptions = counter(
            "s2d_num_preemptions", "Times that a request gave its KV blocks back, to be computed again later."
        )
        self._ttft = histogram("s2d_time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._tpot = histogram(
            "s2d_time_per_output_token_seconds", "(End to end - first token) / (tokens - 1).", _TOKEN_SECONDS
        )
        self._e2e = histogram("s2d_e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self._queue = histogram("s2d_request_queue_seconds", "Arrival to first being scheduled.", _SECONDS)
        self._running = gauge("s2d_num_requests_running", "Requests in the running batch.")
        self._waiting = gauge("s2d_num_requests_waiting", "Requests waiting for the engine.")
        self._kv_usage = gauge("s2d_kv_cache_usage_ratio", "KV blocks held by running requests, 0 to 1.")
        self._last: dict[str, Any] = {}

    def record_engine(self, stats: Mapping[str, Any]) -> None:
        """From an `EngineStats` snapshot as a mapping. Counters grow by the difference to the last one."""
        self._running.set(_count(stats, "running"))
        self._waiting.set(_count(stats, "waiting"))
        total = _count(stats, "kv_blocks_total")
        self._kv_usage.set(_count(stats, "kv_blocks_used") / total if total else 0.0)
        _increase(self._preemptions, _count(stats, "preemptions") - _count(self._last, "preemptions"))
        known = self._last.get("drafters") or {}
        for drafter, now in (stats.get("drafters") or {}).items():
            tags, before = {"drafter": drafter}, known.get(drafter) or {}
            _increase(self._drafts, _count(now, "rounds") - _count(before, "rounds"), tags)
            _increase(self._drafted, _count(now, "drafted") - _count(before, "drafted"), tags)
            _increase(self._accepted, _count(now, "accepted") - _count(before, "accepted"), tags)
            counted = before.get("accepted_per_position") or ()
            for position, accepted in enumerate(now.get("accepted_per_position") or ()):
                old = counted[position] if position < len(counted) else 0
                _increase(self._accepted_at, accepted - old, {**tags, "position": str(position)})
        self._last = dict(stats)

    async def observe(self, chunks: AsyncIterator[GenerationChunk]) -> AsyncGenerator[GenerationChunk, None]:
        """Pass chunks through, timing them. Closing it closes `chunks`."""
        began = time.monotonic()
        first: dict[int, float] = {}
        tokens: dict[int, int] = {}
        try:
            async for chunk in chunks:
                now = time.monotonic()
                self._observe_chunk(chunk, now, began, first, tokens)
                yield chunk
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()

    def _observe_chunk(
        self,
        chunk: GenerationChunk,
        now: float,
        began: float,
        first: dict[int, float],
        tokens: dict[int, int],
    ) -> None:
        choice = chunk.index
        if chunk.queue_s is not None:
            self._queue.observe(chunk.queue_s)
        if chunk.token_ids:
            if choice not in first:
                first[choice] = now
                self._ttft.observe(now - began)
            tokens[choice] = tokens.get(choice, 0) + len(chunk.token_ids)
            self._generation_tokens.inc(len(chunk.token_ids))
        if chunk.error is not None or chunk.finish_reason is None:
            return
        self._success.inc(1, {"finish_reason": chunk.finish_reason})
        self._e2e.observe(now - began)
        if tokens.get(choice, 0) > 1:
            self._tpot.observe((now - first[choice]) / (tokens[choice] - 1))
        if chunk.usage is not None:
            _increase(self._prompt_tokens, chunk.usage.prompt_tokens)
            _increase(self._cached_tokens, chunk.usage.cached_tokens)


class DraftMetrics:
    """Metrics of one draft worker; create it inside the worker's process."""

    def __init__(self, worker_id: str) -> None:
        counter = partial(_counter, {"worker": worker_id})
        self._rounds = counter("s2d_draft_rounds", "Rounds that a draft worker answered.")
        self._drafted = counter("s2d_draft_tokens", "Draft tokens proposed by a draft worker.")
        self._ahead = counter(
            "s2d_draft_ahead_drafts",
            "Drafts after the first of a session, by what was prepared of them while the target verified: "
            "foreseen (all), partly, missed.",
            ("outcome",),
        )
        self._ahead_tokens = counter(
            "s2d_draft_ahead_tokens", "Draft tokens prepared while targets verified."
        )
        self._last: BatcherState | None = None

    def record(self, state: BatcherState) -> None:
        """Counters grow by the difference to the last one."""
        before = self._last
        _increase(self._rounds, state.rounds - (before.rounds if before else 0))
        _increase(self._drafted, state.drafted_tokens - (before.drafted_tokens if before else 0))
        now, then = asdict(state.ahead), asdict(before.ahead) if before else {}
        _increase(self._ahead_tokens, now.pop("steps") - then.pop("steps", 0))
        for outcome, count in now.items():
            _increase(self._ahead, count - then.get(outcome, 0), {"outcome": outcome})
        self._last = state


class GatewayMetrics:
    """Metrics of the gateway; create it inside the gateway's process."""

    def __init__(self) -> None:
        self._resumed = Counter(
            "s2d_requests_resumed",
            description="Times that a request went on at another replica after its target worker was lost.",
            tag_keys=_MODEL,
        )
        self._failed = Counter(
            "s2d_requests_failed",
            description="Calls for generation that ended without their whole answer, by reason.",
            tag_keys=(*_MODEL, "reason"),
        )

    def resumed(self, model_name: str) -> None:
        self._resumed.inc(1, {"model_name": model_name})

    def failed(self, model_name: str, reason: str) -> None:
        self._failed.inc(1, {"model_name": model_name, "reason": reason})


def _counter(tags: dict[str, str], name: str, text: str, keys: tuple[str, ...] = ()) -> Counter:
    """`tags` are the same for every sample, `keys` are given with each."""
    metric = Counter(name, description=text, tag_keys=(*tags, *keys))
    metric.set_default_tags(tags)
    return metric


def _increase(counter: Counter, amount: int, tags: dict[str, str] | None = None) -> None:
    """Counters refuse zero and negative steps (an engine that restarted counts from zero again)."""
    if amount > 0:
        counter.inc(amount, tags or {})
