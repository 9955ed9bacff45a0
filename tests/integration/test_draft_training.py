"""A whole training run on a toy model: data from the target, sorted fine-tuning, resumption, the artifact in
the drafter, evaluation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from actors.drafting.draft_load import load_draft
from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.engine.messages import EngineRequest
from actors.models.draft_artifact import read_card
from actors.models.draft_card import ArtifactError
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.text.tokenizer import TextTokenizer
from actors.training import collect
from actors.training.checkpoint import CheckpointError, load_latest
from actors.training.collect import collect_data, teach
from actors.training.corpus import read_corpus
from actors.training.eval_run import run_evaluation
from actors.training.generate import user_turn
from actors.training.loop import ARTIFACT, CHECKPOINTS, CURVES, train
from actors.training.losses import SortedLoss
from actors.training.on_ray import RaySettings, RayTrainUnavailableError, train_on_ray
from actors.training.run import build_run
from actors.training.settings import DataSettings, EvalSettings, TeacherSettings, TrainSettings
from actors.training.token_store import DataError, read_sequences, shard_path
from cluster.cli.main import app
from tests.exactness.harness import make_engine, run, torch_runner
from tests.toy_draft import toy_base

WORDS = ("fox", "dog", "lazy", "quick", "name", "tags", "items", "over", "jumps", "brown", "the", "then")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"), layers=3, learnable=True)


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{a} {b} {c}"}) for a in WORDS for b in WORDS[:4] for c in ("a", "b")]
    prompts.write_text("\n".join(lines))
    settings = DataSettings(
        source=str(base), out=folder / "set", prompts=prompts, max_len=48, batch=48, shard=48,
        prompt_tokens=16, dtype="float32", teacher_out=folder / "teacher", greedy_share=0.8, threads=1,
    )  # fmt: skip
    collect_data(settings)
    return settings


def settings_for(base: Path, data: DataSettings, out: Path, **values: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "base": str(base), "data": (data.out,), "out": out, "exits": (1, 2), "draft_vocab": 200,
        "teachers": (data.teacher_out,), "steps": 60, "batch_rows": 4, "row_tokens": 96, "lr": 5e-3,
        "warmup": 5, "heldout": 0.2, "eval_every": 30, "checkpoint_every": 20, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return TrainSettings.model_validate(fields | values)


def states_of(base: Path, data: DataSettings, folder: Path, *, top: int) -> Path:
    """What the base says of the data, its states too."""
    return teach(
        TeacherSettings(
            data=data.out,
            source=str(base),
            out=folder / "t",
            dtype="float32",
            top=top,
            threads=1,
            states=True,
        )
    )


@pytest.fixture(scope="module")
def trained(base: Path, data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run_ = build_run(settings_for(base, data, tmp_path_factory.mktemp("run")))
    return run_, train(run_)


def test_generated_answers_are_the_targets(base: Path, data: DataSettings) -> None:
    """Greedy answers are what the engine gives alone; the stored teacher is the model's own distribution."""
    corpus = read_corpus([data.out], [data.teacher_out] if data.teacher_out else [])
    assert len(corpus.sequences) == 96
    assert 60 < sum(s.greedy for s in corpus.sequences) < 92
    runner = torch_runner(base)
    engine = make_engine(runner, [PromptLookupDrafter()])
    for index in (0, 50, 95):
        sequence = corpus.sequences[index]
        prompt = sequence.ids[: sequence.labels_from]
        assert TextTokenizer(base).decode(prompt).startswith("<user>")
        if sequence.greedy:
            sampling = SamplingParams(
                max_tokens=sequence.num_labels,
                temperature=0.0,
                eos_token_ids=TextTokenizer(base).eos_token_ids,
            )
            (result,) = run(engine, [EngineRequest("x", prompt, sampling)]).values()
            assert tuple(result.token_ids) == sequence.ids[sequence.labels_from :]
            assert corpus.rows[0][index].ids[:, 0].tolist() == result.token_ids
    engine.close()


def test_a_teacher_pass_equals_what_generation_reported(
    base: Path, data: DataSettings, tmp_path: Path
) -> None:
    out = teach(
        TeacherSettings(
            data=data.out, source=str(base), out=tmp_path / "t", dtype="float32", top=20, threads=1
        )
    )
    assert data.teacher_out is not None
    corpus = read_corpus([data.out], [data.teacher_out, out])
    for reported, passed in zip(*corpus.rows, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(reported.logprobs), torch.from_numpy(passed.logprobs), atol=2e-2, rtol=2e-3
        )
        assert (reported.ids[:, 0] == passed.ids[:, 0]).mean() > 0.99


def test_an_interrupted_data_set_is_continued(
    base: Path, data: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data.model_copy(update={"out": tmp_path / "set", "teacher_out": tmp_path / "teacher"})
    written: list[Path] = []

    def stop_after_one(path: Path, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, *rest)

    real = collect.write_sequences
    monkeypatch.setattr(collect, "write_sequences", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        collect_data(settings)
    monkeypatch.setattr(collect, "write_sequences", real)
    first = shard_path(settings.out, 0).read_bytes()
    collect_data(settings)
    assert shard_path(settings.out, 0).read_bytes() == first
    for index in (0, 1):
        again = read_sequences(shard_path(settings.out, index))
        assert again == read_sequences(shard_path(data.out, index))
    with pytest.raises(DataError, match="holds data of other settings"):
        collect_data(settings.model_copy(update={"max_len": 40}))


def test_parts_fill_one_data_set(data: DataSettings, tmp_path: Path) -> None:
    """Conversations depend on their numbers alone: two processes' shards are those of one."""
    settings = data.model_copy(update={"out": tmp_path / "set", "teacher_out": tmp_path / "teacher"})
    for part in ("2/2", "1/2"):
        collect_data(settings.model_copy(update={"part": part}))
    for index in (0, 1):
        again = read_sequences(shard_path(settings.out, index))
        assert again == read_sequences(shard_path(data.out, index))
    with pytest.raises(ValueError, match="part: 3/2"):
        DataSettings.model_validate({**settings.model_dump(), "part": "3/2"})


def test_user_turns_are_sampled_from_the_template(tmp_path: Path) -> None:
    base = toy_base(tmp_path / "base", end_boost=4.0)
    tokenizer = TextTokenizer(base)
    turn = user_turn(tokenizer)
    assert tokenizer.decode(turn.before) == "<user>"
    assert tokenizer.encode("<end>")[0] in turn.ends
    settings = DataSettings(
        source=str(base), out=tmp_path / "set", samples=40, max_len=250, prompt_tokens=200, shard=40,
        dtype="float32", teacher_top=0, threads=1, prompt_temperature=2.0,
    )  # fmt: skip
    collect_data(settings)
    sequences = read_sequences(shard_path(settings.out, 0))
    assert sequences, "a random model ends some turns"
    for sequence in sequences:
        text = tokenizer.decode(sequence.ids[: sequence.labels_from])
        assert text.startswith("<user>")
        assert text.endswith("<end><assistant>")


def test_texts_and_chats_become_sequences(base: Path, data: DataSettings, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "the dog"}]
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "x" * 60})
    )
    (tmp_path / "plain.txt").write_text("the quick brown fox " * 20)
    settings = DataSettings(
        source=str(base), out=tmp_path / "set", texts=(tmp_path / "chats.jsonl", tmp_path / "plain.txt"),
        max_len=32, prompt_tokens=16,
    )  # fmt: skip
    collect_data(settings)
    tokenizer = TextTokenizer(base)
    first, *others = read_sequences(shard_path(settings.out, 0))
    assert tokenizer.decode(first.ids[first.labels_from :]) == "the dog<end>"
    assert len(others) > 3
    assert all(s.labels_from == 1 and len(s.ids) <= 32 for s in others)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(DataError, match=r"chats\.jsonl:1: each message needs role and content"):
        collect_data(settings.model_copy(update={"out": tmp_path / "other"}))


def test_training_goes_on_from_an_artifact(
    base: Path, data: DataSettings, trained: Any, tmp_path: Path
) -> None:
    run_, history = trained
    artifact = str(run_.settings.out / ARTIFACT)
    # another seed and more data would choose other tokens for the head: it keeps the artifact's
    more = build_run(settings_for(base, data, tmp_path / "more", init=artifact, seed=5, steps=6))
    assert torch.equal(more.student.head_ids, run_.student.head_ids)
    first = train(more)[0]["heldout"]
    last = history[-1]["heldout"]
    assert first["cross_entropy"] == pytest.approx(last["cross_entropy"], rel=0.02)
    card = read_card(tmp_path / "more" / ARTIFACT)
    assert card.training.earlier == read_card(Path(artifact)).training
    for values, problem in (
        ({"exits": (1, 3)}, r"exits \(1, 2\), this training \(1, 3\)"),
        ({"draft_vocab": 100}, "draft_vocab 200, this training 100"),
        ({"exit_norms": True}, "exit_norms False, this training True"),
    ):
        with pytest.raises(ArtifactError, match=problem):
            build_run(settings_for(base, data, tmp_path / "x", init=artifact, **values))


def test_an_online_teacher_says_what_a_stored_one_does(
    base: Path, data: DataSettings, tmp_path: Path
) -> None:
    """Its best tokens, its states, and the loss against all that it says."""
    out = states_of(base, data, tmp_path, top=256)
    values: dict[str, Any] = {"states": True, "withheld": 0.4}
    stored = build_run(settings_for(base, data, tmp_path / "a", teachers=(out,), **values))
    online = build_run(
        settings_for(base, data, tmp_path / "b", teachers=(), teacher_model=str(base), **values)
    )
    assert online.teacher is not None
    for a, b in zip(stored.heldout_batches(), online.heldout_batches(), strict=True):
        assert torch.equal(a.labels, b.labels)
        # All but for neighbours in rank that are equal to the last digit.
        assert (a.teachers[0].ids[:, :5] == b.teachers[0].ids[:, :5]).float().mean() > 0.99
        torch.testing.assert_close(
            a.teachers[0].logprobs[:, :32], b.teachers[0].logprobs, atol=2e-2, rtol=2e-3
        )
        assert a.states is not None
        assert b.states is not None
        torch.testing.assert_close(a.states, b.states, atol=1e-2, rtol=1e-2)
    for step in (0, 3):
        batch, other = stored.data.batch(step), online.data.batch(step)
        taught = online.teacher.teach(other)
        assert batch.states is not None
        assert taught.states is not None
        # The same tokens are withheld, since both draw from the same numbers.
        torch.testing.assert_close(batch.states, taught.states, atol=1e-2, rtol=1e-2)
        assert taught.states.abs().sum(-1).eq(0).float().mean() > 0.4
        # What is kept of a row is what a pass finds.
        online.teacher.keep(len(online.data.plan.packed), 96)
        for again in (online.teacher.teach(other), online.teacher.teach(other)):
            torch.testing.assert_close(again.logprobs, taught.logprobs, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(again.states, taught.states)
        exact = SortedLoss(online.student, 1.0)(other, taught)[0].detach()
        assert float(exact) == pytest.approx(
            float(SortedLoss(stored.student, 1.0)(batch)[0].detach()), rel=0.02
        )


def test_a_draft_learns_from_an_online_teacher(base: Path, data: DataSettings, tmp_path: Path) -> None:
    settings = settings_for(
        base, data, tmp_path / "run", teachers=(), teacher_model=str(base), states=True, compile=True,
        teacher_cache_gb=1.0,
    )  # fmt: skip
    run_ = build_run(settings)
    history = train(run_, stop_after=30)
    again = build_run(settings)
    history = train(again)
    heldout = [record["heldout"] for record in history if "heldout" in record]
    assert heldout[-1]["cross_entropy"][1] < 0.8 * heldout[0]["cross_entropy"][1]
    card = read_card(settings.out / ARTIFACT)
    assert card.states is not None
    assert card.training.targets == {card.states.model: card.states.source_hash}
    assert card.training.objective == "kl"
    assert card.calibration
    other = toy_base(tmp_path / "other", tokenizer_vocab=300)
    with pytest.raises(DataError, match="the teacher other has the tokenizer"):
        build_run(settings.model_copy(update={"teacher_model": str(other)}))
    with pytest.raises(ValueError, match="teachers and teacher_model exclude each other"):
        settings_for(base, data, tmp_path / "x", teacher_model=str(base))


def test_training_ends_by_the_clock(base: Path, data: DataSettings, tmp_path: Path) -> None:
    """With an artifact, and the learning rate where it ends."""
    settings = settings_for(base, data, tmp_path / "run", minutes=0.02, steps=100_000)
    history = train(build_run(settings))
    assert 5 < history[-1]["step"] < 2000
    assert history[-1]["seconds"] >= 1.2
    assert history[-1]["lr"] < 0.2 * settings.lr
    assert "heldout" in history[-1]
    assert read_card(settings.out / ARTIFACT).training.steps == history[-1]["step"]
    assert len(train(build_run(settings))) == len(history)  # it is over
    with pytest.raises(ValueError, match="minutes: the clocks of several workers"):
        train_on_ray(settings, RaySettings(workers=2))


def test_several_data_sets_train_one_draft(base: Path, data: DataSettings, tmp_path: Path) -> None:
    """Each with its own log-probabilities; what lacks them is refused, and so is a stranger's teacher."""
    other = data.model_copy(
        update={
            "out": tmp_path / "other",
            "teacher_out": tmp_path / "teacher",
            "seed": 9,
            "greedy_share": 0.0,
        }
    )
    collect_data(other)
    assert data.teacher_out is not None
    assert other.teacher_out is not None
    folders = (data.out, other.out)
    both = settings_for(
        base, data, tmp_path / "both", teachers=(other.teacher_out, data.teacher_out)
    ).model_copy(update={"data": folders})
    run_ = build_run(both)
    counts = [len(read_corpus([folder]).sequences) for folder in folders]
    assert len(run_.data.train) + len(run_.data.heldout) == sum(counts)
    assert run_.card.training.data == f"{data.out.name}, {other.out.name}"
    with pytest.raises(DataError, match=rf"has the teachers none, .* has \['{base.name}'\]"):
        build_run(both.model_copy(update={"teachers": (data.teacher_out,)}))
    with pytest.raises(DataError, match="belongs to another data set than"):
        build_run(both.model_copy(update={"data": (data.out,)}))


def test_loss_falls_and_exits_improve(trained: Any) -> None:
    run_, history = trained
    losses = [record["loss"] for record in history if "loss" in record]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    measured = [record["heldout"] for record in history if "heldout" in record]
    assert len(measured) == 3
    for exit_index in range(2):
        before, after = (m["teacher_agreement"][exit_index] for m in (measured[0], measured[-1]))
        assert after > before + 0.05
        assert measured[-1]["cross_entropy"][exit_index] < measured[0]["cross_entropy"][exit_index]
    assert (run_.settings.out / CURVES).stat().st_size > 10_000
    embed = build_run(run_.settings).student.embed
    assert torch.equal(run_.student.embed, embed)


EVERY_OPTION = {
    "exit_layers": True, "exit_norms": True, "max_offset": 9, "window": 20, "distill": 0.5, "bf16": True,
}  # fmt: skip


@pytest.mark.parametrize("form", [{}, EVERY_OPTION], ids=["plain", "options"])
def test_a_resumed_run_gives_the_same_bits(
    base: Path, data: DataSettings, tmp_path: Path, form: dict[str, Any]
) -> None:
    whole = build_run(settings_for(base, data, tmp_path / "whole", steps=14, checkpoint_every=5, **form))
    train(whole)
    first = build_run(settings_for(base, data, tmp_path / "parts", steps=14, checkpoint_every=5, **form))
    train(first, stop_after=7)
    second = build_run(first.settings)
    history = train(second)
    assert [r["step"] for r in history if "loss" in r] == list(range(1, 15))
    expected = whole.student.state_dict()
    for name, tensor in second.student.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    one, other = (load_latest(r.settings.out / CHECKPOINTS, r.identity) for r in (whole, second))
    assert one is not None
    assert other is not None
    for key, state in one.optimizer["state"].items():
        assert all(torch.equal(state[k], other.optimizer["state"][key][k]) for k in state)
    assert len(list((tmp_path / "whole" / CHECKPOINTS).iterdir())) == 2


def test_a_checkpoint_of_other_settings_is_refused(base: Path, data: DataSettings, tmp_path: Path) -> None:
    settings = settings_for(base, data, tmp_path, steps=6, warmup=1)
    train(build_run(settings), stop_after=2)
    with pytest.raises(CheckpointError, match="made with other settings or data"):
        train(build_run(settings.model_copy(update={"lr": 1.0})))
    train(build_run(settings.model_copy(update={"eval_every": 1, "storage": "int8"})))
    assert read_card(tmp_path / ARTIFACT).dtype == "int8"
    (found,) = (tmp_path / CHECKPOINTS).glob("*6.pt")
    found.write_bytes(found.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(build_run(settings))


def test_what_does_not_fit_is_refused_before_training(base: Path, data: DataSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exits: 9 exceeds the base's 3 layers"):
        build_run(settings_for(base, data, tmp_path, exits=(1, 9)))
    other = toy_base(tmp_path / "other", tokenizer_vocab=300)
    with pytest.raises(DataError, match="has the tokenizer"):
        build_run(settings_for(other, data, tmp_path))
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        build_run(settings_for(base, data.model_copy(update={"out": tmp_path}), tmp_path))


def test_the_artifact_drafts_and_changes_nothing(base: Path, data: DataSettings, trained: Any) -> None:
    """In the engine, greedy and sampled: the same ids as without drafts, and drafts that are accepted."""
    run_, _ = trained
    path = run_.settings.out / ARTIFACT
    card = read_card(path)
    assert (card.exits, card.draft_vocab, card.training.steps) == ((1, 2), 200, 60)
    assert set(card.training.heldout_agreement) == {"1", "2"}
    assert all(curves.sampled is not None for curves in card.calibration)
    assert [curves.greedy.acceptance[-1] > 0 for curves in card.calibration] == [True, True]
    assert card.training.targets == {base.name: read_corpus([data.out]).cards[0].source_hash}
    loaded = load_draft(str(base), str(path), dtype="float32", kv_blocks=128, threads=1)
    drafter = NestedDrafter(loaded.runner, loaded.exits, heads=loaded.heads)
    engine = make_engine(torch_runner(base), [drafter])
    sequences = read_corpus([data.out]).sequences[:12]
    accepted = drafted = 0
    for depth in (1, 2):
        forced = SpeculationParams(max_draft_tokens=4, force=True, drafter="nested", exit_depth=depth)
        for temperature in (0.0, 0.8):
            sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=5)
            requests = [
                EngineRequest(f"{i}", s.ids[: s.labels_from], sampling, forced)
                for i, s in enumerate(sequences)
            ]
            plain = [replace(r, speculation=SpeculationParams(enabled=False)) for r in requests]
            with_drafts, without = run(engine, requests), run(engine, plain)
            for name, result in with_drafts.items():
                assert result.token_ids == without[name].token_ids
                drafted, accepted = drafted + result.drafted, accepted + result.accepted
    engine.close()
    assert drafted > 500
    assert accepted > 0.05 * drafted


def test_a_draft_learns_to_read_its_targets_states(
    base: Path, data: DataSettings, trained: Any, tmp_path: Path
) -> None:
    """From an artifact without on: it agrees more often with states than without, in the engine too, where
    outputs stay what they are; another target's states are refused."""
    folder = states_of(base, data, tmp_path, top=20)
    earlier, _ = trained
    settings = settings_for(
        base, data, tmp_path / "run", teachers=(folder,), states=True, withheld=0.1, steps=300,
        init=str(earlier.settings.out / ARTIFACT),
    )  # fmt: skip
    train(build_run(settings))
    path = tmp_path / "run" / ARTIFACT
    card = read_card(path)
    assert card.states is not None
    assert (card.states.model, card.states.width) == (base.name, 64)
    agreement: dict[bool, list[float]] = {}
    for reads in (True, False):
        evaluation = EvalSettings(
            base=str(base), artifact=str(path), data=data.out, states=folder if reads else None,
            out=tmp_path / "eval", dtype="float32", context=40, repeats=3, threads=1, max_chain=4,
        )  # fmt: skip
        run_evaluation(evaluation)
        found = json.loads((tmp_path / "eval" / "eval.json").read_text())
        agreement[reads] = [e["agreement"] for e in found["exits"]]
    assert all(a > b for a, b in zip(agreement[True], agreement[False], strict=True)), agreement
    with pytest.raises(DataError, match="holds no states: they are made by s2d draft teach --states"):
        build_run(settings.model_copy(update={"teachers": (data.teacher_out,)}))
    with pytest.raises(DataError, match="the draft reads no states"):
        run_evaluation(evaluation.model_copy(update={"artifact": settings.init, "states": folder}))

    loaded = load_draft(str(base), str(path), dtype="float32", kv_blocks=128, threads=1)
    assert loaded.state_in_for("another target") is None
    accepted: dict[bool, int] = {}
    known = [s for s in read_corpus([data.out]).sequences if s.greedy]
    for reads in (True, False):
        state_in = loaded.state_in_for(card.states.source_hash) if reads else None
        drafter = NestedDrafter(loaded.runner, loaded.exits, heads=loaded.heads, state_in=state_in)
        engine = make_engine(torch_runner(base), [drafter])
        forced = SpeculationParams(max_draft_tokens=3, force=True, drafter="nested", exit_depth=2)
        requests = [
            EngineRequest(
                f"{i}",
                s.ids[: s.labels_from],
                SamplingParams(max_tokens=s.num_labels, temperature=0.0),
                forced,
            )
            for i, s in enumerate(known)
        ]
        results = run(engine, requests)
        for i, s in enumerate(known):
            assert tuple(results[f"{i}"].token_ids) == s.ids[s.labels_from :]
        accepted[reads] = sum(r.accepted for r in results.values())
        engine.close()
    assert accepted[True] > accepted[False], accepted


def test_workers_share_a_step(base: Path, data: DataSettings, tmp_path: Path) -> None:
    parts = build_run(settings_for(base, data, tmp_path, batch_rows=4)).data
    whole = parts.batch(3)
    halves = [parts.batch(3, rank, 2) for rank in (0, 1)]
    assert sum(b.labels.numel() for b in halves) == whole.labels.numel()
    assert halves[1].ids.shape[0] == 2
    width = halves[1].ids.shape[1]
    assert torch.equal(halves[1].ids[0], whole.ids[1, :width])


def test_ray_train_runs_the_same_function(
    base: Path, data: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for Ray Train with its names and signatures: one worker gives what no Ray gives."""
    settings = settings_for(base, data, tmp_path / "ray", steps=6, warmup=1, checkpoint_every=3)
    reports: list[dict[str, Any]] = []
    asked: dict[str, Any] = {}

    class FakeTrainer:
        def __init__(
            self, loop: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any
        ) -> None:
            asked.update(scaling=scaling_config, run=run_config)
            self._work = lambda: loop(train_loop_config)

        def fit(self) -> None:
            self._work()

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    ray_torch = SimpleNamespace(
        TorchTrainer=FakeTrainer, get_device=lambda: torch.device("cpu"), prepare_model=lambda model: model
    )
    ray_train = SimpleNamespace(
        FailureConfig=dict, RunConfig=dict, ScalingConfig=dict, get_context=lambda: context,
        report=reports.append, torch=ray_torch,
    )  # fmt: skip
    fake = SimpleNamespace(is_initialized=lambda: True, train=ray_train)
    for name, module in (("ray", fake), ("ray.train", ray_train), ("ray.train.torch", ray_torch)):
        monkeypatch.setitem(sys.modules, name, module)
    train_on_ray(settings, RaySettings(workers=1, cpus=2))
    assert asked["scaling"] == {"num_workers": 1, "use_gpu": False, "resources_per_worker": {"CPU": 2.0}}
    assert [report["step"] for report in reports] == [3, 6]
    alone = build_run(settings.model_copy(update={"out": tmp_path / "alone"}))
    train(alone)
    found = [load_latest(tmp_path / name / CHECKPOINTS, alone.identity) for name in ("ray", "alone")]
    assert found[0] is not None
    assert found[1] is not None
    assert all(torch.equal(v, found[1].student[k]) for k, v in found[0].student.items())
    with pytest.raises(ValueError, match="batch_rows 4 is not a multiple of 3 workers"):
        train_on_ray(settings, RaySettings(workers=3))
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(RayTrainUnavailableError, match="train"):
        train_on_ray(settings, RaySettings())


def test_evaluation_reports_every_exit(base: Path, data: DataSettings, trained: Any, tmp_path: Path) -> None:
    run_, _ = trained
    settings = EvalSettings(
        base=str(base), artifact=str(run_.settings.out / ARTIFACT), data=data.out, heldout=0.2,
        target=str(base), out=tmp_path, dtype="float32", context=40, repeats=3, threads=1, max_chain=4,
    )  # fmt: skip
    table = run_evaluation(settings)
    assert "| 1 |" in table
    assert "Predicted speed over plain decoding" in table
    found = json.loads((tmp_path / "eval.json").read_text())
    assert [e["depth"] for e in found["exits"]] == [1, 2]
    for report in found["exits"]:
        assert 0 < report["agreement"] < 1
        assert len(report["tokens_per_round"]) == 4
        assert report["tokens_per_round"] == sorted(report["tokens_per_round"])
        assert 1 <= report["tokens_per_round"][0] <= 2
        assert report["draft_s"] > 0

    def agreement(draft_context: int) -> list[float]:
        run_evaluation(settings.model_copy(update={"draft_context": draft_context}))
        return [e["agreement"] for e in json.loads((tmp_path / "eval.json").read_text())["exits"]]

    assert agreement(10_000) == [e["agreement"] for e in found["exits"]]
    untrained = run_evaluation(settings.model_copy(update={"artifact": None, "exits": (1, 2)}))
    before = json.loads((tmp_path / "eval.json").read_text())
    assert untrained
    assert all(a["agreement"] > b["agreement"] for a, b in zip(found["exits"], before["exits"], strict=True))
    assert (tmp_path / "eval.png").is_file()


def test_the_command_line_trains(base: Path, data: DataSettings, tmp_path: Path) -> None:
    runner = CliRunner()
    config = tmp_path / "train.yaml"
    config.write_text(f"base: {base}\ndata: [{data.out}]\nout: {tmp_path / 'out'}\nexits: [1]\nsteps: 3\n")
    common = [
        "draft",
        "train",
        "-c",
        str(config),
        "--batch-rows",
        "2",
        "--row-tokens",
        "64",
        "--threads",
        "1",
    ]
    done = runner.invoke(app, [*common, "--warmup", "0", "--draft-vocab", "64"])
    assert done.exit_code == 0, done.output
    assert read_card(tmp_path / "out" / ARTIFACT).exits == (1,)
    refused = runner.invoke(app, [*common, "--exit", "2", "--exit", "1"])
    assert refused.exit_code == 1
    assert "ascending" in refused.output + (refused.stderr if refused.stderr_bytes else "")
