"""The native core: kernels against torch, whole passes against transformers, and bits that do not depend on
the batch, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.models.llama_load import load_llama_weights
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.models.native_llama import NativeLlamaRunner
from actors.models.runner import BLOCK_SIZE, ModelInfo, RaggedBatch
from actors.native.library import NativeLibrary, NativeUnavailableError, load_library, unavailable_reason
from actors.native.linear import NativeLinear

if (_missing := unavailable_reason()) is not None:
    pytest.skip(_missing, allow_module_level=True)


def _has(isa: str) -> bool:
    try:
        load_library(isa)
    except NativeUnavailableError:
        return False
    return True


ISAS = [isa for isa in ("plain", "avx2", "avx512", "avx512_bf16", "amx") if _has(isa)]
DTYPES = [torch.float32, torch.bfloat16]
VOCAB = 103  # the last group of the head is partial
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILY: dict[str, Callable[[], Any]] = {
    "grouped": lambda: hf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "untied": lambda: hf.LlamaConfig(**{**BASE, "num_key_value_heads": 6}),
    "bias": lambda: hf.Qwen2Config(**BASE),
    "head_norm": lambda: hf.Qwen3Config(**{**BASE, "head_dim": 16}),
    "scaled_rope": lambda: hf.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 64},
    ),
}  # fmt: skip


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(FAMILY[name]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms and biases start at trivial values
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            saved[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(saved[name])
        return saved[name]

    return get


def make_runner(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    isa: str | None = None,
    threads: int = 2,
    blocks: int = 24,
) -> NativeLlamaRunner:
    weights, info = load_llama_weights(folder, dtype, torch.device("cpu"))
    return NativeLlamaRunner(weights, info, blocks, threads=threads, isa=isa)


def reference(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [len, V] of transformers, weights rounded to dtype, arithmetic in float32."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits[0]
    return logits


TABLES = torch.randperm(24, generator=torch.Generator().manual_seed(5)).int().view(3, 8)


def make_batch(parts: list[tuple[int, Tensor, int]]) -> RaggedBatch:
    """parts: (sequence, its new tokens, KV entries before them); logits of every token."""
    sizes = torch.tensor([len(ids) for _, ids, _ in parts])
    return RaggedBatch(
        token_ids=torch.cat([ids for _, ids, _ in parts]),
        positions=torch.cat([torch.arange(start, start + len(ids)) for _, ids, start in parts]),
        query_start=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        context_lens=torch.tensor([start + len(ids) for _, ids, start in parts]),
        block_tables=TABLES[[sequence for sequence, _, _ in parts]],
        logit_rows=torch.arange(int(sizes.sum())),
    )


def random_ids(n: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def in_chunks(runner: NativeLlamaRunner, ids: Tensor, sizes: list[int], sequence: int = 0) -> Tensor:
    """Logits of ids fed in chunks of the given sizes, the last size repeating."""
    done, logits = 0, []
    while done < len(ids):
        size = sizes[min(len(logits), len(sizes) - 1)]
        logits.append(runner.forward(make_batch([(sequence, ids[done : done + size], done)])))
        done += size
    return torch.cat(logits)


def product_inputs(x: Tensor, dtype: torch.dtype, isa: str) -> Tensor:
    """What a product over weights of `dtype` makes of its inputs: packed weights take them in bfloat16."""
    return x.bfloat16().float() if dtype == torch.bfloat16 and load_library(isa).packs else x


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 64), (33, 50), (1, 3), (64, 16)])
def test_product(library: NativeLibrary, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    k, n = shape
    torch.manual_seed(k)
    x, w, bias = torch.randn(67, k), torch.randn(n, k).to(dtype), torch.randn(n)
    expected = product_inputs(x, dtype, library.isa).double() @ w.double().T + bias
    tolerance = 3e-6 * (x.abs().double() @ w.abs().double().T + bias.abs())
    product = NativeLinear(w, bias, threads=2, isa=library.isa)
    full = product(x)
    assert ((full.double() - expected).abs() <= tolerance).all()
    for m in (0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 64):
        assert torch.equal(product(x[:m]), full[:m]), m
    with pytest.raises(ValueError, match="inputs"):
        product(torch.zeros(2, k + 1))


def test_products_of_the_vector_variants_have_the_same_bits() -> None:
    vector = [isa for isa in ISAS if isa != "plain"]
    x, w = torch.randn(5, 100), torch.randn(40, 100)
    results = [NativeLinear(w, threads=1, isa=isa)(x) for isa in vector]
    assert all(torch.equal(r, results[0]) for r in results)


def single_layer(
    dtype: torch.dtype = torch.float32,
    *,
    hidden: int = 64,
    kv_heads: int = 2,
    dim: int = 16,
    isa: str | None = None,
) -> tuple[NativeLlamaRunner, LlamaLayerWeights]:
    """One layer whose output projection is the identity and whose MLP is zero: it adds its attention."""
    torch.manual_seed(1)
    heads = hidden // dim
    layer = LlamaLayerWeights(
        qkv=torch.randn((heads + 2 * kv_heads) * dim, hidden).to(dtype) * 0.3, o=torch.eye(hidden).to(dtype),
        gate_up=torch.zeros(64, hidden, dtype=dtype), down=torch.zeros(hidden, 32, dtype=dtype),
        input_norm=(torch.rand(hidden) + 0.5).to(dtype), post_norm=torch.ones(hidden).to(dtype),
    )  # fmt: skip
    weights = LlamaWeights(
        embed=torch.eye(hidden).to(dtype), layers=(layer,), final_norm=torch.ones(hidden).to(dtype),
        head=torch.eye(hidden).to(dtype), inv_freq=10000.0 ** (-torch.arange(0, dim, 2) / dim),
        attention_scaling=1.0, rms_norm_eps=1e-5, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        max_position=256,
    )  # fmt: skip
    info = ModelInfo("one", "Test", 1, hidden, heads, kv_heads, dim, hidden, 256, dtype, torch.device("cpu"))
    return NativeLlamaRunner(weights, info, 24, threads=2, isa=isa), layer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(16, 4, 2), (32, 2, 1)])
def test_attention_rotation_and_norm(
    isa: str, dtype: torch.dtype, dim: int, heads: int, kv_heads: int
) -> None:
    runner, layer = single_layer(dtype, kv_heads=kv_heads, dim=dim, isa=isa)
    n = 75
    hidden = torch.randn(n, 64)
    batch = make_batch([(0, torch.zeros(n, dtype=torch.int64), 0)])
    got = runner.run_layers(hidden, 0, 1, batch) - hidden

    normed = product_inputs(F.rms_norm(hidden, (64,), layer.input_norm.float(), 1e-5), dtype, isa)
    q, k, v = (
        (normed @ layer.qkv.float().T).view(n, -1, dim).transpose(0, 1).split([heads, kv_heads, kv_heads])
    )
    angle = torch.outer(torch.arange(n), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    k, v = rotate(k).to(dtype).float(), v.to(dtype).float()
    # Attention rounds queries as products do their inputs, where heads are whole chunks of the dot product.
    queries = product_inputs(rotate(q), dtype, isa) if dim % 32 == 0 else rotate(q)
    expected = (
        F.scaled_dot_product_attention(
            queries[None], k.repeat_interleave(2, 0)[None], v.repeat_interleave(2, 0)[None], is_causal=True
        )[0]
        .transpose(0, 1)
        .reshape(n, 64)
    )
    expected = product_inputs(expected, dtype, isa)
    # a key on the edge of two bfloat16 values may round the other way; so may an input of a packed product
    rounded = 2e-2 * (1 + load_library(isa).packs)
    assert (got - expected).abs().max() < (2e-5 if dtype == torch.float32 else rounded)


def test_final_norm_and_head(library: NativeLibrary) -> None:
    runner, _ = single_layer(isa=library.isa)
    hidden = torch.randn(9, 64) * 10
    expected = F.rms_norm(hidden, (64,), eps=1e-5)
    assert torch.allclose(runner.logits(hidden), expected, rtol=1e-6, atol=1e-6)
    assert runner.logits(hidden[:0]).shape == (0, 64)


# ---- whole passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_equals_transformers(folders: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    ids = random_ids(80)
    expected = reference(folders(name), ids, dtype)
    got = in_chunks(make_runner(folders(name), dtype), ids, [80])
    assert (got - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.15) * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_who_computes_an_output_does_not_change_it(dtype: torch.dtype, rows: int) -> None:
    """More threads than cores: who is done takes what is left of the others' shares, ever differently."""
    torch.manual_seed(3)
    w, x = torch.randn(6000, 512).to(dtype), torch.randn(rows, 512)
    alone, team = NativeLinear(w, threads=1)(x), NativeLinear(w, threads=8)
    for _ in range(25):
        assert torch.equal(team(x), alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_invariance(folders: Callable[[str], Path], isa: str, dtype: torch.dtype) -> None:
    """The bits of a row: M in 1, 2, 5, 8, 16, 64, two chunkings, mixed with others, any thread count."""
    folder, ids, other = folders("grouped"), random_ids(150), random_ids(40, seed=9)
    runner = make_runner(folder, dtype, isa=isa)
    whole = in_chunks(runner, ids, [150])
    for m in (1, 2, 5, 8, 16, 64):
        assert torch.equal(in_chunks(runner, ids, [m]), whole), m
    assert torch.equal(in_chunks(runner, ids, [37, 3, 50, 11]), whole)
    for threads in (1, 3):
        assert torch.equal(in_chunks(make_runner(folder, dtype, isa=isa, threads=threads), ids, [70]), whole)
    mixed = make_batch([(2, other, 0), (0, ids[140:145], 140), (1, ids, 0)])  # rewrites KV that is there
    logits = runner.forward(mixed)
    assert torch.equal(logits[40:45], whole[140:145])
    assert torch.equal(logits[45:], whole)
    assert torch.equal(logits[:40], in_chunks(runner, other, [40]))


def test_cached_prefix_equals_fresh(folders: Callable[[str], Path]) -> None:
    """A sequence whose table starts with another's blocks gets the bits of its own fresh pass."""
    runner, ids = make_runner(folders("bias"), torch.bfloat16), random_ids(100)
    whole = in_chunks(runner, ids, [100])
    table = torch.cat([TABLES[0, :2], TABLES[1, 2:]])
    batch = make_batch([(1, ids[64:], 64)])
    batch.block_tables = table[None]
    assert torch.equal(runner.forward(batch), whole[64:])


def test_long_pass_is_worked_off_in_pieces(folders: Callable[[str], Path]) -> None:
    weights, info = load_llama_weights(
        folders("grouped"), torch.float32, torch.device("cpu"), max_model_len=256
    )
    runner = NativeLlamaRunner(weights, info, 24, threads=2)
    parts = [(s, random_ids(250, seed=s), 0) for s in range(3)]  # 750 rows, more than one piece holds
    together = runner.forward(make_batch(parts))
    for s, (_, ids, _) in enumerate(parts):
        assert torch.equal(together[s * 250 : (s + 1) * 250], in_chunks(runner, ids, [125], sequence=s))


def test_layers_in_ranges_and_selected_rows(folders: Callable[[str], Path]) -> None:
    runner, batch = make_runner(folders("head_norm")), make_batch([(0, random_ids(20), 0)])
    batch.logit_rows = torch.tensor([19, 3])
    whole = runner.forward(batch)
    hidden = runner.embed(batch.token_ids)
    before = hidden.clone()
    first = runner.run_layers(hidden, 0, 1, batch)
    assert torch.equal(hidden, before)
    states = runner.run_layers(first, 1, 3, batch)[batch.logit_rows]
    assert torch.equal(runner.logits(states), whole)
    assert torch.equal(runner.forward_with_states(batch)[0], states)
    assert torch.equal(runner.run_layers(first, 2, 2, batch), first)


@pytest.mark.parametrize("name", ["grouped", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(folders: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    weights, _ = load_llama_weights(folders(name), dtype, torch.device("cpu"))
    ids = torch.arange(VOCAB)
    runner = make_runner(folders(name), dtype)
    assert torch.equal(runner.embed(ids), weights.embed.float())
    assert torch.equal(runner.embed(ids[5:7]), weights.embed[5:7].float())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tree_tokens_equal_their_chains(
    folders: Callable[[str], Path], dtype: torch.dtype, data: Any
) -> None:
    """Bit for bit, over block borders, and so do the copied slots of an accepted branch."""
    runner = make_runner(folders("grouped"), dtype)
    base = data.draw(st.integers(1, 70), label="base")
    size = data.draw(st.integers(1, 12), label="size")
    parents = [data.draw(st.integers(-1, i - 1), label="parent") for i in range(size)]
    prompt, nodes = random_ids(base), random_ids(size, seed=base)
    in_chunks(runner, prompt, [base])
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append(([] if parent == -1 else paths[parent]) + [i])
    tree = make_batch([(1, random_ids(5), 0), (0, nodes, base)])
    tree.positions[5:] = torch.tensor([base + len(p) - 1 for p in paths])
    tree.parents = torch.cat([torch.arange(-1, 4), torch.tensor([p if p == -1 else p + 5 for p in parents])])
    logits = runner.forward(tree)[5:]

    fresh = make_runner(folders("grouped"), dtype)
    for i, path in enumerate(paths):
        chain = in_chunks(fresh, torch.cat([prompt, nodes[path]]), [base + len(path)])
        assert torch.equal(logits[i], chain[-1]), parents

    path = paths[-1]
    entries = torch.arange(base + size)
    slots = TABLES[0].long()[entries // BLOCK_SIZE] * BLOCK_SIZE + entries % BLOCK_SIZE
    runner.copy_slots(slots[[base + i for i in path]], slots[base : base + len(path)])
    follow = torch.tensor([7])
    after = runner.forward(make_batch([(0, follow, base + len(path))]))
    chain = in_chunks(fresh, torch.cat([prompt, nodes[path], follow]), [64])
    assert torch.equal(after[0], chain[-1])


def test_copy_reads_before_it_writes(folders: Callable[[str], Path]) -> None:
    runner, ids = make_runner(folders("grouped")), random_ids(33)
    expected = in_chunks(runner, ids, [33])[-1]
    slots = TABLES[0, 0].long() * BLOCK_SIZE + torch.arange(3)
    runner.copy_slots(slots, slots.roll(1))  # a cycle, undone by its inverse
    changed = runner.forward(make_batch([(0, ids[32:], 32)]))[0]
    runner.copy_slots(slots.roll(1), slots)
    assert not torch.equal(changed, expected)
    assert torch.equal(runner.forward(make_batch([(0, ids[32:], 32)]))[0], expected)


# ---- refusals ------------------------------------------------------------------------------------


def test_bad_batches_are_refused(folders: Callable[[str], Path]) -> None:
    runner = make_runner(folders("grouped"))

    def changed(**fields: Any) -> RaggedBatch:
        batch = make_batch([(0, random_ids(6), 0)])
        for name, value in fields.items():
            setattr(batch, name, value)
        return batch

    for batch, word in (
        (changed(positions=torch.full((6,), 256)), "position"),
        (changed(positions=torch.full((6,), -1)), "position"),
        (changed(token_ids=torch.full((6,), VOCAB)), "vocabulary"),
        (changed(logit_rows=torch.tensor([0, 6])), "row of logits"),
        (changed(logit_rows=torch.tensor([-1])), "row of logits"),
        (changed(context_lens=torch.tensor([5])), "fit together"),
        (changed(context_lens=torch.tensor([8 * BLOCK_SIZE + 1])), "fit together"),
        (changed(block_tables=torch.full((1, 8), 24, dtype=torch.int32)), "block table"),
        (changed(parents=torch.tensor([0, 0, 1, 2, 3, 4])), "parent"),
        (changed(block_tables=torch.zeros(1, 8, dtype=torch.int64)), "int32"),
    ):
        with pytest.raises(ValueError, match=word):
            runner.forward(batch)
    with pytest.raises(ValueError, match="layers"):
        runner.run_layers(torch.zeros(6, 96), 0, 4, changed())
    with pytest.raises(ValueError, match="slot"):
        runner.copy_slots(torch.tensor([0]), torch.tensor([24 * BLOCK_SIZE]))
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.forward(changed())


def test_unsupported_models_are_refused(folders: Callable[[str], Path]) -> None:
    weights, info = load_llama_weights(folders("grouped"), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="num_blocks"):
        NativeLlamaRunner(weights, info, 0)
    half, half_info = load_llama_weights(folders("grouped"), torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="float16"):
        NativeLlamaRunner(half, half_info, 4)
    with pytest.raises(ValueError, match="use one of"):
        load_library("sse9")


# ---- noise and selection -------------------------------------------------------------------------


def torch_gumbel(words: Tensor) -> Tensor:
    w = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return (-torch.log(-torch.log1p(-w))).float()


def philox(counter: tuple[int, int, int, int], key: int) -> list[int]:
    c, k0, k1 = list(counter), key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@settings(max_examples=25, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1), position=st.integers(0, 2**63 - 1), stream=st.integers(0, 2**32 - 1),
    n=st.integers(1, 600),
)  # fmt: skip
def test_gumbel(key: int, position: int, stream: int, n: int) -> None:
    rest = (position & 0xFFFFFFFF, position >> 32, stream)
    words = torch.tensor([w for block in range((n + 3) // 4) for w in philox((block, *rest), key)])[:n]
    results = []
    for isa in ISAS:
        library, out = load_library(isa), torch.full((n + 1,), 77.0)
        library.gumbel(key, position, stream, None, out[:n])
        assert out[n] == 77.0
        some = torch.randperm(n)[: max(1, n // 2)]
        picked = torch.empty(some.shape)
        library.gumbel(key, position, stream, some, picked)
        assert torch.equal(picked, out[some])
        results.append(out[:n].clone())
    assert all(torch.equal(r, results[0]) for r in results)
    assert (results[0].view(torch.int32) - torch_gumbel(words).view(torch.int32)).abs().max() <= 1


def test_gumbel_known_answer(library: NativeLibrary) -> None:
    assert philox((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    out = torch.empty(4)
    library.gumbel(0, 0, 0, None, out)
    assert torch.equal(out, torch_gumbel(torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])))


def test_gumbel_almost_always_equals_torch(library: NativeLibrary) -> None:
    n = 200_000
    out, ids = torch.empty(n), torch.arange(n) + 2**32
    library.gumbel(123456789, 17, 1, ids, out)
    listed = [int(v) for v in ids[:4000]]
    words = torch.tensor([philox((v >> 2 & 0xFFFFFFFF, 17, 0, 1), 123456789)[v & 3] for v in listed])
    assert (out[:4000] != torch_gumbel(words)).sum() <= 1
    assert abs(out.double().mean() - 0.5772) < 0.02
    assert abs(out.double().var() - 1.6449) < 0.05


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_topk_and_argmax(data: Any) -> None:
    n, v, k = (data.draw(st.integers(1, high)) for high in (3, 70, 16))
    values = st.sampled_from([-2.0, 0.0, 1.0, 1.5, 3.0, float("inf"), float("-inf")])
    rows = torch.tensor(data.draw(st.lists(st.lists(values, min_size=v, max_size=v), min_size=n, max_size=n)))
    for isa in ISAS:
        got, index = load_library(isa).topk(rows, k)
        order = torch.sort(rows, dim=1, descending=True, stable=True)
        held = min(k, v)
        assert torch.equal(got[:, :held], order.values[:, :held])
        assert torch.equal(index[:, :held], order.indices[:, :held])
        assert (index[:, held:] == -1).all()
        assert torch.equal(load_library(isa).argmax(rows), order.indices[:, 0])


def test_nan_is_never_chosen(library: NativeLibrary) -> None:
    rows = torch.randn(2, 100)
    rows[0, ::2] = float("nan")
    rows[1] = float("nan")
    assert int(library.argmax(rows)[0]) == int(torch.where(rows[0].isnan(), -torch.inf, rows[0]).argmax())
    assert int(library.argmax(rows)[1]) == 0
    assert library.topk(rows, 2)[1][1].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="between 1 and 32"):
        library.topk(rows, 33)
