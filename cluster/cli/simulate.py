"""`s2d simulate`: the router on hundreds of targets, without a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.bench_common import checked
from cluster.cli.common import fail, out


def simulate(
    targets: Annotated[int | None, typer.Option(help="Target workers.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Target workers a model.")] = None,
    draft_workers: Annotated[int | None, typer.Option(help="Workers of the draft pool.")] = None,
    load: Annotated[float | None, typer.Option(help="Mean sessions at once a target, undrafted.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Mean tokens of an answer.")] = None,
    duration: Annotated[float | None, typer.Option(help="Simulated seconds.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Seconds at the start that do not count.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws targets, arrivals and tokens.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Cost profile (JSON), instead of cluster/simulator/profile.json.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for JSON, Markdown and PNG.")] = Path(
        "bench-results/simulate"
    ),
) -> None:
    """The router against no speculation, one draft per model and fixed exits, on the same hardware.

    Runs the router and the controller that serve, on measured or given costs. Equal seeds, equal results.
    Exits with 1 when an assignment of the router is out of order or plans more than a worker has.
    """
    from pydantic import ValidationError
    from rich.progress import Progress
    from rich.table import Table

    from cluster.simulator.command import compare, policies
    from cluster.simulator.profile import DEFAULT_PROFILE, CostProfile
    from cluster.simulator.report import write
    from cluster.simulator.scenario import Scenario
    from cluster.simulator.simulation import RouterPolicy

    scenario = checked(
        Scenario, targets=targets, replicas=replicas, draft_workers=draft_workers, load=load, tokens=tokens,
        duration_s=duration, warmup_s=warmup, seed=seed,
    )  # fmt: skip
    try:
        costs = CostProfile.from_file(profile or DEFAULT_PROFILE)
    except OSError as error:
        raise fail(str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise fail(f"{profile}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    chosen = policies(costs)
    started = time.perf_counter()
    with Progress(console=out, transient=True) as bar:
        tasks = {p.name: bar.add_task(p.name, total=scenario.duration_s) for p in chosen}
        results = compare(costs, scenario, chosen, lambda name, now: bar.update(tasks[name], completed=now))
    try:
        shown = write(folder, costs, scenario, results, time.perf_counter() - started)
    except OSError as error:
        raise fail(str(error)) from error
    for table in shown:
        grid = Table(*table.columns, title=table.title)
        for row in table.rows:
            grid.add_row(*row)
        out.print(grid)
    routed = [r for r, policy in zip(results, chosen, strict=True) if isinstance(policy, RouterPolicy)]
    out.print(
        f"{results[0].sessions} sessions on {scenario.targets} targets; files in {folder}", markup=False
    )
    if any(r.unsorted or r.highest_plan > 1.0 for r in routed):
        raise fail("the router broke the order or a worker's capacity")
