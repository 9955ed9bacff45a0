"""How snapshots of a server become shares of a round."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.plot import plot_profile
from cluster.bench.profile import PARTS, PROCESSES, ProfileRow, Snapshot, process_kind, split
from cluster.bench.tables import profile_tables


def _state(steps: int, scale: float, idle: float, clock: float = 0.0, **source: object) -> dict[str, object]:
    phases = {"drafts": 3.0, "schedule": 1.0, "forward": 20.0, "judge": 2.0}
    phases |= {"learn": 0.5, "commit": 0.5, "submit": 1.0}
    engine = {
        "steps": steps,
        "phase_seconds": {k: v * scale for k, v in phases.items()},
        "idle_s": idle,
        "clock_s": clock,
        "draft_source": source,
    }
    return {"models": [{"replicas": [{"engine": engine}]}]}


def test_parts_add_up_to_the_wall_time() -> None:
    before = Snapshot.of(_state(10, 1.0, 5.0, kind="placed", remote={"draft_s": 1.0}, local={"draft_s": 0.5}))
    after = Snapshot.of(
        _state(30, 2.0, 9.0, 40.0, kind="placed", remote={"draft_s": 2.5}, local={"draft_s": 1.0})
    )
    parts = split(before, after, 40.0)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(40.0)
    assert parts["draft forward"] == pytest.approx(2.0)
    assert parts["wire"] == pytest.approx(1.0)
    assert parts["scheduling"] == pytest.approx(3.0)
    assert parts["no request inside"] == pytest.approx(4.0)
    assert parts["between rounds"] == pytest.approx(40.0 - 28.0 - 4.0)


def test_drafting_beyond_the_wait_is_not_the_engines_time() -> None:
    before = Snapshot.of(_state(0, 0.0, 0.0, draft_s=0.0))
    after = Snapshot.of(_state(1, 1.0, 0.0, 30.0, draft_s=9.0))
    parts = split(before, after, 30.0)
    assert (parts["draft forward"], parts["wire"]) == (3.0, 0.0)


def test_idle_time_outside_of_the_block_is_not_the_blocks() -> None:
    phases = dict.fromkeys(("drafts", "schedule", "judge", "learn", "commit", "submit"), 0.0)
    before = Snapshot(100.0, 10, phases | {"forward": 5.0}, 7.0, 0.0)
    after = Snapshot(102.0, 20, phases | {"forward": 6.3}, 7.6, 0.0)
    parts = split(before, after, 1.5)
    assert parts["target forward"] == pytest.approx(1.3)
    assert parts["no request inside"] == pytest.approx(0.1)
    assert parts["between rounds"] == pytest.approx(0.1)
    assert sum(parts.values()) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::ServeReplica:s2d:target-SmolLM2-135M-Instruct", "target worker"),
        ("ray::ServeReplica:s2d:draft-pool", "draft worker"),
        ("ray::ServeReplica:s2d:gateway", "gateway"),
        ("ray::ProxyActor", "proxy"),
        ("/somewhere/raylet --node", "Ray"),
    ],
)
def test_processes_by_their_title(command: str, kind: str) -> None:
    assert process_kind(command) == kind
    assert kind in PROCESSES


def test_tables_and_picture_show_milliseconds_a_round(tmp_path: Path) -> None:
    row = ProfileRow("s2d-plain", 8, 10, 80, 2.0, dict.fromkeys(PARTS, 0.1), dict.fromkeys(PROCESSES, 0.2))
    wall, cpu = profile_tables([row])
    assert wall.rows[0][:5] == ("s2d-plain", "8", "40.0", "8.00", "200.00")
    assert set(wall.rows[0][5:]) == {"10.00"}
    assert set(cpu.rows[0][5:]) == {"20.00"}
    plot_profile([row], tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000
