"""The cluster as the controller knows it: nodes, models, instances and requests, and the only moves that change them.

For policies, who read and never change it:

    cluster.nodes[name], cluster.models[name], cluster.instances[id], cluster.requests[id]   (see `state`)
    cluster.open_nodes(devices, nbytes)   nodes that could give so much, counting idle instances, soonest to load first
    cluster.idle_instances(node)          of one node: who gives way first comes first
    cluster.sleeping(node, runtime)       idle processes without a model to climb from, of one node or of all, warmest first
    cluster.warmest(model)                how warm the best instance is that could serve one more request
    model.open, model.asleep, model.starting, model.cached_on, model.queue

The moves keep every count and index true; a caller gives what the names say and in this order: an instance is born
(`spawn`), climbs (`climb`, `book`, `reached`), gets and loses requests, rests between them (`rest`), falls (`fall`).
Pure; one thread at a time. A move costs some microseconds, whatever the number of nodes, models and instances. Taught in
chapter 08.
"""

from __future__ import annotations

from bisect import insort

from sllm_mini.control.inventory import Inventory
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.state import InstanceState, ModelState, NodeState, Phase, RequestState, held_nbytes
from sllm_mini.types import Warmth

_READY, _RUNTIME, _DEVICE, _DRAM, _COLD = Warmth.READY, Warmth.RUNTIME, Warmth.DEVICE, Warmth.DRAM, Warmth.COLD
_QUEUED, _RUNNING = Phase.QUEUED, Phase.RUNNING
"""An attribute of an enumeration costs ten times as much as a name."""


class Cluster(Inventory):
    """See the module's words. `Cluster()` is empty."""

    # Instances

    def spawn(self, node: NodeState, spec: ModelSpec, now: float) -> InstanceState:
        """A new one at COLD, which holds nothing yet."""
        instance = InstanceState(self.spawned, node.spec.name, spec, None, None, _COLD, _COLD, started=now)
        self.spawned += 1
        self.instances[instance.id] = node.instances[instance.id] = instance
        return instance

    def climb(self, instance: InstanceState, spec: ModelSpec, target: Warmth) -> None:
        """From where it is (new or idle) to `target`, above its warmth. What it needs for that is had by `book`."""
        self.wake(instance)
        instance.spec, instance.target = spec, target
        self.nodes[instance.node].climbing += 1
        if target >= _RUNTIME:
            instance.runtime = spec.runtime
        if target >= _DRAM:
            instance.model = spec.name
            model = self.models[spec.name]
            model.instances[instance.id] = instance
            if target == _READY:
                model.starting[instance.id] = instance
        else:
            self.prewarming[instance.id] = instance

    def book(self, instance: InstanceState) -> bool:
        """Takes what a climbing instance still lacks, as far as it is free: lowest devices first. True when it has all."""
        node, spec = self.nodes[instance.node], instance.spec
        devices = spec.devices - len(instance.devices) if instance.target >= _DEVICE else 0
        taken = min(devices, len(node.free_devices))
        if taken > 0:
            instance.devices = tuple(sorted((*instance.devices, *node.free_devices[:taken])))
            del node.free_devices[:taken]
        nbytes = max(held_nbytes(spec, instance.warmth), held_nbytes(spec, instance.target)) - instance.held_nbytes
        given = max(0, min(nbytes, node.free_nbytes))
        node.free_nbytes -= given
        instance.held_nbytes += given
        self._changed[instance.node] = node
        return taken >= devices and given >= nbytes

    def reached(self, instance: InstanceState, whole: bool = True) -> None:
        """It is as warm as its target, its weights all there or (not `whole`) still on their way. It holds what that needs, and
        is open where that is READY."""
        node = self.nodes[instance.node]
        node.climbing -= 1
        instance.climbed_from = instance.warmth
        instance.loading = not whole
        if whole and instance.links:
            self._loaded(instance)
        self.prewarming.pop(instance.id, None)
        instance.warmth = instance.target
        instance.rested = None
        held = held_nbytes(instance.spec, instance.warmth)
        node.free_nbytes += instance.held_nbytes - held
        instance.held_nbytes = held
        if instance.warmth == _READY:
            model = self.models[instance.spec.name]
            del model.starting[instance.id]
            model.ready += 1
            self._reopened(instance, model)

    def load(self, instance: InstanceState, node: NodeState, until: float) -> None:
        """Its weights, or a part of them, come over the link of this node, until then as is expected."""
        node.loading[instance.id] = None
        instance.links += (node.spec.name,)
        self.set_loads_until(node, until)

    def whole(self, instance: InstanceState) -> None:
        """The last byte of one that was reached before."""
        instance.loading = False
        self._loaded(instance)

    def _loaded(self, instance: InstanceState) -> None:
        """They have come, or will not: a link over which nothing comes any more is free."""
        for name in instance.links:
            node = self.nodes.get(name)  # another of this name may have joined since: it is not loading for this one
            if node is not None and instance.id in node.loading:
                del node.loading[instance.id]
                if not node.loading:
                    self.set_loads_until(node, 0.0)
        instance.links = ()

    def rest(self, instance: InstanceState, rank: float, now: float) -> None:
        """It is idle from now on, or since it was before: it neither climbs nor has requests, here or on their way."""
        node = self.nodes[instance.node]
        if instance.rested is None:
            instance.rested = now
        instance.idle_since, instance.rank = instance.rested, rank
        self._idle_of[instance.node].add(instance.id, rank)
        node.idle_nbytes += instance.held_nbytes
        if instance.devices:
            node.idle_devices += len(instance.devices)
            self._changed[instance.node] = node
        if instance.model is None:
            for asleep in (self._asleep, self._asleep_on[instance.node]):
                asleep.setdefault(instance.runtime or "", {})[instance.id] = instance
        elif instance.warmth < _READY:
            self.models[instance.model].asleep[instance.id] = instance

    def wake(self, instance: InstanceState) -> None:
        """It is no longer idle, if it was."""
        if instance.idle_since is None:
            return
        node = self.nodes[instance.node]
        instance.idle_since = instance.warm_until = None
        self._idle_of[instance.node].discard(instance.id)
        node.idle_nbytes -= instance.held_nbytes
        if instance.devices:
            node.idle_devices -= len(instance.devices)
            self._changed[instance.node] = node
        if instance.model is None:
            for asleep in (self._asleep, self._asleep_on[instance.node]):
                del asleep[instance.runtime or ""][instance.id]
        elif instance.warmth < _READY:
            del self.models[instance.model].asleep[instance.id]

    def fall(self, instance: InstanceState, warmth: Warmth) -> None:
        """It keeps what `warmth` holds and gives back the rest, climbing or not; at COLD it is gone. Without requests, and
        afterwards not idle: `rest` follows."""
        if instance.idle_since is not None:
            self.wake(instance)
        node = self.nodes[instance.node]
        model = None if instance.model is None else self.models[instance.model]
        instance.loading = False
        if instance.links:
            self._loaded(instance)
        if instance.climbing:
            node.climbing -= 1
            self.prewarming.pop(instance.id, None)
            if model is not None:
                model.starting.pop(instance.id, None)
        if model is not None:
            if instance.warmth == _READY and warmth < _READY and not instance.draining:
                model.ready -= 1
            model.open.pop(instance.id, None)
            if warmth < _DRAM:
                del model.instances[instance.id]
                instance.model = None
        instance.draining = False
        if warmth < _RUNTIME:
            instance.runtime = None
        if warmth < _DEVICE:
            for device in instance.devices:
                insort(node.free_devices, device)
            instance.devices = ()
        held = min(held_nbytes(instance.spec, warmth), instance.held_nbytes + node.free_nbytes)
        node.free_nbytes += instance.held_nbytes - held
        instance.held_nbytes = held
        instance.warmth = instance.target = warmth
        self._changed[instance.node] = node
        if warmth == _COLD:
            del self.instances[instance.id], node.instances[instance.id]

    def drain(self, instance: InstanceState, draining: bool) -> None:
        """It takes no new requests and is nobody's to use, or is again; `rest` it then, if it has no requests."""
        self.wake(instance)
        if instance.draining != draining:
            instance.draining = draining
            if instance.warmth == _READY:
                model = self.models[instance.spec.name]
                model.ready += -1 if draining else 1
                self._reopened(instance, model)

    def _reopened(self, instance: InstanceState, model: ModelState) -> None:
        """It was used: to the end of the open ones, if it still is one."""
        id = instance.id
        model.open.pop(id, None)
        if instance.warmth == _READY and not instance.draining and len(instance.requests) + len(instance.incoming) < instance.spec.concurrency:
            model.open[id] = instance

    def fits(self, instance: InstanceState, warmth: Warmth) -> bool:
        """Whether the node has the memory for it to descend to `warmth`: weights that leave a device need some."""
        return held_nbytes(instance.spec, warmth) <= instance.held_nbytes + self.nodes[instance.node].free_nbytes

    # Requests

    def add_request(self, id: int, model: ModelState, input_tokens: int, prefix: str, now: float) -> RequestState:
        """Known now, neither queued nor running."""
        request = self.requests[id] = RequestState(id, model.spec.name, input_tokens, prefix, now, self.arrivals)
        self.arrivals += 1
        return request

    def enqueue(self, request: RequestState, model: ModelState) -> None:
        """In its place in the order of arrival. What came back is among the first, what is new the last."""
        queue = model.queue
        if not queue or queue[-1].order < request.order:
            queue.append(request)
        else:
            queue.insert(next(place for place, other in enumerate(queue) if other.order > request.order), request)
        if model.short and queue[0] is request:
            self.set_short(model, True)

    def dequeue(self, request: RequestState, model: ModelState) -> None:
        queue = model.queue
        if queue[0] is not request:
            queue.remove(request)
            return
        queue.popleft()
        if model.short:
            self.set_short(model, True)

    def assign(self, request: RequestState, instance: InstanceState, model: ModelState, now: float) -> None:
        """To a READY instance with room."""
        if instance.idle_since is not None:
            self.wake(instance)
        request.phase, request.instance, request.assigned = _RUNNING, instance.id, now
        instance.requests[request.id] = request
        instance.uses += 1
        instance.rank, instance.rested = 0.0, None
        model.running += 1
        self._reopened(instance, model)

    def move(self, request: RequestState, target: InstanceState) -> None:
        """Keeps a place for a running request on the instance it will move to."""
        self.wake(target)
        request.target = target.id
        target.incoming[request.id] = request
        self._reopened(target, self.models[request.model])

    def moved(self, request: RequestState) -> None:
        """It runs where it moved to."""
        model = self.models[request.model]
        source, target = self.instances[request.instance], self.instances[request.target]  # type: ignore[index]
        del source.requests[request.id], target.incoming[request.id]
        target.requests[request.id] = request
        target.uses += 1
        target.rank, target.rested = 0.0, None
        request.phase, request.instance, request.target = _RUNNING, target.id, None
        request.migrations += 1
        self._reopened(source, model)
        self._reopened(target, model)

    def unmove(self, request: RequestState) -> InstanceState | None:
        """The place is given up, if it had one; returns the instance it was on."""
        if request.target is None:
            return None
        target = self.instances[request.target]
        del target.incoming[request.id]
        request.target = None
        if request.phase == Phase.MIGRATING:
            request.phase = _RUNNING
        self._reopened(target, self.models[request.model])
        return target

    def leave(self, request: RequestState) -> None:
        """A running request is in no instance any more; `unmove` it first."""
        instance = self.instances[request.instance]  # type: ignore[index]
        model = self.models[request.model]
        del instance.requests[request.id]
        request.phase, request.instance = _QUEUED, None
        model.running -= 1
        self._reopened(instance, model)
