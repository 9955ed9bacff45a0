"""An evaluation from its settings."""

from __future__ import annotations

from collections.abc import Callable

from actors.drafting.draft_load import LoadedDraft, load_draft
from actors.models.load import load_runner
from actors.models.runner import BLOCK_SIZE
from actors.training.corpus import is_heldout
from actors.training.eval_report import markdown, write_report
from actors.training.evaluate import ANSWERS_TOGETHER, Answer, evaluate, target_seconds
from actors.training.settings import EvalSettings
from actors.training.token_store import (
    DataError,
    iter_tables,
    read_data_card,
    read_teacher,
    read_teacher_card,
    shard_path,
)


def run_evaluation(settings: EvalSettings, say: Callable[[str], None] = lambda message: None) -> str:
    """Measure, write the report, and return its table. Raises ArtifactError, DataError, ValueError."""
    answers = _answers(settings)
    longest = max(max(len(a.sequence.ids) for a in answers), settings.context + 64 + settings.repeats)
    draft = load_draft(
        settings.base,
        settings.artifact,
        exits=settings.exits,
        dtype=settings.dtype,
        kv_blocks=ANSWERS_TOGETHER * (-(-(longest + settings.max_chain) // BLOCK_SIZE) + 1),
        threads=settings.threads,
        device=settings.device,
    )
    card = read_data_card(settings.data)
    if card.tokenizer_hash != draft.tokenizer.vocab_hash:
        raise DataError(
            f"{settings.data} ({card.model}) has the tokenizer {card.tokenizer_hash[:12]}, "
            f"the draft {draft.tokenizer.vocab_hash[:12]}"
        )
    _check_states(settings, draft)
    target_s = None
    if settings.target is not None:
        loaded = load_runner(
            settings.target,
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
            kv_blocks=-(-(settings.context + settings.max_chain + 1) // BLOCK_SIZE) + 1,
            progress=say,
        )
        say(f"cost of {loaded.info.name}")
        target_s = target_seconds(loaded.runner, settings.context, settings.max_chain + 1, settings.repeats)
    reports = evaluate(
        draft,
        answers,
        max_chain=settings.max_chain,
        context=settings.context,
        draft_context=settings.draft_context,
        repeats=settings.repeats,
        target_s=target_s,
        say=say,
    )
    write_report(
        reports,
        settings.out,
        card=draft.card,
        target_s=target_s,
        settings=settings.model_dump(mode="json", exclude={"out", "data"}),
    )
    return markdown(reports)


def _answers(settings: EvalSettings) -> list[Answer]:
    found: list[Answer] = []
    for index, table in iter_tables(settings.data):
        rows = None
        if settings.states is not None:
            rows = read_teacher(shard_path(settings.states, index), table, states=True)
        for place, sequence in enumerate(table.sequences()):
            if sequence.greedy and (settings.heldout is None or is_heldout(sequence, settings.heldout)):
                found.append(Answer(sequence, None if rows is None else rows[place].states))
    if not found:
        raise DataError(f"{settings.data} holds no greedy answer to measure on")
    return found[: settings.max_sequences]


def _check_states(settings: EvalSettings, draft: LoadedDraft) -> None:
    """Raises DataError unless the states given, if any, are what the draft has learned to read."""
    if settings.states is None:
        return
    card = read_teacher_card(settings.states)
    if draft.state_in_for(card.source_hash) is None:
        known = None if draft.card is None else draft.card.states
        reads = "no states" if known is None else f"those of {known.model} ({known.source_hash[:12]})"
        raise DataError(
            f"states: {settings.states} holds those of {card.name} ({card.source_hash[:12]}), "
            f"the draft reads {reads}"
        )
