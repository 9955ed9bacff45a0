"""What a draft is worth: agreement with the target's greedy answers, exit by exit and place by place in a
chain, and its cost, on the runner that will serve it.

Under greedy decoding a draft token is accepted exactly when it equals the target's, and accepted tokens are
the target's own. So one teacher-forced pass over an answer tells what every chain from every place of it
would have had accepted: as many tokens as agree without a gap.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from actors.drafting.draft_load import LoadedDraft
from actors.drafting.interface import DraftQuery, DraftSampling, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.models.runner import ModelRunner, RaggedBatch
from actors.training.teacher import whole_sequences
from actors.training.token_store import TokenSequence


@dataclass(frozen=True, slots=True)
class ExitReport:
    """depth: layers. agreement: share of labels that the exit's best token equals. acceptance[j]: of the
    chains whose first j tokens were accepted, the share whose token j was too. tokens_per_round[k - 1]: mean
    tokens emitted a round (accepted ones and the target's own) with chains of k. draft_s: seconds a draft
    token. speedup[k - 1]: predicted, None without the target's cost."""

    depth: int
    agreement: float
    acceptance: tuple[float | None, ...]
    tokens_per_round: tuple[float, ...]
    draft_s: float
    speedup: tuple[float | None, ...]


def agreements(draft: LoadedDraft, sequences: Sequence[TokenSequence]) -> list[list[list[bool]]]:
    """[exit][sequence][label]: whether the exit's best token is the label. One sequence a pass."""
    runner, heads = draft.runner, draft.heads
    found: list[list[list[bool]]] = [[] for _ in draft.exits]
    with torch.inference_mode():
        for sequence in sequences:
            batch = whole_sequences([sequence], runner.info.device)
            labels = torch.tensor(sequence.ids[sequence.labels_from :], device=runner.info.device)
            hidden, done = runner.embed(batch.token_ids), 0
            for index, depth in enumerate(draft.exits):
                hidden, done = runner.run_layers(hidden, done, depth, batch), depth
                own = draft.exits[-1] + index
                read = runner.run_layers(hidden, own, own + 1, batch) if heads.own_layers else hidden
                best = heads.logits(runner, read[batch.logit_rows], index).argmax(-1)
                tokens = best if heads.token_ids is None else heads.token_ids[best]
                found[index].append((tokens == labels).tolist())
    return found


@dataclass(frozen=True, slots=True)
class ChainCounts:
    """Of all rounds over some answers with chains of one length: rounds, tokens emitted, and by place how
    many draft tokens were reached and accepted."""

    rounds: int
    tokens: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]


def walk(answers: Sequence[Sequence[bool]], length: int) -> ChainCounts:
    """Decode answers in rounds of `length` draft tokens: each emits the accepted ones and one of the
    target's. Drafts past an answer's end do not count."""
    rounds = tokens = 0
    reached, accepted = [0] * length, [0] * length
    for agrees in answers:
        at = 0
        while at < len(agrees):
            place = 0
            while place < length and at + place < len(agrees):
                reached[place] += 1
                if not agrees[at + place]:
                    break
                accepted[place] += 1
                place += 1
            rounds += 1
            at += place + 1
        tokens += len(agrees)
    return ChainCounts(rounds, tokens, tuple(reached), tuple(accepted))


def draft_seconds(draft: LoadedDraft, depth: int, context: int, length: int, repeats: int) -> float:
    """Median seconds a draft token of chains of `length` at one exit, as the drafter serves them."""
    drafter = NestedDrafter(
        draft.runner, draft.exits, heads=draft.heads, window=draft.window, catch_up=max(32, context)
    )
    tokens = tuple(1 + i % 50 for i in range(context))
    drafter.open(SessionOpen(0, tokens, len(tokens), DraftSampling(key=0)))
    drafter.propose([DraftQuery(0, 0, length, depth)])
    times: list[float] = []
    for epoch in range(1, repeats + 1):
        started = time.perf_counter()
        (proposal,) = drafter.propose([DraftQuery(0, epoch, length, depth)])
        times.append(time.perf_counter() - started)
        if not proposal.token_ids:
            raise ValueError(f"exit {depth} drafted nothing: {proposal.error_message or 'no room'}")
        drafter.commit(0, [1])
    drafter.close(0)
    return statistics.median(times) / length


def target_seconds(runner: ModelRunner, context: int, max_rows: int, repeats: int) -> list[float]:
    """Median seconds of a pass over 1, 2, ... max_rows new tokens of one sequence after `context` others."""
    device = runner.info.device

    def run(first: int, rows: int) -> None:
        token_ids = 1 + torch.arange(first, first + rows, device=device) % 50
        runner.forward(RaggedBatch.chain(token_ids, first))[0, 0].item()  # waits for a GPU

    with torch.inference_mode():
        run(0, context)
        medians: list[float] = []
        for rows in range(1, max_rows + 1):
            times: list[float] = []
            for _ in range(repeats):
                started = time.perf_counter()
                run(context, rows)
                times.append(time.perf_counter() - started)
            medians.append(statistics.median(times))
    return medians


def evaluate(
    draft: LoadedDraft,
    sequences: Sequence[TokenSequence],
    *,
    max_chain: int,
    context: int,
    repeats: int,
    target_s: Sequence[float] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[ExitReport]:
    """A report for each exit. `target_s[r - 1]`: the target's seconds for a pass of r rows.

    Raises ValueError when there is nothing to measure on.
    """
    greedy = [s for s in sequences if s.greedy]
    if not greedy:
        raise ValueError("the data holds no greedy answer, which agreement is measured on")
    say(f"agreement on {len(greedy)} answers, {sum(s.num_labels for s in greedy)} tokens")
    reports: list[ExitReport] = []
    for depth, answers in zip(draft.exits, agreements(draft, greedy), strict=True):
        say(f"cost of exit {depth}")
        seconds = draft_seconds(draft, depth, context, max_chain, repeats)
        labels = sum(len(a) for a in answers)
        chains = [walk(answers, k) for k in range(1, max_chain + 1)]
        longest, rates = chains[-1], [c.tokens / c.rounds for c in chains]
        speedups: list[float | None] = [None] * max_chain
        if target_s is not None:
            speedups = [rate * target_s[0] / (k * seconds + target_s[k]) for k, rate in enumerate(rates, 1)]
        reports.append(
            ExitReport(
                depth=depth,
                agreement=sum(sum(a) for a in answers) / labels,
                acceptance=tuple(
                    a / r if r else None for a, r in zip(longest.accepted, longest.reached, strict=True)
                ),
                tokens_per_round=tuple(rates),
                draft_s=seconds,
                speedup=tuple(speedups),
            )
        )
    return reports
