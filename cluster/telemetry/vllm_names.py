"""Speculation counters under vLLM's names, for tools that look for these (`vllm bench serve`, AIPerf).

The numbers are those of `s2d_spec_decode_*`, of all drafters together, but read from the engines now: such
tools compare two readings, one before and one after their requests. A round whose tree several drafters made
is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_COUNTERS = (
    ("rounds", "num_drafts", "Verification rounds with drafts, per request."),
    ("drafted", "num_draft_tokens", "Draft tokens verified."),
    ("accepted", "num_accepted_tokens", "Draft tokens accepted."),
)
_BY_POSITION = ("num_accepted_tokens_per_pos", "Draft tokens accepted, by position.")


def spec_decode_text(models: Iterable[Mapping[str, Any]]) -> str:
    """Prometheus text from the models of GET /state; the label `engine` is the replica. Engines that do not
    answer are left out, those that have not drafted yet are zero."""
    samples: dict[str, list[str]] = {name: [] for name in (*(n for _, n, _ in _COUNTERS), _BY_POSITION[0])}
    for model in models:
        for replica in model["replicas"]:
            if "drafters" not in replica["engine"]:
                continue
            totals = _totals(replica["engine"])
            labels = f'model_name="{_escaped(model["name"])}",engine="{_escaped(replica["replica_id"])}"'
            for key, name, _ in _COUNTERS:
                samples[name].append(f"{_full(name)}{{{labels}}} {totals[key]}")
            for position, accepted in enumerate(totals["positions"]):
                text = f'{_full(_BY_POSITION[0])}{{{labels},position="{position}"}} {accepted}'
                samples[_BY_POSITION[0]].append(text)
    lines: list[str] = []
    for name, text in (*((n, t) for _, n, t in _COUNTERS), _BY_POSITION):
        if samples[name]:
            lines += [f"# HELP {_full(name)} {text}", f"# TYPE {_full(name)} counter", *samples[name]]
    return "\n".join(lines) + "\n" if lines else ""


def _full(name: str) -> str:
    return f"vllm:spec_decode_{name}_total"


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _totals(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Of all drafters together."""
    rounds = int(stats.get("drafted_rounds") or 0)
    totals: dict[str, Any] = {"rounds": rounds, "drafted": 0, "accepted": 0, "positions": []}
    for drafter in (stats.get("drafters") or {}).values():
        for key in ("drafted", "accepted"):
            totals[key] += int(drafter.get(key) or 0)
        for position, accepted in enumerate(drafter.get("accepted_per_position") or ()):
            if position == len(totals["positions"]):
                totals["positions"].append(0)
            totals["positions"][position] += accepted
    return totals
