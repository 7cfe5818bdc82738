"""What a cluster has: nodes with what is free on them, models with where they are cached, and the orders that policies ask for.

The half of `Cluster` that changes seldom, and the questions of policies; `cluster` adds the moves of instances and requests.
Pure; one thread at a time. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain
from math import inf
from typing import Any, Self

from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.ranked import Ranked
from sllm_mini.control.snapshot import restored, snapshot
from sllm_mini.control.state import InstanceState, ModelState, NodeState, RequestState, held_nbytes
from sllm_mini.types import Tier, Warmth

_READY = Warmth.READY
_NOBODY_WAITS = 1 << 62
"""Where a model without a queue stands among those that are short of instances: behind all that have one."""


class Inventory:
    """See `Cluster`."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeState] = {}
        self.models: dict[str, ModelState] = {}
        self.instances: dict[int, InstanceState] = {}
        self.requests: dict[int, RequestState] = {}
        self.arrivals = 0
        self.spawned = 0
        self.prewarming: dict[int, InstanceState] = {}
        """Instances that climb to below DRAM, for no model in particular."""
        self._idle_of: dict[str, Ranked[int]] = {}
        self._open: list[Ranked[str]] = [Ranked()]
        """Nodes with at least so many devices free or idle, by `loads_until`, then those where as many are free."""
        self._open_as: dict[str, tuple[int, int, float]] = {}
        """How many each node had, how many of them free, and its `loads_until`, when last looked at."""
        self._changed: dict[str, NodeState] = {}
        """Nodes of which that may have changed: a device that comes and goes between two questions costs nothing."""
        self._asleep: dict[str, dict[int, InstanceState]] = {}
        """Idle processes by runtime; "" for those that have none yet."""
        self._asleep_on: dict[str, dict[str, dict[int, InstanceState]]] = {}
        """The same for each node."""
        self._cached_on: dict[str, dict[str, Tier]] = {}
        """By model, deployed or not: `ModelState.cached_on` is one of these."""
        self.until: list[tuple[float, str]] = []
        """A heap of each `loads_until` that is to pass."""
        self.largest: list[tuple[int, int]] = []
        """Devices and bytes of memory of the nodes than which none has more of both."""
        self.slowest = inf
        """Bytes a second of the slowest remote link or disk of any node; infinity without nodes."""
        self._short: dict[tuple[int, int], Ranked[str]] = {}
        """Models that want an instance and got none, by what one needs (devices, bytes), in order of who waits longest."""

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain lists, dicts, numbers and strings: to print, to compare, to save."""
        return snapshot(self.nodes, self.models, self.instances, self.requests) | {
            "cached_on": {model: {node: int(tier) for node, tier in nodes.items()} for model, nodes in self._cached_on.items()},
            "asleep": {runtime: list(asleep) for runtime, asleep in self._asleep.items() if asleep},
            "prewarming": list(self.prewarming),
            "arrivals": self.arrivals,
            "spawned": self.spawned,
        }

    @classmethod
    def from_snapshot(cls, data: dict[str, Any]) -> Self:
        """What `snapshot` was taken of: it goes on in the same way."""
        self = cls()
        self.arrivals, self.spawned = data["arrivals"], data["spawned"]
        self._cached_on = {model: {node: Tier(tier) for node, tier in nodes.items()} for model, nodes in data["cached_on"].items()}
        self.nodes, self.models, self.instances, self.requests = restored(data, self._cached_on)
        self.prewarming = {id: self.instances[id] for id in data["prewarming"]}
        for name, node in self.nodes.items():
            self._idle_of[name], self._asleep_on[name] = Ranked(), {}
            self._changed[name] = node
        for instance in self.instances.values():
            if instance.idle_since is not None:
                self._idle_of[instance.node].add(instance.id, instance.rank)
        for runtime, asleep in data["asleep"].items():
            for id in asleep:
                instance = self.instances[id]
                for by_runtime in (self._asleep, self._asleep_on[instance.node]):
                    by_runtime.setdefault(runtime, {})[id] = instance
        for model in self.models.values():
            if model.short:
                self.set_short(model, True)
        for node in self.nodes.values():
            self.set_loads_until(node, node.loads_until)
        self._measure()
        return self

    def advance(self, now: float) -> None:
        """Time has passed: what was to be loaded by now is no queue any more, for those who compare nodes by it."""
        until = self.until
        while until and until[0][0] <= now:
            at, name = heappop(until)
            node = self.nodes.get(name)
            if node is not None and node.loads_until == at:
                node.loads_until = 0.0
                self._changed[name] = node

    def holds(self, devices: int, nbytes: int) -> bool:
        """Whether some node has so much in all, free or not. Costs a look at the nodes than which none has more: mostly one."""
        return any(devices <= most and nbytes <= memory for most, memory in self.largest)

    def _measure(self) -> None:
        sizes = sorted({(node.spec.devices, node.spec.dram_nbytes) for node in self.nodes.values()}, reverse=True)
        self.largest.clear()
        for devices, nbytes in sizes:
            if not self.largest or nbytes > self.largest[-1][1]:
                self.largest.append((devices, nbytes))
        self.slowest = min((_source(node.spec) for node in self.nodes.values()), default=inf)

    # What policies ask

    def open_nodes(self, devices: int, nbytes: int = 0) -> Iterator[NodeState]:
        """Nodes with so many free or idle devices and so many free or idle bytes: those that can load soonest first, of equals
        those where nobody has to give up a device, then by name."""
        nodes = self.nodes
        for _, name in self.open_order(devices):
            node = nodes[name]
            if node.free_nbytes + node.idle_nbytes >= nbytes:
                yield node

    def open_order(self, devices: int) -> list[tuple[tuple[float, bool], str]]:
        """Names of nodes with so many free or idle devices, in the order of `open_nodes` and with the rank by which they stand
        there (`loads_until`, whether some must be given up): to be read at once."""
        if self._changed:
            self._reopen()
        return self._open[devices].ordered() if devices < len(self._open) else []

    def idle_instances(self, node: str) -> Iterator[InstanceState]:
        """Of this node, in order of rank: who gives way first, first."""
        return map(self.instances.__getitem__, self._idle_of[node])

    def sleeping(self, node: str | None, runtime: str) -> Iterator[InstanceState]:
        """Idle instances without a model that one of this runtime could climb from: RUNTIME, then PROCESS."""
        asleep = self._asleep if node is None else self._asleep_on[node]
        return chain(asleep.get(runtime, {}).values(), asleep.get("", {}).values())

    def sleeper(self, node: str | None, runtime: str) -> InstanceState | None:
        """The first of `sleeping`."""
        asleep = self._asleep if node is None else self._asleep_on[node]
        found = asleep.get(runtime) or asleep.get("")
        return next(iter(found.values())) if found else None

    def warmest(self, model: ModelState) -> Warmth:
        """How warm the best instance is that could serve one more request of it now; COLD: none."""
        if model.open:
            return _READY
        if model.asleep:
            return max(instance.warmth for instance in model.asleep.values())
        best = self.sleeper(None, model.spec.runtime)
        return Warmth.COLD if best is None else best.warmth

    # Nodes, models, stores

    def add_node(self, spec: NodeSpec) -> NodeState:
        node = NodeState(spec, list(range(spec.devices)), spec.dram_nbytes)
        self.nodes[spec.name] = node
        self._idle_of[spec.name] = Ranked()
        self._asleep_on[spec.name] = {}
        self._changed[spec.name] = node
        self.slowest = min(self.slowest, _source(spec))
        if not self.holds(spec.devices, spec.dram_nbytes):
            self._measure()
        for model in spec.disk:
            self.cached(spec.name, model, Tier.DISK)
        return node

    def remove_node(self, name: str) -> None:
        """Its instances must be gone (`fall` to COLD)."""
        for model in list(self.nodes[name].cached):
            self.evicted(name, model, Tier.REMOTE)
        self._changed.pop(name, None)
        for ranked in self._open[: self._open_as.pop(name, (-1, 0, 0.0))[0] + 1]:
            ranked.discard(name)
        spec = self.nodes.pop(name).spec
        del self._idle_of[name], self._asleep_on[name]
        if (spec.devices, spec.dram_nbytes) in self.largest or _source(spec) == self.slowest:
            self._measure()

    def add_model(self, spec: ModelSpec) -> ModelState:
        """Or gives a known one new figures. Its instances keep the old ones until they climb again."""
        model = self.models.get(spec.name)
        if model is None:
            model = self.models[spec.name] = ModelState(spec, cached_on=self._cached_on.setdefault(spec.name, {}))
        self.set_short(model, False)
        model.spec = spec
        model.deleted = False
        return model

    def remove_model(self, model: ModelState) -> None:
        """It must have neither requests nor instances."""
        self.set_short(model, False)
        del self.models[model.spec.name]
        if not model.cached_on:
            del self._cached_on[model.spec.name]

    def cached(self, node: str, model: str, tier: Tier) -> None:
        """The node's store has it in this tier, whatever slower ones have."""
        tier = max(tier, self.nodes[node].cached.get(model, tier))
        self.nodes[node].cached[model] = self._cached_on.setdefault(model, {})[node] = tier

    def evicted(self, node: str, model: str, tier: Tier) -> None:
        """The store no longer has it in this tier: what was in DRAM is on DISK still; REMOTE: it has nothing of it."""
        known = self.nodes[node].cached.get(model)
        if known is None or known < tier:
            return
        if tier == Tier.DRAM:
            self.nodes[node].cached[model] = self._cached_on[model][node] = Tier.DISK
        elif tier == Tier.REMOTE or known == tier:
            del self.nodes[node].cached[model], self._cached_on[model][node]
            if not self._cached_on[model] and model not in self.models:
                del self._cached_on[model]

    def set_loads_until(self, node: NodeState, until: float) -> None:
        node.loads_until = until
        self._changed[node.spec.name] = node
        if until > 0.0:
            heappush(self.until, (until, node.spec.name))

    def _reopen(self) -> None:
        """Nodes that have changed find their places among the open ones."""
        ranks, known = self._open, self._open_as
        for name, node in self._changed.items():
            free, until = len(node.free_devices), node.loads_until
            level = free + node.idle_devices
            now = level, free, until
            old, once, before = was = known.get(name, (-1, 0, 0.0))
            if was == now:
                continue
            while len(ranks) <= level:
                ranks.append(Ranked())
            for devices in range(level + 1):
                if before != until or devices > old or (once < devices) != (free < devices):
                    ranks[devices].add(name, (until, free < devices))
            for devices in range(level + 1, old + 1):
                ranks[devices].discard(name)
            known[name] = now
        self._changed.clear()

    # Models that are short of instances

    def set_short(self, model: ModelState, short: bool) -> None:
        """Whether it wants an instance and got none; also called when the head of its queue has changed."""
        need = (model.spec.devices, held_nbytes(model.spec, Warmth.READY))
        if short:
            rank = model.queue[0].order if model.queue else _NOBODY_WAITS
            self._short.setdefault(need, Ranked()).add(model.spec.name, rank)
        elif model.short:
            self._short[need].discard(model.spec.name)
            if not len(self._short[need]):
                del self._short[need]
        model.short = short

    def short(self) -> dict[tuple[int, int], Ranked[str]]:
        """By need (devices, bytes): the models that want an instance and got none, longest wait first."""
        return self._short


def _source(spec: NodeSpec) -> float:
    """Bytes a second of the slower of the two places that models come from."""
    return min(spec.remote_bytes_per_second, spec.disk_bytes_per_second)
