"""A driver that goes on from what a killed one left: its nodes are lost in one moment, and nothing is decided as if some were there. Chapter 08."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.journal import Journal, Saved
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.router import Router
from sllm_mini.control import messages as m
from sllm_mini.control.replay import Recorder, replay
from sllm_mini.inference.session import Session
from sllm_mini.types import Tier

NBYTES = 10**6


def node(name: str, devices: int) -> m.NodeSpec:
    return m.NodeSpec(name=name, devices=devices, dram_nbytes=10**9, remote_bytes_per_second=1e9, disk_bytes_per_second=1e9, dram_bytes_per_second=1e9)


def left_by_a_killed_driver(folder: Path, devices: tuple[int, ...], needs: int) -> None:
    """One request runs, or waits, of a model that needs so many devices of a node."""
    control = ControlOptions()
    header = control.header()
    assert header is not None
    controller, lines = control.controller(), [header.to_line()]
    recorder, now = Recorder(controller, lines.append), 0.0
    nodes: list[m.AnyEvent] = [m.NodeJoined(node(f"n{number}", count)) for number, count in enumerate(devices)]
    for event in [*nodes, m.ModelDeployed(m.ModelSpec(name="a", nbytes=NBYTES, devices=needs)), m.RequestArrived(0, "a", 1)]:
        now += 0.1
        for action in recorder.handle(event, now):
            if isinstance(action, m.Start):
                recorder.handle(m.InstanceReached(action.instance, Tier.REMOTE, 0.1, 0.0, action.epoch), now)
    journal = Journal(folder / "ledger.bin", lambda: 1.0)
    journal.opened(0, "r0", "a", "", 0.5, Session("r0", "m", (1,), 1, 5).to_bytes())
    journal.close()
    (folder / "events.jsonl").write_bytes(b"".join(lines))
    (folder / "controller.bin").write_bytes(Saved(now, sum(map(len, lines)), controller.to_bytes()).to_bytes())


@pytest.mark.parametrize(("devices", "needs"), [((1, 1), 1), ((2, 1), 2), ((1, 2), 2), ((2,), 2), ((1, 1, 1), 1)])
def test_all_nodes_are_lost_at_once_and_the_request_waits_for_the_next(tmp_path: Path, devices: tuple[int, ...], needs: int) -> None:
    left_by_a_killed_driver(tmp_path, devices, needs)

    def nothing_starts(spec: m.NodeSpec, incarnation: int) -> None:
        raise AssertionError("no node is added here")

    with LiveCluster(nothing_starts, ControlOptions(), tmp_path, LiveOptions(), resume=True) as cluster:  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            cluster.stream("r0").wait(0.1)
        assert cluster.stream("r0").report.outcome is None and not cluster.nodes()
        log = list(cluster.log())
        assert sum(b'"NodeLost"' in line for line in log) == 1 and replay(log, ControlOptions().controller())
        account_of(log, cluster.now)


def test_a_session_that_cannot_be_said_takes_no_place(tmp_path: Path) -> None:
    router = Router(str(tmp_path / "arbiter"), now=lambda: 0.0, opened=0.0, on_end=lambda _: None, journal=Journal(tmp_path / "journal", lambda: 0.0), max_waiting=1)
    try:
        for _ in range(3):
            with pytest.raises(ValueError, match="token_ids"):
                router.open(Session("r", "m", (-1,), 1, 5), "m", "")
        assert router.unassigned == router.running == 0
        assert router.open(Session("r", "m", (1,), 1, 5), "m", "").request == 0
    finally:
        router.close("the test is over")
