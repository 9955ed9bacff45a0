"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme."""


def pyplot_or_none() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_curves(history: Sequence[dict[str, Any]], exits: Sequence[int], path: Path) -> bool:
    """Loss by exit (every step, faint, and smoothed) and held-out agreement, as PNG. False without
    matplotlib."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return False
    figure, (losses, agreement) = pyplot.subplots(1, 2, figsize=(11, 4))
    steps = [r for r in history if "exits" in r]
    measured = [r for r in history if "heldout" in r]
    for index, depth in enumerate(exits):
        color = COLORS[index % len(COLORS)]
        xs, ys = [r["step"] for r in steps], [r["exits"][index] for r in steps]
        losses.plot(xs, ys, color=color, alpha=0.2, linewidth=0.7)
        losses.plot(xs, smooth(ys), color=color, label=f"exit {depth}")
        values = [r["heldout"]["teacher_agreement"][index] for r in measured]
        agreement.plot([r["step"] for r in measured], values, "o-", markersize=3, color=color)
    losses.set_ylabel("training loss, nats")
    agreement.set_ylabel("held-out top-1 agreement")
    for axis in (losses, agreement):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if steps:
        losses.legend(fontsize=8)
    save_figure(pyplot, figure, path)
    return True


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out
