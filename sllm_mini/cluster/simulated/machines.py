"""Nodes and instances in simulated time: climbs that contend for links, descents, losses; every device and byte accounted.

The half of `SimulatedCluster` that does not know requests. It checks what the controller asks for against what is there: a
device in two hands or memory that is not there is a `SimulationError`, not a wrong result. Taught in chapter 08.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from heapq import heappush
from itertools import count
from random import Random
from typing import Any

from sllm_mini.cluster.simulated.account import CLIMBING, IDLE, MODES, Account, InstanceSpan, slot
from sllm_mini.cluster.simulated.links import Link, QueuedLink, SharedLink
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.parts import Instance, Load, Model, Node, SimulationError
from sllm_mini.cluster.simulated.store import SimulatedStore
from sllm_mini.control.messages import AnyEvent, Cached, Descend, Evicted, InstanceReached, ModelSpec, NodeSpec, Start
from sllm_mini.control.state import held_nbytes
from sllm_mini.types import Tier, Warmth

FINISH, PAUSE, MOVED, RUNG, ROOM, LINK, READY, EXTERNAL, ARRIVAL, TIMER = range(10)
"""What can come next; of two at one instant the smaller comes first, of two alike the one that was planned first."""

_COLD, _PROCESS, _RUNTIME, _DRAM, _DEVICE, _READY = Warmth.COLD, Warmth.PROCESS, Warmth.RUNTIME, Warmth.DRAM, Warmth.DEVICE, Warmth.READY
_DRAM_TIER, _DISK_TIER, _REMOTE_TIER = Tier.DRAM, Tier.DISK, Tier.REMOTE


class Machines(ABC):
    """See the module's words."""

    def __init__(self, options: SimulationOptions) -> None:
        self.options = options
        self.account = Account()
        self.spans: list[InstanceSpan] | None = [] if options.keep == "everything" else None
        self._heap: list[tuple[float, int, int, Any, int]] = []
        self._tick = count().__next__
        self._nodes: dict[str, Node] = {}
        self._models: dict[str, Model] = {}
        self._instances: dict[int, Instance] = {}
        self._split: dict[int, Load] = {}
        """Loads that several nodes fetch a share of, by instance."""
        self._chance = Random(options.seed)
        self._serves_from_store = options.leases == "instance"

    @abstractmethod
    def _tell(self, event: AnyEvent, now: float) -> None:
        """Tells the controller, which `SimulatedCluster` knows, and does what it answers."""

    # Nodes and models

    def _add_node(self, spec: NodeSpec, number: int, now: float) -> None:
        options = self.options
        make: Callable[[], Link[Load]] = SharedLink if options.links == "shared" else QueuedLink
        one = make()
        links = {tier: one if options.links == "node" else make() for tier in (_REMOTE_TIER, _DISK_TIER, _DRAM_TIER)}
        store = SimulatedStore(options.store_dram_nbytes, options.store_disk_nbytes, options.eviction)
        self._nodes[spec.name] = Node(spec, number, links, store, now)
        for name in spec.disk:
            if name in self._models:
                for _ in store.put_on_disk(name, self._models[name].spec.nbytes, now):
                    pass  # the controller knows it from the node's spec

    def _add_model(self, spec: ModelSpec, number: int) -> None:
        if spec.name in self._models:
            self._models[spec.name].renew(spec)
        else:
            self._models[spec.name] = Model(spec, number)

    def _remove_node(self, node: Node, now: float) -> None:
        """Its instances must be gone."""
        self._count_free(node, 0, now)
        self.account.total_gpu_seconds += node.spec.devices * (now - node.joined)
        del self._nodes[node.spec.name]

    # Climbing

    def _start(self, action: Start, now: float) -> None:
        node, spec = self._nodes[action.node], self._models[action.model].spec
        instance = self._instances.get(action.instance)
        if instance is None:
            instance = self._instances[action.instance] = node.instances[action.instance] = Instance(action.instance, node, now)
        if instance.node is not node or instance.warmth != action.warmth or instance.active:
            raise SimulationError(
                f"at {now:.6g} s instance {instance.id} was to climb from {action.warmth} on {action.node}; it is at {instance.warmth} on {instance.node.spec.name} with {instance.active} requests"
            )
        self._count(instance, now)
        self._take_devices(instance, action.devices, now)
        self._hold(instance, max(held_nbytes(spec, action.warmth), held_nbytes(spec, action.target)), now)
        instance.spec, instance.epoch, instance.target = spec, action.epoch, action.target
        instance.began = instance.drawn = now
        instance.climbed_from = action.warmth
        if action.target >= _DRAM:
            instance.model = self._models[action.model]
        instance.slot = slot(action.target, CLIMBING)
        self.account.starts[action.warmth] += 1
        process = spec.process_seconds if action.warmth < _PROCESS <= action.target else 0.0
        runtime = spec.runtime_seconds if action.warmth < _RUNTIME <= action.target else 0.0
        stored = action.warmth < _DRAM <= action.target and not action.parts
        tier = node.store.lease(spec.name) if stored else _DRAM_TIER if action.warmth == _DRAM else action.tier
        load = Load(instance, spec, tier, action.parts, stored, now + process, now + process + runtime)
        heappush(self._heap, (load.asked, RUNG, self._tick(), load, 0))

    def _climbed_to_load(self, load: Load, now: float) -> None:
        """The rungs below the weights are behind it."""
        if not load.wanted:
            if load.stored:
                load.node.store.release(load.spec.name, load.tier)
            return
        self._span(load.instance, "process", _PROCESS, load.instance.began, load.in_process)
        self._span(load.instance, "runtime", _RUNTIME, load.in_process, now)
        load.instance.drawn = now
        if load.instance.target < _DRAM:
            self._reached(load, now)
        elif load.instance.warmth >= _DEVICE:
            self._make_ready(load, now)
        else:
            sources = [self._nodes[name] for name in load.sources if name in self._nodes] or [load.node]
            load.parts, load.sources = len(sources), tuple(node.spec.name for node in sources)
            if load.parts > 1:
                self._split[load.instance.id] = load
            for node in sources:
                seconds = load.spec.nbytes / load.parts / node.bandwidth[load.tier]
                if self.options.jitter:
                    seconds *= self._chance.lognormvariate(0.0, self.options.jitter)
                node.links[load.tier].submit(load, seconds, now)
                self._plan(node.links[load.tier])
            if self._serves_from_store and load.stored and load.tier < _DRAM_TIER:
                heappush(self._heap, (now + load.queued_seconds, ROOM, self._tick(), load, 0))

    def _make_room(self, load: Load, now: float) -> None:
        """Its turn has come: it is read into the store's memory, or into its instance's own where there is no room."""
        node = load.node
        if self._nodes.get(node.spec.name) is node:
            gone = node.store.reserve(load.spec.name, load.spec.nbytes)
            if gone is None:
                load.stored = False
            for name, tier, _ in gone or ():
                self._tell(Evicted(node.spec.name, name, tier), now)

    def _plan(self, link: Link[Load]) -> None:
        at = link.next_at()
        if at is not None:
            heappush(self._heap, (at, LINK, self._tick(), link, link.version))

    def _loads_over(self, link: Link[Load], now: float) -> None:
        over = link.take(now)
        self._plan(link)
        for load in over:
            load.parts -= 1
            if not load.parts:
                self._loaded(load, now)

    def _loaded(self, load: Load, now: float) -> None:
        spec, node = load.spec, load.node
        self._split.pop(load.instance.id, None)
        begin = load.asked + load.queued_seconds
        load.load_seconds = now - begin
        if load.wanted:
            self.account.loads[load.tier] += 1
            self._span(load.instance, "queue", _DRAM, load.asked, begin)
            self._span(load.instance, "load", min(load.instance.target, _DEVICE), begin, now)
            load.instance.drawn = now
            self._make_ready(load, now)
        if load.stored and self._nodes.get(node.spec.name) is node:
            changes = list(node.store.loaded(spec.name, spec.nbytes, load.tier, now - begin, now))
            if load.wanted and self._serves_from_store and node.store.tier(spec.name) is _DRAM_TIER:
                load.instance.leased = spec.name
                node.store.lease(spec.name)
            for name, tier, there in changes:
                self._tell(Cached(node.spec.name, name, tier) if there else Evicted(node.spec.name, name, tier), now)

    def _make_ready(self, load: Load, now: float) -> None:
        """The weights are there; what is left is the rung READY, if that is where it climbs to."""
        seconds = load.spec.ready_seconds if load.instance.target == _READY else 0.0
        heappush(self._heap, (now + seconds, READY, self._tick(), load, 0))

    def _reached(self, load: Load, now: float) -> None:
        instance = load.instance
        if load.wanted:
            self._span(instance, "ready", _READY, instance.drawn, now)
            self._count(instance, now)
            instance.warmth = instance.target
            self._hold(instance, held_nbytes(load.spec, instance.warmth), now)
            instance.slot = slot(instance.warmth, IDLE)
            self._tell(InstanceReached(instance.id, load.tier, now - instance.began, load.queued_seconds, instance.epoch, load.load_seconds), now)

    # Descending

    def _descend(self, action: Descend, now: float) -> None:
        instance = self._instances[action.instance]
        if instance.active:
            raise SimulationError(f"at {now:.6g} s instance {instance.id} was to descend to {action.warmth} with {instance.active} requests in it")
        instance.epoch = action.epoch
        self._fall(instance, action.warmth, now)

    def _fall(self, instance: Instance, warmth: Warmth, now: float) -> None:
        """It keeps what `warmth` holds; at COLD it is gone."""
        self._count(instance, now)
        self._count_unused(instance, now)
        node = instance.node
        if warmth < _DEVICE and instance.ndevices:
            self._count_free(node, node.free_devices + instance.ndevices, now)
            for device in instance.devices:
                node.owners[device] = None
            instance.devices, instance.ndevices = (), 0
        if warmth < _DRAM:
            instance.model = None
            if instance.leased is not None:
                node.store.release(instance.leased, _DRAM_TIER)
                instance.leased = None
        # A descent never fails: where memory is short for what a lower rung wants of it, it holds what there is.
        self._hold(instance, min(held_nbytes(instance.spec, warmth), instance.held_nbytes + node.free_nbytes), now)
        instance.warmth = instance.target = warmth
        instance.slot = slot(warmth, IDLE)
        if warmth == _COLD:
            instance.alive = False
            del self._instances[instance.id], node.instances[instance.id]

    # Accounts

    def _count(self, instance: Instance, now: float) -> None:
        """What it did until now is counted; what it does next the caller sets."""
        seconds = now - instance.since
        if seconds > 0.0:
            place = instance.slot
            self.account.gpu_seconds[place] += instance.ndevices * seconds
            self.account.byte_seconds[place] += instance.held_nbytes * seconds
            mode = place % len(MODES)
            if mode == CLIMBING:
                instance.unused_gpu_seconds += instance.ndevices * seconds
                instance.unused_byte_seconds += instance.held_nbytes * seconds
            elif mode == IDLE and self.spans is not None:
                self._span(instance, "idle", instance.warmth, instance.since, now)
            instance.since = now

    def _count_unused(self, instance: Instance, now: float) -> None:
        """What its climbs held since it last ran a request was for nothing; one that still goes on is cut off here."""
        if instance.target > instance.warmth:
            self._span(instance, "cut", min(instance.target, _DEVICE), instance.drawn, now)
        self.account.unused_climb_gpu_seconds += instance.unused_gpu_seconds
        self.account.unused_climb_byte_seconds += instance.unused_byte_seconds
        instance.unused_gpu_seconds = instance.unused_byte_seconds = 0.0

    def _count_free(self, node: Node, free: int, now: float) -> None:
        self.account.free_gpu_seconds += node.free_devices * (now - node.free_since)
        node.free_devices, node.free_since = free, now

    def _take_devices(self, instance: Instance, devices: tuple[int, ...], now: float) -> None:
        node = instance.node
        new = [device for device in devices if device not in instance.devices]
        for device in new:
            if not 0 <= device < len(node.owners) or node.owners[device] is not None:
                raise SimulationError(f"at {now:.6g} s instance {instance.id} was given device {device} of {node.spec.name}, which is not free")
            node.owners[device] = instance.id
        if new:
            self._count_free(node, node.free_devices - len(new), now)
        instance.devices, instance.ndevices = devices, len(devices)

    def _hold(self, instance: Instance, nbytes: int, now: float) -> None:
        node = instance.node
        node.free_nbytes += instance.held_nbytes - nbytes
        instance.held_nbytes = nbytes
        if node.free_nbytes < 0:
            raise SimulationError(f"at {now:.6g} s instance {instance.id} was given memory that {node.spec.name} has not: {-node.free_nbytes:,} bytes too many")

    def _span(self, instance: Instance, what: str, warmth: Warmth, start: float, end: float, request: int = -1) -> None:
        if self.spans is not None and end > start:
            model = instance.model.spec.name if instance.model is not None else ""
            self.spans.append(InstanceSpan(instance.id, instance.node.spec.name, model, what, warmth, start, end, instance.devices, request))

    def _settle(self, now: float) -> None:
        """Counts everything up to the end."""
        for instance in self._instances.values():
            self._count(instance, now)
            self._count_unused(instance, now)
        for node in self._nodes.values():
            self._count_free(node, node.free_devices, now)
            self.account.total_gpu_seconds += node.spec.devices * (now - node.joined)
            node.joined = now
