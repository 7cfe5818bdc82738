"""What a checkpoint is written from: storages that can be read piece by piece, and the tensors that look into them.

A source names tensors and storages without holding their bytes, so a model of any size is written in bounded memory.
Taught in chapter 01.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sllm_mini.checkpoint.index import CompositeEntry


class StorageReader(Protocol):
    """A run of `nbytes` bytes that belong together. Read from several threads at once."""

    nbytes: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes that start at `offset`. Raises CheckpointError if they cannot be had."""
        ...


class HeldBytes:
    """Bytes that are in memory already, as a storage."""

    def __init__(self, content: bytes) -> None:
        self.nbytes = len(content)
        self._content = content

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self._content[offset : offset + len(view)]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A strided view into storage number `storage`, `offset` bytes from its start; strides count elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """All that one checkpoint is made of. `companions` are small files: their name and their bytes or their path.
    `confirm` is called when everything was read, before it is published, and raises CheckpointError if it changed
    meanwhile."""

    tensors: Sequence[SourceTensor]
    storages: Sequence[StorageReader]
    composites: Sequence[CompositeEntry] = ()
    companions: dict[str, bytes | Path] = field(default_factory=dict)
    confirm: Callable[[], None] | None = None
