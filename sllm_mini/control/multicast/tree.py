"""FaaSNet's function tree: a balanced binary tree in which each node passes what it receives on to its two children.

A node has one link out, so feeding two children takes it two ticks a block, and the tree moves half a block a tick: 2b ticks
and the way down, where a chain needs b ticks and the length of the way. (Streaming to both at once, each at half the link's
speed, moves as much per tick as taking turns by block, as here.) From FaaSNet (ATC'21). Taught in chapter 10.
"""

from __future__ import annotations

from sllm_mini.control.multicast.schedule import Plan, Transfer, require_shape


def binary_tree(nodes: int, blocks: int) -> Plan:
    """Node x feeds nodes 2x + 1 and 2x + 2: block 0 to the left, to the right, then block 1, each as soon as it can be sent.

    A node reached by `left` steps to the left and `right` to the right holds everything after 2(b − 1) + left + 2 · right ticks,
    except that a root with a single child (2 nodes) sends a block each tick. Raises ValueError for no node or no block. Pure.
    """
    require_shape(nodes, blocks)
    arrived = [[0] * blocks for _ in range(nodes)]
    transfers = []
    for node in range(nodes):  # parents come before their children, so what they hold when is known
        free = 0
        for block in range(blocks):
            for child in range(2 * node + 1, min(2 * node + 3, nodes)):
                free = max(free, arrived[node][block]) + 1
                arrived[child][block] = free
                transfers.append(Transfer(free, node, child, block))
    return Plan("binary tree", nodes, blocks, tuple(sorted(transfers)))
