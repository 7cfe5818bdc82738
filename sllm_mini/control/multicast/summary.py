"""What a plan costs and when it serves: its ticks, each node's last block, the moment the group holds a whole model.

Ticks become seconds with the bytes of a block and the speed of a link (`plan_seconds`). Costs O(transfers). Chapter 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from sllm_mini.control.multicast.schedule import Plan


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in figures, all in ticks and blocks.

    `complete[i]` is the tick at whose end node i holds every block and can serve alone, 0 for a source. `joint` is the tick
    at whose end the nodes that began empty hold every block between them, so that a pipeline across them can serve
    (λScale); 0 where no node began empty. `source_blocks` is what all sources together sent.
    """

    ticks: int
    complete: tuple[int, ...]
    joint: int
    source_blocks: int

    def complete_by(self, tick: int) -> int:
        """How many nodes hold every block at the end of a tick, sources included."""
        return sum(last <= tick for last in self.complete)


def summarize(plan: Plan) -> Summary:
    """The figures of a plan that `check` accepts. Raises ValueError where a node never holds every block. Pure."""
    arrivals = plan.arrivals()
    short = next((node for node, held in enumerate(arrivals) if len(held) < plan.blocks), None)
    if short is not None:
        raise ValueError(f"plan {plan.name!r} leaves node {short} with {len(arrivals[short])} of {plan.blocks} blocks; check(plan) says where it goes wrong")
    empty = arrivals[plan.sources :]
    joint = max((min(held[block] for held in empty) for block in range(plan.blocks)), default=0) if empty else 0
    sent = sum(transfer.source < plan.sources for transfer in plan.transfers)
    return Summary(plan.ticks, tuple(max(held.values()) for held in arrivals), joint, sent)


def plan_seconds(ticks: int, block_nbytes: float, bytes_per_second: float, *, tick_seconds: float = 0.0) -> float:
    """Seconds that `ticks` ticks take: each is a block of `block_nbytes` over one node's link, and `tick_seconds` of fixed cost.

    The fixed cost (a message, a synchronisation) is why blocks cannot be made ever smaller. Raises ValueError for a
    figure that is negative or not finite, and for a link of no speed.
    """
    # Said as what has to hold, because a comparison with nan is false.
    if not (all(0 <= figure < inf for figure in (ticks, block_nbytes, tick_seconds)) and 0 < bytes_per_second < inf):
        raise ValueError(f"{ticks} ticks of {block_nbytes} bytes at {bytes_per_second} bytes/s and {tick_seconds} s each; give a speed above 0, nothing negative and all finite")
    return ticks * (tick_seconds + block_nbytes / bytes_per_second)
