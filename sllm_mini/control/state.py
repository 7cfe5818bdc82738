"""What the controller knows: nodes, models, instances and requests, and the only moves that change them.

Policies read it; `Controller` changes it through the methods of `Cluster`, which keep every count and index true. Memory
of a node is counted where it is promised: an instance holds `held_nbytes` from the moment it is started. What the node's
store caches beside that is the store's own truth, known from `Cached` and `Evicted`. Pure; one thread at a time. A change
costs some microseconds, whatever the number of nodes and models. Taught in chapter 08.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.types import Tier, Warmth


class Phase(IntEnum):
    """Where a request is."""

    QUEUED = 0
    RUNNING = 1
    MIGRATING = 2


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that is neither answered nor refused. `output_tokens` as last heard."""

    id: int
    model: str
    input_tokens: int
    prefix: str
    arrived: float
    order: int = 0
    """Counts arrivals: queues are in this order, whatever comes back to them."""
    epoch: int = 0
    phase: Phase = Phase.QUEUED
    instance: int | None = None
    target: int | None = None
    """Where it is moving to, while it does."""
    assigned: float = 0.0
    output_tokens: int = 0
    predicted_seconds: float = 0.0
    """Of its last migration."""
    migrations: int = 0
    failed_moves: int = 0
    """Migrations that were begun and failed."""
    preemptions: int = 0
    failures: int = 0


@dataclass(slots=True, eq=False)
class InstanceState:
    """One process on one node: how warm it is, or (`target` above `warmth`) what it is climbing to.

    With a model from DRAM up, with a runtime from RUNTIME up; with `devices` while it is, or climbs to, DEVICE or READY.
    `idle_since` is None while it climbs, runs requests, or is kept for requests that move here; to descend is no use, so it is
    idle since before. `spec` is what it was last
    started by: what it holds and how many requests it takes go by that, also when the model is deployed anew.
    """

    id: int
    node: str
    spec: ModelSpec
    model: str | None
    runtime: str | None
    warmth: Warmth
    target: Warmth
    devices: tuple[int, ...] = ()
    held_nbytes: int = 0
    epoch: int = 0
    requests: dict[int, RequestState] = field(default_factory=dict)
    incoming: dict[int, RequestState] = field(default_factory=dict)
    """Requests that are moving here, or will as soon as it is READY."""
    draining: bool = False
    """Its requests are being moved away, so it takes no new ones."""
    idle_since: float | None = None
    warm_until: float | None = None
    """When it is to descend if it stays idle; None: it stays."""
    then: Warmth = Warmth.COLD
    """How warm it is after that."""
    rank: float = 0.0
    """Who gives way first: the lowest. As its keep-alive policy said when it came to rest at this warmth; 0 since it was used again."""
    timer: int | None = None
    uses: int = 0
    started: float = 0.0
    predicted_seconds: float = 0.0
    """Of its last start."""
    parts: int = 1
    """How many nodes fetch a share of it."""
    links: tuple[str, ...] = ()
    """The nodes over whose links its weights come, while it climbs."""
    rested: float | None = None
    """When it became idle, also while a plan that may be given up keeps it; None since it was used again."""
    reached_from: Tier | None = None
    climbed_from: Warmth = Warmth.COLD
    """How warm it was before its last start."""
    loading: bool = False
    """It is READY, and its last bytes are still on their way."""

    @property
    def climbing(self) -> bool:
        return self.target > self.warmth

    @property
    def reserved(self) -> int:
        """How many requests are moving here."""
        return len(self.incoming)

    @property
    def room(self) -> int:
        """How many more requests it could run at once, were it READY."""
        return self.spec.concurrency - len(self.requests) - len(self.incoming)


@dataclass(slots=True, eq=False)
class NodeState:
    """A machine. `free_devices` are in nobody's hands; `idle_devices` belong to idle instances, which could be told to descend."""

    spec: NodeSpec
    free_devices: list[int]
    free_nbytes: int
    idle_devices: int = 0
    idle_nbytes: int = 0
    """Memory of idle instances."""
    climbing: int = 0
    """Instances that are starting here."""
    loads_until: float = 0.0
    """When the loads that were started here should be over (an estimate): the queue `q` of a load that comes now. 0: nothing is
    loaded, or it should be over already."""
    loading: dict[int, None] = field(default_factory=dict)
    """Instances whose weights, or a part of them, come over its link."""
    cached: dict[str, Tier] = field(default_factory=dict)
    """Models in this node's store, with the fastest tier: DISK or DRAM. Absent: only REMOTE has them."""
    instances: dict[int, InstanceState] = field(default_factory=dict)

    def tier(self, model: str) -> Tier:
        """The fastest tier that holds the model's weights here."""
        return self.cached.get(model, Tier.REMOTE)


@dataclass(slots=True, eq=False)
class ModelState:
    """A model and what belongs to it. `open` are its ready instances that take one more request, the one used last at the
    end; `starting` are those that climb to READY; `queue` are its requests that wait, longest first."""

    spec: ModelSpec
    queue: deque[RequestState] = field(default_factory=deque)
    open: dict[int, InstanceState] = field(default_factory=dict)
    starting: dict[int, InstanceState] = field(default_factory=dict)
    instances: dict[int, InstanceState] = field(default_factory=dict)
    """All that hold its weights or will: warmth or target from DRAM up."""
    asleep: dict[int, InstanceState] = field(default_factory=dict)
    """Idle ones that hold its weights and are not READY: at DRAM or DEVICE."""
    running: int = 0
    """Requests in its instances."""
    ready: int = 0
    """Instances at READY that are not draining."""
    cached_on: dict[str, Tier] = field(default_factory=dict)
    """Nodes whose store has it, with the tier."""
    deleted: bool = False
    short: bool = False
    """It wants more instances than could be placed; it is asked again when something is freed."""
    failed_starts: int = 0
    """In a row."""
    held_back: bool = False
    """A start has failed and the next waits for a timer."""
    tick: int | None = None
    """Its autoscaler's timer."""
    patience: int | None = None
    """The timer of the request that waits longest, where the autoscaler lets none wait for ever."""
    keep_alive: float | None = None
    """Seconds that its idle instances stay, asked for by a client (below 0: for good); None: as the policy says."""
    last_arrival: float | None = None
    arrivals: int = 0
    """While `KeepAlive.on_arrival` is told of an arrival, these two are still without it."""


_PROCESS, _RUNTIME, _DRAM = Warmth.PROCESS, Warmth.RUNTIME, Warmth.DRAM


def held_nbytes(spec: ModelSpec, warmth: Warmth) -> int:
    """Memory of the node that an instance holds: its process and runtime, and the weights where no device holds them (at
    DRAM; from DRAM up for a function, which has no device). Device memory is not counted: devices are taken whole."""
    if warmth < _PROCESS:
        return 0
    held = spec.process_nbytes
    if warmth >= _RUNTIME:
        held += spec.runtime_nbytes
    if warmth == _DRAM or (warmth > _DRAM and not spec.devices):
        held += spec.nbytes
    return held
