"""A draft worker that dies in mid-stream costs time and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import prompts
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server, port_open, serve, stop

pytestmark = [pytest.mark.serve, pytest.mark.slow]


def _draft_connected(server: Server) -> bool:
    source = server.engine()["draft_source"]
    return bool(source.get("connected") or source.get("remote", {}).get("connected"))


def test_a_killed_draft_worker_is_replaced_and_used_again(tmp_path: Path) -> None:
    with serve(tmp_path, max_model_len=2048) as server:
        wait_until(lambda: _draft_connected(server), 30, "the draft worker is connected")
        body: dict[str, Any] = {
            "prompt": prompts.REPETITIVE[2],
            "max_tokens": 600,
            "ignore_eos": True,
            "temperature": 0.8,
            "seed": 21,
            "speculation": {"max_draft_tokens": 4, "drafter": "prompt_lookup"},
        }
        undisturbed = server.complete(**body)["choices"][0]["text"]
        victims = server.processes_of("draft-pool")
        assert len(victims) == 1
        text, killed = "", False
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json={"model": MODEL, **body, "stream": True}) as answer,
        ):
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["text"]
                if not killed and len(text) > 200:
                    victims[0].kill()
                    killed = True
        assert killed
        assert text == undisturbed
        wait_until(lambda: _draft_connected(server), 60, "a new draft worker is connected")
        again = server.complete(
            prompts.REPETITIVE[1],
            max_tokens=40,
            temperature=0,
            speculation={"max_draft_tokens": 3, "force": True, "drafter": "nested", "exit_depth": 2},
        )
        assert again["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0, (
            "nested drafts need the worker"
        )


def test_sigterm_drains_and_leaves_nothing(tmp_path: Path) -> None:
    with serve(tmp_path, max_model_len=1024) as server:
        with (
            server.client() as client,
            client.stream(
                "POST",
                "/v1/completions",
                json={"model": MODEL, "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True},
            ) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]", "a running stream is finished first"
        code, left = stop(server)
        assert code == 0
        assert left == []
        assert not port_open(server.url)
        assert not port_open(server.grpc_address)
