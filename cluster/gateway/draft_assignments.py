"""Who drafts for a model, in short, as `/v1/models` shows it; `/admin/router` says more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.named_actor import ActorUnavailableError

if TYPE_CHECKING:
    from cluster.gateway.router_api import RouterControl

TIMEOUT_S = 0.5
"""Nobody waits longer to learn which models there are."""


async def draft_assignments(router: RouterControl | None) -> Mapping[str, list[dict[str, Any]]] | None:
    """What the router decided, by model, for each of its target workers: `worker` (null: none), `exits` in
    layers, `cap` in tokens, and `alive`, whether that worker reports. None without a router that answers."""
    if router is None:
        return None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            view = await router.view()
    except (ActorUnavailableError, TimeoutError):
        return None
    alive = {row["worker"] for row in view["workers"]}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in view["targets"]:
        entry = {name: row[name] for name in ("target", "worker", "exits", "cap")}
        found.setdefault(row["model"], []).append(entry | {"alive": row["worker"] in alive})
    return found
