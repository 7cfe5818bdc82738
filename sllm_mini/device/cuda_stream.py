"""CUDA streams and events: copies that run beside the processor, and points in their order.

Streams are non-blocking ones: they never wait for CUDA's default stream, on which torch works unless told otherwise,
so the order between torch's work and ours is said explicitly (`wait_for_torch`, `make_torch_wait`). An enqueued copy
costs some microseconds of the processor whatever its size. Taught in chapters 02 and 04.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

from sllm_mini.device.base import Buffer, Event, HostBuffer, check_range
from sllm_mini.device.cuda_memory import CudaBuffer
from sllm_mini.device.cuda_runtime import NOT_READY, SUCCESS, Binding
from sllm_mini.errors import DeviceError


def _destroy_stream(binding: Binding, handle: int) -> None:
    with binding.active("destroy a stream") as runtime:
        runtime.streamDestroy(handle)


def _destroy_event(binding: Binding, handle: int) -> None:
    with binding.active("destroy an event") as runtime:
        runtime.eventDestroy(handle)


class CudaEvent:
    """A point in a stream's order of work. Waiting sleeps instead of spinning, so that the cores stay with the
    reading threads (some 20 microseconds later). Safe from several threads."""

    __slots__ = ("__weakref__", "binding", "handle")

    def __init__(self, binding: Binding, stream_handle: int) -> None:
        self.binding = binding
        with binding.active("record an event") as runtime:
            self.handle = runtime.eventCreateWithFlags(runtime.eventBlockingSync | runtime.eventDisableTiming)
            weakref.finalize(self, _destroy_event, binding, self.handle).atexit = False
            runtime.eventRecord(self.handle, stream_handle)

    def done(self) -> bool:
        with self.binding.active("finish the work before an event") as runtime:
            status = runtime.eventQuery(self.handle)
            if status == SUCCESS:
                return True
            try:
                # Also clears the thread's last error, in which "not ready" would surprise the next launch check.
                runtime.check_status(status)
            except runtime.CUDARuntimeError:
                if status != NOT_READY:
                    raise
        return False

    def wait(self) -> None:
        with self.binding.active("finish the work before an event") as runtime:
            runtime.eventSynchronize(self.handle)

    def make_torch_wait(self) -> None:
        """torch's work enqueued after this call, on its current stream, starts only once this event is done."""
        with self.binding.active("make torch wait for an event") as runtime:
            runtime.streamWaitEvent(self.binding.toolkit.torch_stream_handle(self.binding.index), self.handle, 0)


class CudaStream:
    """A non-blocking stream of one GPU. Safe from several threads, but for `close`; one thread per stream keeps the
    order of its work obvious."""

    __slots__ = ("__weakref__", "_destroy", "_handle", "binding")

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        with binding.active("create a stream") as runtime:
            self._handle = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        self._destroy = weakref.finalize(self, _destroy_stream, binding, self._handle)
        self._destroy.atexit = False

    @property
    def handle(self) -> int:
        if not self._destroy.alive:  # never hand out a stale handle, nor 0, which is CUDA's default stream
            raise DeviceError(f"this stream on {self.binding.name} was closed; take a new one")
        return self._handle

    def copy_from_host(self, dst: Buffer, dst_offset: int, src: HostBuffer, src_offset: int, nbytes: int) -> None:
        """As `Stream.copy_from_host`; from memory that is not pinned the copy is staged and blocks the caller."""
        target, source = _ends(dst, dst_offset, src, src_offset, nbytes)
        if nbytes:
            with self.binding.active("copy from the host") as runtime:
                runtime.memcpyAsync(target, source, nbytes, runtime.memcpyHostToDevice, self.handle)

    def copy_to_host(self, dst: HostBuffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        """As `Stream.copy_to_host`; into memory that is not pinned the copy is staged and blocks the caller."""
        target, source = _ends(dst, dst_offset, src, src_offset, nbytes)
        if nbytes:
            with self.binding.active("copy to the host") as runtime:
                runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDeviceToHost, self.handle)

    def copy_on_device(self, dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        if not isinstance(dst, CudaBuffer) or not isinstance(src, CudaBuffer):
            raise DeviceError("a copy on a GPU needs two buffers on GPUs; use copy_from_host or copy_to_host")
        target, source = _ends(dst, dst_offset, src, src_offset, nbytes)
        if not nbytes:
            return
        to, origin = dst.binding.index, src.binding.index
        with self.binding.active("copy on the device") as runtime:
            if to == origin:
                runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDeviceToDevice, self.handle)
            else:
                # Over NVLink or PCIe where the GPUs reach each other, through host memory where they do not.
                runtime.memcpyPeerAsync(target, to, source, origin, nbytes, self.handle)

    def fill(self, dst: Buffer, offset: int, nbytes: int, byte: int = 0) -> None:
        """Enqueues setting a range of device memory to one byte value."""
        check_range("destination", dst, offset, nbytes)
        if nbytes:
            with self.binding.active("fill memory") as runtime:
                runtime.memsetAsync(dst.address + offset, byte, nbytes, self.handle)

    def record(self) -> CudaEvent:
        return CudaEvent(self.binding, self.handle)

    def wait_for(self, event: Event) -> None:
        if not isinstance(event, CudaEvent):  # the processor's work is done when its event says so
            event.wait()
            return
        with self.binding.active("wait for an event") as runtime:
            runtime.streamWaitEvent(self.handle, event.handle, 0)

    def synchronize(self) -> None:
        with self.binding.active("finish a stream's work") as runtime:
            runtime.streamSynchronize(self.handle)

    def as_torch_stream(self) -> AbstractContextManager[object]:
        """Inside the context torch's work goes to this stream: no waiting is needed between its work and ours."""
        return self.binding.toolkit.torch_stream(self.handle, self.binding.index)

    def wait_for_torch(self) -> None:
        """Work enqueued here after this call starts only once torch's work so far, on its current stream, is done."""
        self.wait_for(CudaEvent(self.binding, self.binding.toolkit.torch_stream_handle(self.binding.index)))

    def make_torch_wait(self) -> None:
        """torch's work enqueued after this call, on its current stream, starts only once this stream's work is done."""
        self.record().make_torch_wait()

    def close(self) -> None:
        if not self._destroy.alive:
            return
        try:
            self.synchronize()
        finally:
            self._destroy()


def _ends(dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> tuple[int, int]:
    check_range("destination", dst, dst_offset, nbytes)
    check_range("source", src, src_offset, nbytes)
    return dst.address + dst_offset, src.address + src_offset
