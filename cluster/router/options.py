"""What a target could do on a draft worker, and what each of that is worth: goodput over plain decoding.

With R running requests, exit n and k draft tokens each, on a worker that is busy for a share u,

    goodput(n, k) = R (1 + S_1 + ... + S_k) / (draft + C(R (1 + k)))
    draft         = k D_n(R) (1 + u / (2 (1 - u))) + latency
    load(n, k)    = busy k D_n(R) / (draft + C(R (1 + k)))

S_j is the probability that j tokens survive, C the target's cost by rows, D_n the draft's cost of a token by
sessions. The factor is the mean wait of an M/D/1 queue. `busy` is the share of the time in which the target
has rounds to run. As in `actors.engine.controller`, but for the long run and for all requests alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.router.acceptance import AcceptanceBook, survival
from cluster.router.curves import Curve
from cluster.router.reports import TargetReport
from cluster.router.settings import RouterSettings


@dataclass(frozen=True, slots=True)
class Option:
    """depth, cap: 0, 0 is plain decoding. value: goodput over plain decoding. load: draft-seconds a second."""

    depth: int
    cap: int
    value: float
    load: float


PLAIN = Option(0, 0, 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Menu:
    """Options of a target on one worker, by depth, each ascending in cap. `plain`: whether not drafting is
    allowed (a pinned cap forbids it)."""

    by_depth: Mapping[int, Sequence[Option]]
    plain: bool = True

    def best(self, depth: int, below_load: float = float("inf")) -> Option | None:
        """The most valuable option of a depth with a load under `below_load`."""
        fitting = [o for o in self.by_depth.get(depth, ()) if o.load < below_load]
        return max(fitting, key=lambda o: (o.value, -o.cap), default=None)

    def find(self, depth: int, cap: int) -> Option | None:
        if cap == 0:
            return PLAIN if self.plain else None
        return next((o for o in self.by_depth.get(depth, ()) if o.cap == cap), None)

    def best_of_all(self) -> Option:
        found = [o for depth in self.by_depth if (o := self.best(depth)) is not None]
        if self.plain or not found:
            found.append(PLAIN)
        return max(found, key=lambda o: (o.value, -o.depth))


@dataclass(frozen=True, slots=True)
class Drafting:
    """One worker seen from one target: costs by depth, the queue's factor, and the way there."""

    token_s: Mapping[int, Curve]
    queue: float
    latency_s: float


def queue_factor(utilisation: float, limit: float) -> float:
    """Mean wait over service time at M/D/1, with the utilisation that the router allows at most."""
    busy = min(max(utilisation, 0.0), limit)
    return busy / (2.0 * (1.0 - busy))


def menu_of(
    report: TargetReport,
    cost: Curve,
    drafting: Drafting,
    book: AcceptanceBook,
    settings: RouterSettings,
    depths: Sequence[int],
    caps: Sequence[int],
    busy: float,
) -> Menu:
    """All options over `depths` and `caps` (0 among them allows plain decoding)."""
    running = max(1.0, report.running)
    plain = running / cost(running)
    longest = max(caps, default=0)
    by_depth: dict[int, list[Option]] = {}
    for depth in depths:
        token_s = drafting.token_s[depth](running)
        survive = survival(book.conditional(report.worker, depth, longest))
        options = []
        for cap in caps:
            if cap == 0:
                continue
            draft_s = cap * token_s * (1.0 + drafting.queue) + drafting.latency_s
            round_s = draft_s + cost(running * (1 + cap))
            goodput = running * (1.0 + sum(survive[:cap])) / round_s
            options.append(Option(depth, cap, goodput / plain, busy * cap * token_s / round_s))
        if options:
            by_depth[depth] = options
    return Menu(by_depth, plain=0 in caps)


def busy_share(report: TargetReport, cost: Curve, token_s: Mapping[int, Curve], queue: float) -> float:
    """Share of the time with rounds to run: measured rounds/s times the predicted round as it drafts now.
    Without a measurement, whether there is anything to do."""
    if report.rounds_per_s == 0.0:
        return 1.0 if report.running > 0 else 0.0
    running = max(1.0, report.running)
    use, round_s = report.use, 0.0
    length = use.length if use is not None else 0.0
    if use is not None and use.exit in token_s:
        round_s = length * token_s[use.exit](running) * (1.0 + queue)
        round_s += report.latency_s.get(use.worker, 0.0) * (length > 0)
    return min(1.0, report.rounds_per_s * (round_s + cost(running * (1.0 + length))))
