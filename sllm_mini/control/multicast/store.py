"""Everyone reads the store: no node helps another, and one link out is shared by all who read.

What most platforms do when they start instances, and what multicast is measured against. Taught in chapter 10.
"""

from __future__ import annotations

from sllm_mini.control.multicast.schedule import Plan, Transfer, require_shape


def store_reads(nodes: int, blocks: int, sends: int = 1) -> Plan:
    """Node 0 is a store with a link of `sends` times a node's: it serves so many nodes a tick, those first that have least.

    The others share it fairly and all end together: after ⌈(n − 1) · b / sends⌉ ticks, and never before b. Raises ValueError
    for no node, no block, or a store that sends nothing. Pure.
    """
    require_shape(nodes, blocks)
    if not isinstance(sends, int) or sends < 1:
        raise ValueError(f"a store that sends {sends} blocks a tick makes no plan; give a whole number of 1 or more")
    readers = nodes - 1
    served = min(sends, readers)
    # Turns go round: reader 1's block 0, reader 2's, …, reader 1's block 1, …; a tick takes the next `served` of them.
    transfers = [Transfer(turn // served + 1, 0, turn % readers + 1, turn // readers) for turn in range(readers * blocks)]
    return Plan("everyone reads the store", nodes, blocks, tuple(transfers), source_sends=sends)
