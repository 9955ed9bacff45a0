"""Data generated in one resident batch: answers are the target's own, prompts are dealt out whole, and an
interrupted data set goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.engine.messages import EngineRequest
from actors.models.llama_load import load_llama_weights
from actors.sampling.params import SamplingParams
from actors.text.tokenizer import TextTokenizer
from actors.training import resident
from actors.training.collect import collect_data
from actors.training.generate import user_turn
from actors.training.resident import Pace, ResidentTalk, Script, talk
from actors.training.settings import DataSettings
from actors.training.token_store import TokenSequence, read_sequences, shard_count, shard_path
from tests.exactness.harness import make_engine, run, torch_runner
from tests.toy_draft import toy_base

WORDS = ("fox", "dog", "lazy", "quick", "name", "tags")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"), layers=3, learnable=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    # Of different lengths, and more of them than rows.
    texts = [" ".join(WORDS[: 1 + n % 4]) + f" {n}" for n in range(23)]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return path


def settings_for(base: Path, out: Path, **values: object) -> DataSettings:
    fields: dict[str, object] = {
        "source": str(base), "out": out, "resident": True, "teacher_top": 0, "dtype": "float32", "batch": 5,
        "max_len": 40, "prompt_tokens": 8, "shard": 8, "device": "cpu",
    }  # fmt: skip
    return DataSettings.model_validate(fields | values)


def stored(out: Path) -> list[TokenSequence]:
    return [s for index in range(shard_count(out)) for s in read_sequences(shard_path(out, index))]


def test_greedy_answers_to_given_prompts_are_the_engines(base: Path, prompts: Path, tmp_path: Path) -> None:
    collect_data(settings_for(base, tmp_path / "set", prompts=prompts, greedy_share=1.0))
    sequences = stored(tmp_path / "set")
    assert len(sequences) == 23
    tokenizer = TextTokenizer(base)
    asked = {tokenizer.decode(s.ids[: s.labels_from]) for s in sequences}
    assert len(asked) == 23  # each prompt once
    engine = make_engine(torch_runner(base), [PromptLookupDrafter()])
    for sequence in sequences:
        assert sequence.greedy
        prompt = sequence.ids[: sequence.labels_from]
        sampling = SamplingParams(
            max_tokens=40 - len(prompt), temperature=0.0, eos_token_ids=tokenizer.eos_token_ids
        )
        (result,) = run(engine, [EngineRequest("x", prompt, sampling)]).values()
        assert tuple(result.token_ids) == sequence.ids[sequence.labels_from :]
    engine.close()


def test_a_target_talks_to_itself_by_its_template(base: Path, tmp_path: Path) -> None:
    collect_data(settings_for(base, tmp_path / "set", samples=20, greedy_share=0.5))
    sequences = stored(tmp_path / "set")
    turn = user_turn(TextTokenizer(base))
    assert len(sequences) == 20
    for sequence in sequences:
        prompt = sequence.ids[: sequence.labels_from]
        assert prompt[: len(turn.before)] == turn.before
        assert prompt[-len(turn.header) :] == turn.header
        assert len(prompt) - len(turn.before) - len(turn.header) < 8
        assert len(sequence.ids) <= 40
    assert 3 < sum(s.greedy for s in sequences) < 17
    assert len({s.ids for s in sequences}) > 15


def test_an_interrupted_set_goes_on(base: Path, prompts: Path, tmp_path: Path) -> None:
    given = settings_for(base, tmp_path / "given", prompts=prompts)
    collect_data(given)
    shard_path(given.out, 2).unlink()
    shard_path(given.out, 1).unlink()
    collect_data(given)
    asked = [s.ids[: s.labels_from] for s in stored(given.out)]
    assert len(asked) == len(set(asked)) == 23
    talked = settings_for(base, tmp_path / "talked", samples=8)
    collect_data(talked)
    collect_data(talked.model_copy(update={"samples": 16}))
    assert len({s.ids for s in stored(talked.out)}) > 12


def test_prompts_may_differ_in_their_first_token(base: Path) -> None:
    """As where a template begins with the role: every conversation keeps that of its own prompt."""
    weights, _ = load_llama_weights(base, torch.float32, torch.device("cpu"))
    prompts = tuple((40 + n % 3, 50 + n, *range(60, 61 + n % 2)) for n in range(11))
    script = Script(prompts, (), (), (0,), (0,))
    run_ = ResidentTalk(weights, script, Pace(1.0, 0.8, 1.0, 8), 4, 12)
    made = [f for part, _ in talk(run_, len(prompts)) for f in part]
    assert sorted(tuple(f.ids[: f.labels_from].tolist()) for f in made) == sorted(prompts)
    engine = make_engine(torch_runner(base), [PromptLookupDrafter()])
    for finished in made:
        ids = finished.ids.tolist()
        prompt = tuple(ids[: finished.labels_from])
        sampling = SamplingParams(max_tokens=12 - len(prompt), temperature=0.0, eos_token_ids=(0,))
        (result,) = run(engine, [EngineRequest("x", prompt, sampling)]).values()
        assert result.token_ids == ids[finished.labels_from :]
    engine.close()


def test_sampled_answers_follow_the_targets_distribution(base: Path) -> None:
    """The first token of many sampled answers to one prompt, against the model's own probabilities."""
    weights, _ = load_llama_weights(base, torch.float32, torch.device("cpu"))
    turn = user_turn(TextTokenizer(base))
    prompt = (*turn.before, 5, 9, *turn.header)
    script = Script((prompt, prompt), turn.before, turn.ends, turn.header, turn.ends)
    pace = Pace(1.0, 0.7, 0.0, 8)
    torch.manual_seed(3)
    many = Script((prompt,) * 4000, script.before, script.ends, script.header, script.answer_ends)
    made = [
        f for part, _ in talk(ResidentTalk(weights, many, pace, 500, len(prompt) + 2), 4000) for f in part
    ]
    assert len(made) == 4000
    drawn = np.bincount([int(f.ids[f.labels_from]) for f in made], minlength=weights.embed.shape[0]) / 4000
    engine = make_engine(torch_runner(base), [PromptLookupDrafter()])
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    (result,) = run(engine, [EngineRequest("x", prompt, sampling)]).values()
    engine.close()
    wanted = np.zeros(len(drawn))
    for token, logprob in result.logprobs[0].top:
        wanted[token] = np.exp(logprob / 0.7)
    # Twenty tokens are not all: compare the shares among them.
    listed = wanted > 0
    shares, expected = drawn[listed] / drawn[listed].sum(), wanted[listed] / wanted.sum()
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_rows_record_across_looks_of_the_host(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often the host looks changes nothing."""
    weights, _ = load_llama_weights(base, torch.float32, torch.device("cpu"))
    turn = user_turn(TextTokenizer(base))
    script = Script((), turn.before, turn.ends, turn.header, turn.ends)
    found = []
    for steps in (3, 200):
        monkeypatch.setattr(resident, "RECORDED_STEPS", steps)
        torch.manual_seed(1)
        made = [
            f
            for part, _ in talk(ResidentTalk(weights, script, Pace(1.0, 0.8, 0.5, 9), 4, 30), 20)
            for f in part
        ]
        found.append({tuple(f.ids.tolist()) for f in made})
    assert len(found[0] & found[1]) >= 16  # the last ones of twenty depend on when it is looked


def test_settings_that_exclude_each_other_are_refused(base: Path, tmp_path: Path) -> None:
    for values in ({"teacher_top": 5}, {"top_p": 0.9}, {"part": "1/2"}, {"dtype": "int8"}):
        with pytest.raises(ValidationError, match="resident goes with"):
            settings_for(base, tmp_path, **values)
