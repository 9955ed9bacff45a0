"""`s2d`: serve models, talk to them, look at them."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.bench import bench
from cluster.cli.chat import chat
from cluster.cli.draft import draft
from cluster.cli.generate import generate
from cluster.cli.models import models
from cluster.cli.router import router
from cluster.cli.serve import serve
from cluster.cli.simulate import simulate
from cluster.cli.status import status
from cluster.version import VERSION

app = typer.Typer(
    name="s2d",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2d-serve {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve many language models at once with one shared family of nested draft models."""


app.command()(serve)
app.command()(generate)
app.command()(chat)
app.command()(status)
app.command()(simulate)
app.add_typer(bench, name="bench")
app.add_typer(draft, name="draft")
app.add_typer(models, name="models")
app.add_typer(router, name="router")

if __name__ == "__main__":
    app()
