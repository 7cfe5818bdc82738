"""What a scale-out plan is: a list of transfers, tick by tick, that brings a model's blocks from its sources to every node.

One model of the network for all plans, so that they can be compared: every node has one full-duplex link of the same
speed, a block takes it one tick, and all ticks are equally long. In a tick a node sends at most one block, which it held
when the tick began, and receives at most one. Only a source may be faster (`source_sends`): a store that many nodes read.
Switches in between are assumed not to be the bottleneck. Pure data; a plan of n nodes and b blocks has about n · b
transfers. Safe from several threads. Taught in chapter 10.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Transfer:
    """In tick `tick` (from 1) node `source` sends block `block` (from 0) to node `target`, which holds it at the tick's end."""

    tick: int
    source: int
    target: int
    block: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule for nodes 0 … `nodes` − 1, of which the first `sources` hold all `blocks` at the start.

    Each source may send `source_sends` blocks in one tick, every other node one. Raises ValueError for a shape that cannot be;
    whether the transfers keep the rules and reach every node is `check`'s to say.
    """

    name: str
    nodes: int
    blocks: int
    transfers: tuple[Transfer, ...]
    sources: int = 1
    source_sends: int = 1

    def __post_init__(self) -> None:
        require_shape(self.nodes, self.blocks, self.sources)
        if not isinstance(self.source_sends, int) or self.source_sends < 1:
            raise ValueError(f"a source that sends {self.source_sends} blocks a tick makes no plan; give a whole number of 1 or more")

    @property
    def ticks(self) -> int:
        """The tick of the last transfer; 0 where nothing has to move."""
        return max((transfer.tick for transfer in self.transfers), default=0)

    def arrivals(self) -> list[dict[int, int]]:
        """For each node, the tick at whose end it holds a block, by block; 0 for all blocks of a source."""
        held: list[dict[int, int]] = [dict.fromkeys(range(self.blocks if node < self.sources else 0), 0) for node in range(self.nodes)]
        for transfer in self.transfers:
            held[transfer.target].setdefault(transfer.block, transfer.tick)
        return held


def require_shape(nodes: int, blocks: int, sources: int = 1) -> None:
    """Raises ValueError unless all are whole numbers, there is a block and a source, and no more sources than nodes."""
    if not all(isinstance(figure, int) for figure in (nodes, blocks, sources)):
        raise ValueError(f"{nodes} nodes, {sources} of them sources, and {blocks} blocks make no plan; give whole numbers")
    if blocks < 1 or not 1 <= sources <= nodes:
        raise ValueError(f"{nodes} nodes, {sources} of them sources, and {blocks} blocks make no plan; give at least one of each, and no more sources than nodes")
