"""JSON lines between the benchmark and a script in a peer's environment: the script's side.

Standard library only, because the peer's environment has nothing of ours. One message a line:

    to the script    {"op": "generate", "id", "prompt_ids", "max_tokens", "ignore_eos", "temperature", "seed"}
                     {"op": "cancel", "id"}    {"op": "reset", "id"}    {"op": "stop"}
    from the script  {"event": "hello", "versions": {...}, "options": {...}}         once, when it is ready
                     {"event": "tokens", "id", "token_ids": [...]}                   one a step
                     {"event": "done", "id", "finish_reason", "speculation": {...} or null}
                     {"event": "error", "id", "message"}                             ends the request
                     {"event": "reset", "id"}                                        answers a reset

The end of the input means the same as "stop": a script does not outlive the benchmark.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
EXIT_GRACE_S = 10.0
"""After "stop", a script that is still there ends itself and its children so many seconds later."""


class Channel:
    """Takes over standard input and output; what anything else prints goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1 << 16, encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # From the start, so that the end of the benchmark also ends a script that is still loading.
        threading.Thread(target=self._read, name="host-input", daemon=True).start()

    def listen(self, deliver: Callable[[Message], object]) -> None:
        """Call `deliver` with every message, from a thread of its own."""

        def hand_on() -> None:
            while True:
                deliver(self._inbox.get())

        threading.Thread(target=hand_on, name="host-messages", daemon=True).start()

    def send(self, *messages: Message) -> None:
        text = "".join(json.dumps(message, separators=(",", ":")) + "\n" for message in messages)
        with self._lock:
            try:
                self._out.write(text)
                self._out.flush()
            except BrokenPipeError:  # the benchmark is gone; the end of the input ends this process
                pass

    def hello(self, versions: dict[str, str], options: dict[str, Any]) -> None:
        self.send({"event": "hello", "versions": versions, "options": options})

    def error(self, request_id: str, message: str) -> None:
        self.send({"event": "error", "id": request_id, "message": message})

    def _read(self) -> None:
        for line in sys.stdin:
            try:
                message = json.loads(line)
            except ValueError:
                print(f"not JSON: {line[:200]!r}", file=sys.stderr)
                continue
            if message.get("op") == "stop":
                break
            self._inbox.put(message)
        late = threading.Timer(EXIT_GRACE_S, _end_group)
        late.daemon = True
        late.start()
        self._inbox.put({"op": "stop"})


def _end_group() -> None:
    """Ends this process, and its children where it leads a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def refusal(message: Message, max_model_len: int, greedy_only: bool) -> str | None:
    """Why a "generate" cannot be served, or None."""
    prompt = len(message["prompt_ids"])
    if prompt < 1 or message["max_tokens"] < 1:
        return "needs at least one prompt token and max_tokens of at least 1"
    if prompt + message["max_tokens"] > max_model_len:
        return f"{prompt} prompt + {message['max_tokens']} new tokens exceed max_model_len {max_model_len}"
    if greedy_only and message.get("temperature", 0.0) > 0:
        return "this peer is driven greedily only: temperature must be 0"
    return None


class SpeculationTally:
    """Counts of one request; `record` is called once a verification, with and without drafts. `rounds` counts
    all of them, so that output tokens / rounds is 1 where nothing was accepted."""

    def __init__(self) -> None:
        self.rounds = self.drafted = self.accepted = 0
        self.by_position: list[int] = []

    def record(self, drafted: int, accepted: int) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.by_position += [0] * (accepted - len(self.by_position))
        for position in range(accepted):
            self.by_position[position] += 1

    def as_message(self) -> Message:
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_by_position": self.by_position,
        }
