"""Mixed requests for a soak: both endpoints, greedy and sampled, short and long, streamed or not, cancelled.

Every request has a text of its own, so that the prefix cache cannot answer for the engine and has to evict.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

MAX_TOKENS = (1, 2, 4, 8, 16)
LONG_SHARE, CANCEL_SHARE, STREAM_SHARE, SAMPLED_SHARE, CHAT_SHARE = 0.06, 0.1, 0.6, 0.5, 0.5
LONG_PROMPTS = 3
"""Texts put together to a long prompt."""
CANCEL_TOKENS = 64
"""Asked for where the client will leave early."""


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """cancel_after: chunks after which the client leaves; None stays to the end."""

    path: str
    body: dict[str, Any]
    cancel_after: int | None = None

    @property
    def kind(self) -> str:
        how = "cancelled" if self.cancel_after is not None else "streamed" if self.body["stream"] else "whole"
        drawn = "sampled" if self.body["temperature"] else "greedy"
        return f"{'chat' if 'chat' in self.path else 'completion'}, {drawn}, {how}"


def requests(model: str, texts: Sequence[str], count: int, seed: int) -> list[SoakRequest]:
    """The same for the same seed."""
    draw = random.Random(seed)
    return [_request(model, texts, draw, index) for index in range(count)]


def _request(model: str, texts: Sequence[str], draw: random.Random, index: int) -> SoakRequest:
    long = draw.random() < LONG_SHARE
    picked = draw.sample(list(texts), LONG_PROMPTS) if long else [draw.choice(texts)[:120]]
    text = f"Request {index}. " + "\n\n".join(picked)
    cancel = draw.random() < CANCEL_SHARE
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": CANCEL_TOKENS if cancel else draw.choice(MAX_TOKENS),
        "temperature": 0.0,
        "stream": cancel or draw.random() < STREAM_SHARE,
    }
    if draw.random() < SAMPLED_SHARE:
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": draw.randrange(1 << 30)}
    chat = draw.random() < CHAT_SHARE
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return SoakRequest(path, body, draw.randint(1, 3) if cancel else None)


async def send(client: httpx.AsyncClient, request: SoakRequest) -> str | None:
    """What went wrong, None when all went well. Leaving early is what some requests are for."""
    try:
        if not request.body["stream"]:
            answer = await client.post(request.path, json=request.body)
            return _problem(answer.status_code, answer.text) or _unfinished(answer.json())
        async with client.stream("POST", request.path, json=request.body) as answer:
            if answer.status_code != 200:
                return _problem(answer.status_code, (await answer.aread()).decode("utf-8", "replace"))
            return await _read_stream(answer, request.cancel_after)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    except (json.JSONDecodeError, KeyError, IndexError) as error:
        return f"not an answer: {type(error).__name__}: {error}"


async def _read_stream(answer: httpx.Response, cancel_after: int | None) -> str | None:
    chunks, finished = 0, False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return None if finished else "the stream ended before the answer did"
        event = json.loads(data)
        if event.get("error"):
            return str(event["error"])
        finished = finished or any(c.get("finish_reason") for c in event.get("choices", ()))
        chunks += 1
        if cancel_after is not None and chunks >= cancel_after:
            return None
    return "the stream ended without [DONE]"


def _problem(status: int, text: str) -> str | None:
    return None if status == 200 else f"HTTP {status}: {text[:200]}"


def _unfinished(body: dict[str, Any]) -> str | None:
    return None if body["choices"][0]["finish_reason"] else "an answer without a reason to end"


def count_kinds(sent: Sequence[SoakRequest]) -> dict[str, int]:
    return dict(sorted(Counter(request.kind for request in sent).items()))
