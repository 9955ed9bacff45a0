"""An evaluation from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from actors.drafting.draft_load import load_draft
from actors.models.load import load_runner
from actors.models.runner import BLOCK_SIZE
from actors.training.corpus import is_heldout
from actors.training.eval_report import markdown, write_report
from actors.training.evaluate import evaluate, target_seconds
from actors.training.settings import EvalSettings
from actors.training.token_store import DataError, TokenSequence, iter_shards, read_data_card


def run_evaluation(settings: EvalSettings, say: Callable[[str], None] = lambda message: None) -> str:
    """Measure, write the report, and return its table. Raises ArtifactError, DataError, ValueError."""
    sequences = [_tail(s, settings.prompt_tail) for s in _sequences(settings)]
    longest = max(max(len(s.ids) for s in sequences), settings.context + 64 + settings.repeats)
    draft = load_draft(
        settings.base,
        settings.artifact,
        exits=settings.exits,
        dtype=settings.dtype,
        kv_blocks=2 * (-(-longest // BLOCK_SIZE)) + 8,
        threads=settings.threads,
        device=settings.device,
    )
    card = read_data_card(settings.data)
    if card.tokenizer_hash != draft.tokenizer.vocab_hash:
        raise DataError(
            f"{settings.data} ({card.model}) has the tokenizer {card.tokenizer_hash[:12]}, "
            f"the draft {draft.tokenizer.vocab_hash[:12]}"
        )
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
        sequences,
        max_chain=settings.max_chain,
        context=settings.context,
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


def _sequences(settings: EvalSettings) -> list[TokenSequence]:
    found = [
        s
        for _, shard in iter_shards(settings.data)
        for s in shard
        if s.greedy and (settings.heldout is None or is_heldout(s, settings.heldout))
    ]
    if not found:
        raise DataError(f"{settings.data} holds no greedy answer to measure on")
    return found[: settings.max_sequences]


def _tail(sequence: TokenSequence, prompt_tail: int | None) -> TokenSequence:
    """The sequence without the beginning of its prompt. Rotation is relative, so positions begin anew."""
    cut = 0 if prompt_tail is None else max(0, sequence.labels_from - prompt_tail)
    return replace(sequence, ids=sequence.ids[cut:], labels_from=sequence.labels_from - cut)
