"""BlitzScale's serial chain: S → T1 → … → Tn, each node passing on each block the tick after it came.

For n nodes and b blocks it ends after b + n − 2 ticks, the source among the n: with many small blocks about the time of one
copy, whatever n, and never less than one hop a node. From BlitzScale (OSDI'25). Taught in chapter 10.
"""

from __future__ import annotations

from sllm_mini.control.multicast.schedule import Plan, Transfer, require_shape


def serial_chain(nodes: int, blocks: int) -> Plan:
    """Node x receives block j from node x − 1 in tick x + j: exactly b + n − 2 ticks for `nodes` = n nodes, node 0 the source
    (b + t − 1 for t = n − 1 targets; 0 for one node). Raises ValueError for no node or no block. Pure."""
    require_shape(nodes, blocks)
    transfers = [Transfer(node + block, node - 1, node, block) for node in range(1, nodes) for block in range(blocks)]
    return Plan("serial chain", nodes, blocks, tuple(sorted(transfers)))
