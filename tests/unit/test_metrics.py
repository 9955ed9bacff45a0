"""Target metrics, with Ray's metric classes replaced by recorders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.draft_worker.batcher import BatcherState
from actors.drafting.draft_ahead import AheadCounts
from actors.target_worker.messages import GenerationChunk, RequestError, Usage
from cluster.router.reports import Assignment
from cluster.router.service import Decision
from cluster.telemetry import metrics, router_metrics
from cluster.telemetry.metrics import DraftMetrics, GatewayMetrics, TargetMetrics
from cluster.telemetry.router_metrics import RouterMetrics
from cluster.telemetry.vllm_names import spec_decode_text

Values = dict[str, list[tuple[float, tuple[tuple[str, str], ...]]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Values:
    values: Values = defaultdict(list)

    class Recorder:
        def __init__(self, name: str, **_: Any) -> None:
            self._name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags in ({"model_name": "m"}, {"worker": "w"})

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert value > 0
            values[self._name].append((value, tuple((tags or {}).items())))

        observe = set = inc

    class GaugeRecorder(Recorder):
        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            values[self._name].append((value, ()))

    class HistogramRecorder(GaugeRecorder):
        observe = GaugeRecorder.set

    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(metrics, "Gauge", GaugeRecorder)
    monkeypatch.setattr(metrics, "Histogram", HistogramRecorder)
    return values


def total(values: Values, name: str, **tags: str) -> float:
    return sum(v for v, t in values[name] if t == tuple(tags.items()))


def engine(rounds: int, drafted: int, accepted: tuple[int, ...], **more: Any) -> dict[str, Any]:
    one = {"rounds": rounds, "drafted": drafted, "accepted": sum(accepted), "accepted_per_position": accepted}
    return {"drafters": {"x": one, "y": one}, "running": 1, "kv_blocks_total": 8, "kv_blocks_used": 2, **more}


def test_speculation_counters_grow_by_differences(recorded: Values) -> None:
    target = TargetMetrics("m")
    for stats in (engine(1, 3, (1,)), engine(1, 3, (1,)), engine(4, 9, (3, 2), preemptions=2)):
        target.record_engine(stats)
    late = {"rounds": 1, "drafted": 2, "accepted": 0, "accepted_per_position": (0, 0)}
    more = engine(4, 9, (3, 2), preemptions=5)
    target.record_engine({**more, "drafters": {**more["drafters"], "z": late}})
    for drafter in "xy":
        assert total(recorded, "s2d_spec_decode_num_drafts", drafter=drafter) == 4
        assert total(recorded, "s2d_spec_decode_num_draft_tokens", drafter=drafter) == 9
        assert total(recorded, "s2d_spec_decode_num_accepted_tokens", drafter=drafter) == 5
        for position, accepted in enumerate((3, 2)):
            tags = {"drafter": drafter, "position": str(position)}
            assert total(recorded, "s2d_spec_decode_num_accepted_tokens_per_pos", **tags) == accepted
    assert total(recorded, "s2d_spec_decode_num_drafts", drafter="z") == 1
    assert total(recorded, "s2d_spec_decode_num_draft_tokens", drafter="z") == 2
    assert sum(v for v, _ in recorded["s2d_spec_decode_num_drafts"]) == 9
    assert total(recorded, "s2d_num_preemptions") == 5
    assert recorded["s2d_kv_cache_usage_ratio"][-1][0] == 0.25
    target.record_engine(engine(0, 0, ()))  # an engine that counts from zero again
    assert sum(v for v, _ in recorded["s2d_spec_decode_num_drafts"]) == 9


def test_a_draft_workers_counters_grow_by_differences(recorded: Values) -> None:
    worker = DraftMetrics("w")
    idle = BatcherState(0, 0, 0, 0, 8, rounds=3, drafted_tokens=9)
    later = replace(idle, rounds=5, drafted_tokens=12, ahead=AheadCounts(4, 2, 1, steps=30))
    for state in (idle, later, replace(later, ahead=AheadCounts(5, 2, 3, steps=31))):
        worker.record(state)
    assert total(recorded, "s2d_draft_rounds") == 5
    assert total(recorded, "s2d_draft_tokens") == 12
    assert total(recorded, "s2d_draft_ahead_tokens") == 31
    found = [total(recorded, "s2d_draft_ahead_drafts", outcome=o) for o in ("foreseen", "partly", "missed")]
    assert found == [5, 2, 3]


async def test_requests_are_timed(recorded: Values) -> None:
    async def chunks() -> AsyncIterator[GenerationChunk]:
        yield GenerationChunk(index=0, token_ids=(1,), queue_s=0.5)
        yield GenerationChunk(index=1, token_ids=(1, 2), finish_reason="stop", usage=Usage(0, 2))
        yield GenerationChunk(index=0, token_ids=(2, 3), finish_reason="length", usage=Usage(7, 3, 4))

    assert len([c async for c in TargetMetrics("m").observe(chunks())]) == 3
    assert len(recorded["s2d_time_to_first_token_seconds"]) == 2
    assert len(recorded["s2d_time_per_output_token_seconds"]) == 2
    assert len(recorded["s2d_e2e_request_latency_seconds"]) == 2
    assert recorded["s2d_request_queue_seconds"] == [(0.5, ())]
    assert (total(recorded, "s2d_prompt_tokens"), total(recorded, "s2d_generation_tokens")) == (7, 5)
    assert total(recorded, "s2d_cached_prompt_tokens") == 4
    assert total(recorded, "s2d_request_success", finish_reason="stop") == 1
    assert total(recorded, "s2d_request_success", finish_reason="length") == 1


async def test_errors_and_closing(recorded: Values) -> None:
    closed = False

    async def chunks() -> AsyncIterator[GenerationChunk]:
        nonlocal closed
        try:
            yield GenerationChunk(error=RequestError("internal", "x"), finish_reason="error")
            yield GenerationChunk()
        finally:
            closed = True

    stream = TargetMetrics("m").observe(chunks())
    await anext(stream)
    await stream.aclose()
    assert closed
    assert recorded["s2d_request_success"] == []


def test_failures_by_model_and_reason(recorded: Values) -> None:
    gateway = GatewayMetrics()
    for model, reason in (("m", "timeout"), ("m", "timeout"), ("", "invalid")):
        gateway.failed(model, reason)
    assert total(recorded, "s2d_requests_failed", model_name="m", reason="timeout") == 2
    assert total(recorded, "s2d_requests_failed", model_name="", reason="invalid") == 1


def test_speculation_under_vllms_names() -> None:
    replicas = [
        # Two drafters with four rounds each, three of them in one tree.
        {"replica_id": "r1", "engine": engine(4, 9, (3, 2), drafted_rounds=5)},
        {"replica_id": "r2", "engine": {"drafters": {}}},
        {"replica_id": "does not answer", "engine": {}},
    ]
    text = spec_decode_text([{"name": 'a "b"', "replicas": replicas}])
    families = {f.name: f for f in text_string_to_metric_families(text)}
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    base, model = "vllm:spec_decode_num_", ("model_name", 'a "b"')
    for replica, drafts, drafted, accepted in (("r1", 5, 18, 10), ("r2", 0, 0, 0)):
        labels = (("engine", replica), model)
        assert found.pop((f"{base}drafts_total", *labels)) == drafts
        assert found.pop((f"{base}draft_tokens_total", *labels)) == drafted
        assert found.pop((f"{base}accepted_tokens_total", *labels)) == accepted
    name = f"{base}accepted_tokens_per_pos_total"
    assert found == {
        (name, ("engine", "r1"), model, ("position", "0")): 6,
        (name, ("engine", "r1"), model, ("position", "1")): 4,
    }
    assert {f.type for f in families.values()} == {"counter"}
    assert spec_decode_text([]) == ""


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """By name and model ("" without one): the sum of a counter, the last value of a gauge."""
    values: dict[tuple[str, str], float] = defaultdict(float)

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
            self._name, self._keys = name.removeprefix("s2d_router_"), tag_keys

        def _key(self, tags: dict[str, str] | None) -> tuple[str, str]:
            assert tuple(tags or {}) == self._keys
            return self._name, "/".join((tags or {}).values())

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            values[self._key(tags)] += value

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            values[self._key(tags)] = value

    monkeypatch.setattr(router_metrics, "Counter", Recorder)
    monkeypatch.setattr(router_metrics, "Gauge", Recorder)
    return values


def decision(model: str, changed_at: float, gain: float = 1.0, cap: int = 0) -> Decision:
    return Decision(Assignment("t", "w", (4,), cap, "because", gain=gain), model, changed_at)


def test_the_routers_metrics_are_by_model(routed: dict[tuple[str, str], float]) -> None:
    router = RouterMetrics()
    router.record(
        {"a1": decision("a", 1.0, 1.5, 3), "a2": decision("a", 1.0, 1.2, 5), "b1": decision("b", 1.0)},
        {"w1": 0.25, "w2": 0.75},
    )
    assert routed == {
        ("predicted_gain", "a"): 1.2, ("draft_cap", "a"): 5, ("predicted_gain", "b"): 1.0,
        ("draft_cap", "b"): 0, ("planned_load", ""): 0.75, ("draft_workers", ""): 2,
    }  # fmt: skip
    router.record({"a1": decision("a", 2.0, 1.4, 3), "a2": decision("a", 3.0, 1.6, 2)}, {})
    assert routed == {
        ("assignment_changes", "a"): 2, ("predicted_gain", "a"): 1.4, ("draft_cap", "a"): 3,
        ("predicted_gain", "b"): 0.0, ("draft_cap", "b"): 0.0, ("planned_load", ""): 0.0,
        ("draft_workers", ""): 0,
    }  # fmt: skip


def test_the_routers_series_do_not_grow_with_restarts(routed: dict[tuple[str, str], float]) -> None:
    router = RouterMetrics()
    for replica in range(1000):
        made = {f"t{replica}": decision("m", replica, 1.3), f"t{replica + 1}": decision("m", replica, 1.2)}
        router.record(made, {f"w{replica}": 0.5})
    assert len(routed) == 5
    assert routed["predicted_gain", "m"] == 1.2
    assert routed["assignment_changes", "m"] == 999
