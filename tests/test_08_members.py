"""Which nodes and models belong, seen from handles that answer as told: weights that differ, a deployment that fails or cannot be written,
joins that meet each other, time out or break. Chapter 08."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sllm_mini.cluster.api import Ask, Deployment, RefusedError
from sllm_mini.cluster.live import prompts
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.control import messages as m
from sllm_mini.errors import SllmError, WriteError
from sllm_mini.types import Tier

DIGESTS = {"n0": "one", "n1": "another", "n2": "one"}


class Scripted:
    """A node's handle, without a node: joins at once, and answers to a registration what `DIGESTS` says of its name, or that it failed."""

    def __init__(self, spec: m.NodeSpec, incarnation: int) -> None:
        self.name, self.incarnation, self.killed, self.closed = spec.name, incarnation, False, False
        self.orders: list[Any] = []
        self._answer: Callable[[Any, bytes], None] = lambda *_: None

    def open(self, answered: Callable[[Any, bytes], None], gone: Callable[[str], None]) -> None:
        self._answer = answered

    def give(self, order: Any, payload: bytes = b"") -> None:
        self.orders.append(order)
        if isinstance(order, node.Join):
            self._answer(node.Joined(1, ""), b"")
        elif isinstance(order, node.Register) and order.source != "broken":
            self._answer(node.Registered(order.model, DIGESTS[self.name], Tier.DISK, 1, ()), b"")
        elif isinstance(order, node.Register) and self.name == "n2":
            self._answer(node.OrderFailed(order.model, "StoreError", "it cannot be read"), b"")

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        self.closed = True


def spec(name: str) -> m.NodeSpec:
    return m.NodeSpec(name=name, devices=1, dram_nbytes=10**9, remote_bytes_per_second=1e9, disk_bytes_per_second=1e9, dram_bytes_per_second=1e9)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LiveCluster]:
    with LiveCluster(Scripted, ControlOptions(), tmp_path, LiveOptions(join_seconds=20.0)) as opened:  # type: ignore[arg-type]
        opened.add_node(spec("n0"))
        opened.deploy(Deployment(m.ModelSpec(name="a", nbytes=1), "somewhere"))
        yield opened


def test_a_node_with_other_weights_does_not_join(cluster: LiveCluster) -> None:
    with pytest.raises(SllmError, match="another one on n1"):
        cluster.add_node(spec("n1"))
    assert [each.name for each in cluster.nodes() if each.alive] == ["n0"]
    cluster.add_node(spec("n2"))


def test_a_deployment_that_fails_on_a_joining_node_fails_alone(cluster: LiveCluster) -> None:
    failed: list[str] = []

    def deploy() -> None:
        try:
            cluster.deploy(Deployment(m.ModelSpec(name="b", nbytes=1), "broken"))  # n0 never answers
        except SllmError as error:
            failed.append(str(error))

    deploying = threading.Thread(target=deploy)
    deploying.start()
    assert cluster.wait(lambda _: "b" in cluster._members._deploying, 20)
    cluster.add_node(spec("n2"))
    deploying.join(20)
    assert failed and "it cannot be read" in failed[0]
    assert {each.name for each in cluster.nodes() if each.alive} == {"n0", "n2"}


def test_the_answer_to_a_registration_that_was_given_up_is_not_taken_for_the_next(cluster: LiveCluster) -> None:
    (handle,) = cluster._loop.carry.handles.values()
    assert isinstance(handle, Scripted)
    deploying = threading.Thread(target=cluster.deploy, args=(Deployment(m.ModelSpec(name="b", nbytes=1), "broken"),))  # n0 answers nothing by itself
    deploying.start()
    assert cluster.wait(lambda _: "b" in cluster._members._deploying, 20)
    (order,) = (each for each in handle.orders if isinstance(each, node.Register) and each.model == "b")
    handle._answer(node.OrderFailed("b", "StoreError", "it was in use", order.number + 1), b"")
    handle._answer(node.Registered("b", "old", Tier.DISK, 1, (), order.number + 1), b"")
    handle._answer(node.Registered("b", "new", Tier.DISK, 1, (), order.number), b"")
    deploying.join(20)
    assert cluster._members.deployed["b"][1] == "new"


@pytest.mark.parametrize(
    ("model", "source"), [(m.ModelSpec(name="b", nbytes=1), ""), (m.ModelSpec(name="b", nbytes=1), "x" * 5000), (m.ModelSpec(name="b" * 1025, nbytes=1), "x"), (m.ModelSpec(name="b", nbytes=1, concurrency=5000), "x")]
)
def test_what_no_message_to_a_node_carries_is_refused_before_any_is_sent(model: m.ModelSpec, source: str) -> None:
    """Else each node would be given up for a frame that it cannot be sent."""
    with pytest.raises(ValueError, match="give 1 to"):
        Deployment(model, source)


# Joins that meet each other, time out or break


def opened(folder: Path, handles: Callable[[m.NodeSpec, int], Any], seconds: float = 20.0) -> LiveCluster:
    return LiveCluster(handles, ControlOptions(), folder, LiveOptions(join_seconds=seconds))


def hold(cluster: LiveCluster) -> None:
    """The driver stands still until two more things have happened: what is answered now, and that whoever waits for it has lost patience."""

    def wait() -> list[m.AnyEvent]:
        until = time.monotonic() + 20
        while cluster._loop._posted.qsize() < 2 and time.monotonic() < until:
            time.sleep(0.005)
        return []

    cluster._loop.post(wait)


class Late(Scripted):
    """Answers just as its time is over."""

    def __init__(self, clusters: list[LiveCluster], spec: m.NodeSpec, incarnation: int) -> None:
        super().__init__(spec, incarnation)
        self._clusters = clusters

    def give(self, order: Any, payload: bytes = b"") -> None:
        if isinstance(order, node.Join | node.Register):
            hold(self._clusters[0])
        super().give(order, payload)


def test_a_node_that_comes_up_as_its_time_is_over_is_there(tmp_path: Path) -> None:
    """Else it would join, be lost at once, and be started again by whoever starts lost nodes, though nobody was told that it came."""
    clusters: list[LiveCluster] = []
    with opened(tmp_path, partial(Late, clusters), 0.2) as cluster:
        clusters.append(cluster)
        cluster.add_node(spec("n0"))
        assert [each.alive for each in cluster.nodes()] == [True]
        assert "NodeLost" not in cluster.result().events


def test_a_model_that_is_registered_as_its_time_is_over_is_deployed(tmp_path: Path) -> None:
    clusters: list[LiveCluster] = []
    with opened(tmp_path, partial(Late, clusters), 0.2) as cluster:
        clusters.append(cluster)
        cluster.add_node(spec("n0"))
        cluster.deploy(Deployment(m.ModelSpec(name="a", nbytes=1), "somewhere"))
        assert [each.spec.name for each in cluster.models()] == ["a"]


def test_of_two_joins_of_one_name_at_once_one_is_refused_and_makes_no_node(tmp_path: Path) -> None:
    made: list[Scripted] = []
    making, go_on = threading.Event(), threading.Event()

    def slowly(of: m.NodeSpec, incarnation: int) -> Scripted:
        made.append(Scripted(of, incarnation))
        making.set()
        assert go_on.wait(20)
        return made[-1]

    with opened(tmp_path, slowly) as cluster, ThreadPoolExecutor(1) as others:
        first = others.submit(cluster.add_node, spec("n0"))
        assert making.wait(20)
        with pytest.raises(SllmError, match="n0 is alive, or on its way"):
            cluster.add_node(spec("n0"))
        go_on.set()
        first.result()
        with pytest.raises(SllmError, match="n0 is alive, or on its way"):
            cluster.add_node(spec("n0"))
        assert len(made) == 1 and not made[0].killed


@pytest.mark.parametrize("breaks", ["open", "give"])
def test_a_node_that_breaks_while_it_joins_is_ended_and_its_name_is_free(tmp_path: Path, breaks: str) -> None:
    made: list[Scripted] = []

    def handle(of: m.NodeSpec, incarnation: int) -> Scripted:
        made.append(one := Scripted(of, incarnation))
        if incarnation == 1:

            def broken(*_of: object) -> None:
                raise RuntimeError(f"no {breaks}")

            setattr(one, breaks, broken)
        return one

    with opened(tmp_path, handle) as cluster:
        with pytest.raises(RuntimeError, match=f"no {breaks}"):
            cluster.add_node(spec("n0"))
        assert made[0].killed and made[0].closed
        assert [(each.alive, each.reason) for each in cluster.nodes()] == [(False, f"it did not come up: no {breaks}")]
        cluster.add_node(spec("n0"))
        assert [each.alive for each in cluster.nodes()] == [True] and not made[1].killed


def test_what_a_node_says_that_was_given_up_is_not_taken_for_its_successors_word(tmp_path: Path) -> None:
    made: list[Scripted] = []

    def handle(of: m.NodeSpec, incarnation: int) -> Scripted:
        made.append(Scripted(of, incarnation))
        return made[-1]

    with opened(tmp_path, handle) as cluster, ThreadPoolExecutor(1) as others:
        cluster.add_node(spec("n0"))
        cluster.kill_node("n0")
        cluster.add_node(spec("n0"))
        deploying = others.submit(cluster.deploy, Deployment(m.ModelSpec(name="b", nbytes=1), "broken"))  # not answered by itself
        assert cluster.wait(lambda _: "b" in cluster._members._deploying, 20)
        old, new = made
        for answer in (node.Joined(7, "nowhere"), node.Registered("b", "another", Tier.DISK, 1, ()), node.OrderFailed("b", "StoreError", "no such file")):
            old._answer(answer, b"")
        cluster._loop.call(lambda: None)
        assert "b" in cluster._members._deploying and cluster._spreading._peers == {"n0": ""}
        new._answer(node.Registered("b", "one", Tier.DISK, 1, ()), b"")
        deploying.result(20)
        assert cluster._members.deployed["b"][1] == "one"


# What is deployed is on disk, or is not deployed


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """What stands in the way of the list of deployments."""
    place = tmp_path / "deployments.json.new"
    place.mkdir()
    yield place


def written(folder: Path) -> list[str]:
    return [each.spec.name for each in msgspec.json.decode((folder / "deployments.json").read_bytes(), type=list[Deployment])]


def test_a_model_that_cannot_be_written_down_is_not_deployed(cluster: LiveCluster, unwritable: Path) -> None:
    (handle,) = cluster._loop.carry.handles.values()
    assert isinstance(handle, Scripted)
    with pytest.raises(WriteError, match=r"b was not deployed.*cannot be written \(Is a directory\)"):
        cluster.deploy(Deployment(m.ModelSpec(name="b", nbytes=1), "somewhere"))
    assert [each.spec.name for each in cluster.models()] == ["a"] == written(cluster.folder)
    with pytest.raises(RefusedError, match="there is no model b"):
        cluster.submit(Ask("b", [1], 1))
    assert cluster.wait(lambda _: node.Forget("b") in handle.orders, 20) and "b" not in cluster._loop.controller.cluster.models
    with pytest.raises(WriteError, match="a was not deployed"):
        cluster.deploy(Deployment(m.ModelSpec(name="a", nbytes=2), "elsewhere"))
    assert [(each.spec.nbytes, each.source) for each in cluster.models()] == [(1, "somewhere")]
    assert [each.source for each in handle.orders if isinstance(each, node.Register) and each.model == "a"][-2:] == ["elsewhere", "somewhere"]
    unwritable.rmdir()
    cluster.deploy(Deployment(m.ModelSpec(name="b", nbytes=1), "somewhere"))
    assert written(cluster.folder) == ["a", "b"]


def test_a_model_whose_end_cannot_be_written_down_ends_and_that_is_written_later(cluster: LiveCluster, unwritable: Path, caplog: pytest.LogCaptureFixture) -> None:
    cluster.delete("a")
    assert not cluster.models() and written(cluster.folder) == ["a"]
    unwritable.rmdir()
    cluster._keeper.next_at = 0.0
    cluster.nodes()  # something happens, and it looks
    assert cluster.wait(lambda _: written(cluster.folder) == [], 20)
    assert sum("could not be resumed as it is now" in each.message for each in caplog.records) == 1


# Tokenizers


def test_tokenizers_are_as_many_as_models_and_no_more_than_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(prompts, "load_tokenizer", lambda source: read.append(source) or source)
    monkeypatch.setattr(prompts, "tokenize", lambda tokenizer, text: [1, 2])
    monkeypatch.setattr(prompts, "_MOST_TOKENIZERS", 2)
    with opened(tmp_path, Scripted) as cluster:
        cluster.add_node(spec("n0"))
        for name in "abcd":
            cluster.deploy(Deployment(m.ModelSpec(name=name, nbytes=1), name if name < "d" else "c"))
        for name in "abacab":
            cluster.submit(Ask(name, "a text", 1))
        assert read == ["a", "b", "c", "b"], "of those that were not asked last"
        assert list(cluster._prompts._tokenizers) == ["a", "b"]
        cluster.submit(Ask("d", "a text", 1))
        cluster.delete("b")
        cluster.delete("c")
        assert list(cluster._prompts._tokenizers) == ["c"], "d has the same"
        cluster.delete("d")
        cluster.deploy(Deployment(m.ModelSpec(name="a", nbytes=1), "elsewhere"))
        assert not cluster._prompts._tokenizers
