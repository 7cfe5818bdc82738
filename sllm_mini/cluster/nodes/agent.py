"""One machine of a live cluster: its store, its workers, and their way up and down the warmth ladder. Explained in chapter 08.

The agent says which worker climbs which rung and when; the worker does it and measures it. The agent loads and the worker maps: it
lends the model from its store, waits for the last byte, and keeps the lease until the worker has its own. What must be moved
for that waits its turn, one load at a time, as the controller's estimates have it; what lies in memory takes no turn.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

from msgspec import structs

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.adapted import AdaptedModels
from sllm_mini.cluster.nodes.devices import Devices
from sllm_mini.cluster.nodes.fetching import Fetching
from sllm_mini.cluster.nodes.lanes import Lane
from sllm_mini.cluster.nodes.rung_memory import RungMemory
from sllm_mini.cluster.nodes.workers import Launcher
from sllm_mini.errors import StoreError
from sllm_mini.inference.turns import Turns
from sllm_mini.storage import Store, StoreServer
from sllm_mini.storage import messages as stored
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.storage.sources import DISK
from sllm_mini.types import Tier
from sllm_mini.wire import get_key
from sllm_mini.wire.tcp import join_address

TIERS = {"remote": Tier.REMOTE, "disk": Tier.DISK, "dram": Tier.DRAM}
"""What a store calls its places; a GPU's is its own name."""
_PLACES: dict[Tier | None, str] = {tier: place for place, tier in TIERS.items() if tier is not Tier.REMOTE}
_FORGET_SECONDS = 0.2
"""How often a model is tried again that should be dropped and is in use."""
_HANDOVER_SECONDS = 5.0
"""How long the store of a node's old self is waited for."""

log = logging.getLogger("sllm_mini.cluster")


class NodeAgent:
    """See the module. A `NodeHandle` where it is called, and what stands behind one where it is spoken to over a channel. `give` returns
    at once. `launcher`, and the store it makes in `folder`, end with it; the next incarnation finds there what the store had on disk.
    With `host`, an address of this machine, other nodes reach its workers over TCP; the process has a key then (`wire.set_key`). Safe from
    several threads. Raises what a store raises, StoreError where the one before has not given it back for some seconds."""

    def __init__(self, name: str, incarnation: int, launcher: Callable[[Store], Launcher], options: NodeOptions, folder: Path, host: str = "") -> None:
        self.name, self.incarnation, self.options, self.folder, self.host = name, incarnation, options, folder, host
        self.key = get_key() if host else b""
        self.devices, self.loads, self.memory = Devices(), Turns(), RungMemory()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        self._ending: list[Lane] = []
        self._ended, self._freed = threading.Event(), threading.Event()
        self._on_answer: Callable[[node.NodeAnswer, bytes], None] = lambda _answer, _payload: None
        self._on_gone: Callable[[str], None] = lambda _why: None
        self._keeping = ThreadPoolExecutor(1, thread_name_prefix=f"sllm-keep-{name}")
        """Brings models to where they are to be kept, one by one."""
        self._kept: dict[str, str] = {}
        """The store's places in which they are; for the registrar."""
        self._registering: queue.SimpleQueue[node.Register | node.Forget | Literal["look"] | None] = queue.SimpleQueue()
        self._registrar = threading.Thread(target=self._register_all, name=f"sllm-register-{name}", daemon=True)
        self._on_disk: set[str] = set()
        """Models whose source or cache is on this machine's disk."""
        self.join: node.Join | None = None
        with ExitStack() as made:
            self._make(launcher, made)
            made.pop_all()

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
            self.answer(node.Joined(os.getpid(), self.fetching.address))
            self._registering.put("look")
        elif isinstance(order, node.Register | node.Forget):
            self._registering.put(order)
        elif isinstance(order, node.Fetch):
            self.fetching.give(structs.replace(order, model=self.adapted.stored(order.model)))
        elif isinstance(order, node.Pipeline):
            self.fetching.give(order)
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

    def address(self, name: str) -> str:
        """Where somebody of this node may listen for those of others."""
        return join_address(self.host, 0) if self.host else os.fspath(self.folder / name)

    def tier(self, model: str) -> Tier:
        """The fastest that has all of the model here. Raises StoreError for one that is not registered."""
        stored = self.adapted.stored(model)
        found = next((each for each in self.store.models() if each.name == stored), None)
        if found is None:
            raise StoreError(f"no model is registered as {model!r} on {self.name}; deploy it first")
        whole = [TIERS.get(place.place, Tier.DEVICE) for place in found.places if not place.loading and place.nbytes >= found.nbytes]
        return max(whole, default=Tier.REMOTE if "://" in found.source else Tier.DISK)

    def forget(self, lane: Lane) -> None:
        """It has ended."""
        with self._lock:
            if self._lanes.get(lane.instance) is lane:
                del self._lanes[lane.instance]

    # Parts

    def _make(self, launcher: Callable[[Store], Launcher], made: ExitStack) -> None:
        """Its parts that others hear of; `made` is what is to be given back where one cannot be made."""
        self.store = self._open_store()
        made.callback(self.store.close)
        self.adapted = AdaptedModels(self.store)
        for left in self.folder.glob("moves-*"):  # by workers that were killed
            left.unlink()
        self._server = StoreServer(self.store, self.folder / "store.sock")
        made.callback(self._server.close)
        self.store_address = self._server.address
        self.fetching = Fetching(self.store, self.address("blocks"), self.answer, bytes_per_second=self.options.link_bytes_per_second)
        made.callback(self.fetching.close)
        self.launcher = launcher(self.store)
        made.callback(self.launcher.close)
        self._stop_listening = self.store.listen(self._happened)
        self._registrar.start()

    def _open_store(self) -> Store:
        """That of the incarnation before, with what it has on disk. Raises what a store raises."""
        options, deadline = self.options, time.monotonic() + _HANDOVER_SECONDS
        while True:
            try:
                return Store(
                    self.folder / "store", dram_nbytes=options.store_dram_nbytes, disk_nbytes=options.store_disk_nbytes, policy=options.eviction,
                    remote=RemoteOptions(ranges=options.remote_ranges),
                )  # fmt: skip
            except StoreError:  # its old self is still ending
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _register_all(self) -> None:
        forgotten = set[str]()
        while True:
            with suppress(queue.Empty):
                order = self._registering.get(timeout=_FORGET_SECONDS if forgotten else None)
                if order is None:
                    return
                if order == "look":
                    self.answer(self._figures())
                    continue
                forgotten.discard(order.model)
                if isinstance(order, node.Forget):
                    forgotten.add(order.model)
                    self.memory.forget(order.model)
                else:
                    self._register(order)
            forgotten = {model for model in forgotten if not self._dropped(model)}

    def _register(self, order: node.Register) -> None:
        before = self._kept.get(order.model, "")
        try:
            if order.base:
                self._register_adapter(order)
                return
            self._keep(order.model, "")
            self.store.register(order.model, order.source)
            self.adapted.forget(order.model)
            self._keep(order.model, _PLACES.get(order.keep, ""))
            tier = self.tier(order.model)
            if tier is Tier.DISK or "://" not in order.source:
                self._on_disk.add(order.model)
            layers = tuple(tuple(sorted(blocks)) for blocks in self.store.layer_blocks(order.model, self.options.block_nbytes))
            self.answer(node.Registered(order.model, self.store.digest(order.model), tier, self.store.blocks(order.model, self.options.block_nbytes), layers, order.number))
            if "://" not in order.source:
                self.launcher.prepare(order.source)  # last: whoever deploys does not wait for it
        except Exception as error:  # noqa: BLE001 - without an answer whoever deploys would wait, and so would all that come after
            self._keep(order.model, before)
            self.answer(node.OrderFailed(order.model, type(error).__name__, str(error)[:8000], order.number))

    def _register_adapter(self, order: node.Register) -> None:
        """It is where its base is. Its layers are not told: what serves layers of the base in a pipeline applies no adapter."""
        if any(each.name == order.model for each in self.store.models()):
            self.store.forget(order.model)  # of a model that was deleted
        with self._lock:
            in_use = any(lane.model == order.model for lane in self._lanes.values())
        self.adapted.register(order, in_use=in_use)
        tier, blocks = self.tier(order.model), self.store.blocks(order.base, self.options.block_nbytes)
        self.answer(node.Registered(order.model, self.adapted.digest(order.model), tier, blocks, number=order.number))

    def _keep(self, model: str, place: str) -> str:
        """Pins it there and nowhere else, "" for nowhere, and brings it there soon; where it was kept until now."""
        before = self._kept.pop(model, "")
        places = {DISK, *(each.place for each in self.store.stats().places)} if before or place else set()
        if before in places and before != place:
            self.store.pin(model, before, False)
        if place in places:
            self.store.pin(model, place)
            self._kept[model] = place
            self._keeping.submit(self._bring, model, place)
        return before

    def _bring(self, model: str, place: str) -> None:
        try:
            with self.loads:
                self.store.prefetch(model, place)
        except Exception as error:  # noqa: BLE001 - nobody looks at what becomes of it
            if not self.ended:
                log.warning("%s is not kept in %s of %s as it should be: %s", model, place, self.name, node.reason_of(error))

    def _dropped(self, model: str) -> bool:
        """Whether the store has nothing of it (any more). While something of it is lent, it has."""
        self.adapted.forget(model)
        if self.adapted.of(model):
            return False  # those that are deleted too and still run
        if any(each.name == model for each in self.store.models()):
            self._keep(model, "")
            try:
                self.store.forget(model)
            except StoreError:
                return False
        return True

    def _happened(self, happened: stored.Happened) -> None:
        if happened.what in ("loaded", "evicted") and happened.place in TIERS:
            there, names = happened.what == "loaded", (happened.name, *self.adapted.of(happened.name))
            for name in names:
                self.answer(node.Stored(name, TIERS[happened.place], there))
            if happened.place == "disk":
                (self._on_disk.add if there else self._on_disk.discard)(happened.name)
            elif not there and happened.name not in self._on_disk:
                for name in names:
                    self.answer(node.Stored(name, Tier.DISK, False))  # who hears that memory lost it takes it to be on the disk
            self._registering.put("look")  # not here: the store's lock is held

    def _figures(self) -> node.Figures:
        places = {place.place: (place.used_nbytes, place.budget_nbytes) for place in self.store.stats().places}
        return node.Figures(*places.get("dram", (0, 0)), *places.get("disk", (0, 0)), self.launcher.shared_nbytes())

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
        self.fetching.close()
        self.store.close()  # ends loads that lanes wait for
        self.fetching.wait()
        self._registrar.join()
        self._keeping.shutdown(cancel_futures=True)
        for lane in self._ending:
            lane.wait()
        self._freed.set()

