"""Any decoder-only architecture of transformers, over our paged KV pool.

The model's own modules run unchanged on packed tokens; only attention is ours, through transformers'
attention interface. What an architecture does beyond that interface (recurrent state, position biases,
chunked attention) cannot be served this way. It is found out at load: a probe runs a few tokens through the
model's own attention and through ours, in chunks and in a batch, and the logits must agree. Windows, which
begin behind the probe, are read from the model's masks.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from actors.models.attention import AttentionPlan, plan_attention
from actors.models.hf_attention import (
    ATTENTION_NAME,
    WINDOWS_NAME,
    PagedPass,
    freeze_rope,
    register_attention,
)
from actors.models.linear import MatrixProduct, ProductKind, pack
from actors.models.llama_load import UnsupportedModelError, architecture_of, context_limit, load_config
from actors.models.runner import BLOCK_SIZE, ModelInfo, RaggedBatch
from actors.native.library import available as native_available

logger = logging.getLogger(__name__)

SERVED_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Of a configuration's `layer_types`. Others keep states, compress their keys, or choose among them."""
PROBE_TOKENS = 24
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Difference of a typical row's logits in the probe, as a share of their spread (both root mean squares).
Typical is the median of a chunk: in bfloat16 a mixture of experts may route single tokens differently."""


class Float32Head(nn.Module):
    """Replaces an output embedding: the same product, returned in float32 and never rounded before."""

    def __init__(self, linear: nn.Linear, kind: ProductKind) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._outputs = linear.out_features
        self._product: MatrixProduct = _pack(linear, kind, float32_output=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return _multiplied(self._product, hidden, self._outputs).float()


class PackedLinear(nn.Module):
    """Replaces a linear layer by a product of another kind, in the dtype of its input."""

    def __init__(self, linear: nn.Linear, kind: ProductKind) -> None:
        super().__init__()
        self._outputs = linear.out_features
        self._product: MatrixProduct = _pack(linear, kind)

    def forward(self, x: Tensor) -> Tensor:
        return _multiplied(self._product, x, self._outputs).to(x.dtype)


def _multiplied(product: MatrixProduct, x: Tensor, outputs: int) -> Tensor:
    """x: [..., K], of which there may be no row: a chunk of a prompt asks for no logits. Returns
    [..., outputs]."""
    rows = x.flatten(0, -2).float()
    out = product(rows) if len(rows) else rows.new_empty((0, outputs))
    return out.view(*x.shape[:-1], outputs)


def _pack(linear: nn.Linear, kind: ProductKind, *, float32_output: bool = False) -> MatrixProduct:
    bias = None if linear.bias is None else linear.bias.detach()
    return pack(linear.weight.detach(), bias, kind, float32_output=float32_output)


class GenericModel:
    """A transformers model whose attention is ours, probed, without a KV pool yet.

    On a CPU its linear layers are products of the compiled core, unless its code reads their weights.

    Raises `UnsupportedModelError`, naming the architecture, for one that cannot be served this way.
    """

    def __init__(self, model: Any, info: ModelInfo) -> None:
        self.model, self.info = model.eval().requires_grad_(False), info
        self.windows: dict[int, int | None] = {}
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        freeze_rope(model, info.max_model_len)
        kind: ProductKind = "auto"
        if info.int8:
            kind = "int8"
        elif info.device.type == "cpu" and native_available():
            kind = "native"
        head = model.get_output_embeddings()
        layers = [] if kind == "auto" else self._linear_layers(head)
        if info.int8 and not layers:
            raise self.unsupported("it has no linear layers that int8 could replace")
        if isinstance(head, nn.Linear):
            model.set_output_embeddings(Float32Head(head, kind))
        elif info.dtype != torch.float32:
            raise self.unsupported(
                "it has no linear output embedding, which float32 logits need: use float32"
            )
        for parent, name, layer in layers:
            setattr(parent, name, PackedLinear(layer, kind))
        try:
            self.kv_shapes = self._probe()
        except UnsupportedModelError as error:
            if info.int8 or not layers:
                raise
            for parent, name, layer in layers:
                setattr(parent, name, layer)
            model.set_attn_implementation("eager")
            self.kv_shapes = self._probe()
            logger.warning("%s is slower than it could be, on torch's products: %s", info.name, error)

    def unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.info.architecture} is not supported: {reason}")

    def _linear_layers(self, head: nn.Module | None) -> list[tuple[nn.Module, str, nn.Linear]]:
        """Every linear layer but the head, with its parent and its name there. Layers that are no `nn.Linear`
        (the fused experts of a mixture, the transposed ones of GPT-2) are not among them."""
        return [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if type(child) is nn.Linear and child is not head
        ]

    @property
    def kv_bytes_per_token(self) -> int:
        width = sum(kv_heads * (key_dim + value_dim) for kv_heads, key_dim, value_dim in self.kv_shapes)
        return width * self.info.dtype.itemsize

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, state: PagedPass) -> Tensor:
        """float32 logits [N, V] of the batch's `logit_rows`."""
        device = self.info.device
        rows = batch.logit_rows.to(device)
        out = self.model(
            input_ids=batch.token_ids.to(device)[None],
            position_ids=batch.positions.to(device)[None],
            use_cache=False,
            s2d_pass=state,
            **({"logits_to_keep": rows} if self._takes_rows else {}),
        )
        logits: Tensor = out.logits[0]
        return (logits if self._takes_rows else logits[rows]).float()

    def _probe(self) -> list[tuple[int, int, int]]:
        """Compare with the model's own attention; returns (kv_heads, key dim, value dim) of each layer."""
        config, device = self.model.config.get_text_config(), self.info.device
        unservable = [t for t in (getattr(config, "layer_types", None) or ()) if t not in SERVED_LAYERS]
        if unservable or getattr(config, "attention_chunk_size", None):
            raise self.unsupported(
                f"it has layers of type {unservable[0] if unservable else 'chunked_attention'}"
            )
        length = min(PROBE_TOKENS, self.info.max_model_len)
        ids = torch.randint(0, self.info.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        state = PagedPass(AttentionPlan(torch.empty(0), ()), 3, {}, self.windows)
        try:
            with torch.no_grad():
                own = self.model(input_ids=ids.to(device), use_cache=False).logits.float()
                self._attend(WINDOWS_NAME)
                self.model(input_ids=ids[:1].to(device), use_cache=False, s2d_pass=state)
            self._attend(ATTENTION_NAME)
            parts = [
                self._probe_part(ids, low, high, state)
                for low, high in ((0, length // 2), (length // 2, length))
            ]
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            raise self.unsupported(str(error)) from error
        layers = self.info.num_layers
        if sorted(state.called) != sorted([*range(layers)] * 2):
            raise self.unsupported("not every layer attends exactly once (recurrent state or shared KV)")
        spread = float(own.std())
        for part, expected in zip(parts, own.split([p.shape[1] for p in parts], dim=1), strict=True):
            distance = float((part - expected).square().mean(-1).sqrt().median())
            if not distance <= PROBE_TOLERANCE[self.info.dtype] * spread:
                raise self.unsupported("paged attention does not reproduce the model's own logits")
        return [
            (k.shape[2], k.shape[3], v.shape[3]) for k, v in (state.pools[layer] for layer in range(layers))
        ]

    def _attend(self, name: str) -> None:
        """Let the model's layers call an attention of ours. Raises ValueError when they do not."""
        register_attention()
        self.model.set_attn_implementation(name)
        if self.model.config.get_text_config()._attn_implementation != name:
            raise ValueError("it does not use transformers' attention interface")

    def _probe_part(self, ids: Tensor, low: int, high: int, state: PagedPass) -> Tensor:
        """Logits [2, high - low, V] of one chunk of both sequences, packed. Beside them stands a token at the
        last position that is served, which must not change them."""
        size = high - low
        batch = RaggedBatch(
            token_ids=torch.cat([ids[:, low:high].flatten(), ids[0, :1]]),
            positions=torch.tensor([*range(low, high), *range(low, high), self.info.max_model_len - 1]),
            query_start=torch.tensor([0, size, 2 * size, 2 * size + 1]),
            context_lens=torch.tensor([high, high, 1]),
            block_tables=torch.tensor([[1], [0], [2]], dtype=torch.int32),
            logit_rows=torch.arange(2 * size),
        )
        state.plan = plan_attention(batch, self.info.device)
        return self.forward(batch, state).view(2, size, -1)


class GenericRunner:
    """`ModelRunner` for a `GenericModel`."""

    row_invariant = False
    supports_trees = True

    def __init__(self, model: GenericModel, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("num_blocks must be at least 1")
        self.model, self._num_blocks = model, num_blocks
        options: dict[str, Any] = {"dtype": model.info.dtype, "device": model.info.device}
        self._pools = {
            layer: (
                torch.zeros(num_blocks, BLOCK_SIZE, kv_heads, key_dim, **options),
                torch.zeros(num_blocks, BLOCK_SIZE, kv_heads, value_dim, **options),
            )
            for layer, (kv_heads, key_dim, value_dim) in enumerate(model.kv_shapes)
        }

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Write the batch's KV, return float32 logits [N, V] of `logit_rows`."""
        plan = plan_attention(batch, self.info.device)
        return self.model.forward(batch, PagedPass(plan, self._num_blocks, self._pools, self.model.windows))

    @torch.no_grad()
    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy KV slots in every layer; all sources are read before any target is written."""
        source, target = source.to(self.info.device), target.to(self.info.device)
        for pair in self._pools.values():
            for pool in pair:
                flat = pool.flatten(0, 1)
                flat[target] = flat[source]


def load_generic(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str | None = None,
    max_model_len: int | None = None,
    int8: bool = False,
) -> GenericModel:
    """Load and probe any causal model of a local folder. `int8` quantises its linear layers.

    Raises `UnsupportedModelError` or ValueError.
    """
    config = load_config(folder)
    architecture = architecture_of(config)
    text = config.get_text_config()
    # Layers may differ (Gemma 4): the pool asks each of them; in what is reported the first stands for all.
    layer = text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text
    try:
        limit = context_limit(config, max_model_len)
        heads = layer.num_attention_heads
        layers = text.num_hidden_layers
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{architecture} is not supported: it is no attention decoder ({error})"
        ) from error
    info = ModelInfo(
        name=name or folder.name,
        architecture=architecture,
        num_layers=layers,
        hidden_size=text.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(layer, "num_key_value_heads", None) or heads,
        head_dim=getattr(layer, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_model_len=limit,
        dtype=dtype,
        device=device,
        int8=int8,
    )

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{architecture} is not supported: {error}") from error
    return GenericModel(model.to(device), info)
