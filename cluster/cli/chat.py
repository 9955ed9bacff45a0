"""`s2d chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from cluster.cli.common import DEFAULT_ADDRESS, NO_RETRY, Address, ApiKey, Model, choose_model, err, out, run
from cluster.cli.generate import show
from cluster.client import S2DClient

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
            err.print(f"[dim]{name}. {HELP}[/]")
            first = [("system", system)] if system is not None else []
            history = list(first)
            while True:
                try:
                    line = (await asyncio.to_thread(out.input, "[bold]> [/]")).strip()
                except EOFError:
                    return
                if line == "/quit":
                    return
                if line == "/reset":
                    history = list(first)
                elif line:
                    history.append(("user", line))
                    answer = await show(client.chat(name, history, **sampling), color)
                    history.append(("assistant", answer))

    run(work(), address)
