"""What every cluster promises, asked of each through the `Cluster` protocol: nodes in virtual time, threads of this process, and
processes of their own. Chapter 08.

Live engines are doubles (`fake_engine`) whose whole text is known beforehand: a token lost, doubled or out of place is seen. The
simulated cluster gives as many tokens, without texts.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any, Protocol

import pytest
from fake_engine import whole_text

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.api import Ask, Cluster, Deployment, RefusedError, RequestReport, Stream
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.live.ways import Ways
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.messages import Forget, OrderFailed, Register
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.autoscale import BoundedQueue
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.replay import read_log, replay
from sllm_mini.errors import ModelError, SllmError, StoreError
from sllm_mini.inference import Engine
from sllm_mini.inference.migration.messages import Phase, Report
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth
from sllm_mini.wire import Channel

RAY = pytest.param("ray", marks=pytest.mark.slow)
TCP = pytest.param("tcp", marks=pytest.mark.slow)
"""Processes of this machine that are reached as those of others are."""
KINDS = ["simulated", "inprocess", "local", TCP, RAY]
LIVE = ["inprocess", "local", TCP, RAY]
MIB = 1 << 20
SECONDS = 20.0
"""How long anything may take; a simulated cluster's seconds are virtual."""
SPEC = ModelSpec(name="a", nbytes=10 * MIB, concurrency=1, ready_seconds=0.01, prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.004)
CONTROL = ControlOptions()
OPTIONS = LiveOptions(
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=3.0)
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
    if request.param == "ray":
        request.getfixturevalue("ray_machines")

    def open_one(
        nodes: int = 2, *, models: Sequence[ModelSpec] = (SPEC,), devices: int = 2, control: ControlOptions = CONTROL, disk: float = 5e9, **options: Any
    ) -> World:  # fmt: skip
        specs = even_cluster(nodes, devices=devices, dram_nbytes=512 * MIB, disk_bytes_per_second=disk)
        kind, host = ("local", "127.0.0.1") if request.param == "tcp" else (request.param, "")
        options.setdefault("host", host)
        cluster = open_cluster(kind, folder=tmp_path / f"cluster-{len(clusters)}", nodes=specs, control=control, options=replace(OPTIONS, **options))
        clusters.append(cluster)
        for spec in models:
            cluster.deploy(Deployment(spec, str(tiny)))
        return World(kind, cluster, specs)

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
    streams = [world.ask("a", number, 400) for number in range(8)]
    world.until(lambda: all(stream.report.output_tokens > 3 for stream in streams))
    victim = world.nodes[0].name
    lost = sum(len(node.instances) for node in world.cluster.nodes() if node.name == victim)
    world.cluster.kill_node(victim)
    for number, stream in enumerate(streams):
        world.check(stream, "a", number, 400)
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


def move_one_off(world: World) -> None:
    """Two nodes with a device each; a request of a is moved off the one that has b in memory."""
    both = [world.ask("a", number) for number in range(2)]  # a is in the memory of both nodes
    for number, stream in enumerate(both):
        world.check(stream, "a", number)
    world.check(world.ask("b"), "b")  # and b in that of one
    elsewhere, there = world.ask("a", 2, 1200), world.ask("a", 3, 1200)
    world.until(lambda: min(elsewhere.report.output_tokens, there.report.output_tokens) > 3)
    home = {each.instance: node.name for node in world.cluster.nodes() for each in node.instances}
    assert len(set(home.values())) == 2
    elsewhere.cancel()
    elsewhere.wait(SECONDS)
    later = world.ask("b", 1)
    world.check(later, "b", 1)
    world.check(there, "a", 3, 1200)
    report = there.wait(SECONDS)
    assert (report.migrations, report.restarts, later.wait(SECONDS).tier) == (1, 0, Tier.DRAM)


@every
def test_a_running_request_is_moved_off_the_node_that_can_start_another_sooner(opened: Open) -> None:
    control = ControlOptions(keep_alive="forever", estimator=Unlearning)
    world = opened(2, devices=1, disk=2e6, models=[SPEC, replace_spec(SPEC, name="b")], control=control)
    move_one_off(world)
    assert world.cluster.result().account.migrations == 1


def test_a_way_to_move_is_tried_measured_and_chosen() -> None:
    def report(mode: str, tokens: int, nbytes: int, seconds: float) -> Report:
        phases = [Phase("begin", 0.0, 9.0, 0, 900), Phase("round", 1.0, 1.0 + seconds, tokens, nbytes)] if tokens else []
        return Report("r", mode, "moved", "o", 1, "", phases)  # type: ignore[arg-type]

    ways, pair, back = Ways(), ("x", "y", "m"), ("y", "x", "m")
    assert ways.choose(pair, 100) == "tokens"
    ways.learn(pair, report("tokens", 100, 400, 1.0))
    assert (ways.choose(pair, 100), ways.choose(back, 100)) == ("kv", "tokens")
    ways.learn(pair, report("kv", 100, 100_000, 0.5))
    assert ways.choose(pair, 100) == "kv"
    ways.learn(pair, report("kv", 100, 100_000, 5.0))  # 2.75 s for what recomputing takes 1 s for
    assert ways.choose(pair, 100) == "tokens"
    ways.learn(back, report("tokens", 0, 0, 0.0))
    ways.learn(back, report("kv", 0, 0, 0.0))
    assert ways.choose(back, 100) == "tokens", "tried, and nothing was measured"
    ways.forget("x")
    assert ways.choose(pair, 100) == ways.choose(back, 100) == "tokens"


@live
def test_moves_go_by_what_moves_between_the_two_nodes_took(opened: Open) -> None:
    control = ControlOptions(keep_alive="forever", estimator=Unlearning)
    world = opened(2, devices=1, disk=2e6, models=[SPEC, replace_spec(SPEC, name="b")], control=control, move_mode="auto", node=replace(OPTIONS.node, stuck_seconds=30.0))
    assert isinstance(world.cluster, LiveCluster)
    carry = world.cluster._loop.carry
    for pair in (("node-0000", "node-0001", "a"), ("node-0001", "node-0000", "a")):
        assert carry._ways.choose(pair, 100) == "tokens"
        carry._ways.learn(pair, Report("r", "tokens", "moved", "o", 1, "", [Phase("round", 0.0, 1000.0, 1, 4)]))
    move_one_off(world)
    ((pair, found),) = [(pair, found) for (pair, mode), found in carry._ways._sums.items() if mode == "kv"]
    assert found.tokens > 3 and found.nbytes > found.tokens and found.seconds > 0
    assert carry._ways.choose(pair, 100) == "kv", "1000 s a token is slower"


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
        result = cluster.result()
        assert result.answered == 5
        assert result.account.starts == account_of(cluster.log(), result.seconds).account.starts
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


@every
def test_a_listener_is_told_each_piece_once_and_the_report_at_the_end(opened: Open) -> None:
    world = opened(1, devices=1)
    stream, waiting = world.ask("a", 0, 60), world.ask("a", 1)
    heard, late, gone = [Heard() for _ in range(3)]
    end = stream.subscribe(gone)
    assert callable(stream.subscribe(heard)) and gone.calls == []
    world.until(lambda: len(gone.pieces) > 3)
    end()
    seen = len(gone.pieces)
    stream.subscribe(late)
    assert len(late.calls[0]) >= seen > 3, "what was delivered before is told at once"
    world.until(lambda: late.report is not None and heard.report is not None)
    pieces = list(stream)
    assert heard.pieces == late.pieces == pieces and gone.pieces == pieces[: len(gone.pieces)] and len(gone.pieces) < 60
    assert heard.report == late.report == stream.report and stream.report.outcome == "answered" and gone.report is None
    after = Heard()
    stream.subscribe(after)
    assert after.pieces == pieces and after.report == stream.report and len(after.calls) == 1
    cancelled = Heard()
    world.check(waiting, "a", 1)
    longer = world.ask("a", 2, 5000)
    longer.subscribe(cancelled)
    world.until(lambda: len(cancelled.pieces) > 3)
    longer.cancel()
    world.until(lambda: cancelled.report is not None)
    assert cancelled.report is not None and cancelled.report.outcome == "cancelled" and cancelled.pieces == list(longer)


@live
def test_a_listener_that_breaks_hurts_nobody_and_no_thread_is_made_for_one(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: broken.append(args.exc_value))
    world = opened(1, models=[replace_spec(SPEC, concurrency=8)])
    streams = [world.ask("a", number, 100) for number in range(4)]
    world.until(lambda: all(stream.report.output_tokens > 3 for stream in streams))
    threads, heard = threading.active_count(), [Heard() for _ in range(400)]

    def breaks(pieces: Sequence[Any], report: Any) -> None:
        raise RuntimeError("the loop is closed")

    for number, each in enumerate(heard):
        streams[number % 4].subscribe(breaks)
        streams[number % 4].subscribe(each)
    assert threading.active_count() <= threads + 1
    world.until(lambda: all(each.report is not None for each in heard))
    for number, each in enumerate(heard):
        assert each.pieces == list(streams[number % 4])
    assert len(broken) == 400, "each is called once and never again"


@every
def test_looking_changes_nothing(opened: Open) -> None:
    world = opened(1)
    stream = world.ask("a")
    world.check(stream, "a")
    world.cluster.nodes()  # asked of the thread that decides: it has told all by then
    before = list(world.cluster.log())
    for _ in range(20):
        stream.subscribe(Heard())
        assert stream.report.outcome == "answered" and world.cluster.metrics().outcomes["answered"] == 1
        assert world.cluster.result().answered == 1 and len(world.cluster.nodes()) == 1
    assert list(world.cluster.log())[len(before) :] == []


@every
def test_a_model_is_warmed_and_sent_away_for_no_request(opened: Open) -> None:
    world = opened(1, devices=1, models=[SPEC, replace_spec(SPEC, name="b")])
    for call in (world.cluster.prewarm, world.cluster.unload):
        with pytest.raises(RefusedError) as unknown:
            call("nobody")
        assert unknown.value.status == 404
    with pytest.raises(ValueError, match="COLD"):
        world.cluster.prewarm("a", Warmth.COLD)
    world.cluster.prewarm("a")
    world.until(lambda: world.warmths("a") == [Warmth.READY])
    world.cluster.prewarm("a")  # there is one
    stream = world.ask("a")
    world.check(stream, "a")
    assert stream.wait(SECONDS).rung == Warmth.READY
    world.cluster.prewarm("b")  # a is idle on the only device, and gives way
    world.until(lambda: world.warmths("b") == [Warmth.READY])
    assert world.warmths("a") == []
    world.cluster.unload("b")
    world.until(lambda: world.warmths() == [])
    world.cluster.prewarm("b", Warmth.DRAM)
    world.until(lambda: world.warmths("b") == [Warmth.DRAM])
    world.cluster.prewarm("b", Warmth.DRAM, keep_alive=0)  # there is one, and it stays no longer
    world.until(lambda: world.warmths() == [])
    assert world.cluster.metrics().starts[Warmth.COLD] == 3
    assert replay(world.cluster.log(), CONTROL.controller())
    world.cluster.delete("b")
    with pytest.raises(RefusedError):
        world.cluster.prewarm("b")


@every
def test_what_is_pinned_by_a_new_deployment_stays(opened: Open, tiny: Path) -> None:
    world = opened(1, devices=1, control=ControlOptions(keep_alive="scale-to-zero"))
    world.check(world.ask("a"), "a")
    world.until(lambda: world.warmths("a") == [])
    world.cluster.deploy(Deployment(replace_spec(SPEC, min_instances=1), str(tiny)))
    world.until(lambda: world.warmths("a") == [Warmth.READY])
    world.cluster.unload("a")
    stream = world.cluster.submit(Ask("a", [5, 6, 2], 20, stop_at_eos=False, keep_alive=0))
    world.check(stream, "a", 1)
    world.cluster.sleep(0.3)
    assert world.warmths("a") == [Warmth.READY] and stream.wait(SECONDS).rung == Warmth.READY
    world.cluster.deploy(Deployment(SPEC, str(tiny)))
    world.until(lambda: world.warmths("a") == [])


POLICIES = ["scale-to-zero", "fixed-10min", "forever", "buffered", "stem-cells", "hybrid-histogram", "greedy-dual", "rainbowcake"]


@every
@pytest.mark.parametrize("policy", ["scale-to-zero", "forever", "rainbowcake"])
def test_a_request_says_how_long_its_model_stays(opened: Open, policy: str) -> None:
    control = ControlOptions(keep_alive=policy)
    world = opened(1, devices=1, control=control)

    def ask(number: int, keep_alive: float | None) -> None:
        stream = world.cluster.submit(Ask("a", [5, 6, number + 1], 20, stop_at_eos=False, keep_alive=keep_alive))
        world.check(stream, "a", number)

    with pytest.raises(ValueError, match="keep_alive"):
        ask(0, nan)
    ask(0, -1)
    world.cluster.sleep(0.4)
    assert world.warmths("a") == [Warmth.READY]
    if isinstance(world.cluster, LiveCluster):
        world.cluster.restart_controller()
    ask(1, None)  # another that says nothing changes nothing
    world.cluster.sleep(0.4)
    assert world.warmths("a") == [Warmth.READY]
    ask(2, 0.6)
    assert world.warmths("a") == [Warmth.READY]
    world.until(lambda: world.warmths("a") == [])
    ask(3, inf)
    world.cluster.sleep(0.4)
    assert world.warmths("a") == [Warmth.READY]
    ask(4, 0)
    world.until(lambda: world.warmths("a") == [])
    assert replay(world.cluster.log(), control.controller())


@pytest.mark.parametrize("opened", ["simulated"], indirect=True)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_overridden(opened: Open, policy: str) -> None:
    control = ControlOptions(keep_alive=policy)
    world = opened(1, devices=2, control=control)
    for number, (keep_alive, seconds) in enumerate([(-1.0, 5000.0), (30.0, 29.0)]):
        world.check(world.cluster.submit(Ask("a", [5, 6, number + 1], 20, stop_at_eos=False, keep_alive=keep_alive)), "a", number)
        world.cluster.sleep(seconds)
        assert Warmth.READY in world.warmths("a")
    if policy not in ("buffered", "hybrid-histogram"):  # those warm another ahead of the next request
        world.cluster.sleep(1.1)
        assert Warmth.READY not in world.warmths("a")
    assert replay(world.cluster.log(), control.controller())


@live
def test_a_deleted_model_is_forgotten_by_every_store_after_its_last_word(opened: Open, tiny: Path) -> None:
    world = opened(2, models=[SPEC, replace_spec(SPEC, name="b")])
    given: list[tuple[str, str]] = []
    assert isinstance(world.cluster, LiveCluster)
    for handle in world.cluster._loop.carry.handles.values():
        give = handle.give
        handle.give = lambda order, payload=b"", give=give, name=handle.name: (given.append((name, order.model)) if isinstance(order, Forget) else None, give(order, payload))[1]  # type: ignore
    stream = world.ask("a", 0, 100)
    world.until(lambda: stream.report.output_tokens > 3)
    world.cluster.delete("a")
    assert given == []
    world.check(stream, "a", 0, 100)
    world.until(lambda: sorted(given) == [(node.name, "a") for node in world.nodes])
    world.until(lambda: all("a" not in node.cached for node in world.cluster.nodes()))
    if world.kind == "inprocess":
        stores = [handle.store for handle in world.cluster._loop.carry.handles.values()]  # type: ignore[attr-defined]
        world.until(lambda: all([each.name for each in store.models()] == ["b"] for store in stores))
    world.cluster.deploy(Deployment(SPEC, str(tiny)))
    world.check(world.ask("a", 1), "a", 1)


@pytest.mark.parametrize("opened", ["inprocess"], indirect=True)
def test_a_model_that_one_node_cannot_read_is_forgotten_by_the_others(opened: Open, tiny: Path) -> None:
    world = opened(2, models=[SPEC])
    assert isinstance(world.cluster, LiveCluster)
    able, unable = world.cluster._loop.carry.handles.values()
    assert isinstance(able, NodeAgent) and isinstance(unable, NodeAgent)
    give = unable.give
    unable.give = lambda order, payload=b"": unable.answer(OrderFailed(order.model, "StoreError", "no disk")) if isinstance(order, Register) else give(order, payload)  # type: ignore
    for _ in range(2):
        with pytest.raises(StoreError, match="no disk"):
            world.cluster.deploy(Deployment(replace_spec(SPEC, name="b"), str(tiny)))
        world.until(lambda: [each.name for each in able.store.models()] == ["a"])
    with pytest.raises(StoreError, match="no disk"):
        world.cluster.deploy(Deployment(SPEC, str(tiny)))
    world.check(world.ask("a", 1), "a", 1)  # it stays as it was


@pytest.mark.parametrize("opened", ["local"], indirect=True)
def test_weights_never_pass_the_controller(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0]
    made = Channel.__init__

    def counted(channel: Any, *given: Any, **named: Any) -> None:
        made(channel, *given, **named)
        channel.pace(sent=count, received=count)

    def count(nbytes: int) -> None:
        passed[0] += nbytes

    monkeypatch.setattr(Channel, "__init__", counted)  # of this process: all of the driver's, none of a node's
    world = opened(2, models=[replace_spec(SPEC, name=name) for name in "abc"])
    for number, name in enumerate("abcabc"):
        world.check(world.ask(name, number), name, number)
    moved = world.cluster.metrics().loaded_nbytes
    stored = [node.store for node in world.cluster.nodes() if node.store is not None]
    assert sum(moved.values()) >= 3 * SPEC.nbytes and sum(each.dram_used_nbytes for each in stored) > 20 * MIB
    assert 1000 < passed[0] < MIB


@every
def test_counters_and_stores_say_what_happened(opened: Open) -> None:
    world = opened(1, devices=1, models=[SPEC, replace_spec(SPEC, name="b")])
    for number, name in enumerate("aab"):
        world.check(world.ask(name, number), name, number)
    again, dropped = world.ask("a", 5, 300), world.ask("b", 5)
    world.until(lambda: again.report.output_tokens > 3)
    metrics = world.cluster.metrics()
    assert (metrics.waiting, metrics.running, metrics.turned_away) == (1, 1, 0)
    dropped.cancel()
    world.check(again, "a", 5, 300)
    metrics, result = world.cluster.metrics(), world.cluster.result()
    assert metrics.outcomes == {"answered": 4, "cancelled": 1, "refused": 0, "failed": 0}
    assert (metrics.waiting, metrics.running, metrics.output_tokens, metrics.input_tokens) == (0, 0, 360, 15)
    assert metrics.starts[Warmth.COLD] + metrics.starts[Warmth.PROCESS] + metrics.starts[Warmth.RUNTIME] >= 3 == sum(metrics.loads.values())
    assert metrics.loads == {Tier.REMOTE: 0, Tier.DISK: 2, Tier.DRAM: 1, Tier.DEVICE: 0}
    assert metrics.loaded_nbytes[Tier.DISK] == 2 * SPEC.nbytes and metrics.cold_requests[Warmth.READY] == 1
    assert sum(metrics.cold_requests.values()) == 4 == result.answered
    if world.kind != "simulated":
        world.until(lambda: (store := world.cluster.nodes()[0].store) is not None and store.dram_used_nbytes > 2 * SPEC.nbytes * 0.9)
        store = world.cluster.nodes()[0].store
        assert store is not None and store.dram_used_nbytes <= store.dram_budget_nbytes == 64 * MIB
        assert (store.shared_nbytes > MIB) == (world.kind != "inprocess")


@every
def test_the_accounting_that_goes_on_is_that_of_the_log(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    world = opened(2, devices=1, models=[SPEC, replace_spec(SPEC, name="b")], control=ControlOptions(keep_alive="rainbowcake"))
    for number, name in enumerate("abab"):
        world.check(world.ask(name, number), name, number)
        result = world.cluster.result()  # reading it in between changes nothing
        account = account_of(world.cluster.log(), result.seconds)
        if world.kind != "simulated":
            assert result.account == account.account and result.spans == account.spans
    if isinstance(world.cluster, LiveCluster):
        monkeypatch.setattr(world.cluster._keeper, "log", lambda: pytest.fail("the log is not read for it"))
        assert world.cluster.result().answered == world.cluster.metrics().outcomes["answered"] == 4


@every
def test_beyond_a_bounded_queue_none_is_taken(opened: Open) -> None:
    world = opened(1, devices=1, max_waiting=3)
    running = world.ask("a", 0, 60)
    world.until(lambda: running.report.output_tokens > 3)
    waiting = [world.ask("a", number) for number in (1, 2, 3)]
    for _ in range(2):
        with pytest.raises(RefusedError) as full:
            world.ask("a", 9)
        assert full.value.status == 503 and full.value.retry_after is not None and full.value.retry_after >= 1
    waiting[0].cancel()
    world.until(lambda: waiting[0].report.outcome == "cancelled")
    more = world.ask("a", 4)
    for number, stream in [(0, running), (2, waiting[1]), (3, waiting[2]), (4, more)]:
        world.check(stream, "a", number, 60 if number == 0 else 20)
    assert world.cluster.metrics().outcomes["answered"] == 4


@live
def test_a_thousand_at_once_and_a_storm_of_cancels(opened: Open) -> None:
    world = opened(2, devices=2, models=[replace_spec(SPEC, concurrency=32)], node=replace(OPTIONS.node, pace_seconds=0.001))
    heard = [Heard() for _ in range(1000)]

    def submit(first: int) -> None:
        for number in range(first, first + 100):
            world.ask("a", number, 4).subscribe(heard[number])

    threads = [threading.Thread(target=submit, args=(first,)) for first in range(0, 1000, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    streams = [world.cluster.stream(f"a-{number}-4") for number in range(1000)]
    for stream in streams[::2]:
        stream.cancel()
    assert world.cluster.wait(lambda _: all(each.report is not None for each in heard), 60)
    metrics = world.cluster.metrics()
    assert (metrics.waiting, metrics.running) == (0, 0) and sum(metrics.outcomes.values()) == 1000
    assert metrics.outcomes["answered"] >= 500 and set(metrics.outcomes) - {"answered", "cancelled"} == {"refused", "failed"}
    assert metrics.outcomes["answered"] + metrics.outcomes["cancelled"] == 1000
    for number in range(1, 1000, 2):
        ids, _, _ = whole_text(Session("x", "x", (5, 6, number + 1), 3, 4, stop_at_eos=False))
        assert tuple(piece.token_id for piece in heard[number].pieces) == ids
    world.check(world.ask("a", 1), "a", 1)
    assert replay(world.cluster.log(), CONTROL.controller())


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[Sequence[LedgerPiece]] = []
        self.report: RequestReport | None = None

    def __call__(self, pieces: Sequence[LedgerPiece], report: RequestReport | None) -> None:
        assert self.report is None, "nothing comes after the end"
        self.calls.append(pieces)
        self.report = report

    @property
    def pieces(self) -> list[LedgerPiece]:
        return [piece for pieces in self.calls for piece in pieces]


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
