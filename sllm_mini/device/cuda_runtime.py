"""What this house asks of CUDA, as two narrow protocols, and the rules every call follows.

`CudaRuntime` is a part of `cupy.cuda.runtime`, name for name; `Toolkit` is the little that lies beyond it. `cuda.py`
fills both with cupy, `fake.py` with a recorder, so that all host logic is tested where there is no GPU. Taught in
chapter 02.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from sllm_mini.device.kernels_image import Compiler, KernelFolders
from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

SUCCESS = 0
OUT_OF_MEMORY = 2
NOT_READY = 600
_CONTEXT_LOST = frozenset({214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719})
"""Statuses after which a process can make no further CUDA call: ECC errors, illegal addresses, failed launches."""

Launcher = Callable[[Sequence[int], Sequence[int], Sequence[object], int], None]
"""Launches one compiled function: grid, block, arguments (8 bytes each), stream handle."""


class CudaRuntime(Protocol):
    """The part of `cupy.cuda.runtime` used here. Pointers and handles are plain integers."""

    CUDARuntimeError: type[Exception]
    """Carries CUDA's error number as `status`."""
    streamNonBlocking: int
    eventBlockingSync: int
    eventDisableTiming: int
    hostAllocPortable: int
    memcpyHostToDevice: int
    memcpyDeviceToHost: int
    memcpyDeviceToDevice: int

    def check_status(self, status: int) -> None: ...
    def getDeviceCount(self) -> int: ...
    def getDevice(self) -> int: ...
    def setDevice(self, device: int) -> None: ...
    def getDeviceProperties(self, device: int) -> Mapping[str, Any]: ...
    def deviceGetPCIBusId(self, device: int) -> str: ...
    def deviceSynchronize(self) -> None: ...
    def memGetInfo(self) -> tuple[int, int]: ...
    def malloc(self, size: int) -> int: ...
    def free(self, ptr: int) -> None: ...
    def hostAlloc(self, size: int, flags: int) -> int: ...
    def freeHost(self, ptr: int) -> None: ...
    def hostRegister(self, ptr: int, size: int, flags: int) -> None: ...
    def hostUnregister(self, ptr: int) -> None: ...
    def ipcGetMemHandle(self, devPtr: int) -> bytes: ...
    def ipcOpenMemHandle(self, handle: bytes) -> int: ...
    def ipcCloseMemHandle(self, devPtr: int) -> None: ...
    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None: ...
    def memcpyPeerAsync(self, dst: int, dstDevice: int, src: int, srcDevice: int, size: int, stream: int) -> None: ...
    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None: ...
    def streamCreateWithFlags(self, flags: int) -> int: ...
    def streamSynchronize(self, stream: int) -> None: ...
    def streamWaitEvent(self, stream: int, event: int, flags: int) -> None: ...
    def streamDestroy(self, stream: int) -> None: ...
    def eventCreateWithFlags(self, flags: int) -> int: ...
    def eventRecord(self, event: int, stream: int) -> None: ...
    def eventQuery(self, event: int) -> int: ...
    def eventSynchronize(self, event: int) -> None: ...
    def eventDestroy(self, event: int) -> None: ...


class Toolkit(Protocol):
    """What lies beyond the runtime: sharing memory with torch, compiling kernels, torch's own streams."""

    @property
    def runtime(self) -> CudaRuntime: ...

    def thread_has_context(self) -> bool:
        """Whether the calling thread has used a GPU before."""
        ...

    def share(self, address: int, nbytes: int, index: int, owner: object) -> torch.Tensor:
        """The memory as a flat uint8 tensor (DLPack) that keeps `owner` alive as long as any view of it lives."""
        ...

    @property
    def compiler(self) -> Compiler:
        """What makes kernels for this toolkit's GPUs."""
        ...

    @property
    def kernel_folders(self) -> KernelFolders:
        """Where compiled kernels lie."""
        ...

    def load(self, image: bytes, index: int) -> Callable[[str], Launcher]:
        """Loads a compiled image onto the GPU, which is current; the answer gives its functions by name. Both raise
        DeviceError, for an image the driver refuses and for a name it lacks."""
        ...

    def capture(self, work: Callable[[], None], index: int) -> Callable[[], None]:
        """Runs `work` to warm it up, then captures its launches as a CUDA graph; the answer replays them. `work` must use
        the same memory each time and never wait for the GPU. Raises DeviceError if it cannot be captured."""
        ...

    def torch_stream(self, handle: int, index: int) -> AbstractContextManager[object]:
        """torch's work inside the context goes to this stream."""
        ...

    def torch_stream_handle(self, index: int) -> int:
        """The stream to which torch's work for this GPU goes now."""
        ...


class CudaError(DeviceError):
    """A CUDA call failed; `status` is CUDA's own error number."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


class Binding:
    """One GPU of one toolkit: takes each call to that GPU, from whatever thread, and speaks our errors.

    CUDA has one current GPU per thread, which torch reads too, so it is put back after each call. The exception is a
    thread that has never used a GPU: putting back its default, GPU 0, would build a context there (some 500 MB of its
    memory) that nobody asked for; such a thread, a loader's worker say, keeps ours. Safe from several threads.
    """

    __slots__ = ("exported", "index", "name", "opened", "toolkit")

    def __init__(self, toolkit: Toolkit, index: int) -> None:
        self.toolkit = toolkit
        self.index = index
        self.name = f"cuda:{index}"
        # CUDA's IPC handles and the allocations behind them, while these live: this process's own, and others'.
        self.exported: WeakValueDictionary[bytes, Any] = WeakValueDictionary()
        self.opened: WeakValueDictionary[bytes, Any] = WeakValueDictionary()

    @contextmanager
    def active(self, doing: str) -> Iterator[CudaRuntime]:
        """The runtime with this GPU current; an error inside becomes a CudaError saying what was being done."""
        runtime = self.toolkit.runtime
        try:
            previous = runtime.getDevice()
            switch = previous != self.index
            restore = switch and self.toolkit.thread_has_context()
            if switch:
                runtime.setDevice(self.index)
            try:
                yield runtime
            finally:
                if restore:
                    runtime.setDevice(previous)
        except runtime.CUDARuntimeError as error:
            status = getattr(error, "status", -1)
            lost = "; its context is lost, restart this process" if status in _CONTEXT_LOST else ""
            raise CudaError(f"{self.name} could not {doing}: {error}{lost}", status) from error
