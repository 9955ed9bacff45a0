"""An evaluation for people: JSON, a Markdown table and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.models.draft_card import DraftCard
from actors.training.curves import COLORS, pyplot_or_none, save_figure
from actors.training.evaluate import ExitReport


def markdown(reports: Sequence[ExitReport]) -> str:
    """A row an exit; tokens a round and speed-up by chain length below."""
    lines = ["| exit | agreement | draft token, ms | acceptance by place |", "|---|---|---|---|"]
    for r in reports:
        places = " ".join("-" if a is None else f"{a:.2f}" for a in r.acceptance)
        lines.append(f"| {r.depth} | {100 * r.agreement:.1f} % | {1e3 * r.draft_s:.3f} | {places} |")
    lengths = range(1, len(reports[0].tokens_per_round) + 1)
    head = "| exit | " + " | ".join(f"k={k}" for k in lengths) + " |"
    rule = "|---|" + "---|" * len(lengths)
    lines += ["", "Tokens a round with chains of k:", "", head, rule]
    lines += [f"| {r.depth} | " + " | ".join(f"{v:.2f}" for v in r.tokens_per_round) + " |" for r in reports]
    if any(v is not None for r in reports for v in r.speedup):
        lines += ["", "Predicted speed over plain decoding:", "", head, rule]
        for r in reports:
            cells = " | ".join("-" if v is None else f"{v:.2f}" for v in r.speedup)
            lines.append(f"| {r.depth} | {cells} |")
    return "\n".join(lines) + "\n"


def write_report(
    reports: Sequence[ExitReport],
    out: Path,
    *,
    card: DraftCard | None,
    target_s: Sequence[float] | None,
    settings: dict[str, Any],
) -> None:
    """eval.json, eval.md and, with matplotlib, eval.png."""
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "settings": settings,
        "card": None if card is None else card.model_dump(mode="json"),
        "target_s": None if target_s is None else list(target_s),
        "exits": [asdict(r) for r in reports],
    }
    (out / "eval.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (out / "eval.md").write_text(markdown(reports), encoding="utf-8")
    plot_report(reports, out / "eval.png")


def plot_report(reports: Sequence[ExitReport], path: Path) -> bool:
    """Acceptance by place, tokens a round and predicted speed by chain length. False without matplotlib."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    series: tuple[tuple[str, str, Callable[[ExitReport], Sequence[float | None]]], ...] = (
        ("acceptance, given those before", "place in the chain", lambda r: r.acceptance),
        ("tokens a round", "chain length", lambda r: r.tokens_per_round),
        ("predicted speed over plain decoding", "chain length", lambda r: r.speedup),
    )
    for axis, (title, label, values) in zip(axes, series, strict=True):
        for index, report in enumerate(reports):
            points = [(x, v) for x, v in enumerate(values(report), 1) if v is not None]
            axis.plot(
                [x for x, _ in points],
                [v for _, v in points],
                "o-",
                color=COLORS[index % len(COLORS)],
                label=f"exit {report.depth}",
            )
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[2].axhline(1.0, color="black", linewidth=0.8)
    save_figure(pyplot, figure, path)
    return True
