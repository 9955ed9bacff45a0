"""Pieces of OpenAI's answers that chat and plain completions share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from actors.target_worker.messages import PositionLogprobs, SpeculationStats, TextLogprob, Usage
from cluster.gateway.openai_params import Job

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chunk_usage(so_far: Usage, include_usage: bool, continuous: bool) -> dict[str, Any]:
    """The `usage` field of a streamed chunk: null where only the last chunk, without choices, tells it."""
    if continuous:
        return {"usage": usage_body(so_far)}
    return {"usage": None} if include_usage else {}


def metrics_body(job: Job, stats: SpeculationStats | None) -> dict[str, Any] | None:
    """AIPerf's acceptance payload, and beside it what each drafter did. `num_spec_tokens` is left out,
    because the draft length adapts."""
    if job.choices != 1 or stats is None:
        return None
    return {
        "speculative_decoding": {
            "acceptance_histogram": list(stats.acceptance_histogram),
            "num_spec_steps": stats.num_spec_steps,
            "num_accepted_draft_tokens": stats.num_accepted_draft_tokens,
            "num_draft_tokens": stats.num_draft_tokens,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
        },
        "drafters": {
            name: {"num_draft_tokens": drafted, "num_accepted_draft_tokens": accepted}
            for name, drafted, accepted in stats.by_drafter
        },
    }


def _chat_logprob(entry: TextLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": finite(entry.logprob), "bytes": list(entry.token_bytes)}


def chat_logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    content = [
        {**_chat_logprob(p.chosen), "top_logprobs": [_chat_logprob(t) for t in p.top]} for p in positions
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    positions: Sequence[PositionLogprobs | None], first_token: str = ""
) -> dict[str, Any]:
    """`None` (the prompt's first token, whose text is `first_token`) has no log-probability."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for position in positions:
        if position is None:
            tokens.append(first_token)
            token_logprobs.append(None)
            top.append(None)
            offsets.append(0)
            continue
        tokens.append(position.chosen.token)
        token_logprobs.append(finite(position.chosen.logprob))
        # A token outside the alternatives is listed too, as OpenAI and vLLM do.
        alternatives = {t.token: finite(t.logprob) for t in position.top}
        alternatives.setdefault(position.chosen.token, finite(position.chosen.logprob))
        top.append(alternatives)
        offsets.append(position.text_offset)
    return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top, "text_offset": offsets}


def prompt_logprobs_body(
    positions: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for each prompt token, token ids with their log-probabilities; null for the first. `rank`
    counts from 1; null for a token that is not among the alternatives."""
    return [None if position is None else _alternatives(position) for position in positions or ()]


def _alternatives(position: PositionLogprobs) -> dict[str, dict[str, Any]]:
    ranked: list[tuple[TextLogprob, int | None]] = [(entry, k) for k, entry in enumerate(position.top, 1)]
    if all(entry.token_id != position.chosen.token_id for entry in position.top):
        ranked.append((position.chosen, None))
    return {
        str(entry.token_id): {"logprob": finite(entry.logprob), "rank": rank, "decoded_token": entry.token}
        for entry, rank in ranked
    }
