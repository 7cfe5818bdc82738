"""What one process tells another about its GPU memory, so that the other can map it: CUDA's IPC handle and a little more.

CUDA's 64 bytes say neither how many bytes they stand for nor, to a process that numbers its GPUs otherwise, on which of
them to open them. Taught in chapter 03.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from sllm_mini.errors import DeviceError

HANDLE_NBYTES = 64
_LAYOUT = struct.Struct(f"<8s{HANDLE_NBYTES}sQ16s")
_MAGIC = b"SLLMIPC1"


@dataclass(frozen=True, slots=True)
class Exported:
    """Memory that can be opened: CUDA's handle, how many bytes, and its GPU by its PCI address ("0000:3B:00.0")."""

    handle: bytes
    nbytes: int
    gpu: str

    def encode(self) -> bytes:
        """96 bytes that mean the same in every process of this machine."""
        return _LAYOUT.pack(_MAGIC, self.handle, self.nbytes, self.gpu.encode("ascii"))

    @classmethod
    def decode(cls, data: bytes) -> Exported:
        """Raises DeviceError for bytes that `encode` did not write."""
        if len(data) != _LAYOUT.size or not data.startswith(_MAGIC):
            raise DeviceError(
                f"these {len(data)} bytes are no exported GPU memory; send the {_LAYOUT.size} bytes of"
                " DeviceMemory.export unchanged"
            )
        _, handle, nbytes, gpu = _LAYOUT.unpack(data)
        return cls(handle, nbytes, gpu.rstrip(b"\0").decode("ascii", "replace"))
