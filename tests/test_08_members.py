"""Which nodes belong, seen from handles that answer as told: weights that differ, a deployment that fails while a node joins. Chapter 08."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.control import messages as m
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier

DIGESTS = {"n0": "one", "n1": "another", "n2": "one"}


class Scripted:
    """A node's handle, without a node: joins at once, and answers to a registration what `DIGESTS` says of its name, or that it failed."""

    def __init__(self, spec: m.NodeSpec, incarnation: int) -> None:
        self.name, self.incarnation, self.killed = spec.name, incarnation, False
        self._answer: Callable[[Any, bytes], None] = lambda *_: None

    def open(self, answered: Callable[[Any, bytes], None], gone: Callable[[str], None]) -> None:
        self._answer = answered

    def give(self, order: Any, payload: bytes = b"") -> None:
        if isinstance(order, node.Join):
            self._answer(node.Joined(1, ""), b"")
        elif isinstance(order, node.Register) and order.source != "broken":
            self._answer(node.Registered(order.model, DIGESTS[self.name], Tier.DISK, 1, ()), b"")
        elif isinstance(order, node.Register) and self.name == "n2":
            self._answer(node.OrderFailed(order.model, "StoreError", "it cannot be read"), b"")

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        pass


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


@pytest.mark.parametrize(
    ("model", "source"), [(m.ModelSpec(name="b", nbytes=1), ""), (m.ModelSpec(name="b", nbytes=1), "x" * 5000), (m.ModelSpec(name="b" * 1025, nbytes=1), "x"), (m.ModelSpec(name="b", nbytes=1, concurrency=5000), "x")]
)
def test_what_no_message_to_a_node_carries_is_refused_before_any_is_sent(model: m.ModelSpec, source: str) -> None:
    """Else each node would be given up for a frame that it cannot be sent."""
    with pytest.raises(ValueError, match="give 1 to"):
        Deployment(model, source)
