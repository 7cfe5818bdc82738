"""What the driver of a live cluster says to a node's agent, and the answers. Explained in chapter 08.

The same orders in process and over a channel. An instance's orders are carried out in order; those of different instances are not.
`epoch` is the controller's, of its last decision about an instance or a request; `register_epoch` says who may speak for a
request, and travels with tokens. An agent does not carry out what it has heard a later epoch of.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sllm_mini.cluster.block_messages import Part, PlanId
from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.errors import SllmError
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
    """The store is to know `model` at `source`, and from then on to keep it in `keep` alone whatever is evicted: it is brought there, where the
    store has such a place. With a `base`, which was registered before, `source` is the folder of an adapter of that, and the store has its
    base's weights for it. Answered by `Registered`, before that, or `OrderFailed`, with the same `number`: what is given up is answered too."""

    model: Name
    source: Annotated[str, Meta(min_length=1, max_length=4096)]
    keep: Tier | None = None
    base: Annotated[str, Meta(max_length=1024)] = ""
    number: Count = 0


class Climb(Message, frozen=True):
    """An instance climbs from `warmth` (COLD: it is new) to `target`, on these `devices`. It takes `max_batch` requests at once. Its weights
    may come by `plan`, of which a `Fetch` follows. With `overlap` it serves while they arrive: then `Serves` comes before `Reached`.
    Answered by `Reached` or `Lost`."""

    instance: Count
    epoch: Count
    model: Name
    warmth: Warmth
    target: Warmth
    tier: Tier
    devices: Annotated[list[Count], Meta(max_length=1024)]
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 8
    plan: Annotated[str, Meta(max_length=1024)] = ""
    overlap: bool = False


class Stage(Message, frozen=True):
    """Node `node` of a plan serves layers `start` to `stop` − 1 while blocks still arrive."""

    node: Count
    start: Count
    stop: Count


class Fetch(Message, frozen=True):
    """This node's part in bringing `model` to several: blocks to read, to receive and to send. None: nobody sends it here; whoever waits for
    the plan reads the model itself. Until nodes have it whole they serve it together as `stages`, where there are any: requests go to
    the last. Answered by `Fetched` where there is a part, and by `Staged` for each stage but the last that is this node's."""

    plan: PlanId
    model: Name
    part: Part | None
    stages: Annotated[tuple[Stage, ...], Meta(max_length=1024)] = ()


class Pipeline(Message, frozen=True):
    """For the node with the plan's last stage: those before it serve at `addresses`, in order. Not answered."""

    plan: PlanId
    addresses: Annotated[list[Address], Meta(max_length=1024)]


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


class Forget(Message, frozen=True):
    """The store is to drop `model`, and all of it that nobody uses; what is lent goes once it is given back. Not answered."""

    model: Name


NodeOrder = Join | Register | Forget | Fetch | Pipeline | Climb | Fall | Run | Drop | Move


class Leave(Message, frozen=True):
    """Said over a channel: end yourself, and let your workers send first what they have computed."""


class ToNode(Message, frozen=True):
    """A frame of the driver's, one end of a `mailbox.Conversation`; without a message it says that the driver lives."""

    number: Count
    taken: Count
    message: NodeOrder | Leave | None


class Joined(Message, frozen=True):
    """The agent is ready. `pid` is its process; it takes part in plans at `peers`."""

    pid: Count
    peers: Address = ""


class Registered(Message, frozen=True):
    """`digest` names the weights in every session (`Session.model`); `tier` is the fastest that has all of them here; they are `blocks` of
    the size that the node's options name, of which each of the `layers` needs some (see `storage.layer_blocks`)."""

    model: Name
    digest: Annotated[str, Meta(max_length=256)]
    tier: Tier
    blocks: Count = 0
    layers: Annotated[tuple[tuple[Count, ...], ...], Meta(max_length=1 << 16)] = ()
    number: Count = 0


class Fetched(Message, frozen=True):
    """A part in a plan is over. Blocks came as `planned`, `begged` from another node, or `read` from the model's own source; `sent` went out.
    `error` says why it failed, if it did."""

    plan: PlanId
    model: Name
    planned: Count = 0
    begged: Count = 0
    read: Count = 0
    sent: Count = 0
    seconds: Seconds = 0.0
    error: Text = ""


class Staged(Message, frozen=True):
    """The bytes of the plan's stage `stage` are here, and it serves at `address`."""

    plan: PlanId
    stage: Count
    address: Address


class OrderFailed(Message, frozen=True):
    """`Register` of `model` failed. `kind` is the name of a class of `sllm_mini.errors`."""

    model: Name
    kind: Annotated[str, Meta(max_length=200)]
    message: Text
    number: Count = 0


class Serves(Message, frozen=True):
    """The instance takes requests, while its weights still arrive; `Reached` follows with the last byte."""

    instance: Count
    epoch: Count
    tier: Tier
    address: Address


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


class Figures(Message, frozen=True):
    """What the node's store uses of its budgets, and what is kept running for all its workers (a zygote's PSS). Said when it has joined and
    whenever what the store holds has changed."""

    dram_used_nbytes: Nbytes
    dram_budget_nbytes: Nbytes
    disk_used_nbytes: Nbytes
    disk_budget_nbytes: Nbytes
    shared_nbytes: Nbytes


NodeAnswer = Joined | Registered | OrderFailed | Fetched | Staged | Serves | Reached | Lost | RunFailed | Moved | Stored | Figures


class Ending(Message, frozen=True):
    """Said over a channel, the last: the agent ends itself, and why."""

    reason: Text


class FromNode(Message, frozen=True):
    """A frame of the agent's; see `ToNode`."""

    number: Count
    taken: Count
    message: NodeAnswer | Ending | None


def reason_of(error: BaseException) -> str:
    """What a message says of it; with its kind where nobody raises it on purpose."""
    text = str(error) if isinstance(error, SllmError | OSError) else f"{type(error).__name__}: {error}"
    return text[:8000] or type(error).__name__


def owner_name(run: str, node: str, incarnation: int, instance: int, epoch: int) -> str:
    """An instance at the register, since one start of it: a name that is never used twice."""
    return f"{run}/{node}.{incarnation}/{instance}.{epoch}"
