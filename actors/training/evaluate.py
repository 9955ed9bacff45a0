"""What a draft is worth: agreement with the target's greedy answers, exit by exit and place by place in a
chain, and its cost, on the runner and with the drafter that will serve it.

Under greedy decoding a draft token is accepted exactly when it equals the target's, and accepted tokens are
the target's own. So a chain drafted from every place of a stored answer tells what any sequence of rounds
over it would have had accepted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actors.drafting.draft_load import LoadedDraft
from actors.drafting.interface import DraftQuery, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.models.runner import ModelRunner, RaggedBatch
from actors.sampling.params import DraftSampling
from actors.training.token_store import TokenSequence

ANSWERS_TOGETHER = 16
"""Answers that chains are drafted for in one pass."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored answer and, for a draft that reads them, the target's states [labels, S] (see
    `TeacherRows`)."""

    sequence: TokenSequence
    states: npt.NDArray[np.float16] | None = None

    @property
    def labels(self) -> tuple[int, ...]:
        return self.sequence.ids[self.sequence.labels_from :]


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


def accepted_lengths(
    draft: LoadedDraft, answers: Sequence[Answer], depth: int, length: int, context: int | None
) -> list[list[int]]:
    """[answer][label after the first]: how many tokens of a chain of `length` from there, drafted at exit
    `depth`, the target would accept. The first label comes with the prompt's own pass, before any draft.
    `context`: tokens of a session that the draft reads at most, None for all."""
    drafter = _drafter(draft, context, max(len(a.sequence.ids) for a in answers))
    found: list[list[int]] = []
    for start in range(0, len(answers), ANSWERS_TOGETHER):
        found += _walk_together(drafter, answers[start : start + ANSWERS_TOGETHER], depth, length)
    return found


def _drafter(draft: LoadedDraft, context: int | None, longest: int) -> NestedDrafter:
    """As it serves, but that it absorbs sessions of `longest` tokens at once."""
    return NestedDrafter(
        draft.runner,
        draft.exits,
        heads=draft.heads,
        window=draft.window,
        context=context,
        state_in=draft.state_in,
        catch_up=max(32, longest),
    )


def _walk_together(
    drafter: NestedDrafter, answers: Sequence[Answer], depth: int, length: int
) -> list[list[int]]:
    sampling = DraftSampling(key=0)
    for sid, answer in enumerate(answers):
        prompt = answer.sequence.ids[: answer.sequence.labels_from]
        drafter.open(SessionOpen(sid, prompt, len(prompt), sampling))
    found: list[list[int]] = [[] for _ in answers]
    for label in range(1, max(a.sequence.num_labels for a in answers)):
        going = [sid for sid, a in enumerate(answers) if label < a.sequence.num_labels]
        for sid in going:
            answer = answers[sid]
            drafter.commit(sid, [answer.labels[label - 1]])
            if answer.states is not None:
                drafter.note_states(sid, [(torch.from_numpy(answer.states), label - 1)])
        queries = [DraftQuery(sid, label, length, depth) for sid in going]
        for draft in drafter.propose(queries):
            if draft.error is not None:
                raise ValueError(f"exit {depth} drafted nothing: {draft.error_message}")
            follows = answers[draft.session_id].labels[label:]
            agrees = [a == b for a, b in zip(draft.token_ids, follows, strict=False)]
            found[draft.session_id].append(agrees.index(False) if False in agrees else len(agrees))
    for sid in range(len(answers)):
        drafter.close(sid)
    return found


@dataclass(frozen=True, slots=True)
class ChainCounts:
    """Of all rounds over some answers with chains of one length: rounds, tokens emitted, and by place how
    many draft tokens were reached and accepted."""

    rounds: int
    tokens: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]


def walk(answers: Sequence[Sequence[int]], length: int) -> ChainCounts:
    """Decode answers in rounds of `length` draft tokens: each emits the accepted ones and one of the
    target's. `answers[i][j]`: tokens accepted of a chain from label j that is at least as long. Drafts past
    an answer's end do not count."""
    rounds = tokens = 0
    reached, accepted = [0] * length, [0] * length
    for lengths in answers:
        at = 0
        while at < len(lengths):
            possible = min(length, len(lengths) - at)
            taken = min(lengths[at], possible)
            for place in range(min(taken + 1, possible)):
                reached[place] += 1
                accepted[place] += place < taken
            rounds += 1
            at += taken + 1
        tokens += len(lengths)
    return ChainCounts(rounds, tokens, tuple(reached), tuple(accepted))


def draft_seconds(
    draft: LoadedDraft, depth: int, context: int, length: int, repeats: int, draft_context: int | None
) -> float:
    """Median seconds a draft token of chains of `length` at one exit, after `context` tokens, of which the
    draft reads `draft_context` at most, as the drafter serves them."""
    drafter = _drafter(draft, draft_context, context)
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
    answers: Sequence[Answer],
    *,
    max_chain: int,
    context: int,
    repeats: int,
    draft_context: int | None = None,
    target_s: Sequence[float] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[ExitReport]:
    """A report for each exit, over greedy answers. `target_s[r - 1]`: the target's seconds for a pass of r
    rows."""
    say(f"acceptance on {len(answers)} answers, {sum(a.sequence.num_labels for a in answers)} tokens")
    reports: list[ExitReport] = []
    for depth in draft.exits:
        lengths = accepted_lengths(draft, answers, depth, max_chain, draft_context)
        say(f"cost of exit {depth}")
        seconds = draft_seconds(draft, depth, context, max_chain, repeats, draft_context)
        chains = [walk(lengths, k) for k in range(1, max_chain + 1)]
        longest, rates = chains[-1], [c.tokens / max(1, c.rounds) for c in chains]
        speedups: list[float | None] = [None] * max_chain
        if target_s is not None:
            speedups = [rate * target_s[0] / (k * seconds + target_s[k]) for k, rate in enumerate(rates, 1)]
        reports.append(
            ExitReport(
                depth=depth,
                agreement=sum(n > 0 for one in lengths for n in one) / max(1, longest.tokens),
                acceptance=tuple(
                    a / r if r else None for a, r in zip(longest.accepted, longest.reached, strict=True)
                ),
                tokens_per_round=tuple(rates),
                draft_s=seconds,
                speedup=tuple(speedups),
            )
        )
    return reports
