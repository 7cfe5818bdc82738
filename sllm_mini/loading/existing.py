"""Tensors that exist already as the target of a load: new weights into a model that stays where it is.

Each chunk is scattered from a slot of the ring to the tensors whose bytes it holds, so a byte is moved once more than
when a load makes its own tensors; nothing else is allocated. Taught in chapter 02.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.dtypes import dtype_name
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import DeviceError, LoadError
from sllm_mini.loading.plan import LoadPlan
from sllm_mini.loading.ring import Piece

if TYPE_CHECKING:
    import torch


class TensorMemory:
    """A tensor's memory as a buffer to copy into. It keeps the tensor alive and frees nothing."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.address: int = tensor.data_ptr()
        self.nbytes: int = tensor.nbytes

    def tensor(self) -> torch.Tensor:
        import torch

        return self._tensor.detach().reshape(-1).view(torch.uint8)

    def close(self) -> None:
        """The tensor belongs to somebody else."""


def devices_of(checkpoint: Checkpoint, into: Mapping[str, torch.Tensor]) -> tuple[list[Device], dict[str, int]]:
    """The devices that existing tensors are on, and the device's number for each name.

    Raises TypeError for what is no mapping of names to tensors, LoadError for a tensor that the checkpoint does not
    hold, or holds in another type or shape, or that is not contiguous, there or here, or that is on no device that can
    be loaded to: nothing has been written then."""
    import torch

    if not isinstance(into, Mapping):
        raise TypeError(f"`into` is a {type(into).__name__}; give a mapping from names to tensors, such as a model's state_dict()")
    entries = {tensor.name: tensor for tensor in checkpoint.index.tensors}
    numbers: dict[str, int] = {}
    devices: dict[str, Device] = {}
    for name, tensor in into.items():
        entry = entries.get(name)
        if entry is None:
            raise LoadError(f"the checkpoint holds no tensor {name!r}", path=checkpoint.path)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`into` has a {type(tensor).__name__} under {name!r}; give a torch tensor")
        found, wanted = (dtype_name(tensor.dtype), tuple(tensor.shape)), (entry.dtype, tuple(entry.shape))
        if found != wanted:
            raise LoadError(f"{name!r} is {wanted[0]} {list(wanted[1])} there and cannot be put into {found[0]} {list(found[1])}", path=checkpoint.path)
        if not tensor.is_contiguous() or tuple(entry.stride) != tensor.stride():
            raise LoadError(f"{name!r} is not contiguous and cannot be put into existing memory; load it without `into`", path=checkpoint.path)
        place = str(tensor.device)
        if place not in devices:
            try:
                devices[place] = get_device(place)
            except DeviceError as error:
                raise LoadError(f"{name!r} is on {place}, and nothing can be loaded there: {error}", path=checkpoint.path) from error
        numbers[name] = list(devices).index(place)
    if not into:
        raise LoadError("there is no tensor to load into; name at least one", path=checkpoint.path)
    return list(devices.values()), numbers


def scatter(plan: LoadPlan, into: Mapping[str, torch.Tensor]) -> dict[int, Sequence[Piece]]:
    """The pieces of each chunk by its number: which of its bytes go to which tensor."""
    chunks = {chunk.number: chunk for chunk in plan.chunks}
    pieces: dict[int, list[Piece]] = {number: [] for number in chunks}
    for entry, device in plan.tensors:
        target = TensorMemory(into[entry.name])
        for number in plan.chunks_of(entry, device):
            chunk = chunks[number]
            start = max(entry.offset, chunk.file_offset)
            end = min(entry.offset + entry.nbytes, chunk.file_offset + chunk.nbytes)
            pieces[number].append(Piece(start - chunk.file_offset, end - start, target, start - entry.offset))
    return {number: tuple(found) for number, found in pieces.items()}
