"""Dashboard and alerts of deploy/ read metrics and labels that the code, or Ray Serve, exports."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private import deployment_state

from cluster.telemetry import metrics, router_metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
SERVE_LABELS = {"application", "deployment"}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Labels by name, as Prometheus sees them through Ray's exporter."""
    found: dict[str, set[str]] = {}

    def recorder(kind: str) -> type:
        class Recorder:
            def __init__(self, name: str, *, tag_keys: tuple[str, ...] = (), **_: Any) -> None:
                for suffix in SUFFIXES[kind]:
                    found[f"ray_{name}{suffix}"] = {*tag_keys, *(("le",) if suffix == "_bucket" else ())}

            def set_default_tags(self, tags: dict[str, str]) -> None: ...

        return Recorder

    for module in (metrics, router_metrics):
        for kind in SUFFIXES:
            monkeypatch.setattr(module, kind, recorder(kind), raising=False)
    metrics.TargetMetrics("m")
    metrics.DraftMetrics("w")
    metrics.GatewayMetrics()
    router_metrics.RouterMetrics()
    serve = inspect.getsource(deployment_state)
    for name in ("serve_deployment_status", "serve_deployment_replica_healthy"):
        assert f'"{name}"' in serve
        found[f"ray_{name}"] = SERVE_LABELS
    return found


def dashboard() -> dict[str, Any]:
    loaded = json.loads((DEPLOY / "grafana" / "s2d-serve.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text(encoding="utf-8"))["groups"]
    found = group["rules"]
    assert isinstance(found, list)
    return found


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [*panels, *(rule["expr"] for rule in rules())]


def problems(expression: str, exported: dict[str, set[str]]) -> list[str]:
    """Metrics that nothing exports, and labels that the metrics of the expression have not."""
    names = set(re.findall(r"\bray_\w+", expression))
    if not names:
        return ["no metric"]
    labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression)) - {"__name__"}
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        labels |= {label.strip() for label in grouped.split(",")}
    known = set().union(*(exported.get(name, set()) for name in names))
    return sorted({*(names - exported.keys()), *(labels - known)})


def test_dashboard_and_alerts_read_what_is_exported(exported: dict[str, set[str]]) -> None:
    found = expressions()
    assert len(found) > 30
    assert {e: p for e in found if (p := problems(e, exported))} == {}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("rate(ray_s2d_prompt_tokens[5m])", ["ray_s2d_prompt_tokens"]),  # counters end in _total
        ("ray_s2d_no_such_metric", ["ray_s2d_no_such_metric"]),
        ("sum by (engine) (ray_s2d_num_requests_running)", ["engine"]),
        ('ray_s2d_requests_failed_total{why="timeout"}', ["why"]),
        ("rate(s2d_prompt_tokens_total[5m])", ["no metric"]),
    ],
)
def test_the_check_catches(expression: str, expected: list[str], exported: dict[str, set[str]]) -> None:
    assert problems(expression, exported) == expected


def test_the_dashboard_shows_what_an_operator_asks(exported: dict[str, set[str]]) -> None:
    """Every metric that says how the service does, but for single positions of a histogram."""
    shown = set(re.findall(r"\bray_\w+", " ".join(expressions())))
    wanted = {name for name in exported if not name.endswith(("_count", "_sum"))}
    assert wanted - shown == {"ray_s2d_spec_decode_num_drafts_total"}  # tokens say more


def test_panels_are_drawn_apart() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_alerts_say_how_bad_and_what() -> None:
    named = rules()
    assert len({rule["alert"] for rule in named}) == len(named)
    for rule in named:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["annotations"]["summary"]
