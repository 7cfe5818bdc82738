"""What the fake processes of one machine share: the memory of its GPUs and the handles of what they exported.

Taught in chapter 03.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Block:
    """One allocation. `handle` names it once it was exported, `mappings` counts the processes that opened it."""

    address: int
    nbytes: int
    device: int
    storage: Any
    handle: bytes | None = None
    mappings: int = 0


@dataclass(slots=True, eq=False)
class Opening:
    """A block of another process, and how often this one opened it."""

    block: Block
    count: int = 1


class FakeGpus:
    """GPUs of one machine, whichever process uses them. All methods hold the caller to `lock`."""

    def __init__(self, memory_nbytes: int) -> None:
        self.lock = threading.RLock()  # reentrant: a finalizer may free memory in the middle of any call
        self.memory_nbytes = memory_nbytes
        self.used_nbytes: dict[int, int] = {}
        self._exported: dict[bytes, Block] = {}
        self._handles = 0

    def free_nbytes(self, device: int) -> int:
        return self.memory_nbytes - self.used_nbytes.get(device, 0)

    def take(self, device: int, nbytes: int) -> None:
        self.used_nbytes[device] = self.used_nbytes.get(device, 0) + nbytes

    def give(self, block: Block) -> None:
        """The block's memory is free again and its handle stale."""
        self.used_nbytes[block.device] -= block.nbytes
        if block.handle is not None:
            del self._exported[block.handle]

    def export(self, block: Block) -> bytes:
        """The block's handle: 64 bytes, the same each time, and never another block's."""
        if block.handle is None:
            self._handles += 1
            block.handle = (b"fake CUDA IPC handle %d" % self._handles).ljust(64, b"\0")
            self._exported[block.handle] = block
        return block.handle

    def find(self, handle: bytes) -> Block | None:
        return self._exported.get(handle)
