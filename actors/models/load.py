"""From a model source to a runner: resolve, convert, choose an implementation, size the KV pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from actors.models.convert import model_folder
from actors.models.llama_load import (
    LLAMA_FAMILY,
    UnsupportedModelError,
    architecture_of,
    context_limit,
    llama_unsupported_reason,
    load_config,
    load_llama_weights,
)
from actors.models.llama_weights import LlamaWeights
from actors.models.runner import BLOCK_SIZE, LayeredRunner, ModelInfo, ModelRunner
from actors.models.source import resolve_source
from actors.models.threads import physical_cores
from actors.models.torch_llama import TorchLlamaRunner

DTypeName = Literal["bfloat16", "float32", "int8"]
BackendName = Literal["native", "torch", "generic"]
Backend = Literal["auto", "native", "torch", "generic"]
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    `tokenizer_folder` is the Hugging Face folder (config, tokenizer, chat template). `backend` is the one
    that was chosen ("native", "torch" or "generic"). `source_hash` identifies weights and tokenizer by
    content.
    """

    runner: ModelRunner
    tokenizer_folder: Path
    info: ModelInfo
    backend: str
    source_hash: str


def load_runner(
    source: str,
    *,
    dtype: DTypeName = "bfloat16",
    backend: Backend = "auto",
    device: str = "auto",
    kv_blocks: int = 0,
    kv_memory_gib: float = 1.0,
    max_model_len: int | None = None,
    threads: int = 0,
    num_layers: int | None = None,
    adapter: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a model with its own KV pool.

    `dtype` int8 quantises the weights of linear layers while loading; embedding and KV cache are bfloat16. It
    is for CPUs.
    `backend` "auto" takes the fastest implementation that runs the model: native (CPU, Llama family), torch
    (Llama family), generic (anything transformers runs through its attention interface). `kv_blocks` blocks
    of BLOCK_SIZE tokens, 0 for what fits `kv_memory_gib`. `threads` 0 takes the
    physical cores; torch's thread count is set for the whole process (to 1 beside the native core, which has
    its own). `num_layers` keeps only the first so many layers (nested drafts; Llama family only).
    `adapter`: a LoRA adapter to merge into the weights (see `actors.models.adapter`).

    Raises ValueError (`ModelSourceError`, `UnsupportedModelError`) naming what is wrong with an argument or
    why a backend cannot run the model, TimeoutError when another process holds the conversion for too long.
    """
    say = progress or (lambda message: None)
    started = time.monotonic()
    torch_device = choose_device(device, dtype)
    resolved = resolve_source(source)
    folder = model_folder(resolved, progress)
    if adapter is not None:
        from actors.models.adapter import adapted

        resolved = adapted(resolved, folder, adapter, progress)
        folder = resolved.path
    chosen = choose_backend(folder, backend, torch_device, max_model_len)
    if chosen == "generic" and num_layers is not None:
        raise UnsupportedModelError(f"num_layers needs a Llama-family model, {resolved.name} is none")
    say(f"loading {resolved.name} as {dtype} on {torch_device}")

    int8 = dtype == "int8"
    kept = torch.bfloat16 if dtype != "float32" else torch.float32
    target = _Target(resolved.name, folder, kept, int8, torch_device, max_model_len, num_layers)
    size = _PoolSize(kv_blocks, kv_memory_gib)
    runner: ModelRunner
    if chosen == "generic":
        # Imported here: transformers' model classes take seconds, and most models do without.
        from actors.models.generic import GenericRunner, load_generic

        torch.set_num_threads(threads or physical_cores())
        model = load_generic(
            folder, kept, torch_device, name=resolved.name, max_model_len=max_model_len, int8=int8
        )
        runner = GenericRunner(model, size.blocks(model.kv_bytes_per_token))
    else:
        runner, chosen = _load_llama(target, size, threads or physical_cores(), chosen, backend == "auto")
    seconds, kv_tokens = time.monotonic() - started, runner.num_blocks * BLOCK_SIZE
    say(f"loaded {resolved.name} in {seconds:.1f} s: {chosen} backend, KV cache of {kv_tokens} tokens")
    return LoadedModel(runner, folder, runner.info, chosen, resolved.content_hash)


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    folder: Path
    dtype: torch.dtype
    int8: bool
    device: torch.device
    max_model_len: int | None
    num_layers: int | None


def _load_llama(
    target: _Target, size: _PoolSize, threads: int, chosen: BackendName, may_fall_back: bool
) -> tuple[ModelRunner, BackendName]:
    """A native or torch runner; a shape that the native core lacks goes to torch if `may_fall_back`."""
    weights, info = load_llama_weights(
        target.folder,
        target.dtype,
        target.device,
        name=target.name,
        max_model_len=target.max_model_len,
        num_layers=target.num_layers,
        int8=target.int8,
    )
    blocks = size.blocks(2 * info.num_layers * info.num_kv_heads * info.head_dim * info.dtype.itemsize)
    try:
        return build_llama_runner(weights, info, blocks, threads, chosen == "native", may_fall_back)
    except ValueError as error:
        if chosen != "native" or may_fall_back:
            raise
        raise UnsupportedModelError(f"{info.architecture}: {error}") from error


def build_llama_runner(
    weights: LlamaWeights,
    info: ModelInfo,
    kv_blocks: int,
    threads: int,
    native: bool,
    may_fall_back: bool = True,
    window: int | None = None,
) -> tuple[LayeredRunner, BackendName]:
    """The compiled core if `native`, otherwise torch, which alone has an attention window; and which it is.

    Sets torch's number of threads. Raises ValueError for a shape that the core lacks, unless torch may then
    run it.
    """
    if native and window is None:
        from actors.models.native_llama import NativeLlamaRunner  # needs the compiled core

        # The core has threads of its own, which torch's would disturb: they spin after every operation.
        torch.set_num_threads(1)
        try:
            return NativeLlamaRunner(weights, info, kv_blocks, threads=threads), "native"
        except ValueError:
            if not may_fall_back:
                raise
    torch.set_num_threads(threads)
    return TorchLlamaRunner(weights, info, kv_blocks, threads, window=window), "torch"


def choose_device(device: str, dtype: DTypeName = "bfloat16") -> torch.device:
    """The device meant; "auto" is CUDA where there is one, for int8 the CPU. Raises ValueError for one that
    is not there, or not for `dtype`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and dtype != "int8" else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: use cpu, cuda, cuda:N or auto") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported: use cpu, cuda, cuda:N or auto")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "cuda" and dtype == "int8":  # the core's arithmetic in float64: slower than bfloat16
        raise ValueError(f"dtype int8 is computed on CPUs only, not on {device}: use bfloat16")
    return chosen


def choose_backend(
    folder: Path, backend: Backend, device: torch.device, max_model_len: int | None
) -> BackendName:
    """The implementation to use. Raises `UnsupportedModelError` when the one asked for cannot run the
    model."""
    if backend == "generic":
        return "generic"
    config = load_config(folder)
    family = config.model_type in LLAMA_FAMILY
    reason = llama_unsupported_reason(config, folder, context_limit(config, max_model_len) if family else 0)
    native_reason = reason or native_unavailable_reason(device)
    wanted = {"native": native_reason, "torch": reason, "auto": None}[backend]
    if wanted is not None:
        raise UnsupportedModelError(f"backend {backend!r} cannot run {architecture_of(config)}: {wanted}")
    if backend == "native" or (backend == "auto" and native_reason is None):
        return "native"
    return "torch" if reason is None else "generic"


def native_unavailable_reason(device: torch.device) -> str | None:
    """Why the compiled CPU core cannot be used on this device; None when it can."""
    if device.type != "cpu":
        return f"the native core runs on cpu, not on {device.type}"
    try:
        from actors.models import native_llama  # noqa: F401
        from actors.native.library import unavailable_reason
    except ImportError as error:
        return f"the native core is not installed ({error})"
    return unavailable_reason()


@dataclass(frozen=True, slots=True)
class _PoolSize:
    kv_blocks: int
    kv_memory_gib: float

    def blocks(self, bytes_per_token: int) -> int:
        if self.kv_blocks:
            return self.kv_blocks
        blocks = int(self.kv_memory_gib * GIB) // (bytes_per_token * BLOCK_SIZE)
        if blocks < 1:
            need = bytes_per_token * BLOCK_SIZE / GIB
            raise ValueError(f"kv_memory_gib {self.kv_memory_gib} does not hold one block of {need:.4f} GiB")
        return blocks
