"""The router of a live cluster and what it stands on: who owns a request, what is told of it, and what is written down. Chapter 08."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_engine import whole_text
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import is_gone
from scripted_node import ScriptedNode

from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.api import Ask, Deployment, RefusedError
from sllm_mini.cluster.journal import Journal, read_journal, repair
from sllm_mini.cluster.live.carry import Carry
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.nodes.messages import Run
from sllm_mini.cluster.nodes.threads import ThreadLauncher
from sllm_mini.cluster.router import Place, Router
from sllm_mini.cluster.simulated import SimulationOptions, even_cluster, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.messages import SpecError
from sllm_mini.errors import FormatError, ModelError, SllmError
from sllm_mini.inference.ownership import EpochRegister, TokenLedger
from sllm_mini.inference.ownership.ledger import MAX_RESTARTS
from sllm_mini.inference.ownership.messages import Token
from sllm_mini.inference.session import Session
from sllm_mini.types import Tier, Warmth

GB = 10**9


def story(name: str, tokens: int = 30) -> Session:
    return Session(name, "fake", (7, 8, 9), 3, tokens, stop_at_eos=False)


def token(name: str, epoch: int, position: int, finish: Any = None) -> Token:
    return Token(name, epoch, position, position, "x", finish, -0.5)


def place(instance: int, epoch: int = 1) -> Place:
    return Place(instance, f"node/{instance}.{epoch}", 0.0, Warmth.COLD, None, 0.0)


# --- the ledger's news --------------------------------------------------------------------------------------------------


def test_the_end_of_a_request_is_told_once_and_with_no_lock_held() -> None:
    register, ended = EpochRegister(), list[str]()
    ledger = TokenLedger(register, on_end=lambda name: ended.append(f"{name} {ledger.finish(name)} {ledger.error(name)}"))
    for name in ("said", "cancelled", "failed", "given up"):
        ledger.open(story(name))
        register.claim(name, "one", 0)
    ledger.deliver([token("said", 1, 3), token("said", 1, 4, "length"), token("said", 1, 4, "length")])
    ledger.end("cancelled")
    ledger.end("cancelled")
    ledger.fail("failed", "no room")
    ledger.end("failed")
    assert ledger.give_up("given up", 1, "why") and ledger.give_up("given up", 1, "again")
    assert ended == ["said length None", "cancelled cancelled None", "failed None no room", "given up None why"]
    assert ledger.pieces("said")[0].logprob == -0.5


def test_what_a_reader_sees_was_written_before() -> None:
    seen: list[object] = []

    class Paper:
        def taken(self, tokens: Any) -> None:
            seen.append([(each.position, len(ledger_pieces())) for each in tokens])

        def ended(self, name: str, finish: Any, error: str | None) -> None:
            seen.append((name, finish, error))

    register = EpochRegister()
    ledger = TokenLedger(register, journal=Paper())
    read: list[int] = []
    ledger.open(story("a"))
    reader = threading.Thread(target=lambda: read.extend(piece.position for piece in ledger.stream("a")))
    reader.start()

    def ledger_pieces() -> list[int]:
        return list(read)

    register.claim("a", "one", 0)
    ledger.deliver([token("a", 1, 3), token("a", 1, 3), token("a", 0, 4), token("a", 1, 4)])
    ledger.end("a")
    reader.join(10)
    assert seen == [[(3, 0), (4, 0)], ("a", "cancelled", None)] and read == [3, 4]


@pytest.mark.parametrize("most", [MAX_RESTARTS, 5])
def test_only_who_may_have_killed_its_worker_is_given_up_on(most: int) -> None:
    register = EpochRegister()
    ledger = TokenLedger(register, max_restarts=most)
    ledger.open(story("a"))
    for epoch in range(10):
        assert ledger.restart("a", "next", epoch, blame=False) is not None
    for epoch in range(10, 10 + most):
        assert ledger.restart("a", "next", epoch) is not None
    assert ledger.restart("a", "next", 10 + most) is None and "gave no token" in (ledger.error("a") or "")


# --- the journal --------------------------------------------------------------------------------------------------------


def written(path: Path) -> list[tuple[str, list[int], Any, Any]]:
    return [(past.opened.request_id, [piece.position for piece in past.pieces], past.finish, past.error) for past in read_journal(path)]


def test_a_journal_cut_off_anywhere_has_what_was_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole", lambda: 1.5)
    states, sizes = [written(journal.path)], [0]
    steps: list[Callable[[], None]] = [
        lambda: journal.opened(0, "a", "model", "", 0.5, story("a").to_bytes()),
        lambda: journal.taken([token("a", 1, 3)]),
        lambda: journal.opened(1, "b", "model", "p", 0.7, story("b").to_bytes()),
        lambda: journal.taken([token("b", 1, 3), token("a", 1, 4)]),
        lambda: journal.ended("b", "cancelled", None),
        lambda: journal.taken([token("a", 2, 5, "length")]),
    ]
    for step in steps:
        step()
        states.append(written(journal.path))
        sizes.append(journal.nbytes)
    journal.close()
    assert states[-1] == [("a", [3, 4, 5], "length", None), ("b", [3], "cancelled", None)]
    data, cut = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for end in range(len(data) + 1):
        cut.write_bytes(data[:end])
        known = max(place for place, size in enumerate(sizes) if size <= end)
        assert written(cut) == states[known], end
        repair(cut)
        assert cut.stat().st_size == sizes[known]
    cut.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert written(cut) == states[-2]
    cut.write_bytes(data[sizes[1] :])
    with pytest.raises(FormatError, match="never opened"):
        read_journal(cut)


def test_a_journal_forgets_what_is_over_and_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", lambda: 2.0)
    for number, name in enumerate("ab"):
        journal.opened(number, name, "model", "", 0.0, story(name).to_bytes())
        journal.taken([token(name, 1, 3)])
    journal.ended("a", None, "lost")
    before = journal.nbytes
    journal.compact()
    assert 0 < journal.nbytes < before and journal.nbytes == journal.path.stat().st_size
    journal.taken([token("b", 1, 4, "eos")])
    assert written(journal.path) == [("b", [3, 4], "eos", None)]
    journal.close()
    journal.ended("b", "stop", None)
    assert written(journal.path) == [("b", [3, 4], "eos", None)]


def test_a_full_disk_is_said_and_not_written_over() -> None:
    journal = Journal(Path("/dev/full"), lambda: 0.0)
    journal.taken([token("a", 1, 3)])
    assert "No space" in journal.error and journal.nbytes == 0
    journal.close()


# --- the router ---------------------------------------------------------------------------------------------------------


@contextmanager
def routing(folder: Path) -> Iterator[tuple[Router, list[int]]]:
    ended: list[int] = []
    clock = iter(range(1 << 30))
    router = Router(str(folder / f"arbiter-{len(list(folder.iterdir()))}"), now=lambda: float(next(clock)), opened=0.0, on_end=ended.append)
    try:
        yield router, ended
    finally:
        router.close("503: it is over")


def test_who_comes_while_all_fail_is_failed_too_or_refused(tmp_path: Path) -> None:
    with routing(tmp_path) as (router, ended):
        failing = threading.Thread(target=router.fail_all, args=("503: the cluster was closed",))

        class Paper:
            def opened(self, *_of: object) -> None:
                failing.start()
                failing.join(0.2)  # it is in the middle of being taken

        router._journal = Paper()  # type: ignore[assignment]
        router.open(story("a"), "m", "")
        failing.join(10)
        assert not failing.is_alive() and router.wait("a", 5).outcome == "refused" and ended == [0]
        with pytest.raises(RefusedError, match="the cluster was closed") as refused:
            router.open(story("b"), "m", "")
        assert refused.value.status == 503


class Known:
    """What a controller would hold of one request: where it is, by its events and its actions alone."""

    def __init__(self, router: Router, number: int) -> None:
        self.router, self.number = router, number
        self.epoch, self.instance, self.target, self.over = 0, -1, -1, 0

    def told(self, events: list[m.AnyEvent]) -> None:
        for event in events:
            if self.over:
                continue  # it knows no such request any more
            if isinstance(event, m.RequestCancelled):
                self.over += 1
            elif isinstance(event, m.RequestFinished):
                assert event.epoch == self.epoch, "it would be ignored, and the request hang"
                assert self.instance >= 0, "of one that is queued this is ignored"
                self.over += 1
            elif isinstance(event, m.MigrationFinished):
                assert event.epoch == self.epoch
                self.instance, self.target = self.target, -1
            elif isinstance(event, m.MigrationFailed):
                assert event.epoch == self.epoch
                self.target = -1
            elif isinstance(event, m.RequestFailed):
                assert event.epoch == self.epoch
                self.instance = self.target = -1
                self.epoch += 1

    def lost(self, instance: int) -> None:
        """Its instance, or the one it moves to, is gone; what was told before says which."""
        if self.instance == instance:
            self.instance = self.target = -1
            self.epoch += 1


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["assign", "say", "finish", "lose source", "lose target", "migrate", "hand over", "moved", "preempt", "cancel", "hear", "fail"]), max_size=40))
def test_whatever_happens_a_request_has_one_owner_and_ends_once(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    with routing(tmp_path_factory.mktemp("router")) as (router, ended):
        arrived = router.open(story("a", 1000), "model", "")
        known, heard, fresh = Known(router, arrived.request), 0, iter(range(1000))
        homes: dict[int, Place] = {}
        lost: list[str] = []
        said = 3
        for step in steps:
            owner, epoch = router.register.owner("a")
            speaks = not known.over and known.instance >= 0 and owner == homes[known.instance].owner
            if step == "assign" and not known.over and known.instance < 0:
                where = place(next(fresh))
                homes[where.instance] = where
                known.epoch += 1
                known.instance = where.instance
                if router.assign(known.number, where, known.epoch) is None:
                    assert not router.is_open(known.number)
                    known.told(router.over(known.number)[0])
            elif step == "say":
                verdict = router.ledger.accept(token("a", epoch, said))
                said += verdict == "taken"
            elif step == "finish" and owner is not None and owner != "router":
                said += router.ledger.accept(token("a", epoch, said, "length")) == "taken"
            elif step == "migrate" and known.instance >= 0 and known.target < 0 and not known.over:
                where = place(next(fresh))
                homes[where.instance] = where
                known.epoch += 1
                known.target = where.instance
                router.moving(known.number, where, known.epoch)
            elif step == "hand over" and known.target >= 0 and speaks:
                router.register.claim("a", homes[known.target].owner, epoch)
            elif step == "moved" and known.target >= 0 and not known.over:
                known.told(router.moved(known.number, known.epoch, "stayed", 0.1))
            elif step in ("lose source", "lose target"):
                instance = known.instance if step == "lose source" else known.target
                if instance >= 0 and not known.over:
                    known.told(router.settle(homes[instance].owner))
                    lost.append(homes[instance].owner)
                    known.lost(instance)
                    late = router.ledger.accept(token("a", epoch, said))
                    said += late == "taken"
                    assert late != "taken" or owner != homes[instance].owner, "the dead speak"
            elif step == "preempt" and known.instance >= 0 and not known.over:
                known.epoch += 1
                known.instance = known.target = -1
                router.take_back(known.number, known.epoch)
            elif step == "fail" and known.instance >= 0 and not known.over:
                known.told(router.failed(known.number, epoch, "why"))
            elif step == "cancel":
                router.cancel("a")
            elif step == "hear" and heard < len(ended):
                heard += 1
                known.told(router.over(known.number)[0])
            for dead in lost:
                assert router.register.claim("a", dead, router.register.owner("a").epoch) is None, "on its way when its process was killed"
            if not known.over and known.instance < 0:
                assert router.register.owner("a").owner in ("router", None), "nobody speaks for one that waits"
        for _ in ended[heard:]:
            known.told(router.over(known.number)[0])
        assert len(ended) == known.over == (0 if router.is_open(known.number) else 1)
        pieces = router.pieces("a")
        assert [piece.position for piece in pieces] == list(range(3, said))
        if known.over:
            report = router.report("a")
            assert report.outcome is not None and report.output_tokens == len(pieces) and len(router.rows.packed) == 104


def test_what_is_over_is_forgotten_after_a_while(tmp_path: Path) -> None:
    with routing(tmp_path) as (router, _):
        number = router.open(story("a"), "model", "").request
        router.cancel("a")
        router.over(number)
        assert router.report("a").outcome == "cancelled"
        router.forget(-1.0)
        assert router.wait("a", 0).outcome == "cancelled"
        router.forget(math.inf)
        for asked in (router.report, router.ledger.pieces):
            with pytest.raises(ModelError):
                asked("a")
        assert router.over(number) == ([], None)
        assert router.open(story("a"), "model", "").request == number + 1


# --- accounts of a log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", ["fixed-10min", "rainbowcake", "scale-to-zero"])
def test_a_simulated_log_comes_to_the_simulators_own_account(keep_alive: str) -> None:
    chance, now, trace, lines = Random(1), 0.0, list[TraceRequest](), list[bytes]()
    models = [
        m.ModelSpec(
            name=f"m{number}", nbytes=10 * GB, process_nbytes=GB // 4, runtime_nbytes=GB, process_seconds=0.1, runtime_seconds=2, ready_seconds=0.3,
            prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.02, concurrency=2,
        )
        for number in range(6)
    ]  # fmt: skip
    for _ in range(500):
        now += chance.expovariate(0.5)
        trace.append(TraceRequest(now, chance.choice(models).name, 100, chance.randrange(10, 400)))
    nodes = even_cluster(2, devices=2, dram_nbytes=60 * GB)
    events: list[tuple[float, m.AnyEvent]] = [(100.0, m.NodeLost("node-0001")), (160.0, m.NodeJoined(nodes[1])), (300.0, m.RequestCancelled(140))]
    result = simulate(trace, nodes, models, keep_alive=keep_alive, events=events, log=lines.append, options=SimulationOptions(store_dram_nbytes=30 * GB))
    found = account_of(lines, result.seconds)
    ours, theirs = found.account, result.account
    for name in ("gpu_seconds", "byte_seconds", "free_gpu_seconds", "total_gpu_seconds", "unused_climb_gpu_seconds", "unused_climb_byte_seconds", "moved_seconds"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert (ours.starts, ours.migrations, ours.failed_migrations) == (theirs.starts, theirs.migrations, theirs.failed_migrations)
    assert found.cold == result.requests.cold and sum(theirs.starts) > 20
    runs = [span for span in result.spans if span.what == "run"]
    assert sorted((span.request, span.start, span.end) for span in found.spans if span.what == "run") == sorted((span.request, span.start, span.end) for span in runs)


# --- the driver ---------------------------------------------------------------------------------------------------------

CONTROL = ControlOptions()
SPEC = m.ModelSpec(name="a", nbytes=10**7)
QUICK = LiveOptions(node=NodeOptions(engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=3.0))


@contextmanager
def scripted(folder: Path, *, control: ControlOptions = CONTROL, options: LiveOptions = QUICK, **script: Any) -> Iterator[tuple[LiveCluster, dict[str, ScriptedNode]]]:
    made: dict[str, ScriptedNode] = {}

    def make(spec: m.NodeSpec, incarnation: int) -> ScriptedNode:
        made[spec.name] = ScriptedNode(spec, incarnation, ThreadLauncher(engine="fake_engine:make"), **script)
        return made[spec.name]

    with LiveCluster(make, control, folder, options) as cluster:
        for spec in even_cluster(2, devices=1):
            cluster.add_node(spec)
        yield cluster, made


def check(cluster: LiveCluster, name: str, tokens: int = 20) -> None:
    stream = cluster.stream(name)
    assert tuple(piece.token_id for piece in stream) == whole_text(Session("x", "x", (5, 6), 2, tokens, stop_at_eos=False))[0]


def ask(name: str, model: str = "a", tokens: int = 20) -> Ask:
    return Ask(model, [5, 6], tokens, stop_at_eos=False, request_id=name)


def test_a_model_that_does_not_start_is_refused_with_the_reason(tmp_path: Path) -> None:
    control = ControlOptions(max_failures=2, retry_seconds=0.05)
    with scripted(tmp_path, control=control, broken=frozenset({"b"})) as (cluster, _):
        for name in "ab":
            cluster.deploy(Deployment(m.ModelSpec(name=name, nbytes=10**7), "anywhere"))
        stream = cluster.submit(ask("x", "b"))
        with pytest.raises(RefusedError, match="it is broken") as refused:
            list(stream)
        assert refused.value.status == 503 and stream.wait(5).outcome == "refused"
        cluster.submit(ask("y"))
        check(cluster, "y")


def test_a_worker_that_dies_is_replaced_and_its_late_words_count_for_nothing(tmp_path: Path) -> None:
    with scripted(tmp_path) as (cluster, nodes):
        cluster.deploy(Deployment(SPEC, "anywhere"))
        stream = cluster.submit(ask("x", tokens=100))
        assert cluster.wait(lambda _: stream.report.output_tokens > 3, 10)
        (lane,) = [lane for node in nodes.values() for lane in node._lanes.values()]
        owner = cluster._router.register.owner("x")
        assert lane.worker is not None
        lane.worker.kill()
        assert cluster.wait(lambda _: stream.report.restarts == 1, 10)
        assert cluster._router.ledger.accept(Token("x", owner.epoch, 2 + stream.report.output_tokens, 1, "?")) == "stale"
        check(cluster, "x", 100)


def test_what_is_decided_about_an_instance_while_its_loss_is_told_goes_nowhere(tmp_path: Path) -> None:
    with routing(tmp_path) as (router, _):
        given: list[object] = []

        class Handle:
            name, incarnation = "n", 1

            def give(self, order: object, payload: bytes = b"") -> None:
                given.append(order)

        carry = Carry(router, LiveOptions(), "run", lambda: 0.0, lambda _timer, _at: None, lambda _model: 1)
        handle: Any = Handle()
        carry.handles["n"] = handle
        first, second = (router.open(story(name), "model", "").request for name in "ab")
        start = m.Start(0, "n", "model", Warmth.COLD, Warmth.READY, Tier.DISK, (0,), 1)
        carry.do(start)
        carry.do(m.Assign(first, 0, 1))
        assert len(given) == 2 and router.register.owner("a").owner == "run/n.1/0.1"
        told = carry.gone(handle)
        assert [type(event) for event in told] == [m.RequestProgressed, m.NodeLost]
        assert carry.do(m.Assign(second, 0, 1)) == [] and router.register.owner("b").owner is None
        carry.do(m.Start(1, "n", "model", Warmth.COLD, Warmth.READY, Tier.DISK, (1,), 1))
        assert not carry.placed and carry.gone(handle) == []
        carry.handles["n"] = handle
        carry.do(m.Start(2, "n", "model", Warmth.COLD, Warmth.READY, Tier.DISK, (0,), 1))
        for number, name in ((first, "a"), (second, "b")):
            carry.do(m.Assign(number, 2, 2))
            assert router.register.owner(name).owner == "run/n.1/2.1"
        third = router.open(story("c"), "model", "").request
        router.cancel("c")
        given.clear()
        assert carry.do(m.Assign(third, 2, 7)) == [m.RequestCancelled(third)] and not any(isinstance(order, Run) for order in given), "its end is told again, with this decision"


def test_an_answer_of_an_earlier_incarnation_or_decision_is_not_heard(tmp_path: Path) -> None:
    from sllm_mini.cluster.nodes import messages as node

    with scripted(tmp_path, climb_seconds=0.2) as (cluster, nodes):
        cluster.deploy(Deployment(SPEC, "anywhere"))
        cluster.submit(ask("x"))
        assert cluster.wait(lambda _: any(isinstance(order, node.Climb) for each in nodes.values() for order in each.orders), 10)
        home = next(each for each in nodes.values() if any(isinstance(order, node.Climb) for order in each.orders))
        climb = next(order for order in home.orders if isinstance(order, node.Climb))
        home.answer(node.Reached(climb.instance, climb.epoch + 1, climb.tier, 0.0, 0.0, []))
        cluster.kill_node(home.name)
        home._on_answer(node.Reached(climb.instance, climb.epoch, climb.tier, 0.0, 0.0, []), b"")
        home._on_answer(node.Stored("a", climb.tier, True), b"")
        check(cluster, "x")
        kinds = cluster.result().events
        assert kinds["InstanceReached"] == 1 and kinds["NodeLost"] == 1
        cluster.add_node(home.spec)
        with pytest.raises(SllmError, match="is alive"):
            cluster.add_node(home.spec)


def test_an_error_where_it_decides_ends_the_cluster_and_says_so(tmp_path: Path) -> None:
    control = ControlOptions(placement="hydraserve")
    with scripted(tmp_path, control=control) as (cluster, nodes):
        cluster.deploy(Deployment(m.ModelSpec(name="a", nbytes=10**11), "anywhere"))
        cluster._loop.post(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        assert not cluster.wait(lambda _: False, 0.2) and all(node.gone.is_set() for node in nodes.values())
        for asked in (cluster.nodes, cluster.result, lambda: cluster.submit(ask("x")), lambda: cluster.delete("a")):
            with pytest.raises(SllmError, match="division"):
                asked()


def test_options_that_cannot_be_are_refused() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: NodeOptions(silent_seconds=0.3, beat_seconds=0.2), "three beats"),
        (lambda: NodeOptions(eviction="none"), "none"),
        (lambda: NodeOptions(launcher="docker"), "docker"),  # type: ignore[arg-type]
        (lambda: NodeOptions(launcher="spawn", zygote="/tmp/one"), "forked"),
        (lambda: NodeOptions(threads=0), "threads"),
        (lambda: LiveOptions(snapshot_seconds=0), "snapshot_seconds"),
        (lambda: LiveOptions(move_mode="fast"), "move_mode"),  # type: ignore[arg-type]
        (lambda: ControlOptions(placement="nobody").controller(), "nobody"),
    ]
    for make, match in wrong:
        with pytest.raises(SllmError, match=match) as error:
            make()
        assert isinstance(error.value, SpecError) or match == "nobody"


# --- what dies, and what hangs ------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LiveCluster]:
    from sllm_mini.checkpoint import convert_checkpoint
    from sllm_mini.resources import resource

    convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny")
    with LiveCluster.open("local", even_cluster(2, devices=1), ControlOptions(), tmp_path / "cluster", QUICK) as cluster:
        cluster.deploy(Deployment(SPEC, str(tmp_path / "tiny")))
        yield cluster


@pytest.mark.parametrize("signalled", [signal.SIGKILL, signal.SIGSTOP])
def test_an_agent_that_dies_or_hangs_is_noticed_and_its_requests_go_on(local: LiveCluster, signalled: signal.Signals) -> None:
    streams = [local.submit(ask(name, tokens=1500)) for name in "xy"]
    assert local.wait(lambda _: all(stream.report.output_tokens > 3 for stream in streams), 20)
    victim = local._loop.carry.handles["node-0000"]
    pid: int = victim._process.pid  # type: ignore[attr-defined]
    os.kill(pid, signalled)
    began = local.now
    assert local.wait(lambda _: not local.nodes()[0].alive, 10)
    assert local.now - began < 6, "the test settings promise 4 s on a quiet machine"
    for stream in streams:
        check(local, stream.request_id, 1500)
    assert sorted(stream.wait(20).restarts for stream in streams) == [0, 1] and is_gone(pid)


def test_no_process_or_descriptor_is_left(tmp_path: Path) -> None:
    def left() -> tuple[int, set[str]]:
        return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}

    before, threads = left()
    with LiveCluster.open("local", even_cluster(2, devices=1), ControlOptions(), tmp_path, QUICK) as cluster:
        pids = [handle._process.pid for handle in cluster._loop.carry.handles.values()]  # type: ignore[attr-defined]
        cluster.kill_node("node-0001")
    after, more = left()
    assert all(map(is_gone, pids)) and after <= before and {name for name in more - threads if name.startswith("sllm")} == set()
