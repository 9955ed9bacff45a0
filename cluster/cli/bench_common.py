"""What the commands of `s2d bench` share: settings checked, errors in one line, what stopping means."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import typer

from cluster.cli.common import err, fail

R = TypeVar("R")


class Terminated(BaseException):
    """For SIGTERM what KeyboardInterrupt is for Ctrl-C."""


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
    from cluster.bench.session import run_to_end

    with _ending():
        return run_to_end(measure())


def run_blocking(measure: Callable[[], R]) -> R:
    """As `run_measurement`, for what computes in this thread, where an event loop would hear of a signal when
    all is done. Main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated("SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with _ending():
            return measure()
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _ending() -> Iterator[None]:
    """Turns how a measurement ends early into a line and an exit code."""
    from cluster.bench.session import EXPECTED_ERRORS

    try:
        yield
    except EXPECTED_ERRORS as error:
        raise fail(str(error) or type(error).__name__) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    except (asyncio.CancelledError, Terminated) as error:
        err.print("stopped")
        raise typer.Exit(143) from error
