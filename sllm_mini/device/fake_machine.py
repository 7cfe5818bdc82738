"""What lies behind the fake CUDA runtime of a process: memory that knows its bounds, streams of work, events, faults.

Each GPU's memory is host memory. Work waits in its stream until somebody needs a result; then it runs in order, with
the work of other streams that it was told to wait for, and with nothing else. Taught in chapter 02.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sllm_mini.device.cuda_runtime import NOT_READY, OUT_OF_MEMORY
from sllm_mini.device.fake_gpus import Block, FakeGpus, Opening

INVALID_VALUE, INVALID_DEVICE, INVALID_HANDLE, ILLEGAL_ADDRESS = 1, 101, 400, 700
OWN_HANDLE, NO_PEER_ACCESS, ALREADY_REGISTERED, NOT_REGISTERED = 201, 217, 712, 713
FRESH, FREED = 0xA5, 0xDD
"""What memory holds before anyone wrote to it, and after it was freed."""
_ALIGNMENT = 512
_PAGE = 4096
_NO_CONTEXT = frozenset({"getDevice", "getDeviceCount", "getDeviceProperties", "deviceGetPCIBusId"})
_ERRORS = {
    INVALID_VALUE: "cudaErrorInvalidValue: invalid argument",
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation: out of memory",
    INVALID_DEVICE: "cudaErrorInvalidDevice: invalid device ordinal",
    OWN_HANDLE: "cudaErrorDeviceUninitialized: invalid device context",
    NO_PEER_ACCESS: "cudaErrorPeerAccessUnsupported: peer access is not supported between these two devices",
    INVALID_HANDLE: "cudaErrorInvalidResourceHandle: invalid resource handle",
    NOT_READY: "cudaErrorNotReady: device not ready",
    ILLEGAL_ADDRESS: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    ALREADY_REGISTERED: "cudaErrorHostMemoryAlreadyRegistered: part or all of the requested memory range is already mapped",
    NOT_REGISTERED: "cudaErrorHostMemoryNotRegistered: pointer does not correspond to a registered memory region",
}


class FakeCudaError(RuntimeError):
    """Looks like cupy's CUDARuntimeError."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_ERRORS.get(status, f"CUDA error {status}"))


def require(condition: bool, status: int) -> None:
    if not condition:
        raise FakeCudaError(status)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its arguments, the GPU that was current, the thread that made it."""

    name: str
    args: tuple[Any, ...]
    device: int
    thread: str


@dataclass(slots=True, eq=False)
class FakeStream:
    device: int
    work: deque[Callable[[], object]] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class FakeEvent:
    """`recorded` counts how often it was recorded, `reached` which of these the work has come to."""

    device: int
    stream: FakeStream | None = None
    recorded: int = 0
    reached: int = 0
    queries_left: int = 0

    def reach(self, generation: int) -> None:
        self.reached = max(self.reached, generation)


@dataclass(slots=True, eq=False)
class Fault:
    calls_left: int
    status: int
    later: bool


class FakeMachine:
    """One process and the GPUs it sees; `RecordingRuntime` adds CUDA's calls. All methods hold the caller to the lock."""

    def __init__(self, devices: int, gpus: FakeGpus, pinned_nbytes: int, queries_before_done: int) -> None:
        self.calls: list[Call] = []
        self.contexts: set[int] = set()
        """GPUs on which a context was made; on a real one it takes some 500 MB of the GPU's memory."""
        self.implicit_synchronizations = 0
        """Frees that had to wait for enqueued work, as `cudaFree` does: correct, but a stall."""
        self.pageable_copies = 0
        """Copies from or to memory that is not pinned: they block the caller."""
        self.frees_of_opened_memory = 0
        """Frees of memory that another process still mapped, which reads anything from then on. Always a bug."""
        self.peak_nbytes: Counter[int] = Counter()
        self.peak_pinned_nbytes = 0
        self.device_count = devices
        self._gpus = gpus
        self._lock = gpus.lock
        self._thread = threading.local()
        self._pinned_nbytes = pinned_nbytes
        self._queries_before_done = queries_before_done
        self._memory: dict[int, Block] = {}
        self._pinned: dict[int, Block] = {}
        self._registered: dict[int, Block] = {}  # host memory of others, pinned; the fake holds no storage for it
        self._opened: dict[int, Opening] = {}
        self._freed: deque[Block] = deque(maxlen=16)  # kept, so that a stale tensor shows FREED and does not crash
        self._default_streams = [FakeStream(device) for device in range(devices)]
        self._streams: dict[int, FakeStream] = {}
        self._destroyed: list[FakeStream] = []
        self._events: dict[int, FakeEvent] = {}
        self._handles = 0x1000
        self._faults: dict[str, list[Fault]] = {}
        self._fault_later: int | None = None
        self._lost: dict[int, int] = {}

    def fail(self, name: str, *, nth: int = 1, status: int = ILLEGAL_ADDRESS, later: bool = False) -> None:
        """The `nth` call of `name` from now on fails. With `later` it is accepted, its work fails when its turn comes,
        and from then on everything but freeing fails on that GPU, as after an error of its own."""
        with self._lock:
            self._faults.setdefault(name, []).append(Fault(nth, status, later))

    def live_nbytes(self, device: int = 0) -> int:
        with self._lock:
            return sum(block.nbytes for block in list(self._memory.values()) if block.device == device)

    def live_pinned_nbytes(self) -> int:
        with self._lock:
            return sum(block.nbytes for block in [*self._pinned.values(), *self._registered.values()])

    def leaks(self) -> dict[str, int]:
        """What is alive, by kind; empty when everything was given back."""
        alive = {
            "device bytes": sum(self.live_nbytes(device) for device in range(self.device_count)),
            "pinned bytes": sum(block.nbytes for block in list(self._pinned.values())),
            "registered ranges": len(self._registered),
            "opened handles": sum(opening.count for opening in list(self._opened.values())),
            "frees of opened memory": self.frees_of_opened_memory,
            "streams": len(self._streams),
            "events": len(self._events),
        }
        return {kind: count for kind, count in alive.items() if count}

    def thread_has_context(self) -> bool:
        return getattr(self._thread, "used", False)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        device = self._current()
        self.calls.append(Call(name, args, device, threading.current_thread().name))
        if name not in _NO_CONTEXT:
            self._thread.used = True
            if name != "setDevice":
                self.contexts.add(device)
        self._fault_later = None
        faults = self._faults.get(name, [])
        for fault in faults:
            fault.calls_left -= 1
        for fault in [fault for fault in faults if fault.calls_left == 0]:
            faults.remove(fault)
            if not fault.later:
                raise FakeCudaError(fault.status)
            self._fault_later = fault.status

    def _current(self) -> int:
        return getattr(self._thread, "device", 0)

    def _new_block(self, blocks: dict[int, Block], nbytes: int, device: int) -> int:
        import numpy

        storage = numpy.full(nbytes + _ALIGNMENT, FRESH, numpy.uint8)
        address = -(-storage.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        blocks[address] = Block(address, nbytes, device, storage)
        return address

    def _holds(self, blocks: dict[int, Block], address: int, nbytes: int, device: int | None = None) -> bool:
        return any(
            block.address <= address and address + nbytes <= block.address + block.nbytes and device in (None, block.device)
            for block in list(blocks.values())
        )

    def _on_device(self, address: int, nbytes: int, device: int | None = None) -> bool:
        opened = {address: opening.block for address, opening in list(self._opened.items())}
        return self._holds(self._memory, address, nbytes, device) or self._holds(opened, address, nbytes, device)

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return self._holds(self._pinned, address, nbytes) or self._holds(self._registered, address, nbytes)

    def _shares_page(self, address: int, nbytes: int) -> bool:
        """Whether pinned memory has a page in common with a range."""
        first, last = address // _PAGE, (address + nbytes - 1) // _PAGE
        return any(
            block.address // _PAGE <= last and first <= (block.address + block.nbytes - 1) // _PAGE
            for block in [*self._pinned.values(), *self._registered.values()]
        )

    def _give_back(self, block: Block) -> None:
        self.frees_of_opened_memory += block.mappings > 0
        self._gpus.give(block)
        self._retire(block)

    def _retire(self, block: Block) -> None:
        block.storage.fill(FREED)
        self._freed.append(block)

    def _before_free(self, device: int) -> None:
        lanes = self._lanes(device)
        if device in self._lost:
            for lane in lanes:
                lane.work.clear()
        elif any(lane.work for lane in lanes):
            self.implicit_synchronizations += 1
            self._finish(device)

    def _before_unpin(self) -> None:
        for device in range(self.device_count):
            self._before_free(device)

    def _map(self, block: Block) -> int:
        if block.address in self._opened:
            self._opened[block.address].count += 1
        else:
            block.mappings += 1
            self._opened[block.address] = Opening(block)
        return block.address

    def _unmap(self, opening: Opening) -> None:
        self._before_free(opening.block.device)
        opening.count -= 1
        if not opening.count:
            opening.block.mappings -= 1
            del self._opened[opening.block.address]

    def _new_handle(self) -> int:
        self._handles += 0x10
        return self._handles

    def _stream(self, handle: int) -> FakeStream:
        if handle == 0:
            return self._default_streams[self._current()]
        require(handle in self._streams, INVALID_HANDLE)
        return self._streams[handle]

    def _event(self, handle: int) -> FakeEvent:
        require(handle in self._events, INVALID_HANDLE)
        return self._events[handle]

    def _lanes(self, device: int) -> list[FakeStream]:
        everything = [*self._default_streams, *self._streams.values(), *self._destroyed]
        return [lane for lane in everything if lane.device == device]

    def _enqueue(self, lane: FakeStream, work: Callable[[], object]) -> None:
        self._check_lost(lane.device)
        lane.work.append(work if self._fault_later is None else partial(self._lose, lane.device, self._fault_later))

    def _run(self, lane: FakeStream, until: Callable[[], bool] = lambda: False) -> None:
        self._check_lost(lane.device)
        while lane.work and not until():
            lane.work.popleft()()

    def _reach(self, event: FakeEvent, generation: int, lane: FakeStream | None) -> None:
        if lane is not None and event.reached < generation:
            self._run(lane, lambda: event.reached >= generation)

    def _finish(self, device: int) -> None:
        for lane in self._lanes(device):
            self._run(lane)
        self._destroyed = [lane for lane in self._destroyed if lane.work]

    def _lose(self, device: int, status: int) -> None:
        self._lost[device] = status
        raise FakeCudaError(status)

    def _check_lost(self, device: int) -> None:
        if device in self._lost:
            raise FakeCudaError(self._lost[device])
