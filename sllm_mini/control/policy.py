"""The three questions a policy answers: where (`Placement`), how long (`KeepAlive`), how many (`Autoscaler`).

A policy is a small object. It reads the cluster, keeps what it learns in itself, and never changes the cluster: what it
wants it returns. It reads no clock and draws no numbers but from what it was given. A new one takes some twenty lines.
Pure. Taught in chapters 08, 09 and 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msgspec import Struct

from sllm_mini.types import Tier, Warmth

if TYPE_CHECKING:
    from sllm_mini.control.cluster import Cluster
    from sllm_mini.control.state import InstanceState, ModelState, RequestState


class Move(Struct, frozen=True, gc=False):
    """A running instance is to be freed by moving its requests: to a ready instance with room (`instance`), or to one that is
    started for it on `node` first."""

    victim: int
    node: str
    instance: int | None = None


class Plan(Struct, frozen=True):
    """Start an instance on `node`, once these are out of the way: idle instances that `give_way`, instances whose requests
    `moves` away, instances whose requests are `preempted`. `reuse` is a warmer instance without a model (or the model's
    own, asleep) to climb from; None starts from COLD. `parts`: nodes that fetch a share each. `estimate_seconds` until
    READY, as the policy saw it, kept for the record of errors."""

    node: str
    reuse: int | None = None
    give_way: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    preempted: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    tier: Tier | None = None
    estimate_seconds: float = 0.0


@runtime_checkable
class Forgetting(Protocol):
    """A placement, keep-alive, autoscaler or estimator that learns of each model offers this too, or what it knows grows with
    every model there ever was."""

    def on_delete(self, model: ModelState) -> None:
        """A deleted model has nothing left: no request, no instance. One of its name that comes later is another."""
        ...


@runtime_checkable
class Harmless(Protocol):
    """A placement whose plans move or preempt offers this too, or it is without a plan where it may do neither: when somebody
    was just preempted, when an instance is only pre-warmed, when a request could not be moved again and again."""

    def choose_harmless(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        """As `Placement.choose_node`, without `moves` and `preempted`."""
        ...


class Placement(Protocol):
    """Where. Both may be called at any time and change nothing. See also `Harmless` and `Forgetting`."""

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        """Which of `model.open` (never empty here) takes the request; None leaves it queued."""
        ...

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        """Where one more instance starts; None where it cannot start now: it is asked again when something is freed."""
        ...


class Prewarm(Struct, frozen=True, gc=False):
    """At `at`, as many instances as it takes to have `count` idle ones for `model` that are as warm as `warmth` (those that climb to
    it count). Below DRAM, `model` only names the runtime. A later answer for the same model and warmth takes the place of
    one that is not due yet, whichever is sooner, and a `count` of 0 cancels it: so a request that came before the instance
    that was to be there for it. `max_instances` bound it. What there is no room for is not started, and nothing is made to
    give way."""

    at: float
    model: str
    warmth: Warmth
    count: int = 1


class Stay(Struct, frozen=True, gc=False):
    """How long an instance that became idle (or has just descended) stays as warm as it is, and how warm it is after that.
    `seconds` None: for good; 0: it descends at once. `again`: when one is to be there again."""

    seconds: float | None
    then: Warmth = Warmth.COLD
    again: Prewarm | None = None


class KeepAlive(Protocol):
    """How long, and what is kept ready before anybody asks. A model's `min_instances` stay READY whatever it says. See also
    `Forgetting`."""

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        """A model has come."""
        ...

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        """A request has come; `warmth` is how warm the best idle instance that could serve it was (READY: no cold start)."""
        ...

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        """An instance became idle at its warmth, now, or the least that its model is to have ready was lowered."""
        ...

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        """Who gives way first when room is needed: the lowest. Asked when it comes to rest at a warmth; `now` is when it became idle, at
        whatever warmth it was then."""
        ...

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        """It is to make room: how warm it may still be (`then`; the room that is needed decides in the end), and when one is to
        be there again."""
        ...


class Autoscaler(Protocol):
    """How many. `tick_seconds` None: asked only when a request arrives or an instance is lost; else also at each tick while the
    model has requests or instances. With `scales_down`, idle instances above what it desires descend at a tick, whatever the
    keep-alive says; else only the keep-alive lets an instance go. A request that has queued `queue_seconds` is refused. See
    also `Forgetting`."""

    @property
    def tick_seconds(self) -> float | None: ...
    @property
    def scales_down(self) -> bool: ...
    @property
    def queue_seconds(self) -> float | None: ...

    def observe(self, model: ModelState, now: float) -> None:
        """Its concurrency (`model.running` + queued) has changed."""
        ...

    def desired(self, model: ModelState, now: float) -> int:
        """How many instances it should have, ready and starting together, from 0 up to its `max_instances`; `min_instances`
        there are in any case. `model.queue` is a deque
        of those that wait, `model.running` a count."""
        ...

    def admits(self, model: ModelState, now: float) -> bool:
        """Whether one more request may queue; a refused one is answered 429."""
        ...
