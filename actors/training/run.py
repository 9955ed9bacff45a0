"""What a training run is made of: student, data and optimiser, built from its settings in one place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.drafting.draft_load import check_base
from actors.models.convert import model_folder
from actors.models.draft_artifact import DraftWeights, load_artifact, resolve_artifact, save_artifact
from actors.models.draft_card import ArtifactError, DraftCard, StatesCard, TrainingRecord, base_hash
from actors.models.llama_load import load_config, load_llama_weights
from actors.models.llama_weights import LlamaWeights
from actors.models.load import choose_device
from actors.models.source import resolve_source
from actors.text.tokenizer import TextTokenizer
from actors.training.batches import Batch, BatchPlan, build_batch, pack_rows
from actors.training.calibrate import calibrate
from actors.training.corpus import (
    Example,
    RawCorpus,
    build_examples,
    draft_vocabulary,
    read_corpus,
)
from actors.training.online_teacher import OnlineTeacher
from actors.training.settings import TrainSettings
from actors.training.student import SortedStudent
from actors.training.token_store import DataError, content_hash

_OFFSETS, _ORDER = 1, 2
"""Streams of random numbers that share a run's seed."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Examples to learn from and held-out ones, and the plan that says which make up a step."""

    train: list[Example]
    heldout: list[Example]
    plan: BatchPlan
    settings: TrainSettings
    max_offset: int

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Worker `rank`'s share of a step's rows. The same whoever asks, and whenever."""
        offsets = np.random.default_rng((self.settings.seed, _OFFSETS, step, rank))
        batch = build_batch(
            self.train,
            self.plan.rows(step)[rank::world],
            self.settings.row_tokens,
            offsets=offsets,
            max_offset=self.max_offset,
            anchors=self.settings.anchors,
            withheld=self.settings.withheld,
            mark_withheld=self._marks,
        )
        return replace(batch, numbers=tuple(self.plan.numbers(step)[rank::world]))

    @property
    def _marks(self) -> bool:
        """Whether states come from an online teacher, which must know whose to withhold."""
        return self.settings.states and self.settings.teacher_model is not None

    def heldout_batches(self) -> list[Batch]:
        lengths = [len(e.ids) for e in self.heldout]
        rows = pack_rows(lengths, range(len(lengths)), self.settings.row_tokens)[: self.settings.heldout_rows]
        size = self.settings.batch_rows
        return [
            build_batch(self.heldout, rows[i : i + size], self.settings.row_tokens, mark_withheld=self._marks)
            for i in range(0, len(rows), size)
        ]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """`identity` digests what the weights depend on: settings, base and data."""

    settings: TrainSettings
    student: SortedStudent
    data: TrainingData
    card: DraftCard
    identity: str
    device: torch.device
    teacher: OnlineTeacher | None = None

    def heldout_batches(self) -> list[Batch]:
        """On the device, with what the online teacher says of them."""
        batches = [batch.to(self.device) for batch in self.data.heldout_batches()]
        if self.teacher is None:
            return batches
        with self.autocast():
            return [self.teacher.annotate(batch) for batch in batches]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def export(
        self, path: Path, *, steps: int, labels: int, seconds: float, agreement: dict[str, float]
    ) -> None:
        """Write the artifact as it is now, with its confidence calibrated on the held-out labels."""
        calibration = calibrate(self.student, self.heldout_batches(), self.settings.seed)
        progress = {"steps": steps, "tokens": labels, "hours": round(seconds / 3600, 3)}
        record = self.card.training.model_copy(update={**progress, "heldout_agreement": agreement})
        save_artifact(
            path,
            self.card.model_copy(update={"training": record, "calibration": calibration}),
            self.student.draft_weights(),
        )


def build_run(settings: TrainSettings, say: Callable[[str], None] = lambda message: None) -> TrainingRun:
    """Load base and data. Raises ValueError (DataError) for what does not fit together."""
    torch.manual_seed(settings.seed)
    device = choose_device(settings.device)
    resolved = resolve_source(settings.base)
    folder = model_folder(resolved, say)
    config = load_config(folder)
    base = _read_base(folder, settings, config.num_hidden_layers)
    tokenizer_hash = TextTokenizer(folder).vocab_hash
    names = ", ".join(map(str, settings.data))
    say(f"reading {names}")
    corpus = read_corpus(settings.data, settings.teachers, states=settings.states)
    made_with = corpus.cards[0].tokenizer_hash
    if made_with != tokenizer_hash:
        raise DataError(
            f"{settings.data[0]} ({corpus.cards[0].name}) has the tokenizer {made_with[:12]}, "
            f"the base {resolved.name} {tokenizer_hash[:12]}"
        )
    held = corpus.is_heldout(settings.heldout)
    heldout, kept = np.flatnonzero(held).tolist(), np.flatnonzero(~held).tolist()
    vocab_size = base.embed.shape[0]
    earlier = _read_earlier(settings, base, resolved.name, config.num_hidden_layers, tokenizer_hash)
    corpus = replace(corpus, vocab_size=vocab_size)
    if earlier is not None:
        head_ids = earlier[1].head_ids
    else:
        head_ids = draft_vocabulary(corpus.table, kept, settings.draft_vocab, vocab_size)
    train = _usable(build_examples(corpus, kept, head_ids), settings.row_tokens)
    held_examples = _usable(build_examples(corpus, heldout, head_ids), settings.row_tokens)
    if not train:
        raise DataError(f"{names} holds no sequence to train on")
    plan = BatchPlan(
        [len(e.ids) for e in train], settings.batch_rows, settings.row_tokens, _seed(settings.seed, _ORDER)
    )
    room = config.get_text_config().max_position_embeddings - settings.row_tokens
    data = TrainingData(train, held_examples, plan, settings, max(0, min(settings.max_offset, room)))
    taught_by = [(c.name, c.source_hash) for c in corpus.teacher_cards]
    states = _states_card(corpus) if settings.states and corpus.teacher_cards else None
    teacher = None
    if settings.teacher_model is not None:
        teacher, card_of_states = _online_teacher(
            settings, settings.teacher_model, tokenizer_hash, head_ids, say
        )
        taught_by = [(card_of_states.model, card_of_states.source_hash)]
        states = card_of_states if settings.states else None
        teacher = teacher.to(device)
        if settings.teacher_cache_gb:
            _keep_states(teacher, settings, len(plan.packed), say)
    student = build_student(base, settings, head_ids, 0 if states is None else states.width)
    if earlier is not None:
        student.take(earlier[1])
    student = student.to(device)
    data_hash = content_hash(settings.data)
    card = DraftCard(
        base=resolved.name,
        base_hash=base_hash(base),
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        hidden_size=base.embed.shape[1],
        exits=settings.exits,
        exit_layers=settings.exit_layers,
        exit_norms=settings.exit_norms,
        draft_vocab=len(head_ids),
        window=settings.window,
        states=states,
        dtype=settings.storage,
        training=TrainingRecord(
            data=", ".join(c.name for c in corpus.cards),
            data_hash=data_hash,
            objective=_objective(settings),
            seed=settings.seed,
            targets=dict(taught_by) or {c.model: c.source_hash for c in corpus.cards},
            earlier=None if earlier is None else earlier[0].training,
        ),
    )
    rows = [c.model_dump_json() for c in corpus.teacher_cards]
    identity = hashlib.sha256(
        repr((settings.identity, card.base_hash, data_hash, rows or taught_by)).encode()
    )
    say(f"{len(train)} sequences to train on, {len(held_examples)} held out, {len(head_ids)} draft tokens")
    return TrainingRun(settings, student, data, card, identity.hexdigest(), device, teacher)


def _read_base(folder: Path, settings: TrainSettings, depth: int) -> LlamaWeights:
    if settings.exits[-1] > depth:
        raise ValueError(f"exits: {settings.exits[-1]} exceeds the base's {depth} layers")
    needed = depth if settings.exit_layers else settings.exits[-1]
    return load_llama_weights(folder, torch.float32, torch.device("cpu"), num_layers=needed)[0]


def _read_earlier(
    settings: TrainSettings, base: LlamaWeights, name: str, base_layers: int, tokenizer_hash: str
) -> tuple[DraftCard, DraftWeights] | None:
    """The draft to go on from, if any. Raises ArtifactError, naming both sides, for one of another shape."""
    if settings.init is None:
        return None
    path = resolve_artifact(settings.init)
    card, weights = load_artifact(path, torch.float32)
    check_base(path, card, base, name, base_layers, tokenizer_hash)
    wanted = settings.draft_vocab or card.vocab_size
    for what, theirs, ours in (
        ("exits", card.exits, settings.exits),
        ("exit_layers", card.exit_layers, settings.exit_layers),
        ("exit_norms", card.exit_norms, settings.exit_norms),
        ("draft_vocab", card.draft_vocab, min(wanted, card.vocab_size)),
        ("window", card.window, settings.window),
    ):
        if theirs != ours:
            raise ArtifactError(f"init: {path} has {what} {theirs}, this training {ours}")
    if card.states is not None and not settings.states:
        raise ArtifactError(f"init: {path} reads the states of {card.states.model}, this training no states")
    return card, weights


def _online_teacher(
    settings: TrainSettings,
    source: str,
    tokenizer_hash: str,
    head_ids: Tensor,
    say: Callable[[str], None],
) -> tuple[OnlineTeacher, StatesCard]:
    """The target that teaches as training goes. Raises DataError for another tokenizer."""
    resolved = resolve_source(source)
    folder = model_folder(resolved, say)
    theirs = TextTokenizer(folder).vocab_hash
    if theirs != tokenizer_hash:
        raise DataError(
            f"the teacher {resolved.name} has the tokenizer {theirs[:12]}, the base {tokenizer_hash[:12]}"
        )
    weights, info = load_llama_weights(folder, torch.float32, torch.device("cpu"))
    card = StatesCard(model=resolved.name, source_hash=resolved.content_hash, width=info.hidden_size)
    return OnlineTeacher(weights, head_ids, states=settings.states), card


def _keep_states(
    teacher: OnlineTeacher, settings: TrainSettings, count: int, say: Callable[[str], None]
) -> None:
    fits = int(settings.teacher_cache_gb * 1e9 / teacher.row_bytes(settings.row_tokens))
    if count <= fits:
        teacher.keep(count, settings.row_tokens)
    else:
        say(f"teacher_cache_gb holds {fits} of {count} rows: the teacher is run every time")


def _states_card(corpus: RawCorpus) -> StatesCard:
    teacher = corpus.teacher_cards[0]
    return StatesCard(model=teacher.name, source_hash=teacher.source_hash, width=teacher.states)


def build_student(
    base: LlamaWeights, settings: TrainSettings, head_ids: Tensor, states: int = 0
) -> SortedStudent:
    return SortedStudent(
        base,
        settings.exits,
        head_ids,
        exit_layers=settings.exit_layers,
        exit_norms=settings.exit_norms,
        train_head=settings.train_head,
        window=settings.window,
        states=states,
    )


def _usable(examples: list[Example], row_tokens: int) -> list[Example]:
    """Those that have a label within a row."""
    return [e for e in examples if e.labels_from < min(len(e.ids), row_tokens)]


def _seed(seed: int, stream: int) -> int:
    return seed * 16 + stream


def _objective(settings: TrainSettings) -> str:
    if not (settings.teachers or settings.teacher_model):
        return "ce"
    return "kl" if settings.distill == 1.0 else f"{settings.distill:g} kl + {1 - settings.distill:g} ce"


def build_optimizer(student: SortedStudent, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases."""
    learning = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for n, p in student.named_parameters() if p.requires_grad and p.dim() == 2 and n != "norms"]
    known = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": [p for p in learning if id(p) not in known], "weight_decay": 0.0},
    ]
    fused = next(student.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)


def learning_rate(settings: TrainSettings, step: int, seconds: float = 0.0) -> float:
    """Of step `step`, 0 being the first, `seconds` into the training: linear warm-up, then a cosine down to
    min_lr_ratio, at the last step or, if that is sooner, when `minutes` are over."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.minutes is not None:
        progress = max(progress, seconds / (60 * settings.minutes))
    low = settings.min_lr_ratio
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
