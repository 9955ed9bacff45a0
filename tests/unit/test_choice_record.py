"""Recording a trace of a toy model: what the whole model drafts is what it answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.bench.choice.record import record_trace
from cluster.bench.choice.settings import TraceSettings
from cluster.config import NestedDrafterConfig
from tests.toy_draft import toy_base


def test_the_deepest_exit_agrees_with_the_target(tmp_path: Path) -> None:
    base = toy_base(tmp_path / "base")
    nested = NestedDrafterConfig(source=str(base), exits=(2, 4), dtype="float32")
    settings = TraceSettings(
        source=str(base), dtype="float32", nested=nested, per_task=1, max_tokens=8, chain=3, repeats=1
    )
    trace = record_trace(settings)
    assert (trace.card.exits, trace.card.chain) == ((2, 4), 3)
    assert len(trace.tasks) == len(trace.answers)
    for answer in trace.answers:
        assert answer.candidates[:, 0].tolist() == list(answer.token_ids)
        for place in range(1, len(answer.token_ids)):
            follows = np.array(answer.token_ids[place : place + 3])
            assert np.array_equal(answer.drafts[4][place, : len(follows)], follows)
            assert answer.confidence[2][place, 0] > 0
    assert all(s > 0 for table in trace.card.step_s.values() for s in table.values())


def test_a_data_set_needs_its_file() -> None:
    with pytest.raises(ValidationError, match="path"):
        TraceSettings(dataset="spec-bench")
