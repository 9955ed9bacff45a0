"""The nested drafter behind the stream: configured, for other tokenizers, drafting ahead."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models

from actors.draft_worker.server import build_draft_server
from actors.drafting.interface import SessionDraft, SessionOpen
from actors.models.cores import Cores, cores_of
from actors.sampling.params import DraftSampling
from actors.text.token_table import TokenTable
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import pack
from cluster.config import DraftPoolConfig
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc
from tests.draft_rig import Worker, drafted, session, until, wish
from tests.exactness.harness import tiny_llama
from tests.toy_tokenizers import byte_fallback_folder, byte_level_folder


def test_a_configured_nested_drafter_drafts_over_the_wire(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    folder = byte_level_folder(tiny_llama(tmp_path))
    config = DraftPoolConfig.model_validate(
        {
            "drafters": ["nested", "prompt_lookup"],
            "nested": {"source": str(folder), "exits": [1, 3], "dtype": "float32", "kv_blocks": 16},
            "port_range": [0, 0],
        }
    )
    worker.run(build_draft_server(config, "worker"))
    refused = sources(worker, connect=False)
    until(lambda: "320" in str(refused.stats()["last_error"]))
    assert "100" in str(refused.stats()["last_error"])
    source = sources(worker, vocab_size=320, tokenizer_hash=TextTokenizer(folder).vocab_hash)
    source.open(session(1, [i * 7 % 320 for i in range(200)]))
    epochs = iter(range(1, 1000))
    # The prompt is absorbed in the background; until then there is nothing, or what prompt lookup finds.
    until(lambda: drafted(source, wish(1, next(epochs))).drafter == "nested")
    until(lambda: drafted(source, wish(1, next(epochs), exit_depth=3)).drafter == "nested")
    deep = drafted(source, wish(1, next(epochs), budget=4, exit_depth=3))
    assert (len(deep.token_ids), deep.exit_depth, len(deep.confidence)) == (4, 3, 4)
    again = drafted(source, wish(1, next(epochs), deep.token_ids[:2], budget=2, exit_depth=3))
    assert again.token_ids == deep.token_ids[2:]
    assert worker.server is not None
    assert worker.server.state.kv_blocks_used == 7
    source.close_session(1)
    until(lambda: worker.server is not None and worker.server.state.kv_blocks_used == 0)


def nested_pool(folder: Path) -> DraftPoolConfig:
    return DraftPoolConfig.model_validate(
        {
            "drafters": ["nested"],
            "nested": {"source": str(folder), "exits": [1, 3], "dtype": "float32", "kv_blocks": 64},
            "port_range": [0, 0],
        }
    )


@pytest.mark.parametrize("ahead", [None, True, False])
def test_drafts_are_prepared_while_a_target_on_other_cores_verifies(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path, ahead: bool | None
) -> None:
    folder = byte_level_folder(tiny_llama(tmp_path))
    config = nested_pool(folder).model_copy(update={"draft_ahead": ahead})
    worker.run(build_draft_server(config, "worker"))
    vocabulary = {"vocab_size": 320, "tokenizer_hash": TextTokenizer(folder).vocab_hash}
    assert worker.server is not None
    for cores, wanted in ((cores_of("cpu"), ahead is True), (Cores("elsewhere"), ahead is not False)):
        source = sources(worker, cores=cores, **vocabulary)
        source.open(SessionOpen(1, (5, 6, 7), 3, DraftSampling(key=5)))
        before = worker.server.state
        draft = drafted(source, wish(1, 1, budget=3))
        longer = drafted(source, wish(1, 2, budget=5))
        assert longer.token_ids[:3] == draft.token_ids
        draft = drafted(source, wish(1, 3, budget=3))
        if wanted:
            until(lambda: worker.server.state.ahead.steps > before.ahead.steps)  # type: ignore[union-attr]  # noqa: B023
        again = drafted(source, wish(1, 4, longer.token_ids[:4], budget=1))
        assert again.token_ids == longer.token_ids[4:]
        after = worker.server.state.ahead
        assert (after.foreseen > before.ahead.foreseen) == wanted
        assert (after.steps > before.ahead.steps) == wanted
        source.close()


def test_a_target_of_another_tokenizer_sends_it_and_is_drafted_for(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    draft = byte_level_folder(tiny_llama(tmp_path / "draft"))
    target = TextTokenizer(byte_fallback_folder(tmp_path / "target"))
    worker.run(build_draft_server(nested_pool(draft), "worker"))
    unknown = sources(worker, connect=False, vocab_size=299, tokenizer_hash=target.vocab_hash)
    until(lambda: "NOT_FOUND" in str(unknown.stats()["last_error"]))
    assert all(size in str(unknown.stats()["last_error"]) for size in ("299", "320"))

    source = sources(worker, vocab_size=target.vocab_size, tokenizer=target)
    again = sources(worker, vocab_size=target.vocab_size, tokenizer_hash=target.vocab_hash)
    assert again.connected, "the worker keeps the tokenizer"
    for sid, sampling in ((1, DraftSampling(key=5)), (2, DraftSampling(key=5, temperature=1.0))):
        prompt = target.encode("the end of the day " * 20)
        source.open(SessionOpen(sid, tuple(prompt), len(prompt), sampling))
        # A draft with random weights often guesses bytes that are no text: then there is no draft.
        epochs = iter(range(1, 1000))
        proposals: list[SessionDraft] = []

        def nested() -> bool:
            update = wish(sid, next(epochs), prompt[:1], budget=6)  # noqa: B023
            proposals.append(drafted(source, update))  # noqa: B023
            return sum(p.drafter == "nested" for p in proposals) >= 3  # noqa: B023

        until(nested)
        assert all(p.error is None for p in proposals)
        ids = {i for p in proposals for i in p.token_ids}
        assert max(ids) < target.vocab_size
        assert not ids & target.special_ids - set(target.eos_token_ids)


def test_a_target_padded_beyond_the_draft_is_served(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    folder = byte_level_folder(tiny_llama(tmp_path))
    worker.run(build_draft_server(nested_pool(folder), "worker"))
    source = sources(worker, vocab_size=512, tokenizer_hash=TextTokenizer(folder).vocab_hash)
    source.open(session(1, [5, 6, 7]))
    assert len(drafted(source, wish(1, 1)).token_ids) == 2
    source.open(session(2, [5, 400]))
    refused = drafted(source, wish(2, 1))
    assert (refused.error, refused.token_ids) == ("unsupported", ())
    assert "400" in refused.error_message
    assert "320" in refused.error_message


def chunks(tokenizer: TextTokenizer, **changes: object) -> list[pb.TokenizerChunk]:
    file = pack(tokenizer)
    fields = {"tokenizer_hash": file.vocab_hash, "vocab_size": tokenizer.vocab_size, "data": file.packed}
    return [pb.TokenizerChunk(**{**fields, **changes})]  # type: ignore[arg-type]


async def test_tokenizers_that_cannot_be_used_are_refused(worker: Worker, tmp_path: Path) -> None:
    draft = byte_level_folder(tiny_llama(tmp_path / "draft"))
    target = TextTokenizer(byte_fallback_folder(tmp_path / "target"))
    greek = Tokenizer(models.BPE(vocab={"αβγ": 0, "δεζ": 1}, merges=[]))
    greek.decoder = decoders.Fuse()
    stranger = pack(TokenTable(greek))
    worker.run(build_draft_server(nested_pool(draft), "worker"))
    packed = pack(target).packed
    huge = [pb.TokenizerChunk(data=b"\0" * (17 << 20))] * 2
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = pb_grpc.DraftServiceStub(channel)
        for sent, code, words in (
            (chunks(target, tokenizer_hash="0" * 64), grpc.StatusCode.INVALID_ARGUMENT, ("0" * 12,)),
            (chunks(target, data=packed[:-9]), grpc.StatusCode.INVALID_ARGUMENT, ("cut short",)),
            (chunks(target, data=b"nonsense"), grpc.StatusCode.INVALID_ARGUMENT, ("unpacked",)),
            ([], grpc.StatusCode.INVALID_ARGUMENT, ("no tokenizer",)),
            (huge, grpc.StatusCode.INVALID_ARGUMENT, ("more than",)),
            (
                [pb.TokenizerChunk(tokenizer_hash=stranger.vocab_hash, vocab_size=7, data=stranger.packed)],
                grpc.StatusCode.FAILED_PRECONDITION,
                ("7 tokens", "320"),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SendTokenizer(iter(sent))
            assert caught.value.code() == code
            assert all(word in str(caught.value.details()) for word in words)
        call = stub.Draft()  # the refusal is remembered
        await call.write(pb.DraftRound(hello=pb.Hello(vocab_size=7, tokenizer_hash=stranger.vocab_hash)))
        assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
        receipt = await stub.SendTokenizer(iter(chunks(target)))
        assert receipt.draft_vocab_size == 320
        assert 256 <= receipt.shared_tokens <= target.vocab_size
