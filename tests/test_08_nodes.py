"""Chapter 08: a node's agent, called in process, with launchers and workers that do what they should not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth

SECONDS = 20.0


class BrokenWorker:
    """A worker that raises, at READY, what nobody expects."""

    gone = False
    pid = 1
    launched = Rung(Warmth.PROCESS, 0.0, 0, 0)

    def __init__(self) -> None:
        self.killed = threading.Event()

    def climb(self, order: Any) -> Rung:
        if order.warmth is Warmth.READY:
            raise ValueError("no such shape")
        return Rung(order.warmth, 0.0, 0, 0)

    def kill(self) -> None:
        self.killed.set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


class Launches:
    def __init__(self, worker: BrokenWorker | None) -> None:
        self._worker = worker

    def launch(self, name: str, on_death: Callable[[str], None]) -> BrokenWorker:
        if self._worker is None:
            raise RuntimeError("can't start new thread")
        return self._worker

    def close(self) -> None:
        pass


@pytest.mark.parametrize("worker", [None, BrokenWorker()], ids=["the launcher", "the worker"])
def test_whatever_goes_wrong_in_a_climb_the_instance_is_lost_with_the_reason(worker: BrokenWorker | None, tmp_path: Path) -> None:
    source = convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny").path
    heard: list[node.NodeAnswer] = []
    lost, registered = threading.Event(), threading.Event()

    def hear(answer: node.NodeAnswer, _payload: bytes) -> None:
        heard.append(answer)
        (lost if isinstance(answer, node.Lost) else registered if isinstance(answer, node.Registered) else threading.Event()).set()

    agent = NodeAgent("n", 1, lambda _store: Launches(worker), NodeOptions(store_dram_nbytes=1 << 26), tmp_path / "node")  # type: ignore[arg-type, return-value]
    try:
        agent.open(hear, lambda _why: None)
        agent.give(node.Join("n", 1, "run", str(tmp_path / "arbiter")))
        agent.give(node.Register("tiny", str(source)))
        assert registered.wait(SECONDS)
        agent.give(node.Climb(7, 1, "tiny", Warmth.COLD, Warmth.READY, Tier.DISK, [0]))
        assert lost.wait(SECONDS), heard
        (answer,) = [each for each in heard if isinstance(each, node.Lost)]
        assert (answer.instance, answer.epoch) == (7, 1) and ("can't start new thread" in answer.reason or "no such shape" in answer.reason)
        assert worker is None or worker.killed.wait(SECONDS)
    finally:
        agent.close()
