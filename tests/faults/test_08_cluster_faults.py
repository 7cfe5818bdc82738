"""Whatever dies or hangs in a live cluster, every text is whole, none is said twice, and nothing is left behind. Chapter 08."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_engine import next_token, whole_text
from processes import children_of, is_gone
from range_server import RangeServer
from ray_machines import RayMachines, actors

from faults.unreliable import Unreliable
from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Cluster, Deployment, Stream
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.nodes import remote
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.process_memory import memory_of
from sllm_mini.cluster.runtime import give_back_memory
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource
from sllm_mini.types import Tier
from sllm_mini.wire import Channel

MIB = 1 << 20
CONTROL = ControlOptions(max_failures=50)
OPTIONS = LiveOptions(
    max_restarts=50,  # as with max_failures: here everything dies all the time, and no request is the cause
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=3.0)
)


@contextmanager
def opened(folder: Path, nodes: int, models: str, *, devices: int = 2, kind: str = "local") -> Iterator[Cluster]:
    convert_checkpoint(resource("data/models/tiny"), folder / "tiny")
    with open_cluster(kind, folder=folder / "cluster", nodes=even_cluster(nodes, devices=devices), control=CONTROL, options=OPTIONS) as cluster:
        for name in models:
            cluster.deploy(Deployment(ModelSpec(name=name, nbytes=10 * MIB, concurrency=2), str(folder / "tiny")))
        yield cluster


def ask(cluster: Cluster, model: str, number: int, tokens: int) -> Stream:
    return cluster.submit(Ask(model, [5, 6, number + 1], tokens, stop_at_eos=False, request_id=f"{model}-{number}"))


def is_whole(stream: Stream, number: int, tokens: int) -> bool:
    return tuple(piece.token_id for piece in stream) == whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))[0]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in children_of(pid)]
    except FileNotFoundError:
        return []  # it has ended meanwhile


def below(pid: int) -> list[int]:
    """All processes that it started, and those that they did."""
    found = children(pid)
    return found + [each for child in found for each in below(child)]


def of_nodes(kind: str) -> list[int]:
    """All processes of a cluster's nodes, and none of Ray's own."""
    return below(os.getpid()) if kind == "local" else [each for actor in actors() for each in (actor, *below(actor))]


class Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def malloc_nbytes() -> int:
    """What this process has from the C library and has not given back, in all its arenas."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


@dataclass(frozen=True)
class Left:
    """What a cluster must not leave behind. Of this process's memory `resident_nbytes` has also what the allocator keeps free for each thread
    that was; in use are `blocks` of Python's and `malloc_nbytes`."""

    descriptors: int
    memory_files: int
    shared: list[str]
    threads: list[str]
    processes: list[int]
    resident_nbytes: int = field(compare=False)
    blocks: int = field(compare=False)
    malloc_nbytes: int = field(compare=False)

    @classmethod
    def now(cls) -> Left:
        next_token.cache_clear()  # the double remembers every text
        give_back_memory()
        opened = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{each}")]
        threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("sllm"))
        shared = sorted(each for each in os.listdir("/dev/shm") if each.startswith(("sllm", "torch_", "psm_")))
        return cls(
            len(opened), sum("memfd:" in each for each in opened), shared, threads, below(os.getpid()), memory_of(os.getpid()).private_nbytes,
            sys.getallocatedblocks(), malloc_nbytes(),
        )  # fmt: skip


def revive(cluster: Cluster, joining: dict[str, threading.Thread]) -> None:
    """Nodes that are gone come again, as somebody who looks after machines would have it."""

    def join(node: str) -> None:
        try:
            cluster.add_node(next(each.spec for each in cluster.nodes() if each.name == node))
        except SllmError:
            return  # killed again while it came up; the next look finds it

    for node in cluster.nodes():
        if not node.alive and (node.name not in joining or not joining[node.name].is_alive()):
            joining[node.name] = threading.Thread(target=join, args=(node.name,))
            joining[node.name].start()


def read(stream: Stream, number: int, tokens: int) -> None:
    """As a client does, from its first token to its last."""
    assert is_whole(stream, number, tokens), stream.report
    assert stream.wait(30).outcome == "answered", stream.report


def storm(folder: Path, seconds: float, chance: Random, kind: str = "local") -> str:
    """Six requests a second, read as they come, and twice a second a process is killed. Every text must be whole and once; what was
    done, in words."""
    folder.mkdir()
    with ThreadPoolExecutor(64) as clients, opened(folder, 3, "abc", kind=kind) as cluster:
        reading: list[Future[None]] = []
        joining: dict[str, threading.Thread] = {}
        end, next_kill, kills = time.monotonic() + seconds, 0.0, 0
        while time.monotonic() < end:
            number, tokens = len(reading), chance.randrange(20, 200)
            reading.append(clients.submit(read, ask(cluster, chance.choice("abc"), number, tokens), number, tokens))
            time.sleep(1 / 6)
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + 0.5
                victims = of_nodes(kind)
                if victims:
                    try:
                        os.kill(chance.choice(victims), signal.SIGKILL)
                        kills += 1
                    except ProcessLookupError:
                        continue  # it ended by itself in this moment
            revive(cluster, joining)
        for thread in joining.values():
            thread.join()
        revive(cluster, joining)
        for text in reading:
            text.result()
        for thread in joining.values():
            thread.join()
        result = cluster.result()
        lost = result.events["NodeLost"], result.events["InstanceFailed"]
        assert result.answered == len(reading) and kills > seconds / 2 and sum(lost) > kills / 4
        assert replay(cluster.log(), CONTROL.controller())
        return f"{result.answered} texts whole and once, {kills} kills, {lost[0]} nodes and {lost[1]} instances lost"


def test_any_process_is_killed_at_any_time_under_load(tmp_path_factory: pytest.TempPathFactory) -> None:
    before = Left.now()
    storm(tmp_path_factory.mktemp("kills") / "c", 10.0, Random(8))  # not below this test's name: a socket's path has 107 bytes at most
    assert Left.now() == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_minutes_of_that_leave_nothing_behind(tmp_path: Path) -> None:
    """SLLM_SOAK_SECONDS for another time. Two halves of one length: the first grows the heap to what such a load needs, and the second must
    not need more. What a program keeps of each loss or request it would keep of the second half's too."""
    half = float(os.environ.get("SLLM_SOAK_SECONDS", "600")) / 2
    first = storm(tmp_path / "first", half, Random(8))
    before = Left.now()
    said = f"{first}; then {storm(tmp_path / 'second', half, Random(9))}"
    after = Left.now()
    grown = {name: getattr(after, name) / getattr(before, name) - 1 for name in ("resident_nbytes", "blocks", "malloc_nbytes")}
    print(said, "; this process's memory", *(f"{name} {growth:+.2%} to {getattr(after, name):,}" for name, growth in grown.items()), after)
    assert after == before and grown["blocks"] < 0.01 and grown["malloc_nbytes"] < 0.05 and grown["resident_nbytes"] < 0.1


@pytest.mark.slow
def test_the_memory_of_a_node_stays_flat_under_load(tmp_path: Path) -> None:
    """Two workers, whose requests fit them: none is ended meanwhile. The prompts come again, since the double remembers each."""
    with opened(tmp_path, 1, "ab") as cluster:

        def serve(requests: range) -> dict[int, int]:
            def client(model: str) -> None:
                for number in requests:
                    prompt = number % 20
                    read(cluster.submit(Ask(model, [5, 6, prompt + 1], 20, stop_at_eos=False, request_id=f"{model}-{number}")), prompt, 20)

            with ThreadPoolExecutor(2) as clients:
                for done in [clients.submit(client, model) for model in "ab"]:
                    done.result()
            return {pid: memory_of(pid).private_nbytes for pid in below(os.getpid())}

        before, after = serve(range(100)), serve(range(100, 500))
    print({pid: f"{before[pid] / MIB:.1f} -> {after[pid] / MIB:.1f} MiB" for pid in before})
    assert before.keys() == after.keys() and len(before) == 4, "the agent, its zygote, two workers"
    assert all(after[pid] < 1.05 * before[pid] + MIB for pid in before)


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_worker_that_hangs_is_noticed_and_its_requests_go_on(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_machines")
    others = children(os.getpid())  # of tests that ran here before
    with opened(tmp_path, 1, "a", devices=1, kind=kind) as cluster:
        stream = ask(cluster, "a", 0, 300)
        assert cluster.wait(lambda _: stream.report.output_tokens > 3, 20)
        (agent,) = [each for each in children(os.getpid()) if each not in others] if kind == "local" else [agent for actor in actors() for agent in children(actor)]
        workers = [worker for zygote in children(agent) for worker in children(zygote)]
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        began = cluster.now
        assert cluster.wait(lambda _: stream.report.restarts == 1, 20) and cluster.now - began < 4
        assert is_whole(stream, 0, 300) and len(workers) == 1 and is_gone(workers[0])


def test_frames_lost_doubled_and_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between driver and agents, both ways, 5 % each."""
    links: list[Unreliable] = []

    def link(*arguments: Any, **named: Any) -> Unreliable:
        links.append(Unreliable(Channel(*arguments, **named), 0.05, seed=len(links)))
        return links[-1]

    monkeypatch.setattr(remote, "Channel", link)
    with opened(tmp_path, 2, "ab") as cluster:
        streams = [ask(cluster, "ab"[number % 2], number, 60) for number in range(60)]
        for number, stream in enumerate(streams):
            assert is_whole(stream, number, 60) and stream.report.restarts == 0, stream.report
        result = cluster.result()
        assert result.answered == 60 and "NodeLost" not in result.events and "InstanceFailed" not in result.events
        assert replay(cluster.log(), CONTROL.controller())
    counts = sum((link.counts for link in links), Counter[str]())
    assert min(counts["lost"], counts["doubled"], counts["late"]) >= 3, counts


@pytest.mark.slow
def test_any_process_of_a_node_on_ray_is_killed_at_any_time_under_load(ray_machines: RayMachines, tmp_path: Path) -> None:
    print(storm(tmp_path / "cluster", 10.0, Random(8), "ray"))
    gone = time.monotonic() + 20
    while of_nodes("ray"):  # Ray ends the actors in its own time
        assert time.monotonic() < gone
        time.sleep(0.05)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm")] == []


def test_a_node_that_returns_is_chosen_for_what_it_has_on_disk(tmp_path: Path) -> None:
    """Its store's cache is its own, whoever speaks for it; the controller is told, and reads from there."""
    convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny")
    options = replace(OPTIONS, node=replace(OPTIONS.node, store_disk_nbytes=64 * MIB))
    with RangeServer(tmp_path / "tiny") as server, open_cluster("local", folder=tmp_path / "cluster", nodes=even_cluster(2), control=CONTROL, options=options) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=10 * MIB), server.url))
        assert is_whole(ask(cluster, "a", 0, 20), 0, 20)

        def holders(tier: Tier) -> list[str]:
            return [each.name for each in cluster.nodes() if each.alive and each.cached.get("a") is tier]

        assert cluster.wait(lambda _: len(holders(Tier.DRAM)) == 1, 20)
        (name,) = holders(Tier.DRAM)
        cluster.kill_node(name)
        cluster.add_node(next(each.spec for each in cluster.nodes() if each.name == name))
        assert holders(Tier.DISK) == [name] and not holders(Tier.DRAM)
        sent = len(server.asked)
        stream = ask(cluster, "a", 1, 20)
        assert is_whole(stream, 1, 20) and stream.wait(20).tier is Tier.DISK
        assert [each.name for each in cluster.nodes() if each.instances] == [name]
        assert all(asked.file == "index.json" for asked in server.asked[sent:])


def test_a_deleted_model_leaves_the_stores(tmp_path: Path) -> None:
    with opened(tmp_path, 1, "ab", devices=1) as cluster:
        assert is_whole(ask(cluster, "a", 0, 20), 0, 20) and is_whole(ask(cluster, "b", 0, 20), 0, 20)
        used = ((store := cluster.nodes()[0].store) and store.dram_used_nbytes) or 0
        cluster.delete("a")
        assert cluster.wait(lambda _: (left := cluster.nodes()[0].store) is not None and left.dram_used_nbytes <= used / 2, 20), used
        assert is_whole(ask(cluster, "b", 1, 20), 1, 20)
