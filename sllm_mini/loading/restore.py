"""Tensors as views of a base allocation, made before the bytes arrive.

About 2 µs a tensor: one typed view of the base per dtype, then `as_strided`; the garbage collector is paused, since a
collection in the middle of ten thousand small objects costs more than all of them. Taught in chapter 02.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.composite import restore_composite
from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.dtypes import torch_dtype
from sllm_mini.checkpoint.index import TensorEntry

if TYPE_CHECKING:
    import torch


def restore_tensors(base: torch.Tensor, places: Iterable[tuple[TensorEntry, int]]) -> dict[str, torch.Tensor]:
    """Views into `base`, a 1-D uint8 tensor, for `(entry, byte offset in base)`; they keep the base alive."""
    typed: dict[str, tuple[torch.Tensor, int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    whole = base[: base.numel() // 16 * 16]  # so that every item size divides it
    with _without_gc():
        for entry, offset in places:
            found = typed.get(entry.dtype)
            if found is None:
                view = whole.view(torch_dtype(entry.dtype))
                found = typed[entry.dtype] = (view, view.element_size())
            tensors[entry.name] = found[0].as_strided(entry.shape, entry.stride, offset // found[1])
    return tensors


def join_composites(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with each composite, all of whose parts are there, in the place of its parts. Raises FormatError."""
    for composite in checkpoint.index.composites:
        if all(part in tensors for part in composite.parts.values()):
            parts = {short: tensors.pop(full) for short, full in composite.parts.items()}
            tensors[composite.name] = restore_composite(composite, parts, checkpoint.path)
    return tensors


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
