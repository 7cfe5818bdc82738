"""GPU memory, a process's own or another's, and pinned host memory, each given back exactly once: when nothing can
reach it any more.

The address belongs to a small allocation object. A buffer refers to it, and so does every tensor, array or memoryview
made from the buffer, so `close()` while a tensor lives is safe: it drops one reference. One plain `cudaMalloc` per
buffer, no pool: a model is one large buffer, and `cudaFree` also waits for whatever still uses the memory. Such a
buffer can be opened by other processes too (`export`, `OpenedMemory`): a mapping, no copy, whatever its size.
Taught in chapters 01, 02 and 03.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from sllm_mini.device.base import require_size
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.device.cuda_ipc import HANDLE_NBYTES, Exported
from sllm_mini.device.cuda_runtime import OUT_OF_MEMORY, Binding, CudaError
from sllm_mini.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

_PORTABLE = 1  # cudaHostRegisterPortable, which cupy does not name
_ALREADY_PINNED = 712
_REFUSED = frozenset({1, 101, 201, 205, 208, 400})
"""Statuses of a handle that CUDA cannot open: freed or never exported, another GPU's, mapped in its stead already."""


class _Allocation:
    """An address that is freed when the last reference to this object goes, on whichever thread that happens.

    Not at exit: the driver takes everything back then, and a tensor may outlive us.
    """

    __slots__ = ("__weakref__", "address")

    def __init__(self, address: int, free: Callable[[Binding, int], None] | None, binding: Binding) -> None:
        self.address = address  # 0 stands for no bytes
        if free is not None:
            weakref.finalize(self, free, binding, address).atexit = False


def _free_device(binding: Binding, address: int) -> None:
    with binding.active("free device memory") as runtime:
        runtime.free(address)


def _free_pinned(binding: Binding, address: int) -> None:
    with binding.active("free pinned memory") as runtime:
        runtime.freeHost(address)


def _unmap(binding: Binding, address: int) -> None:
    with binding.active("close memory of another process") as runtime:
        runtime.ipcCloseMemHandle(address)


def _unpin(binding: Binding, address: int) -> None:
    with binding.active("unpin host memory") as runtime:
        runtime.hostUnregister(address)


class CudaBuffer:
    """Bytes on one GPU and the one owner of their address. Safe from several threads, but for `close`."""

    __slots__ = ("_allocation", "binding", "nbytes")

    def __init__(self, binding: Binding, nbytes: int, allocation: _Allocation) -> None:
        self.binding = binding
        self.nbytes = nbytes
        self._allocation: _Allocation | None = allocation

    @property
    def address(self) -> int:
        return self._open().address

    def tensor(self) -> torch.Tensor:
        allocation = self._open()
        with self.binding.active("share memory with torch"):
            return self.binding.toolkit.share(allocation.address, self.nbytes, self.binding.index, allocation)

    def lend(self, on_return: Callable[[], object]) -> CudaBuffer:
        """The same memory as a buffer of its own. `on_return` is called once, when that buffer and every tensor made from
        it are gone: on whatever thread that happens, perhaps amid a collection, so it must not block; not at exit."""
        owner = self._open()

        def give_back(binding: Binding, address: int, owner: _Allocation = owner) -> None:
            on_return()

        return CudaBuffer(self.binding, self.nbytes, _Allocation(owner.address, give_back, self.binding))

    def close(self) -> None:
        self._allocation = None

    def _open(self) -> _Allocation:
        if self._allocation is None:
            raise DeviceError(f"this buffer on {self.binding.name} was closed; take a new one")
        return self._allocation


class DeviceMemory(CudaBuffer):
    """Bytes on one GPU, uninitialised, aligned to at least 256 bytes. Costs one `cudaMalloc`, ~0.1 ms and more.

    Raises OutOfMemoryError with the bytes asked for and free.
    """

    __slots__ = ()

    def __init__(self, binding: Binding, nbytes: int) -> None:
        require_size(nbytes)
        try:
            with binding.active(f"allocate {nbytes:,} bytes") as runtime:
                allocation = _Allocation(runtime.malloc(nbytes) if nbytes else 0, _free_device if nbytes else None, binding)
        except CudaError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            with binding.active("say how much memory is free") as runtime:
                free, total = runtime.memGetInfo()
            raise OutOfMemoryError(
                f"{binding.name} has {free:,} of {total:,} bytes free and {nbytes:,} were asked for;"
                " free some (torch.cuda.empty_cache() gives back what torch only keeps) or load a smaller model"
            ) from error
        super().__init__(binding, nbytes, allocation)

    def export(self) -> bytes:
        """What `CudaDevice.open_exported` needs to map this memory into another process of the same machine.

        Whoever has it may read and write the memory. Send it once the bytes are there (an event is done), and keep
        the buffer until every process that opened it has closed it: what they see after that is undefined. CUDA
        shares whole blocks of 2 MiB, so a buffer whose size is no multiple of that may show them its neighbour too.
        """
        allocation = self._open()
        with self.binding.active("export memory to other processes") as runtime:
            handle = runtime.ipcGetMemHandle(allocation.address) if self.nbytes else bytes(HANDLE_NBYTES)
            gpu = runtime.deviceGetPCIBusId(self.binding.index)
        if self.nbytes:
            self.binding.exported[handle] = allocation
        return Exported(handle, self.nbytes, gpu).encode()


class OpenedMemory(CudaBuffer):
    """Memory of a GPU that belongs to another process: a mapping of its bytes, which are shared, not copied.

    A handle opened twice is mapped once in a process; the mapping goes with the last buffer and the last tensor over
    it. Raises DeviceError for a handle that is damaged, too small, of another GPU or this process's own (CUDA opens
    only other processes' memory), or that its owner has freed.
    """

    __slots__ = ()

    def __init__(self, binding: Binding, handle: bytes, nbytes: int) -> None:
        require_size(nbytes)
        exported = Exported.decode(handle)
        if nbytes > exported.nbytes:
            raise DeviceError(
                f"the exported memory has {exported.nbytes:,} bytes and {nbytes:,} were asked for; ask for no more"
            )
        super().__init__(binding, nbytes, _map(binding, exported))


def _map(binding: Binding, exported: Exported) -> _Allocation:
    with binding.active("say which GPU it is") as runtime:
        gpu = runtime.deviceGetPCIBusId(binding.index)
    if exported.gpu != gpu:
        raise DeviceError(f"the exported memory is on the GPU {exported.gpu}, {binding.name} is {gpu}; open it there")
    if exported.handle in binding.exported:
        raise DeviceError(f"the exported memory on {binding.name} is this process's own; use the buffer it came from")
    if not exported.nbytes:
        return _Allocation(0, None, binding)
    allocation = binding.opened.get(exported.handle)
    if allocation is None:
        # Another thread may open it just now, or its last mapping be just going: CUDA counts how often a process opened
        # a handle (since 11.2), gives the same address and unmaps at the last close, so each opening has one close.
        try:
            with binding.active("open memory of another process") as runtime:
                allocation = _Allocation(runtime.ipcOpenMemHandle(exported.handle), _unmap, binding)
        except CudaError as error:
            if error.status not in _REFUSED:
                raise
            raise CudaError(f"{error}; its owner has freed it or ended, ask for a new one", error.status) from error
        binding.opened[exported.handle] = allocation
    return allocation


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
                allocation = _Allocation(address, _free_pinned if nbytes else None, binding)
        except CudaError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            raise _cannot_pin(nbytes) from error
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


class PinnedRange:
    """Host memory that somebody else mapped, page-locked for every GPU of the process until `close`.

    Costs about as much as a copy of the same bytes. Raises DeviceError where some of its pages are pinned already and
    OutOfMemoryError when the host has no more to lock. `close` is safe from several threads.
    """

    __slots__ = ("__weakref__", "_unpin", "address", "nbytes")

    def __init__(self, binding: Binding, address: int, nbytes: int) -> None:
        require_size(nbytes)
        self.address = address
        self.nbytes = nbytes
        self._unpin: weakref.finalize[..., PinnedRange] | None = None
        if not nbytes:
            return
        try:
            with binding.active(f"pin {nbytes:,} bytes of host memory") as runtime:
                runtime.hostRegister(address, nbytes, _PORTABLE)
        except CudaError as error:
            if error.status == OUT_OF_MEMORY:
                raise _cannot_pin(nbytes) from error
            if error.status == _ALREADY_PINNED:
                raise CudaError(
                    f"some of the {nbytes:,} bytes at {address:#x} are pinned already; pin each page once,"
                    " and close the other pin first",
                    error.status,
                ) from error
            raise
        self._unpin = weakref.finalize(self, _unpin, binding, address)
        self._unpin.atexit = False

    @property
    def pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()


def _cannot_pin(nbytes: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"the host could not pin {nbytes:,} bytes, {available_nbytes():,} are free;"
        " ask for a smaller pool or raise the limit on locked memory"
    )
