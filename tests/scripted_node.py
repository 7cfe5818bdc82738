"""A node without a store, for tests of the driver: real workers around doubles of engines, and only what a handle must do."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.worker_messages import ClimbRung, Rung
from sllm_mini.cluster.nodes.workers import Launcher, WorkerHandle
from sllm_mini.control.messages import NodeSpec
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth

Answered = Callable[[node.NodeAnswer, bytes], None]


class ScriptedNode:
    """A `NodeHandle`. `climb_seconds` is slept in each climb; `broken` models do not climb."""

    def __init__(self, spec: NodeSpec, incarnation: int, launcher: Launcher, *, climb_seconds: float = 0.0, broken: frozenset[str] = frozenset()) -> None:
        self.name, self.incarnation, self.spec = spec.name, incarnation, spec
        self._launcher, self._broken, self._seconds = launcher, broken, climb_seconds
        self._lanes: dict[int, Lane] = {}
        self._cached: set[str] = set()
        self.orders: list[node.NodeOrder] = []
        self.gone = threading.Event()
        self.join: node.Join | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="sllm-scripted-"))

    def open(self, on_answer: Answered, on_gone: Callable[[str], None]) -> None:
        self._on_answer, self._on_gone = on_answer, on_gone

    def answer(self, answer: node.NodeAnswer) -> None:
        if not self.gone.is_set():
            self._on_answer(answer, b"")

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None:
        self.orders.append(order)
        if self.gone.is_set():
            return
        if isinstance(order, node.Join):
            self.join = order
            self.answer(node.Joined(os.getpid()))
        elif isinstance(order, node.Register):
            self.answer(node.Registered(order.model, f"digest-of-{order.model}", Tier.DISK))
        else:
            if order.instance not in self._lanes:
                self._lanes[order.instance] = Lane(self, order.instance)
            self._lanes[order.instance].orders.put((order, payload))

    def kill(self) -> None:
        if not self.gone.is_set():
            self.gone.set()
            self._end(lambda worker: worker.kill())
            self._on_gone("it was killed")

    def close(self) -> None:
        self.gone.set()
        self._end(lambda worker: worker.close())
        self._launcher.close()

    def _end(self, how: Callable[[WorkerHandle], None]) -> None:
        for lane in list(self._lanes.values()):
            lane.orders.put(None)
            if lane.worker is not None:
                how(lane.worker)


class Lane:
    """One instance: its orders one after the other, moves beside them."""

    def __init__(self, home: ScriptedNode, instance: int) -> None:
        self.home, self.instance = home, instance
        self.orders: queue.SimpleQueue[tuple[node.NodeOrder, bytes] | None] = queue.SimpleQueue()
        self.worker: WorkerHandle | None = None
        self.epoch = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (given := self.orders.get()) is not None and not self.home.gone.is_set():
            order, payload = given
            if isinstance(order, node.Climb):
                self.epoch = order.epoch
                try:
                    self.home.answer(self._climb(order))
                except SllmError as error:
                    self._died(str(error))
            elif isinstance(order, node.Fall):
                self._fall(order)
            elif self.worker is not None:
                self._serve(order, payload, self.worker)

    def _climb(self, order: node.Climb) -> node.Reached:
        join, rungs, home = self.home.join, list[Rung](), self.home
        assert join is not None
        if order.model in home._broken:
            raise SllmError("it is broken")
        if self.worker is None:
            self.worker = home._launcher.launch(f"{home.name}-{self.instance}", self._died)
            rungs.append(self.worker.launched)
        home.gone.wait(home._seconds)
        owner = node.owner_name(join.run, home.name, home.incarnation, self.instance, order.epoch)
        address = str(home._folder / f"{self.instance}.{order.epoch}")
        for rung in range(max(order.warmth, Warmth.PROCESS) + 1, order.target + 1):
            rungs.append(
                self.worker.climb(ClimbRung(Warmth(rung), order.model, digest=f"digest-of-{order.model}", owner=owner, address=address, arbiter=join.arbiter, pace_seconds=0.003))
            )
        tier = Tier.DRAM if order.model in home._cached else order.tier
        if order.target >= Warmth.DRAM and order.model not in home._cached:
            home._cached.add(order.model)
            home.answer(node.Stored(order.model, Tier.DRAM, True))
        return node.Reached(self.instance, order.epoch, tier, 0.0, 0.0, rungs, address)

    def _fall(self, order: node.Fall) -> None:
        self.epoch = order.epoch
        if self.worker is None:
            return
        if order.warmth >= Warmth.RUNTIME:
            self.worker.fall(order.warmth)
            return
        self.worker.close()
        self.worker = None
        if order.warmth == Warmth.PROCESS:
            self.worker = self.home._launcher.launch(f"{self.home.name}-{self.instance}", self._died)

    def _serve(self, order: node.NodeOrder, payload: bytes, worker: WorkerHandle) -> None:
        if isinstance(order, node.Run):
            try:
                worker.run(payload, order.register_epoch)
            except SllmError as error:
                self.home.answer(node.RunFailed(order.request_id, order.register_epoch, type(error).__name__, str(error)))
        elif isinstance(order, node.Drop):
            worker.drop(order.request_id, order.register_epoch)
        elif isinstance(order, node.Move):
            threading.Thread(target=self._move, args=(order, worker), daemon=True).start()

    def _move(self, order: node.Move, worker: WorkerHandle) -> None:
        try:
            report = worker.move(order.request_id, order.address, mode=order.mode, target_gap_tokens=order.target_gap_tokens)
        except SllmError:
            self.home.answer(node.Moved(order.request_id, order.epoch, "stayed", 0.0))
        else:
            self.home.answer(node.Moved(order.request_id, order.epoch, report.outcome, sum(phase.end - phase.start for phase in report.phases), report))

    def _died(self, why: str) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.kill()
        self.home.answer(node.Lost(self.instance, self.epoch, why))
