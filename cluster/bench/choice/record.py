"""Recording a trace: greedy answers of a target, chains of every exit at every place, and measured costs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from actors.costs import CostModel
from actors.drafting.interface import DraftQuery, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.drafting.nested_load import load_nested
from actors.drafting.selector import CANDIDATES_WANTED
from actors.models.draft_artifact import resolve_artifact
from actors.models.load import LoadedModel, load_runner
from actors.models.runner import BLOCK_SIZE, RaggedBatch
from actors.sampling.params import DraftSampling
from actors.text.tokenizer import TextTokenizer
from cluster.bench.choice.settings import TraceSettings
from cluster.bench.datasets import DatasetError, Question, builtin, read_spec_bench, sample
from cluster.bench.environment import environment
from cluster.bench.rendering import PromptRenderer
from cluster.simulator.trace import NOTHING, Floats, Ints, Trace, TraceCard, TracedAnswer

PROFILED_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
PROFILED_SESSIONS = (1, 2, 4, 8, 16)
_STEP_PLACES = 4
_PROFILE_CONTEXT = 128

Say = Callable[[str], None]


def record_trace(settings: TraceSettings, say: Say = lambda message: None) -> Trace:
    """Raises DatasetError, ValueError (a model or draft that does not fit) and OSError."""
    questions = settings_questions(settings)
    say(f"loading {settings.source} in {settings.dtype}")
    loaded = load_runner(
        settings.source, dtype=settings.dtype, threads=settings.threads, kv_memory_gib=0.5, progress=say
    )
    tokenizer = TextTokenizer(loaded.tokenizer_folder)
    renderer = PromptRenderer(loaded.tokenizer_folder)
    keep = min(settings.max_prompt, loaded.info.max_model_len - settings.max_tokens)
    if keep < 1:
        raise ValueError(f"max_tokens: must be less than the model's {loaded.info.max_model_len} tokens")
    answers: list[tuple[Question, tuple[int, ...], list[int], Ints]] = []
    for index, question in enumerate(questions, 1):
        prompt = renderer.render(question.turns[:1]).ids[-keep:]
        say(f"answer {index} of {len(questions)}: {question.task}, {len(prompt)} prompt tokens")
        tokens, candidates = greedy_answer(loaded, prompt, settings.max_tokens, tokenizer.eos_token_ids)
        answers.append((question, tuple(prompt), tokens, candidates))
    say("costs of rounds")
    verify_s = round_seconds(loaded, settings.repeats)
    say("draft")
    nested = load_nested(
        settings.nested.model_copy(update={"stop_threshold": None, "kv_blocks": 2048}),
        max(len(answers), max(PROFILED_SESSIONS)),
        settings.threads,
    )
    if nested.tokenizer.vocab_hash != tokenizer.vocab_hash:
        raise ValueError(f"nested.source: its tokenizer is not that of {settings.source}")
    drafts = {
        depth: chains(nested.drafter, [(p, t) for _, p, t, _ in answers], depth, settings.chain)
        for depth in nested.drafter.exits
    }
    say("costs of draft steps")
    step_s = {d: step_seconds(nested.drafter, d, settings.repeats) for d in nested.drafter.exits}
    artifact = settings.nested.artifact
    card = TraceCard(
        target=f"{loaded.info.name} {loaded.info.dtype_name}",
        source=settings.source,
        dtype=settings.dtype,
        draft=artifact or settings.nested.source,
        draft_hash=hashlib.sha256(Path(resolve_artifact(artifact)).read_bytes()).hexdigest()
        if artifact
        else "",
        tokenizer_hash=tokenizer.vocab_hash,
        dataset=settings.dataset,
        dataset_hash=hashlib.sha256(repr(questions).encode()).hexdigest(),
        tasks=tuple(q.task for q, _, _, _ in answers),
        exits=nested.drafter.exits,
        chain=settings.chain,
        verify_s=verify_s,
        step_s=step_s,
        machine=environment(bandwidth=False),
    )
    return Trace(
        card,
        tuple(
            TracedAnswer(
                question.task,
                prompt,
                tuple(tokens),
                candidates,
                {depth: drafts[depth][i][0] for depth in drafts},
                {depth: drafts[depth][i][1] for depth in drafts},
            )
            for i, (question, prompt, tokens, candidates) in enumerate(answers)
        ),
    )


def settings_questions(settings: TraceSettings) -> tuple[Question, ...]:
    """Raises DatasetError."""
    if settings.dataset == "builtin":
        questions = builtin()
    elif settings.path is not None:
        questions = read_spec_bench(settings.path)
    else:
        raise DatasetError("path: required by dataset spec-bench")
    return sample(questions, settings.per_task, settings.seed)


@torch.inference_mode()
def greedy_answer(
    loaded: LoadedModel, prompt: Sequence[int], max_tokens: int, eos_ids: Sequence[int]
) -> tuple[list[int], Ints]:
    """Tokens, the end id included, and the best ids at each: int32 [n, k]. Overwrites blocks 0, 1, ..."""
    room = loaded.runner.num_blocks * BLOCK_SIZE
    if len(prompt) + max_tokens > room:
        raise ValueError(f"max_prompt: prompt and answer need {len(prompt) + max_tokens} slots of {room}")
    tokens: list[int] = []
    best: list[list[int]] = []
    new, start = list(prompt), 0
    while len(tokens) < max_tokens:
        logits = loaded.runner.forward(RaggedBatch.chain(torch.tensor(new), start, 1))
        top = logits[0].topk(CANDIDATES_WANTED).indices.tolist()
        # topk may order equals in any way; the engine takes the lowest id.
        top[0] = int(logits[0].argmax())
        tokens.append(top[0])
        best.append(top)
        start += len(new)
        new = [top[0]]
        if top[0] in eos_ids:
            break
    return tokens, np.array(best, np.int32)


def chains(
    drafter: NestedDrafter, answers: Sequence[tuple[Sequence[int], Sequence[int]]], depth: int, length: int
) -> list[tuple[Ints, Floats]]:
    """For each (prompt, answer): tokens [n, L] and their confidence [n, L], see `TracedAnswer`."""
    found = [
        (np.full((len(t), length), NOTHING, np.int32), np.zeros((len(t), length), np.float32))
        for _, t in answers
    ]
    for sid, (prompt, tokens) in enumerate(answers):
        drafter.open(SessionOpen(sid, (*prompt, tokens[0]), len(prompt), DraftSampling(key=0)))
    # A first query says which layers are wanted; then prompts are read.
    drafter.propose([DraftQuery(sid, 0, 1, depth) for sid in range(len(answers))])
    while drafter.work():
        pass
    for place in range(1, max(len(t) for _, t in answers)):
        going = [sid for sid, (_, tokens) in enumerate(answers) if place < len(tokens)]
        for draft in drafter.propose([DraftQuery(sid, place, length, depth) for sid in going]):
            if draft.error is not None or not draft.token_ids:
                raise ValueError(f"exit {depth} drafted nothing: {draft.error_message or 'no room'}")
            count = len(draft.token_ids)
            found[draft.session_id][0][place, :count] = draft.token_ids
            found[draft.session_id][1][place, :count] = draft.confidence
        for sid in going:
            drafter.commit(sid, [answers[sid][1][place]])
    for sid in range(len(answers)):
        drafter.close(sid)
    return found


@torch.inference_mode()
def round_seconds(loaded: LoadedModel, repeats: int) -> dict[int, float]:
    """Seconds of a pass by rows, measured in turns as the engine measures them (`CostModel.profile`)."""
    context = max(1, min(_PROFILE_CONTEXT, loaded.info.max_model_len - PROFILED_ROWS[-1]))
    loaded.runner.forward(RaggedBatch.chain(torch.zeros(context, dtype=torch.int64)))

    def run(rows: int) -> float:
        batch = RaggedBatch.chain(torch.zeros(rows, dtype=torch.int64), context)
        started = time.perf_counter()
        loaded.runner.forward(batch).argmax(-1).tolist()
        return time.perf_counter() - started

    costs = CostModel()
    row_counts = [rows for rows in PROFILED_ROWS if context + rows <= loaded.info.max_model_len]
    costs.profile(run, row_counts, repeats)
    return costs.measured()


def step_seconds(drafter: NestedDrafter, depth: int, repeats: int) -> dict[int, float]:
    """Seconds of a step that adds a token to each of n sessions, by n; the least of `repeats`."""
    result: dict[int, float] = {}
    for count in PROFILED_SESSIONS:
        prompt = (0,) * 16
        for sid in range(count):
            drafter.open(SessionOpen(sid, prompt, len(prompt), DraftSampling(key=0)))
        queries = [DraftQuery(sid, 0, _STEP_PLACES, depth) for sid in range(count)]
        drafter.propose(queries)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            drafter.propose(queries)
            times.append((time.perf_counter() - started) / _STEP_PLACES)
        result[count] = min(times)
        for sid in range(count):
            drafter.close(sid)
    return result
