"""A comparison as files: JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.reporting.table import Table
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import RunResult

FORMAT_VERSION = 1


def tables(results: Sequence[RunResult]) -> list[Table]:
    """Speeds as ratios to the first result, and the checks."""
    plain = results[0]
    sizes = list(plain.speed_by_model)
    speeds = Table(
        f"Speed over {plain.policy}",
        ("policy", "all targets", *sizes),
        tuple(
            (
                r.policy,
                f"{r.speed / plain.speed:.3f}",
                *(f"{r.speed_by_model[s] / plain.speed_by_model[s]:.2f}" if s in r.speed_by_model else "-"
                  for s in sizes),
            )
            for r in results
        ),
    )  # fmt: skip
    checks = Table(
        "Checks",
        (
            "policy",
            "tokens/s",
            "pool busy",
            "highest plan",
            "out of order",
            "changes a target-minute",
            "drafts foreseen",
        ),
        tuple(
            (
                r.policy,
                f"{r.tokens_per_s:.0f}",
                f"{100 * r.utilisation:.0f} %",
                f"{r.highest_plan:.2f}" if r.highest_plan else "-",
                str(r.unsorted),
                f"{r.changes_per_target_minute:.2f}",
                f"{r.foreseen:.2f} + {r.partly:.2f}" if r.foreseen else "-",
            )
            for r in results
        ),
    )
    return [speeds, checks]


def write(
    out: Path, profile: CostProfile, scenario: Scenario, results: Sequence[RunResult], seconds: float
) -> list[Table]:
    """simulate.json, simulate.md and simulate.png in `out`; returns the tables. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    shown = tables(results)
    document = {
        "format": FORMAT_VERSION,
        "scenario": scenario.model_dump(mode="json"),
        "profile": profile.model_dump(mode="json"),
        "results": [asdict(r) for r in results],
        "seconds": round(seconds, 1),
    }
    (out / "simulate.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    lines = [
        "# Simulation",
        "",
        f"Scenario: `{scenario.model_dump_json()}`; {results[0].sessions} sessions; {seconds:.0f} s.",
        "",
        f"Profile: {profile.about}",
        "",
        "Speed: tokens a second of a target's busy time, geometric mean over targets, after the warm-up.",
        "",
        *(table.markdown() for table in shown),
    ]
    (out / "simulate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(results, out / "simulate.png")
    return shown


def _plot(results: Sequence[RunResult], path: Path) -> None:
    from cluster.reporting.plot import COLORS, pyplot_module, save

    plt = pyplot_module()
    plain = results[0]
    sizes = list(plain.speed_by_model)
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.45 * len(results)))
    height = 0.8 / max(1, len(sizes))
    for index, size in enumerate(sizes):
        places = [place + (index - (len(sizes) - 1) / 2) * height for place in range(len(results))]
        ratios = [r.speed_by_model.get(size, 0.0) / plain.speed_by_model[size] for r in results]
        axis.barh(places, ratios, height * 0.95, color=COLORS[index % len(COLORS)], label=size)
    for place, result in enumerate(results):
        axis.plot([result.speed / plain.speed] * 2, [place - 0.45, place + 0.45], color="black")
    axis.set_yticks(range(len(results)), [r.policy for r in results])
    axis.invert_yaxis()
    axis.set_xlim(right=1.25 * axis.get_xlim()[1])
    axis.axvline(1.0, color="black", linewidth=0.6)
    axis.set_xlabel(f"speed over {plain.policy} (line: all targets)")
    axis.legend(fontsize=8, loc="upper right")
    save(plt, figure, path)
