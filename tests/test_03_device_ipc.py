"""GPU memory that two processes share and host memory pinned where it lies: who may, who gives back what, and when.

Two processes are two `RecordingRuntime`s side by side; the tests marked `gpu` use two real processes on a real GPU.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from sllm_mini.device import Buffer, CpuDevice, CudaDevice, HostMemory, Pinned, get_device
from sllm_mini.device.cuda_ipc import Exported
from sllm_mini.device.cuda_runtime import CudaError
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.device.fake_machine import FREED
from sllm_mini.errors import DeviceError, OutOfMemoryError

MIB = 1 << 20
PAGE = mmap.PAGESIZE


class Pair:
    """An owner and a client, two processes on the same two GPUs of 10,000 bytes."""

    def __init__(self) -> None:
        self.owner = RecordingRuntime(devices=2, memory_nbytes=10_000)
        self.client = RecordingRuntime(devices=2, beside=self.owner)

    def opens(self) -> int:
        return self.client.names().count("ipcOpenMemHandle")

    def closes(self) -> int:
        return self.client.names().count("ipcCloseMemHandle")

    def leaks(self) -> list[dict[str, int]]:
        return [self.owner.leaks(), self.client.leaks()]


@pytest.fixture
def pair() -> Pair:
    return Pair()


# Opening


def test_an_opened_buffer_is_the_owners_memory(pair: Pair) -> None:
    memory = pair.owner.device().allocate(1000)
    memory.tensor().copy_(torch.arange(1000) % 251)
    handle = memory.export()
    assert handle == memory.export() and len(handle) == 96  # short enough for a message, the same each time
    opened = pair.client.device().open_exported(handle, 1000)
    assert isinstance(opened, Buffer) and opened.nbytes == 1000
    assert torch.equal(opened.tensor(), memory.tensor())
    opened.tensor()[7] = 99
    assert memory.tensor()[7] == 99
    assert pair.client.device().open_exported(handle, 10).tensor().tolist() == [0, 1, 2, 3, 4, 5, 6, 99, 8, 9]
    assert "memcpyAsync" not in pair.owner.names() + pair.client.names()  # a mapping, not a copy
    assert pair.client.live_nbytes() == 0 and pair.client.device().free_nbytes() == 9_000


def test_streams_copy_from_and_to_an_opened_buffer(pair: Pair) -> None:
    memory = pair.owner.device(1).allocate(100)
    memory.tensor().fill_(5)
    device, stream = pair.client.device(1), pair.client.device(1).stream()
    opened, own, host = device.open_exported(memory.export(), 100), device.allocate(100), device.allocate_host(100)
    stream.copy_on_device(own, 0, opened, 0, 100)
    stream.copy_to_host(host, 0, opened, 0, 50)
    stream.fill(opened, 50, 50, 8)
    stream.copy_on_device(pair.client.device(0).allocate(100), 0, opened, 0, 100)
    stream.synchronize()
    assert set(own.tensor().tolist()) == {5} and bytes(host.view[:50]) == bytes([5] * 50)
    assert memory.tensor().tolist() == [5] * 50 + [8] * 50
    with pytest.raises(DeviceError, match="outside the source buffer of 100 bytes"):
        stream.copy_on_device(own, 0, opened, 1, 100)
    with pytest.raises(CudaError, match="could not copy on the device"):  # not opened in that process
        stream.copy_on_device(own, 0, pair.owner.device(1).allocate(100), 0, 100)


def test_the_mapping_goes_once_with_the_last_buffer_and_tensor(pair: Pair) -> None:
    memory = pair.owner.device().allocate(4096)
    handle, device = memory.export(), pair.client.device()
    first, second = device.open_exported(handle, 4096), device.open_exported(handle, 4096)
    assert first.address == second.address and pair.opens() == 1
    view = second.tensor()[1024:2048].view(torch.float32)[3:5]
    first.close()
    first.close()
    with pytest.raises(DeviceError, match="buffer on cuda:0 was closed"):
        first.tensor()
    with pytest.raises(DeviceError, match="buffer on cuda:0 was closed"):
        _ = first.address
    second.close()
    del first, second
    assert pair.closes() == 0 and pair.client.leaks() == {"opened handles": 1}
    view.fill_(1)
    del view
    assert pair.closes() == 1 and pair.client.leaks() == {}
    again = device.open_exported(handle, 4096)
    assert pair.opens() == 2
    del again
    gc.collect()
    assert pair.closes() == 2
    del memory
    assert pair.leaks() == [{}, {}]


def test_a_mapping_that_dies_in_another_thread_is_closed_on_its_gpu(pair: Pair) -> None:
    memory = pair.owner.device(1).allocate(64)
    held = [pair.client.device(1).open_exported(memory.export(), 64).tensor()]
    worker = threading.Thread(target=held.clear, name="reaper")
    worker.start()
    worker.join()
    (call,) = [call for call in pair.client.calls if call.name == "ipcCloseMemHandle"]
    assert call.device == 1 and call.thread == "reaper" and pair.client.contexts == {1}


def test_threads_that_open_and_close_together_share_and_lose_nothing(pair: Pair) -> None:
    memory = pair.owner.device().allocate(64)
    memory.tensor().fill_(3)
    handle, device = memory.export(), pair.client.device()

    def work(_: int) -> int:
        return sum(int(device.open_exported(handle, 64).tensor()[0]) for _ in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [300] * 4
    gc.collect()
    assert pair.opens() == pair.closes() > 0
    del memory
    assert pair.leaks() == [{}, {}]


def test_an_opening_beside_a_mapping_that_is_just_going_has_a_close_of_its_own(pair: Pair) -> None:
    memory = pair.owner.device().allocate(64)
    handle, device = memory.export(), pair.client.device()
    buffer = device.open_exported(handle, 64)
    device.binding.opened.clear()  # as when the last reference is gone and its finalizer has not run yet
    other = device.open_exported(handle, 64)
    assert pair.opens() == 2 and pair.client.leaks() == {"opened handles": 2}
    del buffer
    assert other.tensor().shape == (64,)
    del other
    assert pair.closes() == 2 and pair.client.leaks() == {}


def test_no_bytes_can_be_shared_too(pair: Pair) -> None:
    handle = pair.owner.device().allocate(0).export()
    for device in (pair.client.device(), pair.owner.device()):
        assert device.open_exported(handle, 0).tensor().shape == (0,)
    assert pair.opens() == 0 and pair.leaks() == [{}, {}]


def test_what_is_lent_comes_back_once_even_if_it_has_no_bytes(pair: Pair) -> None:
    for nbytes in (0, 64):
        memory = pair.owner.device().allocate(nbytes)
        returned: list[int] = []
        lent = memory.lend(lambda returned=returned: returned.append(1))  # type: ignore[misc]
        tensor = lent.tensor()
        memory.close()
        lent.close()
        assert returned == []
        del lent, tensor
        assert returned == [1]
    del memory
    assert pair.owner.leaks() == {}


# What cannot be opened


def test_a_process_cannot_open_its_own_memory(pair: Pair) -> None:
    memory = pair.owner.device().allocate(100)
    handle = memory.export()
    with pytest.raises(DeviceError, match=r"memory on cuda:0 is this process's own; use the buffer it came from$"):
        pair.owner.device().open_exported(handle, 100)
    assert "ipcOpenMemHandle" not in pair.owner.names()
    with pytest.raises(pair.owner.CUDARuntimeError, match="invalid device context"):
        pair.owner.ipcOpenMemHandle(Exported.decode(handle).handle)  # what CUDA would have said


def test_stale_and_damaged_handles_are_one_clear_error(pair: Pair) -> None:
    memory = pair.owner.device().allocate(100)
    handle, device = memory.export(), pair.client.device()
    flipped = bytearray(handle)
    flipped[20] ^= 1
    stale = r"cuda:0 could not open memory of another process: .*invalid argument; its owner has freed it or ended, ask for a new one$"
    with pytest.raises(CudaError, match=stale):
        device.open_exported(bytes(flipped), 100)
    for damaged in (b"", handle[:-1], handle + b"x", bytes(96), os.urandom(96), handle[8:72]):
        with pytest.raises(DeviceError, match=rf"^these {len(damaged)} bytes are no exported GPU memory; send the 96"):
            device.open_exported(damaged, 1)
    with pytest.raises(DeviceError, match=r"has 100 bytes and 101 were asked for"):
        device.open_exported(handle, 101)
    with pytest.raises(ValueError, match="-1 bytes"):
        device.open_exported(handle, -1)
    memory.close()
    with pytest.raises(DeviceError, match="was closed"):
        memory.export()
    with pytest.raises(CudaError, match=stale):
        device.open_exported(handle, 100)
    del memory
    assert pair.leaks() == [{}, {}]


def test_memory_of_one_gpu_is_not_opened_on_another(pair: Pair) -> None:
    memory = pair.owner.device(1).allocate(100)
    with pytest.raises(DeviceError, match=r"on the GPU 0000:01:00.0, cuda:0 is 0000:00:00.0; open it there"):
        pair.client.device(0).open_exported(memory.export(), 100)
    assert pair.opens() == 0


@pytest.mark.parametrize("status", [700, 801])
def test_a_failure_that_is_not_the_handles_is_told_as_it_is(pair: Pair, status: int) -> None:
    memory = pair.owner.device().allocate(100)
    pair.client.fail("ipcOpenMemHandle", status=status)
    with pytest.raises(CudaError, match="could not open memory") as caught:
        pair.client.device().open_exported(memory.export(), 100)
    assert "freed" not in str(caught.value) and caught.value.status == status
    pair.owner.fail("ipcGetMemHandle", status=801)
    with pytest.raises(CudaError, match="cuda:0 could not export memory to other processes"):
        memory.export()
    assert pair.client.device().open_exported(memory.export(), 100).nbytes == 100


# What the fake catches


def test_memory_freed_while_another_process_maps_it_is_told(pair: Pair) -> None:
    memory = pair.owner.device().allocate(100)
    memory.tensor().fill_(1)
    opened = pair.client.device().open_exported(memory.export(), 100)
    memory.close()
    assert set(opened.tensor().tolist()) == {FREED}
    assert pair.owner.leaks() == {"frees of opened memory": 1}
    opened.close()
    assert pair.leaks() == [{"frees of opened memory": 1}, {}]


def test_the_fake_refuses_what_cuda_refuses(pair: Pair) -> None:
    owner, client = pair.owner, pair.client
    address = owner.malloc(100)
    handle = owner.ipcGetMemHandle(address)
    for step in (
        lambda: owner.ipcGetMemHandle(address + 1),  # not a base address
        lambda: client.ipcGetMemHandle(address),  # another process's
        lambda: client.ipcCloseMemHandle(address),  # not opened
        lambda: client.memsetAsync(address, 0, 1, 0),
        lambda: client.free(address),
    ):
        with pytest.raises(owner.CUDARuntimeError):
            step()
    client.ipcOpenMemHandle(handle)
    client.memsetAsync(address, 0, 1, 0)
    with pytest.raises(owner.CUDARuntimeError):
        client.free(address)
    client.ipcCloseMemHandle(address)
    with pytest.raises(owner.CUDARuntimeError):  # a second close of one opening
        client.ipcCloseMemHandle(address)
    owner.free(address)


def test_processes_share_the_memory_of_their_gpus(pair: Pair) -> None:
    kept = pair.owner.device().allocate(6_000)
    with pytest.raises(OutOfMemoryError, match=r"cuda:0 has 4,000 of 10,000 bytes free and 4,001 were asked for"):
        pair.client.device().allocate(4_001)
    assert pair.client.device(1).allocate(10_000).nbytes == 10_000
    kept.close()
    assert pair.client.device().allocate(10_000).nbytes == 10_000


# Pinning memory where it lies


@pytest.fixture
def runtime() -> RecordingRuntime:
    return RecordingRuntime(devices=2, pinned_nbytes=4 * PAGE)


def test_pinned_host_memory_is_copied_beside_the_processor(runtime: RecordingRuntime) -> None:
    device, stream, host = runtime.device(1), runtime.device(1).stream(), HostMemory(2 * PAGE)
    buffer = device.allocate(2 * PAGE)
    pinned = device.pin(host.address, 2 * PAGE)
    assert isinstance(pinned, Pinned) and pinned.pinned
    assert (pinned.address, pinned.nbytes) == (host.address, 2 * PAGE)
    host.view[:4] = b"abcd"
    stream.copy_from_host(buffer, 0, host, 0, 2 * PAGE)
    assert runtime.pageable_copies == 0
    pinned.close()
    assert bytes(buffer.tensor()[:4].tolist()) == b"abcd" and runtime.implicit_synchronizations == 1
    stream.copy_from_host(buffer, 0, host, 0, 2 * PAGE)
    assert runtime.pageable_copies == 1 and not pinned.pinned
    assert bytes(host.view[:4]) == b"abcd"  # it stays its owner's


def test_pinned_host_memory_is_unpinned_exactly_once(runtime: RecordingRuntime) -> None:
    host = HostMemory(2 * PAGE)
    first, second = runtime.device().pin(host.address, PAGE), runtime.device(1).pin(host.address + PAGE, PAGE)
    assert runtime.leaks() == {"registered ranges": 2} and runtime.peak_pinned_nbytes == 2 * PAGE
    first.close()
    first.close()
    assert runtime.names().count("hostUnregister") == 1
    del first, second  # dropped without close
    assert runtime.names().count("hostUnregister") == 2 and runtime.leaks() == {}
    assert [call.device for call in runtime.calls if call.name == "hostUnregister"] == [0, 1]


def test_what_cannot_be_pinned_is_said(runtime: RecordingRuntime) -> None:
    device, host = runtime.device(), HostMemory(8 * PAGE)
    with closing(device.pin(host.address, PAGE + 1)):
        for offset, nbytes in ((0, PAGE), (PAGE + 8, 8), (0, 4 * PAGE)):
            with pytest.raises(DeviceError, match=rf"some of the {nbytes:,} bytes at 0x[0-9a-f]+ are pinned already"):
                device.pin(host.address + offset, nbytes)
        with pytest.raises(OutOfMemoryError, match=r"could not pin 16,384 bytes, [\d,]+ are free; .* limit on locked"):
            device.pin(host.address + 2 * PAGE, 4 * PAGE)
    assert runtime.leaks() == {}
    with pytest.raises(CudaError, match="cuda:0 could not pin 10 bytes of host memory: cudaErrorInvalidValue"):
        device.pin(0, 10)
    with pytest.raises(ValueError, match="-5 bytes"):
        device.pin(host.address, -5)
    device.pin(host.address, 0).close()
    assert runtime.leaks() == {} and "hostUnregister" in runtime.names()


def test_the_cpu_pins_nothing() -> None:
    host = HostMemory(PAGE)
    pinned = CpuDevice().pin(host.address, PAGE)
    assert isinstance(pinned, Pinned) and not pinned.pinned
    assert (pinned.address, pinned.nbytes) == (host.address, PAGE)
    pinned.close()
    pinned.close()
    with pytest.raises(ValueError, match="-5 bytes"):
        CpuDevice().pin(host.address, -5)


# On a GPU


def gpu() -> CudaDevice:
    device = get_device("cuda:0")
    assert isinstance(device, CudaDevice)
    return device


CLIENT = """
import sys
import torch
from sllm_mini.device import get_device
from sllm_mini.errors import DeviceError

device = get_device("cuda:0")
for line in sys.stdin:
    handle, nbytes, what = line.split()
    try:
        buffer = device.open_exported(bytes.fromhex(handle), int(nbytes))
        twice = device.open_exported(bytes.fromhex(handle), int(nbytes))
    except DeviceError as error:
        print("DeviceError:", error, flush=True)
        continue
    assert twice.address == buffer.address
    tensor = buffer.tensor()
    found = [tensor.sum(dtype=torch.int64).item(), tensor[0].item(), tensor[-1].item()]
    tensor[0] = 77
    torch.cuda.synchronize()
    buffer.close()
    twice.close()
    if what == "close":
        del tensor, buffer, twice
    print(*found, flush=True)
"""


class Client:
    """Another process, which opens what it is told of, says what it finds there and writes 77 to its first byte."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CLIENT]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, handle: bytes, nbytes: int, what: str = "close") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{handle.hex()} {nbytes} {what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.gpu
def test_gpu_memory_is_opened_by_another_process() -> None:
    device = gpu()
    with closing(Client()) as client:
        # The small ones share a block of 2 MiB in the driver: a handle must lead to the buffer, not to the block.
        buffers = [device.allocate(nbytes) for nbytes in (1000, 2000, 64 * MIB, 2 * MIB + 5)]
        for byte, buffer in enumerate(buffers, 1):
            buffer.tensor().fill_(byte)
        torch.cuda.synchronize()
        for byte, buffer in enumerate(buffers, 1):
            assert client.ask(buffer.export(), buffer.nbytes) == f"{byte * buffer.nbytes} {byte} {byte}"
            assert buffer.tensor()[:2].tolist() == [77, byte]
            assert client.ask(buffer.export(), 2) == f"{77 + byte} 77 {byte}"  # opened anew after its close
        stale = buffers[2].export()
        before = device.free_nbytes()
        buffer.close()
        buffers.clear()
        gc.collect()
        assert device.free_nbytes() - before >= 60 * MIB  # no client holds it
        assert client.ask(stale, 10).startswith("DeviceError: cuda:0 could not open memory of another process")
        for garbage in (bytes(64), bytes(range(64))):
            damaged = Exported(garbage, 10, Exported.decode(stale).gpu).encode()
            assert client.ask(damaged, 10).startswith("DeviceError: cuda:0 could not open memory of another process")
        again = device.allocate(64 * MIB)
        again.tensor().fill_(9)
        torch.cuda.synchronize()
        assert client.ask(again.export(), 10) == "90 9 9"  # it goes on after all these errors


@pytest.mark.gpu
def test_gpu_memory_outlives_a_client_that_is_killed_with_it_open() -> None:
    device = gpu()
    memory = device.allocate(256 * MIB)
    memory.tensor().fill_(2)
    torch.cuda.synchronize()
    with closing(Client()) as client:
        assert client.ask(memory.export(), 100, "keep") == "200 2 2"
    assert memory.tensor()[:2].tolist() == [77, 2]
    with closing(Client()) as client:
        assert client.ask(memory.export(), 100) == "275 77 2"
    before = device.free_nbytes()
    memory.close()
    gc.collect()
    assert device.free_nbytes() - before >= 250 * MIB


@pytest.mark.gpu
def test_gpu_memory_of_its_own_is_not_opened() -> None:
    device = gpu()
    memory = device.allocate(4 * MIB)
    handle = memory.export()
    with pytest.raises(DeviceError, match="this process's own"):
        device.open_exported(handle, 4 * MIB)
    device.binding.exported.clear()  # CUDA itself, asked for it, refuses too, and the process goes on
    with pytest.raises(CudaError, match="could not open memory of another process"):
        device.open_exported(handle, 4 * MIB)
    memory.tensor().fill_(1)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_copies_from_host_memory_pinned_where_it_lies() -> None:
    device, stream = gpu(), gpu().stream()
    fd = os.memfd_create("chunk")
    os.ftruncate(fd, 8 * MIB)
    with mmap.mmap(fd, 8 * MIB) as mapping:  # shared memory, as a store keeps it
        os.close(fd)
        mapping[:4] = b"abcd"
        anchor = ctypes.c_char.from_buffer(mapping)
        host, buffer = torch.frombuffer(mapping, dtype=torch.uint8), device.allocate(8 * MIB)
        pinned = device.pin(ctypes.addressof(anchor), 8 * MIB)
        assert host.is_pinned() and pinned.pinned
        with pytest.raises(DeviceError, match="are pinned already"):
            device.pin(pinned.address, 4 * MIB)
        with device.binding.active("copy from memory that has no buffer") as runtime:
            runtime.memcpyAsync(buffer.address, pinned.address, 8 * MIB, runtime.memcpyHostToDevice, stream.handle)
        stream.synchronize()
        assert bytes(buffer.tensor()[:4].tolist()) == b"abcd"
        pinned.close()
        pinned.close()
        assert not host.is_pinned()
        device.pin(ctypes.addressof(anchor), 8 * MIB).close()
        del host, anchor
    stream.close()
