"""Continuous batching over the sequences of one llama.cpp context, with drafts that need no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cluster.bench.peers.host_protocol import Channel, Message, SpeculationTally, refusal
    from cluster.bench.peers.llama_cpp_library import Entry, Library
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


class Scheduler:
    """Who is in the next batch, and what its result means. A request goes to the free slot whose last one
    began most like it and reads only what differs, as in llama.cpp's own server."""

    def __init__(
        self, library: Library, channel: Channel, slots: int, max_len: int, draft: Draft | None
    ) -> None:
        self._library = library
        self._channel = channel
        self._max_len = max_len
        self._draft = draft
        self._free = list(range(slots))  # the one that is free longest comes first
        self._kept: dict[int, np.ndarray] = {}  # ids in the KV cache of a free slot
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
            self._kept.clear()
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
        prompt = np.array(message["prompt_ids"], np.intc)
        end = len(prompt) + message["max_tokens"]
        ids = np.zeros(end, np.intc)
        ids[: len(prompt)] = prompt
        by_slot = {slot: self._shared(slot, prompt) for slot in self._free}
        slot = max(self._free, key=by_slot.__getitem__)
        shared = by_slot[slot]
        self._free.remove(slot)
        if not self._library.truncate(slot, shared):
            shared = 0
            self._library.truncate(slot, shared)
        self._running[slot] = Sequence(
            message["id"], slot, ids, len(prompt), end, message["ignore_eos"], cached=shared
        )

    def _shared(self, slot: int, prompt: np.ndarray) -> int:
        """How many first tokens of the prompt are in the slot's KV cache; never the last, whose logits are
        wanted."""
        kept = self._kept.get(slot, prompt[:0])[: len(prompt) - 1]
        differing = np.flatnonzero(kept != prompt[: len(kept)])
        return int(differing[0]) if len(differing) else len(kept)

    def _plan(self) -> Iterator[tuple[Sequence, list[Entry]]]:
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
        self._kept[sequence.slot] = sequence.ids[: sequence.cached]
        del self._running[sequence.slot]
        self._free.append(sequence.slot)
