"""A start's phases from printed lines and the target's clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.target_worker.startup import BEGAN, StartupClock
from actors.target_worker.startup import PHASES as TARGET_PHASES
from cluster.bench.start.phases import PHASES, Timeline, differences, printed_phases, split_start
from cluster.bench.start.report import Start, plot_starts, start_tables

LINES = """✓ Ray's libraries (2.1 s)
✓ Ray (3.0 s)
✓ Serve (2.5 s)
✓ draft workers (6.0 s)
✓ weights and engine of SmolLM2-135M-Instruct
(9.5 s)
✓ gateway (11.0 s)
✓ ready (0.1 s)

Ready: SmolLM2-135M-Instruct (bfloat16)
"""


def seen() -> Timeline:
    timeline = Timeline()
    lines = LINES.splitlines(keepends=True)
    for count, at in ((1, 3.1), (2, 6.1), (3, 8.6), (4, 14.6), (6, 18.2), (7, 19.7), (8, 19.9)):
        timeline.see("".join(lines[:count]), at)
    timeline.see(LINES, 25.0)
    return timeline


TARGET = {BEGAN: 1010.5, **dict(zip(TARGET_PHASES, (3.0, 1.5, 1.0, 1.7), strict=True))}


def test_printed_lines_may_be_wrapped() -> None:
    found = printed_phases(LINES)
    assert found["weights and engine of SmolLM2-135M-Instruct"] == 9.5
    assert found["Ray's libraries"] == 2.1
    assert len(found) == 7


def test_phases_follow_each_other_and_add_up() -> None:
    phases = split_start(seen(), TARGET, began=1000.0, ready=19.8, first_token=20.4)
    assert tuple(phases) == PHASES
    assert sum(phases.values()) == pytest.approx(20.4)
    expected = (1.0, 2.1, 3.0, 2.5, 1.9, 3.0, 1.5, 1.0, 1.7, 2.1, 0.6)
    assert list(phases.values()) == pytest.approx(expected)


def test_marks_that_are_out_of_order_cost_no_time() -> None:
    assert differences([1.0, 3.0, 2.5, 4.0]) == [1.0, 2.0, 0.0, 1.0]


def test_what_was_not_seen_is_named() -> None:
    timeline = seen()
    del timeline.ended["Serve"]
    target = {k: v for k, v in TARGET.items() if k != "weights"}
    with pytest.raises(ValueError, match="took: Serve, weights"):
        split_start(timeline, target, 0.0, 1.0, 2.0)


def test_the_clock_counts_from_mark_to_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr("actors.target_worker.startup.time.monotonic", lambda: next(ticks))
    clock = StartupClock()
    clock.mark("imports")
    clock.mark("weights")
    assert (clock.seconds["imports"], clock.seconds["weights"]) == (2.0, 0.5)


def test_tables_and_picture(tmp_path: Path) -> None:
    one = Start(dict.fromkeys(PHASES, 1.0), {"Ray": 3.0})
    two = Start(dict.fromkeys(PHASES, 2.0), {"Ray": 5.0})
    phases, printed = start_tables([one, two])
    assert phases.rows[-1] == ("process start to first token", "16.50", "11.00 - 22.00")
    assert printed.rows == (("Ray", "4.00", "3.00 - 5.00"),)
    plot_starts([one, two], tmp_path / "start.png")
    assert (tmp_path / "start.png").stat().st_size > 1000
