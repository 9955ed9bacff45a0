"""`s2d status`: what the server says of itself."""

from __future__ import annotations

from typing import Any

import httpx
from rich.markup import escape
from rich.table import Table

from cluster.cli.common import DEFAULT_URL, ApiKey, HttpUrl, fail, out

TIMEOUT_S = 5.0
ENGINE_COLUMNS = (
    "running",
    "waiting",
    "kv_blocks_used",
    "kv_blocks_free",
    "kv_blocks_cached",
    "tokens_emitted",
)


def fetch(url: str, path: str, api_key: str | None) -> dict[str, Any]:
    """GET a JSON object; ends the program with one line when that fails."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(url.rstrip("/") + path, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise fail(f"no server at {url}; start one with `s2d serve` ({error})") from error
    try:
        body = response.json()
    except ValueError as error:
        raise fail(f"{url}{path} answered {response.status_code}, not JSON") from error
    if response.status_code != 200 or not isinstance(body, dict):
        raise fail(str(body.get("error", {}).get("message", response.status_code)))
    return body


def status(url: HttpUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Requests, KV cache and speculation of every worker, live."""
    state = fetch(url, "/state", api_key)
    for table in tables(state):
        out.print(table)


def tables(state: dict[str, Any]) -> list[Table]:
    models = state["models"]
    return [target_table(models), drafter_table(models), draft_table(state["draft_workers"])]


def target_table(served: list[dict[str, Any]]) -> Table:
    table = Table(
        "model",
        "replica",
        "ready",
        "running",
        "waiting",
        "KV used",
        "free",
        "cached",
        "tokens",
        title="Target workers",
        title_justify="left",
    )
    for model in served:
        if not model["replicas"]:
            table.add_row(escape(model["name"]), escape(model.get("error") or "-"), yes(model["ready"]))
        for replica in model["replicas"]:
            engine = replica["engine"]
            table.add_row(
                escape(model["name"]),
                escape(replica["replica_id"]),
                yes(model["ready"]),
                *(str(engine.get(key, "-")) for key in ENGINE_COLUMNS),
            )
    return table


def drafter_table(served: list[dict[str, Any]]) -> Table:
    table = Table(
        "model", "drafter", "rounds", "drafted", "accepted", "rate", title="Speculation", title_justify="left"
    )
    for model in served:
        for replica in model["replicas"]:
            for name, stats in (replica["engine"].get("drafters") or {}).items():
                rate = stats["accepted"] / stats["drafted"] if stats["drafted"] else 0.0
                counts = (stats["rounds"], stats["drafted"], stats["accepted"])
                table.add_row(escape(model["name"]), name, *map(str, counts), f"{rate:.2f}")
    return table


def draft_table(workers: list[dict[str, Any]]) -> Table:
    table = Table(
        "worker",
        "address",
        "sessions",
        "streams",
        "queued",
        "KV used",
        "drafters",
        "foreseen",
        title="Draft workers",
        title_justify="left",
    )
    for worker in workers:
        if worker["error"] is not None:
            table.add_row(*map(escape, (worker["id"], worker["address"], worker["error"])))
            continue
        keys = ("sessions", "streams", "queued_rounds", "kv_blocks_used")
        counts = [str(worker[key]) for key in keys]
        drafters = ", ".join(worker["drafters"])
        table.add_row(escape(worker["id"]), escape(worker["address"]), *counts, drafters, foreseen(worker))
    return table


def foreseen(worker: dict[str, Any]) -> str:
    """Share of the drafts that were prepared while the target verified, whole and in part."""
    whole, partly, missed = (worker[f"ahead_{kind}"] for kind in ("foreseen", "partly", "missed"))
    total = whole + partly + missed
    return f"{whole / total:.2f} + {partly / total:.2f}" if total else "-"


def yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"
