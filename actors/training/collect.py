"""Data sets from settings: which files, which engine, what is already there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from actors.cache import cache_dir
from actors.costs import CostModel
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
from actors.engine.controller import Controller
from actors.engine.scheduler import Scheduler, SchedulerLimits
from actors.engine.speculator import DraftTimeouts, Speculator
from actors.engine.torch_engine import SpeculationDefaults, TorchEngine
from actors.kv.block_pool import BlockPool
from actors.models.convert import model_folder
from actors.models.llama_load import load_config
from actors.models.load import LoadedModel, load_runner
from actors.models.runner import BLOCK_SIZE, ModelRunner
from actors.models.source import resolve_source
from actors.sampling.grammar import GrammarMatcher
from actors.sampling.params import GrammarSpec, ParameterError
from actors.text.messages import ChatMessage
from actors.text.tokenizer import TextTokenizer
from actors.training.data_cards import data_card
from actors.training.generate import ConversationMaker
from actors.training.resident_data import collect_resident
from actors.training.settings import DataSettings, TeacherSettings
from actors.training.teacher import Teacher
from actors.training.texts import read_prompts, read_texts
from actors.training.token_store import (
    DATA_CARD,
    TEACHER_CARD,
    DataCard,
    DataError,
    TeacherCard,
    TokenSequence,
    is_teacher_of,
    iter_tables,
    read_data_card,
    read_made_of,
    read_table,
    shard_path,
    write_card,
    write_sequences,
    write_teacher,
)

Say = Callable[[str], None]
Advance = Callable[[int, int], None]
"""Called with conversations and tokens done since the last call."""
_MARGIN_BLOCKS = 8


def default_teacher_folder(data: DataCard, teacher: str) -> Path:
    """Log-probabilities are large and can be made again: they live in the user's cache."""
    return cache_dir() / "teachers" / f"{data.name}-{data.made_with[:12]}" / teacher


def generation_engine(runner: ModelRunner, batch: int, max_len: int) -> TorchEngine:
    """An engine for large batches and no drafts, ready at once: there is nothing to measure costs for."""

    def refuse(spec: GrammarSpec) -> GrammarMatcher:
        raise ParameterError("grammar", "is not served here")

    pool = BlockPool(runner.num_blocks, BLOCK_SIZE, prefix_caching=True)
    limits = SchedulerLimits(batch, max(512, 2 * batch), 256)
    source = LocalDraftSource(DrafterPool((PromptLookupDrafter(),)))
    timeouts = DraftTimeouts(0.015, 1.0)
    speculator = Speculator(source, Controller(CostModel()), timeouts, max_len, runner.info.vocab_size)
    return TorchEngine(
        runner, Scheduler(pool, limits), speculator, SpeculationDefaults(False, 0, "coupled"), max_len, refuse
    )


def collect_data(
    settings: DataSettings, say: Say = lambda message: None, advance: Advance = lambda done, tokens: None
) -> DataCard:
    """Make a data set, or what is missing of it. Raises DataError, ValueError, OSError."""
    if settings.texts:
        return _from_texts(settings, say, advance)
    if settings.resident:
        return collect_resident(settings, say, advance)
    blocks = settings.batch * (-(-settings.max_len // BLOCK_SIZE) + 1) + _MARGIN_BLOCKS
    loaded = load_runner(
        settings.source,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        kv_blocks=blocks,
        max_model_len=settings.max_len,
        progress=say,
    )
    tokenizer = TextTokenizer(loaded.tokenizer_folder)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    kind, info = "generated" if prompts is None else "answered", loaded.info
    card = data_card(settings, kind, info.name, loaded.source_hash, tokenizer, info.vocab_size)
    write_card(settings.out, DATA_CARD, card)
    teacher_out = settings.teacher_out or default_teacher_folder(card, loaded.info.name)
    if settings.teacher_top:
        write_card(teacher_out, TEACHER_CARD, _teacher_card(card, loaded, tokenizer, settings.teacher_top))
        say(f"log-probabilities go to {teacher_out}")
    engine = generation_engine(loaded.runner, settings.batch, settings.max_len)
    maker = ConversationMaker(engine, tokenizer, settings, lambda tokens: advance(0, tokens))
    total = settings.samples if prompts is None else len(prompts)
    try:
        mine, parts = settings.share
        for index, start in enumerate(range(0, total, settings.shard)):
            if index % parts != mine:
                continue
            numbers = range(start, min(start + settings.shard, total))
            target, beside = shard_path(settings.out, index), shard_path(teacher_out, index)
            if _is_made(target, prompts, numbers) and (
                not settings.teacher_top or is_teacher_of(beside, read_table(target))
            ):
                advance(len(numbers), 0)
                continue
            chosen = None if prompts is None else [prompts[n] for n in numbers]
            made = maker.make(numbers, chosen)
            sequences = [c.sequence for c in made]
            if settings.teacher_top:
                rows = [c.teacher for c in made if c.teacher is not None]
                write_teacher(beside, rows, sequences, card.vocab_size)
            # The sequences come last: a shard counts once they are there.
            write_sequences(target, sequences, card.vocab_size, _made_of(prompts, start, numbers.stop))
            advance(len(numbers), 0)
    finally:
        engine.close()
    return card


def _made_of(prompts: Sequence[Sequence[ChatMessage]] | None, start: int, end: int) -> str:
    """What a shard keeps of what it was made of: where the conversations that it was asked for end, and a
    hash of their prompts."""
    made_of: dict[str, int | str] = {"asked": end}
    if prompts is not None:
        text = json.dumps([[(m.role, m.content) for m in messages] for messages in prompts[start:end]])
        made_of["prompts"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(made_of)


def _is_made(path: Path, prompts: Sequence[Sequence[ChatMessage]] | None, numbers: range) -> bool:
    """Whether a shard is there and holds all that is asked for now. Raises DataError when it answers other
    prompts than these."""
    made_of = read_made_of(path) if path.is_file() else ""
    if not made_of:
        return False
    asked: int = json.loads(made_of)["asked"]
    if made_of != _made_of(prompts, numbers.start, asked):
        raise DataError(f"{path} answers other prompts: choose another folder")
    return asked >= numbers.stop


def _from_texts(settings: DataSettings, say: Say, advance: Advance) -> DataCard:
    """Text files need the target's tokenizer only."""
    resolved = resolve_source(settings.source)
    folder = model_folder(resolved, say)
    tokenizer = TextTokenizer(folder)
    vocab_size = load_config(folder).get_text_config().vocab_size
    card = data_card(settings, "texts", resolved.name, resolved.content_hash, tokenizer, vocab_size)
    write_card(settings.out, DATA_CARD, card)
    found = (s for path in settings.texts for s in read_texts(path, tokenizer, settings.max_len))
    for index, shard in enumerate(_chunks(found, settings.shard)):
        write_sequences(shard_path(settings.out, index), shard, card.vocab_size)
        advance(len(shard), sum(len(s.ids) for s in shard))
    return card


def _chunks(sequences: Iterator[TokenSequence], size: int) -> Iterator[list[TokenSequence]]:
    chunk: list[TokenSequence] = []
    for sequence in sequences:
        chunk.append(sequence)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def teach(
    settings: TeacherSettings, say: Say = lambda message: None, advance: Advance = lambda done, tokens: None
) -> Path:
    """Run a target over a data set and store its top log-probabilities. Those of shards that are as they were
    are kept.

    Returns the folder. Raises DataError when tokenizers differ, UnsupportedModelError for a target without
    the states that are asked for.
    """
    card = read_data_card(settings.data)
    longest = max(int(np.diff(table.starts).max(initial=1)) for _, table in iter_tables(settings.data))
    tokens = max(settings.batch_tokens, longest)
    loaded = load_runner(
        settings.source,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        kv_blocks=2 * (tokens // BLOCK_SIZE) + _MARGIN_BLOCKS,
        progress=say,
    )
    tokenizer = TextTokenizer(loaded.tokenizer_folder)
    if tokenizer.vocab_hash != card.tokenizer_hash:
        raise DataError(
            f"{settings.data} has the tokenizer {card.tokenizer_hash[:12]}, "
            f"{loaded.info.name} {tokenizer.vocab_hash[:12]}"
        )
    out = settings.out or default_teacher_folder(card, loaded.info.name)
    width = loaded.info.hidden_size if settings.states else 0
    teacher = Teacher(loaded.runner, settings.top, settings.batch_tokens, states=settings.states)
    write_card(out, TEACHER_CARD, _teacher_card(card, loaded, tokenizer, settings.top, width))
    for index, table in iter_tables(settings.data):
        if not is_teacher_of(shard_path(out, index), table):
            shard = table.sequences()
            rows = teacher.rows(shard, lambda count: advance(0, count)) if shard else []
            write_teacher(shard_path(out, index), rows, shard, card.vocab_size)
        advance(len(table), 0)
    return out


def _teacher_card(
    data: DataCard, loaded: LoadedModel, tokenizer: TextTokenizer, top: int, states: int = 0
) -> TeacherCard:
    return TeacherCard(
        name=loaded.info.name,
        source_hash=loaded.source_hash,
        tokenizer_hash=tokenizer.vocab_hash,
        top=top,
        data_hash=data.made_with,
        states=states,
    )
