"""Places where tensors can live, and how bytes get there: the CPU and NVIDIA GPUs behind one set of protocols.

Importing this costs milliseconds: torch and cupy are imported when memory becomes a tensor or a GPU is asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm_mini.device.base import ALIGNMENT, Buffer, Device, Event, HostBuffer, Kernel, Pinned, Stream
from sllm_mini.device.cpu import CpuDevice, HostMemory
from sllm_mini.device.cuda import CudaDevice, cuda_available, cuda_device, why_no_cuda
from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIGNMENT",
    "Buffer",
    "CpuDevice",
    "CudaDevice",
    "Device",
    "Event",
    "HostBuffer",
    "HostMemory",
    "Kernel",
    "Pinned",
    "Stream",
    "cuda_available",
    "get_device",
    "why_no_cuda",
]

_CPU = CpuDevice()


def get_device(name: str | torch.device | Device = "cpu") -> Device:
    """The device called `name`: "cpu", "cuda" (the thread's current GPU), "cuda:1", a torch.device, or a Device itself.

    The same name gives the same object. Raises DeviceError for a name nobody knows and for a GPU that is not there,
    saying why. Safe from several threads.
    """
    if not isinstance(name, str) and isinstance(name, Device):
        return name
    text = str(name)
    if text == "cpu":
        return _CPU
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if match is None:
        raise DeviceError(f"there is no device {text!r}; use 'cpu', 'cuda' or 'cuda:N'")
    return cuda_device(None if match[1] is None else int(match[1]))
