"""A node that is lost comes back by itself where it is asked to, and one that cannot come leaves nothing behind. Chapter 08."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import whole_text
from processes import children_of, is_gone

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Cluster, Deployment, NodeReport, Stream
from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.handles import handles_of
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.live.reviving import Reviver
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec, NodeSpec, SpecError
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource

MIB = 1 << 20
NODE = NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=5.0)
OPTIONS = LiveOptions(node=NODE, revive=3, revive_seconds=0.1)
(SPEC,) = even_cluster(1, devices=2, dram_nbytes=512 * MIB)
SECONDS = 30.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviving") / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), folder)
    return folder


def deployment(tiny: Path, name: str = "a") -> Deployment:
    return Deployment(ModelSpec(name=name, nbytes=10 * MIB, concurrency=2), str(tiny))


def ask(cluster: Cluster, number: int, tokens: int = 100, model: str = "a") -> Stream:
    return cluster.submit(Ask(model, [5, 6, number + 1], tokens, stop_at_eos=False))


def is_whole(stream: Stream, number: int, tokens: int = 100) -> bool:
    return tuple(piece.token_id for piece in stream) == whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))[0]


def only(cluster: Cluster) -> NodeReport:
    (node,) = cluster.nodes()
    return node


# When, and how often


class Machine:
    """Joins for a reviver, in a time that passes only where it waits."""

    def __init__(self, outcomes: list[bool], limit: int = 4) -> None:
        self.outcomes, self.clock, self.waits, self.given_up, self.away = outcomes, 0.0, list[float](), list[tuple[str, int]](), True
        self.reviver = Reviver(self.join, lambda name: self.away, lambda name, times: self.given_up.append((name, times)), lambda: self.clock, limit, 1.0)
        self.reviver._ending.wait = self.wait  # type: ignore[method-assign, assignment]

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.clock += seconds
        return False

    def join(self, spec: NodeSpec) -> None:
        assert spec is SPEC
        if not self.outcomes.pop(0):
            raise SllmError("it did not come")
        self.away = False
        self.reviver.came(spec.name)

    def lose(self) -> None:
        """Returns once it has been seen to."""
        self.away = True
        self.reviver.lost(SPEC)
        for thread in threading.enumerate():
            if thread.name == f"sllm-revive-{SPEC.name}":
                thread.join(SECONDS)
        assert self.reviver.returning() == {}


def test_each_time_in_a_row_it_waits_for_twice_as_long_and_then_no_more() -> None:
    machine = Machine([False, True, True, True, True, False, False, False, False, True], limit=4)
    machine.lose()
    assert machine.waits == [1, 2] and machine.reviver.returned == machine.reviver.failed == 1
    machine.lose()  # again, at once
    machine.clock += 29
    machine.lose()
    assert machine.waits == [1, 2, 4, 8] and not machine.given_up
    machine.clock += 30
    machine.lose()  # that was long enough
    assert machine.waits[4:] == [1]
    machine.clock += 100
    machine.lose()
    assert machine.waits[5:] == [1, 2, 4, 8] and machine.given_up == [(SPEC.name, 4)] and machine.reviver.failed == 5
    machine.lose()
    assert machine.waits[9:] == [1], "it is begun anew where somebody else has brought it back"


def test_who_is_there_again_is_left_alone_and_nobody_is_started_after_the_end() -> None:
    machine = Machine([True])

    def somebody_else(seconds: float) -> bool:
        machine.away = False
        return False

    machine.reviver._ending.wait = somebody_else  # type: ignore[method-assign, assignment]
    machine.lose()
    machine.reviver.close()
    machine.reviver.lost(SPEC)
    assert machine.outcomes == [True] and machine.reviver.returned == machine.reviver.failed == 0 and machine.reviver.returning() == {}


def test_waits_are_bounded() -> None:
    machine = Machine([False] * 10, limit=9)
    machine.lose()
    assert machine.waits == [1, 2, 4, 8, 16, 32, 64, 64, 64] and machine.given_up == [(SPEC.name, 9)]


@pytest.mark.parametrize("field", ["revive", "revive_seconds"])
def test_figures_that_cannot_be_are_refused(field: str) -> None:
    with pytest.raises(SpecError, match=field):
        replace(OPTIONS, **{field: -1})  # type: ignore[arg-type]


# Live


@pytest.mark.parametrize("kind", ["inprocess", "local"])
def test_a_node_that_is_killed_comes_back_and_goes_on(kind: str, tmp_path: Path, tiny: Path) -> None:
    others = set(children_of(os.getpid()))  # of tests before this one
    with open_cluster(kind, folder=tmp_path / "c", nodes=[SPEC], options=OPTIONS) as cluster:
        cluster.deploy(deployment(tiny))
        streams = [ask(cluster, number) for number in range(2)]
        assert cluster.wait(lambda _: all(stream.report.output_tokens > 3 for stream in streams), SECONDS)
        if kind == "inprocess":
            cluster.kill_node(SPEC.name)
        else:
            (agent,) = set(children_of(os.getpid())) - others
            processes = [int(agent), *(int(child) for child in children_of(int(agent)))]
            os.kill(processes[0], signal.SIGKILL)
            assert cluster.wait(lambda _: only(cluster).incarnation == 2, SECONDS) and all(map(is_gone, processes)), "its zygote ends with it"
        if kind == "inprocess":
            assert not only(cluster).alive and only(cluster).returns_at is not None
        for number, stream in enumerate(streams):
            assert is_whole(stream, number) and stream.wait(SECONDS).restarts == 1
        node, metrics = only(cluster), cluster.metrics()
        assert (node.alive, node.incarnation, node.returns_at, node.reason) == (True, 2, None, "")
        assert (metrics.revivals, metrics.failed_revivals) == (1, 0)
        if kind == "local":  # its zygote alone is another matter: the node stays, and makes a new one
            (agent,) = set(children_of(os.getpid())) - others
            (zygote,) = children_of(int(agent))
            os.kill(int(zygote), signal.SIGKILL)
            assert is_whole(ask(cluster, 7), 7) and only(cluster).incarnation == 2
        assert replay(cluster.log(), ControlOptions().controller())


class Fragile:
    """Makes nodes of this process, and breaks where it is told to."""

    def __init__(self, folder: Path) -> None:
        self._make = handles_of("inprocess", folder, OPTIONS)
        self.fails: Callable[[], object] = lambda: None
        self.opens: Callable[[], object] = lambda: None
        self.made: list[NodeHandle] = []

    def __call__(self, spec: NodeSpec, incarnation: int) -> NodeHandle:
        self.fails()
        handle = self._make(spec, incarnation)
        opens = handle.open

        def opened(*given: Any) -> None:
            self.opens()
            opens(*given)

        handle.open = opened  # type: ignore[method-assign, assignment]
        self.made.append(handle)
        return handle

    @property
    def alive(self) -> int:
        return sum(not handle.ended for handle in self.made)  # type: ignore[attr-defined]


def broken() -> None:
    raise SllmError("it is broken")


@contextmanager
def fragile(tmp_path: Path, options: LiveOptions = OPTIONS) -> Iterator[tuple[LiveCluster, Fragile]]:
    made = Fragile(tmp_path / "c")
    with LiveCluster(made, ControlOptions(), tmp_path / "c", options) as cluster:
        yield cluster, made


def test_one_that_does_not_come_any_more_is_given_up_and_can_be_brought_back(tmp_path: Path) -> None:
    with fragile(tmp_path, replace(OPTIONS, revive_seconds=0.01)) as (cluster, made):
        cluster.add_node(SPEC)
        made.fails = broken
        cluster.kill_node(SPEC.name)
        assert cluster.wait(lambda _: "given up" in only(cluster).reason, SECONDS)
        assert cluster.metrics().failed_revivals == 3 and only(cluster).returns_at is None and "3 times in a row" in only(cluster).reason
        made.fails = lambda: None
        cluster.add_node(SPEC)
        cluster.kill_node(SPEC.name)
        assert cluster.wait(lambda _: only(cluster).alive and cluster.metrics().revivals == 1, SECONDS)


def test_nobody_comes_back_unasked(tmp_path: Path) -> None:
    with fragile(tmp_path, LiveOptions(node=NODE)) as (cluster, made):
        cluster.add_node(SPEC)
        cluster.kill_node(SPEC.name)
        assert only(cluster).returns_at is None and len(made.made) == 1 and not [each for each in threading.enumerate() if each.name.startswith("sllm-revive")]


def test_a_cluster_that_is_closed_while_a_node_comes_up_leaves_nothing(tmp_path: Path) -> None:
    coming, may = threading.Event(), threading.Event()
    with fragile(tmp_path, replace(OPTIONS, revive_seconds=0.01)) as (cluster, made):
        cluster.add_node(SPEC)

        def held() -> None:
            coming.set()
            may.wait(SECONDS)

        made.fails = held
        cluster.kill_node(SPEC.name)
        assert coming.wait(SECONDS)
        threading.Timer(0.2, may.set).start()
    assert not made.alive and len(made.made) == 2 and not [each for each in threading.enumerate() if each.name.startswith("sllm-revive")]


# What a node that does not come leaves behind


@pytest.mark.parametrize("where", ["made", "opened", "joined"])
def test_a_node_that_could_not_be_added_leaves_its_name_and_no_process(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fragile(tmp_path, replace(OPTIONS, revive=0, join_seconds=0.2)) as (cluster, made):
        with monkeypatch.context() as patched:
            if where == "made":
                made.fails = broken
            elif where == "opened":
                made.opens = broken
            else:
                patched.setattr(cluster._members, "heard", lambda *_: [])
            with pytest.raises(SllmError, match="did not come up within" if where == "joined" else "it is broken"):
                cluster.add_node(SPEC)
        assert not made.alive and not only(cluster).alive and only(cluster).reason
        made.fails = made.opens = lambda: None
        cluster.add_node(SPEC)
        assert only(cluster).alive


def test_a_node_that_comes_after_the_end_is_ended(tmp_path: Path) -> None:
    with fragile(tmp_path) as (cluster, made):
        made.fails = cluster._loop.stop
        with pytest.raises(SllmError, match="the cluster has ended"):
            cluster.add_node(SPEC)
        assert len(made.made) == 1 and not made.alive


def test_of_two_who_add_the_same_node_one_is_refused(tmp_path: Path) -> None:
    with fragile(tmp_path) as (cluster, made), ThreadPoolExecutor(2) as pool:
        both = threading.Barrier(2, timeout=SECONDS)
        refused = threading.Event()

        def held() -> None:
            refused.wait(SECONDS)

        def add() -> None:
            both.wait()
            try:
                cluster.add_node(SPEC)
            except SllmError:
                refused.set()
                raise

        made.fails = held
        adding: list[Future[None]] = [pool.submit(add) for _ in range(2)]
        errors = [each.exception(SECONDS) for each in adding]
        assert sorted(map(str, errors)) == sorted(["None", f"a node {SPEC.name} is alive, or on its way; kill it once it is there, or give another name"])
        assert made.alive == 1 and only(cluster).alive
