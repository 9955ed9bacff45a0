"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from actors.drafting.interface import (
    TargetIdentity,
)
from actors.drafting.remote_link import LinkOptions
from actors.drafting.remote_source import RemoteDraftSource
from actors.models.cores import Cores
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import pack
from tests.draft_rig import Worker, until


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def sources() -> Iterator[Callable[..., RemoteDraftSource]]:
    made: list[RemoteDraftSource] = []

    def make(  # type: ignore[no-untyped-def]
        address: Worker | str,
        connect: bool = True,
        vocab_size: int = 100,
        tokenizer_hash: str = "hash",
        tokenizer: TextTokenizer | None = None,
        cores: Cores = Cores(),  # noqa: B008
        **options: object,
    ):
        where = address.address if isinstance(address, Worker) else address
        source = RemoteDraftSource(
            lambda: [{"id": "worker", "address": where}],
            TargetIdentity(
                f"target-{len(made)}",
                "model",
                vocab_size,
                tokenizer.vocab_hash if tokenizer else tokenizer_hash,
                partial(pack, tokenizer) if tokenizer else None,
                cores=cores,
            ),
            LinkOptions(backoff_s=0.05, max_backoff_s=0.2, **options),  # type: ignore[arg-type]
            flush_tokens=4,
        )
        made.append(source)
        if connect:
            until(lambda: source.connected)
        return source

    yield make
    for source in made:
        source.close()
