"""Multicast through the driver: starts of one model that come together are one plan, in which nodes feed each other. Chapter 10.

The controller knows nothing of it: its actions, and so its log, are the same with it and without. A climb is given at once and says
which plan its weights may come by; `gather_seconds` later each node of the plan is told its part, while workers are still being
launched, and with `joint` which layers it serves until a node has the model whole. Plans are made on a thread of their own, for they may take longer
than the driver has.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Protocol

from msgspec.structs import replace

from sllm_mini.cluster.block_messages import parts_of
from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.control import messages as m
from sllm_mini.control.multicast.gather import Gathered, plan_of, shares_of, stages_of
from sllm_mini.control.multicast.joint import JointStage
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth

Fetched = node.Fetched


class Told(Protocol):
    """What is needed of a `NodeHandle`."""

    @property
    def name(self) -> str: ...

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None: ...


@dataclass(slots=True, eq=False)
class _Gathering:
    """Starts that may become one plan, at `at`."""

    plan: str
    at: float
    nodes: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Spread:
    """A plan that somebody waits for; `waiting` are the nodes whose parts go on."""

    waiting: set[str]
    done: Future[dict[str, Fetched]]
    found: dict[str, Fetched] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Joint:
    """A pipeline on its way: where its stages serve, once they do, and which nodes they are on."""

    nodes: list[str]
    addresses: list[str]


class Spreading:
    """See the module. On the driver's thread. `handles` are the nodes that are alive; `holders(model)` those whose store has it, and where."""

    def __init__(
        self, options: LiveOptions, run: str, handles: Mapping[str, Told], holders: Callable[[str], Mapping[str, Tier]], now: Callable[[], float],
    ) -> None:  # fmt: skip
        self._options, self._run, self._handles, self._holders, self._now = options, run, handles, holders, now
        self._numbers = itertools.count()
        self._peers: dict[str, str] = {}
        self._blocks: dict[str, int] = {}
        self._gathering: dict[str, _Gathering] = {}
        self._spreads: dict[str, _Spread] = {}
        self._layers: dict[str, list[frozenset[int]]] = {}
        self._joints: dict[str, _Joint] = {}

    def gather(self, start: m.Start) -> str:
        """The plan by which the start's weights may come; "" where it reads them itself."""
        climbs = start.warmth < Warmth.DRAM <= start.target and start.node in self._here()
        if not self._options.multicast or start.tier is not Tier.REMOTE or not climbs:
            return ""
        gathering = self._gathering.get(start.model)
        if gathering is None:
            gathering = self._gathering[start.model] = _Gathering(self._next(), self._now() + self._options.gather_seconds)
        gathering.nodes.append(start.node)
        return gathering.plan

    def share(self, start: m.Start) -> str:
        """The plan by which the nodes that the start names each read a share of its weights and pass it on; "" as in `gather`."""
        readers = [name for name in start.parts if name in self._here()]
        blocks = self._blocks.get(start.model, 0)
        if start.warmth >= Warmth.DRAM or start.target < Warmth.DRAM or start.node not in self._here() or not readers or not blocks:
            return ""
        plan = self._next()
        self._begin(plan, start.model, [start.node], lambda: shares_of(start.node, readers, blocks))
        return plan

    def due(self, now: float) -> float:
        """Begins what has been gathered long enough; seconds until there is more to do."""
        for model, gathering in list(self._gathering.items()):
            if gathering.at <= now:
                del self._gathering[model]
                holders, targets, blocks = self._holders(model), [name for name in gathering.nodes if name in self._here()], self._blocks.get(model, 0)
                sources = sorted((name for name in holders if name in self._here()), key=lambda name: -holders[name])
                make = partial(plan_of, targets, sources, blocks, self._options.multicast or "binomial", runs=self._options.joint)
                self._begin(gathering.plan, model, gathering.nodes, make if blocks else lambda: None)
        return min((each.at for each in self._gathering.values()), default=inf) - now

    def around(self, model: str, nodes: Sequence[str]) -> tuple[list[str], list[str], int]:
        """Those of the nodes that lack the model in memory, all nodes that have it there, and in how many blocks it is sent. Raises SllmError for
        nodes and models that are not there."""
        if missing := [name for name in nodes if name not in self._here()]:
            raise SllmError(f"there is no node {missing[0]} that is alive; nodes() has those that are")
        if not self._blocks.get(model):
            raise SllmError(f"there is no model {model}; deploy it first")
        held = [name for name, tier in self._holders(model).items() if tier is Tier.DRAM and name in self._here()]
        return [name for name in dict.fromkeys(nodes) if name not in held], held, self._blocks[model]

    def spread(self, model: str, gathered: Gathered, done: Future[dict[str, Fetched]]) -> list[m.AnyEvent]:
        """Carries out a plan that somebody waits for; `done` gets what became of each node's part."""
        plan = self._next()
        self._spreads[plan] = _Spread(set(gathered.nodes), done)
        for name in [each for each in gathered.nodes if each not in self._here()]:
            self._ended(plan, name, Fetched(plan, model, error=f"the node {name} is gone"))
        self._tell(plan, model, gathered, self._here())
        return []

    def heard(self, handle: Told, answer: node.NodeAnswer) -> None:
        match answer:
            case node.Joined(peers=address):
                self._peers[handle.name] = address
            case node.Registered(model=model, blocks=blocks, layers=layers):
                self._blocks[model] = blocks
                self._layers[model] = [frozenset(each) for each in layers]
            case node.Staged(plan=plan, stage=stage, address=address):
                self._staged(plan, handle.name, stage, address)
            case node.Fetched(plan=plan):
                self._joints.pop(plan, None)  # whoever waits to serve will have it whole soon
                self._ended(plan, handle.name, answer)

    def forget(self, model: str) -> None:
        """It is deleted: what it still starts reads the source."""
        self._blocks.pop(model, None)
        self._layers.pop(model, None)

    def gone(self, name: str) -> None:
        for plan in [plan for plan, joint in list(self._joints.items()) if name in joint.nodes]:
            self._joints.pop(plan, None)
        for plan in list(self._spreads):
            self._ended(plan, name, Fetched(plan, "-", error=f"the node {name} is gone"))

    def fail_all(self, error: SllmError) -> None:
        """Nobody waits any more."""
        for spread in self._spreads.values():
            spread.done.set_exception(error)
        self._spreads.clear()

    # Parts

    def _here(self) -> dict[str, Told]:
        """Nodes that are alive and take part in plans."""
        return {name: handle for name, handle in self._handles.items() if self._peers.get(name)}

    def _next(self) -> str:
        return f"{self._run}-{next(self._numbers)}"

    def _ended(self, plan: str, name: str, answer: Fetched) -> None:
        spread = self._spreads.get(plan)
        if spread is not None and name in spread.waiting:
            spread.waiting.discard(name)
            spread.found[name] = answer
            if not spread.waiting:
                del self._spreads[plan]
                spread.done.set_result(spread.found)

    def _begin(self, plan: str, model: str, starting: Sequence[str], make: Callable[[], Gathered | None]) -> None:
        """Makes a plan on a thread of its own and tells it; whoever is `starting` and has no part in it reads the model itself."""
        here, layers = self._here(), self._layers.get(model, [])

        def run() -> None:
            gathered = make()
            for name in starting:
                if name in here and (gathered is None or name not in gathered.nodes):
                    here[name].give(node.Fetch(plan, model, None))
            if gathered is not None:
                self._tell(plan, model, gathered, here, stages_of(gathered, starting, layers) if self._options.joint else ())

        threading.Thread(target=run, name="sllm-plan", daemon=True).start()

    def _staged(self, plan: str, name: str, stage: int, address: str) -> None:
        """A stage serves; once all before the last do, the node with that is told where."""
        joint = self._joints.get(plan)
        if joint is None or stage >= len(joint.addresses) or joint.nodes[stage] != name:
            return
        joint.addresses[stage] = address
        if all(joint.addresses):
            del self._joints[plan]
            last = self._here().get(joint.nodes[-1])
            if last is not None:
                last.give(node.Pipeline(plan, joint.addresses))

    def _tell(self, plan: str, model: str, gathered: Gathered, here: Mapping[str, Told], joint: Sequence[JointStage] = ()) -> None:
        stages = tuple(node.Stage(stage.node, stage.start, stage.stop) for stage in joint)
        if len(stages) > 1:
            self._joints[plan] = _Joint([gathered.nodes[stage.node] for stage in joint], [""] * (len(stages) - 1))
        parts = parts_of(gathered.plan, plan, [self._peers.get(name, "") for name in gathered.nodes], self._options.node.block_nbytes)
        for name, part, reads in zip(gathered.nodes, parts, gathered.reads, strict=True):
            if name in here:
                here[name].give(node.Fetch(plan, model, replace(part, reads=reads, whole=name in gathered.whole), stages))
