"""A target that teaches while a draft trains: its whole distribution over what the draft can say, and its
last hidden states, from a pass of its own over each batch. Nothing is stored, so that data may be large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.models.linear import CudaFloat32Product, MatrixProduct, PlainProduct, can_return_float32
from actors.models.llama_weights import LlamaWeights
from actors.models.runner import normalised
from actors.training.batches import Batch, TeacherBatch
from actors.training.student import Shape, StudentLayer, rotation, visible

_ROWS = 8192
"""Labels whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True, slots=True)
class Taught:
    """What the target says of a batch's N labels, and the states that the draft may read.

    logprobs: float32 [N, D], normalised over the draft's vocabulary; within: float32 [N], the probability of
    that vocabulary; states: [B, L, H] as in `Batch`, None unless wanted.
    """

    logprobs: Tensor
    within: Tensor
    states: Tensor | None


class OnlineTeacher(nn.Module):
    """The target's layers, read once a batch, without gradient.

    Args:
        weights: float32, of all layers.
        head_ids: int64 [D], the draft's vocabulary, ascending.
        states: whether the draft reads states.
    """

    embed: Tensor
    inv_freq: Tensor
    head: Tensor
    norm: Tensor
    head_ids: Tensor

    def __init__(self, weights: LlamaWeights, head_ids: Tensor, *, states: bool) -> None:
        super().__init__()
        shape = Shape(weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.rms_norm_eps)
        self._scaling, self._states = weights.attention_scaling, states
        buffers = {
            "embed": weights.embed.float(),
            "inv_freq": weights.inv_freq.float(),
            "head": weights.head.float(),
            "norm": weights.final_norm.float(),
            "head_ids": head_ids,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.layers = nn.ModuleList(StudentLayer(layer, shape) for layer in weights.layers)
        self.requires_grad_(False)
        self._kept: Tensor | None = None
        self._seen: set[int] = set()

    def row_bytes(self, row_tokens: int) -> int:
        """What `keep` takes for a row."""
        return row_tokens * self.embed.shape[1] * 2

    def keep(self, rows: int, row_tokens: int) -> None:
        """Keep the states of a plan's rows (float16) on the device: each row is run once."""
        shape = (rows, row_tokens, self.embed.shape[1])
        self._kept = torch.zeros(shape, dtype=torch.float16, device=self.embed.device)
        self._seen.clear()

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        states = self._states_of(batch)
        logprobs: list[Tensor] = []
        within: list[Tensor] = []
        for logits in self._logits(states, batch):
            listed = logits[:, self.head_ids]
            all_of_it = torch.logsumexp(logits, dim=-1)
            logprobs.append(F.log_softmax(listed, dim=-1))
            within.append((torch.logsumexp(listed, dim=-1) - all_of_it).exp())
        return Taught(torch.cat(logprobs), torch.cat(within), self._read_states(states, batch))

    @torch.no_grad()
    def annotate(self, batch: Batch, top: int = 32) -> Batch:
        """The batch as stored rows of this teacher would make it: its `top` best tokens, and states."""
        states = self._states_of(batch)
        row_of = torch.full((self.head.shape[0],), -1, device=states.device)
        row_of[self.head_ids] = torch.arange(len(self.head_ids), device=states.device)
        ids: list[Tensor] = []
        logprobs: list[Tensor] = []
        for logits in self._logits(states, batch):
            values, tokens = logits.topk(top, dim=-1)
            ids.append(row_of[tokens])
            logprobs.append(values - torch.logsumexp(logits, dim=-1, keepdim=True))
        rows = TeacherBatch(torch.cat(ids), torch.cat(logprobs))
        return replace(batch, teachers=(rows,), states=self._read_states(states, batch))

    def _states_of(self, batch: Batch) -> Tensor:
        """float16 [B, L, H] after the last layer, normalised, before the final norm's weight."""
        if self._kept is None or not batch.numbers:
            return self._run(batch)
        rows = torch.tensor(batch.numbers, device=self._kept.device)
        width = batch.ids.shape[1]
        if not self._seen.issuperset(batch.numbers):
            self._kept[rows, :width] = self._run(batch)
            self._seen.update(batch.numbers)
        return self._kept[rows, :width]

    def _run(self, batch: Batch) -> Tensor:
        cos, sin = rotation(batch.positions, self.inv_freq, self._scaling)
        mask = visible(batch.sequence, None)
        hidden = F.embedding(batch.ids, self.embed)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask)
        return normalised(hidden).half()

    def _logits(self, states: Tensor, batch: Batch) -> Iterator[Tensor]:
        """float32 [n, V] of the batch's labels, in parts. Autocast may round the factors of the product to
        bfloat16, but not what comes out: close logits would be equal."""
        device, product = self.head.device, self._head_product()
        for part in torch.split(states[batch.rows, batch.columns], _ROWS):
            with torch.autocast(device.type, enabled=False):
                logits = product(part.float() * self.norm)
            yield logits

    def _head_product(self) -> MatrixProduct:
        device = self.head.device
        if torch.is_autocast_enabled(device.type) and can_return_float32(device):
            return CudaFloat32Product(self.head.bfloat16())
        return PlainProduct(self.head)

    def _read_states(self, states: Tensor, batch: Batch) -> Tensor | None:
        """A token's state is that of the place before it, from which the target emitted it."""
        if not self._states or batch.withheld is None:
            return None
        return F.pad(states[:, :-1], (0, 0, 1, 0)).masked_fill(batch.withheld[..., None], 0.0)
