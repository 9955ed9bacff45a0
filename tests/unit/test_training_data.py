"""Data sets that go on: more prompts, other prompts, other texts, and what a teacher said of them before.
And settings that must reach what runs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from actors.drafting.draft_load import load_draft
from actors.drafting.nested import NestedDrafter
from actors.models.llama_load import UnsupportedModelError
from actors.models.load import load_runner
from actors.training import collect, evaluate, loop, on_ray, resident_data, run
from actors.training.collect import collect_data, teach
from actors.training.corpus import read_corpus
from actors.training.on_ray import RaySettings, train_on_ray
from actors.training.settings import DataSettings, TeacherSettings, TrainSettings
from actors.training.token_store import DataError, TokenSequence, shard_count, shard_path
from cluster.cli.main import app
from tests.toy_draft import toy_base, toy_draft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"), layers=2)


def settings_for(base: Path, folder: Path, **values: object) -> DataSettings:
    fields: dict[str, object] = {
        "source": str(base), "out": folder / "set", "teacher_out": folder / "teacher", "teacher_top": 5,
        "dtype": "float32", "threads": 1, "max_len": 24, "prompt_tokens": 8, "shard": 48, "device": "cpu",
    }  # fmt: skip
    return DataSettings.model_validate(fields | values)


def write_prompts(path: Path, count: int, first: str = "fox") -> Path:
    texts = [first, *(f"dog {n}" for n in range(1, count))]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts) + "\n")
    return path


def teacher_for(data: DataSettings, folder: Path, **values: object) -> TeacherSettings:
    fields: dict[str, object] = {
        "data": data.out, "source": data.source, "out": folder, "dtype": "float32", "threads": 1, "top": 3,
    }  # fmt: skip
    return TeacherSettings.model_validate(fields | values)


def prompts_of(data: DataSettings, *teachers: Path) -> list[tuple[int, ...]]:
    return [s.ids[: s.labels_from] for s in read_corpus([data.out], teachers).sequences]


def test_a_partial_last_shard_is_completed(base: Path, tmp_path: Path) -> None:
    """When prompts are added, it holds the answers to all of them, and so do its teachers."""
    data = settings_for(base, tmp_path, prompts=write_prompts(tmp_path / "prompts.jsonl", 60))
    assert data.teacher_out is not None
    collect_data(data)
    later = teach(teacher_for(data, tmp_path / "later"))
    before = prompts_of(data, data.teacher_out, later)
    assert len(before) == 60
    whole = [shard_path(folder, 0) for folder in (data.out, data.teacher_out, later)]
    written = [path.stat().st_mtime_ns for path in whole]

    write_prompts(tmp_path / "prompts.jsonl", 80)
    collect_data(data)
    with pytest.raises(DataError, match="one row for each label"):
        prompts_of(data, later)
    teach(teacher_for(data, later))
    after = prompts_of(data, data.teacher_out, later)
    assert len(set(after)) == len(after) == 80
    assert after[:60] == before
    assert [path.stat().st_mtime_ns for path in whole] == written  # what was whole is kept

    # What is already there is enough for fewer.
    collect_data(settings_for(base, tmp_path / "talk", samples=6, shard=4))
    there = [shard_path(tmp_path / "talk" / "set", index).read_bytes() for index in (0, 1)]
    collect_data(settings_for(base, tmp_path / "talk", samples=5, shard=4))
    assert [shard_path(tmp_path / "talk" / "set", index).read_bytes() for index in (0, 1)] == there


@pytest.mark.parametrize(("count", "first"), [(6, "lazy"), (5, "fox")])
def test_other_prompts_need_another_folder(base: Path, tmp_path: Path, count: int, first: str) -> None:
    """Under the same name: a file that does not begin with what was answered."""
    data = settings_for(base, tmp_path, prompts=write_prompts(tmp_path / "prompts.jsonl", 6))
    collect_data(data)
    write_prompts(tmp_path / "prompts.jsonl", count, first)
    with pytest.raises(DataError, match="answers other prompts"):
        collect_data(data)


def test_a_resident_set_refuses_other_prompts(base: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    data = settings_for(base, tmp_path, prompts=prompts, resident=True, teacher_top=0, batch=4)
    collect_data(data)
    write_prompts(prompts, 8)
    collect_data(data)
    assert len(set(prompts_of(data))) == len(prompts_of(data)) == 8
    write_prompts(prompts, 8, "lazy")
    with pytest.raises(DataError, match="answers prompts that"):
        collect_data(data)


def test_other_texts_need_another_folder(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("the quick brown fox " * 40)
    data = settings_for(base, tmp_path, texts=(text,), shard=2)
    collect_data(data)
    collect_data(data)
    count = shard_count(data.out)
    assert count > 1
    text.write_text("the lazy dog " * 10)
    with pytest.raises(DataError, match="holds data of other settings"):
        collect_data(data)
    assert shard_count(data.out) == count


def test_states_that_a_target_does_not_give_are_refused_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written that a teacher without states would not fit."""
    (tmp_path / "plain.txt").write_text("the quick brown fox " * 10)
    data = settings_for(base, tmp_path, texts=(tmp_path / "plain.txt",))
    collect_data(data)
    monkeypatch.setattr(collect, "load_runner", partial(load_runner, backend="generic"))
    with pytest.raises(UnsupportedModelError, match=r"states: .* runs on GenericRunner, which gives none"):
        teach(teacher_for(data, tmp_path / "t", states=True))
    assert teach(teacher_for(data, tmp_path / "t")) == tmp_path / "t"


def test_cost_is_that_of_the_draft_that_is_evaluated(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads states and no more context than the one whose agreement is measured."""
    toy_draft(tmp_path / "d.safetensors", base, reads_states=True)
    draft = load_draft(str(base), str(tmp_path / "d.safetensors"), dtype="float32", kv_blocks=16, threads=1)
    made: list[NestedDrafter] = []

    class Noted(NestedDrafter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(evaluate, "NestedDrafter", Noted)
    answer = evaluate.Answer(TokenSequence(tuple(range(2, 40)), 30, True))
    evaluate.evaluate(draft, [answer], max_chain=2, context=64, repeats=3, draft_context=40)
    assert [(drafter.reads_states, drafter._kept) for drafter in made] == [(True, 40)] * 4


def train_settings(**values: Any) -> TrainSettings:
    return TrainSettings.model_validate({"base": "b", "data": ("d",), "out": "o", **values})


@pytest.mark.parametrize(("threads", "cpus", "taken"), [(2, 3.0, 2), (0, 3.0, 3), (0, 0.5, 1)])
def test_a_worker_on_ray_takes_its_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, cpus: float, taken: int
) -> None:
    """Those of the settings, or as many as it reserves CPUs."""

    class FakeTrainer:
        def __init__(self, work: Any, *, train_loop_config: Any, **config: Any) -> None:
            self.fit = lambda: work(train_loop_config)

    ray_torch = SimpleNamespace(
        TorchTrainer=FakeTrainer, get_device=lambda: torch.device("cpu"), prepare_model=lambda model: model
    )
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    ray_train = SimpleNamespace(
        FailureConfig=dict, RunConfig=dict, ScalingConfig=dict, get_context=lambda: context, torch=ray_torch
    )
    fake = SimpleNamespace(is_initialized=lambda: True, train=ray_train)
    for name, module in (("ray", fake), ("ray.train", ray_train), ("ray.train.torch", ray_torch)):
        monkeypatch.setitem(sys.modules, name, module)
    seen: list[object] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(run, "build_run", lambda settings: seen.append("built"))
    monkeypatch.setattr(loop, "train", lambda run, **options: seen.append("trained"))
    train_on_ray(train_settings(threads=threads), RaySettings(cpus=cpus))
    assert sorted(seen, key=str) == [taken, "built", "trained"]
    assert seen.index(taken) < seen.index("trained")


def test_what_ray_reserves_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RaySettings] = []
    monkeypatch.setattr(on_ray, "train_on_ray", lambda settings, cluster: asked.append(cluster))
    common = ["draft", "train", "--base", "b", "--data", "d", "--out", "o", "--ray-workers", "2"]
    for options in ([], ["--ray-cpus", "4", "--ray-max-failures", "0"]):
        done = CliRunner().invoke(app, [*common, *options])
        assert done.exit_code == 0, done.output
    assert asked == [RaySettings(workers=2), RaySettings(workers=2, cpus=4, max_failures=0)]


def test_a_resident_set_takes_its_threads(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def stop(*args: object) -> None:
        raise OSError("far enough")

    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(resident_data, "load_llama_weights", stop)
    with pytest.raises(OSError, match="far enough"):
        collect_data(settings_for(base, tmp_path, resident=True, teacher_top=0, threads=3))
    assert seen == [3]
