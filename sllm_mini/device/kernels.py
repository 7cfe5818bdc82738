"""The package's own CUDA kernels (`csrc/`), each beside the plain host code that says what it must compute.

`sum64` proves that every byte was used, `leaf_digests` hashes the leaves of a checkpoint where they already are, on the
GPU; both read each byte once. `Kernels` finds what a file was compiled to, or compiles it (see `kernels_image`). Taught
in chapters 02 and 06.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.device.base import Buffer, Device, HostBuffer, Stream, check_range
from sllm_mini.device.cpu import HostMemory
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.cuda_runtime import Launcher
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.device.kernels_image import STATES, KernelFolders, Recipe, State, find_image
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

    def __init__(self, device: CudaDevice, name: str, launch: Launcher) -> None:
        self._device = device
        self._name = name
        self._launch = launch
        self.multiprocessors = device.multiprocessors

    def __call__(self, stream: Stream, grid: Sequence[int], block: Sequence[int], args: Sequence[object]) -> None:
        with self._device.binding.active(f"launch {self._name}"):
            self._launch(grid, block, args, stream.handle)

    def on_torch(self, grid: Sequence[int], block: Sequence[int], args: Sequence[object]) -> None:
        """Launches it between torch's own work, on torch's current stream."""
        with self._device.binding.active(f"launch {self._name}"):
            self._launch(grid, block, args, self._device.toolkit.torch_stream_handle(self._device.index))


@dataclass(frozen=True, slots=True)
class KernelStart:
    """How a file's kernels were come by. `seconds`: those of the image (see `KernelImage`) and "load", its way onto the
    GPU. `notes`: what was wrong on the way."""

    state: State
    seconds: dict[str, float]
    nbytes: int
    path: Path | None
    notes: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Kernels:
    """The functions of one `csrc/*.cu` file, made with some options, on one GPU; found or compiled when first asked for.

    `start` says how, None before. `folders` and `allowed` are where to look and by which states, those of `find_image`.
    Safe from several threads: the image is loaded once.
    """

    def __init__(
        self, device: CudaDevice, source: Path, options: Sequence[str] = (), *, folders: KernelFolders | None = None, allowed: Sequence[State] = STATES
    ) -> None:
        self._device = device
        self._folders = device.toolkit.kernel_folders if folders is None else folders
        self._allowed = tuple(allowed)
        self._source, self._options = source, tuple(options)
        self._lock = threading.Lock()
        self._found: dict[str, CudaKernel] = {}
        self._module: Callable[[str], Launcher] | None = None
        self.start: KernelStart | None = None

    def __getitem__(self, name: str) -> CudaKernel:
        kernel = self._found.get(name)
        if kernel is None:
            with self._lock, self._device.binding.active(f"load {name}"):
                if self._module is None:
                    self._module = self._load()
                kernel = self._found[name] = CudaKernel(self._device, name, self._module(name))
        return kernel

    def _load(self) -> Callable[[str], Launcher]:
        toolkit, major_minor = self._device.toolkit, self._device.properties().compute_capability
        recipe = Recipe.of(self._source, self._options, "sm_{}{}".format(*major_minor))
        notes: tuple[str, ...] = ()
        allowed = self._allowed
        while True:
            image = find_image(recipe, self._folders, toolkit.compiler, allowed=allowed)
            started = time.perf_counter()
            try:
                module = toolkit.load(image.data, self._device.index)
            except DeviceError as error:
                # Built by a toolkit that this driver is too old for, say: the next state may serve.
                allowed = tuple(state for state in allowed if STATES.index(state) > STATES.index(image.state))
                if not allowed:
                    raise
                notes += (*image.notes, f"{image.path} was not used: {error}")
                continue
            seconds = image.seconds | {"load": time.perf_counter() - started}
            self.start = KernelStart(image.state, seconds, len(image.data), image.path, notes + image.notes)
            return module


def load_kernels(device: Device, file: str, options: Sequence[str] = ()) -> Kernels:
    """The kernels of `csrc/<file>` made with `options` for `device`, the same object each time. Raises UnsupportedError on
    a CPU."""
    if not isinstance(device, CudaDevice):
        raise UnsupportedError(f"{file} holds CUDA kernels and {device.name} runs none; use the host reference")
    key = " ".join((file, *options))
    # Two threads may both make one: of the two the first to be kept serves both.
    return device.kernels.get(key) or device.kernels.setdefault(key, Kernels(device, resource("csrc") / file, options))


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
