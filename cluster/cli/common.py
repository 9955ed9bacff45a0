"""What the client commands share: options, errors in one line, the model to talk to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import grpc
import typer
from rich.console import Console
from rich.text import Text

from cluster.client import RetryPolicy, S2DClient, S2DError

T = TypeVar("T")
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="S2D_GRPC_ADDRESS", help="gRPC address, host:port.")
]
HttpUrl = Annotated[str, typer.Option("--url", "-u", envvar="S2D_HTTP_URL", help="HTTP address.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="S2D_API_KEY", help="The server's key.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Served model; the first one by default.")]
DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_URL = "http://127.0.0.1:8000"
NO_RETRY = RetryPolicy(attempts=1)


def print_error(message: str) -> None:
    """One line on stderr, as it is: brackets are no markup."""
    err.print("[bold red]error:[/]", Text(message), soft_wrap=True)


def fail(message: str) -> typer.Exit:
    """Print the error. Raise what is returned."""
    print_error(message)
    return typer.Exit(1)


def say(text: object) -> None:
    """Print what others wrote to stderr, as it is: brackets are no markup."""
    err.print(text, markup=False)


def unreachable(error: S2DError) -> bool:
    """Whether no server answered at all."""
    return error.code is grpc.StatusCode.UNAVAILABLE and "connect" in error.message.lower()


def explain(error: S2DError, address: str) -> str:
    if unreachable(error):
        return f"no server at {address}; start one with `s2d serve`"
    return error.message or error.code.name


def run(work: Coroutine[Any, Any, T], address: str) -> T:
    """Run to completion; Ctrl-C exits with 130, a failed call with 1 and one line."""
    try:
        return asyncio.run(work)
    except S2DError as error:
        raise fail(explain(error, address)) from error
    except (TypeError, ValueError) as error:
        raise fail(str(error)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


async def choose_model(client: S2DClient, wanted: str | None) -> str:
    if wanted is not None:
        return wanted
    served = await client.list_models()
    if not served:
        raise S2DError(grpc.StatusCode.NOT_FOUND, "the server has no models")
    return str(served[0].id)
