"""llama.cpp behind `host_protocol`: continuous batching over the library's sequences, greedy.

Runs in the environment of llama-cpp-python. One `llama_decode` a step takes the next token of every running
request (with its prompt lookup drafts, if any) and fills the rest of the batch with prompts, as llama.cpp's
own server does. Threads, flash attention and memory mapping are the library's defaults unless given.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

if TYPE_CHECKING:
    from cluster.bench.peers.host_protocol import Channel, Message, SpeculationTally, refusal
else:
    from host_protocol import Channel, Message, SpeculationTally, refusal

Draft = Callable[[np.ndarray], np.ndarray]


@dataclass
class Sequence:
    """A request in its slot. ids[:length] are prompt and output, of which `cached` are in the KV cache."""

    request_id: str
    slot: int
    ids: np.ndarray
    length: int
    end: int
    ignore_eos: bool
    cached: int = 0
    drafts: list[int] = field(default_factory=list)
    tally: SpeculationTally = field(default_factory=SpeculationTally)

    @property
    def decoding(self) -> bool:
        return self.length - self.cached == 1


class Library:
    """A model and a context for `slots` sequences; `decode` returns the best token after each position asked
    for."""

    def __init__(self, path: str, slots: int, tokens_per_slot: int, threads: int, unified: bool) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = slots * -(-tokens_per_slot // 256) * 256
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot allocate {slots} sequences of {tokens_per_slot} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        self.options = {
            "model": self._describe(),
            "slots": slots,
            "n_ctx_seq": int(llama_cpp.llama_n_ctx_seq(self._context)),
            "n_batch": self.batch_tokens,
            "n_ubatch": int(llama_cpp.llama_n_ubatch(self._context)),
            "threads": threads,
            "kv_unified": unified,
            "system_info": llama_cpp.llama_print_system_info().decode(),
        }

    def _describe(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, buffer, 256)
        return buffer.value.decode()

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """entries: (token, position, slot, whether its logits are wanted). Best ids, [entries wanted]."""
        batch = self._batch
        wanted = 0
        for index, (token, position, slot, logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = slot
            batch.logits[index] = logits
            wanted += logits
        batch.n_tokens = len(entries)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens")
        if not wanted:
            return np.empty(0, np.int64)
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (wanted, self._width))
        return rows.argmax(axis=1)

    def truncate(self, slot: int, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))


class Scheduler:
    """Who is in the next batch, and what its result means."""

    def __init__(
        self, library: Library, channel: Channel, slots: int, max_len: int, draft: Draft | None
    ) -> None:
        self._library = library
        self._channel = channel
        self._max_len = max_len
        self._draft = draft
        self._free = list(reversed(range(slots)))
        self._waiting: deque[Message] = deque()
        self._running: dict[int, Sequence] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def handle(self, message: Message) -> None:
        op, request_id = message["op"], message["id"]
        if op == "generate":
            reason = refusal(message, self._max_len, greedy_only=True)
            if reason is not None:
                self._channel.error(request_id, reason)
            else:
                self._waiting.append(message)
        elif op == "cancel":
            self._waiting = deque(m for m in self._waiting if m["id"] != request_id)
            for sequence in [s for s in self._running.values() if s.request_id == request_id]:
                self._release(sequence)
        elif op == "reset":
            if not self._running:
                self._library.clear()
            self._channel.send({"event": "reset", "id": request_id})

    def step(self) -> None:
        while self._waiting and self._free:
            self._admit(self._waiting.popleft())
        if not self._running:
            return
        planned = list(self._plan())
        entries = [entry for _, fed in planned for entry in fed]
        best = self._library.decode(entries)
        messages: list[Message] = []
        row = 0
        for sequence, fed in planned:
            rows = sum(entry[3] for entry in fed)
            sequence.cached += len(fed) - len(sequence.drafts)
            if rows:
                messages += self._emit(sequence, [int(token) for token in best[row : row + rows]])
                row += rows
        self._channel.send(*messages)

    def _admit(self, message: Message) -> None:
        prompt = message["prompt_ids"]
        end = len(prompt) + message["max_tokens"]
        ids = np.zeros(end, np.intc)
        ids[: len(prompt)] = prompt
        slot = self._free.pop()
        self._running[slot] = Sequence(message["id"], slot, ids, len(prompt), end, message["ignore_eos"])

    def _plan(self) -> Iterator[tuple[Sequence, list[tuple[int, int, int, bool]]]]:
        """Running requests first, then prompts as far as the batch holds them."""
        room = self._library.batch_tokens
        for sequence in sorted(self._running.values(), key=lambda s: not s.decoding):
            if room < 1:
                return
            sequence.drafts = self._drafts(sequence, room - 1) if sequence.decoding else []
            last = min(sequence.length, sequence.cached + room)
            fed = [
                (int(sequence.ids[at]), at, sequence.slot, at == sequence.length - 1)
                for at in range(sequence.cached, last)
            ]
            fed += [
                (token, sequence.length + offset, sequence.slot, True)
                for offset, token in enumerate(sequence.drafts)
            ]
            room -= len(fed)
            yield sequence, fed

    def _drafts(self, sequence: Sequence, room: int) -> list[int]:
        left = min(sequence.end - sequence.length - 1, room)
        if self._draft is None or left < 1:
            return []
        return [int(token) for token in self._draft(sequence.ids[: sequence.length])[:left]]

    def _emit(self, sequence: Sequence, best: list[int]) -> list[Message]:
        """Accept the drafts that were the best tokens, add the one after them, forget the rest."""
        accepted = 0
        while accepted < len(sequence.drafts) and sequence.drafts[accepted] == best[accepted]:
            accepted += 1
        sequence.tally.record(len(sequence.drafts), accepted)
        new = best[: accepted + 1]
        reason = None
        for count, token in enumerate(new, start=1):
            if not sequence.ignore_eos and self._library.ends(token):
                new, reason = new[:count], "stop"
                break
        sequence.ids[sequence.length : sequence.length + len(new)] = new
        sequence.length += len(new)
        if reason is None and sequence.length >= sequence.end:
            reason = "length"
        messages: list[Message] = [{"event": "tokens", "id": sequence.request_id, "token_ids": new}]
        if reason is not None:
            speculation = sequence.tally.as_message() if self._draft is not None else None
            done = {"event": "done", "id": sequence.request_id, "finish_reason": reason}
            messages.append({**done, "speculation": speculation})
            self._release(sequence)
        elif sequence.drafts:
            sequence.cached += accepted
            self._library.truncate(sequence.slot, sequence.cached)
        return messages

    def _release(self, sequence: Sequence) -> None:
        self._library.truncate(sequence.slot, 0)
        del self._running[sequence.slot]
        self._free.append(sequence.slot)


def serve(scheduler: Scheduler, inbox: queue.Queue[Message]) -> None:
    while True:
        with contextlib.suppress(queue.Empty):
            while True:
                message = inbox.get(block=not scheduler.busy)
                if message["op"] == "stop":
                    return
                scheduler.handle(message)
        scheduler.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--unified", action="store_true", help="one KV buffer for all sequences")
    parser.add_argument("--prompt-lookup", type=int, default=0, help="draft tokens; 0 for none")
    parser.add_argument("--ngram", type=int, default=2, help="longest n-gram that is looked up")
    args = parser.parse_args()
    channel = Channel()
    # A draft may reach past the last token that is emitted.
    width = args.max_model_len + args.prompt_lookup
    library = Library(args.model, args.slots, width, args.threads, args.unified)
    draft: Any = None
    if args.prompt_lookup:
        draft = LlamaPromptLookupDecoding(args.ngram, args.prompt_lookup)
    inbox: queue.Queue[Message] = queue.Queue()
    channel.listen(inbox.put)
    versions = {"python": sys.version.split()[0], "llama-cpp-python": version("llama-cpp-python")}
    lookup = {"prompt_lookup": args.prompt_lookup, "ngram": args.ngram} if args.prompt_lookup else {}
    channel.hello(versions, library.options | lookup)
    serve(Scheduler(library, channel, args.slots, args.max_model_len, draft), inbox)


if __name__ == "__main__":
    main()
