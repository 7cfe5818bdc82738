"""Whatever dies or hangs in a live cluster, every text is whole, none is said twice, and nothing is left behind. Chapter 08."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from fake_engine import whole_text
from processes import children_of, is_gone

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Cluster, Deployment, Stream
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource

MIB = 1 << 20
CONTROL = ControlOptions(max_failures=50)
OPTIONS = LiveOptions(
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=1.0, stuck_seconds=1.0)
)


@contextmanager
def opened(folder: Path, nodes: int, models: str, *, devices: int = 2) -> Iterator[Cluster]:
    convert_checkpoint(resource("data/models/tiny"), folder / "tiny")
    with open_cluster("local", folder=folder / "cluster", nodes=even_cluster(nodes, devices=devices), control=CONTROL, options=OPTIONS) as cluster:
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


def left() -> tuple[int, list[str], list[int]]:
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("sllm"))
    return len(os.listdir("/proc/self/fd")), threads, below(os.getpid())


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


def test_any_process_is_killed_at_any_time_under_load(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seconds = 600.0 if request.config.getoption("--slow") else 10.0
    chance, before = Random(8), left()
    with opened(tmp_path, 3, "abc") as cluster:
        asked: list[tuple[Stream, int, int]] = []
        joining: dict[str, threading.Thread] = {}
        end, next_kill, kills = time.monotonic() + seconds, 0.0, 0
        while time.monotonic() < end:
            number, tokens = len(asked), chance.randrange(20, 200)
            asked.append((ask(cluster, chance.choice("abc"), number, tokens), number, tokens))
            time.sleep(1 / 6)
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + 0.5
                victims = below(os.getpid())
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
        for stream, number, tokens in asked:
            report = stream.wait(30)
            assert report.outcome == "answered" and is_whole(stream, number, tokens), report
        for thread in joining.values():
            thread.join()
        result = cluster.result()
        assert result.answered == len(asked) and kills > 10 and result.events["NodeLost"] + result.events["InstanceFailed"] > 5
        assert replay(cluster.log(), CONTROL.controller())
    assert left() == before


def test_a_worker_that_hangs_is_noticed_and_its_requests_go_on(tmp_path: Path) -> None:
    with opened(tmp_path, 1, "a", devices=1) as cluster:
        stream = ask(cluster, "a", 0, 300)
        assert cluster.wait(lambda _: stream.report.output_tokens > 3, 20)
        (agent,) = children(os.getpid())
        workers = [worker for zygote in children(agent) for worker in children(zygote)]
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        began = cluster.now
        assert cluster.wait(lambda _: stream.report.restarts == 1, 20) and cluster.now - began < 4
        assert is_whole(stream, 0, 300) and len(workers) == 1 and is_gone(workers[0])
