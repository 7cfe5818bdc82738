"""λScale's binomial pipeline: every node that holds something sends in every tick, along the edges of a hypercube.

A node's number is a corner; in tick t all corners talk across dimension t mod l, so in l ticks everybody has met everybody's
blocks. The source sends a new block each tick, which is what makes it quick; each of the others passes on the block that its
partner lacks, of which there is never more than one. It ends after b + ⌈log₂ n⌉ − 1 ticks for n nodes and b blocks, and no plan
from one source can end sooner: the last block leaves the source in tick b at the earliest, and the nodes that hold it at
most double from then on.

From λScale (arXiv 2502.09922; k-way form included), whose schedule is the same as RDMC's (DSN'18). Costs O(n · b) set operations a
step. Taught in chapter 10, where `binomial_step` is the exercise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from sllm_mini.control.multicast.pairs import Corners
from sllm_mini.control.multicast.schedule import Plan, Transfer, require_shape

Step = Callable[[int, int, int, Sequence[AbstractSet[int]]], list[Transfer]]
"""What `binomial_step` is: (tick, nodes, blocks, held) to the transfers of that tick."""


def binomial_step(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    """The transfers of tick `tick` (from 1) among `nodes` nodes, a power of two; `held[x]` is what node x holds as it begins.

    With l = log₂ nodes, node x's partner is x XOR 2^(tick mod l). Node 0, the source, sends block min(tick, blocks) − 1; every
    other node the highest block it holds. In both cases only what the partner lacks: the highest such block, or nothing. So nothing
    is sent to the source, which lacks nothing. In the order of the senders. Raises ValueError for `nodes` that are no power of two. Pure.
    """
    dimensions = nodes.bit_length() - 1
    if nodes < 1 or nodes & nodes - 1:
        raise ValueError(f"{nodes} nodes are not the corners of a cube; give a power of two (binomial_pipeline takes any number)")
    transfers = []
    for source in range(nodes if dimensions else 0):
        target = source ^ 1 << tick % dimensions
        offered = {min(tick, blocks) - 1} if source == 0 else held[source]
        lacking = offered - held[target]
        if lacking:
            transfers.append(Transfer(tick, source, target, max(lacking)))
    return transfers


def binomial_pipeline(nodes: int, blocks: int, *, step: Step = binomial_step) -> Plan:
    """The whole plan for any number of nodes, node 0 the source: exactly b + ⌈log₂ n⌉ − 1 ticks (0 for one node).

    Where n is no power of two, 2^l is the greatest below it and node x ≥ 2^l shares the corner x − 2^l + 1 (see `pairs`).
    `step` decides each tick; a reader's own goes here, and `check` judges the plan. Raises ValueError for no node or no
    block, and where `step` brings the group no further or names a node or block that is not there. Pure.
    """
    require_shape(nodes, blocks)
    corners = Corners(nodes, blocks)
    transfers: list[Transfer] = []
    tick = 0
    while corners.missing:
        tick, before = tick + 1, corners.missing
        transfers += corners.advance(tick, step(tick, corners.count, blocks, corners.held))
        if corners.missing == before:
            raise ValueError(f"tick {tick} brings nobody a block although {before} are missing; every step must bring the group further")
    return Plan("binomial pipeline", nodes, blocks, tuple(transfers))


def k_way_pipeline(nodes: int, blocks: int, sources: int, *, step: Step = binomial_step, runs: bool = False) -> Plan:
    """λScale's k-way form: nodes 0 … k − 1 are sources, each with a sub-group of its own that runs its own binomial pipeline.

    The other nodes are dealt out in runs as equal as can be. Blocks form k strided groups (g, g + k, g + 2k, …), with `runs` k runs of
    blocks instead, so that a layer that lies in several is with one sub-group. Sub-group i is sent groups i, i + 1, … around the circle. So after ⌈b/k⌉ ticks the sub-groups hold a whole model between them, and
    after b + ⌈log₂ m⌉ − 1 each node does, m the members of the largest sub-group, source included. Raises ValueError unless
    every source has at least one node to feed. Pure.
    """
    require_shape(nodes, blocks, sources)
    if nodes < 2 * sources:
        raise ValueError(f"{sources} sources and {nodes - sources} nodes to feed: a source would have none; give at least {2 * sources} nodes")
    groups = [range(group * blocks // sources, (group + 1) * blocks // sources) if runs else range(group, blocks, sources) for group in range(sources)]
    transfers: list[Transfer] = []
    first = sources
    for way in range(sources):
        fed = (nodes - sources) // sources + (way < (nodes - sources) % sources)
        members = (way, *range(first, first + fed))
        first += fed
        order = [block for turn in range(sources) for block in groups[(way + turn) % sources]]
        inner = binomial_pipeline(len(members), blocks, step=step)
        transfers += [Transfer(t.tick, members[t.source], members[t.target], order[t.block]) for t in inner.transfers]
    return Plan(f"{sources}-way binomial pipeline", nodes, blocks, tuple(sorted(transfers)), sources=sources)
