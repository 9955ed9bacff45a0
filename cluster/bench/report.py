"""A run as files: JSON with every raw record, Markdown tables, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench import load_summary, spec_bench
from cluster.bench.config import LoadSettings, ProfileSettings, SettingsModel, SpecSettings
from cluster.bench.engines.registry import plain_of
from cluster.bench.load import Block
from cluster.bench.paired import MIN_PAIRS
from cluster.bench.plot import plot_load, plot_profile, plot_speedups
from cluster.bench.profile import ProfileRow
from cluster.bench.records import Record
from cluster.bench.tables import load_plain_tables, load_tables, plain_tables, profile_tables, spec_tables
from cluster.gateway.sse import to_jsonable
from cluster.reporting.table import Table

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


def markdown(title: str, document: Mapping[str, Any], tables: Sequence[Table]) -> str:
    machine = document["environment"]
    settings = {k: v for k, v in document["settings"].items() if v is not None}
    lines = [
        f"# {title}",
        "",
        *(f"- {key}: {_plain(value)}" for key, value in machine.items()),
        "",
        f"Settings: `{json.dumps(settings)}`",
        "",
        f"A comparison is resolved with at least {MIN_PAIRS} pairs and a 95 % interval that excludes the "
        "threshold. Definitions: docs/benchmarking.md.",
        "",
        *(table.markdown() for table in tables),
    ]
    if document["engines"]:
        lines += ["## Engines", ""]
        lines += [f"- {name}: `{json.dumps(text)}`" for name, text in document["engines"].items()]
    if document.get("interrupted"):
        lines.insert(1, f"\n**Incomplete:** {document['interrupted']}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def document_of(
    kind: str,
    settings: SettingsModel,
    machine: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    interrupted: str | None,
) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "kind": kind,
        "environment": dict(machine),
        "settings": settings.model_dump(mode="json"),
        "engines": {name: to_jsonable(text) for name, text in engines.items()},
        "interrupted": interrupted,
    }


def write_spec(
    out: Path,
    settings: SpecSettings,
    records: Sequence[Record],
    machine: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    interrupted: str | None = None,
) -> list[Table]:
    """spec.json, spec.md and spec.png in `out`; returns the tables."""
    baseline, threshold = settings.baseline_name, settings.threshold
    rows = spec_bench.summarize(records, baseline, threshold)
    plain = spec_bench.against_plain(records, plain_of, threshold)
    document = document_of("spec", settings, machine, engines, interrupted) | {
        "summary": [to_jsonable(row) for row in rows],
        "against_plain": [to_jsonable(row) for row in plain],
        "matrix": to_jsonable(spec_bench.matrix(records, threshold)),
        "records": [to_jsonable(r.to_json()) for r in records],
    }
    tables = [*spec_tables(rows, baseline), *plain_tables(plain)]
    publish(
        out, "spec", "Spec-Bench protocol", document, tables, lambda path: plot_speedups(rows, baseline, path)
    )
    return tables


def write_load(
    out: Path,
    settings: LoadSettings,
    blocks: Sequence[Block],
    machine: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    interrupted: str | None = None,
) -> list[Table]:
    """load.json, load.md and load.png in `out`; returns the tables."""
    rows = load_summary.summarize(blocks, settings)
    plain = load_summary.against_plain(blocks, plain_of, settings.threshold)
    document = document_of("load", settings, machine, engines, interrupted) | {
        "summary": [to_jsonable(row) for row in rows],
        "against_plain": [to_jsonable(row) for row in plain],
        "blocks": [
            {
                "engine": b.engine,
                "pair": b.pair,
                "point": to_jsonable(b.point),
                "duration_s": b.duration_s,
                "records": [to_jsonable(r.to_json()) for r in b.records],
            }
            for b in blocks
        ],
    }
    tables = [*load_tables(rows, settings.baseline_name), *load_plain_tables(plain)]
    publish(out, "load", "Serving load", document, tables, lambda path: plot_load(rows, path))
    return tables


def write_profile(
    out: Path,
    settings: ProfileSettings,
    rows: Sequence[ProfileRow],
    machine: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    interrupted: str | None = None,
) -> list[Table]:
    """profile.json, profile.md and profile.png in `out`; returns the tables."""
    document = document_of("profile", settings, machine, engines, interrupted) | {
        "rows": [to_jsonable(row) for row in rows]
    }
    tables = profile_tables(rows)
    publish(out, "profile", "Where the time goes", document, tables, lambda path: plot_profile(rows, path))
    return tables


def publish(
    out: Path,
    name: str,
    title: str,
    document: Mapping[str, Any],
    tables: Sequence[Table],
    draw: Callable[[Path], None],
) -> None:
    """NAME.json, NAME.md and, by `draw`, NAME.png. Tables do not need matplotlib, so a run is not lost for
    want of it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(title, document, tables), encoding="utf-8")
    try:
        draw(out / f"{name}.png")
    except ImportError as error:
        logger.warning("no picture: %s; `pip install matplotlib` and run again", error)
