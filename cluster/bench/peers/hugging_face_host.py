"""Hugging Face `generate` behind `host_protocol`: plain, prompt lookup and assisted generation, greedy.

Runs in the environment of transformers. Plain requests that wait are generated as one left-padded batch
(static batching: the next batch starts when the longest row is done). The speculative modes take one request
at a time, because `generate` refuses them for batches.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from cluster.bench.peers.host_protocol import Channel, Message, SpeculationTally, refusal
else:
    from host_protocol import Channel, Message, SpeculationTally, refusal

GATHER_S = 0.01
"""A batch waits so long for one more request: clients that answer at once come back within it."""


class Inbox:
    """Messages from the benchmark: requests wait here, cancellations and resets are dealt with when seen."""

    def __init__(self, channel: Channel, max_model_len: int) -> None:
        self._channel = channel
        self._max_model_len = max_model_len
        self._queue: queue.Queue[Message] = queue.Queue()
        self._waiting: list[Message] = []
        self.cancelled: set[str] = set()
        self.stopped = False
        channel.listen(self._queue.put)

    def next_batch(self, limit: int) -> list[Message]:
        """Blocks until there is a request; empty when it is time to stop."""
        while not self._waiting and not self.stopped:
            self._take(None)
        while len(self._waiting) < limit and not self.stopped and self._take(GATHER_S if limit > 1 else 0):
            pass
        batch, self._waiting = self._waiting[:limit], self._waiting[limit:]
        return [] if self.stopped else batch

    def poll(self) -> None:
        while self._take(0):
            pass

    def _take(self, timeout: float | None) -> bool:
        try:
            message = self._queue.get(block=timeout != 0, timeout=timeout)
        except queue.Empty:
            return False
        op = message["op"]
        if op == "stop":
            self.stopped = True
        elif op == "reset":
            self._channel.send({"event": "reset", "id": message["id"]})
        elif op == "cancel":
            self.cancelled.add(message["id"])
            self._waiting = [m for m in self._waiting if m["id"] != message["id"]]
        elif (reason := refusal(message, self._max_model_len, greedy_only=True)) is not None:
            self._channel.error(message["id"], reason)
        else:
            self._waiting.append(message)
        return True


@dataclass
class Row:
    """One request of a batch."""

    request_id: str
    left: int
    ends: frozenset[int]
    tally: SpeculationTally = field(default_factory=SpeculationTally)
    finish_reason: str | None = None

    def take(self, tokens: list[int]) -> list[int]:
        """The tokens of one step that belong to the answer; sets `finish_reason` at its end."""
        tokens = tokens[: self.left]
        for count, token in enumerate(tokens, start=1):
            if token in self.ends:
                self.finish_reason = "stop"
                return tokens[:count]
        self.left -= len(tokens)
        if self.left == 0:
            self.finish_reason = "length"
        return tokens


class Progress(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """Sees each step's tokens, passes them on, and tells `generate` which rows are done."""

    def __init__(self, rows: list[Row], channel: Channel, inbox: Inbox, speculates: bool) -> None:
        self._rows = rows
        self._channel = channel
        self._inbox = inbox
        self._speculates = speculates
        self._prompt_seen = False
        self.drafted = 0

    def put(self, value: torch.Tensor) -> None:
        """value: the prompts [rows, length] first, then [rows] or, in speculative modes, [1, tokens]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        messages: list[Message] = []
        for row, tokens in zip(self._rows, value.reshape(len(self._rows), -1).tolist(), strict=True):
            if row.finish_reason is not None:
                continue
            row.tally.record(self.drafted, len(tokens) - 1)
            messages.append({"event": "tokens", "id": row.request_id, "token_ids": row.take(tokens)})
            if row.finish_reason is not None:
                speculation = row.tally.as_message() if self._speculates else None
                done = {"event": "done", "id": row.request_id, "finish_reason": row.finish_reason}
                messages.append({**done, "speculation": speculation})
        self._channel.send(*messages)

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._inbox.poll()
        for row in self._rows:
            if row.finish_reason is None and (self._inbox.stopped or row.request_id in self._inbox.cancelled):
                row.finish_reason = "cancelled"
        done = [row.finish_reason is not None for row in self._rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@contextmanager
def counting_drafts(model: Any, progress: Progress) -> Iterator[None]:
    """Tells `progress` how many tokens each round drafted, which `generate` keeps to itself."""
    make = model._get_candidate_generator

    def make_counting(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        get = generator.get_candidates

        def get_counting(input_ids: torch.Tensor, *more: Any, **options: Any) -> Any:
            candidates, logits = get(input_ids, *more, **options)
            progress.drafted = candidates.shape[1] - input_ids.shape[1]
            return candidates, logits

        generator.get_candidates = get_counting
        return generator

    model._get_candidate_generator = make_counting
    try:
        yield
    finally:
        del model._get_candidate_generator


class Generator:
    def __init__(self, args: argparse.Namespace) -> None:
        dtype = getattr(torch, args.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, local_files_only=True
        ).eval()
        ends = self.model.generation_config.eos_token_id
        self._ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self._pad = min(self._ends, default=0)
        # Rows end by `Progress`, each by its own rule; `generate` itself must not know of an end token.
        self.model.generation_config = GenerationConfig(pad_token_id=self._pad, do_sample=False)
        self._options: dict[str, Any] = {}
        if args.prompt_lookup:
            self._options = {
                "prompt_lookup_num_tokens": args.prompt_lookup,
                "max_matching_ngram_size": args.ngram,
            }
        elif args.early_exit:
            self._options = {"assistant_early_exit": args.early_exit}
        elif args.assistant:
            assistant = AutoModelForCausalLM.from_pretrained(
                args.assistant, dtype=dtype, local_files_only=True
            )
            self._options = {"assistant_model": assistant.eval()}
        self.speculates = bool(self._options)

    @torch.inference_mode()
    def run(self, batch: list[Message], channel: Channel, inbox: Inbox) -> None:
        rows = [Row(m["id"], m["max_tokens"], frozenset() if m["ignore_eos"] else self._ends) for m in batch]
        width = max(len(m["prompt_ids"]) for m in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros_like(ids)
        for index, message in enumerate(batch):
            prompt = torch.tensor(message["prompt_ids"])
            ids[index, width - len(prompt) :] = prompt
            mask[index, width - len(prompt) :] = 1
        progress = Progress(rows, channel, inbox, self.speculates)
        with counting_drafts(self.model, progress):
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(row.left for row in rows),
                stopping_criteria=StoppingCriteriaList([progress]),
                streamer=progress,
                **self._options,
            )
        for row in rows:
            if row.finish_reason is None:  # `generate` ended early, for example at the model's own limit
                channel.error(row.request_id, f"generate ended with {row.left} tokens missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1, help="largest batch")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--prompt-lookup", type=int, default=0, help="draft tokens; 0 for none")
    parser.add_argument("--ngram", type=int, default=2, help="longest n-gram that is looked up")
    parser.add_argument("--early-exit", type=int, default=0, help="draft with so many of the model's layers")
    parser.add_argument("--assistant", help="folder of an assistant model")
    args = parser.parse_args()
    channel = Channel()
    torch.set_num_threads(args.threads)
    generator = Generator(args)
    versions = {
        "python": sys.version.split()[0],
        "transformers": version("transformers"),
        "torch": torch.__version__,
    }
    options = {key: value for key, value in vars(args).items() if value}
    inbox = Inbox(channel, args.max_model_len)
    channel.hello(versions, options)
    limit = 1 if generator.speculates else args.slots
    while batch := inbox.next_batch(limit):
        try:
            generator.run(batch, channel, inbox)
        except Exception as error:
            for message in batch:
                channel.error(message["id"], f"{type(error).__name__}: {error}")
        inbox.cancelled.clear()


if __name__ == "__main__":
    main()
