"""What a device is, for the rest of the house: memory, streams, events and copies between them.

`cpu` and `cuda` are the two answers to these protocols; nothing above this floor knows which one it holds.
Addresses are plain integers and sizes are bytes. Taught in chapters 01 and 02.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

ALIGNMENT = 2 << 20
"""The CPU's buffers start on a huge page (2 MiB), pinned ones on a page (4 KiB): both satisfy direct I/O."""


@runtime_checkable
class Buffer(Protocol):
    """One contiguous allocation. It lives as long as the last reference to it or to a tensor made from it."""

    @property
    def address(self) -> int:
        """Where it starts. Raises DeviceError once the buffer is closed: nothing may aim at memory given back."""
        ...

    @property
    def nbytes(self) -> int: ...

    def tensor(self) -> torch.Tensor:
        """The whole buffer as a one-dimensional uint8 tensor that shares its memory and keeps it alive."""
        ...

    def close(self) -> None:
        """Gives the memory back now if no tensor or view uses it, else when the last of them goes."""
        ...


@runtime_checkable
class HostBuffer(Buffer, Protocol):
    """A buffer the processor can address, and so a target of reads."""

    @property
    def pinned(self) -> bool: ...

    @property
    def view(self) -> memoryview:
        """The whole buffer as writable bytes."""
        ...


@runtime_checkable
class Pinned(Protocol):
    """Host memory that existed before, which a device copies from fastest until `close`.

    It belongs to whoever mapped it, who keeps it mapped until then; dropping the last reference closes too.
    """

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked; for the CPU, which needs no such thing, it is not."""
        ...

    def close(self) -> None:
        """Unlocks the memory, once however often it is called; call it when no copy uses the memory any more."""
        ...


class Event(Protocol):
    """A point in a stream's order of work."""

    def done(self) -> bool:
        """True once all work recorded before it has finished; never blocks."""
        ...

    def wait(self) -> None:
        """Blocks the calling thread until it is done; raises DeviceError if the work failed."""
        ...


class Stream(Protocol):
    """Work that runs in order, beside the processor and beside other streams."""

    @property
    def handle(self) -> int: ...

    def copy_from_host(self, dst: Buffer, dst_offset: int, src: HostBuffer, src_offset: int, nbytes: int) -> None:
        """Enqueues a copy. `src` must stay unchanged until an event recorded after it is done."""
        ...

    def copy_to_host(self, dst: HostBuffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        """Enqueues a copy. `dst` holds the bytes once an event recorded after it is done."""
        ...

    def copy_on_device(self, dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        """Enqueues a copy between two buffers of this kind of device, which may be on two GPUs; no overlap."""
        ...

    def record(self) -> Event: ...

    def wait_for(self, event: Event) -> None:
        """Work enqueued after this call starts only once `event` is done; the processor does not block."""
        ...

    def synchronize(self) -> None: ...

    def close(self) -> None:
        """Waits for the stream's work and gives it back; after it, no copy of the stream touches any buffer."""
        ...


class Kernel(Protocol):
    """A compiled device function."""

    def __call__(self, stream: Stream, grid: Sequence[int], block: Sequence[int], args: Sequence[object]) -> None: ...


@runtime_checkable
class Device(Protocol):
    """A place where tensors can live. `name` is torch's name for it: "cpu", "cuda:0"."""

    @property
    def name(self) -> str: ...

    @property
    def is_host(self) -> bool: ...

    def free_nbytes(self) -> int:
        """Bytes that an allocation may hope for now."""
        ...

    def allocate(self, nbytes: int) -> Buffer:
        """Uninitialised memory. Raises OutOfMemoryError naming what was asked for and what is free."""
        ...

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """Host memory that this device copies from fastest (pinned for a GPU), ready to be read into."""
        ...

    def pin(self, address: int, nbytes: int) -> Pinned:
        """Makes host memory that exists already as fast to copy from as `allocate_host`'s, until it is closed."""
        ...

    def stream(self) -> Stream: ...

    def synchronize(self) -> None: ...


def check_range(what: str, buffer: Buffer, offset: int, nbytes: int) -> None:
    """Raises DeviceError unless `[offset, offset + nbytes)` lies inside `buffer`; every copy asks this first."""
    if offset < 0 or nbytes < 0 or offset + nbytes > buffer.nbytes:
        raise DeviceError(
            f"bytes {offset:,} to {offset + nbytes:,} are outside the {what} buffer of {buffer.nbytes:,} bytes;"
            " copy a range that lies inside it"
        )


def require_size(nbytes: int) -> None:
    """Raises ValueError for a number of bytes that no buffer can have."""
    if nbytes < 0:
        raise ValueError(f"a buffer cannot have {nbytes} bytes; ask for 0 or more")
