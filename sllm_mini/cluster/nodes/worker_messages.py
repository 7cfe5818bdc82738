"""What a node's agent says to one of its workers, and the answers. Explained in chapter 08.

They are the orders of `inference.workers` without `Open` and `Encode`, and in their place the rungs of the warmth ladder, one order
each: the agent says which and when, and what a rung took is measured in the worker, in one place. Orders carry a number and
are answered once.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_mini.inference.ownership.messages import OwnerName
from sllm_mini.inference.workers import messages
from sllm_mini.inference.workers.messages import Number, Seconds
from sllm_mini.types import Warmth
from sllm_mini.wire import Message

Nbytes = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1, max_length=1024)]
Address = Annotated[str, Meta(max_length=4096)]
"""A socket's path; empty where the rung needs none."""


class Rung(Message, frozen=True):
    """A rung that was climbed: what it took, and the worker's whole memory once it stood there. `private_nbytes` is what the
    end of the process would give back (USS), `proportional_nbytes` its share of what it maps (PSS). A worker that is a
    thread of its agent says by how much that process grew since it was launched, for both."""

    warmth: Warmth
    seconds: Seconds
    private_nbytes: Nbytes
    proportional_nbytes: Nbytes


class Last(Message, frozen=True):
    """The last stage of a pipeline: layers `start` to `stop` − 1, and those before it at `addresses`, in order."""

    start: Annotated[int, Meta(ge=0)]
    stop: Annotated[int, Meta(ge=1)]
    addresses: Annotated[tuple[Address, ...], Meta(max_length=1024)]


class Adapter(Message, frozen=True):
    """A LoRA adapter in `folder` on the model of the store's whose digest is `base`."""

    folder: Annotated[str, Meta(min_length=1, max_length=4096)]
    base: Annotated[str, Meta(max_length=256)]


class ClimbRung(Message, frozen=True):
    """Climb to the rung `warmth`, which is the next above where the worker stands. Each order says all that its rung needs, so
    that a worker may climb again for another owner. Answered by `Climbed`.

    RUNTIME imports what a model needs, and `modules`; DRAM attaches `model` of the store at `store`, and is there when its bytes
    are, or at once with `overlap`; DEVICE the same on `device` (on a CPU the bytes are there already); READY makes the engine
    and lets it serve as `owner`, which takes moves in at `address` and asks `arbiter` (register and ledger).
    With `last` the engine is that of a pipeline until the model is whole here, and its requests go on in this worker's own then.
    Without `measure` the rung's memory is not counted and told as 0. `digest`, where given, must be the checkpoint's own, or with an
    `adapter`, which READY applies, be that of both; `key` is the process's for `tcp://` addresses. `number` is set by whoever
    sends it.
    """

    warmth: Warmth
    model: Name
    store: Address = ""
    device: Annotated[str, Meta(min_length=1, max_length=64)] = "cpu"
    digest: Annotated[str, Meta(max_length=256)] = ""
    owner: OwnerName | None = None
    address: Address = ""
    arbiter: Address = ""
    modules: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 8
    pace_seconds: Seconds = 0.0
    interval_seconds: Seconds = 0.0
    overlap: bool = False
    warm_up: bool = False
    measure: bool = True
    last: Last | None = None
    adapter: Adapter | None = None
    key: Annotated[bytes, Meta(max_length=1024)] = b""
    number: Annotated[int, Meta(ge=0)] = 0


class Fall(Message, frozen=True):
    """Keep less: down to `warmth`, which is DEVICE, DRAM or RUNTIME; below that a worker ends. What it served is over, untold: its
    owner was retired before. Answered by `Done`."""

    number: Number
    warmth: Warmth


class Whole(Message, frozen=True):
    """Is the last byte there? Answered by `Done` once it is: for a worker that climbed with `overlap`."""

    number: Number


class Stage(Message, frozen=True):
    """Serve layers `start` to `stop` − 1 of the model that the worker attached, at `address`, once their bytes are there and until it lets go
    of the model; without an address only have them ready for the rung READY (`Last`). `key` as for `ClimbRung`. Answered by `Staged`."""

    number: Number
    start: Annotated[int, Meta(ge=0)]
    stop: Annotated[int, Meta(ge=1)]
    address: Address
    key: Annotated[bytes, Meta(max_length=1024)] = b""


Order = Stage | messages.Run | messages.Move | messages.Drop | messages.Ping | ClimbRung | Fall | Whole


class Climbed(Message, frozen=True):
    """At READY, `address` is where moves are taken in: that of the order, with a port where that had none."""

    number: Number
    rung: Rung
    address: Address = ""


class Staged(Message, frozen=True):
    """It serves at `address`."""

    number: Number
    address: Address


Answer = Staged | messages.Moved | messages.Done | messages.Failed | messages.Alive | Climbed
