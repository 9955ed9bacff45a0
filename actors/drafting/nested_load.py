"""The nested drafter from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.drafting.draft_load import load_draft
from actors.drafting.early_stop import EarlyStop
from actors.drafting.nested import ABSORB_FROM, CATCH_UP, NestedDrafter
from actors.models.cores import Cores, cores_of
from actors.models.load import DTypeName, choose_device
from actors.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


class NestedConfig(Protocol):
    """See `cluster.config.NestedDrafterConfig`."""

    @property
    def source(self) -> str: ...

    @property
    def artifact(self) -> str | None: ...

    @property
    def exits(self) -> tuple[int, ...] | None: ...

    @property
    def default_exit(self) -> int | None: ...

    @property
    def thresholds(self) -> Sequence[float] | None: ...

    @property
    def dtype(self) -> Literal["bfloat16", "float32", "int8"]: ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    @property
    def stop_threshold(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class LoadedNested:
    """`vocab_size` includes padding; `tokenizer` is the base's; `cores` are those that it computes on."""

    drafter: NestedDrafter
    vocab_size: int
    tokenizer: TextTokenizer
    cores: Cores


def load_nested(
    config: NestedConfig,
    max_sessions: int,
    threads: int,
    *,
    device: str = "auto",
    target_hash: str = "",
    catch_up: int = CATCH_UP,
    absorb_from: int = ABSORB_FROM,
) -> LoadedNested:
    """Blocking, about a second. `threads`: compute threads, 0 takes the physical cores. `target_hash`: of the
    target's source, where it gives its states. `catch_up`, `absorb_from`: see `NestedDrafter`. Raises
    what `load_draft` raises, and ValueError for thresholds or a default exit that the exits do not fit."""
    loaded = load_draft(
        config.source,
        config.artifact,
        exits=config.exits,
        dtype=dtype_on(device, config.dtype),
        kv_blocks=config.kv_blocks,
        threads=threads,
        device=device,
    )
    drafter = NestedDrafter(
        loaded.runner,
        loaded.exits,
        thresholds=config.thresholds,
        default_exit=config.default_exit,
        max_sessions=max_sessions,
        catch_up=catch_up,
        absorb_from=absorb_from,
        heads=loaded.heads,
        window=loaded.window,
        context=config.context,
        state_in=loaded.state_in_for(target_hash) if target_hash else None,
        early_stop=EarlyStop(loaded.calibration, config.stop_threshold),
    )
    cores = cores_of(loaded.runner.info.device.type)
    return LoadedNested(drafter, loaded.vocab_size, loaded.tokenizer, cores)


def dtype_on(device: str, dtype: DTypeName) -> DTypeName:
    """What a draft is computed in: int8, as it may be stored, is for CPUs. Drafts are advice in either."""
    if dtype != "int8" or device == "auto" or choose_device(device).type == "cpu":
        return dtype
    logger.warning("nested.dtype: int8 is computed on CPUs only; on %s the draft runs in bfloat16", device)
    return "bfloat16"
