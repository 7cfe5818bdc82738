"""The package's own CUDA kernels (`csrc/`), each beside the plain host code that says what it must compute.

`sum64` proves that every byte was used, `leaf_digests` hashes the leaves of a checkpoint where they already are, on the
GPU. Kernels are compiled at first use and cached on disk by cupy. Both read each byte once. Taught in chapter 02.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.device.base import Buffer, Device, HostBuffer, Stream, check_range
from sllm_mini.device.cpu import HostMemory
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.errors import DeviceError, UnsupportedError
from sllm_mini.resources import resource

if TYPE_CHECKING:
    import numpy

LEAF_NBYTES = 64 << 10
BLOCK_NBYTES = 4096
"""A checkpoint's partitions are padded to this, so that a direct read of any whole block of them is aligned, and the
kernel that hashes leaves need know no other length."""
_VECTOR_NBYTES = 16
_THREADS = 256
_WARP = 32
_VECTORS_AHEAD = 4
_BLOCKS_PER_MULTIPROCESSOR = 8


class CudaKernel:
    """A function of one `csrc/*.cu` file on one GPU. Arguments are 8 bytes each: addresses and counts as integers."""

    def __init__(self, device: CudaDevice, source: Path, name: str) -> None:
        self._binding = device.binding
        self._name = name
        self.multiprocessors = device.multiprocessors
        with self._binding.active(f"compile {name}"):
            self._launch = device.toolkit.function(source, name, device.index)

    def __call__(self, stream: Stream, grid: Sequence[int], block: Sequence[int], args: Sequence[object]) -> None:
        with self._binding.active(f"launch {self._name}"):
            self._launch(grid, block, args, stream.handle)


class Kernels:
    """The functions of one `csrc/*.cu` file on one GPU, compiled when first asked for. Safe from several threads."""

    def __init__(self, device: CudaDevice, source: Path) -> None:
        self._device = device
        self._source = source
        self._found: dict[str, CudaKernel] = {}

    def __getitem__(self, name: str) -> CudaKernel:
        kernel = self._found.get(name)
        if kernel is None:  # two threads may both make one: the toolkit compiles once, and either serves
            kernel = self._found[name] = CudaKernel(self._device, self._source, name)
        return kernel


def load_kernels(device: Device, file: str) -> Kernels:
    """The kernels of `csrc/<file>` for `device`, the same object each time. Raises UnsupportedError on a CPU."""
    if not isinstance(device, CudaDevice):
        raise UnsupportedError(f"{file} holds CUDA kernels and {device.name} runs none; use the host reference")
    found = device.kernels.get(file)
    if found is None:
        found = device.kernels[file] = Kernels(device, resource("csrc") / file)
    return found


def sum64(device: Device, buffer: Buffer, offset: int, nbytes: int, stream: CudaStream | None = None) -> int:
    """The sum modulo 2^64 of the range's little-endian 8-byte words, the last padded with zeros.

    On a GPU it waits for the work before it in `stream` (one of its own by default) and `offset` is a multiple of 16.
    Raises DeviceError for a range that is not so or not inside the buffer.
    """
    check_range("summed", buffer, offset, nbytes)
    if isinstance(buffer, HostBuffer):
        return host_sum64(buffer.view[offset : offset + nbytes])
    return int(_run(device, stream, 1, partial(enqueue_sum64, device, buffer, offset, nbytes))[0])


def leaf_digests(
    device: Device, buffer: Buffer, offset: int, nbytes: int, stream: CudaStream | None = None
) -> numpy.ndarray:
    """XXH3-64 of each consecutive 64 KiB leaf of the range (the last may be shorter), as uint64.

    On a GPU it waits for the work before it in `stream` (one of its own by default), `offset` is a multiple of 16 and
    `nbytes` of 4096. Raises DeviceError for a range that is not so or not inside the buffer.
    """
    check_range("hashed", buffer, offset, nbytes)
    if isinstance(buffer, HostBuffer):
        return host_leaf_digests(buffer.view[offset : offset + nbytes])
    return _run(device, stream, leaf_count(nbytes), partial(enqueue_leaf_digests, device, buffer, offset, nbytes))


def enqueue_sum64(
    device: Device, buffer: Buffer, offset: int, nbytes: int, stream: CudaStream, out: Buffer, out_offset: int = 0
) -> None:
    """Enqueues `sum64` of a range of device memory into the 8 bytes of device memory at `out_offset`."""
    check_range("summed", buffer, offset, nbytes)
    check_range("result", out, out_offset, 8)
    _require_multiple("the offset", offset, _VECTOR_NBYTES)
    kernel = load_kernels(device, "sum64.cu")["sum64"]
    stream.fill(out, out_offset, 8)
    if nbytes:
        wanted = -(-nbytes // (_THREADS * _VECTOR_NBYTES * _VECTORS_AHEAD))
        blocks = min(wanted, _BLOCKS_PER_MULTIPROCESSOR * kernel.multiprocessors)
        kernel(stream, (blocks,), (_THREADS,), (buffer.address + offset, nbytes, out.address + out_offset))


def enqueue_leaf_digests(
    device: Device, buffer: Buffer, offset: int, nbytes: int, stream: CudaStream, out: Buffer, out_offset: int = 0
) -> None:
    """Enqueues `leaf_digests` of a range of device memory into 8 bytes of it per leaf, from `out_offset` on."""
    check_range("hashed", buffer, offset, nbytes)
    check_range("result", out, out_offset, 8 * leaf_count(nbytes))
    _require_multiple("the offset", offset, _VECTOR_NBYTES)
    _require_multiple("the length", nbytes, BLOCK_NBYTES)
    kernel = load_kernels(device, "xxh3_leaves.cu")["xxh3_leaves"]
    if nbytes:
        blocks = -(-leaf_count(nbytes) * _WARP // _THREADS)
        kernel(stream, (blocks,), (_THREADS,), (buffer.address + offset, nbytes, out.address + out_offset))


def _run(
    device: Device, stream: CudaStream | None, words: int, enqueue: Callable[[CudaStream, Buffer], None]
) -> numpy.ndarray:
    """The 64-bit words that `enqueue` writes on the GPU, brought to the host."""
    import numpy

    if not isinstance(device, CudaDevice):
        raise UnsupportedError(f"this buffer is on a GPU and {device.name} runs no kernels; name the buffer's own device")
    lane = device.stream() if stream is None else stream
    out, host = device.allocate(8 * words), HostMemory(8 * words)
    try:
        enqueue(lane, out)
        lane.copy_to_host(host, 0, out, 0, 8 * words)
        lane.synchronize()
        return numpy.frombuffer(host.view, dtype=numpy.uint64).copy()
    finally:
        out.close()
        if stream is None:
            lane.close()


def _require_multiple(what: str, value: int, unit: int) -> None:
    if value % unit:
        raise DeviceError(f"{what} is {value:,} and a GPU works on multiples of {unit:,} here; align the range")


def leaf_count(nbytes: int) -> int:
    """How many leaves a range of `nbytes` has."""
    return -(-nbytes // LEAF_NBYTES)


def host_sum64(data: bytes | bytearray | memoryview) -> int:
    """The plain meaning of `sum64`, with numpy; ~10 GB/s a core."""
    import numpy

    whole = len(data) // 8 * 8
    words = numpy.frombuffer(data, dtype="<u8", count=whole // 8)
    tail = int.from_bytes(bytes(data[whole:]), "little")
    return (int(words.sum(dtype=numpy.uint64)) + tail) % (1 << 64)


def host_leaf_digests(data: bytes | bytearray | memoryview) -> numpy.ndarray:
    """The plain meaning of `leaf_digests`, for any length, with xxhash; ~10 GB/s a core."""
    import numpy
    import xxhash

    view = memoryview(data)
    leaves = (view[at : at + LEAF_NBYTES] for at in range(0, len(view), LEAF_NBYTES))
    return numpy.fromiter((xxhash.xxh3_64_intdigest(leaf) for leaf in leaves), dtype=numpy.uint64)
