"""Where a target's drafts come from: which drafters it holds itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.drafting.interface import SessionOpen, SessionUpdate, TargetIdentity
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.placed_source import PlacedDraftSource
from actors.sampling.params import DraftSampling
from actors.text.tokenizer import TextTokenizer
from cluster.config import DraftPoolConfig, NestedDrafterConfig
from cluster.deployments.wiring import draft_source
from tests.toy_draft import toy_base, toy_draft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def pool(base: Path, artifact: Path, **fields: object) -> DraftPoolConfig:
    nested = NestedDrafterConfig(source=str(base), artifact=str(artifact), dtype="float32", kv_blocks=16)
    values = {"drafters": ("prompt_lookup", "nested"), "nested": nested, **fields}
    return DraftPoolConfig.model_validate(values)


def identity(base: Path, tokenizer_hash: str | None = None) -> TargetIdentity:
    tokenizer = TextTokenizer(base)
    return TargetIdentity("t", "m", tokenizer.vocab_size, tokenizer_hash or tokenizer.vocab_hash)


def test_a_target_with_the_drafts_tokenizer_may_hold_a_copy(base: Path, tmp_path: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    config = pool(base, tmp_path / "d.safetensors", replicas=0)
    before = torch.get_num_threads()
    threads = 2  # another number than the copy wants
    torch.set_num_threads(threads)
    source = draft_source(config, list, 4, 1, identity(base))
    assert torch.get_num_threads() == threads, "loading the copy changes nothing for the target"
    torch.set_num_threads(before)
    assert isinstance(source, LocalDraftSource)
    assert source.drafters == ("prompt_lookup", "nested")
    source.open(SessionOpen(0, (5, 6, 7), 3, DraftSampling(1)))
    source.submit([SessionUpdate(0, 1, (), 3, drafter="nested")])
    draft = source.collect({0: 1}, 1.0)[0]
    assert (draft.drafter, len(draft.token_ids), draft.error) == ("nested", 3, None)
    source.close()


def test_no_copy_where_none_is_wanted_or_none_would_fit(base: Path, tmp_path: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    config = pool(base, tmp_path / "d.safetensors", replicas=0)
    assert draft_source(config, list, 4, None, identity(base)).drafters == ("prompt_lookup",)
    assert draft_source(config, list, 4, 1, identity(base, "another")).drafters == ("prompt_lookup",)


def test_a_target_runs_none_but_the_configured_drafters_in_their_order(base: Path, tmp_path: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    for drafters, copies in (
        (("nested",), ("nested",)),
        (("nested", "token_recycling"), ("nested", "token_recycling")),
        (("prompt_lookup",), ("prompt_lookup",)),
    ):
        config = pool(base, tmp_path / "d.safetensors", replicas=0, drafters=drafters)
        source = draft_source(config, list, 4, 1, identity(base))
        assert source.drafters == copies
        assert (source.wants_candidates > 0) == ("token_recycling" in drafters)
        source.close()
    config = pool(base, tmp_path / "d.safetensors", drafters=("nested",), local_drafting=False)
    source = draft_source(config, list, 4, None, identity(base))
    assert tuple(source.drafters) == ("nested",), "a request that pins another is refused"
    source.close()


def test_with_a_pool_both_places_have_the_drafter(base: Path, tmp_path: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    source = draft_source(pool(base, tmp_path / "d.safetensors"), list, 4, 1, identity(base))
    assert isinstance(source, PlacedDraftSource)
    local = source.stats()["local"]
    assert isinstance(local, dict)
    assert local["drafters"] == ["prompt_lookup", "nested"]
    source.close()
