"""The Llama family on the native CPU core: blocked weights, float32 activations, one call for many layers.

Row-invariant by construction: every sum has a fixed order, whatever else is in the batch (see
actors/native/kernels.h). Weights are float32, bfloat16 or int8 (`ModelInfo.int8`: quantised here, the head
too, with the inputs of every product quantised on the way). Where the processor has products of bfloat16,
bfloat16 weights are packed without loss (actors/native/packed.h) and the inputs of products rounded. The
residual stream and the logits are float32 in all of them. The KV pool and the embedding have the type that
the weights came in. Trees are exact too: a token of a tree gets the bits that the chain of its ancestors
would give it.

While it waits, a thread of the core spins for 60 microseconds and then sleeps. torch's own threads spin for
milliseconds after every parallel operation unless the process runs with OMP_WAIT_POLICY=passive or
`torch.set_num_threads(1)`; a process that uses this runner wants one of the two.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from array import array
from itertools import accumulate

import torch
from torch import Tensor

from actors.models.llama_weights import LlamaWeights
from actors.models.runner import BLOCK_SIZE, ChainStart, ChainWish, DraftedChain, ModelInfo, RaggedBatch
from actors.native.blocked import Memory, NotPackableError, blocked, keep, table
from actors.native.library import (
    FORMAT_CODES,
    NO_MEMORY,
    Batch,
    Chain,
    NativeLibrary,
    Shape,
    load_library,
    pointer,
)

_QKV, _O, _GATE_UP, _DOWN, _HEAD = range(5)
_INPUT_NORM, _POST_NORM, _QKV_BIAS, _Q_NORM, _K_NORM, _FINAL_NORM, _COS, _SIN = range(8)
_LANES, _BLOCK, _MAX_GROUP = 16, 32, 64  # of kernels.h

_ERRORS = {
    1: "a token id is outside the vocabulary",
    2: "a position is outside the model's context",
    3: "query_start, context_lens and block_tables do not fit together",
    4: "a block table names a block outside the pool",
    5: "a parent must be -1 or an earlier token of the same sequence",
    6: "a slot is outside the pool",
    7: "the range of layers is outside the model",
    10: "a row of logits is outside the batch",
}


def _check(status: int) -> None:
    if status == NO_MEMORY:
        raise MemoryError("the native core got no memory")
    if status != 0:
        raise ValueError(_ERRORS[status])


class NativeLlamaRunner:
    """`LayeredRunner` on the native core, with a KV pool of its own.

    One thread at a time may use it: it has one set of scratch buffers.

    Args:
        weights: read during construction. What is made of them is shared with other processes where it can be
            (`actors.native.blocked`).
        info: describes the same model, on the CPU, in float32 or bfloat16.
        num_blocks: KV blocks of `BLOCK_SIZE` tokens.
        threads: threads of a pass, the caller's included; None takes all cores that the process may use.
        isa: instruction set (see `load_library`).

    Raises:
        NativeUnavailableError: the core is not there.
        ValueError: the model's shape is not supported; the message names why.
        MemoryError: weights or KV pool do not fit.
    """

    row_invariant = True
    supports_trees = True

    def __init__(
        self,
        weights: LlamaWeights,
        info: ModelInfo,
        num_blocks: int,
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        _require_supported(weights, info, num_blocks)
        self._info = info
        self._num_blocks = num_blocks
        self._library = load_library(isa)
        self.threads = threads if threads is not None else len(os.sched_getaffinity(0))
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        formats = self._library.weight_formats(info.dtype, int8=info.int8)
        for self.weight_format in formats:
            try:
                self._create(weights, tied=self.weight_format in ("float32", "bfloat16"))
                break
            except NotPackableError:
                self.close()

    def _create(self, weights: LlamaWeights, tied: bool) -> None:
        tied = tied and weights.head.data_ptr() == weights.embed.data_ptr()
        shape = Shape(
            layers=len(weights.layers),
            hidden=self._info.hidden_size,
            heads=weights.num_heads,
            kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            intermediate=weights.layers[0].down.shape[1],
            vocab=weights.head.shape[0],
            blocks=self._num_blocks,
            max_position=self._info.max_model_len,
            bf16=self._info.dtype == torch.bfloat16,
            tied=tied,
            weights=FORMAT_CODES[self.weight_format],
            eps=weights.rms_norm_eps,
        )
        model = self._library.c.s2d_create(ctypes.byref(shape), self.threads, self._library.isa_code)
        if not model:
            raise MemoryError("no memory for the weights and the KV pool, or no thread could be started")
        self._handle: int | None = model
        self._memories: list[Memory] = []
        self._close = weakref.finalize(self, _destroy, self._library, model, self._memories)
        self._fill_matrices(weights, tied)
        self._fill_vectors(weights)

    def _fill_matrices(self, weights: LlamaWeights, tied: bool) -> None:
        matrices = [
            (index, which, matrix)
            for index, layer in enumerate(weights.layers)
            for which, matrix in (
                (_QKV, layer.qkv),
                (_O, layer.o),
                (_GATE_UP, layer.gate_up),
                (_DOWN, layer.down),
            )
        ]
        matrices.append((0, _HEAD, weights.head))
        wanted = [
            blocked(
                self._library,
                matrix.detach().contiguous(),
                self.weight_format,
                self.threads,
                halves=which == _GATE_UP,
            )
            for _, which, matrix in matrices
        ]
        if not tied:
            wanted.append(table(weights.embed.detach().contiguous()))
        self._memories += keep(wanted)
        for (index, which, _), memory in zip(matrices, self._memories, strict=False):
            _check(self._library.c.s2d_set_matrix(self._model, index, which, memory.address))
        if not tied:
            self._library.c.s2d_set_table(self._model, self._memories[-1].address, weights.embed.shape[0])

    def _fill_vectors(self, weights: LlamaWeights) -> None:
        for index, layer in enumerate(weights.layers):
            for which, vector in (
                (_INPUT_NORM, layer.input_norm),
                (_POST_NORM, layer.post_norm),
                (_QKV_BIAS, layer.qkv_bias),
                (_Q_NORM, layer.q_norm),
                (_K_NORM, layer.k_norm),
            ):
                if vector is not None:
                    self._set_vector(index, which, vector)
        self._set_vector(0, _FINAL_NORM, weights.final_norm)
        positions = torch.arange(self._info.max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, weights.inv_freq.float())
        self._set_vector(0, _COS, angles.cos() * weights.attention_scaling)
        self._set_vector(0, _SIN, angles.sin() * weights.attention_scaling)

    def _set_vector(self, layer: int, which: int, vector: Tensor) -> None:
        vector = vector.detach().float().contiguous()
        _check(self._library.c.s2d_set_vector(self._model, layer, which, pointer(vector, torch.float32)))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return self._library.isa

    @property
    def library(self) -> NativeLibrary:
        return self._library

    @property
    def shared_bytes(self) -> int:
        """Bytes of weights that lie in files, once for all processes."""
        return sum(memory.size for memory in self._memories if memory.shared)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a pass over all layers and the head reads."""
        return int(self._library.c.s2d_weight_bytes(self._model))

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Write the batch's KV, return float32 logits [N, V] of `logit_rows`."""
        return self.forward_with_states(batch)[1]

    def forward_with_states(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """See `LayeredRunner`. Raises ValueError for a token outside the vocabulary, and when batch,
        positions, block tables or rows do not fit together."""
        ids, rows = batch.token_ids.contiguous(), batch.logit_rows.contiguous()
        packed, _held = self._pack(batch)
        states = torch.empty(rows.numel(), self._info.hidden_size)
        logits = torch.empty(rows.numel(), self._info.vocab_size)
        _check(
            self._library.c.s2d_forward(
                self._model,
                pointer(ids, torch.int64),
                ctypes.byref(packed),
                pointer(rows, torch.int64),
                rows.numel(),
                states.data_ptr(),
                logits.data_ptr(),
            )
        )
        return states, logits

    def embed(self, token_ids: Tensor) -> Tensor:
        """float32 [T, H] of token ids int64 [T]. Raises ValueError for an id outside the vocabulary."""
        ids = token_ids.contiguous()
        out = torch.empty(ids.numel(), self._info.hidden_size)
        _check(self._library.c.s2d_embed(self._model, pointer(ids, torch.int64), ids.numel(), out.data_ptr()))
        return out

    def run_layers(self, hidden: Tensor, first: int, last: int, batch: RaggedBatch) -> Tensor:
        """Run layers first..last-1 on hidden float32 [T, H], writing their KV; `hidden` is not changed.

        Raises ValueError when batch, positions, block tables or layers do not fit together.
        """
        if hidden.shape != (batch.num_tokens, self._info.hidden_size):
            raise ValueError(f"hidden is {tuple(hidden.shape)} for {batch.num_tokens} tokens")
        out = hidden.clone(memory_format=torch.contiguous_format)
        packed, _held = self._pack(batch)
        _check(
            self._library.c.s2d_run_layers(
                self._model, pointer(out, torch.float32), first, last, ctypes.byref(packed)
            )
        )
        return out

    @staticmethod
    def _pack(batch: RaggedBatch) -> tuple[Batch, list[Tensor]]:
        """The batch as the core takes it, and the tensors that it points into."""
        arrays = [t.contiguous() for t in (batch.positions, batch.query_start, batch.context_lens)]
        tables = batch.block_tables.contiguous()
        parents = None if batch.parents is None else batch.parents.contiguous()
        if parents is not None and parents.numel() != batch.num_tokens:
            raise ValueError("one parent a token")
        return Batch(
            batch.num_tokens,
            batch.num_seqs,
            tables.shape[1],
            *(pointer(t, torch.int64) for t in arrays),
            pointer(tables, torch.int32),
            None if parents is None else pointer(parents, torch.int64),
        ), [*arrays, tables, *(() if parents is None else (parents,))]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head of hidden float32 [N, H]: float32 [N, V]."""
        hidden = hidden.contiguous()
        if hidden.dim() != 2 or hidden.shape[1] != self._info.hidden_size:
            raise ValueError(f"hidden is {tuple(hidden.shape)}, not [N, {self._info.hidden_size}]")
        out = torch.empty(hidden.shape[0], self._info.vocab_size)
        _check(
            self._library.c.s2d_logits(
                self._model, pointer(hidden, torch.float32), hidden.shape[0], out.data_ptr()
            )
        )
        return out

    def draft_chain(
        self, last: int, start: ChainStart, wish: ChainWish, states: Tensor | None = None
    ) -> list[DraftedChain]:
        """See `DraftingRunner`. Raises ValueError as `run_layers` does, and for more than `MAX_TOP` tokens a
        place."""
        # No tensors but those that are there: after a pass of the target, making one takes 10 microseconds.
        seqs, most, best = len(start.context_lens), max(wish.budgets), wish.best
        if len(wish.budgets) != seqs or len(wish.floors) != seqs or min(wish.budgets) < 1:
            raise ValueError("one budget of at least 1 and one floor a sequence")
        tokens, width = len(start.token_ids), len(start.block_tables[0])
        whole = (start.token_ids, start.positions, start.query_start, start.context_lens, wish.budgets)
        lengths = [len(part) for part in (*whole, start.added_rows)]
        added, rows = start.added, lengths[-1]
        widths = {len(table) for table in start.block_tables}
        if lengths[1:4] != [tokens, seqs + 1, seqs] or widths != {width}:
            raise ValueError("token_ids, positions, query_start, context_lens and block_tables do not fit")
        if not (rows == 0 if added is None else added.shape == (rows, self._info.hidden_size)):
            raise ValueError("as many added_rows as rows of added")
        if states is not None and states.shape != (self._num_blocks * BLOCK_SIZE, self._info.hidden_size):
            raise ValueError(f"states is {tuple(states.shape)}")
        numbers = array("q", [n for part in (*whole, start.added_rows) for n in part])
        at = [numbers.buffer_info()[0] + 8 * n for n in accumulate(lengths[:-1], initial=0)]
        tables = array("i", [block for table in start.block_tables for block in table])
        floors = array("d", wish.floors)
        room = seqs * most * best
        drafted, shares = array("q", bytes(8 * room)), array("f", bytes(4 * room))
        counts = array("q", bytes(8 * seqs))
        curve = wish.curve
        knots = 0 if curve is None else curve.shape[1]
        confidence = None if curve is None else pointer(curve, torch.float64)
        batch = Batch(tokens, seqs, width, at[1], at[2], at[3], tables.buffer_info()[0], None)
        chain = Chain(
            at[0],
            at[5],
            None if added is None else pointer(added, torch.float32),
            rows,
            None if wish.ids is None else pointer(wish.ids, torch.int64),
            most,
            best,
            at[4],
            floors.buffer_info()[0],
            knots,
            confidence,
            None if confidence is None else confidence + 8 * knots,
            drafted.buffer_info()[0],
            shares.buffer_info()[0],
            counts.buffer_info()[0],
            None if states is None else pointer(states, torch.float32),
        )
        _check(self._library.c.s2d_draft_chain(self._model, last, ctypes.byref(batch), ctypes.byref(chain)))
        found = []
        for row, count in enumerate(counts):
            places = [slice(n, n + best) for n in range(row * most * best, (row * most + count) * best, best)]
            found.append(
                DraftedChain([drafted[p].tolist() for p in places], [shares[p].tolist() for p in places])
            )
        return found

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy KV slots (int64 flat slot indices, block * BLOCK_SIZE + offset) in every layer. All sources
        are read before any target is written. Raises ValueError for a slot outside the pool."""
        if source.shape != target.shape:
            raise ValueError("one target slot a source slot")
        source, target = source.contiguous(), target.contiguous()
        _check(
            self._library.c.s2d_copy_slots(
                self._model, pointer(source, torch.int64), pointer(target, torch.int64), source.numel()
            )
        )

    def weight_read_seconds(self) -> float:
        """Time to read all weights once with this runner's threads: the floor under the time of a pass."""
        started = time.perf_counter()
        self._library.c.s2d_read_weights(self._model)
        return time.perf_counter() - started

    def close(self) -> None:
        """Free weights, KV pool and threads. Any use afterwards raises RuntimeError."""
        self._handle = None
        self._close()

    @property
    def _model(self) -> int:
        if self._handle is None:
            raise RuntimeError("the runner was closed")
        return self._handle


def _destroy(library: NativeLibrary, model: int, memories: list[Memory]) -> None:
    library.c.s2d_destroy(model)
    memories.clear()


def _require_supported(weights: LlamaWeights, info: ModelInfo, num_blocks: int) -> None:
    dim, group = weights.head_dim, weights.num_heads // weights.num_kv_heads
    inner = weights.layers[0].down.shape[1] if weights.layers else 0
    qkv_rows = (weights.num_heads + 2 * weights.num_kv_heads) * dim
    problems = (
        (info.device.type != "cpu", f"it runs on cpu, not on {info.device}"),
        (info.dtype not in (torch.float32, torch.bfloat16), f"{info.dtype} is neither float32 nor bfloat16"),
        (weights.embed.dtype != info.dtype, f"weights are {weights.embed.dtype}, the model {info.dtype}"),
        (not weights.layers, "the model has no layers"),
        (BLOCK_SIZE != _BLOCK, f"KV blocks have {BLOCK_SIZE} slots, not {_BLOCK}"),
        (num_blocks < 1, f"num_blocks is {num_blocks}"),
        (info.hidden_size % _LANES != 0, f"hidden_size {info.hidden_size} is not a multiple of {_LANES}"),
        (inner % _LANES != 0, f"intermediate_size {inner} is not a multiple of {_LANES}"),
        (dim % _LANES != 0, f"head_dim {dim} is not a multiple of {_LANES}"),
        (weights.num_heads % weights.num_kv_heads != 0, "num_heads is not a multiple of num_kv_heads"),
        (group > _MAX_GROUP, f"{group} query heads share a KV head, more than {_MAX_GROUP}"),
        (weights.inv_freq.numel() != dim // 2, "rotary embedding of only a part of the head"),
        (
            any(
                layer.qkv.shape != (qkv_rows, info.hidden_size)
                or layer.o.shape != (info.hidden_size, weights.num_heads * dim)
                or layer.gate_up.shape != (2 * inner, info.hidden_size)
                or layer.down.shape != (info.hidden_size, inner)
                for layer in weights.layers
            ),
            "the shapes of the layers' weights do not fit together",
        ),
    )
    for wrong, why in problems:
        if wrong:
            raise ValueError(f"the native core does not support this model: {why}")
