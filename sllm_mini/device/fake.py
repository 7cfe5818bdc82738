"""A CUDA runtime made of host memory: for testing host logic where there is no GPU, and for watching it at work.

`RecordingRuntime` speaks the part of `cupy.cuda.runtime` that `CudaDevice` uses, records every call, and is as unhelpful
as a GPU may be: a stream's work is done only when a stream or an event is waited for or queried, so whoever reads a
copy too early sees old bytes, and whoever refills a pinned buffer too early corrupts the copy. It checks addresses,
current GPUs and handles, counts what is alive, runs out of memory at its limit and fails on demand. Safe from several
threads. Taught in chapters 02 and 03.

    runtime = RecordingRuntime(devices=2)
    gpu = runtime.device(1)  # a CudaDevice
    other = RecordingRuntime(devices=2, beside=runtime)  # another process on the same GPUs
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.cuda_runtime import NOT_READY, OUT_OF_MEMORY, SUCCESS
from sllm_mini.device.fake_gpus import Block, FakeGpus
from sllm_mini.device.fake_machine import (
    ALREADY_REGISTERED,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NO_PEER_ACCESS,
    NOT_REGISTERED,
    OWN_HANDLE,
    FakeCudaError,
    FakeEvent,
    FakeMachine,
    FakeStream,
    require,
)
from sllm_mini.device.fake_toolkit import FakeToolkit, HostKernel

P = ParamSpec("P")
R = TypeVar("R")


def _recorded(
    method: Callable[Concatenate[RecordingRuntime, P], R],
) -> Callable[Concatenate[RecordingRuntime, P], R]:
    @wraps(method)
    def call(self: RecordingRuntime, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            self._note(method.__name__, args)
            return method(self, *args, **kwargs)

    return call


class RecordingRuntime(FakeMachine):
    """See the module. `queries_before_done` makes each event answer "not ready" that often before it is done;
    `kernels` are run in place of compiled ones, by name, instead of the package's host references. `beside` is another
    process of the same machine: both take from the same GPUs' memory, as large as the first says, and either can open
    what the other exports."""

    CUDARuntimeError: type[Exception] = FakeCudaError
    streamNonBlocking = 1
    eventBlockingSync = 1
    eventDisableTiming = 2
    hostAllocPortable = 1
    memcpyHostToDevice = 1
    memcpyDeviceToHost = 2
    memcpyDeviceToDevice = 3

    def __init__(
        self,
        devices: int = 1,
        *,
        memory_nbytes: int = 1 << 30,
        pinned_nbytes: int = 1 << 30,
        queries_before_done: int = 0,
        kernels: Mapping[str, HostKernel] | None = None,
        beside: RecordingRuntime | None = None,
    ) -> None:
        gpus = FakeGpus(memory_nbytes) if beside is None else beside._gpus
        super().__init__(devices, gpus, pinned_nbytes, queries_before_done)
        toolkit = FakeToolkit(self, kernels)
        self._cuda_devices = [CudaDevice(toolkit, index) for index in range(devices)]

    def device(self, index: int = 0) -> CudaDevice:
        return self._cuda_devices[index]

    def names(self) -> list[str]:
        """The calls so far, without those that ask for or switch the current GPU."""
        return [call.name for call in self.calls if call.name not in ("getDevice", "setDevice")]

    # The runtime: devices

    def check_status(self, status: int) -> None:
        if status != SUCCESS:
            raise FakeCudaError(status)

    @_recorded
    def getDeviceCount(self) -> int:
        return self.device_count

    @_recorded
    def getDevice(self) -> int:
        return self._current()

    @_recorded
    def setDevice(self, device: int) -> None:
        require(0 <= device < self.device_count, INVALID_DEVICE)
        self._thread.device = device
        self.contexts.add(device)

    @_recorded
    def getDeviceProperties(self, device: int) -> Mapping[str, Any]:
        require(0 <= device < self.device_count, INVALID_DEVICE)
        return {
            "name": b"Recording GPU",
            "major": 9,
            "minor": 0,
            "totalGlobalMem": self._gpus.memory_nbytes,
            "multiProcessorCount": 2,
            "memoryClockRate": 1_000_000,
            "memoryBusWidth": 1024,
            "pciBusID": device,
        }

    @_recorded
    def memGetInfo(self) -> tuple[int, int]:
        return self._gpus.free_nbytes(self._current()), self._gpus.memory_nbytes

    @_recorded
    def deviceGetPCIBusId(self, device: int) -> str:
        require(0 <= device < self.device_count, INVALID_DEVICE)
        return f"0000:{device:02X}:00.0"

    @_recorded
    def deviceSynchronize(self) -> None:
        self._finish(self._current())

    # Memory

    @_recorded
    def malloc(self, size: int) -> int:
        device = self._current()
        self._check_lost(device)
        require(size <= self._gpus.free_nbytes(device), OUT_OF_MEMORY)
        address = self._new_block(self._memory, size, device)
        self._gpus.take(device, size)
        self.peak_nbytes[device] = max(self.peak_nbytes[device], self.live_nbytes(device))
        return address

    @_recorded
    def hostAlloc(self, size: int, flags: int) -> int:
        require(self.live_pinned_nbytes() + size <= self._pinned_nbytes, OUT_OF_MEMORY)
        address = self._new_block(self._pinned, size, self._current())
        self.peak_pinned_nbytes = max(self.peak_pinned_nbytes, self.live_pinned_nbytes())
        return address

    @_recorded
    def free(self, ptr: int) -> None:
        require(ptr in self._memory, INVALID_VALUE)
        self._before_free(self._memory[ptr].device)
        self._give_back(self._memory.pop(ptr))

    @_recorded
    def freeHost(self, ptr: int) -> None:
        require(ptr in self._pinned, INVALID_VALUE)
        self._before_unpin()
        self._retire(self._pinned.pop(ptr))

    @_recorded
    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        require(ptr > 0 and size > 0 and flags == 1, INVALID_VALUE)
        require(not self._shares_page(ptr, size), ALREADY_REGISTERED)
        require(self.live_pinned_nbytes() + size <= self._pinned_nbytes, OUT_OF_MEMORY)
        self._registered[ptr] = Block(ptr, size, self._current(), None)
        self.peak_pinned_nbytes = max(self.peak_pinned_nbytes, self.live_pinned_nbytes())

    @_recorded
    def hostUnregister(self, ptr: int) -> None:
        require(ptr in self._registered, NOT_REGISTERED)
        self._before_unpin()
        del self._registered[ptr]

    # Memory of other processes

    @_recorded
    def ipcGetMemHandle(self, devPtr: int) -> bytes:
        require(devPtr in self._memory, INVALID_VALUE)
        return self._gpus.export(self._memory[devPtr])

    @_recorded
    def ipcOpenMemHandle(self, handle: bytes) -> int:
        """Here at the address it has in its own process, which CUDA does not promise."""
        block = self._gpus.find(handle)
        if block is None:
            raise FakeCudaError(INVALID_VALUE)
        require(block is not self._memory.get(block.address), OWN_HANDLE)
        require(block.device == self._current(), NO_PEER_ACCESS)
        return self._map(block)

    @_recorded
    def ipcCloseMemHandle(self, devPtr: int) -> None:
        require(devPtr in self._opened, INVALID_VALUE)
        self._unmap(self._opened[devPtr])

    # Work in streams

    @_recorded
    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        on_device = {
            self.memcpyHostToDevice: (True, False),
            self.memcpyDeviceToHost: (False, True),
            self.memcpyDeviceToDevice: (True, True),
        }
        require(kind in on_device, INVALID_VALUE)
        pageable = False
        for address, device_side in zip((dst, src), on_device[kind], strict=True):
            require(self._on_device(address, size) == device_side, INVALID_VALUE)
            pageable |= not device_side and not self._is_pinned(address, size)
        self._enqueue(self._stream(stream), partial(ctypes.memmove, dst, src, size))
        if pageable:  # CUDA stages it; the caller's memory is its own again when the call returns
            self.pageable_copies += 1
            self._run(self._stream(stream))

    @_recorded
    def memcpyPeerAsync(self, dst: int, dstDevice: int, src: int, srcDevice: int, size: int, stream: int) -> None:
        require(self._on_device(dst, size, dstDevice), INVALID_VALUE)
        require(self._on_device(src, size, srcDevice), INVALID_VALUE)
        self._enqueue(self._stream(stream), partial(ctypes.memmove, dst, src, size))

    @_recorded
    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        require(self._on_device(ptr, size), INVALID_VALUE)
        self._enqueue(self._stream(stream), partial(ctypes.memset, ptr, value, size))

    @_recorded
    def launch(self, kernel: HostKernel, grid: Sequence[int], block: Sequence[int], args: Sequence[object], stream: int) -> None:
        """Enqueues a kernel; the driver's own call for it takes a compiled function here."""
        require(self._stream(stream).device == self._current(), INVALID_HANDLE)
        require(all(isinstance(arg, int) and 0 <= arg < 1 << 64 for arg in args), INVALID_VALUE)
        self._enqueue(self._stream(stream), partial(kernel, grid, block, args))

    @_recorded
    def streamCreateWithFlags(self, flags: int) -> int:
        self._streams[handle := self._new_handle()] = FakeStream(self._current())
        return handle

    @_recorded
    def streamSynchronize(self, stream: int) -> None:
        self._run(self._stream(stream))

    @_recorded
    def streamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        waited = self._event(event)
        self._enqueue(self._stream(stream), partial(self._reach, waited, waited.recorded, waited.stream))

    @_recorded
    def streamDestroy(self, stream: int) -> None:
        require(stream in self._streams, INVALID_HANDLE)
        self._destroyed.append(self._streams.pop(stream))  # its work still runs, some time

    # Events

    @_recorded
    def eventCreateWithFlags(self, flags: int) -> int:
        self._events[handle := self._new_handle()] = FakeEvent(self._current())
        return handle

    @_recorded
    def eventRecord(self, event: int, stream: int) -> None:
        recorded, lane = self._event(event), self._stream(stream)
        require(recorded.device == lane.device, INVALID_HANDLE)
        recorded.recorded += 1
        recorded.stream = lane
        recorded.queries_left = self._queries_before_done
        self._enqueue(lane, partial(recorded.reach, recorded.recorded))

    @_recorded
    def eventQuery(self, event: int) -> int:
        queried = self._event(event)
        if queried.reached < queried.recorded and queried.queries_left:
            queried.queries_left -= 1
            return NOT_READY
        try:
            self._reach(queried, queried.recorded, queried.stream)
        except FakeCudaError as error:
            return error.status
        return SUCCESS

    @_recorded
    def eventSynchronize(self, event: int) -> None:
        waited = self._event(event)
        self._reach(waited, waited.recorded, waited.stream)

    @_recorded
    def eventDestroy(self, event: int) -> None:
        require(event in self._events, INVALID_HANDLE)
        del self._events[event]
