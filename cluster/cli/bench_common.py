"""What the commands of `s2d bench` share: settings checked, errors in one line, what stopping means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import typer

from cluster.cli.common import err, fail

R = TypeVar("R")


def checked(kind: Any, **given: Any) -> Any:
    """Settings of that kind; None leaves a default. What is wrong ends the program with one line."""
    from pydantic import ValidationError

    try:
        return kind(**{k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise fail(f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}") from error


def run_measurement(measure: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """To its end. Ctrl-C exits with 130, SIGTERM with 143, what can be expected to go wrong with 1."""
    from cluster.bench.session import EXPECTED_ERRORS, run_to_end

    try:
        return run_to_end(measure())
    except EXPECTED_ERRORS as error:
        raise fail(str(error) or type(error).__name__) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    except asyncio.CancelledError as error:  # SIGTERM
        err.print("stopped")
        raise typer.Exit(143) from error
