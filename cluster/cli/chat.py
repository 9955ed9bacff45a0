"""`s2d chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import Future
from threading import Thread
from typing import Annotated, Any

import typer
from rich.markup import escape

from cluster.cli.common import (
    DEFAULT_ADDRESS,
    NO_RETRY,
    Address,
    ApiKey,
    Model,
    choose_model,
    err,
    explain,
    out,
    print_error,
    run,
    unreachable,
)
from cluster.cli.generate import show
from cluster.client import S2DClient, S2DError

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) leaves."


def chat(
    model: Model = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    color: Annotated[bool, typer.Option("--color", help="Mark accepted draft tokens.")] = False,
) -> None:
    """Talk to a model; the conversation is kept."""
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "logprobs": 0 if color else None,
    }

    async def work() -> None:
        async with S2DClient(address, api_key=api_key, retry=NO_RETRY) as client:
            name = await choose_model(client, model)
            err.print(f"[dim]{escape(name)}. {HELP}[/]")
            first = [("system", system)] if system is not None else []
            history = list(first)
            refused = answered = False
            while True:
                try:
                    line = (await read_line("[bold]> [/]")).strip()
                except EOFError:
                    if refused and not answered:
                        raise typer.Exit(1) from None
                    return
                if line == "/quit":
                    return
                if line == "/reset":
                    history = list(first)
                elif line:
                    question = [*history, ("user", line)]
                    try:
                        answer = await show(client.chat(name, question, **sampling), color)
                    except S2DError as error:
                        if unreachable(error):
                            raise
                        print_error(explain(error, address))  # the conversation goes on without this line
                        refused = True
                        continue
                    answered = True
                    history = [*question, ("assistant", answer)]

    run(work(), address)


async def read_line(prompt: str) -> str:
    """A line from stdin. Raises EOFError. Cancelled, it leaves a thread that goes on waiting for the line.

    Not in the loop's executor: asyncio.run, and the interpreter, wait for the threads of that at the end.
    """
    line: Future[str] = Future()
    line.set_running_or_notify_cancel()

    def read(_held: object) -> None:
        try:
            line.set_result(out.input(prompt))
        except Exception as error:
            line.set_exception(error)

    # The thread holds stdin: the interpreter aborts where it has to close a pipe that is being read.
    Thread(target=read, args=(sys.stdin,), name="s2d-input", daemon=True).start()
    return await asyncio.wrap_future(line)
