"""`s2d generate`: stream one answer to the terminal, over gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from cluster.cli.common import DEFAULT_ADDRESS, NO_RETRY, Address, ApiKey, Model, choose_model, err, out, run
from cluster.client import S2DClient, S2DError
from protos.s2d.v1 import generation_pb2 as pb

ACCEPTED_STYLE, BONUS_STYLE = "green", "yellow"


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Model = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text itself: no chat template.")] = False,
    color: Annotated[
        bool, typer.Option("--color", help="Accepted draft tokens green, the target's own tokens yellow.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message (chat only).")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = 256,
    min_tokens: Annotated[int | None, typer.Option(min=0)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    speculation: Annotated[
        bool, typer.Option("--speculation/--no-speculation", help="Whether drafts may be used.")
    ] = True,
    draft_tokens: Annotated[
        int | None, typer.Option(min=0, max=16, help="Fix the draft length instead of adapting it.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Pin one drafter.")] = None,
) -> None:
    """Stream an answer to PROMPT."""
    wishes: dict[str, Any] = {"enabled": speculation}
    if draft_tokens is not None:
        wishes |= {"max_draft_tokens": draft_tokens, "force": True}
    if drafter is not None:
        wishes["drafter"] = drafter
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
        "repetition_penalty": repetition_penalty,
        # Colouring needs each token's own text, which comes with its log-probability.
        "logprobs": 0 if color else None,
    }

    async def work() -> None:
        async with S2DClient(address, api_key=api_key, retry=NO_RETRY) as client:
            name = await choose_model(client, model)
            if raw:
                stream = client.generate(name, prompt, speculation=wishes, **sampling)
            else:
                messages = [("system", system)] if system is not None else []
                stream = client.chat(name, [*messages, ("user", prompt)], speculation=wishes, **sampling)
            await show(stream, color)

    run(work(), address)


def accepted_marks(chunk: pb.GenerateChunk) -> Iterator[bool]:
    """For each token of a chunk, whether it was an accepted draft. Each round lists accepted tokens first."""
    for size, accepted in zip(chunk.tokens_per_round, chunk.accepted_per_round, strict=True):
        for place in range(size):
            yield place < accepted


def colored(chunk: pb.GenerateChunk) -> Text:
    """The chunk's text, each token in its style. What is no token's own text is left plain: characters of
    several tokens, and text that was held back before. A token whose text is not there (an end of sequence, a
    stop string) is not shown."""
    if len(chunk.logprobs) != len(chunk.token_ids):
        return Text(chunk.text)
    text, cursor = Text(), 0
    for position, accepted in zip(chunk.logprobs, accepted_marks(chunk), strict=True):
        token = position.chosen.token
        start = chunk.text.find(token, cursor) if token else -1
        if start < 0:
            continue
        text.append(chunk.text[cursor:start])
        text.append(token, ACCEPTED_STYLE if accepted else BONUS_STYLE)
        cursor = start + len(token)
    return text.append(chunk.text[cursor:])


async def show(stream: AsyncIterator[pb.GenerateChunk], color: bool) -> str:
    """Print a stream as it comes, and a summary to stderr; returns the text."""
    began = time.monotonic()
    text = ""
    last = pb.GenerateChunk()
    try:
        async for chunk in stream:
            text += chunk.text
            out.print(colored(chunk) if color else Text(chunk.text), end="", soft_wrap=True)
            last = chunk
    except S2DError:
        if text:
            out.print()  # what is said of the error gets a line of its own
        raise
    out.print()
    err.print(Text(summary(last, time.monotonic() - began), style="dim"))
    return text


def summary(last: pb.GenerateChunk, seconds: float) -> str:
    tokens = last.usage.completion_tokens
    parts = [f"{tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f}/s)", last.finish_reason]
    stats = last.speculation
    if stats.num_draft_tokens:
        parts.append(
            f"accepted {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} drafts, "
            f"{stats.mean_acceptance_length:.2f} tokens a step"
        )
    return " · ".join(p for p in parts if p)
