"""From a lease to tensors of this process: the store's own side of attaching, without a socket in between (chapter 05)."""

from __future__ import annotations

import os

from sllm_mini.device.base import ALIGNMENT
from sllm_mini.device.cuda_memory import CudaBuffer
from sllm_mini.errors import StoreError
from sllm_mini.storage.attach import Attachment, attach_memory
from sllm_mini.storage.holdings import Lease
from sllm_mini.storage.mapping import MappedImage
from sllm_mini.types import Tier


def attach_lease(lease: Lease) -> Attachment:
    """The leased image's tensors; the lease ends with the last of them. Raises what mapping raises."""
    checkpoint = lease.entry.version.checkpoint
    try:
        with lease.memory() as image:
            lent = image.buffer.lend(lease.ending) if isinstance(image.buffer, CudaBuffer) else None
        if lent is not None:
            return attach_memory(checkpoint, lease.arriving, lent, Tier.DEVICE)
        # The same way as for another process, so that writes stay with who wrote here too.
        fds, chunk_nbytes = duplicate(lease)
        memory = MappedImage(fds, chunk_nbytes, checkpoint.nbytes, on_unmap=lease.ending)
        return attach_memory(checkpoint, lease.arriving, memory, Tier.DRAM)
    except BaseException:
        lease.close()
        raise


def duplicate(lease: Lease) -> tuple[list[int], int]:
    """New descriptors of an image's chunks in DRAM, which from now on count as lent, and the size of a chunk. The caller
    closes them. Raises StoreError when there are no more, and what `Lease.memory` raises."""
    fds: list[int] = []
    with lease.memory() as image:
        try:
            for chunk in image.chunks:
                chunk.lent = True
                fds.append(os.dup(chunk.fd))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise StoreError(f"no descriptors are left for an image of {len(image.chunks)} chunks ({error.strerror}); raise the limit on open files") from error
        return fds, image.chunks[0].nbytes if fds else ALIGNMENT
