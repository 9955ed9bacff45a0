"""`serve deploy deploy/serve.yaml` on a Ray that runs already gives a service that answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from protos.s2d.v1 import generation_pb2 as pb
from protos.s2d.v1 import generation_pb2_grpc
from tests.integration.ray_node import ROOT, RayNode, free_ports, ray_head, wait_until

pytestmark = pytest.mark.slow

READY_TIMEOUT_S = 240.0  # the first start on a machine converts the model
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    with ray_head() as started:
        yield started


def with_ports(config: dict[str, Any]) -> dict[str, Any]:
    """The deployed file on ports that are free here, and on this machine's loopback only."""
    http, grpc_port, draft = free_ports(3)
    config["http_options"] |= {"host": "127.0.0.1", "port": http}
    config["grpc_options"]["port"] = grpc_port
    args = config["applications"][0]["args"]
    args["gateway"] |= {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc_port}
    args["draft_pool"] |= {"host": "127.0.0.1", "port_range": [draft, draft]}
    return config


@pytest.fixture(scope="module")
def service(node: RayNode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Deployed and ready; the configuration as deployed."""
    config = with_ports(yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8")))
    file: Path = tmp_path_factory.mktemp("deploy") / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    deployed = node.run("serve", "deploy", "--address", node.dashboard_url, str(file))
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr

    def ready() -> bool:
        try:
            return httpx.get(f"{base_url(config)}/ready", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(ready, READY_TIMEOUT_S, "the service is ready", 1.0)
    except AssertionError:
        print(node.run("serve", "status", "--address", node.dashboard_url).stdout)
        raise
    return config


def base_url(config: dict[str, Any]) -> str:
    return f"http://127.0.0.1:{config['http_options']['port']}"


def model_name(config: dict[str, Any]) -> str:
    return str(config["applications"][0]["args"]["models"][0]["name"])


def test_chat_completion(service: dict[str, Any]) -> None:
    body = {"model": model_name(service), "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    response = httpx.post(f"{base_url(service)}/v1/chat/completions", json=body, timeout=60.0)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] > 0


def test_grpc_chat_gives_the_same_text(service: dict[str, Any]) -> None:
    body = {"model": model_name(service), "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    over_http = httpx.post(f"{base_url(service)}/v1/chat/completions", json=body, timeout=60.0).json()
    request = pb.ChatRequest(
        model=model_name(service),
        messages=[pb.ChatMessage(**message) for message in MESSAGES],
        sampling=pb.SamplingParams(temperature=0, max_tokens=24),
    )
    with grpc.insecure_channel(f"127.0.0.1:{service['grpc_options']['port']}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        chunks = list(stub.Chat(request, timeout=60.0, metadata=(("application", "s2d"),)))
    assert "".join(chunk.text for chunk in chunks) == over_http["choices"][0]["message"]["content"]


def test_what_an_operator_probes(service: dict[str, Any]) -> None:
    """The HTTP paths of docs/operations.md, and the health call that Serve's gRPC proxy answers itself."""
    for path in ("/health", "/ready", "/-/healthz"):
        assert httpx.get(base_url(service) + path, timeout=10.0).status_code == 200, path
    with grpc.insecure_channel(f"127.0.0.1:{service['grpc_options']['port']}") as channel:
        healthz = channel.unary_unary("/ray.serve.RayServeAPIService/Healthz")
        healthz(b"", timeout=10.0)


def test_the_draft_worker_is_used(service: dict[str, Any]) -> None:
    state = httpx.get(f"{base_url(service)}/state", timeout=10.0).json()
    (worker,) = state["draft_workers"]
    port = service["applications"][0]["args"]["draft_pool"]["port_range"][0]
    assert worker["address"] == f"127.0.0.1:{port}"
    assert worker["error"] is None
    assert worker["streams"] == 1
