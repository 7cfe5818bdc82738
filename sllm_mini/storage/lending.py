"""From a lease to tensors of this process: the store's own side of attaching, without a socket in between (chapter 05)."""

from __future__ import annotations

import os

from sllm_mini.device.cuda_memory import CudaBuffer
from sllm_mini.errors import StoreError
from sllm_mini.storage.attach import Attachment, attach_memory
from sllm_mini.storage.holdings import Lease
from sllm_mini.storage.mapping import MappedImage
from sllm_mini.storage.places import Image
from sllm_mini.types import Tier


def attach_lease(lease: Lease) -> Attachment:
    """The leased image's tensors; the lease ends with the last of them. Raises what mapping raises."""
    checkpoint = lease.entry.version.checkpoint
    try:
        arriving = lease.arriving
        if lease.image.buffer is None:
            # The same way as for another process, so that writes stay with who wrote here too.
            fds = duplicate(lease.image)
            memory = MappedImage(fds, lease.image.chunks[0].nbytes if fds else 1, checkpoint.nbytes, on_unmap=lease.close)
            return attach_memory(checkpoint, arriving, memory, Tier.DRAM)
        if isinstance(lease.image.buffer, CudaBuffer):
            return attach_memory(checkpoint, arriving, lease.image.buffer.lend(lease.close), Tier.DEVICE)
        raise StoreError(f"memory in {lease.place} cannot be attached")
    except BaseException:
        lease.close()
        raise


def duplicate(image: Image) -> list[int]:
    """New descriptors of an image's chunks, which from now on count as lent. The caller closes them."""
    fds: list[int] = []
    try:
        for chunk in image.chunks:
            chunk.lent = True
            fds.append(os.dup(chunk.fd))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise StoreError(f"no descriptors are left for an image of {len(image.chunks)} chunks ({error.strerror}); raise the limit on open files") from error
    return fds
