"""Chapter 08: nodes on the machines of a Ray cluster. What every cluster promises is in `test_08_cluster`; here is what only Ray has."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import whole_text
from processes import children_of, is_gone
from ray_machines import FAKE_GPUS, RayMachines, actors

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Cluster, Deployment, Stream
from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.ray import Machine, choose
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.errors import SllmError, UnsupportedError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource

MIB = 1 << 20
SECONDS = 30.0
OPTIONS = LiveOptions(
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=3.0)
)
slow = pytest.mark.slow


@contextmanager
def opened(folder: Path, nodes: int, *, devices: int = 2, options: LiveOptions = OPTIONS) -> Iterator[Cluster]:
    convert_checkpoint(resource("data/models/tiny"), folder / "tiny")
    with open_cluster("ray", folder=folder / "cluster", nodes=even_cluster(nodes, devices=devices), options=options) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=10 * MIB, concurrency=1), str(folder / "tiny")))
        yield cluster


def ask(cluster: Cluster, number: int, tokens: int) -> Stream:
    return cluster.submit(Ask("a", [5, 6, number + 1], tokens, stop_at_eos=False))


def is_whole(stream: Stream, number: int, tokens: int) -> bool:
    return tuple(piece.token_id for piece in stream) == whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))[0]


def agents() -> list[int]:
    """The processes of the nodes' agents, in the order of the nodes' names."""
    found = [int(child) for actor in actors() for child in children_of(actor)]
    return sorted(found, key=lambda pid: re.findall(r'"name":"(node-\d+)"', Path(f"/proc/{pid}/cmdline").read_text()))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def environment(pid: int) -> dict[str, str]:
    return dict(each.split("=", 1) for each in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in each)


def alive(cluster: Cluster) -> list[bool]:
    return [node.alive for node in cluster.nodes()]


# Without Ray


def test_a_node_goes_to_the_machine_with_the_fewest_that_has_its_gpus() -> None:
    (node,) = even_cluster(1, devices=2)
    machines = [Machine("head", 0, 0), Machine("one", 4, 1), Machine("two", 2, 1), Machine("three", 1, 0)]
    assert choose(machines, node, cuda=True) == ("one", 2)
    assert choose(machines, node, cuda=False) == ("head", 0)
    assert choose([*machines, Machine("four", 2, 0)], node, cuda=False) == ("four", 2)
    for there, cuda in (([machines[0], machines[3]], True), ([], False)):
        with pytest.raises(SllmError, match=r"no machine .* 2 free GPUs .*node-0"):
            choose(there, node, cuda=cuda)


def test_without_ray_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r'pip install "sllm_mini\[ray\]"'):
        open_cluster("ray", folder=tmp_path)


@slow
def test_ray_is_started_where_none_is_named_and_ends_with_the_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; make ray")
    convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny")
    program = """if True:
        import os, sys
        from pathlib import Path
        from sllm_mini.cluster import Ask, Deployment, open_cluster
        from sllm_mini.control.messages import ModelSpec
        from sllm_mini.errors import SllmError
        folder = Path(sys.argv[1])
        os.environ["RAY_ADDRESS"] = "127.0.0.1:1"
        try:
            open_cluster("ray", folder=folder / "nowhere")
        except SllmError as error:
            print(error)
        del os.environ["RAY_ADDRESS"]
        with open_cluster("ray:2", folder=folder / "cluster") as cluster:
            cluster.deploy(Deployment(ModelSpec(name="a", nbytes=1), str(folder / "tiny")))
            print(len(list(cluster.submit(Ask("a", "Once upon a time", 12, stop_at_eos=False)))), [node.alive for node in cluster.nodes()])
        import ray
        print(ray.is_initialized(), Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    """
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=110, cwd=Path(__file__).parent.parent)
    refused, *said = ended.stdout.splitlines()
    assert (ended.returncode, said, ended.stderr) == (0, ["12 [True, True]", "False []"], "") and "no Ray answers at 127.0.0.1:1" in refused


# In the cluster of the session


@slow
def test_each_node_has_a_machine_and_sees_the_gpus_that_ray_leased_to_it(ray_machines: RayMachines, tmp_path: Path) -> None:
    with opened(tmp_path, 3) as cluster:
        assert is_whole(ask(cluster, 0, 20), 0, 20)
        leased = [environment(pid).get("CUDA_VISIBLE_DEVICES") for pid in agents()]
        assert sorted(leased, key=str) == ["0,1", "0,1", None]  # the third is on the head, which has no GPU
        assert len({parent_of(actor) for actor in actors()}) == 3
        workers = [Path(f"/proc/{each}/environ").read_text() for agent in agents() for zygote in children_of(agent) for each in children_of(int(zygote))]
        assert len(workers) == 1 and "CUDA_VISIBLE_DEVICES=0,1" in workers[0]
    gone = time.monotonic() + SECONDS
    while actors():
        assert time.monotonic() < gone
        time.sleep(0.05)


@slow
def test_a_node_that_ray_has_no_place_for_is_refused_in_time(ray_machines: RayMachines, tmp_path: Path) -> None:
    import ray

    options = replace(OPTIONS, node=replace(OPTIONS.node, cuda=True), join_seconds=3.0)
    with pytest.raises(SllmError, match=rf"{FAKE_GPUS + 1} free GPUs"), opened(tmp_path / "many", 1, devices=FAKE_GPUS + 1, options=options):
        pass
    others = ray.util.placement_group([{"GPU": FAKE_GPUS}] * 2)  # all there are
    try:
        ray.get(others.ready(), timeout=SECONDS)
        refused = pytest.raises(SllmError, match=r"Ray did not start the node node-0000 .* with 2 GPUs: it had no place for 3 s")
        with refused, opened(tmp_path / "taken", 1, options=options):
            pass
    finally:
        ray.util.remove_placement_group(others)
    assert not actors()


@slow
def test_a_machine_that_goes_is_noticed_soon_and_its_requests_go_on_elsewhere(ray_machines: RayMachines, tmp_path: Path) -> None:
    with opened(tmp_path, 2) as cluster:
        ray_machines.add()  # instead of the one that goes
        streams = [ask(cluster, number, 600) for number in range(4)]
        assert cluster.wait(lambda _: all(stream.report.output_tokens > 3 for stream in streams), SECONDS)
        agent = agents()[0]
        ray_machines.remove(parent_of(parent_of(agent)))
        began = time.monotonic()
        assert cluster.wait(lambda _: alive(cluster) == [False, True], SECONDS)
        assert time.monotonic() - began < 2 and is_gone(agent)
        for number, stream in enumerate(streams):
            assert is_whole(stream, number, 600)
        assert sorted(stream.wait(SECONDS).restarts for stream in streams) == [0, 0, 1, 1]
        cluster.add_node(cluster.nodes()[0].spec)
        assert alive(cluster) == [True, True] and cluster.nodes()[0].incarnation == 2
        assert is_whole(ask(cluster, 9, 20), 9, 20)


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_lives_and_ends_with_its_actor_or_its_agent(ray_machines: RayMachines, tmp_path: Path, number: int) -> None:
    with opened(tmp_path, 2) as cluster:
        first, second = agents()
        began = time.monotonic()
        os.kill(parent_of(first) if number == signal.SIGKILL else first, number)
        assert cluster.wait(lambda _: alive(cluster) == [False, True], SECONDS)
        assert time.monotonic() - began < 2 and is_gone(first) and agents() == [second]
