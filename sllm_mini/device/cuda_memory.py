"""GPU memory and pinned host memory, each given back exactly once: when nothing can reach it any more.

The address belongs to a small allocation object. A buffer refers to it, and so does every tensor, array or memoryview
made from the buffer, so `close()` while a tensor lives is safe: it drops one reference. One plain `cudaMalloc` per
buffer, no pool: a model is one large buffer, and `cudaFree` also waits for whatever still uses the memory.
Taught in chapters 01 and 02.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from sllm_mini.device.base import require_size
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.device.cuda_runtime import OUT_OF_MEMORY, Binding, CudaError
from sllm_mini.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch


class _Allocation:
    """An address that is freed when the last reference to this object goes, on whichever thread that happens.

    Not at exit: the driver takes everything back then, and a tensor may outlive us.
    """

    __slots__ = ("__weakref__", "address")

    def __init__(self, address: int, free: Callable[[Binding, int], None], binding: Binding) -> None:
        self.address = address
        if address:  # 0 stands for no bytes
            weakref.finalize(self, free, binding, address).atexit = False


def _free_device(binding: Binding, address: int) -> None:
    with binding.active("free device memory") as runtime:
        runtime.free(address)


def _free_pinned(binding: Binding, address: int) -> None:
    with binding.active("free pinned memory") as runtime:
        runtime.freeHost(address)


class DeviceMemory:
    """Bytes on one GPU, uninitialised, aligned to at least 256 bytes. Costs one `cudaMalloc`, ~0.1 ms and more.

    Raises OutOfMemoryError with the bytes asked for and free. Safe from several threads, but for `close`.
    """

    __slots__ = ("_allocation", "binding", "nbytes")

    def __init__(self, binding: Binding, nbytes: int) -> None:
        require_size(nbytes)
        self.binding = binding
        self.nbytes = nbytes
        self._allocation: _Allocation | None = None
        try:
            with binding.active(f"allocate {nbytes:,} bytes") as runtime:
                self._allocation = _Allocation(runtime.malloc(nbytes) if nbytes else 0, _free_device, binding)
        except CudaError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            with binding.active("say how much memory is free") as runtime:
                free, total = runtime.memGetInfo()
            raise OutOfMemoryError(
                f"{binding.name} has {free:,} of {total:,} bytes free and {nbytes:,} were asked for;"
                " free some (torch.cuda.empty_cache() gives back what torch only keeps) or load a smaller model"
            ) from error

    @property
    def address(self) -> int:
        return self._open().address

    def tensor(self) -> torch.Tensor:
        allocation = self._open()
        with self.binding.active("share memory with torch"):
            return self.binding.toolkit.share(allocation.address, self.nbytes, self.binding.index, allocation)

    def close(self) -> None:
        self._allocation = None

    def _open(self) -> _Allocation:
        if self._allocation is None:
            raise DeviceError(f"this buffer on {self.binding.name} was closed; take a new one")
        return self._allocation


class PinnedMemory:
    """Page-locked host memory, which a GPU copies to and from without a staging copy, beside other work.

    Portable: pinned for every GPU of the process. Pinning costs about as much as a copy of the same bytes, so pin
    once and reuse. Raises OutOfMemoryError when the host has no more to lock. Safe from several threads, but for
    `close`.
    """

    __slots__ = ("_address", "_view", "nbytes")
    pinned = True

    def __init__(self, binding: Binding, nbytes: int) -> None:
        require_size(nbytes)
        self.nbytes = nbytes
        self._view: memoryview | None = None
        try:
            with binding.active(f"pin {nbytes:,} bytes of host memory") as runtime:
                address = runtime.hostAlloc(nbytes, runtime.hostAllocPortable) if nbytes else 0
                allocation = _Allocation(address, _free_pinned, binding)
        except CudaError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            raise OutOfMemoryError(
                f"the host could not pin {nbytes:,} bytes, {available_nbytes():,} are free;"
                " ask for a smaller pool or raise the limit on locked memory"
            ) from error
        self._address = address
        array = (ctypes.c_ubyte * nbytes).from_address(address)
        # Every view and tensor made from the memoryview keeps the array, and so the allocation.
        array.allocation = allocation  # type: ignore[attr-defined]
        self._view = memoryview(array).cast("B")

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise DeviceError("this pinned buffer was closed; take a new one")
        return self._view

    @property
    def address(self) -> int:
        if self._view is None:
            raise DeviceError("this pinned buffer was closed; take a new one")
        return self._address

    def tensor(self) -> torch.Tensor:
        import torch

        return torch.frombuffer(self.view, dtype=torch.uint8) if self.nbytes else torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self._view = None
