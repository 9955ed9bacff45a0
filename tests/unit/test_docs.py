"""The documentation names what exists: files, parameters, metrics, endpoints, settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema, TracingConfig

from actors.sampling.noise import NOISE_VERSION
from cluster.config import ClusterConfig
from cluster.gateway.errors import REFUSED_FIELDS
from cluster.gateway.failures import FailureReason
from cluster.gateway.openai_schema import ChatBody, CompletionBody, SpeculationBody

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_the_text_exist(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|actors|cluster|deploy|examples)/[\w./-]+)`", content)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_parameter_is_documented() -> None:
    api = text("docs/api.md")
    (without_effect,) = re.findall(r"Accepted and of no effect: ([^.]*)\.", api)
    rows = [*re.findall(r"^\| (.*?) \|", api, re.MULTILINE), without_effect]
    for schema in (ChatBody, CompletionBody, SpeculationBody):
        for field in schema.model_fields:
            if field != "modalities":  # accepted for its only value, text
                # Alone, with a field of its own (`a.b`), or with its only value (`a: b`).
                assert any(re.search(rf"`{field}(?:[.:][^`]*)?`", row) for row in rows), field
    for field in REFUSED_FIELDS:
        assert f"`{field}`" in api, field


def test_finish_reasons_are_those_that_can_arrive() -> None:
    """What ends otherwise is resumed, or fails: its chunk has an error, and no client sees its reason."""
    (reasons,) = re.findall(r"^`finish_reason` is (.*)$", text("docs/api.md"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", reasons) == ["stop", "length"]
    proto = text("protos/s2d/v1/generation.proto")
    (reasons,) = re.findall(r"// Empty until the choice ends: ([^.]*)\.", proto)
    assert re.findall(r'"(\w+)"', reasons) == ["stop", "length"]


def test_every_endpoint_is_documented() -> None:
    api = text("docs/api.md")
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "cluster/gateway").glob("*.py"))
    paths = re.findall(r'@(?:router|api)\.(get|post|put|delete)\("([^"]+)"\)', sources)
    assert len(paths) > 14
    for method, path in paths:
        assert f"`{method.upper()} {re.sub(r'{.*}', '{id}', path)}`" in api


def test_every_metric_is_documented() -> None:
    sources = text("cluster/telemetry/metrics.py") + text("cluster/telemetry/router_metrics.py")
    names = set(re.findall(r'"(s2d_\w+)"', sources))
    documented = set(re.findall(r"`(s2d_\w+)`", text("docs/operations.md")))
    assert names
    assert names == documented


def test_reasons_of_failures_are_documented() -> None:
    (row,) = re.findall(r"^\| `s2d_requests_failed` \|(.*)$", text("docs/operations.md"), re.MULTILINE)
    for reason in get_args(FailureReason):
        assert f"`{reason}`" in row


def test_defaults_in_the_text_are_those_of_the_code() -> None:
    config = ClusterConfig.default()
    speculation = config.models[0].speculation
    operations = text("docs/operations.md")
    assert f"(`gateway.request_timeout_s`, {config.gateway.request_timeout_s:g})" in operations
    assert f"(`speculation.draft_timeout_ms`, {speculation.draft_timeout_ms:g})" in operations
    first, last = config.draft_pool.port_range
    assert f"| {first}-{last} |" in operations
    assert f"the model's setting ({speculation.max_draft_tokens})" in text("README.md")
    assert f"Version {NOISE_VERSION} " in text("docs/exactness.md")


def test_the_tracing_configuration_is_serves() -> None:
    (block,) = re.findall(r"```yaml\n(tracing_config:.*?)```", text("docs/operations.md"), re.DOTALL)
    config = yaml.safe_load(block)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert TracingConfig.model_validate(config["tracing_config"]).enabled


def test_the_configuration_in_the_readme_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", text("README.md"), re.DOTALL)
    ClusterConfig.model_validate(yaml.safe_load(block))
