"""Actions into orders to nodes, answers into events for the controller. Runs on the driver's thread; chapter 08.

An order is only put into a node's hand; nobody waits. An answer counts if it comes from the present incarnation of a node and is
about the last decision on its instance. An assignment of a short request costs some 75 us, nearly all of it the
session's bytes; another action 2 us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.cluster.live.spreading import Spreading
from sllm_mini.cluster.live.ways import Pair, Ways
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.router import Place, Router
from sllm_mini.control import messages as m
from sllm_mini.types import Tier, Warmth


class NodeHandle(Protocol):
    """One incarnation of a node. `give` neither waits nor raises: what cannot be said shows as `on_gone`, once, from any thread."""

    @property
    def name(self) -> str: ...
    @property
    def incarnation(self) -> int: ...

    def open(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        """From now on its answers are told."""
        ...

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None: ...

    def kill(self) -> None:
        """As a machine that fails."""
        ...

    def close(self) -> None:
        """Ends it and waits for that."""
        ...


@dataclass(slots=True, eq=False)
class Placed:
    """An instance and the node it is on. `owner` is its name at the register since its last start."""

    id: int
    handle: NodeHandle
    owner: str
    epoch: int
    warmth: Warmth
    target: Warmth
    began: float
    climbed_from: Warmth
    address: str = ""
    """Where its worker takes moves in."""
    whole: bool = True
    """Not where it serves while its weights arrive."""
    tier: Tier | None = None
    load_seconds: float = 0.0
    rungs: list[node.Rung] = field(default_factory=list)

    def place(self) -> Place:
        return Place(self.id, self.owner, self.began, self.climbed_from, self.tier, self.load_seconds)


class Carry:
    """See the module. `timer(id, at)` is called for each that the controller sets; `run` names this life of the driver: owners of
    another one are nobody. `concurrency(model)` is how many requests one of its instances takes."""

    def __init__(
        self, router: Router, options: LiveOptions, run: str, now: Callable[[], float], timer: Callable[[int, float], None], concurrency: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._router, self._options, self._run, self._now, self._timer, self._concurrency = router, options, run, now, timer, concurrency
        self.handles: dict[str, NodeHandle] = {}
        self.placed: dict[int, Placed] = {}
        self.spreading: Spreading | None = None
        """Who brings models to several nodes at once, where anybody does."""
        self._ways = Ways()
        self._moves: dict[int, Pair] = {}
        """Between which nodes each request moves, or moved last."""
        self._leaving: dict[str, NodeHandle] = {}
        self._lost_now: dict[int, Placed] = {}
        """Nodes and instances whose loss is being told. What is told before it (moves that are settled) may still make the controller
        decide about them: that is carried out into the void, and the loss takes it back."""

    def do(self, action: m.AnyAction) -> list[m.AnyEvent]:
        """Carries it out; what the controller is to be told at once."""
        match action:
            case m.Start():
                self._start(action)
            case m.Descend(id, warmth, epoch):
                self._descend(id, warmth, epoch)
            case m.Assign(number, id, epoch):
                return self._assign(number, self._find(id), epoch)
            case m.Migrate(number, source, target, epoch):
                self._migrate(number, self._find(source), self._find(target), epoch)
            case m.Preempt(number, _, epoch):
                name = self._router.id_of(number)
                self._drop(name, *self._router.take_back(number, epoch))
            case m.Refuse(number, reason):
                self._router.refuse(number, reason)
            case m.SetTimer(id, at):
                self._timer(id, at)
        return []

    def heard(self, handle: NodeHandle, answer: node.NodeAnswer) -> list[m.AnyEvent]:
        """What the controller is to be told of an answer; nothing where the node has been given up."""
        if self.spreading is not None:
            self.spreading.heard(handle, answer)  # also of one that joins
        if self.handles.get(handle.name) is not handle:
            return []
        self._forget_lost()
        match answer:
            case node.Serves():
                return self._serves(answer)
            case node.Reached():
                return self._reached(answer)
            case node.Lost(id, _, reason):
                return self._lost(handle, id, reason)
            case node.RunFailed(request_id=request_id, register_epoch=epoch, message=message):
                number = self._router.number_of(request_id)
                return [] if number is None else self._router.failed(number, epoch, message)
            case node.Moved(request_id=request_id, epoch=epoch, outcome=outcome, seconds=seconds):
                number = self._router.number_of(request_id)
                if answer.report is not None and number in self._moves:
                    self._ways.learn(self._moves[number], answer.report)
                return [] if number is None else self._router.moved(number, epoch, outcome, seconds)
            case node.Stored(model=model, tier=tier, there=there):
                return [m.Cached(handle.name, model, tier) if there else m.Evicted(handle.name, model, tier)]
        return []

    def gone(self, handle: NodeHandle) -> list[m.AnyEvent]:
        """A node is lost. All moves are settled before any loss is told, and the loss of the node is told once."""
        if self.handles.get(handle.name) is not handle:
            return []
        self._forget_lost()
        if self.spreading is not None:
            self.spreading.gone(handle.name)
        self._ways.forget(handle.name)
        self._leaving[handle.name] = self.handles.pop(handle.name)
        events: list[m.AnyEvent] = []
        for placed in [each for each in self.placed.values() if each.handle is handle]:
            events += self._router.settle(placed.owner)
            self._lost_now[placed.id] = self.placed.pop(placed.id)
        return [*events, m.NodeLost(handle.name)]

    def over(self, number: int) -> list[m.AnyEvent]:
        """A request has ended for its reader."""
        events, running = self._router.over(number)
        self._moves.pop(number, None)
        if running is not None:
            self._drop(self._router.id_of(number), *running)
        return events

    # Parts

    def _find(self, id: int) -> Placed:
        return self.placed[id] if id in self.placed else self._lost_now[id]

    def _forget_lost(self) -> None:
        """All that was heard before has been told."""
        self._leaving.clear()
        self._lost_now.clear()

    def _start(self, action: m.Start) -> None:
        here = action.node in self.handles
        handle = self.handles[action.node] if here else self._leaving[action.node]
        owner = node.owner_name(self._run, handle.name, handle.incarnation, action.instance, action.epoch)
        before = self.placed.get(action.instance)
        placed = Placed(action.instance, handle, owner, action.epoch, action.warmth, action.target, self._now(), action.warmth)
        if before is not None:
            placed.rungs, placed.tier, placed.load_seconds = before.rungs, before.tier, before.load_seconds
        (self.placed if here else self._lost_now)[action.instance] = placed
        plan = (self.spreading.share(action) if action.parts else self.spreading.gather(action)) if here and self.spreading is not None else ""
        climb = node.Climb(
            action.instance, action.epoch, action.model, action.warmth, action.target, action.tier, list(action.devices), self._concurrency(action.model),
            plan, self._options.overlap,
        )  # fmt: skip
        handle.give(climb)

    def _descend(self, id: int, warmth: Warmth, epoch: int) -> None:
        placed = self._find(id)
        self._router.register.retire(placed.owner)
        placed.epoch, placed.warmth, placed.target = epoch, warmth, warmth
        if warmth == Warmth.COLD:
            self.placed.pop(id, None)
        placed.handle.give(node.Fall(id, epoch, warmth))

    def _assign(self, number: int, placed: Placed, epoch: int) -> list[m.AnyEvent]:
        begun = self._router.assign(number, placed.place(), epoch)
        if begun is None:
            # Over already: the controller has to hear it again, with this decision. Else its owner is gone, and that is told next.
            return [] if self._router.is_open(number) else self.over(number)
        session, register_epoch = begun
        run, state = node.Run(placed.id, session.request_id, register_epoch), session.to_bytes()
        self._router.lines.give(placed.owner, register_epoch, state, partial(placed.handle.give, run, state))
        return []

    def _migrate(self, number: int, source: Placed, target: Placed, epoch: int) -> None:
        self._router.moving(number, target.place(), epoch)
        options, name = self._options, self._router.id_of(number)
        report = self._router.report(name)
        self._moves[number] = pair = source.handle.name, target.handle.name, report.model
        mode = self._ways.choose(pair, report.input_tokens + report.output_tokens) if options.move_mode == "auto" else options.move_mode
        source.handle.give(node.Move(name, source.id, target.address, mode, options.move_gap_tokens, epoch))

    def _drop(self, name: str, owner: str, epoch: int) -> None:
        placed = next((each for each in self.placed.values() if each.owner == owner), None)
        if placed is not None:
            placed.handle.give(node.Drop(placed.id, name, epoch))

    def _serves(self, answer: node.Serves) -> list[m.AnyEvent]:
        placed = self.placed.get(answer.instance)
        if placed is None or placed.epoch != answer.epoch or placed.warmth >= placed.target:
            return []
        placed.warmth, placed.tier, placed.load_seconds, placed.address, placed.whole = placed.target, answer.tier, 0.0, answer.address, False
        return [m.InstanceReached(placed.id, answer.tier, max(0.0, self._now() - placed.began), 0.0, answer.epoch, whole=False)]

    def _reached(self, answer: node.Reached) -> list[m.AnyEvent]:
        placed = self.placed.get(answer.instance)
        if placed is None or placed.epoch != answer.epoch or (placed.warmth >= placed.target and placed.whole):
            return []
        event = m.InstanceReached if placed.whole else m.InstanceLoaded
        placed.whole = True
        placed.warmth, placed.tier, placed.load_seconds = placed.target, answer.tier, answer.load_seconds
        placed.address = answer.address
        placed.rungs = [*placed.rungs, *answer.rungs]
        seconds = max(0.0, self._now() - placed.began)
        return [event(placed.id, answer.tier, seconds, min(answer.queued_seconds, seconds), answer.epoch, answer.load_seconds)]

    def _lost(self, handle: NodeHandle, id: int, reason: str) -> list[m.AnyEvent]:
        """Whatever was decided since, its worker is no more."""
        placed = self.placed.get(id)
        if placed is None or placed.handle is not handle:
            return []
        self._lost_now[id] = self.placed.pop(id)
        handle.give(node.Fall(id, placed.epoch, Warmth.COLD))  # where a start was on its way to it, nothing stays of that
        return [*self._router.settle(placed.owner), m.InstanceFailed(id, reason, placed.epoch)]
