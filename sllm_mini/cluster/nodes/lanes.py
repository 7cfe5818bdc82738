"""One instance on its node: its orders one after the other, each climb rung by rung. Part of `agent`; chapter 08."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.worker_messages import ClimbRung, Rung
from sllm_mini.cluster.nodes.workers import Launcher, WorkerHandle
from sllm_mini.errors import SllmError, WireError
from sllm_mini.inference.turns import Turns
from sllm_mini.storage import Store
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.types import Tier, Warmth


class Devices:
    """Who has which device. A climb waits for the falls that free its devices, which are on their way. Safe from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owners: dict[int, int] = {}
        self._ended = False

    def take(self, instance: int, devices: Sequence[int]) -> None:
        """Waits until they are free, or the instance's. Raises SllmError once all has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or all(self._owners.get(device, instance) == instance for device in devices))
            if self._ended:
                raise SllmError("the node has ended")
            self._owners |= dict.fromkeys(devices, instance)

    def free(self, instance: int) -> None:
        with self._changed:
            self._owners = {device: owner for device, owner in self._owners.items() if owner != instance}
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Home(Protocol):
    """What a lane needs of the agent it is in; see `NodeAgent`."""

    name: str
    incarnation: int
    options: NodeOptions
    folder: Path
    store: Store
    store_address: str
    launcher: Launcher
    devices: Devices
    loads: Turns
    join: node.Join | None

    @property
    def ended(self) -> bool: ...

    def answer(self, answer: node.NodeAnswer) -> None: ...

    def tier(self, model: str) -> Tier: ...

    def forget(self, lane: Lane) -> None: ...


class Lane:
    """See the module. Its thread ends with the instance."""

    def __init__(self, agent: Home, instance: int) -> None:
        self.instance = instance
        self.orders: queue.SimpleQueue[tuple[node.NodeOrder, bytes] | None] = queue.SimpleQueue()
        self.ended = False
        self._agent = agent
        self._epoch = 0
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
                except (SllmError, OSError) as error:
                    self._lost(str(error))
                except Exception as error:  # noqa: BLE001 - a lane that ended without a word would leave its instance climbing for ever
                    self._lost(f"{type(error).__name__}: {error}")
        finally:
            self._give_back()
            self._agent.forget(self)

    def _do(self, order: node.NodeOrder, payload: bytes) -> None:
        if isinstance(order, node.Climb | node.Fall):
            if order.epoch < self._epoch:
                return
            self._epoch = order.epoch
        if isinstance(order, node.Climb):
            self._agent.answer(self._climb(order))
        elif isinstance(order, node.Fall):
            self._fall(order.warmth)
        elif isinstance(order, node.Run):
            self._begin(order, payload)
        elif isinstance(order, node.Drop):
            if self._worker is not None:
                self._worker.drop(order.request_id)
        elif isinstance(order, node.Move):
            threading.Thread(target=self._move, args=(order, self._worker), name=f"sllm-move-{self.instance}", daemon=True).start()

    # Up and down

    def _climb(self, order: node.Climb) -> node.Reached:
        agent, rungs = self._agent, list[Rung]()
        agent.devices.take(self.instance, order.devices)
        if self._worker is None:
            if order.warmth > Warmth.COLD:
                raise SllmError(f"instance {self.instance} is not there to climb from {order.warmth}")
            rungs.append(self._launch())
        tier, queued_seconds, load_seconds = order.tier, 0.0, 0.0
        for warmth in map(Warmth, range(max(order.warmth, Warmth.PROCESS) + 1, order.target + 1)):
            if warmth == Warmth.DRAM:
                tier, queued_seconds, load_seconds, rung = self._load(order)
                rungs.append(rung)
            else:
                rungs.append(self._rung(order, warmth))
        return node.Reached(self.instance, order.epoch, tier, queued_seconds, load_seconds, rungs, self._address(order.epoch) if order.target == Warmth.READY else "")

    def _load(self, order: node.Climb) -> tuple[Tier, float, float, Rung]:
        """The weights into memory, and the worker onto them: from where, how long they waited and moved, and the rung."""
        agent = self._agent
        asked = time.monotonic()
        with self._turn(agent.tier(order.model) < Tier.DRAM):
            begun = time.monotonic()
            lease = agent.store.lend(order.model, DRAM)
            if not isinstance(lease, Lease):  # no room: the worker reads it into memory of its own
                rung = self._rung(order, Warmth.DRAM)
                return (Tier.REMOTE if "://" in lease.source else Tier.DISK), begun - asked, time.monotonic() - begun, rung
            try:
                lease.arriving.wait()
                moved = time.monotonic()
            except BaseException:
                lease.close()
                raise
        try:
            rung = self._rung(order, Warmth.DRAM)
        except BaseException:
            lease.close()
            raise
        found = {"remote": Tier.REMOTE, "disk": Tier.DISK}.get(lease.found_in, Tier.DRAM)
        if agent.options.engine:
            self._lease = lease
        else:
            lease.close()
        return found, begun - asked, moved - begun, rung

    @contextmanager
    def _turn(self, moves: bool) -> Iterator[None]:
        if not moves:
            yield
            return
        with self._agent.loads:
            yield

    def _rung(self, order: node.Climb, warmth: Warmth) -> Rung:
        agent, options = self._agent, self._agent.options
        join, worker = agent.join, self._worker
        if join is None or worker is None or agent.ended:
            raise SllmError(f"instance {self.instance} was ended while it climbed")
        return worker.climb(
            ClimbRung(
                warmth, order.model, agent.store_address, device=f"cuda:{order.devices[0]}" if options.cuda and order.devices else "cpu",
                digest=agent.store.digest(order.model), owner=node.owner_name(join.run, agent.name, agent.incarnation, self.instance, order.epoch),
                address=self._address(order.epoch), arbiter=join.arbiter, threads=options.threads, max_batch=order.max_batch, pace_seconds=options.pace_seconds,
            )
        )  # fmt: skip

    def _launch(self) -> Rung:
        agent = self._agent
        self._launches += 1
        launch = self._launches
        worker = agent.launcher.launch(f"{agent.name}.{agent.incarnation}-{self.instance}", lambda why: self._died(launch, why))
        with self._lock:
            self._worker = worker
        if agent.ended or worker.gone:
            worker.kill()
            raise SllmError(f"the worker of instance {self.instance} ended as soon as it was there")
        worker.watch(agent.options.silent_seconds, agent.options.stuck_seconds)
        return worker.launched

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
            self._end_lease()
        if warmth < Warmth.DEVICE:
            self._agent.devices.free(self.instance)
        if warmth == Warmth.PROCESS:
            self._launch()
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
            self._agent.answer(node.RunFailed(order.request_id, order.register_epoch, type(error).__name__, str(error)[:8000]))

    def _move(self, order: node.Move, worker: WorkerHandle | None) -> None:
        begun = time.monotonic()
        try:
            if worker is None:
                raise SllmError("its worker is gone")
            report = worker.move(order.request_id, order.address, mode=order.mode, target_gap_tokens=order.target_gap_tokens)
        except SllmError:
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
        self._agent.answer(node.Lost(self.instance, self._epoch, why[:8000] or "it ended"))

    def _give_back(self) -> None:
        self._end_lease()
        self._agent.devices.free(self.instance)

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def _address(self, epoch: int) -> str:
        return str(self._agent.folder / f"moves-{self.instance}.{epoch}")
