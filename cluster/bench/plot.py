"""Pictures of measurements that people compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_ratios(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Bars of the median speed over plain decoding, with the range over pairs; one panel a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        names = [row["arm"] for row in rows]
        medians = [row["ratio_to_plain"] for row in rows]
        below = [row["ratio_to_plain"] - row["ratio_min"] for row in rows]
        above = [row["ratio_max"] - row["ratio_to_plain"] for row in rows]
        axis.bar(range(len(rows)), medians, yerr=[below, above], capsize=4, color="#4477aa")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), names, rotation=30, ha="right")
        axis.set_ylabel("speed over plain decoding")
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
