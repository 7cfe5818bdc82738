"""GPU memory, streams and events: who owns what, in which order things happen, what errors say, which GPU is called.

All of it runs against `RecordingRuntime`, which does a stream's work only when somebody waits for it; the tests marked
`gpu` say the same of a real GPU.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sllm_mini.device import Buffer, CpuDevice, CudaDevice, HostBuffer, HostMemory, get_device
from sllm_mini.device.cuda import CupyToolkit
from sllm_mini.device.cuda_memory import DeviceMemory, PinnedMemory
from sllm_mini.device.cuda_runtime import CudaError
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.device.fake_machine import FREED, FRESH
from sllm_mini.errors import DeviceError, OutOfMemoryError

MIB = 1 << 20

# Memory: one owner, freed once


@pytest.fixture
def runtime() -> RecordingRuntime:
    return RecordingRuntime(devices=2)


def frees(runtime: RecordingRuntime) -> int:
    return runtime.names().count("free")


def test_device_memory_is_uninitialised_shared_and_aligned(runtime: RecordingRuntime):
    buffer = runtime.device().allocate(1000)
    assert isinstance(buffer, Buffer) and not isinstance(buffer, HostBuffer)
    first, second = buffer.tensor(), buffer.tensor()
    assert first.dtype == torch.uint8 and first.shape == (1000,) and first.data_ptr() == buffer.address
    assert first.tolist() == [FRESH] * 1000
    first[3] = 1
    assert second[3] == 1 and buffer.address % 256 == 0


def test_device_memory_is_freed_when_buffer_and_all_tensors_are_gone(runtime: RecordingRuntime):
    buffer = runtime.device().allocate(4096)
    tensor, other = buffer.tensor(), buffer.tensor()
    view = tensor[1024:2048].view(torch.float32)[3:5]
    del tensor
    assert frees(runtime) == 0
    buffer.close()
    buffer.close()
    assert frees(runtime) == 0
    with pytest.raises(DeviceError, match="closed"):
        buffer.tensor()
    with pytest.raises(DeviceError, match="closed"):
        _ = buffer.address
    del other
    assert frees(runtime) == 0
    deeper = view[:1].view(torch.uint8)[1:]
    del view
    assert frees(runtime) == 0 and deeper.tolist() == [FRESH] * 3
    del deeper
    assert frees(runtime) == 1 and runtime.leaks() == {}
    del buffer
    assert frees(runtime) == 1


def test_device_memory_is_freed_when_dropped_without_close(runtime: RecordingRuntime):
    buffer = runtime.device().allocate(4096)
    del buffer
    assert frees(runtime) == 1
    tensor = runtime.device().allocate(4096).tensor()
    assert frees(runtime) == 1
    cycle: list[Any] = [tensor]
    cycle.append(cycle)
    del cycle, tensor
    gc.collect()
    assert frees(runtime) == 2 and runtime.leaks() == {}


def test_a_tensor_that_dies_on_another_thread_frees_on_its_own_gpu(runtime: RecordingRuntime):
    held = [runtime.device(index).allocate(64).tensor() for index in (1, 0, 1)]
    addresses = [tensor.data_ptr() for tensor in held]
    worker = threading.Thread(target=held.clear, name="reaper")
    worker.start()
    worker.join()
    done = {call.args[0]: call for call in runtime.calls if call.name == "free"}
    assert [done[address].device for address in addresses] == [1, 0, 1]
    assert {call.thread for call in done.values()} == {"reaper"}
    assert runtime.leaks() == {}


def test_buffers_garbage_collected_amid_other_calls(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            ring: list[Any] = [runtime.device(1).allocate(128)]
            ring.append(ring)

    worker = threading.Thread(target=churn)
    gc.collect()
    gc.freeze()  # else each collection looks through all that the tests before have left
    worker.start()
    try:
        host, buffer = device.allocate_host(1000), device.allocate(1000)
        for step in range(300):
            host.view[:4] = step.to_bytes(4, "little")
            stream.copy_from_host(buffer, 0, host, 0, 1000)
            stream.record().wait()
            assert int(buffer.tensor()[0]) == step % 256
    finally:
        stop.set()
        worker.join()
        gc.unfreeze()
    gc.collect()
    assert runtime.live_nbytes(1) == 0


def test_buffers_of_no_bytes(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    empty, pinned = device.allocate(0), device.allocate_host(0)
    assert empty.tensor().shape == pinned.tensor().shape == (0,)
    assert len(pinned.view) == 0
    stream.copy_from_host(empty, 0, pinned, 0, 0)
    stream.fill(empty, 0, 0)
    assert not {"malloc", "hostAlloc", "memcpyAsync", "memsetAsync"} & set(runtime.names())


def test_pinned_memory_is_freed_when_no_view_lives(runtime: RecordingRuntime):
    buffer = runtime.device(1).allocate_host(100)
    assert isinstance(buffer, HostBuffer) and buffer.pinned
    assert not buffer.view.readonly and buffer.view.format == "B" and len(buffer.view) == 100
    buffer.view[2:4] = b"ab"
    assert ctypes.string_at(buffer.address + 2, 2) == b"ab"
    part, tensor, array = buffer.view[2:4], buffer.tensor(), numpy.frombuffer(buffer.view, numpy.uint8)
    assert tensor.data_ptr() == array.ctypes.data == buffer.address
    buffer.close()
    for use in (lambda: buffer.view, lambda: buffer.address, buffer.tensor):
        with pytest.raises(DeviceError, match="closed"):
            use()
    assert runtime.live_pinned_nbytes() == 100
    del tensor
    assert runtime.live_pinned_nbytes() == 100
    del array
    assert runtime.live_pinned_nbytes() == 100 and bytes(part) == b"ab"
    del part
    assert runtime.leaks() == {} and runtime.names().count("freeHost") == 1


def test_running_out_of_memory_names_what_was_asked_and_what_is_free():
    runtime = RecordingRuntime(memory_nbytes=10_000, pinned_nbytes=5_000)
    device = runtime.device()
    kept = device.allocate(6_000)
    assert device.free_nbytes() == 4_000
    with pytest.raises(OutOfMemoryError, match=r"cuda:0 has 4,000 of 10,000 bytes free and 4,001 were asked for"):
        device.allocate(4_001)
    with pytest.raises(OutOfMemoryError, match=r"could not pin 5,001 bytes, [\d,]+ are free"):
        device.allocate_host(5_001)
    kept.close()
    assert device.allocate(10_000).nbytes == 10_000
    assert runtime.leaks() == {}
    for allocate in (device.allocate, device.allocate_host):
        with pytest.raises(ValueError, match="-5 bytes"):
            allocate(-5)


# Streams and events


def filled(device: CudaDevice, byte: int, nbytes: int = 100) -> tuple[PinnedMemory, DeviceMemory]:
    host, buffer = device.allocate_host(nbytes), device.allocate(nbytes)
    host.view[:] = bytes([byte]) * nbytes
    return host, buffer


def test_a_copy_happens_after_it_was_enqueued_and_before_its_event(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 7)
    stream.copy_from_host(buffer, 10, host, 0, 50)
    event = stream.record()
    assert set(buffer.tensor().tolist()) == {FRESH}
    event.wait()
    assert buffer.tensor().tolist() == [FRESH] * 10 + [7] * 50 + [FRESH] * 40
    assert event.done()
    host.view[:] = bytes(100)
    stream.copy_to_host(host, 90, buffer, 5, 10)
    assert bytes(host.view) == bytes(100)
    stream.synchronize()
    assert bytes(host.view[90:]) == bytes([FRESH] * 5 + [7] * 5)


def test_every_copy_is_checked_before_it_is_enqueued(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 1)
    for ends in ((101, 0, 0), (0, 101, 0), (0, 0, 101), (-1, 0, 1), (0, -1, 1), (1, 1, -1), (0, 1 << 63, 1)):
        for copy in (
            lambda a, b, n: stream.copy_from_host(buffer, a, host, b, n),
            lambda a, b, n: stream.copy_to_host(host, a, buffer, b, n),
            lambda a, b, n: stream.copy_on_device(buffer, a, buffer, b, n),
        ):
            with pytest.raises(DeviceError, match=r"outside the .+ buffer of 100 bytes"):
                copy(*ends)
    with pytest.raises(DeviceError, match="outside the destination buffer"):
        stream.fill(buffer, 1, 100)
    for closed in (buffer, host):
        closed.close()
        with pytest.raises(DeviceError, match="closed"):
            stream.copy_from_host(buffer, 0, host, 0, 1)
    assert not {"memcpyAsync", "memsetAsync"} & set(runtime.names())


def test_refilling_a_pinned_buffer_before_its_event_corrupts_the_copy(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 1)
    stream.copy_from_host(buffer, 0, host, 0, 50)
    host.view[:] = bytes([2]) * 100  # the mistake
    stream.copy_from_host(buffer, 50, host, 50, 50)
    stream.synchronize()
    assert buffer.tensor().tolist() == [2] * 100


def test_memory_that_is_not_pinned_is_copied_before_the_call_returns(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    pageable, (_, buffer) = HostMemory(100), filled(device, 0)
    pageable.view[:] = bytes(range(100))
    stream.copy_from_host(buffer, 0, pageable, 0, 100)
    pageable.view[:] = bytes(100)
    assert buffer.tensor().tolist() == list(range(100))
    stream.copy_to_host(pageable, 0, buffer, 50, 50)
    assert bytes(pageable.view[:50]) == bytes(range(50, 100))
    assert runtime.pageable_copies == 2


def test_an_event_is_not_done_until_it_is(runtime: RecordingRuntime):
    runtime = RecordingRuntime(queries_before_done=2)
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 9)
    stream.copy_from_host(buffer, 0, host, 0, 100)
    event = stream.record()
    assert [event.done() for _ in range(3)] == [False, False, True]
    assert set(buffer.tensor().tolist()) == {9}


def test_streams_run_apart_unless_one_waits_for_the_other(runtime: RecordingRuntime):
    device = runtime.device()
    first, second = device.stream(), device.stream()
    host, buffer = filled(device, 5)
    copy = device.allocate(100)
    first.copy_from_host(buffer, 0, host, 0, 100)
    second.copy_on_device(copy, 0, buffer, 0, 100)
    second.synchronize()
    assert set(copy.tensor().tolist()) == {FRESH}  # nobody said that it had to wait
    second.wait_for(first.record())
    second.copy_on_device(copy, 0, buffer, 0, 100)
    second.synchronize()
    assert set(copy.tensor().tolist()) == {5}
    second.wait_for(CpuDevice().stream().record())


def test_work_is_ordered_against_torch(runtime: RecordingRuntime):
    device, stream = runtime.device(1), runtime.device(1).stream()
    host, buffer = filled(device, 5)
    copy = device.allocate(100)
    stream.copy_from_host(buffer, 0, host, 0, 100)
    stream.make_torch_wait()
    with device.binding.active("act as torch, which works on stream 0 now") as raw:
        raw.memcpyAsync(copy.address, buffer.address, 100, raw.memcpyDeviceToDevice, 0)
        raw.streamSynchronize(0)
        assert set(copy.tensor().tolist()) == {5}
        raw.memsetAsync(copy.address, 6, 100, 0)
    stream.wait_for_torch()
    stream.copy_to_host(host, 0, copy, 0, 100)
    stream.synchronize()
    assert bytes(host.view) == bytes([6] * 100)


def test_torch_can_work_on_our_stream(runtime: RecordingRuntime):
    device, stream = runtime.device(1), runtime.device(1).stream()
    with stream.as_torch_stream():
        assert device.toolkit.torch_stream_handle(1) == stream.handle
        assert device.toolkit.torch_stream_handle(0) == 0
    assert device.toolkit.torch_stream_handle(1) == 0


def test_copies_between_gpus(runtime: RecordingRuntime):
    first, second = runtime.device(0), runtime.device(1)
    host, here = filled(first, 3)
    there, stream = second.allocate(100), second.stream()
    stream.copy_from_host(here, 0, host, 0, 100)
    stream.copy_on_device(there, 0, here, 0, 100)
    stream.copy_on_device(there, 0, there, 50, 10)
    stream.synchronize()
    assert set(there.tensor().tolist()) == {3}
    assert [name for name in runtime.names() if name.startswith("memcpy")] == ["memcpyAsync", "memcpyPeerAsync", "memcpyAsync"]
    with pytest.raises(DeviceError, match="two buffers on GPUs"):
        stream.copy_on_device(there, 0, host, 0, 10)


def test_every_call_goes_to_its_gpu_and_leaves_the_thread_as_it_was(runtime: RecordingRuntime):
    runtime.setDevice(0)
    device = runtime.device(1)
    host, buffer = filled(device, 1)
    stream = device.stream()
    stream.copy_from_host(buffer, 0, host, 0, 100)
    event = stream.record()
    stream.wait_for(event)
    event.wait()
    device.synchronize()
    device.free_nbytes()
    stream.close()
    del event, host, buffer
    calls = [call for call in runtime.calls if call.name not in ("getDevice", "setDevice")]
    assert len(calls) > 10 and {call.device for call in calls} == {1}
    assert runtime.getDevice() == 0


def test_a_fresh_thread_makes_no_context_on_gpu_0(runtime: RecordingRuntime):
    def work() -> None:
        device = runtime.device(1)
        host, buffer = filled(device, 1)
        stream = device.stream()
        stream.copy_from_host(buffer, 0, host, 0, 100)
        stream.close()

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert runtime.contexts == {1}


def test_streams_and_events_are_given_back(runtime: RecordingRuntime):
    device = runtime.device()
    stream, dropped = device.stream(), device.stream()
    event = stream.record()
    host, buffer = filled(device, 4)
    stream.copy_from_host(buffer, 0, host, 0, 100)
    stream.close()
    assert set(buffer.tensor().tolist()) == {4}  # close waits
    stream.close()
    del dropped
    for use in (stream.record, stream.synchronize, lambda: stream.copy_from_host(buffer, 0, host, 0, 1)):
        with pytest.raises(DeviceError, match="stream on cuda:0 was closed"):
            use()
    assert event.done()
    buffer.close()
    host.close()
    del event
    assert runtime.leaks() == {} and runtime.names().count("streamDestroy") == 2


def test_dropping_memory_that_is_in_use_waits_for_the_work(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 6)
    tensor = buffer.tensor()
    stream.copy_from_host(buffer, 0, host, 0, 100)
    host.close()
    del host
    assert set(tensor.tolist()) == {6} and runtime.implicit_synchronizations == 1


# Errors


def test_errors_say_what_failed_and_leave_nothing_behind(runtime: RecordingRuntime):
    device = runtime.device()
    for name, step in {
        "streamCreateWithFlags": lambda: device.stream(),
        "eventRecord": lambda: device.stream().record(),
        "memGetInfo": lambda: device.free_nbytes(),
        "getDeviceProperties": lambda: device.properties(),
        "malloc": lambda: device.allocate(10),
        "hostAlloc": lambda: device.allocate_host(10),
        "deviceSynchronize": lambda: device.synchronize(),
    }.items():
        runtime.fail(name, status=1)
        with pytest.raises(CudaError, match=r"cuda:0 could not .+: cudaErrorInvalidValue: invalid argument$") as caught:
            step()
        assert caught.value.status == 1
        del caught
        assert runtime.leaks() == {}


def test_the_nth_call_fails_and_others_do_not(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 1)
    runtime.fail("memcpyAsync", nth=3, status=1)
    for step in range(5):
        if step == 2:
            with pytest.raises(CudaError, match="could not copy from the host"):
                stream.copy_from_host(buffer, step, host, 0, 1)
        else:
            stream.copy_from_host(buffer, step, host, 0, 1)
    stream.synchronize()
    assert buffer.tensor()[:6].tolist() == [1, 1, FRESH, 1, 1, FRESH]


def test_work_that_fails_is_told_by_whoever_waits_for_it(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 1)
    runtime.fail("memcpyAsync", later=True)
    stream.copy_from_host(buffer, 0, host, 0, 100)
    with pytest.raises(CudaError, match="could not finish the work before an event: cudaErrorIllegalAddress"):
        stream.record().wait()
    for use in (stream.synchronize, lambda: device.allocate(1), stream.record, stream.close):
        with pytest.raises(CudaError, match=r"illegal memory access.*restart this process"):
            use()
    del host, buffer
    assert runtime.leaks() == {}


def test_a_failed_query_is_an_error_and_not_a_late_event(runtime: RecordingRuntime):
    device, stream = runtime.device(), runtime.device().stream()
    host, buffer = filled(device, 1)
    runtime.fail("memcpyAsync", later=True)
    stream.copy_from_host(buffer, 0, host, 0, 100)
    event = stream.record()
    with pytest.raises(CudaError) as caught:
        event.done()
    assert caught.value.status == 700


def test_properties_are_read_as_cuda_gives_them(runtime: RecordingRuntime):
    found = runtime.device(1).properties()
    assert found.model == "Recording GPU" and found.compute_capability == (9, 0)
    assert found.total_nbytes == 1 << 30 and found.pci_bus == "0000:01:00"
    assert found.memory_bytes_per_second == 2 * 1e9 * 128
    assert repr(runtime.device(1)) == "CudaDevice('cuda:1')"


# The fake itself: what it must refuse for a test against it to mean anything


def test_the_fake_refuses_what_cuda_would(runtime: RecordingRuntime):
    stream, address = runtime.streamCreateWithFlags(1), runtime.malloc(100)
    pinned, event = runtime.hostAlloc(100, 1), runtime.eventCreateWithFlags(2)
    to_device, to_host = runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost
    runtime.setDevice(1)
    for step in (
        lambda: runtime.memcpyAsync(address, pinned, 101, to_device, stream),  # beyond the allocation
        lambda: runtime.memcpyAsync(address, pinned, 10, to_host, stream),  # the wrong way round
        lambda: runtime.memcpyAsync(address, pinned, 10, 9, stream),
        lambda: runtime.memcpyAsync(address, pinned, 10, to_device, 999),
        lambda: runtime.memsetAsync(address + 1, 0, 100, stream),
        lambda: runtime.memcpyPeerAsync(address, 1, address, 0, 10, stream),  # it is on GPU 0
        lambda: runtime.launch(lambda *args: None, (1,), (1,), (), stream),  # not the current GPU
        lambda: runtime.eventRecord(event, runtime.streamCreateWithFlags(1)),  # two GPUs
        lambda: runtime.free(address + 1),
        lambda: runtime.freeHost(address),
        lambda: runtime.setDevice(2),
        lambda: runtime.streamDestroy(0),
        lambda: runtime.eventQuery(7),
    ):
        with pytest.raises(runtime.CUDARuntimeError):
            step()
    stale = numpy.ctypeslib.as_array((ctypes.c_ubyte * 100).from_address(address))
    runtime.free(address)
    assert set(stale.tolist()) == {FREED}
    with pytest.raises(runtime.CUDARuntimeError):
        runtime.free(address)


def test_the_fake_has_the_calls_of_cupy():
    pytest.importorskip("cupy", reason="cupy is not installed; the fake is compared with it")
    from cupy.cuda import runtime as real

    from sllm_mini.device.cuda_runtime import CudaRuntime

    used = [name for name in {**vars(CudaRuntime), **CudaRuntime.__annotations__} if not name.startswith("_")]
    assert len(used) > 25
    for name in used:
        assert hasattr(real, name) and hasattr(RecordingRuntime, name), name
        if isinstance(getattr(real, name), int):
            assert getattr(real, name) == getattr(RecordingRuntime, name), name


# The toolkit made of cupy, as far as it goes without a driver


@pytest.fixture
def toolkit() -> CupyToolkit:
    pytest.importorskip("cupy", reason="cupy is not installed; the toolkit is made of it")
    return CupyToolkit()


def test_cupy_arrays_over_our_memory_keep_its_owner(toolkit: CupyToolkit):
    class Owner:
        pass

    owner = Owner()
    gone = weakref.ref(owner)
    array = toolkit.array(1 << 40, 4096, 1, owner)  # never touched, only described
    assert array.data.ptr == 1 << 40 and array.nbytes == 4096 and array.data.device_id == 1
    view = array[10:20]
    del owner, array
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_a_kernel_that_cannot_be_compiled_is_a_device_error(toolkit: CupyToolkit, tmp_path: Path):
    source = tmp_path / "wrong.cu"
    source.write_text("wrong")
    with pytest.raises(DeviceError, match=r"wrong.cu could not be compiled for sm_90 \(wrong.cu\(1\): error.+\); correct it"):
        toolkit.compiler.compile(source, (), "sm_90")


def test_kernels_are_launched_on_our_streams(toolkit: CupyToolkit, monkeypatch: pytest.MonkeyPatch):
    launches: list[tuple[Any, ...]] = []
    made: list[bytes] = []

    class Module:
        def load(self, image: bytes) -> None:
            made.append(image)

        def get_function(self, name: str) -> Any:
            return lambda grid, block, args, stream: launches.append((name, grid, block, args, stream.ptr)) or refuse()

    def refuse() -> None:
        if len(launches) == 2:
            kind = toolkit._cupy.cuda.driver.CUDADriverError
            error = kind.__new__(kind)  # its own text would have to come from the driver
            error.status = 719
            raise error

    monkeypatch.setattr(toolkit._cupy.cuda.function, "Module", Module)
    launch = toolkit.load(b"image", 0)("sum64")
    assert made == [b"image"]
    launch([4], [256], [1 << 40, 2, 3], 77)
    assert launches == [("sum64", (4,), (256,), (1 << 40, 2, 3), 77)]
    with pytest.raises(toolkit.runtime.CUDARuntimeError) as caught:
        launch([4], [256], [1 << 40, 2, 3], 77)
    assert caught.value.status == 719


# On a GPU


def gpu(index: int = 0) -> CudaDevice:
    device = get_device(f"cuda:{index}")
    assert isinstance(device, CudaDevice)
    return device


@pytest.mark.gpu
def test_gpu_copies_there_and_back():
    device, stream = gpu(), gpu().stream()
    source, target, buffer = device.allocate_host(10_000), device.allocate_host(10_000), device.allocate(10_000)
    source.view[:] = bytes(range(250)) * 40
    stream.copy_from_host(buffer, 100, source, 0, 9_900)
    stream.copy_on_device(buffer, 0, buffer, 5_000, 100)
    stream.copy_to_host(target, 0, buffer, 0, 10_000)
    event = stream.record()
    event.wait()
    assert event.done()
    expected = (bytes(range(250)) * 40)[4_900:5_000] + (bytes(range(250)) * 40)[:9_900]
    assert bytes(target.view) == expected
    assert source.tensor().is_pinned()
    stream.close()


@pytest.mark.gpu
def test_gpu_memory_is_shared_with_torch_and_returned():
    device, stream = gpu(), gpu().stream()
    nbytes = 256 * MIB
    torch.cuda.synchronize()
    before = device.free_nbytes()
    buffer = device.allocate(nbytes)
    tensor = buffer.tensor()
    assert tensor.device == torch.device("cuda", 0) and tensor.data_ptr() == buffer.address
    assert before - device.free_nbytes() >= 0.9 * nbytes
    tensor.fill_(3)
    host = device.allocate_host(16)
    stream.wait_for_torch()
    stream.copy_to_host(host, 0, buffer, nbytes - 16, 16)
    stream.synchronize()
    assert bytes(host.view) == bytes([3] * 16)
    host.view[:] = bytes(range(16))
    stream.copy_from_host(buffer, 0, host, 0, 16)
    stream.make_torch_wait()
    assert tensor[:16].tolist() == list(range(16))
    with stream.as_torch_stream():
        tensor[:16] += 1
    stream.synchronize()
    view = tensor[:16].view(torch.int32)[1:]
    buffer.close()
    del tensor, buffer
    gc.collect()
    assert before - device.free_nbytes() >= 0.9 * nbytes
    assert view.view(torch.uint8).tolist() == list(range(5, 17))
    del view
    gc.collect()
    assert before - device.free_nbytes() < 0.1 * nbytes
    stream.close()


@pytest.mark.gpu
def test_gpu_has_a_name_and_limits():
    device = gpu()
    found = device.properties()
    assert found.model == torch.cuda.get_device_name(0)
    assert found.compute_capability == torch.cuda.get_device_capability(0)
    assert 0 < device.free_nbytes() <= found.total_nbytes
    with pytest.raises(OutOfMemoryError, match="were asked for"):
        device.allocate(found.total_nbytes * 2)
    device.synchronize()
    with pytest.raises(DeviceError, match="is not there"):
        get_device(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.gpu
def test_gpu_work_in_a_fresh_thread():
    results: list[bytes] = []

    def work() -> None:
        device, stream = gpu(), gpu().stream()
        host, buffer = device.allocate_host(100), device.allocate(100)
        host.view[:] = bytes(range(100))
        stream.copy_from_host(buffer, 0, host, 0, 100)
        stream.synchronize()
        results.append(bytes(buffer.tensor().cpu().tolist()))
        stream.close()

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert results == [bytes(range(100))]


@pytest.mark.gpu
def test_gpu_second_device_is_its_own():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU; the test is about two")
    torch.zeros(1, device="cuda:0")  # this thread works on GPU 0, and shall go on to
    device, stream = gpu(1), gpu(1).stream()
    here, there = gpu(0).allocate(100), device.allocate(100)
    stream.fill(there, 0, 100, 8)
    stream.copy_on_device(here, 0, there, 0, 100)
    stream.synchronize()
    assert torch.cuda.current_device() == 0
    assert here.tensor().tolist() == there.tensor().tolist() == [8] * 100
    assert there.tensor().device == torch.device("cuda", 1)
    stream.close()
