"""Who belongs to a live cluster: nodes that join, models that are deployed on all of them. On the driver's thread; chapter 08.

A node joins once its agent answers and knows every model that is deployed; a model is deployed once every node knows it. Both are
waited for by whoever asked, through a `Future`; the driver never waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container
from concurrent.futures import Future
from dataclasses import dataclass, field

from msgspec import structs

import sllm_mini.errors as errors
from sllm_mini.cluster.api import Deployment, StoreReport, keep_alive_seconds
from sllm_mini.cluster.bases import check_deploy, check_no_adapters
from sllm_mini.cluster.live.carry import Carry, NodeHandle
from sllm_mini.cluster.live.reviving import Reviver
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.control import messages as m
from sllm_mini.errors import InUseError, SllmError, WriteError
from sllm_mini.types import Tier


@dataclass(slots=True, eq=False)
class Joining:
    """A node that is not told to the controller yet."""

    handle: NodeHandle
    spec: m.NodeSpec
    done: Future[None]
    missing: set[str] | None = None
    """Models it does not know yet; None until it has answered."""
    cached: list[m.AnyEvent] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Deploying:
    """A model that is not told to the controller yet."""

    deployment: Deployment
    done: Future[None]
    missing: set[str]
    number: int
    digest: str = ""
    cached: list[m.AnyEvent] = field(default_factory=list)


class Members:
    """See the module. `deployed` are the models with the digests of their weights, `joined` the nodes with how often each name
    has joined, `reasons` why those that are gone are. `keep` writes what is deployed, or raises WriteError; a model that it could
    not write is not deployed."""

    def __init__(self, carry: Carry, join_order: Callable[[NodeHandle], node.Join], keep: Callable[[list[Deployment]], object]) -> None:
        self._carry, self.join_order, self._keep = carry, join_order, keep
        self.deployed: dict[str, tuple[Deployment, str]] = {}
        self.joined: dict[str, tuple[m.NodeSpec, int]] = {}
        self.reasons: dict[str, str] = {}
        self.stores: dict[str, StoreReport] = {}
        """As the stores of nodes that live were last said to be."""
        self._deleted: set[str] = set()
        """Models that are deleted and may still have requests or instances."""
        self.settled: list[Future[None]] = []
        """Whoever waits for these may go on once the controller knows: the driver sees to it."""
        self._joining: dict[str, Joining] = {}
        self._deploying: dict[str, Deploying] = {}
        self._numbers = itertools.count(1)
        self._starting: set[str] = set()
        """Nodes that somebody is making."""
        self.reviver: Reviver

    def incarnation(self, spec: m.NodeSpec) -> int:
        """Of the next node of this name, which is to join with it. Raises SllmError where one is alive or about to join."""
        if not self.is_away(spec.name):
            raise SllmError(f"a node {spec.name} is alive, or on its way; kill it once it is there, or give another name")
        number = self.joined.get(spec.name, (spec, 0))[1] + 1
        self.joined[spec.name] = spec, number
        self.reasons[spec.name] = "it has not come up yet"
        self._starting.add(spec.name)
        return number

    def is_away(self, name: str) -> bool:
        """Whether no node of this name is alive, joins or is being made."""
        return not (name in self._starting or name in self._joining or name in self._carry.handles)

    def given_up(self, name: str, times: int) -> None:
        """Nobody starts it again."""
        self.reasons[name] = f"{self.reasons.get(name, 'it was lost')}; it was started {times} times in a row in vain, and is given up"

    def withdraw(self, name: str) -> None:
        """It could not be made."""
        self._starting.discard(name)
        self.reasons[name] = "it could not be started"

    def begin(self, handle: NodeHandle, spec: m.NodeSpec, done: Future[None]) -> list[m.AnyEvent]:
        """`done` once the controller knows it; its answers are heard from now on."""
        self._starting.discard(spec.name)
        self._joining[spec.name] = Joining(handle, spec, done)
        return []

    @property
    def deployments(self) -> dict[str, Deployment]:
        """What is deployed, by name; a base comes before its adapters. From any thread."""
        return {name: deployment for name, (deployment, _) in list(self.deployed.items())}

    def deploy(self, deployment: Deployment, done: Future[None]) -> list[m.AnyEvent]:
        """`done` once the controller and every node knows it. Raises SllmError where no node is there to know it, and as `check_deploy` does."""
        name = deployment.spec.name
        check_deploy(deployment, self.deployments)
        if name in self._deploying:
            raise SllmError(f"the model {name} is being deployed already; wait for that")
        if not self._carry.handles:
            raise SllmError(f"there is no node that could know the model {name}; add one first")
        self._deleted.discard(name)
        number = next(self._numbers)
        self._deploying[name] = Deploying(deployment, done, set(self._carry.handles), number)
        late = [each for each in self._joining.values() if each.missing is not None]
        for each in late:
            each.missing.add(name)  # type: ignore[union-attr]
        self._register(deployment, number)
        return []

    def give_up(self, deployment: Deployment) -> bool:
        """Nobody waits for it any more; what registers it later is not heard. False where it is over."""
        deploying = self._deploying.get(deployment.spec.name)
        if deploying is None or deploying.deployment is not deployment:
            return False
        self._drop(deploying)
        return True

    def delete(self, model: str) -> list[m.AnyEvent]:
        """Raises InUseError while adapters of it are deployed, or on their way."""
        check_no_adapters(model, [*self.deployments.values(), *(each.deployment for each in self._deploying.values())], "cannot be deleted")
        if self.deployed.pop(model, None) is None:
            return []
        self._deleted.add(model)
        return [m.ModelDeleted(model)]

    def forget(self, known: Container[str]) -> list[m.AnyEvent]:
        """Deleted models that the controller does not know any more have had their last word: every store drops them."""
        events: list[m.AnyEvent] = []
        for model in [each for each in self._deleted if each not in known]:
            self._deleted.discard(model)
            for handle in (*self._carry.handles.values(), *(each.handle for each in self._joining.values())):
                handle.give(node.Forget(model))
            events += [m.Evicted(name, model, Tier.REMOTE) for name in self._carry.handles]
        return events

    def has_joined(self, handle: NodeHandle) -> bool:
        return self._carry.handles.get(handle.name) is handle

    def is_ours(self, handle: NodeHandle) -> bool:
        """Whether it is the present incarnation, which has joined or is about to."""
        joining = self._joining.get(handle.name)
        return self.has_joined(handle) or (joining is not None and joining.handle is handle)

    def heard(self, handle: NodeHandle, answer: node.NodeAnswer) -> list[m.AnyEvent]:
        """Of one that is ours."""
        joining = self._joining.get(handle.name)
        match answer:
            case node.Joined():
                if joining is not None and joining.missing is None:
                    joining.missing = {*self.deployed, *self._deploying}
                    new = (each.deployment for name, each in self._deploying.items() if name not in self.deployed)
                    for deployment in (*self.deployments.values(), *new):  # bases come first
                        handle.give(_register(deployment))
                    return self._look(joining)
            case node.Registered(model=model, digest=digest, tier=tier, number=number):
                cached: list[m.AnyEvent] = [] if tier is Tier.REMOTE else [m.Cached(handle.name, model, tier)]
                if joining is not None and joining.missing is not None:
                    if model in self.deployed and not self.deployed[model][1]:  # as of a cluster that was resumed
                        self.deployed[model] = self.deployed[model][0], digest
                    if model in self.deployed and self.deployed[model][1] != digest:
                        return self.gone(handle, _other_weights(model, handle.name))
                    joining.missing.discard(model)
                    joining.cached += cached
                    return self._look(joining)
                deploying = self._deploying.get(model)
                if deploying is not None and handle.name in deploying.missing and number in (0, deploying.number):
                    deploying.digest = deploying.digest or digest
                    if digest != deploying.digest:
                        return self._fail(deploying, SllmError(_other_weights(model, handle.name)))
                    deploying.missing.discard(handle.name)
                    deploying.cached += cached
                    return self._finish(deploying)
            case node.Figures():
                self.stores[handle.name] = StoreReport(**structs.asdict(answer))
            case node.OrderFailed(model=model, kind=kind, message=message, number=number):
                error = _error(kind, f"{handle.name}: {message}")
                deploying = self._deploying.get(model)
                if joining is not None:
                    if deploying is None or model in self.deployed or joining.missing is None:
                        return self.gone(handle, str(error))
                    joining.missing.discard(model)  # it is the model that cannot be, not the node
                    return [*self._fail(deploying, error), *self._look(joining)]
                if deploying is not None and handle.name in deploying.missing and number in (0, deploying.number):
                    return self._fail(deploying, error)
        return []

    def gone(self, handle: NodeHandle, why: str) -> list[m.AnyEvent]:
        """A node has gone, whether it had joined or not."""
        joining = self._joining.get(handle.name)
        if self.is_ours(handle):
            self.stores.pop(handle.name, None)
        if joining is not None and joining.handle is handle:
            del self._joining[handle.name]
            self.reasons[handle.name] = why
            joining.done.set_exception(SllmError(f"the node {handle.name} did not come up: {why}"))
            handle.kill()
            return []
        events = self._carry.gone(handle)
        if events:
            self.reasons[handle.name] = why
            self.reviver.lost(self.joined[handle.name][0])
            for deploying in list(self._deploying.values()):
                if handle.name in deploying.missing:
                    deploying.missing.discard(handle.name)
                    events += self._finish(deploying)
        return events

    def fail_all(self, error: BaseException) -> None:
        """Nobody waits any more."""
        for deploying in self._deploying.values():
            deploying.done.set_exception(error)
        for joining in self._joining.values():
            joining.done.set_exception(error)
            joining.handle.kill()
        self._joining.clear()
        self._deploying.clear()

    def _register(self, deployment: Deployment, number: int) -> None:
        """Told to all that have joined, or have begun to ask for models. The answers have that number, or 0 where nobody knows."""
        late = [each.handle for each in self._joining.values() if each.missing is not None]
        for handle in (*self._carry.handles.values(), *late):
            handle.give(_register(deployment, number))

    def _look(self, joining: Joining) -> list[m.AnyEvent]:
        if joining.missing:
            return []
        name = joining.spec.name
        del self._joining[name]
        self._carry.handles[name] = joining.handle
        self.reasons.pop(name, None)
        self.reviver.came(name)
        for deploying in self._deploying.values():
            deploying.missing.discard(name)
        self.settled.append(joining.done)
        return [m.NodeJoined(joining.spec), *joining.cached]

    def _finish(self, deploying: Deploying) -> list[m.AnyEvent]:
        if deploying.missing:
            return []
        deployment, name = deploying.deployment, deploying.deployment.spec.name
        if not deploying.digest:
            return self._fail(deploying, SllmError(f"every node went while {name} was being deployed; add one and deploy it again"))
        before, digest = self.deployed.get(name, (None, ""))
        try:
            if digest not in ("", deploying.digest):
                check_no_adapters(name, self.deployments.values(), "cannot get other weights")
            self._keep([each for each, _ in ({**self.deployed, name: (deployment, "")}).values()])
        except InUseError as error:
            return self._fail(deploying, error)
        except WriteError as error:
            return self._fail(deploying, WriteError(f"{name} was not deployed, since a cluster that is resumed would not know it: {error}"))
        del self._deploying[name]
        self.deployed[name] = deployment, deploying.digest
        self.settled.append(deploying.done)
        return [*deploying.cached, *of_deployment(deployment, before)]

    def _fail(self, deploying: Deploying, error: SllmError) -> list[m.AnyEvent]:
        self._drop(deploying)
        deploying.done.set_exception(error)
        return []

    def _drop(self, deploying: Deploying) -> None:
        """Some nodes may know the model already: their stores are told to forget it, or what it was before."""
        name = deploying.deployment.spec.name
        del self._deploying[name]
        if name in self.deployed:
            self._register(self.deployed[name][0], next(self._numbers))
        else:
            self._deleted.add(name)


def of_deployment(deployment: Deployment, before: Deployment | None = None) -> list[m.AnyEvent]:
    """What the controller is to be told of it, where it knew `before`."""
    name, kept = deployment.spec.name, None if before is None else before.keep_alive
    asked = [] if deployment.keep_alive == kept else [m.KeepAliveAsked(name, keep_alive_seconds(deployment.keep_alive))]
    return [m.ModelDeployed(deployment.spec), *asked]


def _register(deployment: Deployment, number: int = 0) -> node.Register:
    return node.Register(deployment.spec.name, deployment.source, deployment.tier, deployment.base, number)


def _error(kind: str, message: str) -> SllmError:
    found = getattr(errors, kind, None)
    made = isinstance(found, type) and issubclass(found, SllmError)
    return found(message) if made else SllmError(f"{kind}: {message}")  # type: ignore[misc]


def _other_weights(model: str, node_name: str) -> str:
    return f"the checkpoint of {model} is another one on {node_name} than elsewhere; give a source that is the same everywhere"
