"""The configuration file: defaults, round trips, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig, DraftPoolConfig, GatewayConfig, ModelConfig


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


def test_relative_paths_are_found_beside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    (folder / "weights").mkdir(parents=True)
    for name in ("model.gguf", "draft.safetensors", "cert.pem", "key.pem"):
        (folder / name).touch()
    (folder / "link.gguf").symlink_to(folder / "model.gguf")
    file = folder / "s2d.yaml"
    file.write_text(
        """
        models:
        - {name: a, source: weights, adapter: weights}
        - {name: b, source: link.gguf, adapter: org/adapter}
        - {name: c, source: org/model}
        - {name: d, source: "package:model.gguf"}
        - {name: e, source: /whole/path}
        draft_pool:
          drafters: [nested]
          nested: {source: model.gguf, artifact: draft.safetensors}
          tls: {cert: cert.pem, key: key.pem, ca: /etc/ca.pem}
        """,
        encoding="utf-8",
    )
    config = ClusterConfig.from_yaml(file)
    assert [m.source for m in config.models] == [
        str(folder / "weights"),
        str(folder / "link.gguf"),  # not what it leads to, which may have another suffix
        "org/model",
        "package:model.gguf",
        "/whole/path",
    ]
    assert [m.adapter for m in config.models[:2]] == [str(folder / "weights"), "org/adapter"]
    nested, tls = config.draft_pool.nested, config.draft_pool.tls
    assert nested is not None
    assert tls is not None
    assert (nested.source, nested.artifact) == (str(folder / "model.gguf"), str(folder / "draft.safetensors"))
    assert (tls.cert, tls.key, tls.ca) == (folder / "cert.pem", folder / "key.pem", Path("/etc/ca.pem"))


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda f: f.name
)
def test_examples_are_valid(file: Path) -> None:
    assert ClusterConfig.from_yaml(file).models


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


@pytest.mark.parametrize(("section", "name"), [("gateway", "api_key"), ("draft_pool", "token")])
def test_secrets_are_what_can_be_sent(section: str, name: str) -> None:
    def configured(secret: str | None) -> object:
        config = ClusterConfig.model_validate({"models": [MODEL], section: {name: secret}})
        return getattr(getattr(config, section), name)

    assert configured(None) is None
    assert configured(" secret word\n") == "secret word", "as read from a file"
    for nobody_can_send in ("", " \n", "a\nb", "a\x00", "a\x7f"):
        with pytest.raises(ValidationError, match=rf"{section}\.{name}"):
            configured(nobody_can_send)


def test_a_token_fits_into_grpcs_metadata() -> None:
    with pytest.raises(ValidationError, match="ASCII"):
        DraftPoolConfig(token="käse")


@pytest.mark.parametrize("model", [ModelConfig, GatewayConfig])
def test_every_option_is_described(model: type[ModelConfig] | type[GatewayConfig]) -> None:
    undescribed = {name for name, field in model.model_fields.items() if not field.description}
    assert undescribed <= {"engine", "speculation", "http_port", "grpc_port", "num_cpus"}
