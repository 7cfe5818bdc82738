"""Who serves which layers while a multicast is under way: nodes that hold a whole model only between them, as one pipeline.

λScale's execution pipelines (arXiv 2502.09922). Taught in chapter 10; the stages run in `inference.staged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sllm_mini.control.multicast.schedule import Plan


@dataclass(frozen=True, slots=True)
class JointStage:
    """Node `node` runs layers `start` to `stop` − 1."""

    node: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class JointStart:
    """At the end of `tick` the nodes that began empty can serve as `stages`, of which node numbers are the plan's."""

    tick: int
    stages: tuple[JointStage, ...]


def joint_start(plan: Plan, needs: Sequence[AbstractSet[int]]) -> JointStart:
    """The first tick of a plan after which the nodes that began empty hold all layers between them, each layer as a whole, and the pipeline that they are then.

    With layers that lie in several blocks this is later than `Summary.joint`, which counts blocks. Costs a `joint_stages` for each of log₂(ticks)
    ticks: who can serve once can serve later too. Raises ValueError where nobody began empty, or layers stay incomplete. Pure.
    """
    arrivals = plan.arrivals()[plan.sources :]

    def at(tick: int) -> tuple[JointStage, ...]:
        return joint_stages(needs, [{block for block, came in node.items() if came <= tick} for node in arrivals])

    low, high = 0, plan.ticks
    if not arrivals or not at(high):
        raise ValueError(f"plan {plan.name!r} never brings all layers to nodes that began empty; check(plan) says where it goes wrong")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) else (middle + 1, high)
    return JointStart(low, tuple(JointStage(stage.node + plan.sources, stage.start, stage.stop) for stage in at(low)))


def joint_stages(needs: Sequence[AbstractSet[int]], held: Sequence[AbstractSet[int]]) -> tuple[JointStage, ...]:
    """The fewest contiguous ranges that cover all layers, in order, each by a node that holds what it runs; () where some layer is nobody's.

    `needs[i]` are the blocks that layer i takes (the first and the last also those of the embedding and the head), `held[x]`
    those that node x has. Always the node that gets furthest from here, of equals the lowest number: no cover has fewer ranges.
    Costs O(nodes · layers) set comparisons. Raises ValueError for no layer. Pure.
    """
    if not needs:
        raise ValueError("a model without layers has no stages; give the blocks that each layer needs")
    stages: list[JointStage] = []
    start = 0
    while start < len(needs):
        ends = [_run(needs, have, start) for have in held]
        stop = max(ends, default=start)
        if stop == start:
            return ()
        stages.append(JointStage(ends.index(stop), start, stop))
        start = stop
    return tuple(stages)


def _run(needs: Sequence[AbstractSet[int]], have: AbstractSet[int], start: int) -> int:
    """Where the run of layers from `start` ends that `have` suffices for."""
    stop = start
    while stop < len(needs) and needs[stop] <= have:
        stop += 1
    return stop
