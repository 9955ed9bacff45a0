"""Every runner against transformers' own forward pass, on tiny random models."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from actors.models.generic import GenericRunner, PackedLinear, load_generic
from actors.models.llama_load import UnsupportedModelError
from actors.models.load import GIB, LoadedModel, load_runner, native_unavailable_reason
from actors.models.runner import BLOCK_SIZE, LayeredRunner, ModelRunner, RaggedBatch
from actors.native.library import available as native_available

VOCAB = 97
TABLES = torch.randperm(24, generator=torch.Generator().manual_seed(7)).int().view(6, 4)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def rope(kind: str, **values: float | list[float]) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


LLAMA_FAMILY: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**BASE),
    "llama_tied": lambda: hf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "llama3_rope": lambda: hf.LlamaConfig(
        **BASE, head_dim=16,
        rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32),
    ),
    "linear_rope": lambda: hf.LlamaConfig(**BASE, rope_parameters=rope("linear", factor=4.0)),
    "qwen2_yarn": lambda: hf.Qwen2Config(
        **BASE, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**BASE, sliding_window=None),
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=4, n_head=4, n_positions=128, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    "gemma2": lambda: hf.Gemma2Config(
        **BASE, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **BASE, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(  # heads of two sizes, layers that share keys and values
        **BASE, head_dim=16, global_head_dim=32, sliding_window=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    ),
    "phi3": lambda: hf.Phi3Config(**BASE),
    "phi3_longrope": lambda: hf.Phi3Config(
        **BASE, original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=[1.0] * 6, long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
                             original_max_position_embeddings=16),
    ),
    "mistral_window": lambda: hf.MistralConfig(**BASE, sliding_window=8),
    "phimoe_window": lambda: hf.PhimoeConfig(**BASE, num_local_experts=4, sliding_window=30),
    "gpt_oss": lambda: hf.GptOssConfig(
        **BASE, head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters=rope("default"),
    ),
}  # fmt: skip


def phimoe_longrope(**values: Any) -> Any:
    return hf.PhimoeConfig(
        **BASE, num_local_experts=4,
        rope_parameters=rope("longrope", short_factor=[1.0] * 6, long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
                             original_max_position_embeddings=16, short_mscale=1.0, long_mscale=1.0) | values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by name, saved on first use."""
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            config = (LLAMA_FAMILY | OTHERS | {"phimoe_longrope": phimoe_longrope})[name]()
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # biases, norms and sinks start at trivial values
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            saved[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(saved[name])
        return saved[name]

    return get


def load(folder: Path, backend: Any, dtype: Any = "float32", **options: Any) -> LoadedModel:
    return load_runner(
        str(folder), dtype=dtype, backend=backend, device="cpu", kv_blocks=24, threads=1, **options
    )


def reference(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [len, V] of transformers' plain forward; bfloat16 rounds the weights, arithmetic is float32."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def make_batch(parts: Sequence[tuple[int, torch.Tensor, int]]) -> RaggedBatch:
    """parts: (sequence, its new tokens, KV entries before them)."""
    sizes = torch.tensor([len(ids) for _, ids, _ in parts])
    total = int(sizes.sum())
    return RaggedBatch(
        token_ids=torch.cat([ids for _, ids, _ in parts]),
        positions=torch.cat([torch.arange(start, start + len(ids)) for _, ids, start in parts]),
        query_start=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        context_lens=torch.tensor([start + len(ids) for _, ids, start in parts]),
        block_tables=TABLES[[sequence for sequence, _, _ in parts]],
        logit_rows=torch.arange(total),
    )


def random_ids(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def run_in_steps(
    runner: ModelRunner, sequences: Sequence[torch.Tensor], steps: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Feed steps[i][s] tokens of sequence s in pass i, then the rest; all logits by sequence."""
    done, logits = [0] * len(sequences), [[] for _ in sequences]  # type: ignore[var-annotated]
    for step in [*steps, [10**6] * len(sequences)]:
        parts = []
        for s, wish in enumerate(step):
            new = sequences[s][done[s] : done[s] + wish]
            if len(new):
                parts.append((s, new, done[s]))
        if not parts:
            continue
        out = runner.forward(make_batch(parts))
        for (s, new, _), rows in zip(parts, out.split([len(new) for _, new, _ in parts]), strict=True):
            logits[s].append(rows)
            done[s] += len(new)
    return [torch.cat(rows) for rows in logits]


CASES = [("torch", name) for name in LLAMA_FAMILY] + [("generic", name) for name in ["qwen2_yarn", *OTHERS]]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_ragged_chunks_equal_the_plain_forward(
    backend: str, name: str, folders: Callable[[str], Path]
) -> None:
    folder = folders(name)
    runner = load(folder, backend).runner
    sequences = random_ids(70, 33, 20, 1)
    steps = [[20, 0, 3, 1], [1, 30, 4, 0], [25, 1, 1, 0], [1, 1, 5, 0], [17, 1, 0, 0]]
    for ids, ours in zip(sequences, run_in_steps(runner, sequences, steps), strict=True):
        if name == "phi3_longrope" and len(ids) <= 16:
            continue  # transformers turns short calls by the short factors; we always by those of the limit
        torch.testing.assert_close(ours, reference(folder, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "name"), [("torch", "llama"), ("torch", "qwen3"), ("generic", "gemma2")])
def test_bfloat16_is_close_and_its_logits_are_not_rounded(
    backend: str, name: str, folders: Callable[[str], Path]
) -> None:
    folder = folders(name)
    loaded = load(folder, backend, "bfloat16")
    assert loaded.info.dtype == torch.bfloat16
    (ids,) = random_ids(40)
    ours = run_in_steps(loaded.runner, [ids], [[16], [1], [4]])[0]
    expected = reference(folder, ids, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert float((ours - expected).std() / expected.std()) < 0.03
    assert not torch.equal(ours, ours.bfloat16().float())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("backend", "name"), [("torch", "qwen2_yarn"), ("generic", "gemma2"), ("auto", "llama")]
)
def test_int8_is_close(
    backend: str,
    name: str,
    compiled: bool,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr("actors.models.linear.native_available", lambda: False)
        monkeypatch.setattr("actors.native.library.unavailable_reason", lambda: "not built")
    folder = folders(name)
    loaded = load(folder, backend, "int8")
    assert (loaded.info.dtype, loaded.info.dtype_name) == (torch.bfloat16, "int8")
    assert compiled or loaded.backend != "native"
    (ids,) = random_ids(40)
    ours = run_in_steps(loaded.runner, [ids], [[16], [1], [4]])[0]
    expected = reference(folder, ids, torch.bfloat16)
    assert float((ours - expected).std() / expected.std()) < 0.06


@pytest.mark.skipif(not native_available(), reason="needs the compiled core")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_layers_of_any_architecture_are_products_of_the_core(
    dtype: Literal["bfloat16", "float32"], folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row-invariant, and the logits are those of torch's own products up to rounding."""
    folder = folders("gemma2")
    runner = load(folder, "generic", dtype).runner
    assert isinstance(runner, GenericRunner)
    model = runner.model.model
    assert not [m for m in model.modules() if type(m) is torch.nn.Linear]
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 7 * BASE["num_hidden_layers"]
    gate = model.model.layers[0].mlp.gate_proj
    x = torch.randn(9, BASE["hidden_size"]).to(runner.info.dtype)
    assert torch.equal(gate(x)[3:4], gate(x[3:4]))
    (ids,) = random_ids(40)
    ours = run_in_steps(runner, [ids], [[16], [1], [4]])[0]
    monkeypatch.setattr("actors.models.generic.native_available", lambda: False)
    theirs = run_in_steps(load(folder, "generic", dtype).runner, [ids], [[16], [1], [4]])[0]
    assert float((ours - theirs).std() / theirs.std()) < (0.03 if dtype == "bfloat16" else 1e-5)


def test_code_that_reads_the_weights_of_a_linear_layer_keeps_it(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return torch.nn.functional.linear(hidden, self.down_proj.weight)

    folder = folders("gemma2")
    (ids,) = random_ids(20)
    expected = reference(folder, ids)
    monkeypatch.setattr(hf.models.gemma2.modeling_gemma2.Gemma2MLP, "forward", forward)
    runner = load(folder, "generic").runner
    torch.testing.assert_close(run_in_steps(runner, [ids], [[16]])[0], expected, atol=1e-4, rtol=1e-4)


def test_int8_needs_linear_layers(folders: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="no linear layers"):
        load(folders("gpt2"), "generic", "int8")


@pytest.fixture(scope="module")
def schedule_case(
    folders: Callable[[str], Path],
) -> tuple[ModelRunner, list[torch.Tensor], list[torch.Tensor]]:
    sequences = random_ids(60, 40, 25)
    expected = [reference(folders("llama"), ids) for ids in sequences]
    return load(folders("llama"), "torch").runner, sequences, expected


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_logits(
    data: st.DataObject, schedule_case: tuple[ModelRunner, list[torch.Tensor], list[torch.Tensor]]
) -> None:
    runner, sequences, expected = schedule_case  # the pool keeps what earlier examples wrote, as in service
    steps = data.draw(st.lists(st.lists(st.integers(0, 24), min_size=3, max_size=3), max_size=6))
    for ours, theirs in zip(run_in_steps(runner, sequences, steps), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_layer_ranges_equal_forward_bit_for_bit(name: str, folders: Callable[[str], Path]) -> None:
    runner: LayeredRunner = load(folders(name), "torch").runner  # type: ignore[assignment]
    batch = make_batch([(0, random_ids(20)[0], 0), (1, random_ids(5)[0], 0)])
    batch.logit_rows = torch.tensor([19, 24])
    whole = runner.forward(batch)
    embedded = runner.embed(batch.token_ids)
    kept = embedded.clone()
    hidden = runner.run_layers(runner.run_layers(embedded, 0, 1, batch), 1, 4, batch)
    assert torch.equal(runner.logits(hidden[batch.logit_rows]), whole)
    assert torch.equal(embedded, kept)
    with pytest.raises(ValueError, match="layers"):
        runner.run_layers(hidden, 2, 5, batch)


@pytest.mark.parametrize(
    ("backend", "name"), [("torch", "llama"), ("auto", "llama"), ("generic", "gpt2"), ("generic", "gemma3")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_chunk_of_a_prompt_may_ask_for_no_logits(
    backend: str, name: str, dtype: str, folders: Callable[[str], Path]
) -> None:
    if (backend, dtype) == ("generic", "int8") and name == "gpt2":
        pytest.skip("its layers are no linear ones")
    runner = load(folders(name), backend, dtype).runner
    (ids,) = random_ids(20)
    with_logits, without = make_batch([(0, ids[:12], 0)]), make_batch([(1, ids[:12], 0)])
    without.logit_rows = torch.zeros(0, dtype=torch.int64)
    width = runner.forward(with_logits).shape[1]
    assert runner.forward(without).shape == (0, width)
    expected, rest = (runner.forward(make_batch([(s, ids[12:], 12)])) for s in (0, 1))
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-5)


def test_the_first_layers_alone(folders: Callable[[str], Path]) -> None:
    whole: LayeredRunner = load(folders("llama"), "torch").runner  # type: ignore[assignment]
    cut: LayeredRunner = load(folders("llama"), "torch", num_layers=2).runner  # type: ignore[assignment]
    batch = make_batch([(0, random_ids(20)[0], 0)])
    expected = whole.logits(whole.run_layers(whole.embed(batch.token_ids), 0, 2, batch))
    assert cut.info.num_layers == 2
    assert torch.equal(cut.forward(batch), expected)


@pytest.mark.parametrize(
    ("backend", "name"), [("torch", "llama"), ("generic", "gemma3"), ("generic", "gpt_oss")]
)
def test_a_tree_equals_its_paths_and_accepted_slots_can_be_copied(
    backend: str, name: str, folders: Callable[[str], Path]
) -> None:
    folder = folders(name)
    runner = load(folder, backend).runner
    prefix, draft, after, other = random_ids(30, 6, 3, 11)
    runner.forward(make_batch([(0, prefix, 0), (1, other[:9], 0)]))
    # Token 0 follows the prefix; 1 and 2 are its children; 3 and 4 follow 2; 5 is a second root.
    parents, depths = [-1, 0, 0, 2, 2, -1], [0, 1, 1, 2, 2, 0]
    tree = make_batch([(1, other[9:], 9), (0, draft, 30)])
    tree.positions = torch.tensor([9, 10, *(30 + d for d in depths)])
    tree.parents = torch.tensor([-1, 0, *(p if p < 0 else p + 2 for p in parents)])
    logits = runner.forward(tree)
    torch.testing.assert_close(logits[:2], reference(folder, other)[9:], atol=1e-4, rtol=1e-4)
    for token, parent in enumerate(parents):
        path = [token]
        while parent >= 0:
            path.insert(0, parent)
            parent = parents[parent]
        expected = reference(folder, torch.cat([prefix, draft[path]]))[-1]
        torch.testing.assert_close(logits[2 + token], expected, atol=1e-4, rtol=1e-4)

    def slots(*entries: int) -> torch.Tensor:
        return torch.tensor([int(TABLES[0, e // BLOCK_SIZE]) * BLOCK_SIZE + e % BLOCK_SIZE for e in entries])

    runner.copy_slots(slots(30, 32, 34), slots(30, 31, 32))  # accept 0, 2, 4
    continued = runner.forward(make_batch([(0, after, 33)]))
    expected = reference(folder, torch.cat([prefix, draft[[0, 2, 4]], after]))[33:]
    torch.testing.assert_close(continued, expected, atol=1e-4, rtol=1e-4)


def test_rollback_overwrites_rejected_slots(folders: Callable[[str], Path]) -> None:
    runner = load(folders("llama"), "torch").runner
    prefix, wrong, right = random_ids(31, 8, 4)
    runner.forward(make_batch([(0, prefix, 0)]))
    runner.forward(make_batch([(0, wrong, 31)]))
    ours = runner.forward(make_batch([(0, right, 31)]))
    expected = reference(folders("llama"), torch.cat([prefix, right]))[31:]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_longrope_does_not_depend_on_the_batch(folders: Callable[[str], Path]) -> None:
    # Long factors, short factors; PhiMoE turns every token anew and is refused where it needs long ones.
    for name, limit in (("phi3_longrope", 128), ("phi3_longrope", 16), ("phimoe_longrope", 16)):
        runner = load(folders(name), "generic", max_model_len=limit).runner
        short, long = random_ids(8, limit)
        alone = runner.forward(make_batch([(0, short, 0)]))
        beside = runner.forward(make_batch([(0, short, 0), (1, long, 0)]))[: len(short)]
        torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


def test_rows_that_depend_on_the_longest_position_of_a_batch_are_refused(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = hf.models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding
    own = rotary.forward

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = 2.0 if int(position_ids.max()) >= 100 else 1.0
        return tuple(scale * turn for turn in own(self, x, position_ids))

    monkeypatch.setattr(rotary, "forward", forward)
    assert load(folders("gemma2"), "generic", max_model_len=100).info.max_model_len == 100
    with pytest.raises(UnsupportedModelError, match="does not reproduce"):
        load(folders("gemma2"), "generic")


@pytest.mark.parametrize("backend", ["torch", "generic"])
def test_a_stored_head_that_differs_is_not_tied(
    backend: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """What merging a changed head into a tied model leaves, when the configuration still says tied."""
    shutil.copytree(folders("llama_tied"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (ids,) = random_ids(20)
    ours = load(tmp_path, backend).runner.forward(make_batch([(0, ids, 0)]))
    torch.testing.assert_close(ours, reference(tmp_path, ids), atol=1e-4, rtol=1e-4)
    tied = reference(folders("llama_tied"), ids)
    assert not torch.allclose(ours, tied, atol=0.1)


def test_sliding_windows_matter_in_this_suite(folders: Callable[[str], Path]) -> None:
    """Guards the suite: the tiny windowed models really differ from full attention."""
    (ids,) = random_ids(40)
    for name in ("gemma2", "gemma3", "mistral_window", "gpt_oss", "phimoe_window"):
        model = hf.AutoModelForCausalLM.from_pretrained(folders(name), attn_implementation="eager")
        with torch.no_grad():
            windowed = model(input_ids=ids[None]).logits
            config = copy.deepcopy(model.config)
            config.sliding_window = 1000
            config._attn_implementation = "eager"
            full = type(model)(config).eval()
            full.load_state_dict(model.state_dict())
            assert float((full(input_ids=ids[None]).logits - windowed)[0, -1].abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2), "no attention decoder"),
        (hf.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4), "attention interface"),
        (
            hf.BertConfig(vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=4),
            "bidirectional",
        ),
        (
            hf.Llama4TextConfig(**BASE, head_dim=16, num_local_experts=2, attention_chunk_size=8,
                                intermediate_size_mlp=64),
            "chunked_attention",
        ),
        (
            hf.DeepseekV4Config(**BASE, head_dim=16, q_lora_rank=24, o_lora_rank=24, o_groups=2,
                                num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                sliding_window=8,
                                layer_types=["sliding_attention", "heavily_compressed_attention"] * 2),
            "heavily_compressed_attention",  # of more tokens than the probe has
        ),
        (phimoe_longrope(), "beyond 16 tokens"),  # short factors, whatever was frozen
        (phimoe_longrope(long_factor=[1.0] * 6, long_mscale=1.5), "beyond 16 tokens"),  # that of the batch
    ],
    ids=["mamba", "bloom", "bert", "llama4", "deepseek_v4", "phimoe_factors", "phimoe_mscale"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_cannot_be_served_is_refused_by_name(
    config: Any, reason: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*({reason})"):
        load_generic(tmp_path, dtype, torch.device("cpu"), max_model_len=64)


class TestLoadRunner:
    def test_a_shape_the_native_core_lacks_goes_to_torch(self, folders: Callable[[str], Path]) -> None:
        if native_unavailable_reason(torch.device("cpu")) is not None:
            pytest.skip("the native core is not built here")
        assert load(folders("llama"), "auto").backend == "torch"  # head_dim 12
        assert load(folders("llama3_rope"), "auto").backend == "native"  # head_dim 16
        with pytest.raises(UnsupportedModelError, match="head_dim 12"):
            load(folders("llama"), "native")

    @pytest.mark.parametrize("name", ["llama3_rope", "qwen3"])
    def test_native_equals_the_plain_forward(self, name: str, folders: Callable[[str], Path]) -> None:
        if native_unavailable_reason(torch.device("cpu")) is not None:
            pytest.skip("the native core is not built here")
        runner = load(folders(name), "native").runner
        sequences = random_ids(70, 33)
        for ids, ours in zip(sequences, run_in_steps(runner, sequences, [[20, 3], [1, 9]]), strict=True):
            torch.testing.assert_close(ours, reference(folders(name), ids), atol=1e-4, rtol=1e-4)

    def test_auto_falls_back_when_the_native_core_is_missing(
        self, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "actors.native.library", None)
        assert load(folders("llama"), "auto").backend == "torch"
        assert load(folders("gpt2"), "auto").backend == "generic"
        with pytest.raises(UnsupportedModelError, match=r"backend 'native'.*not installed"):
            load(folders("llama"), "native")

    def test_backends_say_why_they_cannot(self, folders: Callable[[str], Path]) -> None:
        with pytest.raises(UnsupportedModelError, match="backend 'torch' cannot run GPT2LMHeadModel"):
            load(folders("gpt2"), "torch")
        with pytest.raises(UnsupportedModelError, match="window of 8 tokens is shorter than 128"):
            load(folders("mistral_window"), "torch")
        assert load(folders("mistral_window"), "torch", max_model_len=8).backend == "torch"

    @pytest.mark.parametrize(
        ("backend", "name"), [("torch", "llama"), ("generic", "gpt2"), ("auto", "llama")]
    )
    def test_context_limit(self, backend: str, name: str, folders: Callable[[str], Path]) -> None:
        assert load(folders(name), backend).info.max_model_len == 128
        assert load(folders(name), backend, max_model_len=64).info.max_model_len == 64
        with pytest.raises(ValueError, match=r"129 exceeds.*128"):
            load(folders(name), backend, max_model_len=129)

    @pytest.mark.parametrize(
        ("backend", "name", "width"), [("torch", "llama", 2 * 2 * 12), ("generic", "gpt2", 96)]
    )
    def test_pool_is_sized_from_memory(
        self, backend: Any, name: str, width: int, folders: Callable[[str], Path]
    ) -> None:
        options: dict[str, Any] = {"backend": backend, "device": "cpu", "threads": 1}
        block_bytes = 4 * width * 2 * BLOCK_SIZE  # layers * elements * bfloat16 * tokens
        loaded = load_runner(str(folders(name)), kv_memory_gib=10.5 * block_bytes / GIB, **options)
        assert loaded.runner.num_blocks == 10
        with pytest.raises(ValueError, match="kv_memory_gib"):
            load_runner(str(folders(name)), kv_memory_gib=0.5 * block_bytes / GIB, **options)

    def test_info_and_progress(self, folders: Callable[[str], Path]) -> None:
        said: list[str] = []
        loaded = load(folders("qwen3"), "torch", progress=said.append)
        info = loaded.info
        assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_dim) == (4, 4, 2, 16)
        assert (info.hidden_size, info.vocab_size, info.architecture) == (48, VOCAB, "Qwen3ForCausalLM")
        assert info.device == torch.device("cpu")
        assert loaded.runner.info is info
        assert loaded.tokenizer_folder == folders("qwen3")
        assert len(loaded.source_hash) == 64
        assert any("loaded" in line for line in said)

    def test_unknown_device_and_depth(self, folders: Callable[[str], Path]) -> None:
        with pytest.raises(ValueError, match="'tpu'"):
            load_runner(str(folders("llama")), device="tpu")
        with pytest.raises(ValueError, match="CUDA devices"):
            load_runner(str(folders("llama")), device="cuda:99")
        with pytest.raises(ValueError, match="num_layers 5"):
            load(folders("llama"), "torch", num_layers=5)
        with pytest.raises(UnsupportedModelError, match="num_layers"):
            load(folders("gpt2"), "auto", num_layers=1)
