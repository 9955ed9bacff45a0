"""`s2d router`: who drafts for whom and why; pins by an operator."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.admin import change
from cluster.cli.common import DEFAULT_URL, ApiKey, HttpUrl, out
from cluster.cli.status import fetch

router = typer.Typer(help="Who drafts for whom and why; pins by an operator.", invoke_without_command=True)
Target = Annotated[str, typer.Argument(help="A target's id, or a model's name for all its targets.")]


@router.callback()
def show(
    context: typer.Context,
    url: HttpUrl = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Assignments with their reasons, and the draft workers."""
    if context.invoked_subcommand is not None:
        return
    state = fetch(url, "/admin/router", api_key)
    if as_json:
        out.print_json(data=state)
        return
    if not state["running"]:
        out.print(state["why"])
        return
    for table in tables(state):
        out.print(table)
    if state["error"]:
        out.print(f"[red]the last step failed:[/] {escape(state['error'])}")


def tables(state: dict[str, Any]) -> list[Table]:
    return [target_table(state["targets"]), worker_table(state["workers"]), *pin_tables(state["pins"])]


def target_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "target", "worker", "exit", "cap", "gain", "load", "reason", title="Assignments", title_justify="left"
    )
    for row in rows:
        table.add_row(
            escape(row["target"]),
            escape(row["worker"] or "-"),
            ", ".join(map(str, row["exits"])) or "-",
            str(row["cap"]),
            f"{row['gain']:.2f}",
            f"{100 * row['load']:.1f} %",
            escape(row["reason"]),
        )
    return table


def worker_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "worker", "exits", "sessions", "busy", "planned", title="Draft workers", title_justify="left"
    )
    for row in rows:
        table.add_row(
            escape(row["worker"]),
            ", ".join(row["step_s_by_exit"]) or "-",
            f"{row['open_sessions']} of {row['max_sessions']}",
            f"{100 * row['utilisation']:.0f} %",
            f"{100 * row['planned_load']:.0f} %",
        )
    return table


def pin_tables(pins: dict[str, dict[str, Any]]) -> list[Table]:
    table = Table("pinned", "worker", "exits", "cap", title="Pins", title_justify="left")
    for name, pin in pins.items():
        exits = "-" if pin["exits"] is None else ", ".join(map(str, pin["exits"]))
        cap = "-" if pin["cap"] is None else str(pin["cap"])
        table.add_row(escape(name), escape(pin["worker"] or "-"), exits, cap)
    return [table] if pins else []


@router.command()
def pin(
    target: Target,
    worker: Annotated[str | None, typer.Option("--worker", "-w", help="Draft worker.")] = None,
    exits: Annotated[
        list[int] | None, typer.Option("--exit", "-e", help="Allowed exit depth; may be repeated.")
    ] = None,
    cap: Annotated[int | None, typer.Option("--cap", help="Longest draft, 0 for none.")] = None,
    url: HttpUrl = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Fix worker, exits or longest draft of a target; what is left out stays with the router."""
    body = {"worker": worker, "exits": exits or None, "cap": cap}
    change("PUT", url, pin_path(target), api_key, {k: v for k, v in body.items() if v is not None})
    out.print(f"pinned {escape(target)}")


@router.command()
def unpin(target: Target, url: HttpUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Give a target back to the router."""
    change("DELETE", url, pin_path(target), api_key, None)
    out.print(f"unpinned {escape(target)}")


def pin_path(target: str) -> str:
    return f"/admin/router/pins/{quote(target, safe='')}"
