"""The configuration file: defaults, round trips, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig, GatewayConfig, ModelConfig


def test_default_serves_the_embedded_model() -> None:
    config = ClusterConfig.default("float32")
    assert [m.name for m in config.models] == ["SmolLM2-135M-Instruct"]
    assert config.models[0].dtype == "float32"
    assert config.draft_pool.drafters == ("prompt_lookup", "token_recycling", "nested")
    assert config.draft_pool.nested is not None
    assert config.draft_pool.nested.resolved_exits() == (1, 2, 4), "the trained draft is in the package"


def test_json_round_trip() -> None:
    config = ClusterConfig.model_validate(
        {
            "models": [{"name": "a/b", "source": "x"}],
            "draft_pool": {
                "drafters": ["nested"],
                "nested": {"source": "x", "exits": [2, 4]},
                "tls": {"cert": "c.pem", "key": "k.pem", "ca": "a.pem"},
            },
        }
    )
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "s2d.yaml"
    path.write_text("models:\n- {name: m, source: /x, engine: {max_num_seqs: 3}}\n", encoding="utf-8")
    assert ClusterConfig.from_yaml(path).models[0].engine.max_num_seqs == 3
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValidationError, match="models"):
        ClusterConfig.from_yaml(path)


MODEL = {"name": "m", "source": "x"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"draft_pool": {}}, "models"),
        ({"models": [{**MODEL, "autoscaling": {"min_replica": 0}}]}, "min_replica"),
        ({"models": [MODEL, MODEL]}, "unique"),
        ({"models": [{**MODEL, "nmae": 1}]}, "nmae"),
        ({"models": [{**MODEL, "name": "a b"}]}, "name"),
        ({"models": [{**MODEL, "dtype": "int3"}]}, "dtype"),
        ({"models": [{**MODEL, "engine": {"max_num_seqs": 0}}]}, "max_num_seqs"),
        (
            {"models": [{**MODEL, "engine": {"max_num_seqs": 64, "max_batched_tokens": 32}}]},
            "max_batched_tokens",
        ),
        ({"models": [MODEL], "draft_pool": {"drafters": ["nested"]}}, "nested"),
        ({"models": [MODEL], "draft_pool": {"port_range": [5, 4]}}, "port_range"),
        ({"models": [MODEL], "draft_pool": {"nested": {"source": "x", "exits": [4, 2]}}}, "exits"),
        ({"models": [MODEL], "gateway": {"http_port": 70000}}, "http_port"),
        ({"models": [MODEL], "extra": 1}, "extra"),
    ],
)
def test_errors_name_the_key(data: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        ClusterConfig.model_validate(data)


@pytest.mark.parametrize("model", [ModelConfig, GatewayConfig])
def test_every_option_is_described(model: type[ModelConfig] | type[GatewayConfig]) -> None:
    undescribed = {name for name, field in model.model_fields.items() if not field.description}
    assert undescribed <= {"engine", "speculation", "http_port", "grpc_port", "num_cpus"}
