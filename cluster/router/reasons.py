"""Why an assignment is what it is, in plain words."""

from __future__ import annotations

from cluster.router.goodput import Choice
from cluster.router.memory import TargetMemory
from cluster.router.problem import Contender
from cluster.router.settings import RouterSettings
from cluster.router.shedding import Shed


def explain(
    c: Contender,
    choice: Choice,
    given_up: Shed,
    before: TargetMemory,
    changed: bool,
    moved: bool,
    settings: RouterSettings,
) -> str:
    """One sentence a point, the choice first. `before` still holds the previous choice."""
    parts = [_choice(c, choice, settings)]
    if c.target_id in given_up.depth:
        parts.append(f"depth given up: {c.worker_id} is full")
    if c.target_id in given_up.length:
        parts.append(f"length given up: {c.worker_id} is full")
    if c.pin.worker_id or c.pin.fixes_choice:
        parts.append(_pin(c, choice))
    if c.drafts_itself or c.worker_id is None:
        return "; ".join(parts)
    if not before.decided:
        parts.append("first decision")
    elif changed:
        parts.append(f"before: {_short(before.exit, before.length)}")
    else:
        parts.append("unchanged: nothing promises enough over it")
    if moved and before.decided:
        parts.append(f"moved from {before.worker_id} to {c.worker_id}")
    return "; ".join(parts)


def _short(depth: int, length: int) -> str:
    return f"exit {depth}, up to {length} tokens" if length else "no drafting"


def _choice(c: Contender, choice: Choice, settings: RouterSettings) -> str:
    if c.drafts_itself:
        return "drafts itself, with its own copy of the draft"
    if choice.length > 0:
        return (
            f"{_short(choice.exit, choice.length)}: predicted {choice.gain:.2f} times plain decoding at "
            f"{c.requests} requests, {100 * choice.load:.1f} % of {c.worker_id}"
        )
    if c.worker_id is None:
        return "no drafting: no draft worker lives"
    top = max((x for table in c.table.values() for x in table), key=lambda x: x.gain, default=None)
    if top is None:
        return "no drafting: no choice is allowed"
    words = (
        f"no drafting: the best choice ({_short(top.exit, top.length)}) is predicted at {top.gain:.2f} times"
    )
    if top.gain < settings.min_draft_gain:
        return f"{words}, less than the {settings.min_draft_gain:.2f} that it must promise"
    return f"{words}, and the order, the load or the dwell time does not allow it"


def _pin(c: Contender, choice: Choice) -> str:
    unmet = []
    if c.pin.worker_id is not None and c.worker_id != c.pin.worker_id:
        unmet.append(f"worker {c.pin.worker_id} does not live")
    if c.pin.exits is not None and c.pin.cap != 0 and choice.exit not in c.pin.exits and not c.table:
        unmet.append("the worker has none of these exits")
    return f"pinned by an operator: {c.pin}" + (f" ({', '.join(unmet)})" if unmet else "")
