"""The router between reports and readers: who reported when, when to step, pins by name, what survives.

Plain logic, no Ray. Every method takes the time in seconds on one clock (time.time()), which survives a
restart with the state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from actors.sampling.params import MAX_DRAFT_TOKENS
from cluster.router.reports import Assignment, DraftReport, Pin, ShadowScoring, TargetReport
from cluster.router.router import Router
from cluster.router.settings import RouterSettings

logger = logging.getLogger(__name__)
DEFAULT_INTERVAL_S = 1.0
SETTLE_INTERVALS = 1.25
"""A router that starts waits this long after the first report for those of the others, one an interval: who
has not reported yet would be forgotten. Meanwhile targets may be assigned to a worker that is gone."""
MIN_TTL_S = 3.0
TTL_INTERVALS = 3.0
"""A worker that has not reported for so many intervals (and `MIN_TTL_S`) is gone: by the step that follows,
after five seconds at most at the default interval, its targets are assigned to others."""
MAX_REPORTERS = 4096
MAX_PINS = 4096
STATE_VERSION = 1


class PinError(ValueError):
    """`field` of a pin cannot be met; "target" for a name that nobody reports under."""

    def __init__(self, field: Literal["target", "worker", "exits", "cap"], message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[PinError], tuple[str, str]]:
        return type(self), (self.field, self.message)


@dataclass(frozen=True, slots=True)
class Decision:
    """What is in force for a target. `changed_at`: when worker, exits or cap last changed, in seconds."""

    assignment: Assignment
    model: str
    changed_at: float


class RouterService:
    """Steps when a report comes and the last step is an interval ago. A target's report is answered with its
    assignment; after a restart with the last one, until enough have reported for a new decision."""

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self._router = Router(settings)
        self._interval_s = DEFAULT_INTERVAL_S
        self._targets: dict[str, tuple[float, TargetReport]] = {}
        self._drafts: dict[str, tuple[float, DraftReport]] = {}
        self._decisions: dict[str, Decision] = {}
        self._pins: dict[str, Pin] = {}
        self._settled_at: float | None = None
        self._tried_at = float("-inf")
        self._stepped_at: float | None = None
        self._steps = 0
        self._error = ""

    # Reports.

    def report_target(self, now: float, report: TargetReport, interval_s: float) -> Assignment | None:
        """Take a report in, step if it is time, and answer with the assignment; None before the first one.

        `interval_s` is how often the target reports and wants decisions. Raises RuntimeError when too many
        targets report.
        """
        self._make_room(now, self._targets, report.target_id)
        self._targets[report.target_id] = (now, report)
        self._step_if_due(now, interval_s)
        decision = self._decisions.get(report.target_id)
        return decision.assignment if decision is not None else None

    def report_draft(self, now: float, report: DraftReport, interval_s: float) -> None:
        """The same for a draft worker."""
        self._make_room(now, self._drafts, report.worker_id)
        self._drafts[report.worker_id] = (now, report)
        self._step_if_due(now, interval_s)

    def forget_draft(self, worker_id: str) -> None:
        """A draft worker that stops says so."""
        self._drafts.pop(worker_id, None)

    def _make_room(self, now: float, table: Mapping[str, object], key: str) -> None:
        if key not in table and len(table) >= MAX_REPORTERS:
            self._expire(now)
            if len(table) >= MAX_REPORTERS:
                raise RuntimeError(f"{MAX_REPORTERS} workers report already")

    def _expire(self, now: float) -> None:
        oldest = now - max(MIN_TTL_S, TTL_INTERVALS * self._interval_s)
        for target_id in [k for k, v in self._targets.items() if v[0] < oldest]:
            del self._targets[target_id]
        for worker_id in [k for k, v in self._drafts.items() if v[0] < oldest]:
            del self._drafts[worker_id]

    # Steps.

    @property
    def steps(self) -> int:
        """Since this process started."""
        return self._steps

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """By target id."""
        return self._decisions

    @property
    def workers(self) -> list[DraftReport]:
        """The living draft workers' last reports."""
        return [report for _, report in self._drafts.values()]

    def _step_if_due(self, now: float, interval_s: float) -> None:
        self._interval_s = interval_s
        if self._settled_at is None:
            self._settled_at = now + SETTLE_INTERVALS * interval_s
        if now >= max(self._settled_at, self._tried_at + interval_s):
            self._step(now)

    def _step(self, now: float) -> None:
        self._tried_at = now
        self._expire(now)
        reports = [report for _, report in self._targets.values()]
        self._apply_pins(reports)
        try:
            assignments = self._router.step(now, reports, self.workers)
        except Exception as error:  # assignments in force stay in force
            logger.exception("a step of the router failed")
            self._error = f"{type(error).__name__}: {error}"
            return
        self._error = ""
        self._steps += 1
        self._stepped_at = now
        models = {report.target_id: report.model for report in reports}
        self._decisions = {
            target_id: Decision(new, models[target_id], self._since(now, target_id, new))
            for target_id, new in assignments.items()
        }

    def _since(self, now: float, target_id: str, new: Assignment) -> float:
        before = self._decisions.get(target_id)
        return before.changed_at if before is not None and _same(before.assignment, new) else now

    def _apply_pins(self, reports: list[TargetReport]) -> None:
        """Pins by name become pins of the targets that now go by it."""
        wanted = {
            r.target_id: pin for r in reports if (pin := self._pin_of(r.target_id, r.model)) is not None
        }
        for target_id in self._router.pins:
            if target_id not in wanted:
                self._router.pin(target_id, None)
        for target_id, pin in wanted.items():
            self._router.pin(target_id, pin)

    def _pin_of(self, target_id: str, model: str) -> Pin | None:
        return self._pins.get(target_id) or self._pins.get(model)

    # Pins.

    def pin(self, now: float, target: str, pin: Pin) -> None:
        """Fix parts of the assignment of a target, or of all targets of a model. Raises PinError."""
        self._expire(now)
        reports = [r for _, r in self._targets.values() if target in (r.target_id, r.model)]
        if not reports:
            raise PinError("target", f"no target or model {target!r} reports; there are {self._names()}")
        if pin.worker_id is not None and pin.worker_id not in self._drafts:
            known = ", ".join(sorted(self._drafts)) or "none"
            raise PinError("worker", f"no draft worker {pin.worker_id!r} lives; there are: {known}")
        there = [r for r in self.workers if pin.worker_id in (None, r.worker_id)]
        exits = sorted({depth for r in there for depth in r.exits})
        missing = [depth for depth in pin.exits or () if depth not in exits]
        if missing:
            raise PinError("exits", f"no exit at depth {missing[0]}; there are {exits}")
        longest = min(MAX_DRAFT_TOKENS, *(r.max_draft for r in reports))
        if pin.cap is not None and pin.cap > longest:
            raise PinError("cap", f"must be at most {longest}, what the target verifies")
        if target not in self._pins and len(self._pins) >= MAX_PINS:
            raise PinError("target", f"{MAX_PINS} pins exist already")
        self._pins[target] = pin
        self._step_unless_settling(now)

    def unpin(self, now: float, target: str) -> None:
        """Give a target back to the router. Raises PinError when it is not pinned."""
        if self._pins.pop(target, None) is None:
            raise PinError("target", f"{target!r} is not pinned; there are {sorted(self._pins)}")
        self._step_unless_settling(now)

    def _step_unless_settling(self, now: float) -> None:
        if self._stepped_at is not None:
            self._step(now)

    def _names(self) -> str:
        names = {name for _, r in self._targets.values() for name in (r.model, r.target_id)}
        return ", ".join(sorted(names)) or "none"

    # What is shown and what survives.

    def view(self, now: float) -> dict[str, Any]:
        """JSON-able; ages in seconds, loads as draft-seconds a second, `gain` over plain decoding."""
        self._expire(now)
        planned = self.planned_load()
        return {
            "steps": self._steps,
            "changes": self._router.changes,
            "interval_s": self._interval_s,
            "stepped_s_ago": None if self._stepped_at is None else max(0.0, now - self._stepped_at),
            "error": self._error or None,
            "targets": [self._target_row(now, t, d) for t, d in sorted(self._decisions.items())],
            "workers": [
                _worker_row(now, *self._drafts[w], planned.get(w, 0.0)) for w in sorted(self._drafts)
            ],
            "pins": {name: pin_row(pin) for name, pin in sorted(self._pins.items())},
        }

    def planned_load(self) -> dict[str, float]:
        """Draft-seconds a second by worker, shadow scoring included."""
        load = dict.fromkeys(self._drafts, 0.0)
        for decision in self._decisions.values():
            a = decision.assignment
            if a.worker_id is not None:
                shadow = a.shadow.load if a.shadow is not None else 0.0
                load[a.worker_id] = load.get(a.worker_id, 0.0) + a.load + shadow
        return load

    def _target_row(self, now: float, target_id: str, decision: Decision) -> dict[str, Any]:
        assignment = decision.assignment
        pin = self._pin_of(target_id, decision.model)
        reported = self._targets.get(target_id)
        return {
            "target": target_id,
            "model": decision.model,
            "worker": assignment.worker_id,
            "exits": list(assignment.exits),
            "cap": assignment.cap,
            "gain": assignment.gain,
            "load": assignment.load,
            "reason": assignment.reason,
            "shadow": None if assignment.shadow is None else asdict(assignment.shadow),
            "pin": None if pin is None else pin_row(pin),
            "running": None if reported is None else reported[1].running,
            "reported_s_ago": None if reported is None else max(0.0, now - reported[0]),
            "unchanged_s": max(0.0, now - decision.changed_at),
        }

    def export_state(self) -> dict[str, Any]:
        """All that a restarted router needs, JSON-able."""
        return {
            "version": STATE_VERSION,
            "router": self._router.export_state(),
            "pins": {name: pin_row(pin) for name, pin in self._pins.items()},
            "decisions": [
                {"model": d.model, "changed_at": d.changed_at, "assignment": asdict(d.assignment)}
                for d in self._decisions.values()
            ],
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> RouterService:
        """Goes on where the exported one stopped. Raises ValueError for a state of another version, KeyError
        or TypeError for one that is broken."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')}, need {STATE_VERSION}")
        service = cls()
        service._router = Router.restore(state["router"])
        service._pins = {name: _pin(row) for name, row in state["pins"].items()}
        for row in state["decisions"]:
            assignment = _assignment(row["assignment"])
            service._decisions[assignment.target_id] = Decision(assignment, row["model"], row["changed_at"])
        return service


def _same(one: Assignment, other: Assignment) -> bool:
    return (one.worker_id, one.exits, one.cap) == (other.worker_id, other.exits, other.cap)


def _worker_row(now: float, at: float, report: DraftReport, planned: float) -> dict[str, Any]:
    return {
        "worker": report.worker_id,
        "drafters": list(report.drafters),
        "step_s_by_exit": {str(depth): dict(report.step_s_by_exit[depth]) for depth in report.exits},
        "open_sessions": report.open_sessions,
        "max_sessions": report.max_sessions,
        "utilisation": report.utilisation,
        "planned_load": planned,
        "reported_s_ago": max(0.0, now - at),
    }


def pin_row(pin: Pin) -> dict[str, Any]:
    """As the HTTP API writes a pin."""
    return {"worker": pin.worker_id, "exits": None if pin.exits is None else list(pin.exits), "cap": pin.cap}


def _pin(row: Mapping[str, Any]) -> Pin:
    exits = row["exits"]
    return Pin(row["worker"], None if exits is None else tuple(exits), row["cap"])


def _assignment(row: Mapping[str, Any]) -> Assignment:
    shadow = row["shadow"]
    made = dict(row) | {
        "exits": tuple(row["exits"]),
        "shadow": None if shadow is None else ShadowScoring(**shadow),
    }
    return Assignment(**made)
