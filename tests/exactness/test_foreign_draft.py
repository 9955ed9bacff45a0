"""A draft of another tokenizer never changes what a target emits, and guesses by the target's own noise."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from actors.drafting.foreign import ForeignTarget, foreign_target
from actors.drafting.interface import SessionOpen
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.retokenised import RetokenisedDrafter
from actors.drafting.selector import DrafterPool
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.text.token_table import TokenTable
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import copy
from actors.text.vocabulary_pair import Vocabulary, VocabularyPair
from tests.exactness.harness import Result, make_engine, run, tiny_llama, torch_runner
from tests.toy_tokenizers import byte_fallback_folder, byte_level_folder

OFF = SpeculationParams(enabled=False)
VOCAB = 320
LETTERS = [chr(i) for i in range(32, 127)] + ["é"]


class ForeignSource(LocalDraftSource):
    """Every session is a foreign target's, as on a stream that said so."""

    def __init__(self, pool: DrafterPool, foreign: ForeignTarget) -> None:
        super().__init__(pool)
        self._target = foreign

    def open(self, session: SessionOpen) -> None:
        super().open(dataclasses.replace(session, foreign=self._target))


def foreign_engine(target: Path, draft: Path, pair: VocabularyPair, exits: tuple[int, ...]) -> TorchEngine:
    nested = RetokenisedDrafter(NestedDrafter(torch_runner(draft), exits), pair.draft.size)
    pool = DrafterPool([nested, PromptLookupDrafter()])
    return make_engine(torch_runner(target), source=ForeignSource(pool, foreign_target(pair)))


def forced(length: int) -> SpeculationParams:
    return SpeculationParams(max_draft_tokens=length, force=True, drafter="nested")


def request(name: str, prompt: tuple[int, ...], length: int = 4, **sampling: object) -> EngineRequest:
    fields = {"max_tokens": 40, "temperature": 0.0, **sampling}
    return EngineRequest(name, prompt, SamplingParams(**fields), forced(length))  # type: ignore[arg-type]


def solo(engine: TorchEngine, one: EngineRequest) -> Result:
    return run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]


@pytest.fixture(scope="module", params=["pieces for bytes", "bytes for pieces"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    """Random models with unrelated tokenizers; ids past a tokenizer's are padding, and are emitted too."""
    root = tmp_path_factory.mktemp("two")
    target, draft = tiny_llama(root / "target", vocab=VOCAB), tiny_llama(root / "draft", seed=1, vocab=VOCAB)
    make = [byte_level_folder, byte_fallback_folder]
    if request.param == "bytes for pieces":
        make.reverse()
    theirs, ours = TextTokenizer(make[0](target)), TextTokenizer(make[1](draft))
    pair = VocabularyPair(Vocabulary(copy(ours), VOCAB), Vocabulary(copy(theirs), VOCAB))
    engine = foreign_engine(target, draft, pair, (1, 3))
    yield engine
    engine.close()


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 150))) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 4, 8])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "seed": -4}]
)
def test_drafts_of_another_tokenizer_change_nothing(
    two: TorchEngine, length: int, sampling: dict[str, object]
) -> None:
    batch = [request(f"r{i}", p, length, **sampling) for i, p in enumerate(prompts(6, seed=length))]
    together = run(two, batch, arrive_every=2)
    for one in batch:
        assert together[one.request_id].token_ids == solo(two, one).token_ids
    assert sum(r.drafted for r in together.values()) > 0


def letters(order: list[int]) -> TokenTable:
    """One token a character, in some order of ids: a text has only one tokenisation."""
    backend = Tokenizer(models.BPE(vocab={LETTERS[c]: i for i, c in enumerate(order)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return TokenTable(backend)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, VocabularyPair]:
    """A target, and the same model with its vocabulary shuffled: a draft that is always right, provided that
    contexts, positions and noise cross correctly."""
    root = tmp_path_factory.mktemp("twin")
    target = tiny_llama(root / "target", vocab=len(LETTERS))
    draft = tiny_llama(root / "draft", vocab=len(LETTERS))
    order = list(range(len(LETTERS)))
    random.Random(0).shuffle(order)
    tensors = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][torch.tensor(order)].contiguous()
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})
    ours, theirs = letters(order), letters(list(range(len(LETTERS))))
    assert ours.vocab_hash != theirs.vocab_hash
    return target, draft, VocabularyPair(Vocabulary(ours, len(LETTERS)), Vocabulary(theirs, len(LETTERS)))


@pytest.mark.parametrize(
    ("rule", "sampling"),
    [
        ("coupled", {}),
        ("coupled", {"temperature": 1.0, "seed": 3}),
        ("coupled", {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 8}),
        ("leviathan", {"temperature": 1.0, "top_k": 40, "seed": 5}),
    ],
)
def test_a_shuffled_twin_is_always_right(
    twin: tuple[Path, Path, VocabularyPair], rule: str, sampling: dict[str, object]
) -> None:
    target, draft, pair = twin
    engine = foreign_engine(target, draft, pair, (4,))
    try:
        prompt = tuple(random.Random(2).randrange(len(LETTERS)) for _ in range(100))
        one = request("twin", prompt, 5, **{"max_tokens": 150, **sampling})
        one = dataclasses.replace(one, speculation=dataclasses.replace(forced(5), verification=rule))
        result = run(engine, [one])["twin"]
        assert len(result.token_ids) == 150
        assert result.drafted > 80
        assert result.accepted == result.drafted
        if rule == "coupled":
            assert result.token_ids == solo(engine, one).token_ids
    finally:
        engine.close()
