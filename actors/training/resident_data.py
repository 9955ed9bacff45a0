"""`s2d draft data --resident`: a data set made by `ResidentTalk`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from actors.models.convert import model_folder
from actors.models.llama_load import load_llama_weights
from actors.models.load import choose_device
from actors.models.source import resolve_source
from actors.models.threads import physical_cores
from actors.text.chat_template import render
from actors.text.tokenizer import TextTokenizer
from actors.training.data_cards import data_card
from actors.training.generate import user_turn
from actors.training.resident import Finished, Pace, ResidentTalk, Script, talk
from actors.training.settings import DataSettings
from actors.training.texts import read_prompts
from actors.training.token_store import (
    DATA_CARD,
    DataCard,
    DataError,
    SequenceTable,
    id_type,
    read_table,
    shard_count,
    shard_path,
    write_card,
    write_table,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARDS_AT_MOST = 1 << 20
"""Seeds of one data set, a shard each at which it may be continued."""


def collect_resident(
    settings: DataSettings, say: Callable[[str], None], advance: Callable[[int, int], None]
) -> DataCard:
    """Make a data set, or what is missing of it. Raises DataError, ValueError, OSError."""
    torch.set_num_threads(settings.threads or physical_cores())
    device = choose_device(settings.device)
    resolved = resolve_source(settings.source)
    folder = model_folder(resolved, say)
    weights, _ = load_llama_weights(folder, DTYPES[settings.dtype], device)
    tokenizer = TextTokenizer(folder)
    kind = "generated" if settings.prompts is None else "answered"
    card = data_card(settings, kind, resolved.name, resolved.content_hash, tokenizer, weights.embed.shape[0])
    write_card(settings.out, DATA_CARD, card)
    done = shard_count(settings.out)
    earlier = [read_table(shard_path(settings.out, index)) for index in range(done)]
    made_before = sum(map(len, earlier))
    advance(made_before, 0)
    prompts: tuple[tuple[int, ...], ...] = ()
    if settings.prompts is None:
        wanted = settings.samples - made_before
    else:
        answered = {s.ids[: s.labels_from] for table in earlier for s in table.sequences()}
        given = _prompts(settings.prompts, settings, tokenizer)
        if answered.difference(given):
            raise DataError(
                f"{settings.out} answers prompts that {settings.prompts} lacks: choose another folder"
            )
        prompts = tuple(p for p in given if p not in answered)
        wanted = len(prompts)
    if wanted <= 0:
        return card
    turn = user_turn(tokenizer)
    script = Script(prompts, turn.before, turn.ends, turn.header, tuple(tokenizer.eos_token_ids))
    pace = Pace(
        turn_temperature=settings.prompt_temperature,
        answer_temperature=settings.answer_temperature,
        greedy_share=settings.greedy_share,
        turn_tokens=settings.prompt_tokens,
    )
    # What continues a data set must not repeat it.
    torch.manual_seed(settings.seed * SHARDS_AT_MOST + done)
    say(f"{settings.batch} conversations at a time on {device}")
    run = ResidentTalk(weights, script, pace, settings.batch, settings.max_len)
    waiting: list[Finished] = []

    def store(made: list[Finished], last: bool) -> None:
        nonlocal done
        waiting.extend(made)
        while len(waiting) >= settings.shard or (last and waiting):
            table = _table(waiting[: settings.shard], card.vocab_size)
            write_table(shard_path(settings.out, done), table)
            del waiting[: settings.shard]
            done += 1

    for made, tokens in talk(run, wanted):
        advance(len(made), tokens)
        store(made, False)
    store([], True)
    return card


def _table(made: list[Finished], vocab_size: int) -> SequenceTable:
    return SequenceTable(
        np.concatenate([f.ids for f in made]).astype(id_type(vocab_size)),
        np.cumsum([0, *(len(f.ids) for f in made)], dtype=np.int64),
        np.array([f.labels_from for f in made], dtype=np.int32),
        np.array([f.greedy for f in made], dtype=np.bool_),
    )


def _prompts(path: Path, settings: DataSettings, tokenizer: TextTokenizer) -> list[tuple[int, ...]]:
    """Given prompts as ids, those that leave room for an answer."""
    prompts = [tuple(render(tokenizer, messages)) for messages in read_prompts(path)]
    kept = [ids for ids in prompts if len(ids) + 2 <= settings.max_len]
    if not kept:
        raise DataError(f"{path}: no prompt leaves room within {settings.max_len} tokens")
    return kept
