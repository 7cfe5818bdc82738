"""What every cluster promises, asked of each through the `Cluster` protocol: nodes in virtual time, threads of this process, and
processes of their own. Chapter 08.

Live engines are doubles (`fake_engine`) whose whole text is known beforehand: a token lost, doubled or out of place is seen. The
simulated cluster gives as many tokens, without texts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from fake_engine import whole_text

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.api import Ask, Cluster, Deployment, RefusedError, Stream
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.autoscale import BoundedQueue
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.replay import read_log, replay
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.inference import Engine
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth

KINDS = ["simulated", "inprocess", "local"]
LIVE = ["inprocess", "local"]
MIB = 1 << 20
SECONDS = 20.0
"""How long anything may take; a simulated cluster's seconds are virtual."""
SPEC = ModelSpec(name="a", nbytes=10 * MIB, concurrency=1, ready_seconds=0.01, prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.004)
CONTROL = ControlOptions()
OPTIONS = LiveOptions(
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=1.0, stuck_seconds=1.0)
)


class Open(Protocol):
    def __call__(
        self, nodes: int = ..., *, models: Sequence[ModelSpec] = ..., devices: int = ..., control: ControlOptions = ..., disk: float = ..., **options: Any
    ) -> World: ...  # fmt: skip


class World:
    """A cluster with its models, and what its texts must be."""

    def __init__(self, kind: str, cluster: Cluster, nodes: list[NodeSpec]) -> None:
        self.kind, self.cluster, self.nodes = kind, cluster, nodes

    def ask(self, model: str, number: int = 0, tokens: int = 20) -> Stream:
        return self.cluster.submit(Ask(model, [5, 6, number + 1], tokens, stop_at_eos=False, request_id=f"{model}-{number}-{tokens}"))

    def check(self, stream: Stream, model: str, number: int = 0, tokens: int = 20) -> None:
        """Whole, in order, once, and the same however often it is read."""
        pieces = list(stream)
        assert [piece.position for piece in pieces] == list(range(3, 3 + tokens))
        if self.kind != "simulated":
            ids, text, _ = whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))
            assert tuple(piece.token_id for piece in pieces) == ids and "".join(piece.text for piece in pieces) == text
        assert list(stream) == pieces and list(self.cluster.stream(stream.request_id)) == pieces

    def warmths(self, model: str | None = None) -> list[Warmth]:
        return [each.warmth for node in self.cluster.nodes() for each in node.instances if each.climbing_to is None and (model is None or each.model == model)]

    def until(self, what: Callable[[], bool]) -> None:
        assert self.cluster.wait(lambda _: what(), SECONDS), self.cluster.nodes()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), folder)
    return folder


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path, tiny: Path) -> Iterator[Open]:
    clusters: list[Cluster] = []

    def open_one(
        nodes: int = 2, *, models: Sequence[ModelSpec] = (SPEC,), devices: int = 2, control: ControlOptions = CONTROL, disk: float = 5e9, **options: Any
    ) -> World:  # fmt: skip
        specs = even_cluster(nodes, devices=devices, dram_nbytes=512 * MIB, disk_bytes_per_second=disk)
        cluster = open_cluster(request.param, folder=tmp_path / f"cluster-{len(clusters)}", nodes=specs, control=control, options=replace(OPTIONS, **options))
        clusters.append(cluster)
        for spec in models:
            cluster.deploy(Deployment(spec, str(tiny)))
        return World(request.param, cluster, specs)

    yield open_one
    for cluster in clusters:
        cluster.close()


every = pytest.mark.parametrize("opened", KINDS, indirect=True)
live = pytest.mark.parametrize("opened", LIVE, indirect=True)


@every
def test_a_text_is_whole_in_order_and_once(opened: Open) -> None:
    world = opened(1)
    stream = world.ask("a")
    world.check(stream, "a")
    report = stream.report  # read to its end, it is whole
    assert (report.outcome, report.output_tokens, report.rung, report.restarts) == ("answered", 20, Warmth.COLD, 0)
    assert 0 <= report.arrived <= report.assigned < report.first < report.ended <= world.cluster.now
    with pytest.raises(ValueError, match="a-0-20"):
        world.ask("a")


@every
def test_requests_share_an_instance_or_grow_as_the_autoscaler_says(opened: Open) -> None:
    world = opened(1, models=[replace_spec(SPEC, concurrency=4), replace_spec(SPEC, name="b")])
    streams = [world.ask("a", number, 40) for number in range(4)]
    world.until(lambda: all(stream.report.first == stream.report.first for stream in streams))
    assert world.warmths("a") == [Warmth.READY]
    others = [world.ask("b", number) for number in range(2)]
    for number, stream in enumerate(streams):
        world.check(stream, "a", number, 40)
    for number, stream in enumerate(others):
        world.check(stream, "b", number)
    result = world.cluster.result()
    assert (result.answered, result.refused, result.arrived) == (6, 0, 6)


@every
def test_a_second_start_reads_from_memory_and_a_warm_request_waits_for_none(opened: Open) -> None:
    world = opened(1, devices=1, models=[SPEC, replace_spec(SPEC, name="b")])
    first, warm = world.ask("a"), None
    world.check(first, "a")
    warm = world.ask("a", 1)
    world.check(warm, "a", 1)
    world.check(world.ask("b"), "b")  # the only device: a gave way
    again = world.ask("a", 2)
    world.check(again, "a", 2)
    assert [each.wait(SECONDS).tier for each in (first, warm, again)] == [Tier.DISK, None, Tier.DRAM]
    assert [each.wait(SECONDS).rung == Warmth.READY for each in (first, warm, again)] == [False, True, False]


@every
def test_keep_alive_descends_rung_by_rung_and_a_rung_that_is_warm_is_used(opened: Open) -> None:
    world = opened(1, control=ControlOptions(keep_alive=lambda _: FixedKeepAlive(0.5, Warmth.DRAM)))
    world.check(world.ask("a"), "a")
    world.until(lambda: world.warmths() == [Warmth.DRAM])
    stream = world.ask("a", 1)
    world.check(stream, "a", 1)
    assert stream.wait(SECONDS).rung == Warmth.DRAM
    world.until(lambda: world.warmths() == [])


@every
def test_a_full_cluster_waits_loses_patience_and_refuses_the_unknown(opened: Open) -> None:
    control = ControlOptions(autoscaler=lambda: BoundedQueue(1.0, 0.4))
    world = opened(1, devices=1, models=[SPEC, replace_spec(SPEC, name="b")], control=control)
    with pytest.raises(RefusedError) as unknown:
        world.ask("nobody")
    assert unknown.value.status == 404
    running = world.ask("a", 0, 400)
    world.until(lambda: running.report.first == running.report.first)
    waiting = world.ask("b")
    with pytest.raises(RefusedError) as impatient:
        list(waiting)
    assert impatient.value.status == 429
    report = waiting.wait(SECONDS)
    assert (report.outcome, report.output_tokens) == ("refused", 0) and "waited" in report.reason
    world.check(running, "a", 0, 400)


@every
def test_a_cancelled_request_frees_its_place(opened: Open) -> None:
    world = opened(1, devices=1)
    stream, next_one = world.ask("a", 0, 5000), world.ask("a", 1)
    world.until(lambda: stream.report.output_tokens > 3)
    stream.cancel()
    stream.cancel()
    report = stream.wait(SECONDS)
    assert report.outcome == "cancelled" and 3 < report.output_tokens < 5000
    assert len(list(stream)) == report.output_tokens
    world.check(next_one, "a", 1)


@every
def test_requests_of_a_node_that_is_killed_go_on_elsewhere(opened: Open) -> None:
    world = opened(2, devices=4)
    streams = [world.ask("a", number, 100) for number in range(8)]
    world.until(lambda: all(stream.report.output_tokens > 3 for stream in streams))
    victim = world.nodes[0].name
    lost = sum(len(node.instances) for node in world.cluster.nodes() if node.name == victim)
    world.cluster.kill_node(victim)
    for number, stream in enumerate(streams):
        world.check(stream, "a", number, 100)
    assert lost == 4 and sorted(stream.wait(SECONDS).restarts for stream in streams) == [0] * 4 + [1] * 4
    assert [(node.name, node.alive) for node in world.cluster.nodes()] == [(victim, False), (world.nodes[1].name, True)]
    with pytest.raises(SllmError, match=victim):
        world.cluster.kill_node(victim)


@every
def test_a_node_that_returns_serves_again_and_its_old_self_says_nothing(opened: Open) -> None:
    world = opened(1)
    streams = [world.ask("a", number, 100) for number in range(2)]
    world.until(lambda: all(stream.report.output_tokens > 3 for stream in streams))
    world.cluster.kill_node(world.nodes[0].name)
    world.cluster.sleep(0.3)
    seen = [stream.report.output_tokens for stream in streams]
    world.cluster.sleep(0.1)
    assert [stream.report.output_tokens for stream in streams] == seen and max(seen) < 100
    world.cluster.add_node(world.nodes[0])
    for number, stream in enumerate(streams):
        world.check(stream, "a", number, 100)
        assert stream.wait(SECONDS).restarts == 1
    assert [(node.alive, node.incarnation) for node in world.cluster.nodes()] == [(True, 2)]


class Unlearning(Estimator):
    """Goes on believing the nodes' figures: a real load of these bytes takes no time worth a move."""

    def observe_start(self, *_: object) -> None: ...

    def observe_migration(self, *_: object) -> None: ...


@every
def test_a_running_request_is_moved_off_the_node_that_can_start_another_sooner(opened: Open) -> None:
    control = ControlOptions(keep_alive="forever", estimator=Unlearning)
    world = opened(2, devices=1, disk=2e6, models=[SPEC, replace_spec(SPEC, name="b")], control=control)
    both = [world.ask("a", number) for number in range(2)]  # a is in the memory of both nodes
    for number, stream in enumerate(both):
        world.check(stream, "a", number)
    world.check(world.ask("b"), "b")  # and b in that of one
    elsewhere, there = world.ask("a", 2, 600), world.ask("a", 3, 600)
    world.until(lambda: min(elsewhere.report.output_tokens, there.report.output_tokens) > 3)
    home = {each.instance: node.name for node in world.cluster.nodes() for each in node.instances}
    assert len(set(home.values())) == 2
    elsewhere.cancel()
    elsewhere.wait(SECONDS)
    later = world.ask("b", 1)
    world.check(later, "b", 1)
    world.check(there, "a", 3, 600)
    report = there.wait(SECONDS)
    assert (report.migrations, report.restarts, later.wait(SECONDS).tier) == (1, 0, Tier.DRAM)
    assert world.cluster.result().account.migrations == 1


@every
def test_new_figures_are_taken_and_what_is_deleted_runs_to_its_end(opened: Open, tiny: Path) -> None:
    world = opened(1)
    world.check(world.ask("a"), "a")
    world.cluster.deploy(Deployment(replace_spec(SPEC, concurrency=2), str(tiny)))
    stream = world.ask("a", 1, 60)
    world.until(lambda: stream.report.output_tokens > 3)
    world.cluster.delete("a")
    world.cluster.delete("nobody")
    with pytest.raises(RefusedError):
        world.ask("a", 2)
    world.check(stream, "a", 1, 60)
    world.until(lambda: world.warmths() == [])


@every
def test_the_log_replays_exactly_and_accounts_for_every_device(opened: Open) -> None:
    control = ControlOptions(keep_alive="rainbowcake")
    world = opened(2, models=[SPEC, replace_spec(SPEC, name="b")], control=control)
    for number, model in enumerate("abab"):
        world.check(world.ask(model, number), model, number)
    log = list(world.cluster.log())
    assert replay(log, control.controller()) == len(list(read_log(log))) > 10
    result = world.cluster.result()
    account = account_of(world.cluster.log(), result.seconds).account
    held = sum(account.gpu_seconds)
    assert held > 0 and held + account.free_gpu_seconds == pytest.approx(account.total_gpu_seconds)
    assert 0 < account.total_gpu_seconds <= 4 * result.seconds
    assert sum(account.starts) == sum(result.account.starts) and result.answered == 4


@live
def test_a_real_model_says_what_its_engine_says(opened: Open, tiny: Path) -> None:
    world = opened(1, devices=1, node=replace(OPTIONS.node, engine="", pace_seconds=0.0, stuck_seconds=30.0))
    engine = Engine.load(tiny)
    for prompt in ("Once upon a time", "The cat"):
        stream = world.cluster.submit(Ask("a", prompt, 12))
        assert "".join(piece.text for piece in stream) == engine.complete(prompt, max_new_tokens=12).text
    with pytest.raises(ModelError, match="empty"):
        world.cluster.submit(Ask("a", []))
    too_long = world.cluster.submit(Ask("a", [1] * 100_000))
    with pytest.raises(RefusedError, match=r"failed 3 times.*100,?000"):
        list(too_long)


@live
def test_a_controller_that_is_restarted_goes_on(opened: Open) -> None:
    world = opened(2)
    streams = [world.ask("a", number, 100) for number in range(3)]
    world.until(lambda: all(stream.report.output_tokens > 3 for stream in streams))
    cluster = world.cluster
    assert isinstance(cluster, LiveCluster)
    cluster.restart_controller()
    more = world.ask("a", 3)
    for number, stream in enumerate(streams):
        world.check(stream, "a", number, 100)
        assert stream.wait(SECONDS).restarts == 0
    world.check(more, "a", 3)
    assert replay(cluster.log(), ControlOptions().controller())


@live
def test_what_a_driver_left_that_was_killed_is_resumed(opened: Open, tmp_path: Path) -> None:
    world = opened(1, models=[SPEC, replace_spec(SPEC, name="b")])
    over = world.ask("b")
    world.check(over, "b")
    streams = [world.ask("a", number, 200) for number in range(3)]  # the third waits
    world.until(lambda: all(stream.report.output_tokens > 20 for stream in streams[:2]))
    left = tmp_path / "left"
    left.mkdir()
    for name in ("controller.bin", "deployments.json", "events.jsonl", "ledger.bin"):  # as a kill now would leave them
        shutil.copy(tmp_path / "cluster-0" / name, left / name)
    seen = [stream.report.output_tokens for stream in streams]
    world.cluster.close()
    with open_cluster(world.kind, folder=left, nodes=world.nodes, options=OPTIONS, resume=True) as cluster:
        resumed = World(world.kind, cluster, world.nodes)
        resumed.check(cluster.stream(over.request_id), "b")
        for number in range(3):
            stream = cluster.stream(f"a-{number}-200")
            resumed.check(stream, "a", number, 200)
            report = stream.wait(SECONDS)
            assert report.outcome == "answered" and 0 < report.first < report.ended <= cluster.now
        assert max(seen) < 200
        resumed.check(resumed.ask("a", 3), "a", 3)
        assert replay(cluster.log(), ControlOptions().controller())
        assert cluster.result().answered == 5
    with pytest.raises(SllmError, match="another cluster"):
        open_cluster(world.kind, folder=left, nodes=world.nodes, options=OPTIONS)
    with pytest.raises(SllmError, match="resumed"):
        open_cluster(world.kind, folder=tmp_path / "nothing", nodes=world.nodes, options=OPTIONS, resume=True)


@live
def test_what_is_waited_for_is_bounded(opened: Open) -> None:
    world = opened(1, devices=1)
    stream = world.ask("a", 0, 5000)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        stream.wait(0.05)
    assert not world.cluster.wait(lambda _: False, 0.05) and time.monotonic() - began < 5
    world.cluster.close()
    with pytest.raises(RefusedError) as closed:
        list(stream)
    assert closed.value.status == 503
    with pytest.raises(SllmError, match="ended"):
        world.ask("a", 1)


def test_a_cluster_that_is_none_is_refused(tmp_path: Path) -> None:
    for kind in ("", "remote", "local:x", "simulated:"):
        if kind != "simulated:":
            with pytest.raises(SllmError, match="inprocess"):
                open_cluster(kind, folder=tmp_path)
    with open_cluster("simulated:3", folder=tmp_path) as cluster:
        assert len(cluster.nodes()) == 3


def replace_spec(spec: ModelSpec, **changes: Any) -> ModelSpec:
    from msgspec.structs import replace as changed

    return changed(spec, **changes)
