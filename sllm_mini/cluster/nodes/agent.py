"""One machine of a live cluster: its store, its workers, and their way up and down the warmth ladder. Explained in chapter 08.

The agent says which worker climbs which rung and when; the worker does it and measures it. The agent loads and the worker maps: it
lends the model from its store, waits for the last byte, and keeps the lease until the worker has its own. What must be moved
for that waits its turn, one load at a time, as the controller's estimates have it; what lies in memory takes no turn.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.lanes import Devices, Lane
from sllm_mini.cluster.nodes.workers import Launcher
from sllm_mini.errors import SllmError
from sllm_mini.inference.turns import Turns
from sllm_mini.storage import Store, StoreServer
from sllm_mini.storage import messages as stored
from sllm_mini.types import Tier

TIERS = {"remote": Tier.REMOTE, "disk": Tier.DISK, "dram": Tier.DRAM}
"""What a store calls its places; a GPU's is its own name."""


class NodeAgent:
    """See the module. A `NodeHandle` where it is called, and what stands behind one where it is spoken to over a channel. `give` returns
    at once. `launcher`, and the store it makes in `folder`, end with it. Safe from several threads. Raises what a store raises."""

    def __init__(self, name: str, incarnation: int, launcher: Callable[[Store], Launcher], options: NodeOptions, folder: Path) -> None:
        self.name, self.incarnation, self.options, self.folder = name, incarnation, options, folder
        self.devices, self.loads = Devices(), Turns()
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder / "store", dram_nbytes=options.store_dram_nbytes, disk_nbytes=options.store_disk_nbytes, policy=options.eviction)
        try:
            self._server = StoreServer(self.store, folder / "store.sock")
            self.store_address = self._server.address
            self.launcher = launcher(self.store)
        except BaseException:
            self.store.close()
            raise
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        self._ending: list[Lane] = []
        self._ended, self._freed = threading.Event(), threading.Event()
        self._on_answer: Callable[[node.NodeAnswer, bytes], None] = lambda _answer, _payload: None
        self._on_gone: Callable[[str], None] = lambda _why: None
        self._registering: queue.SimpleQueue[node.Register | None] = queue.SimpleQueue()
        self._registrar = threading.Thread(target=self._register_all, name=f"sllm-register-{name}", daemon=True)
        self._registrar.start()
        self._stop_listening = self.store.listen(self._happened)
        self.join: node.Join | None = None

    # A handle

    def open(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        """From now on its answers are told, from any thread."""
        self._on_answer, self._on_gone = on_answer, on_gone

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None:
        """Takes an order; never waits, never raises."""
        if self._ended.is_set():
            return
        if isinstance(order, node.Join):
            self.join = order
            self.answer(node.Joined(os.getpid()))
        elif isinstance(order, node.Register):
            self._registering.put(order)
        else:
            with self._lock:
                lane = self._lanes.get(order.instance)
                if lane is None or lane.ended:
                    lane = self._lanes[order.instance] = Lane(self, order.instance)
            lane.orders.put((order, payload))

    def answer(self, answer: node.NodeAnswer) -> None:
        """Tells the driver; nothing once it was killed or closed."""
        if not self._ended.is_set():
            self._on_answer(answer, b"")

    def kill(self) -> None:
        """As a machine that fails: nothing more is said, and its workers are no more."""
        if self._end(lambda lane: lane.kill()):
            self._on_gone("it was killed")
            threading.Thread(target=self._free, name=f"sllm-free-{self.name}", daemon=True).start()

    def close(self) -> None:
        """Ends its workers, and gives back what it holds. Safe to call twice."""
        if self._end(lambda lane: lane.close()):
            self._free()
        self._freed.wait()

    # Of its lanes

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def tier(self, model: str) -> Tier:
        """The fastest that has all of the model here. Raises StoreError for one that is not registered."""
        found = next((each for each in self.store.models() if each.name == model), None)
        if found is None:
            raise SllmError(f"no model is registered as {model!r} on {self.name}; deploy it first")
        whole = [TIERS.get(place.place, Tier.DEVICE) for place in found.places if not place.loading and place.nbytes >= found.nbytes]
        return max(whole, default=Tier.REMOTE if "://" in found.source else Tier.DISK)

    def forget(self, lane: Lane) -> None:
        """It has ended."""
        with self._lock:
            if self._lanes.get(lane.instance) is lane:
                del self._lanes[lane.instance]

    # Parts

    def _register_all(self) -> None:
        while (order := self._registering.get()) is not None:
            try:
                self.store.register(order.model, order.source)
                self.answer(node.Registered(order.model, self.store.digest(order.model), self.tier(order.model)))
            except (SllmError, OSError) as error:
                self.answer(node.OrderFailed(order.model, type(error).__name__, str(error)[:8000]))

    def _happened(self, happened: stored.Happened) -> None:
        if happened.what in ("loaded", "evicted") and happened.place in TIERS:
            self.answer(node.Stored(happened.name, TIERS[happened.place], happened.what == "loaded"))

    def _end(self, how: Callable[[Lane], None]) -> bool:
        with self._lock:
            if self._ended.is_set():
                return False
            self._ended.set()
            lanes = self._ending = list(self._lanes.values())
        self.devices.end()
        self._registering.put(None)
        ending = [threading.Thread(target=how, args=(lane,), name=f"sllm-end-{lane.instance}") for lane in lanes]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        return True

    def _free(self) -> None:
        self.launcher.close()
        self._stop_listening()
        self._server.close()
        self.store.close()  # ends loads that lanes wait for
        self._registrar.join()
        for lane in self._ending:
            lane.wait()
        self._freed.set()

