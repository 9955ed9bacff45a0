"""A `TargetEngine` that emits what it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from actors.engine.messages import (
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestOutput,
    ResetScope,
    RoundReport,
)
from actors.sampling.results import TokenLogprobs

Script = Callable[[EngineRequest], Sequence[RequestOutput]]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that another thread does."""
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    assert condition(), f"not within {timeout_s} s"


def rounds(
    request: EngineRequest,
    blocks: Sequence[Sequence[int]],
    drafted: int | None = None,
    logprobs: bool = False,
    finish: FinishReason | None = "length",
) -> list[RequestOutput]:
    """One output a block: all but its last token accepted drafts, of `drafted` (or just those)."""
    outputs = []
    for block in blocks:
        accepted = len(block) - 1
        verified = accepted if drafted is None else drafted
        report = RoundReport(verified, accepted, "scripted" if verified else None)
        entries = tuple(TokenLogprobs(t, -float(t), ((t, -float(t)), (t + 1, -99.0))) for t in block)
        outputs.append(
            RequestOutput(
                request.request_id, tuple(block), logprobs=entries if logprobs else None, round=report
            )
        )
    if outputs and finish is not None:
        outputs[-1] = replace(outputs[-1], finish_reason=finish)
    return outputs


class StepClock:
    """In place of `time` in a module under test: a second passes when `tick` is called, and only then."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1.0


@dataclass
class _Running:
    request: EngineRequest
    outputs: list[RequestOutput]


class ScriptedEngine:
    """Emits the next scripted output of every request, a step. A script that runs out just goes silent.

    Every method checks that it runs in one thread, the engine's.
    """

    def __init__(self, script: Script, step_s: float = 0.0) -> None:
        self.script = script
        self.step_s = step_s
        self.on_step: Callable[[], object] = lambda: None
        """Called at the beginning of each step, in the engine's thread."""
        self.gate = threading.Event()
        self.gate.set()
        self.running: dict[str, _Running] = {}
        self.added: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.steps = 0
        self.asked = 0
        self.resets: list[ResetScope] = []
        self.closed = False
        self.fail_at: set[int] = set()
        self.add_error: Exception | None = None
        self.abort_error: Exception | None = None
        self._thread: int | None = None

    def step_by_step(self) -> None:
        """From now on `gate` lets one step through and closes again; it is open for the next one."""
        self.on_step = self.gate.clear

    def _same_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "called from two threads"

    def add(self, request: EngineRequest) -> None:
        self._same_thread()
        if self.add_error is not None:
            raise self.add_error
        self.added.append(request)
        self.running[request.request_id] = _Running(request, list(self.script(request)))

    def abort(self, request_id: str) -> None:
        self._same_thread()
        if self.abort_error is not None:
            raise self.abort_error
        if self.running.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def step(self) -> Sequence[RequestOutput]:
        self._same_thread()
        assert self.gate.wait(20.0)
        self.on_step()
        self.steps += 1
        if self.steps in self.fail_at:
            raise FloatingPointError("scripted failure")
        time.sleep(self.step_s)
        outputs = []
        for request_id, running in list(self.running.items()):
            if running.outputs:
                outputs.append(running.outputs.pop(0))
                if outputs[-1].finished:
                    del self.running[request_id]
        return outputs

    def idle(self, waiting: Callable[[], bool]) -> bool:
        return False

    def has_work(self) -> bool:
        self._same_thread()
        self.asked += 1
        return any(r.outputs for r in self.running.values())

    def stats(self) -> EngineStats:
        self._same_thread()
        return EngineStats(
            running=len(self.running), steps=self.steps, draft_source={"workers": [{"id": "w0", "late": 0}]}
        )

    def reset_shared_state(self, scope: ResetScope = "all") -> None:
        self._same_thread()
        self.resets.append(scope)

    def close(self) -> None:
        self._same_thread()
        self.closed = True
