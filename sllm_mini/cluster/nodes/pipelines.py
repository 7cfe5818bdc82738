"""A plan's pipeline as a node's agent sees it: the layers that workers here serve, and whether requests may come here yet. Part of `lanes`; chapter 10.

Who runs what comes with the plan (`node.Fetch.stages`), where each stage serves with `node.Pipeline`. Nobody waits longer than for the model itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.fetching import Fetching, Way
from sllm_mini.cluster.nodes.worker_messages import Last
from sllm_mini.cluster.nodes.workers import WorkerHandle
from sllm_mini.errors import SllmError

_LOOK_SECONDS = 0.05
log = logging.getLogger("sllm_mini.cluster")


class StageHome(Protocol):
    """What is needed of the agent; see `NodeAgent`."""

    key: bytes
    fetching: Fetching

    @property
    def ended(self) -> bool: ...

    def address(self, name: str) -> str: ...

    def answer(self, answer: node.NodeAnswer) -> None: ...


def begin_stages(home: StageHome, order: node.Climb, worker: WorkerHandle) -> None:
    """The worker serves the layers that the plan has this node serve, as soon as their bytes are there; the driver is told where. Returns at once."""
    way = home.fetching.known(order.plan)
    for number in () if way is None else way.mine:
        threading.Thread(target=_stage, args=(home, order, worker, way, number), name=f"sllm-stage-{order.instance}", daemon=True).start()


def pipeline_here(home: StageHome, order: node.Climb, over: Callable[[], bool]) -> Last | None:
    """The last stage where that is here, once those before it serve; None where it is not, or the node's own load is `over` before."""
    way = home.fetching.known(order.plan)
    while way is not None and way.last and not over() and not home.ended:
        if way.joined.wait(_LOOK_SECONDS):
            stage = way.stages[-1]
            return Last(stage.start, stage.stop, tuple(way.addresses))
    return None


def pipeline_elsewhere(home: StageHome, order: node.Climb) -> bool:
    """Whether requests go to another node of the plan as long as the model is not whole here."""
    way = home.fetching.known(order.plan)
    return way is not None and bool(way.stages) and not way.last


def _stage(home: StageHome, order: node.Climb, worker: WorkerHandle, way: Way, number: int) -> None:
    stage, last = way.stages[number], number == len(way.stages) - 1
    try:
        address = "" if last else home.address(f"stage-{order.instance}.{order.epoch}.{number}")
        address = worker.stage(stage.start, stage.stop, address, home.key)
    except SllmError as error:  # who waits for it begins when the model is whole there
        log.info("layers %d to %d of %s are not served from here: %s", stage.start, stage.stop, order.model, error)
        return
    if not last:
        home.answer(node.Staged(order.plan, number, address))
