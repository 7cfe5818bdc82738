"""A driver that goes on from what a killed one left: its nodes are lost in one moment, and nothing is decided as if some were there. Chapter 08."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest

from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.journal import Journal, Saved, read_journal
from sllm_mini.cluster.live import driver
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.router import Router
from sllm_mini.control import messages as m
from sllm_mini.control.replay import Recorder, replay
from sllm_mini.errors import SllmError
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
    with LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=True) as cluster:  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            cluster.stream("r0").wait(0.1)
        assert cluster.stream("r0").report.outcome is None and not cluster.nodes()
        log = list(cluster.log())
        assert sum(b'"NodeLost"' in line for line in log) == 1 and replay(log, ControlOptions().controller())
        account_of(log, cluster.now)


def nobody(spec: m.NodeSpec, incarnation: int) -> None:
    raise AssertionError("no node is added here")


def test_what_was_written_down_and_not_told_is_deployed(tmp_path: Path) -> None:
    """A driver that is killed between the two: b is as good as deployed, a has its new figures."""
    left_by_a_killed_driver(tmp_path, (1,), 1)
    deployments = [Deployment(m.ModelSpec(name="a", nbytes=NBYTES + 1), "somewhere"), Deployment(m.ModelSpec(name="b", nbytes=1), "elsewhere", keep_alive=60.0)]
    (tmp_path / "deployments.json").write_bytes(msgspec.json.encode(deployments))
    for deployed in (2, 0):  # the second time it has been told
        with LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=True) as cluster:  # type: ignore[arg-type]
            known = cluster._loop.controller.cluster.models
            assert {name: model.spec.nbytes for name, model in known.items()} == {"a": NBYTES + 1, "b": 1}
            assert cluster._loop.counts.get("ModelDeployed", 0) == deployed and cluster._loop.counts.get("KeepAliveAsked", 0) == deployed // 2
            assert replay(cluster.log(), ControlOptions().controller())


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("fails", ["Router", "Reviver"])
def test_a_cluster_that_cannot_be_opened_leaves_nothing_and_its_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, fails: str) -> None:
    if resume:
        left_by_a_killed_driver(tmp_path, (1,), 1)

    def broken(*_of: object, **_named: object) -> None:
        raise OSError("no socket can be made")

    before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no socket"):
        patch.setattr(driver, fails, broken)
        LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=resume)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before and set(threading.enumerate()) <= threads
    with LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=resume) as cluster:  # type: ignore[arg-type]
        assert not resume or cluster.stream("r0").report.outcome is None


def test_a_resume_that_fails_ends_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_a_killed_driver(tmp_path, (1,), 1)

    def broken(_cluster: LiveCluster) -> None:
        raise OSError("no such time")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no such time"):
        patch.setattr(LiveCluster, "_reconcile", broken)
        LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=True)  # type: ignore[arg-type]
    with LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=True) as cluster:  # type: ignore[arg-type]
        assert cluster.stream("r0").report.outcome is None


def test_deployments_that_cannot_be_read_are_said_and_leave_nothing(tmp_path: Path) -> None:
    left_by_a_killed_driver(tmp_path, (1,), 1)
    (tmp_path / "deployments.json").write_bytes(b"[{]")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SllmError, match=r"deployments\.json does not say what was deployed"):
        LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions(), resume=True)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_numbers_go_on_after_those_of_requests_that_a_compact_journal_has_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", lambda: 2.0)
    for number in range(4):
        journal.opened(number, f"r{number}", "a", "", 0.5, Session(f"r{number}", "m", (1,), 1, 5).to_bytes())
        journal.ended(f"r{number}", None, "it was lost")
        journal.compact()
        journal.compact()
    journal.close()
    past = read_journal(tmp_path / "journal")
    assert [(each.opened.number, each.over, each.error) for each in past] == [(3, True, "it was lost")]
    router = Router(str(tmp_path / "arbiter"), now=lambda: 0.0, opened=0.0, on_end=lambda _: None)
    try:
        router.reopen(past[0])
        assert router.count == 4 and router.unassigned == router.running == 0
        assert router.open(Session("next", "m", (1,), 1, 5), "a", "").request == 4
    finally:
        router.close("the test is over")


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
