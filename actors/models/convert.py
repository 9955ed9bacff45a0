"""GGUF files become ordinary Hugging Face folders, once: dequantised float32 weights in the user's cache."""

from __future__ import annotations

import fcntl
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from actors.cache import cache_dir
from actors.files import complete_or_absent_folder
from actors.models.source import ModelSourceError, ResolvedSource

LAYOUT_VERSION = 1
"""Raised when what a conversion writes changes, so that older folders are left aside."""
LOCK_TIMEOUT_S = 600.0
LOCK_POLL_S = 0.2

Progress = Callable[[str], None]


def model_folder(
    source: ResolvedSource, progress: Progress | None = None, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> Path:
    """The Hugging Face folder of a source; a GGUF is converted on first use (20-30 s for 135M parameters).

    Safe against other processes: one converts, the others wait `lock_timeout_s` at most (TimeoutError) and
    use its result. A folder appears under its final name only when it is complete.
    """
    if source.kind == "folder":
        return source.path
    say = progress or (lambda message: None)

    def write(folder: Path) -> None:
        started = time.monotonic()
        say(f"converting {source.path.name} (once; about half a minute for a small model)")
        _write_dequantised(source, folder)
        say(f"converted {source.path.name} in {time.monotonic() - started:.0f} s")

    return cached_model(source.content_hash, write, lock_timeout_s)


def cached_model(
    content_hash: str, write: Callable[[Path], None], lock_timeout_s: float = LOCK_TIMEOUT_S
) -> Path:
    """The folder in the user's cache that holds what `content_hash` names; `write` fills it on first use."""
    folder = cache_dir() / "models" / f"{content_hash[:32]}-v{LAYOUT_VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), lock_timeout_s):
        if not folder.is_dir():
            # What a killed process left: nobody else is at it, since the lock is ours.
            for stale in folder.parent.glob(f"{folder.name}.*.partial"):
                shutil.rmtree(stale)
            with complete_or_absent_folder(folder) as partial:
                write(partial)
    return folder


def _write_dequantised(source: ResolvedSource, folder: Path) -> None:
    # Imported here: transformers' model classes take seconds, and most starts convert nothing.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError, struct.error) as error:
        raise ModelSourceError(
            f"model source {source.source!r}: transformers cannot read this GGUF: {error}"
        ) from error
    # save_pretrained refuses a model that still calls itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """An exclusive advisory lock, which the kernel drops when its holder dies. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{path} has been held by another process for {timeout_s:.0f} s"
                    ) from None
                time.sleep(LOCK_POLL_S)
        yield
