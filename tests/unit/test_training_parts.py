"""Parts of draft training: the student's arithmetic, packing, losses, stores, vocabularies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.models.llama_load import load_llama_weights
from actors.models.runner import RaggedBatch
from actors.training.batches import (
    LONGEST_RUN,
    BatchPlan,
    TeacherBatch,
    build_batch,
    pack_rows,
    withhold,
)
from actors.training.corpus import Example, draft_vocabulary, is_heldout
from actors.training.evaluate import walk
from actors.training.losses import distillation
from actors.training.online_teacher import OnlineTeacher
from actors.training.resident_decoder import ResidentDecoder
from actors.training.run import learning_rate
from actors.training.settings import DataSettings, TrainSettings
from actors.training.student import SortedStudent
from actors.training.teacher import whole_sequences
from actors.training.texts import read_prompts
from actors.training.token_store import (
    DataError,
    TeacherRows,
    TokenSequence,
    content_hash,
    is_teacher_of,
    iter_tables,
    joined,
    read_sequences,
    read_teacher,
    shard_count,
    shard_path,
    table_of,
    write_sequences,
    write_teacher,
)
from tests.exactness.harness import torch_runner
from tests.toy_draft import base_weights, toy_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def example(ids: list[int], labels_from: int = 1) -> Example:
    tokens = torch.tensor(ids)
    return Example(tokens, labels_from, tokens[labels_from:])


def test_an_untrained_student_is_the_first_layers_of_its_base(base: Path) -> None:
    """Packed rows of several sequences give what the serving runner gives each of them alone."""
    student = SortedStudent(base_weights(base), (1, 3), torch.arange(320))
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 320, (n,), generator=generator).tolist() for n in (7, 20, 12)]
    batch = build_batch([example(t) for t in texts], [[0, 1], [2]], 32)
    with torch.no_grad():
        hidden = student(batch.ids, batch.positions, batch.sequence)
    runner = torch_runner(base, num_blocks=8)
    start = 0
    for index, text in enumerate(texts):
        n = len(text) - 1
        rows = slice(start, start + n)
        assert batch.labels[rows].tolist() == text[1:]
        one = RaggedBatch(
            torch.tensor(text),
            torch.arange(len(text)),
            torch.tensor([0, len(text)]),
            torch.tensor([len(text)]),
            torch.tensor([[0]], dtype=torch.int32),
            torch.arange(len(text) - 1),
        )
        for place, depth in enumerate((1, 3)):
            expected = runner.logits(runner.run_layers(runner.embed(one.token_ids), 0, depth, one)[:n])
            with torch.no_grad():
                found = student.logits(hidden[place][batch.rows[rows], batch.columns[rows]], place)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=f"{index} at {depth}")
        start += n


def test_positions_shift_but_for_the_anchors() -> None:
    offsets = np.random.default_rng(0)
    batch = build_batch([example(list(range(10)))], [[0]], 16, offsets=offsets, max_offset=50, anchors=3)
    positions = batch.positions[0].tolist()
    assert positions[:3] == [0, 1, 2]
    assert positions[3] > 3
    assert positions[3:10] == list(range(positions[3], positions[3] + 7))


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    row_tokens=st.integers(8, 64),
)
def test_packing_keeps_every_sequence_once(lengths: list[int], row_tokens: int) -> None:
    rows = pack_rows(lengths, range(len(lengths)), row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(min(lengths[i], row_tokens) for i in row) <= row_tokens for row in rows)


def test_a_step_has_the_same_rows_whenever_it_is_asked() -> None:
    lengths = [5 + i % 7 for i in range(50)]
    forwards = [BatchPlan(lengths, 2, 16, seed=3).rows(step) for step in range(40)]
    plan = BatchPlan(lengths, 2, 16, seed=3)
    assert [plan.rows(step) for step in reversed(range(40))] == forwards[::-1]
    assert BatchPlan(lengths, 2, 16, seed=4).rows(0) != forwards[0]
    with pytest.raises(ValueError, match="fills 1 rows, a batch takes 2"):
        BatchPlan([5], 2, 16, seed=0)


def test_distillation_is_the_divergence_when_everything_is_listed() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    logp = target.log_softmax(-1)
    teacher = TeacherBatch(torch.arange(9).repeat(5, 1), logp)
    found, weight = distillation(logits, teacher)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), logp, log_target=True, reduction="sum")
    assert float(weight) == pytest.approx(5.0, abs=1e-5)
    assert float(found) == pytest.approx(float(expected), abs=1e-3)


def test_distillation_bins_the_rest_and_conditions_on_the_drafts_vocabulary() -> None:
    """Teacher (.5, .2, rest .3), with .2 on a token that the draft does not have; draft of 4 tokens."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    teacher = TeacherBatch(torch.tensor([[0, -1]]), torch.tensor([[0.5, 0.2]]).log())
    found, weight = distillation(logits, teacher)
    p, rest = 0.5 / 0.8, 0.3 / 0.8
    expected = p * np.log(p / 0.4) + rest * np.log(rest / 0.6)
    assert float(weight) == pytest.approx(0.8, abs=1e-6)
    assert float(found) == pytest.approx(0.8 * expected, abs=1e-6)


def test_distillation_is_least_at_the_teacher() -> None:
    logits = torch.zeros(1, 6, requires_grad=True)
    teacher = TeacherBatch(torch.tensor([[2, 0]]), torch.tensor([[0.6, 0.3]]).log())
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        distillation(logits, teacher)[0].backward()
        optimizer.step()
    found = logits.detach().softmax(-1)[0]
    assert found[[2, 0]].tolist() == pytest.approx([0.6, 0.3], abs=1e-3)
    assert float(found.sum() - found[2] - found[0]) == pytest.approx(0.1, abs=1e-3)


@given(st.lists(st.lists(st.integers(0, 69999), min_size=2, max_size=9), min_size=0, max_size=6))
def test_sequences_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("store") / "shard-00000.safetensors"
    sequences = [TokenSequence(tuple(t), 1 + i % (len(t) - 1), bool(i % 2)) for i, t in enumerate(texts)]
    write_sequences(path, sequences, 70000)
    assert read_sequences(path) == sequences


def test_joined_tables_hold_all_sequences() -> None:
    sets = [
        [TokenSequence((1, 2, 3), 1, True)],
        [],
        [TokenSequence((4, 5), 1), TokenSequence((6, 7, 8, 9), 2)],
    ]
    table = joined([table_of(s, 320) for s in sets])
    assert table.sequences() == [s for part in sets for s in part]


def test_teacher_rows_come_back_and_must_match(tmp_path: Path) -> None:
    sequences = [TokenSequence((1, 2, 3), 1), TokenSequence((4, 5, 6, 7), 2)]
    rows = [
        TeacherRows(np.arange(6).reshape(2, 3), -np.ones((2, 3), np.float32)),
        TeacherRows(np.arange(6, 12).reshape(2, 3), -2 * np.ones((2, 3), np.float32)),
    ]
    path = tmp_path / "shard-00000.safetensors"
    table = table_of(sequences, 320)
    assert table.labels == [s.num_labels for s in sequences]
    assert not is_teacher_of(path, table)
    write_teacher(path, rows, sequences, 320)
    assert is_teacher_of(path, table)
    for found, expected in zip(read_teacher(path, table), rows, strict=True):
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.logprobs, expected.logprobs)
    with pytest.raises(DataError, match="one row for each label"):
        read_teacher(path, table_of(sequences[:1], 320))
    others = table_of([TokenSequence((1, 2, 4), 1), sequences[1]], 320)
    assert not is_teacher_of(path, others)
    with pytest.raises(DataError, match="was made for other sequences"):
        read_teacher(path, others)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="cannot be read"):
        read_teacher(path, table)


def test_a_shard_without_sequences_needs_no_states(tmp_path: Path) -> None:
    """All its conversations were left out; the others of the data set can be learned from."""
    path = tmp_path / "shard-00000.safetensors"
    write_teacher(path, [], [], 320)
    assert read_teacher(path, table_of([], 320), states=True) == []
    one = [TokenSequence((1, 2), 1)]
    write_teacher(path, [TeacherRows(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))], one, 320)
    with pytest.raises(DataError, match="holds no states"):
        read_teacher(path, table_of(one, 320), states=True)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """What comes after a gap must not be left out in silence."""
    assert shard_count(tmp_path) == 0
    for index in (0, 1, 3):
        write_sequences(shard_path(tmp_path, index), [TokenSequence((1, 2), 1)], 320)
    for read in (
        shard_count,
        lambda folder: list(iter_tables(folder)),
        lambda folder: content_hash([folder]),
    ):
        with pytest.raises(DataError, match="shard 2 is missing"):
            read(tmp_path)
    write_sequences(shard_path(tmp_path, 2), [], 320)
    assert [len(table) for _, table in iter_tables(tmp_path)] == [1, 1, 0, 1]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_of_prompts_ends_at_a_line_feed_only(tmp_path: Path, separator: str) -> None:
    """JSON strings may hold what else separates lines of text; `s2d draft prompts` writes it as it is."""
    text = f"one{separator}two"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False), json.dumps({"prompt": "x"})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [m[0].content for m in read_prompts(tmp_path / "prompts.jsonl")] == [text, "x"]


def test_autocast_rounds_no_logits_that_decide(base: Path) -> None:
    """A draft's, an online teacher's, and those of greedy answers in bfloat16: close ones stay apart."""

    def is_rounded(logits: torch.Tensor) -> bool:
        assert logits.dtype == torch.float32
        return torch.equal(logits, logits.bfloat16().float())

    weights, ids = base_weights(base), torch.arange(40).view(2, 20)
    student = SortedStudent(weights, (1, 3), torch.arange(320))
    hidden = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    alone = student.logits(hidden, 0)
    batch = build_batch([example(row) for row in ids.tolist()], [[0], [1]], 32)
    teacher = OnlineTeacher(weights, torch.arange(320), states=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not is_rounded(student.logits(hidden, 0))
        torch.testing.assert_close(student.logits(hidden, 0), alone)
        assert is_rounded(student.loss_logits(hidden, 0))  # so autocast does round here
        assert not is_rounded(teacher.teach(batch).logprobs)
        (rows,) = teacher.annotate(batch, 320).teachers
        # Logits but for a constant of each row: rounded, neighbours would be equal.
        assert (rows.logprobs[:, :-1] > rows.logprobs[:, 1:]).float().mean() > 0.99
    narrow, _ = load_llama_weights(base, torch.bfloat16, torch.device("cpu"))
    decoder = ResidentDecoder(narrow, 2, 20)
    with torch.inference_mode():
        for place in range(3):
            logits = decoder.step(ids[:, place], torch.tensor([place, place]))
    assert not is_rounded(logits)


def test_the_vocabulary_is_the_most_frequent_labels() -> None:
    sequences = [TokenSequence((9, 9, 9, 5, 5, 7), 3), TokenSequence((9, 5, 8), 1)]
    assert draft_vocabulary(table_of(sequences, 12), range(2), 3, 12).tolist() == [5, 7, 8]
    assert draft_vocabulary(table_of(sequences, 12), range(2), 5, 12).tolist() == [0, 1, 5, 7, 8]
    assert draft_vocabulary(table_of(sequences, 12), range(2), 0, 4).tolist() == [0, 1, 2, 3]


def test_one_prompt_is_never_on_both_sides() -> None:
    prompts = [tuple(range(i, i + 6)) for i in range(200)]
    first = [is_heldout(TokenSequence((*p, 1), 6), 0.3) for p in prompts]
    assert first == [is_heldout(TokenSequence((*p, 2, 3), 6), 0.3) for p in prompts]
    assert 30 < sum(first) < 90
    assert not any(is_heldout(TokenSequence((*p, 1), 6), 0.0) for p in prompts)


def test_walking_over_answers() -> None:
    answers = [[2, 1, 0, 1], [0]]
    counts = walk(answers, 2)
    # Round 1 takes two drafts and the target's third; round 2 drafts the last token; the other answer: one.
    assert (counts.rounds, counts.tokens) == (3, 5)
    assert counts.reached == (3, 1)
    assert counts.accepted == (2, 1)
    assert walk(answers, 1).rounds == 4


def test_a_pass_over_whole_sequences_asks_for_its_labels() -> None:
    batch = whole_sequences(
        [TokenSequence(tuple(range(40)), 38), TokenSequence((1, 2, 3), 1)], torch.device("cpu")
    )
    assert batch.logit_rows.tolist() == [37, 38, 40, 41]
    assert batch.block_tables.tolist() == [[0, 1], [2, 0]]


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = TrainSettings(base="b", data=("d",), out="o", steps=100, warmup=10, lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] < 0.11
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_settings_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings.read(None, {"base": "b", "data": ("d",), "out": "o", "learning_rate": 1.0})
    with pytest.raises(ValueError, match="ascending"):
        TrainSettings(base="b", data=("d",), out="o", exits=(4, 2))
    with pytest.raises(ValueError, match="exclude each other"):
        DataSettings(source="s", out="o", prompts="p", texts=("t",))
    (tmp_path / "train.yaml").write_text("base: b\ndata: [d]\nout: o\nexits: [1, 2]\nsteps: 500\n")
    settings = TrainSettings.read(tmp_path / "train.yaml", {"steps": 300, "lr": None})
    assert (settings.steps, settings.exits, settings.lr) == (300, (1, 2), 1e-3)


def test_states_lie_at_the_tokens_that_they_emitted() -> None:
    """The state that predicted a label belongs to that label's token, which the draft reads next."""
    examples = [
        replace(example([5, 6, 7, 8, 9], 2), states=torch.arange(1, 7).view(3, 2).half()),
        replace(example([5, 6, 7], 1), states=torch.full((2, 2), 9.0).half()),
    ]
    states = build_batch(examples, [[0, 1]], 8).states
    assert states is not None
    assert states[0].tolist() == [
        [0, 0], [0, 0], [1, 2], [3, 4], [5, 6],
        [0, 0], [9, 9], [9, 9],
    ]  # fmt: skip
    cut = build_batch(examples, [[0]], 4).states
    assert cut is not None
    assert cut[0].tolist() == [[0, 0], [0, 0], [1, 2], [3, 4]]
    assert build_batch([example([1, 2, 3])], [[0]], 8).states is None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 5 / 7])
def test_states_are_withheld_in_runs(share: float) -> None:
    generator = np.random.default_rng(0)
    gone = [withhold(400, share, generator) for _ in range(300)]
    whole = [g for g in gone if bool(g.all())]
    assert len(whole) / 300 == pytest.approx(share / 2, abs=0.06)
    runs: list[int] = []
    for g in gone:
        if not bool(g.all()):
            runs += [len(run) for run in "".join("x" if v else " " for v in g.tolist()).split()]
    assert set(runs) == {1, 2, 3, 4}
    part = torch.cat([g for g in gone if not bool(g.all())]).float().mean()
    assert float(part) == pytest.approx(share, abs=0.02)


def test_more_cannot_be_withheld_than_runs_allow() -> None:
    fields = {"base": "b", "data": ("d",), "out": "o"}
    most = (mean := (1 + LONGEST_RUN) / 2) / (mean + 1)
    assert TrainSettings.model_validate({**fields, "withheld": most}).withheld == most
    with pytest.raises(ValueError, match="withheld"):
        TrainSettings.model_validate({**fields, "withheld": most + 0.001})
