"""Where device time and memory went, read from an event log: one definition for a simulated cluster and a live one. Chapter 09.

A log has every decision and everything that the controller was told, and so each instance's warmth, devices and memory at any time.
Of a simulated run it gives the simulator's own `Account` but for what no log tells (pauses in moves, the lost work of functions).
Pure. Costs some 3 us a record; memory grows with the requests that go on, not with the log.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field

from sllm_mini.cluster.simulated.account import BUSY, CLIMBING, IDLE, MODES, Account, InstanceSpan, slot
from sllm_mini.control import messages as m
from sllm_mini.control.replay import Record, read_log
from sllm_mini.control.state import held_nbytes
from sllm_mini.types import Tier, Warmth

_COLD, _DRAM, _DEVICE, _READY = Warmth.COLD, Warmth.DRAM, Warmth.DEVICE, Warmth.READY


@dataclass(slots=True, eq=False)
class _Node:
    spec: m.NodeSpec
    joined: float
    free_devices: int
    free_nbytes: int
    free_since: float
    instances: dict[int, _Instance] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Instance:
    id: int
    node: _Node
    spec: m.ModelSpec
    since: float
    began: float = 0.0
    epoch: int = 0
    warmth: Warmth = _COLD
    target: Warmth = _COLD
    climbed_from: Warmth = _COLD
    devices: tuple[int, ...] = ()
    held_nbytes: int = 0
    slot: int = 0
    requests: set[int] = field(default_factory=set)
    """Those that run here, and those that move here."""
    unused_gpu_seconds: float = 0.0
    unused_byte_seconds: float = 0.0

    @property
    def model(self) -> str:
        return self.spec.name if self.warmth >= _DRAM else ""


@dataclass(slots=True, eq=False)
class _Request:
    arrived: float
    epoch: int = 0
    instance: _Instance | None = None
    target: _Instance | None = None
    entered: float = 0.0
    moved_at: float = 0.0
    rung: Warmth | None = None
    """How warm the start was that it waited for; None until it is assigned."""


@dataclass(slots=True)
class Accounting:
    """What a log comes to. `spans` are stretches that it knows: "idle", "run", "move" and "held". `cold` counts finished requests by
    the warmth of the start that they waited for, READY for none."""

    account: Account = field(default_factory=Account)
    spans: list[InstanceSpan] = field(default_factory=list)
    cold: list[int] = field(default_factory=lambda: [0] * len(Warmth))
    loaded_nbytes: list[int] = field(default_factory=lambda: [0] * len(Tier))
    """Bytes of finished loads by the tier they came from."""


def account_of(log: Iterable[bytes | str], until: float) -> Accounting:
    """Of all that a log says, up to `until` (which is not before its last record). Raises SllmError for what is no log."""
    accountant = Accountant()
    for record in read_log(log):
        accountant.tell(record)
    accountant.settle(until)
    return accountant.found


class Accountant:
    """The log told record by record: what happened first, then what was decided. Of spans only the last `keep_spans` are kept, where not
    all are."""

    def __init__(self, keep_spans: int | None = None) -> None:
        self.keep_spans = keep_spans
        self.found = Accounting()
        self._account = self.found.account
        self._specs: dict[str, m.ModelSpec] = {}
        self._nodes: dict[str, _Node] = {}
        self._instances: dict[int, _Instance] = {}
        self._requests: dict[int, _Request] = {}

    def tell(self, record: Record) -> None:
        self._happened(record.event, record.now)
        for action in record.actions:
            self._decided(action, record.now)
        if self.keep_spans is not None and len(self.found.spans) > 2 * self.keep_spans:
            del self.found.spans[: -self.keep_spans]

    def settled(self, until: float) -> Accounting:
        """What it comes to if it ends then, and it may go on. Costs what the instances and requests there are and the spans cost."""
        other = deepcopy(self, {id(self.found.spans): self.found.spans.copy()})
        other.settle(until)
        return other.found

    def _happened(self, event: m.AnyEvent, now: float) -> None:
        match event:
            case m.NodeJoined(node):
                self._lose_node(node.name, now)
                self._nodes[node.name] = _Node(node, now, node.devices, node.dram_nbytes, now)
            case m.NodeLost(name, also):
                for each in (name, *also):
                    self._lose_node(each, now)
            case m.ModelDeployed(model):
                self._specs[model.name] = model
            case m.RequestArrived(id):
                self._requests[id] = _Request(now)
            case m.RequestFinished(id, _, _, epoch):
                request = self._requests.get(id)
                if request is not None and request.epoch == epoch and request.instance is not None:
                    self.found.cold[_READY if request.rung is None else request.rung] += 1
                    self._end(id, now)
            case m.RequestCancelled(id):
                self._end(id, now)
            case m.RequestFailed(id, epoch):
                request = self._requests.get(id)
                if request is not None and request.epoch == epoch:
                    self._release(id, request, now)
            case m.InstanceReached(id, tier, _, _, epoch):
                instance = self._instances.get(id)
                if instance is not None and instance.epoch == epoch and instance.target > instance.warmth:
                    if instance.warmth < _DEVICE and instance.target >= _DRAM:
                        self._account.loads[tier] += 1
                        self.found.loaded_nbytes[tier] += instance.spec.nbytes
                    self._count(instance, now)
                    instance.warmth = instance.target
                    self._hold(instance, held_nbytes(instance.spec, instance.warmth))
                    instance.slot = slot(instance.warmth, IDLE)
            case m.InstanceFailed(id, _, epoch):
                instance = self._instances.get(id)
                if instance is not None and instance.epoch == epoch:
                    self._lose(instance, now)
            case m.MigrationFinished(id, seconds, _, epoch):
                request = self._requests.get(id)
                if request is not None and request.epoch == epoch and request.target is not None:
                    self._moved(id, request, request.target, seconds, now)
            case m.MigrationFailed(id, epoch):
                request = self._requests.get(id)
                if request is not None and request.epoch == epoch:
                    self._leave_target(id, request, now)

    def _decided(self, action: m.AnyAction, now: float) -> None:
        match action:
            case m.Start():
                self._start(action, now)
            case m.Descend(id, warmth, epoch):
                instance = self._instances[id]
                instance.epoch = epoch
                self._fall(instance, warmth, now)
            case m.Assign(id, where, epoch):
                self._assign(id, self._requests[id], self._instances[where], epoch, now)
            case m.Migrate(id, _, to, epoch):
                request, target = self._requests[id], self._instances[to]
                request.epoch, request.target, request.moved_at = epoch, target, now
                self._enter(target, id, now)
            case m.Preempt(id, _, epoch):
                request = self._requests[id]
                self._account.preemptions += 1
                self._account.lost_seconds += now - request.entered
                self._release(id, request, now)
                request.epoch = epoch
            case m.Refuse(id):
                self._end(id, now)

    # Requests

    def _assign(self, id: int, request: _Request, instance: _Instance, epoch: int, now: float) -> None:
        if request.rung is None:
            request.rung = instance.climbed_from if instance.began >= request.arrived else _READY
        request.epoch, request.instance, request.entered = epoch, instance, now
        self._enter(instance, id, now)
        instance.unused_gpu_seconds = instance.unused_byte_seconds = 0.0

    def _enter(self, instance: _Instance, id: int, now: float) -> None:
        if not instance.requests:
            self._count(instance, now)
            instance.slot = slot(_READY, BUSY)
        instance.requests.add(id)

    def _less(self, instance: _Instance, id: int, now: float) -> None:
        instance.requests.discard(id)
        if not instance.requests:
            self._count(instance, now)
            instance.slot = slot(_READY, IDLE)

    def _moved(self, id: int, request: _Request, target: _Instance, seconds: float, now: float) -> None:
        request.target = None
        self._span(target, "move", request.moved_at, now, id)
        self._release(id, request, now)
        request.instance, request.entered = target, now
        target.unused_gpu_seconds = target.unused_byte_seconds = 0.0
        self._account.migrations += 1
        self._account.moved_seconds += seconds

    def _leave_target(self, id: int, request: _Request, now: float) -> None:
        target, request.target = request.target, None
        if target is not None:
            self._account.failed_migrations += 1
            self._span(target, "held", request.moved_at, now, id)
            self._less(target, id, now)

    def _release(self, id: int, request: _Request, now: float) -> None:
        """It runs nowhere now."""
        instance, request.instance = request.instance, None
        if instance is not None:
            self._span(instance, "run", request.entered, now, id)
            self._less(instance, id, now)
        self._leave_target(id, request, now)

    def _end(self, id: int, now: float) -> None:
        request = self._requests.pop(id, None)
        if request is not None:
            self._release(id, request, now)

    # Instances and nodes

    def _start(self, action: m.Start, now: float) -> None:
        node, spec = self._nodes[action.node], self._specs[action.model]
        instance = self._instances.get(action.instance)
        if instance is None:
            instance = self._instances[action.instance] = node.instances[action.instance] = _Instance(action.instance, node, spec, now)
        self._count(instance, now)
        self._free(node, node.free_devices - len(set(action.devices) - set(instance.devices)), now)
        instance.devices = action.devices
        self._hold(instance, max(held_nbytes(spec, action.warmth), held_nbytes(spec, action.target)))
        instance.spec, instance.epoch, instance.target = spec, action.epoch, action.target
        instance.began, instance.climbed_from = now, action.warmth
        instance.slot = slot(action.target, CLIMBING)
        self._account.starts[action.warmth] += 1

    def _fall(self, instance: _Instance, warmth: Warmth, now: float) -> None:
        self._count(instance, now)
        self._count_unused(instance)
        node = instance.node
        if warmth < _DEVICE and instance.devices:
            self._free(node, node.free_devices + len(instance.devices), now)
            instance.devices = ()
        self._hold(instance, min(held_nbytes(instance.spec, warmth), instance.held_nbytes + node.free_nbytes))
        instance.warmth = instance.target = warmth
        instance.slot = slot(warmth, IDLE)
        if warmth == _COLD:
            del self._instances[instance.id], node.instances[instance.id]

    def _lose(self, instance: _Instance, now: float) -> None:
        for id in list(instance.requests):
            request = self._requests[id]
            if request.instance is instance:
                self._release(id, request, now)
            else:
                self._leave_target(id, request, now)
        self._fall(instance, _COLD, now)

    def _lose_node(self, name: str, now: float) -> None:
        node = self._nodes.get(name)
        if node is None:
            return
        for instance in list(node.instances.values()):
            self._lose(instance, now)
        self._free(node, 0, now)
        self._account.total_gpu_seconds += node.spec.devices * (now - node.joined)
        del self._nodes[name]

    # Sums

    def _count(self, instance: _Instance, now: float) -> None:
        seconds = now - instance.since
        if seconds <= 0.0:
            return
        devices, place = len(instance.devices), instance.slot
        self._account.gpu_seconds[place] += devices * seconds
        self._account.byte_seconds[place] += instance.held_nbytes * seconds
        if place % len(MODES) == CLIMBING:
            instance.unused_gpu_seconds += devices * seconds
            instance.unused_byte_seconds += instance.held_nbytes * seconds
        elif place % len(MODES) == IDLE:
            self._span(instance, "idle", instance.since, now)
        instance.since = now

    def _count_unused(self, instance: _Instance) -> None:
        self._account.unused_climb_gpu_seconds += instance.unused_gpu_seconds
        self._account.unused_climb_byte_seconds += instance.unused_byte_seconds
        instance.unused_gpu_seconds = instance.unused_byte_seconds = 0.0

    def _free(self, node: _Node, free: int, now: float) -> None:
        self._account.free_gpu_seconds += node.free_devices * (now - node.free_since)
        node.free_devices, node.free_since = free, now

    def _hold(self, instance: _Instance, nbytes: int) -> None:
        instance.node.free_nbytes += instance.held_nbytes - nbytes
        instance.held_nbytes = nbytes

    def _span(self, instance: _Instance, what: str, start: float, end: float, request: int = -1) -> None:
        if end > start:
            self.found.spans.append(InstanceSpan(instance.id, instance.node.spec.name, instance.model, what, instance.warmth, start, end, instance.devices, request))

    def settle(self, now: float) -> None:
        """Counts everything up to the end."""
        for instance in self._instances.values():
            self._count(instance, now)
            self._count_unused(instance)
        for node in self._nodes.values():
            self._free(node, node.free_devices, now)
            self._account.total_gpu_seconds += node.spec.devices * (now - node.joined)
