"""LoRA adapters: merged into any precision, refused with both names, found beside the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from actors.models.adapter import adapted
from actors.models.load import Backend, DTypeName, load_runner
from actors.models.runner import RaggedBatch
from actors.models.source import ModelSourceError, resolve_source
from cluster.config import ClusterConfig
from tests.exactness.harness import tiny_llama

IDS = torch.tensor([5, 17, 200, 3, 9, 44])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tied"), tied=True)


def make_adapter(base: Path, folder: Path, targets: Sequence[str] = ("q_proj", "v_proj")) -> Path:
    torch.manual_seed(4)
    model = LlamaForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    for name, weights in wrapped.named_parameters():
        # Zero to begin with: an adapter that changes nothing.
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(weights, std=0.3)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "mine")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def logits(
    base: Path, adapter: Path | None, dtype: DTypeName = "float32", backend: Backend = "auto"
) -> torch.Tensor:
    loaded = load_runner(
        str(base),
        adapter=None if adapter is None else str(adapter),
        dtype=dtype,
        backend=backend,
        kv_blocks=8,
        threads=1,
    )
    return loaded.runner.forward(RaggedBatch.chain(IDS))


@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        (False, ["q_proj", "v_proj"]),
        (True, ["q_proj", "v_proj"]),
        (True, ["q_proj", "lm_head"]),
        (True, ["embed_tokens"]),
        (True, ["embed_tokens", "lm_head"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else ("apart", "tied")[value],
)
def test_a_merged_model_is_what_peft_computes(
    tied: bool, targets: list[str], base: Path, tied_base: Path, tmp_path: Path
) -> None:
    base = tied_base if tied else base
    adapter = make_adapter(base, tmp_path / "mine", targets)
    whole = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    with torch.inference_mode():
        expected = whole(IDS[None]).logits[0]
    plain, merged = logits(base, None), logits(base, adapter)
    assert torch.allclose(merged, expected, atol=1e-3)
    assert torch.allclose(logits(base, adapter, backend="generic"), expected, atol=1e-3)
    assert not torch.allclose(merged, plain, atol=0.1)
    dtypes: tuple[DTypeName, ...] = ("bfloat16", "int8")
    for dtype in dtypes:
        assert (logits(base, adapter, dtype) - merged).abs().max() < 0.2 * merged.abs().max()


def test_a_head_of_its_own_only_where_it_has_to_be(tied_base: Path, tmp_path: Path) -> None:
    source = resolve_source(str(tied_base))
    for target, tied in (("q_proj", True), ("lm_head", False), ("embed_tokens", False)):
        made = adapted(source, tied_base, str(make_adapter(tied_base, tmp_path / target, [target])))
        assert LlamaConfig.from_pretrained(made.path).tie_word_embeddings is tied


def test_merging_happens_once_and_the_result_has_a_name_and_a_hash_of_its_own(
    base: Path, adapter: Path
) -> None:
    source = resolve_source(str(base))
    said: list[str] = []
    first = adapted(source, base, str(adapter), said.append)
    again = adapted(source, base, str(adapter), said.append)
    assert first == again
    assert len(said) == 1
    assert first.name == f"{base.name}+mine"
    assert first.content_hash != source.content_hash


def test_what_does_not_fit_is_said_with_both_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="no such folder"):
        logits(base, tmp_path / "nowhere")
    with pytest.raises(ModelSourceError, match=r"holds no adapter_config\.json"):
        logits(base, base)
    other = tiny_llama(tmp_path / "other", layers=2)
    deeper = make_adapter(base, tmp_path / "deeper")
    with pytest.raises(ModelSourceError, match=r"deeper.* does not fit other"):
        logits(other, deeper)


def test_an_adapter_is_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [{name: a, source: x, adapter: mine}, {name: b, source: x, adapter: org/other}]")
    first, second = ClusterConfig.from_yaml(file).models
    assert first.adapter == str((tmp_path / "mine").resolve())
    assert second.adapter == "org/other", "a hub id"
