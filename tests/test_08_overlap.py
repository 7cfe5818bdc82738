"""Chapter 08: a start that takes requests while its bytes arrive, as the controller sees it and in a live cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from store_process import eventually
from test_08_spread import Slow

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Deployment, Stream
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.threads import ThreadWorker
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control import messages as m
from sllm_mini.control.autoscale import PerRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.placement.simple import AvailabilityFirst
from sllm_mini.control.replay import Record, read_log, replay
from sllm_mini.errors import LoadError
from sllm_mini.inference import Engine
from sllm_mini.inference.ownership import EpochRegister, OwnershipServer, TokenLedger
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth

MIB = 1 << 20
SECONDS = 20.0
SPEC = m.ModelSpec(name="a", nbytes=1000, process_seconds=1.0, ready_seconds=2.0)


# --- the controller ---


class Told:
    """A controller with an instance that serves before it is whole, and a request on it."""

    def __init__(self) -> None:
        self.estimator = Estimator()
        self.controller = self.fresh(self.estimator)
        node = m.NodeSpec(name="n", devices=1, dram_nbytes=10**6, remote_bytes_per_second=100.0, disk_bytes_per_second=1e3, dram_bytes_per_second=1e6)
        self(m.NodeJoined(node), 0.0)
        self(m.ModelDeployed(SPEC), 0.0)
        assert [type(each) for each in self(m.RequestArrived(0, "a", 1), 0.0)] == [m.Start]
        self.node = self.controller.cluster.nodes["n"]
        self.until = self.node.loads_until
        assert self(m.InstanceReached(0, Tier.REMOTE, 4.0, 0.0, 1, whole=False), 4.0) == [m.Assign(0, 0, 1)]

    @staticmethod
    def fresh(estimator: Estimator) -> Controller:
        return Controller(AvailabilityFirst(estimator), FixedKeepAlive(9.0), PerRequest(), estimator)

    def __call__(self, event: m.AnyEvent, now: float) -> list[m.AnyAction]:
        return self.controller.handle(event, now)


def test_only_the_last_byte_teaches_and_frees_the_link() -> None:
    told = Told()
    node, estimator = told.node, told.estimator
    assert estimator.bandwidth(node, Tier.REMOTE) == 100.0 and not estimator.errors() and node.loads_until == told.until > 4.0
    loaded = m.InstanceLoaded(0, Tier.REMOTE, 25.0, 1.0, 1, 20.0)
    assert told(m.InstanceLoaded(0, Tier.REMOTE, 25.0, 1.0, 0, 20.0), 25.0) == [] and not estimator.errors(), "of an older decision"
    assert told(loaded, 25.0) == [] and node.loads_until == 0.0
    assert estimator.bandwidth(node, Tier.REMOTE) == pytest.approx(1000 / 20) and estimator.base(SPEC, Warmth.COLD) == pytest.approx(4.0)
    assert [(name, error.count) for name, error in estimator.errors("rung").items()] == [("from COLD", 1)], "the rung that it had climbed from"
    assert told(loaded, 26.0) == [] and estimator.errors("rung")["from COLD"].count == 1, "once"


def test_one_that_is_let_go_before_it_is_whole_holds_no_link() -> None:
    told = Told()
    told(m.RequestFinished(0, 3, 1.0, 1), 5.0)
    assert [type(each) for each in told(m.TimerFired(0), 14.0)] == [m.Descend]
    assert told.node.loads_until == 0.0 and not told.node.loading
    assert told(m.InstanceLoaded(0, Tier.REMOTE, 25.0, 1.0, 1, 20.0), 25.0) == [] and not told.estimator.errors("rung")


def test_a_load_that_fails_is_no_requests_fault_and_a_start_that_failed() -> None:
    told = Told()
    for attempt in range(3):
        actions = told(m.InstanceFailed(attempt, "the source is gone", 1), 10.0 * attempt + 5)
        if attempt == 2:
            break
        assert [type(each) for each in actions] == [m.SetTimer], "it waits before the next, as after any start that failed"
        timer = actions[0].timer  # type: ignore[union-attr]
        assert told.controller.cluster.requests[0].failures == 0
        (start,) = told(m.TimerFired(timer), 10.0 * attempt + 8)
        assert isinstance(start, m.Start)
        told(m.InstanceReached(attempt + 1, Tier.REMOTE, 1.0, 0.0, 1, whole=False), 10.0 * attempt + 9)
    (refused,) = [each for each in actions if isinstance(each, m.Refuse)]
    assert refused.request == 0 and "the source is gone" in refused.reason
    assert told.node.loads_until == 0.0 and not told.controller.cluster.instances


def test_it_is_saved_while_its_bytes_arrive() -> None:
    told = Told()
    again = told.fresh(Estimator())
    again.restore(told.controller.to_bytes())
    assert again.to_bytes() == told.controller.to_bytes()
    event = m.InstanceLoaded(0, Tier.REMOTE, 25.0, 1.0, 1, 20.0)
    again.handle(event, 25.0)
    told(event, 25.0)
    assert again.snapshot() == told.controller.snapshot() and again.cluster.nodes["n"].loads_until == 0.0


# --- a worker ---


def test_a_load_that_fails_under_a_request_is_not_told_as_the_requests_failure(tmp_path: Path) -> None:
    register, failed, errors = EpochRegister(), threading.Event(), list[BaseException]()
    ledger, engine = TokenLedger(register), FakeEngine(step_seconds=0.002)

    def whole() -> bool:
        if failed.is_set():
            raise LoadError("the source is gone")
        return False

    def step() -> bool:
        """A pass that waits for bytes, and ends its requests where they do not come."""
        failed.wait(0.01)
        for name in engine.requests if failed.is_set() else ():
            engine.drop(name)
        return failed.is_set()

    engine.step = step  # type: ignore[method-assign]
    with OwnershipServer(register, ledger, tmp_path / "arbiter") as arbiter:
        service = EngineService(engine, owner="one", address=tmp_path / "one", arbiter=arbiter.address, on_error=errors.append, whole=whole)  # type: ignore[arg-type]
        session = Session("story", "fake", (1, 2, 3), 3, 12, stop_at_eos=False)
        ledger.open(session)
        epoch = register.claim("story", "one", 0)
        assert epoch is not None
        service.run(session, epoch)
        assert service.stuck_seconds() == 0.0
        failed.set()
        eventually(lambda: bool(errors))
        service.close()
        assert isinstance(errors[0], LoadError) and len(errors) == 1
        assert ledger.error("story") is None and ledger.finish("story") is None, "it begins again elsewhere"


# --- live ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), folder)
    return folder


class World:
    """A live cluster of the tiny model, read from a server at a rate."""

    def __init__(self, cluster: LiveCluster, origin: Slow, control: ControlOptions) -> None:
        self.cluster, self.origin, self.control = cluster, origin, control

    def ask(self, number: int = 0) -> Stream:
        return self.cluster.submit(Ask("tiny", [5, 6, number + 1], 8, stop_at_eos=False))

    def records(self) -> list[Record]:
        return list(read_log(self.cluster.log()))

    def times(self, kind: type[m.Event]) -> dict[int, float]:
        """When each instance was last said to be so."""
        return {record.event.instance: record.now for record in self.records() if isinstance(record.event, kind)}  # type: ignore[union-attr]

    def assigned(self) -> dict[int, float]:
        return {action.instance: record.now for record in self.records() for action in record.actions if isinstance(action, m.Assign)}

    def until(self, what: Callable[[], bool]) -> None:
        assert self.cluster.wait(lambda _: what(), SECONDS), self.cluster.nodes()

    def check_log(self) -> None:
        replay(self.cluster.log(), self.control.controller())


@pytest.fixture
def opened(tmp_path: Path, tiny: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def open_one(kind: str = "inprocess", nodes: int = 1, *, rate: float = 10e6, link: float | None = None, **options: Any) -> World:
        origin = Slow(tiny.parent, bytes_per_second=rate)
        origin.start()
        node = NodeOptions(store_dram_nbytes=128 * MIB, block_nbytes=2 * MIB, link_bytes_per_second=link, launcher="zygote" if kind == "local" else "thread")
        control = ControlOptions(retry_seconds=0.1)
        cluster = open_cluster(
            kind, folder=tmp_path / f"c{len(worlds)}", nodes=even_cluster(nodes, devices=1, dram_nbytes=512 * MIB), control=control,
            options=LiveOptions(node=node, **({"overlap": True, "gather_seconds": 0.2} | options)),
        )  # fmt: skip
        assert isinstance(cluster, LiveCluster)
        worlds.append(World(cluster, origin, control))
        nbytes = sum(file.stat().st_size for file in tiny.glob("*.bin"))
        cluster.deploy(Deployment(m.ModelSpec(name="tiny", nbytes=nbytes), f"{origin.url}/tiny.sllm"))
        origin.passed = 0
        return worlds[-1]

    yield open_one
    for world in worlds:
        world.cluster.close()
        world.origin.stop()


def said(folder: Path, number: int = 0) -> str:
    return Engine.load(folder).complete([5, 6, number + 1], max_new_tokens=8, stop_at_eos=False).text


def instance_of(world: World, node: str) -> Any:
    """What the one worker of a node in this process holds."""
    agent = world.cluster._loop.carry.handles[node]
    assert isinstance(agent, NodeAgent)
    (lane,) = agent._lanes.values()
    assert isinstance(lane._worker, ThreadWorker)
    return lane._worker._climber._instance


def check_overlapped(instance: Any) -> None:
    """Layers of the first pass were computed while others' bytes were on their way."""
    (arriving,) = [span for span in instance.spans if span.name == "bytes"]
    computed = [span for span in instance.spans if span.lane == "compute"]
    assert len(computed) > 2 and computed[0].end < arriving.end, (computed[0], arriving)


def test_requests_are_taken_and_layers_run_while_bytes_arrive(opened: Callable[..., World], tiny: Path) -> None:
    world = opened()
    stream = world.ask()
    assert "".join(piece.text for piece in stream) == said(tiny)
    world.until(lambda: bool(world.times(m.InstanceLoaded)))
    reached, assigned, loaded = (found[0] for found in (world.times(m.InstanceReached), world.assigned(), world.times(m.InstanceLoaded)))
    assert reached <= assigned < loaded and assigned < loaded - 0.2, "long before the last byte"
    (event,) = [record.event for record in world.records() if isinstance(record.event, m.InstanceLoaded)]
    estimator, node = world.cluster._loop.controller.estimator, world.cluster._loop.controller.cluster.nodes["node-0000"]
    assert estimator is not None and event.tier is Tier.REMOTE and event.load_seconds and node.loads_until == 0.0
    nbytes = world.cluster._loop.controller.cluster.models["tiny"].spec.nbytes
    assert estimator.bandwidth(node, Tier.REMOTE) == pytest.approx(nbytes / event.load_seconds) and estimator.bandwidth(node, Tier.REMOTE) < 2 * 10e6
    check_overlapped(instance_of(world, "node-0000"))
    again = world.ask(1)
    assert "".join(piece.text for piece in again) == said(tiny, 1) and stream.report.tier is Tier.REMOTE
    world.check_log()


def test_without_it_a_request_waits_for_the_last_byte(opened: Callable[..., World], tiny: Path) -> None:
    world = opened(overlap=False)
    assert "".join(piece.text for piece in world.ask()) == said(tiny)
    assert not world.times(m.InstanceLoaded) and all(record.event.whole for record in world.records() if isinstance(record.event, m.InstanceReached))


def test_a_node_in_a_chain_serves_before_its_image_is_whole(opened: Callable[..., World], tiny: Path) -> None:
    world = opened(nodes=3, multicast="chain", rate=10e6)
    streams = [world.ask(number) for number in range(3)]
    assert ["".join(piece.text for piece in stream) for stream in streams] == [said(tiny, number) for number in range(3)]
    world.until(lambda: len(world.times(m.InstanceLoaded)) == 3)
    assigned, loaded = world.assigned(), world.times(m.InstanceLoaded)
    assert all(assigned[id] < loaded[id] for id in loaded)
    for name in ("node-0001", "node-0002"):
        check_overlapped(instance_of(world, name))
    nbytes = sum(file.stat().st_size for file in tiny.glob("*.bin"))
    assert nbytes <= world.origin.passed < 1.5 * nbytes, "the source is read once"
    world.check_log()


@pytest.mark.parametrize("kind", ["inprocess", "local"])
def test_a_load_that_fails_after_requests_were_taken_begins_again(opened: Callable[..., World], tiny: Path, kind: str) -> None:
    world = opened(kind, rate=3e6)
    stream = world.ask()
    world.until(lambda: bool(world.assigned()))
    assert not world.times(m.InstanceLoaded)
    world.origin.stop()
    world.origin.statuses = [404] * 10_000
    world.origin.start()
    world.until(lambda: bool(world.times(m.InstanceFailed)))
    world.origin.statuses.clear()
    assert "".join(piece.text for piece in stream) == said(tiny)
    report = stream.wait(SECONDS)
    assert report.outcome == "answered" and report.restarts >= 1
    world.check_log()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nodes_of_processes_serve_what_an_engine_says(tmp_path: Path, device: str, overlap: bool) -> None:
    """From every rung that a start can begin on."""
    checkpoint = convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny.sllm")
    engine = Engine.load(checkpoint, device)
    expected = [engine.complete([5, 6, number + 1], max_new_tokens=8, stop_at_eos=False).text for number in range(2)]
    node = NodeOptions(store_dram_nbytes=128 * MIB, cuda=device == "cuda", silent_seconds=10.0)
    control = ControlOptions(keep_alive="forever")
    nodes = even_cluster(1, devices=1, dram_nbytes=512 * MIB)
    with open_cluster("local", folder=tmp_path / "c", nodes=nodes, control=control, options=LiveOptions(node=node, overlap=overlap, join_seconds=60.0)) as cluster:
        spec = m.ModelSpec(name="tiny", nbytes=checkpoint.nbytes, concurrency=2, max_instances=1)
        cluster.deploy(Deployment(spec, str(checkpoint.path)))
        for warmth in (None, Warmth.DRAM, Warmth.DEVICE, Warmth.READY):
            if warmth is not None:
                cluster.unload("tiny")
                assert cluster.wait(lambda now: not any(node.instances for node in now.nodes()), SECONDS)
                cluster.prewarm("tiny", warmth)
                assert cluster.wait(lambda now, warmth=warmth: any(one.warmth >= warmth for node in now.nodes() for one in node.instances), SECONDS)
            streams = [cluster.submit(Ask("tiny", [5, 6, number + 1], 8, stop_at_eos=False)) for number in range(2)]
            assert ["".join(piece.text for piece in stream) for stream in streams] == expected, warmth
