"""Drafting keeps accounts: what it cost and what it brought, so that losses are bounded, not only expected.

Estimates of acceptance and cost can be wrong together and for long, on a noisy machine above all. Each round
pays in a small share of its time; drafting spends what the round cost more than a plain one (the wait for
drafts and the extra rows) and earns the time that each accepted token saves. While the balance is negative
nobody is asked. So, whatever the estimates say, drafting that does not pay costs at most `SHARE` of the time
in the long run.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE, BATCH_SHARE = 0.01, 0.005
"""Share of plain decoding time that may be spent on drafts that do not pay: probes and wrong estimates. Of a
batch all wait for what may help one, and all learn from it."""
FIRST_ROUNDS, LIMIT_ROUNDS = 3.0, 6.0
"""What drafting begins with, which is also the greatest debt, and the most that can be saved up, in plain
rounds. What a draft brings is a matter of luck, and debt is paid off slowly: with no more than 3 saved up,
drafting that gained a sixth was in debt half of the time (replayed: docs/methods/router.md)."""


@dataclass(slots=True)
class DraftAccount:
    """`balance_s` in seconds. It starts with the first round, divided by the requests in it: many learn in
    fewer rounds whether drafts are right."""

    balance_s: float = 0.0
    _plain_s: float = 0.0

    @property
    def solvent(self) -> bool:
        return self.balance_s >= 0.0

    def round(self, plain_s: float, requests: int = 1, rounds: int = 1) -> None:
        """Rounds of some requests begin, each of which takes `plain_s` seconds without drafts."""
        if self._plain_s == 0.0:
            self.balance_s = FIRST_ROUNDS * plain_s / requests
        self._plain_s = plain_s
        self._add(rounds * (SHARE if requests == 1 else BATCH_SHARE) * plain_s)

    def spend(self, seconds: float) -> None:
        self._add(-seconds)

    def earn(self, accepted: int, plain_s: float, emitting: int) -> None:
        """`accepted` draft tokens came on top of the `emitting` tokens of a round of `plain_s` seconds."""
        self._add(accepted * plain_s / max(1, emitting))

    def reset(self) -> None:
        self.balance_s = self._plain_s = 0.0

    def _add(self, seconds: float) -> None:
        # The debt is limited too: after a bad spell, a good draft must not wait for long.
        least, most = -FIRST_ROUNDS * self._plain_s, LIMIT_ROUNDS * self._plain_s
        self.balance_s = max(least, min(most, self.balance_s + seconds))
