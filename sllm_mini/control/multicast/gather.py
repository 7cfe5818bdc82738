"""Several nodes that want one model at once become one plan: who feeds whom, and who reads the model's own source.

Starts of a burst come within milliseconds of each other. Read from the remote one by one they share its link; as one plan they cross it
once, or not at all where a node has the model already. Pure. Costs what making the plan does. Taught in chapter 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, get_args

from sllm_mini.control.multicast.binomial import binomial_pipeline, k_way_pipeline
from sllm_mini.control.multicast.chain import serial_chain
from sllm_mini.control.multicast.joint import JointStage, joint_start
from sllm_mini.control.multicast.schedule import Plan, Transfer
from sllm_mini.control.multicast.store import store_reads
from sllm_mini.control.multicast.tree import binary_tree

PlanKind = Literal["binomial", "chain", "tree", "store"]
KINDS: tuple[PlanKind, ...] = get_args(PlanKind)
_FROM_ONE: dict[str, Callable[[int, int], Plan]] = {"binomial": binomial_pipeline, "chain": serial_chain, "tree": binary_tree, "store": store_reads}


@dataclass(frozen=True, slots=True)
class Gathered:
    """A plan with names: `nodes` are those that it numbers, and `reads` the blocks that each gets from the model's own source, as far as it
    has not got them. Those in `whole` are to have all of the model in the end, others need only what they send."""

    nodes: tuple[str, ...]
    plan: Plan
    reads: tuple[tuple[int, ...], ...]
    whole: frozenset[str]


def plan_of(targets: Sequence[str], holders: Sequence[str], blocks: int, kind: PlanKind, *, alone: bool = False, runs: bool = False) -> Gathered | None:
    """How the model comes to all `targets`: from the `holders`, nearest first, of which no more are used than there are nodes to feed (only
    the first, unless the plan is binomial; `runs` as for `k_way_pipeline`); without any the first target reads it and feeds the others.

    None where nobody wants it, or (unless `alone`) one node that nobody could feed. A node that is named twice counts once.
    Raises ValueError for another kind, or no block."""
    if kind not in KINDS:
        raise ValueError(f"there is no plan {kind!r}; choose one of {', '.join(KINDS)}")
    wanting = [name for name in dict.fromkeys(targets) if name not in holders]
    sources = list(dict.fromkeys(holders))[: len(wanting) if kind == "binomial" else 1]
    nodes = [*sources, *wanting]
    if not wanting or (len(nodes) < 2 and not alone):
        return None
    plan = k_way_pipeline(len(nodes), blocks, len(sources), runs=runs) if len(sources) > 1 else _FROM_ONE[kind](len(nodes), blocks)
    everything = tuple(range(blocks))
    return Gathered(tuple(nodes), plan, tuple(everything if number < plan.sources else () for number in range(len(nodes))), frozenset(nodes))


def stages_of(gathered: Gathered, starting: Sequence[str], needs: Sequence[AbstractSet[int]]) -> tuple[JointStage, ...]:
    """The pipeline in which nodes of a plan can serve before any of them has the model whole; () where that would be no sooner, or takes nodes
    that are not `starting`, or one of these is to feed the others. `needs` as for `joint_start`."""
    plan = gathered.plan
    if not needs or set(gathered.nodes[: plan.sources]) & set(starting):
        return ()
    found = joint_start(plan, needs)
    soonest = min(max(held.values()) for held in plan.arrivals()[plan.sources :])
    there = all(gathered.nodes[stage.node] in starting for stage in found.stages)
    return found.stages if there and found.tick < soonest else ()


def shares_of(target: str, readers: Sequence[str], blocks: int) -> Gathered | None:
    """Each of the `readers` gets an equal share from the model's own source, strided, so that blocks come in about their order, and sends it to
    `target`, which may be a reader itself (HydraServe). None where it would be the only one. Raises ValueError for no block."""
    named = list(dict.fromkeys(readers))
    nodes = [*named, *([] if target in named else [target])]
    if len(nodes) < 2 or not named:
        return None
    reads = tuple(tuple(range(number, blocks, len(named))) for number in range(len(named)))
    place = nodes.index(target)
    transfers = [Transfer(block + 1, block % len(named), place, block) for block in range(blocks) if block % len(named) != place]
    plan = Plan("shares of the source", len(nodes), blocks, tuple(transfers), sources=len(named))
    return Gathered(tuple(nodes), plan, (*reads, *([()] * (len(nodes) - len(named)))), frozenset({target}))
