"""What drafters around the nested drafter have in common: to the pool they look like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from actors.drafting.interface import Drafter, DraftQuery, ResetScope, SessionDraft


class ModelDrafter(Drafter, Protocol):
    """A drafter with a model, its exits and its KV pool, see `NestedDrafter`."""

    @property
    def exits(self) -> tuple[int, ...]: ...

    @property
    def kv_blocks_used(self) -> int: ...

    @property
    def kv_blocks_free(self) -> int: ...

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]: ...

    def look_ahead(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        """As `propose`, for nobody who waits."""
        ...

    def work(self) -> bool: ...


D = TypeVar("D", bound=ModelDrafter)


class WrappingDrafter(Generic[D]):
    """`inner`'s name, exits, KV pool and times; what is asked of it is the subclass's."""

    learns = False

    def __init__(self, inner: D) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def exits(self) -> tuple[int, ...]:
        return self._inner.exits

    @property
    def kv_blocks_used(self) -> int:
        return self._inner.kv_blocks_used

    @property
    def kv_blocks_free(self) -> int:
        return self._inner.kv_blocks_free

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        """The inner drafter's: what is done around it is not part of a step."""
        return self._inner.step_s_by_exit()

    def reset(self, scope: ResetScope = "all") -> None:
        self._inner.reset(scope)
