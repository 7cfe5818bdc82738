"""Affinity by hashing: each model has its own order of nodes, so its requests meet where it is warm (Cloudflare's sharding).

Rendezvous hashing (Thaler and Ravishankar, 1998) serves where Cloudflare reports a consistent-hash ring: with a node more or
less, only the models that win or lose it move. A start costs a comparison of the names of all nodes (microseconds for a
thousand); the first of a model after the nodes have changed, a hash of each. Pure. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from zlib import crc32

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import fit, most_recent
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, RequestState


def node_order(model: str, nodes: Iterable[str], most: int | None = None) -> list[str]:
    """The nodes (the first `most`) in the order in which this model prefers them; the same whatever order they are given in."""
    own = crc32(model.encode())
    ordered = ((_mix(crc32(node.encode()), own), node) for node in nodes)
    return [node for _, node in (sorted(ordered) if most is None else nsmallest(most, ordered))]


def _mix(a: int, b: int) -> int:
    """Without it CRC's linearity would give all models nearly one order."""
    z = (a * 0x9E3779B97F4A7C15 ^ b * 0xC2B2AE3D27D4EB4F) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 32)


@dataclass(slots=True)
class Affinity:
    """The first node of the model's own order that could start it: of the first `most_considered`, and where those are busy,
    whichever can load soonest. With `patience` it waits for one of the first so many instead."""

    estimator: Estimator = field(default_factory=Estimator)
    patience: int | None = None
    most_considered: int = 8
    _orders: dict[str, list[str]] = field(default_factory=dict, init=False)
    _known: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"a patience of {self.patience} nodes leaves none to start on; give at least 1, or None not to wait")

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def on_delete(self, model: ModelState) -> None:
        self._orders.pop(model.spec.name, None)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        known = tuple(cluster.nodes)
        if known != self._known:
            self._known = known
            self._orders.clear()
        order = self._orders.get(model.spec.name)
        if order is None:
            most = self.most_considered if self.patience is None else self.patience
            order = self._orders[model.spec.name] = node_order(model.spec.name, known, most)
        for name in order:
            candidate = fit(model, cluster.nodes[name], cluster, self.estimator, now)
            if candidate is not None:
                return candidate.plan
        if self.patience is None:
            for node in islice(cluster.open_nodes(model.spec.devices, 0), self.most_considered):
                candidate = fit(model, node, cluster, self.estimator, now)
                if candidate is not None:
                    return candidate.plan
        return None
