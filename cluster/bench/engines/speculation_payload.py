"""Acceptance as endpoints report it: `metrics.speculative_decoding`, AIPerf's and vLLM's shape, and what this
server adds beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.bench.engines.interface import SpeculationCounts


def speculation_counts(metrics: Mapping[str, Any] | None, tokens: int) -> SpeculationCounts | None:
    """Of one request with so many output tokens; None where the payload is missing.

    A verification round emits its accepted drafts and one token of the target, so the rounds (those without
    drafts, and the one that ended the prompt, included) are the tokens that were no accepted drafts. The
    payload itself counts only rounds with drafts.
    """
    payload = (metrics or {}).get("speculative_decoding")
    if not payload:
        return None
    accepted = int(payload["num_accepted_draft_tokens"])
    steps = int(payload["num_spec_steps"])
    histogram = [int(n) for n in payload.get("acceptance_histogram") or ()]
    by_exit = {
        name: (int(counts["num_draft_tokens"]), int(counts["num_accepted_draft_tokens"]))
        for name, counts in ((metrics or {}).get("drafters") or {}).items()
    }
    return SpeculationCounts(
        rounds=max(tokens - accepted, steps, 1),
        drafted=int(payload.get("num_draft_tokens") or 0),
        accepted=accepted,
        accepted_by_position=tuple(sum(histogram[j + 1 :]) for j in range(len(histogram) - 1)),
        by_exit=by_exit,
    )
