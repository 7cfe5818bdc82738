"""The one judge of all plans: does a schedule keep the rules of `schedule`, and does every node end with every block?

Costs O(transfers). Taught in chapter 10, where it is what a reader's own plan is held against.
"""

from __future__ import annotations

from collections import Counter

from sllm_mini.control.multicast.schedule import Plan, Transfer


def check(plan: Plan) -> None:
    """Returns if the plan is right. Raises ValueError naming the first transfer that breaks a rule, and which:

    nodes, blocks and ticks that exist, in whole numbers; nobody sends to itself; a sender holds the block when the tick begins; nothing is
    received twice, nor by who has it; one block sent a tick and node (`source_sends` for a source) and one received; and
    in the end every node holds every block. The order of `plan.transfers` does not matter. Pure.
    """
    held = [set(range(plan.blocks)) if node < plan.sources else set() for node in range(plan.nodes)]
    sends: Counter[int] = Counter()
    arriving: dict[int, int] = {}
    tick = 0
    for transfer in sorted(plan.transfers):
        _require_places(plan, transfer)
        if transfer.tick != tick:
            _land(held, arriving)
            sends.clear()
            tick = transfer.tick
        source, target, block = transfer.source, transfer.target, transfer.block
        sends[source] += 1
        most = plan.source_sends if source < plan.sources else 1
        if block not in held[source]:
            raise ValueError(_broken(transfer, f"node {source} does not hold block {block} when the tick begins"))
        if sends[source] > most:
            raise ValueError(_broken(transfer, f"node {source} sends more than {most} in this tick"))
        if target in arriving:
            raise ValueError(_broken(transfer, f"node {target} receives block {arriving[target]} in this tick already"))
        if block in held[target]:
            raise ValueError(_broken(transfer, f"node {target} has block {block} already"))
        arriving[target] = block
    _land(held, arriving)
    for node, blocks in enumerate(held):
        if len(blocks) < plan.blocks:
            missing = min(set(range(plan.blocks)) - blocks)
            raise ValueError(f"plan {plan.name!r} ends after tick {tick} and node {node} has {len(blocks)} of {plan.blocks} blocks; block {missing} is missing")


def _require_places(plan: Plan, transfer: Transfer) -> None:
    if not all(isinstance(figure, int) for figure in (transfer.tick, transfer.source, transfer.target, transfer.block)):
        raise ValueError(_broken(transfer, "tick, nodes and block are whole numbers"))
    if transfer.tick < 1:
        raise ValueError(_broken(transfer, "ticks count from 1"))
    if not (0 <= transfer.source < plan.nodes and 0 <= transfer.target < plan.nodes):
        raise ValueError(_broken(transfer, f"the nodes are 0 to {plan.nodes - 1}"))
    if transfer.source == transfer.target:
        raise ValueError(_broken(transfer, "a node sends to another node"))
    if not 0 <= transfer.block < plan.blocks:
        raise ValueError(_broken(transfer, f"the blocks are 0 to {plan.blocks - 1}"))


def _land(held: list[set[int]], arriving: dict[int, int]) -> None:
    """What was under way in a tick is held from its end on."""
    for target, block in arriving.items():
        held[target].add(block)
    arriving.clear()


def _broken(transfer: Transfer, why: str) -> str:
    return f"tick {transfer.tick}, node {transfer.source} to node {transfer.target}, block {transfer.block}: {why}"
