"""Chapter 08: a node's agent, called in process with launchers and workers that do what they should not, and in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from processes import PATIENCE, is_gone, on_the_path
from range_server import RangeServer

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.block_messages import Part, Step
from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import lanes, remote
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.program import Agent, connected_node, local_node
from sllm_mini.cluster.nodes.remote import RemoteNode
from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.errors import StoreError
from sllm_mini.inference.workers.process import start_process
from sllm_mini.inference.workers.worker import MAX_SESSION_NBYTES
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth
from sllm_mini.wire import Channel, ChannelClosed, set_key, tcp

SECONDS = 20.0
MIB = 1 << 20
OPTIONS = NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make")
Begin = Callable[[Agent], RemoteNode]
COLD, PROCESS, RUNTIME, DRAM, DEVICE, READY = Warmth


class Heard:
    """What a node says. `wait` gives the first answer of a kind that was not given before."""

    def __init__(self) -> None:
        self.answers: list[node.NodeAnswer] = []
        self.why: str | None = None
        self._changed = threading.Condition()

    def answer(self, answer: node.NodeAnswer, _payload: bytes) -> None:
        with self._changed:
            self.answers.append(answer)
            self._changed.notify_all()

    def gone(self, why: str) -> None:
        with self._changed:
            self.why = why
            self._changed.notify_all()

    def wait(self, kind: type[Any], seconds: float = SECONDS) -> Any:
        def found() -> Any:
            return next((each for each in self.answers if isinstance(each, kind)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, seconds), (kind, self.answers, self.why)
            answer = found()
            self.answers.remove(answer)
            return answer

    def end(self) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: self.why is not None, SECONDS), self.answers
            assert self.why is not None
            return self.why


class Worker:
    """Climbs and falls in no time, and says so in `log`; from `broken` on it raises what nobody expects."""

    pid = 1
    launched = Rung(PROCESS, 0.0, 0, 0)

    def __init__(self, name: str = "", log: list[str] | None = None, broken: Warmth | None = None) -> None:
        self.name, self.log, self._broken = name.rpartition("-")[2], [] if log is None else log, broken
        self.gone = False
        self.killed = threading.Event()

    def climb(self, order: Any) -> Rung:
        if order.warmth is self._broken:
            raise ValueError("no such shape")
        self.log.append(f"{self.name} at {order.warmth.name}")
        return Rung(order.warmth, 0.0, 0, 0)

    def kill(self) -> None:
        self.gone = True
        self.killed.set()

    def close(self) -> None:
        self.gone = True
        self.log.append(f"{self.name} closed")

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


class Launches:
    """Makes workers; `make` may raise."""

    def __init__(self, make: Callable[[str], Worker]) -> None:
        self._make = make

    def launch(self, name: str, on_death: Callable[[str], None], *, measure: bool = True) -> Worker:
        return self._make(name)

    def prepare(self, source: str) -> None:
        pass

    def shared_nbytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("models") / "tiny").path


@contextmanager
def agent_of(folder: Path, make: Callable[[str], Worker], options: NodeOptions = OPTIONS, incarnation: int = 1) -> Iterator[tuple[NodeAgent, Heard]]:
    agent, heard = NodeAgent("n", incarnation, lambda _store: Launches(make), options, folder), Heard()  # type: ignore[arg-type, return-value]
    try:
        agent.open(heard.answer, heard.gone)
        agent.give(node.Join("n", incarnation, "run", str(folder / "arbiter")))
        yield agent, heard
    finally:
        agent.close()


def climb(instance: int, model: str = "tiny", *, device: int = 0, epoch: int = 1, warmth: Warmth = COLD, target: Warmth = READY) -> node.Climb:
    return node.Climb(instance, epoch, model, warmth, target, Tier.DISK, [device] if target >= DEVICE else [])


def register(agent: NodeAgent, heard: Heard, source: object, *models: str) -> list[Tier]:
    for model in models:
        agent.give(node.Register(model, str(source)))
    return [heard.wait(node.Registered).tier for _ in models]


# Called


def no_launch(_name: str) -> Worker:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("worker", [None, Worker(broken=READY)], ids=["the launcher", "the worker"])
def test_whatever_goes_wrong_in_a_climb_the_instance_is_lost_with_the_reason(worker: Worker | None, tmp_path: Path, tiny: Path) -> None:
    with agent_of(tmp_path, no_launch if worker is None else lambda _name: worker) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        agent.give(climb(7))
        answer = heard.wait(node.Lost)
        assert (answer.instance, answer.epoch) == (7, 1) and ("can't start new thread" in answer.reason or "no such shape" in answer.reason)
        assert worker is None or worker.killed.wait(SECONDS)


def test_a_climb_waits_for_the_fall_that_frees_its_device(tmp_path: Path, tiny: Path) -> None:
    log: list[str] = []
    with agent_of(tmp_path, lambda name: Worker(name, log)) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        agent.give(climb(1))
        heard.wait(node.Reached)
        agent.give(climb(2))
        agent.give(climb(3, device=1))
        assert heard.wait(node.Reached).instance == 3, "another device is free"
        assert not any(line.startswith("2") for line in log)
        agent.give(node.Fall(1, 2, DRAM))
        assert heard.wait(node.Reached).instance == 2
        agent.give(climb(1, epoch=3, warmth=DRAM))  # its device is another's now
        agent.give(climb(4, target=DRAM))  # needs none
        assert heard.wait(node.Reached).instance == 4
        agent.give(node.Fall(2, 2, COLD))
        assert heard.wait(node.Reached).instance == 1
        assert log.index("2 closed") < len(log) - 1 - log[::-1].index("1 at READY") and log.count("1 at READY") == 2


def test_loads_take_their_turns_as_they_came_and_what_lies_in_memory_takes_none(tmp_path: Path, tiny: Path) -> None:
    models = ["one", "two", "three"]
    with agent_of(tmp_path, Worker) as (agent, heard):
        assert set(register(agent, heard, tiny, "tiny", *models)) == {Tier.DISK}
        agent.give(climb(0))
        assert heard.wait(node.Reached).tier is Tier.DISK
        with agent.loads:
            for number, model in enumerate(models, 1):
                agent.give(climb(number, model, device=number))
                until(lambda number=number: len(agent.loads._waiting) == number)  # type: ignore[misc]
            agent.give(climb(9, device=9))
            first = heard.wait(node.Reached)
            assert (first.instance, first.tier, first.queued_seconds < 0.1) == (9, Tier.DRAM, True)
        reached = [heard.wait(node.Reached) for _ in models]
        assert [each.instance for each in reached] == [1, 2, 3] and {each.tier for each in reached} == {Tier.DISK}
        assert reached[0].queued_seconds > 0 and all(each.load_seconds > 0 for each in reached)


def test_a_climb_that_is_ordered_twice_is_carried_out_once(tmp_path: Path, tiny: Path) -> None:
    log: list[str] = []
    with agent_of(tmp_path, lambda name: Worker(name, log)) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        for order in (climb(1, target=DRAM), climb(1, target=DRAM), climb(1, epoch=0), climb(1, epoch=2, warmth=DRAM)):
            agent.give(order)
        assert [heard.wait(node.Reached).epoch for _ in range(2)] == [1, 2]
        assert log == ["1 at RUNTIME", "1 at DRAM", "1 at DEVICE", "1 at READY"]
        agent.give(node.Fall(1, 2, COLD))  # of the same decision: what a driver says of an instance that it has heard is lost
        until(lambda: log[-1] == "1 closed")
    assert not [each for each in heard.answers if isinstance(each, node.Reached | node.Lost)]


def test_a_deleted_model_is_dropped_once_nobody_uses_it(tmp_path: Path, tiny: Path) -> None:
    with agent_of(tmp_path, Worker) as (agent, heard):
        register(agent, heard, tiny, "tiny", "other")
        agent.give(climb(1))
        heard.wait(node.Reached)
        agent.give(node.Forget("tiny"))
        agent.give(node.Forget("unknown"))
        agent.give(node.Forget("other"))
        until(lambda: [each.name for each in agent.store.models()] == ["tiny"])
        assert agent.tier("tiny") is Tier.DRAM, "it is lent"
        agent.give(node.Fall(1, 2, COLD))
        until(lambda: not agent.store.models())
        with pytest.raises(StoreError, match="no model is registered as 'tiny' on n"):
            agent.tier("tiny")
        register(agent, heard, tiny, "tiny")
        agent.give(climb(2, epoch=3))
        assert heard.wait(node.Reached).instance == 2, "deployed again"


def test_a_node_that_returns_has_what_its_store_had_on_disk(tmp_path: Path, tiny: Path) -> None:
    options = NodeOptions(store_dram_nbytes=64 * MIB, store_disk_nbytes=64 * MIB)
    with RangeServer(tiny) as server:
        with agent_of(tmp_path, Worker, options) as (agent, heard):
            assert register(agent, heard, server.url, "tiny") == [Tier.REMOTE]
            agent.give(climb(1))
            assert heard.wait(node.Reached).tier is Tier.REMOTE
            until(lambda: any(isinstance(each, node.Stored) and each.tier is Tier.DISK for each in heard.answers))
            (tmp_path / "moves-1.1").touch()
        with agent_of(tmp_path, Worker, options, incarnation=2) as (agent, heard):
            assert not list(tmp_path.glob("moves-*"))
            assert register(agent, heard, server.url, "tiny") == [Tier.DISK]
            agent.give(climb(2))
            assert heard.wait(node.Reached).tier is Tier.DISK


def test_a_store_is_waited_for_that_a_nodes_old_self_is_still_giving_back(tmp_path: Path, tiny: Path) -> None:
    old = NodeAgent("n", 1, lambda _store: Launches(Worker), OPTIONS, tmp_path)  # type: ignore[arg-type, return-value]
    ending = threading.Timer(0.5, old.close)
    ending.start()
    with agent_of(tmp_path, Worker, incarnation=2) as (agent, heard):
        assert register(agent, heard, tiny, "tiny") == [Tier.DISK]
    ending.join()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 4 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_with_a_full_disk_a_model_is_loaded_past_the_cache(small_disk: Path, tiny: Path) -> None:
    options = NodeOptions(store_dram_nbytes=64 * MIB, store_disk_nbytes=64 * MIB)
    with RangeServer(tiny) as server, agent_of(small_disk, Worker, options) as (agent, heard):
        register(agent, heard, server.url, "one", "two")
        for instance, model in enumerate(("one", "two")):
            agent.give(climb(instance, model, device=instance))
            assert heard.wait(node.Reached).tier is Tier.REMOTE
        assert not [each for each in heard.answers if isinstance(each, node.Stored) and each.tier is Tier.DISK]


def test_a_node_whose_launcher_cannot_be_made_leaves_nothing(tmp_path: Path, tiny: Path) -> None:
    def no_launcher(_store: object) -> Any:
        raise OSError("no process can be started")

    before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with pytest.raises(OSError, match="no process can be started"):
        NodeAgent("n", 1, no_launcher, OPTIONS, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before and set(threading.enumerate()) <= threads
    with agent_of(tmp_path, Worker) as (agent, heard):
        assert register(agent, heard, tiny, "tiny") == [Tier.DISK]


def test_a_load_that_fails_as_nobody_expects_after_its_instance_serves_loses_that(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the controller would wait for its last byte for ever."""

    def broken(load: Any) -> None:
        raise ValueError("no such byte")

    monkeypatch.setattr(lanes.Load, "over", property(lambda _load: False))
    monkeypatch.setattr(lanes.Load, "wait", broken)
    with agent_of(tmp_path, Worker) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        agent.give(replace(climb(7), overlap=True))
        assert heard.wait(node.Serves).instance == 7
        answer = heard.wait(node.Lost)
        assert (answer.instance, answer.reason) == (7, "ValueError: no such byte")


class Stubborn(Worker):
    """Raises what nobody expects when a request is to move."""

    address = "there"

    def move(self, *_args: object, **_named: object) -> None:
        raise ValueError("no such request")


def test_a_move_that_fails_as_nobody_expects_is_over_all_the_same(tmp_path: Path, tiny: Path) -> None:
    with agent_of(tmp_path, lambda _name: Stubborn()) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        agent.give(climb(7))
        heard.wait(node.Reached)
        agent.give(node.Move("r", 7, "elsewhere", "tokens", 4, 2))
        moved = heard.wait(node.Moved)
        assert (moved.request_id, moved.epoch, moved.outcome) == ("r", 2, "stayed")


def test_a_part_that_fails_as_nobody_expects_is_told_with_its_reason(tmp_path: Path, tiny: Path) -> None:
    with agent_of(tmp_path, Worker) as (agent, heard):
        register(agent, heard, tiny, "tiny")
        agent.give(node.Fetch("p", "tiny", Part("p", 0, 1 << 20, [agent.fetching.address], [], [])))
        assert heard.wait(node.Fetched).error.startswith("ValueError: blocks of 1,048,576 bytes cannot be checked one by one")


def test_a_model_that_fails_as_nobody_expects_is_answered_and_the_next_one_is_registered(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with agent_of(tmp_path, Worker) as (agent, heard):
        kept = agent.store.register

        def register_one(model: str, source: str) -> Any:
            if model == "broken":
                raise ValueError("no such tensor")
            return kept(model, source)

        monkeypatch.setattr(agent.store, "register", register_one)
        agent.give(node.Register("broken", str(tiny)))
        agent.give(node.Register("tiny", str(tiny)))
        failed = heard.wait(node.OrderFailed)
        assert (failed.model, failed.kind, failed.message) == ("broken", "ValueError", "no such tensor")
        assert heard.wait(node.Registered).model == "tiny"


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Spoken to

QUICK = NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", launcher="thread", beat_seconds=0.1, silent_seconds=0.6)


@pytest.fixture(params=["unix", "tcp"])
def begin(request: pytest.FixtureRequest) -> Iterator[Begin]:
    """What makes a node: with the connection that it is born with, or one that it makes."""
    if request.param == "unix":
        yield local_node
        return
    tcp.ensure_key()
    yield lambda agent: connected_node(agent, "127.0.0.1")
    set_key(None)


@contextmanager
def process_of(folder: Path, options: NodeOptions = QUICK, begin: Begin = local_node) -> Iterator[tuple[RemoteNode, Heard, int]]:
    """A node, and the process it says it has."""
    handle, heard = begin(Agent("n", 1, str(folder), options)), Heard()
    try:
        handle.open(heard.answer, heard.gone)
        handle.give(node.Join("n", 1, "run", str(folder / "arbiter")))
        yield handle, heard, heard.wait(node.Joined).pid
    finally:
        handle.close()


def test_a_node_that_hangs_is_given_up_and_killed(tmp_path: Path, begin: Begin) -> None:
    with process_of(tmp_path, begin=begin) as (_, heard, pid):
        os.kill(pid, signal.SIGSTOP)
        assert heard.end() == "it said nothing for 0.6 s" and is_gone(pid)


def test_a_node_that_is_killed_is_gone_at_once_and_says_why(tmp_path: Path, begin: Begin) -> None:
    with process_of(tmp_path, begin=begin) as (_, heard, pid):
        os.kill(pid, signal.SIGKILL)
        assert "the peer closed the channel" in heard.end()
    with process_of(tmp_path, begin=begin) as (handle, heard, pid):
        handle.kill()
        assert heard.end() == "it was killed" and is_gone(pid)


def test_a_node_whose_driver_is_silent_ends_itself_and_says_why(tmp_path: Path) -> None:
    ours, process = start_process(Agent("n", 1, str(tmp_path), QUICK).arguments())
    with process, Channel(ours, node.FromNode, name="node") as channel:
        said = []
        with pytest.raises(ChannelClosed):
            while True:
                said.append(channel.receive(PATIENCE).message)
        assert isinstance(said[-1].message, node.Ending) and "no message came in time" in said[-1].message.reason
        assert process.wait(PATIENCE) == 1 and len(said) > 2, "it beat until then"


def steps(count: int) -> Part:
    return Part("p", 0, 1 << 20, ["here"], [], [Step(0, number % 1000) for number in range(count)])


UNSAYABLE: list[tuple[node.NodeOrder, bytes, type[node.NodeAnswer], str]] = [
    (node.Register("x" * 2000, "somewhere"), b"", node.OrderFailed, "schema"),
    (node.Climb(-1, 3, "tiny", COLD, READY, Tier.DISK, [0]), b"", node.Lost, "schema"),
    (node.Run(1, "r", 2), bytes(MAX_SESSION_NBYTES + 1), node.RunFailed, "payload"),
    (node.Run(1, "r" * 5000, 2), b"", node.RunFailed, "schema"),
    (node.Move("r", 1, "x" * 5000, "tokens", 4, 2), b"", node.Moved, ""),
    (node.Fetch("p", "tiny", steps(100_000)), b"", node.Fetched, "bytes and the channel takes 1,048,576"),
    (node.Fetch("p" * 2000, "tiny", None), b"", node.Fetched, "schema"),
]


def test_an_order_that_no_message_carries_fails_alone(tmp_path: Path, tiny: Path) -> None:
    """Each is answered as one that could not be carried out, and those after it come."""
    with process_of(tmp_path) as (handle, heard, _):
        for order, payload, *_answer in UNSAYABLE:
            handle.give(order, payload)
        handle.give(node.Register("tiny", str(tiny)))
        assert heard.wait(node.Registered).model == "tiny"
        for order, _, kind, why in UNSAYABLE:
            assert why in str(heard.wait(kind)), order
        assert heard.why is None


def test_a_fetch_that_no_message_carries_leaves_the_climb_that_waits_for_it_to_read_by_itself(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Any] = []
    with process_of(tmp_path) as (handle, heard, _):
        kept = handle._conversation.post
        monkeypatch.setattr(handle._conversation, "post", lambda order, payload=b"": (posted.append(order), kept(order, payload)))
        handle.give(node.Fetch("p", "tiny", steps(100_000)))
        heard.wait(node.Fetched)
        handle.give(node.Register("tiny", str(tiny)))
        heard.wait(node.Registered)
        assert node.Fetch("p", "tiny", None) in posted


def test_a_node_that_cannot_be_told_to_join_ends_with_the_reason(tmp_path: Path) -> None:
    with process_of(tmp_path) as (handle, heard, pid):
        handle.give(node.Join("n", -1, "run", "arbiter"))
        why = heard.end()
        assert why.startswith("it cannot be told what it must be") and "ToNode breaks its own schema" in why and is_gone(pid)


def test_a_node_that_cannot_be_listened_to_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Begin) -> None:
    """Its thread cannot be started: nothing of the node is left, and the error is not another one."""
    before, handle = len(os.listdir("/proc/self/fd")), begin(Agent("n", 1, str(tmp_path), QUICK))

    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", full)
        handle.open(lambda *_: None, lambda _why: None)
    handle.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_agent_that_ends_before_it_connects_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_START_SECONDS", 600)
    tcp.ensure_key()

    def with_another_key(agent: Agent) -> subprocess.Popen[bytes]:
        return replace(agent, key=b"x" * 32).start()

    heard, before = Heard(), len(os.listdir("/proc/self/fd"))
    for start in (with_another_key, lambda _agent: subprocess.Popen(["false"])):
        handle = connected_node(Agent("n", 1, str(tmp_path), QUICK), "127.0.0.1", start)
        handle.open(heard.answer, heard.gone)
        assert heard.end() == "its connection ended (its process ended before it connected)"
        heard.why = None
        handle.close()
    assert len(os.listdir("/proc/self/fd")) == before
    set_key(None)


SPOILT = """
from sllm_mini.cluster.nodes import agent

agent.NodeAgent.tier = lambda self, model: "between two tiers"

def make(order):
    raise RuntimeError("no engine is made here")
"""


def test_what_a_node_cannot_say_ends_it_with_the_reason(tmp_path: Path, tiny: Path) -> None:
    options = NodeOptions(store_dram_nbytes=64 * MIB, engine="spoilt:make", launcher="thread")
    with on_the_path(tmp_path, "spoilt", SPOILT), process_of(tmp_path / "node", options) as (handle, heard, pid):
        handle.give(node.Register("tiny", str(tiny)))
        why = heard.end()
        assert why.startswith("it cannot say what it has to") and "schema" in why and is_gone(pid)


def test_a_node_that_cannot_begin_says_why(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the store's folder belongs")
    handle, heard = local_node(Agent("n", 1, str(tmp_path), QUICK)), Heard()
    handle.open(heard.answer, heard.gone)
    assert str(tmp_path / "store") in heard.end()
    handle.close()


def test_a_node_that_was_never_opened_is_closed_without_waiting_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Begin) -> None:
    monkeypatch.setattr(remote, "_CLOSE_SECONDS", 600)
    before = len(os.listdir("/proc/self/fd"))
    begin(Agent("n", 1, str(tmp_path), QUICK)).close()
    assert len(os.listdir("/proc/self/fd")) == before
