"""Ways out for victims of live migration: to a ready instance with room, or to one that is started for them. Pure. Chapter 08.

A destination is used up by what goes there: seats of an instance; devices, memory and the queue of loads of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Move
from sllm_mini.control.state import InstanceState, NodeState, held_nbytes
from sllm_mini.types import Warmth


@dataclass(frozen=True, slots=True)
class Departure:
    """A victim's quickest way out: `move`, and the seconds until it has left; `load_seconds` of them its load keeps the
    destination's link busy."""

    victim: InstanceState
    move: Move
    seconds: float
    load_seconds: float = 0.0


@dataclass(slots=True)
class Taken:
    """What other victims have taken already."""

    seats: dict[int, int] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)


class Departures:
    """For one decision at `now`, which looks at no more than `4 * most` nodes and instances for each model that leaves."""

    def __init__(self, cluster: Cluster, estimator: Estimator, now: float, most: int) -> None:
        self._cluster, self._estimator, self._now, self._wide = cluster, estimator, now, 4 * most
        self._free: dict[str, NodeState] | None = None
        self._starts: dict[str, list[tuple[float, NodeState]]] = {}

    def quickest(self, victim: InstanceState, taken: Taken) -> Departure | None:
        """None: there is no place for all its requests. Where it must be started first, it decodes on until that is done, and
        what is to be moved grows."""
        model = self._cluster.models[victim.spec.name]
        coming = len(victim.requests)
        for one in islice(reversed(model.open.values()), self._wide):
            if one.node != victim.node and one.room - taken.seats.get(one.id, 0) >= coming:
                return Departure(victim, Move(victim.id, one.node, one.id), self._moving(victim, self._now))
        spec = model.spec
        if spec.concurrency < coming:
            return None
        best: tuple[float, NodeState] | None = None
        for seconds, node in self._started(victim.spec.name):
            name = node.spec.name
            if (
                name != victim.node
                and len(node.free_devices) - taken.devices.get(name, 0) >= spec.devices
                and node.free_nbytes - taken.nbytes.get(name, 0) >= held_nbytes(spec, Warmth.READY)
            ):
                seconds += taken.load_seconds.get(name, 0.0)
                if best is None or seconds < best[0]:
                    best = seconds, node
        if best is None:
            return None
        seconds, node = best
        own = self._estimator.load(node, spec, node.tier(spec.name), max(self._now, node.loads_until))
        return Departure(victim, Move(victim.id, node.spec.name), seconds + self._moving(victim, self._now + seconds), own)

    def together(self, chosen: Sequence[InstanceState]) -> tuple[list[Departure], InstanceState | None]:
        """The ways out of all of these, in their order; or the first that finds none any more."""
        taken = Taken()
        ways = []
        for victim in chosen:
            way = self.quickest(victim, taken)
            if way is None:
                return [], victim
            ways.append(way)
            if way.move.instance is not None:
                taken.seats[way.move.instance] = taken.seats.get(way.move.instance, 0) + len(victim.requests)
            else:
                node, spec = way.move.node, self._cluster.models[victim.spec.name].spec
                taken.devices[node] = taken.devices.get(node, 0) + spec.devices
                taken.nbytes[node] = taken.nbytes.get(node, 0) + held_nbytes(spec, Warmth.READY)
                taken.load_seconds[node] = taken.load_seconds.get(node, 0.0) + way.load_seconds
        return ways, None

    def _moving(self, victim: InstanceState, at: float) -> float:
        """All its requests at the same time, from `at` on."""
        return max(self._estimator.migration(request, victim.spec, at) for request in victim.requests.values())

    def _started(self, name: str) -> list[tuple[float, NodeState]]:
        """Nodes with free devices for one more instance, and the seconds of its start, behind the loads that are queued there."""
        known = self._starts.get(name)
        if known is None:
            cluster, model = self._cluster, self._cluster.models[name]
            if self._free is None:
                self._free = {node.spec.name: node for node in islice(cluster.open_nodes(1), self._wide) if node.free_devices}
            near = self._free
            if near and model.cached_on:  # without any free device among those, hardly elsewhere
                near = near | {one: cluster.nodes[one] for one in islice(model.cached_on, self._wide) if cluster.nodes[one].free_devices}
            known = self._starts[name] = [
                (self._estimator.start(node, model.spec, Warmth.COLD, node.tier(name), self._now), node)
                for node in near.values()
                if len(node.free_devices) >= model.spec.devices
            ]
        return known
