"""Chapter 10, live: starts of one model that come together feed each other, and what happens when who feeds them dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import whole_text
from hypothesis import given
from hypothesis import strategies as st
from range_server import RangeServer

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint
from sllm_mini.checkpoint.torch_source import torch_source
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.cluster.api import Ask, Deployment
from sllm_mini.cluster.block_messages import Part, Step
from sllm_mini.cluster.blocks import BlockPeer, FetchReport
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.climbing import Climber
from sllm_mini.cluster.nodes.fetching import Fetching
from sllm_mini.cluster.nodes.messages import Fetch
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.rate import TokenBucket
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import InstanceReached, ModelSpec, Start
from sllm_mini.control.multicast import check
from sllm_mini.control.multicast.gather import KINDS, PlanKind, plan_of, shares_of
from sllm_mini.control.placement.split import SplitFetch
from sllm_mini.control.replay import read_log, replay
from sllm_mini.errors import SllmError, StoreError
from sllm_mini.inference.session import Session
from sllm_mini.loading.load import load_tensors
from sllm_mini.storage import Store
from sllm_mini.storage.incoming import BlockSource, Incoming
from sllm_mini.types import Tier

MIB = 1 << 20
BLOCK = 2 * MIB
SECONDS = 20.0
SPEC = ModelSpec(name="a", nbytes=13 * MIB, concurrency=1, ready_seconds=0.01, prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.004)
NODE = NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, block_nbytes=BLOCK, beat_seconds=0.1, silent_seconds=3.0)


# --- plans of names ---


@given(st.sets(st.sampled_from("abcdefgh")), st.lists(st.sampled_from("abcdefghxyz"), unique=True), st.integers(1, 9), st.sampled_from(KINDS), st.booleans())
def test_a_plan_brings_every_block_to_whoever_wants_it(targets: set[str], holders: list[str], blocks: int, kind: PlanKind, alone: bool) -> None:
    found = plan_of(sorted(targets), holders, blocks, kind, alone=alone)
    wanting = sorted(targets - set(holders))
    if found is None:
        assert not wanting or (len(wanting) == 1 and not holders and not alone)
        return
    check(found.plan)
    assert set(wanting) <= set(found.nodes) <= targets | set(holders) and found.whole == set(found.nodes)
    sources = found.nodes[: found.plan.sources]
    assert set(sources) <= set(holders) if holders else sources == (wanting[0],)
    assert [len(reads) for reads in found.reads] == [blocks if name in sources else 0 for name in found.nodes]


@given(st.lists(st.sampled_from("abcd"), min_size=1), st.sampled_from("abcde"), st.integers(1, 12))
def test_shares_are_read_once_and_meet_at_the_target(readers: list[str], target: str, blocks: int) -> None:
    found = shares_of(target, readers, blocks)
    if found is None:
        assert set(readers) == {target}
        return
    assert sorted(block for reads in found.reads for block in reads) == list(range(blocks))
    place = found.nodes.index(target)
    received = [transfer.block for transfer in found.plan.transfers if transfer.target == place]
    assert len(received) == len(found.plan.transfers) and sorted([*received, *found.reads[place]]) == list(range(blocks))
    assert all(transfer.block in found.reads[transfer.source] for transfer in found.plan.transfers)
    assert max(map(len, found.reads)) - min(map(len, found.reads[: found.plan.sources])) <= 1 and found.whole == {target}


def test_a_plan_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of binomial"):
        plan_of("ab", "", 3, "star")  # type: ignore[arg-type]


# --- nodes ---


@dataclass
class Slow(RangeServer):
    """The same at a rate, shared by all who read."""

    bytes_per_second: float = 1e12

    def __post_init__(self) -> None:
        self.bucket, self.passed = TokenBucket(self.bytes_per_second), 0

    def _send(self, handler: Any, status: int, headers: dict[str, str], body: bytes) -> None:
        super()._send(handler, status, headers, b"")
        for at in range(0, len(body), 1 << 16):
            self.bucket.take(len(body[at : at + (1 << 16)]))
            handler.wfile.write(body[at : at + (1 << 16)])
            self.passed += len(body[at : at + (1 << 16)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("m") / "model.sllm"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{n}.w": torch.randint(0, 256, ((3 + n % 4) * MIB // 2,), dtype=torch.uint8, generator=generator) for n in range(6)}
    write_checkpoint(torch_source(tensors), path, WriteOptions(partition_nbytes=6_000_000, threads=1), None)
    return open_checkpoint(path)


class World:
    """A live cluster that reads its model from a server."""

    def __init__(self, cluster: LiveCluster, origin: Slow, control: ControlOptions) -> None:
        self.cluster, self.origin, self.control = cluster, origin, control

    def ask(self, count: int, tokens: int = 20) -> list[Any]:
        return [self.cluster.submit(Ask("a", [5, 6, number + 1], tokens, stop_at_eos=False, request_id=f"r{number}")) for number in range(count)]

    def check(self, streams: Sequence[Any], tokens: int = 20) -> None:
        for number, stream in enumerate(streams):
            ids, _, _ = whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))
            assert tuple(piece.token_id for piece in stream) == ids

    @property
    def read_nbytes(self) -> int:
        """Of the weights; whoever opens a remote asks each file for one byte."""
        return sum(asked.sent for asked in list(self.origin.asked) if asked.file.endswith(".bin") and asked.end - asked.start > 1)

    def until(self, what: Callable[[], bool]) -> None:
        assert self.cluster.wait(lambda _: what(), SECONDS), self.cluster.nodes()

    def agent(self, name: str) -> NodeAgent:
        found = self.cluster._loop.carry.handles[name]
        assert isinstance(found, NodeAgent)
        return found

    def check_images(self, names: Sequence[str], model: Checkpoint) -> None:
        """What lies in the stores is the model, to the byte."""
        wanted = load_tensors(model.path)
        for name in names:
            agent = self.agent(name)
            self.until(lambda agent=agent: agent.tier("a") is Tier.DRAM)  # type: ignore[misc]
            store = agent.store
            with store.attach("a") as attached:
                tensors = attached.wait()
            assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)

    def check_log(self) -> None:
        replay(self.cluster.log(), self.control.controller())

    def reached(self) -> list[InstanceReached]:
        return [record.event for record in read_log(self.cluster.log()) if isinstance(record.event, InstanceReached)]

    def starts(self) -> list[Start]:
        return [action for record in read_log(self.cluster.log()) for action in record.actions if isinstance(action, Start)]


@pytest.fixture
def opened(tmp_path: Path, model: Checkpoint) -> Iterator[Callable[..., World]]:
    clusters: list[World] = []

    def open_one(
        nodes: int, *, kind: str = "inprocess", rate: float = 1e12, link: float | None = None, control: ControlOptions | None = None, node: NodeOptions = NODE, **options: Any
    ) -> World:  # fmt: skip
        origin = Slow(model.path.parent, bytes_per_second=rate)
        origin.start()
        control = control or ControlOptions(retry_seconds=0.1)
        cluster = open_cluster(
            kind, folder=tmp_path / f"c{len(clusters)}", nodes=even_cluster(nodes, devices=1, dram_nbytes=512 * MIB), control=control,
            options=LiveOptions(node=replace(node, link_bytes_per_second=link), gather_seconds=0.2, **options),
        )  # fmt: skip
        assert isinstance(cluster, LiveCluster)
        clusters.append(World(cluster, origin, control))
        cluster.deploy(Deployment(SPEC, f"{origin.url}/model.sllm"))
        origin.asked.clear()
        return clusters[-1]

    yield open_one
    for world in clusters:
        world.cluster.close()
        world.origin.stop()


NAMES = ["node-0000", "node-0001", "node-0002", "node-0003"]


@pytest.mark.parametrize("kind", ["binomial", "chain", "tree", "store"])
def test_starts_that_come_together_read_the_source_once(opened: Callable[..., World], model: Checkpoint, kind: str) -> None:
    world = opened(3, multicast=kind, link=60e6)
    streams = world.ask(3)
    world.check(streams)
    assert world.read_nbytes == model.nbytes
    world.check_images(NAMES[:3], model)
    world.until(lambda: len(world.reached()) == 3)
    assert all(event.tier is Tier.REMOTE and event.load_seconds is not None and event.load_seconds > 0.02 for event in world.reached())
    world.check_log()


def test_what_came_while_the_worker_was_launched_is_no_hit_in_memory(opened: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Climber, "_import", lambda *_: time.sleep(1.0))
    world = opened(2, multicast="binomial")
    streams = world.ask(2)
    world.check(streams)
    world.until(lambda: len(world.reached()) == 2)
    assert [(event.tier, 0.001 < (event.load_seconds or 0.0) < 0.9) for event in world.reached()] == [(Tier.REMOTE, True)] * 2


def test_without_a_plan_each_reads_it(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3)
    world.check(world.ask(3))
    assert world.read_nbytes == 3 * model.nbytes


def test_a_later_start_gets_it_from_the_nodes_that_have_it(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, multicast="binomial")
    world.check(world.ask(1))
    assert world.read_nbytes == model.nbytes
    streams = [world.cluster.submit(Ask("a", [7, number], 200, stop_at_eos=False)) for number in range(3)]
    assert all(len(list(stream)) == 200 for stream in streams)
    assert world.read_nbytes == model.nbytes
    world.check_images(NAMES[:3], model)


def test_nodes_in_processes_of_their_own(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, kind="local", multicast="binomial", link=60e6)
    world.check(world.ask(3))
    assert world.read_nbytes == model.nbytes
    world.until(lambda: len(world.cluster._loop.controller.cluster.models["a"].cached_on) == 3)


@pytest.mark.parametrize("kind", ["binomial", "chain"])
def test_the_node_that_feeds_the_others_dies(opened: Callable[..., World], model: Checkpoint, kind: str) -> None:
    world = opened(4, multicast=kind, rate=10e6)
    streams = world.ask(4)
    world.until(lambda: world.origin.passed > 5 * MIB)
    root = world.starts()[0].node
    assert world.origin.passed < model.nbytes
    world.cluster.kill_node(root)
    world.check(streams)
    world.check_images([name for name in NAMES if name != root], model)
    assert world.read_nbytes < 4 * model.nbytes
    world.check_log()


def test_the_source_is_gone_for_a_while(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, multicast="binomial", rate=10e6, control=ControlOptions(retry_seconds=0.1, max_failures=20))
    streams = world.ask(3)
    world.until(lambda: world.origin.passed > 3 * MIB)
    world.origin.stop()
    world.origin.statuses = [404] * 10_000
    world.origin.start()
    world.until(lambda: world.cluster.result().events.get("InstanceFailed", 0) > 0)
    world.origin.statuses.clear()
    world.check(streams)
    world.check_log()


def test_a_model_is_spread_on_demand(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(4, link=60e6)
    found = world.cluster.spread("a", NAMES[:3], timeout=SECONDS)
    assert {name: each.error for name, each in found.items()} == dict.fromkeys(NAMES[:3], "")
    assert sum(each.read for each in found.values()) * BLOCK >= model.nbytes > 0 and sum(each.planned for each in found.values()) == 2 * found[NAMES[0]].read
    world.check_images(NAMES[:3], model)
    world.until(lambda: world.cluster._loop.controller.cluster.models["a"].cached_on == dict.fromkeys(NAMES[:3], Tier.DRAM))
    assert world.cluster.spread("a", NAMES[:3], timeout=SECONDS) == {}
    again = world.cluster.spread("a", [NAMES[3], NAMES[3]], "chain", timeout=SECONDS)
    assert again[NAMES[3]].planned == found[NAMES[0]].read and again[NAMES[3]].read == 0
    assert world.read_nbytes == model.nbytes
    world.check_images(NAMES, model)
    alone = opened(1)
    assert alone.cluster.spread("a", NAMES[:1], timeout=SECONDS)[NAMES[0]].error == ""
    for nodes, name, what in (([NAMES[0], "nobody"], "a", "no node nobody"), (NAMES[:1], "b", "no model b")):
        with pytest.raises(SllmError, match=what):
            alone.cluster.spread(name, nodes)
    alone.cluster.delete("a")
    with pytest.raises(SllmError, match="no model a"):
        alone.cluster.spread("a", NAMES[:1])


def test_a_node_that_dies_while_a_model_is_spread_is_told(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, rate=10e6)
    with ThreadPoolExecutor(1) as spreading:
        found = spreading.submit(world.cluster.spread, "a", NAMES[:3], "chain", SECONDS)
        world.until(lambda: world.origin.passed > 3 * MIB)
        world.cluster.kill_node(NAMES[1])
        parts = found.result()
    assert {name: "gone" in part.error for name, part in parts.items()} == {NAMES[0]: False, NAMES[1]: True, NAMES[2]: False}
    world.check_images([NAMES[0], NAMES[2]], model)


def test_a_fetch_that_fails_leaves_the_start_to_the_source(opened: Callable[..., World], model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_peer: BlockPeer, _part: Part, image: BlockSource) -> FetchReport:
        assert isinstance(image, Incoming)
        time.sleep(0.3)  # until those who climb share it
        error = StoreError("something else")
        image.end(error)
        raise error

    monkeypatch.setattr(BlockPeer, "run", fail)
    world = opened(2, multicast="binomial")
    streams = world.ask(2)
    world.check(streams)
    assert [stream.report.restarts for stream in streams] == [0, 0] and world.read_nbytes == 2 * model.nbytes
    assert not world.cluster.result().events.get("InstanceFailed")


def test_a_node_that_closes_waits_for_no_peer(tmp_path: Path, model: Checkpoint) -> None:
    silent = BlockPeer(str(tmp_path / "silent"))
    answers: list[Any] = []
    store = Store(tmp_path / "store", dram_nbytes=32 * MIB)
    store.register("m", model.path)
    fetching = Fetching(store, str(tmp_path / "mine"), answers.append)
    part = Part("p", 1, BLOCK, [silent.address, fetching.address], [Step(0, 1)], [Step(0, 0)])
    fetching.give(Fetch("p", "m", part))
    fetching.way("p")
    time.sleep(0.2)
    begun = time.monotonic()
    fetching.close()
    store.close()
    fetching.wait()
    assert time.monotonic() - begun < 5.0  # a peer is waited for twice as long
    assert answers[0].error
    silent.close()


def test_what_is_spread_without_room_is_told(opened: Callable[..., World]) -> None:
    world = opened(2, node=replace(NODE, store_dram_nbytes=4 * MIB))
    found = world.cluster.spread("a", NAMES[:2], timeout=SECONDS)
    assert all("no room" in each.error for each in found.values())
    world.check(world.ask(2))


def test_a_start_in_parts_reads_a_share_on_each_link(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, control=ControlOptions(placement=lambda estimator: SplitFetch(estimator)))
    world.check(world.ask(1))
    starts = world.starts()
    assert len(starts) == 1 and len(starts[0].parts) == 3
    assert world.read_nbytes == model.nbytes
    world.check_images([starts[0].node], model)
    moved = [world.agent(name).store.stats().moved_nbytes.get("remote->dram", 0) for name in NAMES[:3]]
    world.until(lambda: all(world.agent(name).store.stats().places[0].used_nbytes == 0 for name in starts[0].parts if name != starts[0].node))
    assert 0 < moved[NAMES.index(starts[0].node)] < model.nbytes / 2


def test_a_start_in_parts_whose_helper_dies_reads_the_rest(opened: Callable[..., World], model: Checkpoint) -> None:
    world = opened(3, rate=10e6, control=ControlOptions(placement=lambda estimator: SplitFetch(estimator)))
    streams = world.ask(1)
    world.until(lambda: world.origin.passed > 3 * MIB)
    (home,) = [node.name for node in world.cluster.nodes() if node.instances]
    world.cluster.kill_node(next(name for name in NAMES[:3] if name != home))
    world.check(streams)
    world.check_images([home], model)
    assert streams[0].report.restarts == 0


def test_a_cluster_that_is_closed_meanwhile_ends_soon(opened: Callable[..., World]) -> None:
    world = opened(3, multicast="chain", rate=1e6)
    world.ask(3)
    world.until(lambda: world.origin.passed > MIB)
    begun = time.monotonic()
    world.cluster.close()
    assert time.monotonic() - begun < 8.0  # less than a peer is waited for
