"""Content hashes computed on the GPU, of the bytes that arrived there.

Per chunk one launch of `csrc/xxh3_leaves.cu` hashes all 64 KiB leaves at once; 8 bytes a leaf come back, and the
processor hashes those few into the digests of the index. A chunk of 16 MiB costs the device some 15 µs (estimated) on a
stream of its own and the processor 2 KiB of hashing. Taught in chapter 02.
"""

from __future__ import annotations

from collections.abc import Iterator

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, digest_of_leaves
from sllm_mini.device.base import Buffer, Event
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.kernels import enqueue_leaf_digests, leaf_count, load_kernels
from sllm_mini.errors import DeviceError, UnsupportedError

_LEAF_DIGEST_NBYTES = 8


class DeviceHash:
    """Hashing for the slots of one ring. Compiles the kernel on first use in a process. Not safe from several threads,
    but that `digests` may run beside `enqueue` of other slots. Raises UnsupportedError if the kernel cannot be had."""

    def __init__(self, device: CudaDevice, *, slots: int, chunk_nbytes: int) -> None:
        self._device = device
        self._nbytes = leaf_count(chunk_nbytes) * _LEAF_DIGEST_NBYTES
        try:
            load_kernels(device, "xxh3_leaves.cu")["xxh3_leaves"]
        except DeviceError as error:
            raise UnsupportedError(f"hashes are computed on the processor: {error}") from error
        self._there = device.allocate(slots * self._nbytes)
        self._here = device.allocate_host(slots * self._nbytes)
        self._stream = device.stream()

    def enqueue(self, slot: int, buffer: Buffer, offset: int, nbytes: int, after: Event) -> Event:
        """Hashes a range of device memory once `after` is done; the digests are there when the returned event is."""
        at = slot * self._nbytes
        self._stream.wait_for(after)
        enqueue_leaf_digests(self._device, buffer, offset, nbytes, self._stream, self._there, at)
        self._stream.copy_to_host(self._here, at, self._there, at, leaf_count(nbytes) * _LEAF_DIGEST_NBYTES)
        return self._stream.record()

    def digests(self, slot: int, nbytes: int) -> Iterator[str]:
        """The digests of a slot's hash chunks, in their order."""
        at = slot * self._nbytes
        leaves = self._here.view[at : at + leaf_count(nbytes) * _LEAF_DIGEST_NBYTES]
        step = leaf_count(CHUNK_NBYTES) * _LEAF_DIGEST_NBYTES
        for start in range(0, len(leaves), step):
            yield digest_of_leaves(leaves[start : start + step])

    def close(self) -> None:
        """Waits for its work, then gives its memory back."""
        try:
            self._stream.close()
        finally:
            self._there.close()
            self._here.close()
