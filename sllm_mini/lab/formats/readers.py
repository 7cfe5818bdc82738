"""The plainest reader for each checkpoint format, each a few lines, so that two of them differ by one idea.

None uses threads, huge pages or hashing: those are loading's subject (chapter 02), this is the format's. Each returns
name → tensor; memory grows by the model once. Shown in chapter 01.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import open_checkpoint
from sllm_mini.checkpoint.dtypes import torch_dtype
from sllm_mini.checkpoint.safetensors_file import read_header
from sllm_mini.device.cpu import HostMemory
from sllm_mini.lab.formats.files import OURS, SAFETENSORS, TORCH
from sllm_mini.loading.reader import read_whole
from sllm_mini.loading.restore import restore_tensors

if TYPE_CHECKING:
    import torch

Path = str | os.PathLike[str]


def torch_load(path: Path) -> dict[str, torch.Tensor]:
    """What everybody writes first: unpickle, and read each storage out of the zip file."""
    import torch

    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def torch_load_mapped(path: Path) -> dict[str, torch.Tensor]:
    """The same, but the storages are a mapping of the file: nothing is read until somebody looks."""
    import torch

    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state


def safetensors_load_file(path: Path) -> dict[str, torch.Tensor]:
    """The library's own way: no pickle, and a mapping of the file."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = load_file(path)
    return state


def read_by_tensor(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file without its library: for each tensor of the header, memory of its own and a read."""
    import torch

    tensors = {}
    with open(path, "rb", buffering=0) as file:
        for entry in read_header(path, file.fileno()):
            memory = torch.empty(entry.nbytes, dtype=torch.uint8)
            read_whole(file.fileno(), memory.numpy().data, entry.offset)
            tensors[entry.name] = memory.view(torch_dtype(entry.dtype)).reshape(entry.shape)
    return tensors


def read_bulk(path: Path, flags: int = 0) -> dict[str, torch.Tensor]:
    """Our checkpoint: one allocation, one read for each data file, and every tensor a view into it."""
    checkpoint = open_checkpoint(path)
    memory = HostMemory(checkpoint.nbytes, huge_pages=False)
    starts, at = [], 0
    for number, partition in enumerate(checkpoint.index.partitions):
        fd = checkpoint.open_partition(number, flags)
        with open(fd, "rb", buffering=0):
            read_whole(fd, memory.view[at : at + partition.nbytes], 0)
        starts.append(at)
        at += partition.nbytes
    places = ((tensor, starts[tensor.partition] + tensor.offset) for tensor in checkpoint.index.tensors)
    return restore_tensors(memory.tensor(), places)


def read_direct(path: Path) -> dict[str, torch.Tensor]:
    """The same read, from the disk straight into that memory, around the page cache. Raises OSError where refused."""
    return read_bulk(path, os.O_DIRECT)


def map_bulk(path: Path) -> dict[str, torch.Tensor]:
    """The same memory, but as a mapping of the data files, populated before it is used."""
    checkpoint = open_checkpoint(path)
    memory = HostMemory(checkpoint.nbytes, huge_pages=False)
    starts, at = [], 0
    for number, partition in enumerate(checkpoint.index.partitions):
        fd = checkpoint.open_partition(number)
        with open(fd, "rb", buffering=0):
            memory.map_file(at, fd, 0, partition.nbytes)
        starts.append(at)
        at += partition.nbytes
    places = ((tensor, starts[tensor.partition] + tensor.offset) for tensor in checkpoint.index.tensors)
    return restore_tensors(memory.tensor(), places)


@dataclass(frozen=True, slots=True)
class Reader:
    """A way to read a format. `copies` says whether the kernel copies what it reads out of the page cache; a direct
    read has the disk write into the reader's memory, a mapping shares the page cache's own."""

    name: str
    format: str
    load: Callable[[Path], dict[str, torch.Tensor]]
    copies: bool


READERS: tuple[Reader, ...] = (
    Reader("torch.load", TORCH, torch_load, copies=True),
    Reader("torch.load, mmap", TORCH, torch_load_mapped, copies=False),
    Reader("safetensors load_file", SAFETENSORS, safetensors_load_file, copies=False),
    Reader("safetensors, by tensor", SAFETENSORS, read_by_tensor, copies=True),
    Reader("ours, one read", OURS, read_bulk, copies=True),
    Reader("ours, one direct read", OURS, read_direct, copies=False),
    Reader("ours, mapped", OURS, map_bulk, copies=False),
)
