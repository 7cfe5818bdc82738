"""One instance on its node: its orders one after the other, each climb rung by rung. Part of `agent`; chapter 08."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Protocol

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.adapted import AdaptedModels
from sllm_mini.cluster.nodes.devices import Devices
from sllm_mini.cluster.nodes.fetching import Fetching
from sllm_mini.cluster.nodes.loads import Load
from sllm_mini.cluster.nodes.pipelines import begin_stages, pipeline_elsewhere, pipeline_here
from sllm_mini.cluster.nodes.rung_memory import RungMemory
from sllm_mini.cluster.nodes.worker_messages import ClimbRung, Last, Rung
from sllm_mini.cluster.nodes.workers import Launcher, WorkerHandle
from sllm_mini.errors import SllmError, WireError
from sllm_mini.inference.turns import Turns
from sllm_mini.storage import Store
from sllm_mini.storage.holdings import Lease
from sllm_mini.types import Tier, Warmth

log = logging.getLogger("sllm_mini.cluster")


class Home(Protocol):
    """What a lane needs of the agent it is in; see `NodeAgent`."""

    name: str
    incarnation: int
    options: NodeOptions
    key: bytes
    store: Store
    store_address: str
    launcher: Launcher
    devices: Devices
    memory: RungMemory
    loads: Turns
    fetching: Fetching
    adapted: AdaptedModels
    join: node.Join | None

    @property
    def ended(self) -> bool: ...

    def address(self, name: str) -> str: ...

    def answer(self, answer: node.NodeAnswer) -> None: ...

    def tier(self, model: str) -> Tier: ...

    def forget(self, lane: Lane) -> None: ...


class Lane:
    """See the module. Its thread ends with the instance."""

    def __init__(self, agent: Home, instance: int) -> None:
        self.instance = instance
        self.orders: queue.SimpleQueue[tuple[node.NodeOrder, bytes] | None] = queue.SimpleQueue()
        self.ended = False
        self.model = ""
        """Whose weights it has, or is about to."""
        self._agent = agent
        self._epoch = -1
        self._launches = 0
        """A number for each worker, so that the end of an earlier one is not taken for that of this one."""
        self._worker: WorkerHandle | None = None
        self._lease: Lease | None = None
        """Of a worker that attaches nothing itself: its engine is not of a model's."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"sllm-lane-{instance}", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Its worker is no more; nothing is said of it."""
        self.orders.put(None)
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """Likewise, but its worker sends what it has computed, and is waited for."""
        self.orders.put(None)
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.close()

    def wait(self) -> None:
        """Until its thread has ended, which a load may hold up: the store is closed before."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self.ended and (given := self.orders.get()) is not None and not self._agent.ended:
                order, payload = given
                try:
                    self._do(order, payload)
                except Exception as error:  # noqa: BLE001 - a lane that ended without a word would leave its instance climbing for ever
                    self._lost(node.reason_of(error))
        finally:
            self._give_back()
            self._agent.forget(self)

    def _do(self, order: node.NodeOrder, payload: bytes) -> None:
        if isinstance(order, node.Climb | node.Fall):
            if order.epoch < self._epoch or (order.epoch == self._epoch and isinstance(order, node.Climb)):
                return  # it has heard later, or this
            self._epoch = order.epoch
        if isinstance(order, node.Climb):
            self._climb(order)
        elif isinstance(order, node.Fall):
            self._fall(order.warmth)
        elif isinstance(order, node.Run):
            self._begin(order, payload)
        elif isinstance(order, node.Drop):
            if self._worker is not None:
                self._worker.drop(order.request_id, order.register_epoch)
        elif isinstance(order, node.Move):
            threading.Thread(target=self._move, args=(order, self._worker), name=f"sllm-move-{self.instance}", daemon=True).start()

    # Up and down

    def _climb(self, order: node.Climb) -> None:
        agent, rungs = self._agent, list[Rung]()
        self.model = order.model if order.target >= Warmth.DRAM else ""
        agent.devices.take(self.instance, order.devices)
        if self._worker is None:
            if order.warmth > Warmth.COLD:
                raise SllmError(f"instance {self.instance} is not there to climb from {order.warmth}")
            rungs.append(self._launch(order.target))
        load: Load | None = None
        for warmth in map(Warmth, range(max(order.warmth, Warmth.PROCESS) + 1, order.target + 1)):
            if warmth == Warmth.DRAM:
                load = Load(agent, order)
                rungs.append(self._attach(order, load))
            elif warmth == Warmth.READY and load is not None:
                rungs.append(self._serve(order, load))
            else:
                rungs.append(self._rung(order, warmth))
        if load is not None and order.overlap and order.target == Warmth.READY and not load.over and not pipeline_elsewhere(self._agent, order):
            agent.answer(node.Serves(self.instance, order.epoch, load.tier, self._address()))
            threading.Thread(target=self._follow, args=(order, load, rungs), name=f"sllm-follow-{self.instance}", daemon=True).start()
        else:
            if load is not None:
                load.wait()
            agent.answer(self._reached(order, load, rungs))

    def _reached(self, order: node.Climb, load: Load | None, rungs: list[Rung]) -> node.Reached:
        moved = (order.tier, 0.0, 0.0) if load is None else (load.tier, load.queued_seconds, load.seconds)
        return node.Reached(self.instance, order.epoch, *moved, rungs, self._address() if order.target == Warmth.READY else "")

    def _attach(self, order: node.Climb, load: Load) -> Rung:
        """The worker maps the weights, or reads them itself where the store has no room."""
        try:
            lease = load.lend()
            rung = self._rung(order, Warmth.DRAM, overlap=order.overlap and lease is not None)
        except BaseException:
            if load.lease is not None:
                load.lease.close()
            raise
        finally:
            load.attached()
        if lease is not None and self._agent.options.engine:
            self._lease = lease
        elif lease is not None:
            lease.close()
        return rung

    def _serve(self, order: node.Climb, load: Load) -> Rung:
        """READY: where its plan has nodes serve the model together, as one of them, until the model is whole here."""
        if self._worker is not None and not load.over:
            begin_stages(self._agent, order, self._worker)
            last = pipeline_here(self._agent, order, lambda: load.over)
            if last is not None:
                try:
                    return self._rung(order, Warmth.READY, last=last)
                except SllmError:  # a stage is gone; its own bytes come anyway
                    if self._worker.gone:
                        raise
        return self._rung(order, Warmth.READY)

    def _follow(self, order: node.Climb, load: Load, rungs: list[Rung]) -> None:
        """It serves; its last byte is waited for beside that."""
        try:
            load.wait()
        except Exception as error:  # noqa: BLE001 - its climb would never be over
            if order.epoch == self._epoch:  # else it has let go of the weights, or will meet the error when it climbs again
                self._lost(node.reason_of(error))
                self.orders.put(None)
        else:
            self._agent.answer(self._reached(order, load, rungs))

    def _rung(self, order: node.Climb, warmth: Warmth, *, overlap: bool = False, last: Last | None = None) -> Rung:
        agent, options = self._agent, self._agent.options
        join, worker = agent.join, self._worker
        if join is None or worker is None or agent.ended:
            raise SllmError(f"instance {self.instance} was ended while it climbed")
        measure = agent.memory.due(order.model, warmth, last=warmth == order.target)
        climbed = worker.climb(
            ClimbRung(
                warmth, agent.adapted.stored(order.model), agent.store_address, device=f"cuda:{order.devices[0]}" if options.cuda and order.devices else "cpu",
                digest=agent.adapted.digest(order.model), adapter=agent.adapted.adapter(order.model), owner=node.owner_name(join.run, agent.name, agent.incarnation, self.instance, order.epoch),
                address=agent.address(f"moves-{self.instance}.{order.epoch}"), key=agent.key, arbiter=join.arbiter, threads=options.threads, max_batch=order.max_batch, pace_seconds=options.pace_seconds, interval_seconds=options.stream_interval_seconds,
                overlap=overlap, last=last, measure=measure,
            )
        )  # fmt: skip
        return agent.memory.told(order.model, climbed, measured=measure)

    def _launch(self, target: Warmth) -> Rung:
        agent = self._agent
        self._launches += 1
        launch = self._launches
        measure = agent.memory.due("", Warmth.PROCESS, last=target <= Warmth.PROCESS)
        worker = agent.launcher.launch(f"{agent.name}.{agent.incarnation}-{self.instance}", lambda why: self._died(launch, why), measure=measure)
        with self._lock:
            self._worker = worker
        if agent.ended or worker.gone:
            worker.kill()
            raise SllmError(f"the worker of instance {self.instance} ended as soon as it was there")
        worker.watch(agent.options.silent_seconds, agent.options.stuck_seconds)
        return agent.memory.told("", worker.launched, measured=measure)

    def _died(self, launch: int, why: str) -> None:
        """The worker is gone; called on a thread of its own."""
        if launch == self._launches:
            self._lost(why)
            self.orders.put(None)

    def _fall(self, warmth: Warmth) -> None:
        worker = self._worker
        if worker is not None and warmth >= Warmth.RUNTIME:
            worker.fall(warmth)
        elif worker is not None:
            self._launches += 1  # its end is no loss
            worker.close()  # a process cannot forget what it has imported
            with self._lock:
                self._worker = None
        if warmth < Warmth.DRAM:
            self.model = ""
            self._end_lease()
        if warmth < Warmth.DEVICE:
            self._agent.devices.free(self.instance)
        if warmth == Warmth.PROCESS:
            self._launch(warmth)
        self.ended = warmth == Warmth.COLD

    # Requests

    def _begin(self, order: node.Run, payload: bytes) -> None:
        if self._worker is None:
            return  # its loss is told
        try:
            self._worker.run(payload, order.register_epoch)
        except WireError as error:  # it is not the request that failed
            self._lost(str(error))
        except SllmError as error:
            self._agent.answer(node.RunFailed(order.request_id, order.register_epoch, type(error).__name__, node.reason_of(error)))

    def _move(self, order: node.Move, worker: WorkerHandle | None) -> None:
        begun = time.monotonic()
        try:
            if worker is None:
                raise SllmError("its worker is gone")
            report = worker.move(order.request_id, order.address, mode=order.mode, target_gap_tokens=order.target_gap_tokens)
        except Exception as error:  # noqa: BLE001 - a move without an end would hold its request for ever
            if not isinstance(error, SllmError):
                log.warning("the move of request %s failed, and it stays where it is: %s", order.request_id, node.reason_of(error))
            self._agent.answer(node.Moved(order.request_id, order.epoch, "stayed", time.monotonic() - begun))
        else:
            self._agent.answer(node.Moved(order.request_id, order.epoch, report.outcome, time.monotonic() - begun, report))

    # Ends

    def _lost(self, why: str) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = True
            worker = self._worker
        if worker is not None:
            worker.kill()
        self._agent.answer(node.Lost(self.instance, max(self._epoch, 0), why[:8000] or "it ended"))

    def _give_back(self) -> None:
        self._end_lease()
        self._agent.devices.free(self.instance)

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def _address(self) -> str:
        """Where its worker takes moves in; nothing where that has just gone, which is told next."""
        worker = self._worker
        return "" if worker is None else worker.address
