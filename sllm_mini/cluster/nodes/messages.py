"""What the driver of a live cluster says to a node's agent, and the answers. Explained in chapter 08.

The same orders in process and over a channel. An instance's orders are carried out in order; those of different instances are not.
`epoch` is the controller's, of its last decision about an instance or a request; `register_epoch` says who may speak for a
request, and travels with tokens. An agent does not carry out what it has heard a later epoch of.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.inference.migration.messages import Mode, Report
from sllm_mini.inference.ownership.messages import RequestName
from sllm_mini.types import Tier, Warmth
from sllm_mini.wire import Message

Name = Annotated[str, Meta(min_length=1, max_length=1024)]
Text = Annotated[str, Meta(max_length=8192)]
Address = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Nbytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Join(Message, frozen=True):
    """The first order. `run` names this life of the driver, and with `node` and `incarnation` every owner here (`owner_name`). Workers ask
    `arbiter` for the register and the ledger. Answered by `Joined`."""

    node: Name
    incarnation: Count
    run: Name
    arbiter: Address


class Register(Message, frozen=True):
    """The store is to know `model` at `source`. Answered by `Registered` or `OrderFailed`."""

    model: Name
    source: Annotated[str, Meta(min_length=1, max_length=4096)]


class Climb(Message, frozen=True):
    """An instance climbs from `warmth` (COLD: it is new) to `target`, on these `devices`. It takes `max_batch` requests at once. Answered by
    `Reached` or `Lost`."""

    instance: Count
    epoch: Count
    model: Name
    warmth: Warmth
    target: Warmth
    tier: Tier
    devices: Annotated[list[Count], Meta(max_length=1024)]
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 8


class Fall(Message, frozen=True):
    """An instance keeps less: down to `warmth`, COLD for nothing. Not answered; its devices are free when it is done."""

    instance: Count
    epoch: Count
    warmth: Warmth


class Run(Message, frozen=True):
    """A request begins or goes on here. Payload: its session. Its tokens are the answer; `RunFailed` where there will be none."""

    instance: Count
    request_id: RequestName
    register_epoch: Count


class Drop(Message, frozen=True):
    """Nobody wants the request from here any more. Not answered."""

    instance: Count
    request_id: RequestName
    register_epoch: Count


class Move(Message, frozen=True):
    """A request goes from `instance` to the worker that takes moves in at `address`. Answered by `Moved`."""

    request_id: RequestName
    instance: Count
    address: Address
    mode: Mode
    target_gap_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    epoch: Count


class Leave(Message, frozen=True):
    """Said over a channel: end yourself, and let your workers send first what they have computed."""


class Hear(Message, frozen=True):
    """The driver lives: said over a channel when there is nothing else to say."""


NodeOrder = Join | Register | Climb | Fall | Run | Drop | Move


class Joined(Message, frozen=True):
    """The agent is ready. `pid` is its process."""

    pid: Count


class Registered(Message, frozen=True):
    """`digest` names the weights in every session (`Session.model`); `tier` is the fastest that has all of them here."""

    model: Name
    digest: Annotated[str, Meta(max_length=256)]
    tier: Tier


class OrderFailed(Message, frozen=True):
    """`Register` of `model` failed. `kind` is the name of a class of `sllm_mini.errors`."""

    model: Name
    kind: Annotated[str, Meta(max_length=200)]
    message: Text


class Reached(Message, frozen=True):
    """The climb is over. `tier` is where the weights were read from, `queued_seconds` how long they waited for loads before them,
    `load_seconds` how long they moved. At READY `address` is where the worker takes moves in."""

    instance: Count
    epoch: Count
    tier: Tier
    queued_seconds: Seconds
    load_seconds: Seconds
    rungs: Annotated[list[Rung], Meta(max_length=16)]
    address: Address = ""


class Lost(Message, frozen=True):
    """The instance is gone, while it climbed or later."""

    instance: Count
    epoch: Count
    reason: Text


class RunFailed(Message, frozen=True):
    """The worker lives, and did not take the request."""

    request_id: RequestName
    register_epoch: Count
    kind: Annotated[str, Meta(max_length=200)]
    message: Text


class Moved(Message, frozen=True):
    """How a move ended. `report` is None where it did not begin; then the request is where it was."""

    request_id: RequestName
    epoch: Count
    outcome: Literal["moved", "stayed", "ended"]
    seconds: Seconds
    report: Report | None = None


class Stored(Message, frozen=True):
    """The node's store has all of `model` in `tier` now (`there`), or no longer."""

    model: Name
    tier: Tier
    there: bool


class Beat(Message, frozen=True):
    """The agent lives: said over a channel when there is nothing else to say."""


NodeAnswer = Joined | Registered | OrderFailed | Reached | Lost | RunFailed | Moved | Stored


def owner_name(run: str, node: str, incarnation: int, instance: int, epoch: int) -> str:
    """An instance at the register, since one start of it: a name that is never used twice."""
    return f"{run}/{node}.{incarnation}/{instance}.{epoch}"
