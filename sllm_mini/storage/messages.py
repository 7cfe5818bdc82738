"""What is said on the store's socket. Explained in chapter 05.

Every request but `Attach` and `Watch` is answered once, by what its docstring names or by `Failed`, and the connection
takes the next. An `Attach` makes its connection the lease: it stays open for as long as the attached memory can be
reached, and the kernel closes it for a client that dies, so no lease outlives its holder.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_mini.wire import MAX_FDS, Message

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Source = Annotated[str, Meta(min_length=1, max_length=4096)]
Size = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Number = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=8192)]
Handle = Annotated[bytes, Meta(max_length=256)]


class Register(Message, frozen=True):
    """Makes a model known under a name. Answered by `Model`."""

    name: Name
    source: Source


class Forget(Message, frozen=True):
    """Evicts a model everywhere and drops its name. Answered by `Done`."""

    name: Name


class Prefetch(Message, frozen=True):
    """Brings a model to a place ("disk", "dram", "cuda:0"). Answered by `Progressed` any number of times, then `Done`."""

    name: Name
    place: Name


class Attach(Message, frozen=True):
    """Asks for a model's memory. Answered by `Image` and its `Descriptors`, by `DeviceImage`, or by `Elsewhere`; the
    first two are followed by `Ready` until all layers are."""

    name: Name
    device: Name


class Pin(Message, frozen=True):
    """Keeps a model from being evicted from a place, or no longer. Answered by `Done`."""

    name: Name
    place: Name
    pinned: bool


class Evict(Message, frozen=True):
    """Gives back what a place holds of a model. Answered by `Done` with the bytes."""

    name: Name
    place: Name


class List(Message, frozen=True):
    """Answered by `Models`."""


class Stats(Message, frozen=True):
    """Answered by `Figures`."""


class Watch(Message, frozen=True):
    """From now on the connection carries `Happened`, until the client closes it."""


Request = Register | Forget | Prefetch | Attach | Pin | Evict | List | Stats | Watch


class Failed(Message, frozen=True):
    """`kind` is the name of a class of `sllm_mini.errors`, `path` and `offset` what it carries of a file."""

    kind: Name
    message: Text
    path: Text | None = None
    offset: Size | None = None


class Done(Message, frozen=True):
    nbytes: Size = 0


class Progressed(Message, frozen=True):
    done_nbytes: Size
    total_nbytes: Size


class Residence(Message, frozen=True):
    """What one place holds of a model: memory, or the disk cache, where it may lie beside it. `nbytes` are those that are
    there, while it is `loading` those that have arrived; `leases` are attachments that live now. An interrupted download
    is not told: its bytes count once their hashes have been compared."""

    place: Name
    nbytes: Size
    leases: Number
    pinned: bool
    loading: bool


class Model(Message, frozen=True):
    """A registered model. `nbytes` is its size in memory; `uses` counts attachments. Credentials in the address of its
    `source` are shown as ***."""

    name: Name
    source: Text
    nbytes: Size
    layers: Number
    uses: Number
    places: list[Residence]


class Models(Message, frozen=True):
    models: list[Model]


class Place(Message, frozen=True):
    """A place's budget and use. `kernel_nbytes` is what the system says that it holds (the device's driver does not): what
    is used, as far as it has its memory, and the `ready_nbytes` that nobody uses and that are backed for the next load.
    `trouble` says why fewer are than were asked for, if memory was refused."""

    place: Name
    budget_nbytes: Size
    used_nbytes: Size
    kernel_nbytes: Size | None
    ready_nbytes: Size = 0
    trouble: Text = ""


class Figures(Message, frozen=True):
    """Counters since the store started: attachments by where their bytes were found, bytes moved from place to place, and
    bytes evicted."""

    places: list[Place]
    attached: dict[str, Number]
    moved_nbytes: dict[str, Size]
    evicted_nbytes: dict[str, Size]


class Image(Message, frozen=True):
    """A model in DRAM: its index is the payload, its memory comes in the `Descriptors` that follow. `folder` holds the
    companions; `identity` is its index's (see `Checkpoint`)."""

    folder: Source
    identity: tuple[int, int, int]
    nbytes: Size
    chunk_nbytes: Size
    chunks: Number


class DeviceImage(Message, frozen=True):
    """A model on a GPU: its index is the payload, `handle` opens its memory (CUDA IPC)."""

    folder: Source
    identity: tuple[int, int, int]
    nbytes: Size
    handle: Handle


class Elsewhere(Message, frozen=True):
    """There is no room for the model, for the `reason` given: the client loads it itself from the source. That is the one
    answer with the credentials of an address, if it was registered with some, since the client must use them; it is never
    shown."""

    source: Source
    reason: Text


class Descriptors(Message, frozen=True):
    """The next memfds of an image, in order."""

    max_fds = MAX_FDS


class Ready(Message, frozen=True):
    """Layers (by number in the index) whose bytes have arrived since the last one; `done` when all have."""

    layers: list[Number]
    done_nbytes: Size
    done: bool


class Happened(Message, frozen=True):
    """Something that changed what a place holds: "loaded", "evicted", "failed" for a `reason`, "cancelled" by whoever closed
    the store."""

    what: Name
    name: Name
    place: Name
    nbytes: Size
    reason: Text = ""


Answer = Failed | Done | Progressed | Model | Models | Figures | Image | DeviceImage | Elsewhere | Descriptors | Ready | Happened
