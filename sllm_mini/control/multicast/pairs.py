"""Corners of a cube that two nodes share, so that a binomial pipeline serves any number of nodes.

With 2^l the greatest power of two up to n, node x ≥ 2^l is the twin of node x − 2^l + 1; the source is always alone. To the rest
of the cube the two are one corner that holds what either holds. In each tick the one that has the block to be sent
sends it out, and the other one receives what comes in and hands its twin a block that it lacks: so each of the two
sends once and receives once at most.

Neither twin is ever more than one block ahead of the other: what comes in puts its receiver one ahead, and it hands over
what it was ahead before. So when every corner is complete, one more tick in which twins exchange what is left completes
every node: b + l ticks, which is b + ⌈log₂ n⌉ − 1. The pairing is λScale's and RDMC's (DSN'18); choosing the roles by who
holds the block is simpler than counting turns, and as quick. Costs O(n · b) set operations a tick.
"""

from __future__ import annotations

from collections.abc import Sequence

from sllm_mini.control.multicast.schedule import Transfer


class Corners:
    """The state of a plan in the making: what each node holds, and what each corner does. One thread at a time."""

    def __init__(self, nodes: int, blocks: int) -> None:
        self.count = 1 << nodes.bit_length() - 1
        self._nodes = nodes
        self._blocks = blocks
        self._held: list[set[int]] = [set(range(blocks)), *(set[int]() for _ in range(nodes - 1))]

    @property
    def missing(self) -> int:
        """Blocks that nodes still lack, all together."""
        return self._nodes * self._blocks - sum(map(len, self._held))

    @property
    def held(self) -> list[frozenset[int]]:
        """What each corner holds: what its node or that node's twin does."""
        return [frozenset().union(*(self._held[node] for node in self._members(corner))) for corner in range(self.count)]

    def advance(self, tick: int, between: Sequence[Transfer]) -> list[Transfer]:
        """Carries out one tick of transfers between corners; returns those between nodes, the ones inside corners included.

        Raises ValueError for a corner that is not there, and where nobody in the sending corner holds the block.
        """
        held = self.held
        for transfer in between:
            if not (0 <= transfer.source < self.count and 0 <= transfer.target < self.count):
                raise ValueError(f"tick {tick}: node {transfer.source} sends to node {transfer.target}; the nodes of this step are 0 to {self.count - 1}")
            if transfer.block not in held[transfer.source]:
                raise ValueError(f"tick {tick}: node {transfer.source} sends block {transfer.block} and does not hold it; send only what is in held")
        sent = {transfer.source: transfer.block for transfer in between}
        fed = {transfer.target for transfer in between}
        senders, receivers, inside = [0] * self.count, [0] * self.count, []
        for corner in range(self.count):
            sender, receiver = self._roles(corner, sent.get(corner))
            senders[corner], receivers[corner] = sender, receiver
            # The receiver's link out is free; the sender's only if the corner sends nothing, and likewise what comes in.
            inside += self._hand_over(tick, receiver, sender)
            if corner not in sent and corner not in fed:
                inside += self._hand_over(tick, sender, receiver)
        outside = [Transfer(t.tick, senders[t.source], receivers[t.target], t.block) for t in between]
        now = sorted([*outside, *inside])
        for transfer in now:
            self._held[transfer.target].add(transfer.block)
        return now

    def _members(self, corner: int) -> tuple[int, ...]:
        twin = corner + self.count - 1
        return (corner, twin) if corner and twin < self._nodes else (corner,)

    def _roles(self, corner: int, block: int | None) -> tuple[int, int]:
        """Who of a corner sends out, the first that has the block, and who receives: the other one where there is one."""
        members = self._members(corner)
        sender = next(node for node in members if block is None or block in self._held[node])
        return sender, next((node for node in members if node != sender), sender)

    def _hand_over(self, tick: int, source: int, target: int) -> list[Transfer]:
        lacking = self._held[source] - self._held[target]
        return [Transfer(tick, source, target, min(lacking))] if lacking else []
