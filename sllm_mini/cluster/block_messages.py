"""What nodes say to each other while a model spreads, and a node's share of a plan. Explained in chapter 10.

Who receives asks; the connection is its own, and blocks come back on it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_mini.control.multicast import Plan
from sllm_mini.wire import Message

PlanId = Annotated[str, Meta(min_length=1, max_length=1024)]
Node = Annotated[int, Meta(ge=0, le=1 << 20)]
Number = Annotated[int, Meta(ge=0, le=1 << 20)]


class Step(Message, frozen=True):
    """One transfer as one of its two ends sees it: `peer` is the other."""

    peer: Node
    block: Number


class Part(Message, frozen=True):
    """One node's share of a plan, in the order of its ticks. `peers` are the addresses of all nodes; `width` is how many blocks this one may
    send at once (a store more than one); `reads` it gets from the model's own source, beside what it receives; not `whole`: it
    needs no more than that."""

    plan: PlanId
    node: Node
    block_nbytes: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    peers: Annotated[list[Annotated[str, Meta(max_length=4096)]], Meta(max_length=1 << 16)]
    sends: Annotated[list[Step], Meta(max_length=1 << 20)]
    receives: Annotated[list[Step], Meta(max_length=1 << 20)]
    width: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    reads: Annotated[tuple[Number, ...], Meta(max_length=1 << 20)] = ()
    whole: bool = True


class Hello(Message, frozen=True):
    """The first word on a connection: which node will ask for blocks of which plan; `scheduled`, for those that the plan has it receive
    here, each to be answered in its turn; else each is answered at once. Not answered."""

    plan: PlanId
    node: Node
    scheduled: bool


class Ask(Message, frozen=True):
    """Send me this block. Answered by `Sent` or `Lacking`."""

    block: Number


class Skip(Message, frozen=True):
    """I have this block, which the plan would have you send me. Not answered."""

    block: Number


class Sent(Message, frozen=True):
    """The block. Payload: its bytes."""

    block: Number


class Lacking(Message, frozen=True):
    """It is not here, or no longer."""

    block: Number


Request = Hello | Ask | Skip
Answer = Sent | Lacking


def parts_of(plan: Plan, plan_id: str, peers: list[str], block_nbytes: int) -> list[Part]:
    """Every node's share of a plan that `control.multicast.check` accepts. Raises ValueError for another number of addresses than nodes. Pure."""
    if len(peers) != plan.nodes:
        raise ValueError(f"plan {plan.name!r} has {plan.nodes} nodes and {len(peers)} addresses were given")
    sends: list[list[Step]] = [[] for _ in peers]
    receives: list[list[Step]] = [[] for _ in peers]
    for transfer in sorted(plan.transfers):
        sends[transfer.source].append(Step(transfer.target, transfer.block))
        receives[transfer.target].append(Step(transfer.source, transfer.block))
    return [
        Part(plan_id, node, block_nbytes, peers, sends[node], receives[node], plan.source_sends if node < plan.sources else 1) for node in range(plan.nodes)
    ]
