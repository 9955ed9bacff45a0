"""What a target worker may draft with, as its engine obeys it. The router decides it about once a second."""

from __future__ import annotations

from dataclasses import dataclass

from actors.sampling.params import MAX_DRAFT_TOKENS


@dataclass(frozen=True, slots=True)
class Shadow:
    """In `share` (0..1) of the rounds, `length` tokens of one session are also drafted at exit depth `exit`
    and compared with what the target emits. Nobody waits for them, nobody verifies them."""

    exit: int
    length: int
    share: float


@dataclass(frozen=True, slots=True)
class DraftAssignment:
    """The default restricts nothing.

    worker_id: draft worker to connect to; None leaves it to the link. Another serves while it is away.
    exit_depth: of the nested drafter, in layers; None for the drafter's own choice.
    nested_cap: longest chain of the nested drafter, 0 for none, None for no limit but the budget.
    cap: longest draft that is a chain, of any drafter; 0 for no drafts at all.
    Requests that force their length or pin an exit are bound by neither cap, those that pin an exit keep it.
    """

    worker_id: str | None = None
    exit_depth: int | None = None
    nested_cap: int | None = None
    cap: int = MAX_DRAFT_TOKENS
    shadow: Shadow | None = None


UNRESTRICTED = DraftAssignment()
