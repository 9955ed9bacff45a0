"""The training loop: the same function alone, resumed, and as a worker of Ray Train."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.training.batches import Batch
from actors.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from actors.training.curves import plot_curves
from actors.training.losses import SortedLoss
from actors.training.run import TrainingData, TrainingRun, build_optimizer, learning_rate
from actors.training.settings import TrainSettings

ARTIFACT, CHECKPOINTS, CURVES = "draft.safetensors", "checkpoints", "curves.png"
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workers:
    """This worker among those that share a step. `wrap` makes the loss data-parallel."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    barrier: Callable[[], None] = lambda: None


class BatchQueue:
    """The batches of some steps, laid out in a thread a few steps ahead of their use."""

    AHEAD = 3

    def __init__(self, data: TrainingData, steps: range, workers: Workers) -> None:
        self._data, self._steps, self._workers = data, steps, workers
        # One thread: the plan of an epoch is made once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> BatchQueue:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Future[Batch]] = deque()
        for step in self._steps:
            waiting.append(
                self._thread.submit(self._data.batch, step, self._workers.rank, self._workers.world)
            )
            if len(waiting) > self.AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(slots=True)
class _State:
    step: int = 0
    seconds: float = 0.0
    labels: int = 0
    history: list[Record] = field(default_factory=list)


def train(
    run: TrainingRun,
    *,
    stop_after: int | None = None,
    on_step: Callable[[Record], None] = lambda record: None,
    workers: Workers | None = None,
) -> list[Record]:
    """Train to the settings' last step, from the last checkpoint in the output folder if there is one.

    `on_step` gets a record a step: step, loss, exits (loss by exit), lr, norm (of the gradient), and
    `heldout` after a measurement. `stop_after` ends early at that step, with a checkpoint (a later call goes
    on). Rank 0 writes checkpoints, curves and, at the end, the artifact. Returns the whole history.

    Raises CheckpointError, and FloatingPointError when the loss is not a number.
    """
    workers = workers or Workers()
    settings, out = run.settings, run.settings.out
    loss_module = SortedLoss(run.student, settings.distill).to(run.device)
    if settings.compile:
        _compile(run, loss_module)
    optimizer = build_optimizer(run.student, settings)
    state = _resume(run, optimizer, out / CHECKPOINTS)
    wrapped = workers.wrap(loss_module)
    heldout = run.heldout_batches() if workers.rank == 0 else []
    if state.step == 0 and heldout:
        state.history.append({"step": 0, "heldout": _measure(run, loss_module, heldout)})
        on_step(state.history[-1])
    last = min(settings.steps, stop_after if stop_after is not None else settings.steps)
    if _over(settings, state):  # a run that had ended, called again
        last = state.step
    with BatchQueue(run.data, range(state.step, last), workers) as batches:
        for batch in batches:
            started = time.perf_counter()
            record = _step(run, wrapped, optimizer, state, workers, batch)
            state.step += 1
            done = state.step == settings.steps or _over(settings, state)
            due = state.step % settings.eval_every == 0 or done
            if heldout and due:
                record["heldout"] = _measure(run, loss_module, heldout)
            state.seconds += time.perf_counter() - started
            record["seconds"] = state.seconds
            state.history.append(record)
            on_step(record)
            if state.step % settings.checkpoint_every == 0 or state.step == last or done:
                if workers.rank == 0:
                    _save(run, optimizer, state)
                workers.barrier()
            if done:
                break
    if workers.rank == 0 and (state.step >= settings.steps or _over(settings, state)):
        run.export(
            out / ARTIFACT,
            steps=state.step,
            labels=state.labels,
            seconds=state.seconds,
            agreement=last_agreement(state.history, settings.exits),
        )
    return state.history


def _over(settings: TrainSettings, state: _State) -> bool:
    return settings.minutes is not None and state.seconds >= 60 * settings.minutes


def _compile(run: TrainingRun, loss: SortedLoss) -> None:
    """Layers one by one: they share their code, so that it is compiled once."""
    layers = [*run.student.layers, *run.student.exit_layers]
    for layer in [*layers, *(run.teacher.layers if run.teacher is not None else ())]:
        layer.compile()
    loss.compile_losses()


def _step(
    run: TrainingRun,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: _State,
    workers: Workers,
    prepared: Batch,
) -> Record:
    settings = run.settings
    batch = prepared.to(run.device)
    rate = learning_rate(settings, state.step, state.seconds)
    for group in optimizer.param_groups:
        group["lr"] = rate
    run.student.train()
    with run.autocast():
        value, details = loss(batch, None if run.teacher is None else run.teacher.teach(batch))
    value.backward()
    norm = nn.utils.clip_grad_norm_(run.student.parameters(), settings.clip)
    number = float(value.detach())
    if not torch.isfinite(value) or not torch.isfinite(norm):
        raise FloatingPointError(f"step {state.step + 1}: the loss is {number}, its gradient {float(norm)}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.labels += batch.labels.numel() * workers.world
    return {
        "step": state.step + 1,
        "loss": number,
        "exits": details["exits"].tolist(),
        "lr": rate,
        "norm": float(norm),
        "labels": state.labels,
    }


def _measure(run: TrainingRun, loss: SortedLoss, batches: list[Any]) -> Record:
    """Sums over held-out labels as rates: cross-entropy (nats a label in the vocabulary), agreement with
    labels and with the first teacher's best token, by exit."""
    run.student.eval()
    count = len(run.settings.exits)
    labels = known = 0
    entropy, agree, agree_teacher = [0.0] * count, [0] * count, [0] * count
    for batch in batches:
        with run.autocast():
            scores = loss.score(batch)
        labels, known = labels + scores.labels, known + scores.known
        for e in range(count):
            entropy[e] += scores.cross_entropy[e]
            agree[e] += scores.agree[e]
            agree_teacher[e] += scores.agree_teacher[e]
    return {
        "labels": labels,
        "cross_entropy": [v / max(1, known) for v in entropy],
        "agreement": [v / max(1, labels) for v in agree],
        "teacher_agreement": [v / max(1, labels) for v in agree_teacher],
    }


def last_agreement(history: list[Record], exits: Sequence[int]) -> dict[str, float]:
    """Exit depth to the last held-out agreement, as the model card keeps it."""
    measured = [r["heldout"]["teacher_agreement"] for r in history if "heldout" in r]
    return {str(e): round(v, 4) for e, v in zip(exits, measured[-1], strict=True)} if measured else {}


def _resume(run: TrainingRun, optimizer: torch.optim.Optimizer, folder: Path) -> _State:
    found = load_latest(folder, run.identity)
    if found is None:
        return _State()
    run.student.load_state_dict(found.student)
    optimizer.load_state_dict(found.optimizer)
    return _State(found.step, found.seconds, found.labels, list(found.history))


def _save(run: TrainingRun, optimizer: torch.optim.Optimizer, state: _State) -> None:
    out = run.settings.out
    student = {k: v.detach().to("cpu", copy=True) for k, v in run.student.state_dict().items()}
    save_checkpoint(
        out / CHECKPOINTS,
        Checkpoint(
            state.step,
            run.identity,
            student,
            optimizer.state_dict(),
            list(state.history),
            state.seconds,
            state.labels,
        ),
    )
    plot_curves(state.history, run.settings.exits, out / CURVES)
