"""A 64-bit sum over every byte of every tensor: proof that a loader brought all of them, and a use of each one.

The sum is of each tensor's little-endian 8-byte words modulo 2^64, the last word filled up with zeros, added over the
tensors; it does not depend on their order. A mapped file or a lazy tensor has to give up its bytes for it, so it is
timed together with the load. Costs one pass over memory. Safe from several threads. Shown in chapter 02.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.safetensors_file import read_header

if TYPE_CHECKING:
    import torch

WORD_NBYTES = 8
_MASK = (1 << 64) - 1
_STEP_NBYTES = 64 << 20


def sum_tensors(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """(sum, bytes) of tensors on any device; waits for the device once. A tensor that is not whole words
    one after another, each starting on a word, is copied first."""
    import torch

    total, nbytes = 0, 0
    on_device: list[torch.Tensor] = []
    for tensor in tensors:
        nbytes += tensor.nbytes
        if tensor.nbytes == 0:
            continue
        words = _words(tensor)
        if tensor.is_cpu:
            total += int(words.sum().item())
        else:
            on_device.append(words.sum())
    if on_device:
        total += int(torch.stack(on_device).sum().item())
    return total & _MASK, nbytes


def _words(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    # A GPU cannot read a word that does not start on one, and torch makes no such view of part of a storage either.
    on_a_word = tensor.data_ptr() % WORD_NBYTES == 0 and tensor.storage_offset() * tensor.itemsize % WORD_NBYTES == 0
    if on_a_word and tensor.ndim and tensor.shape[-1] * tensor.itemsize % WORD_NBYTES == 0 and tensor.is_contiguous():
        return tensor.detach().view(torch.int64)
    data = tensor.detach().reshape(-1).view(torch.uint8)
    padded = torch.zeros(-(-len(data) // WORD_NBYTES) * WORD_NBYTES, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    return padded.view(torch.int64)


def sum_files(files: Sequence[Path]) -> tuple[int, int]:
    """(sum, bytes) of the tensors of safetensors files, from the files themselves and without torch: what every loader
    must give. Raises what `read_header` raises, and OSError. Memory grows by 64 MB."""
    import numpy as np

    total, nbytes = 0, 0
    for path in files:
        with path.open("rb") as file:
            for entry in read_header(path):
                file.seek(entry.offset)
                left = entry.nbytes
                while left:
                    data = file.read(min(left, _STEP_NBYTES))
                    if not data:
                        raise OSError(f"{path} ended while it was being read; make the model again")
                    left -= len(data)
                    data += bytes(-len(data) % WORD_NBYTES)
                    total += int(np.frombuffer(data, dtype="<u8").sum(dtype=np.uint64))
                nbytes += entry.nbytes
    return total & _MASK, nbytes
