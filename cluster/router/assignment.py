"""What the router decides: one assignment a target, and the operator's pins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who drafts for a target, and how.

    target: id of the target worker. worker: the draft worker, None while there is none. exits: depths it may
    draft with, ascending, empty when it does not draft. cap: longest draft a request, 0 = do not draft.
    value: predicted goodput over plain decoding. load: expected draft-seconds a second on the worker.
    verification_s: the cost that targets are sorted by. pinned: whether a pin fixed the depth, which takes the
    target out of the order. shadow_exits: depths to score without using them, in `shadow_share` of the rounds,
    which costs `shadow_load` draft-seconds a second. since: when worker, exits or cap last changed.
    """

    target: str
    worker: str | None
    exits: tuple[int, ...]
    cap: int
    reason: str
    value: float
    load: float
    verification_s: float
    since: float
    pinned: bool = False
    shadow_exits: tuple[int, ...] = ()
    shadow_share: float = 0.0
    shadow_load: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.exits) != (self.cap > 0) or (self.cap > 0 and self.worker is None):
            raise ValueError("drafting needs a worker, an exit and a cap; not drafting has no exits")

    @property
    def depth(self) -> int:
        """Deepest exit in use, 0 when the target does not draft."""
        return max(self.exits, default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assignment:
        lists = {name: tuple(data[name]) for name in ("exits", "shadow_exits")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator's order for a target worker, or for all that serve a model. None leaves a part free."""

    target: str
    exits: tuple[int, ...] | None = None
    cap: int | None = None
    worker: str | None = None

    def __post_init__(self) -> None:
        if self.exits is None and self.cap is None and self.worker is None:
            raise ValueError("a pin must fix exits, cap or worker")
        if self.exits is not None and (not self.exits or min(self.exits) < 1):
            raise ValueError("pinned exits must be positive depths; pin cap 0 to switch drafting off")
        if self.cap is not None and not 0 <= self.cap <= 16:
            raise ValueError("a pinned cap must be between 0 and 16")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pin:
        exits = data["exits"]
        return cls(data["target"], None if exits is None else tuple(exits), data["cap"], data["worker"])
