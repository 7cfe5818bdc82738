"""Where each storage goes in the data files, and in which order: pure functions, no I/O.

The order is the order of execution, so that a prefix of the file is a prefix of the model and inference may start
before the last bytes arrive (chapter 04). Costs nothing per byte. Taught in chapter 01.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sllm_mini.checkpoint.index import BLOCK_NBYTES, TENSOR_ALIGNMENT


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """Bytes that stay together: one storage, however many tensors look into it. `device` is the index of the device
    whose partition it belongs to, None for any."""

    nbytes: int
    device: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one storage starts."""

    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement per storage, in the order given, and the padded size and device of each partition."""

    placements: tuple[Placement, ...]
    partition_nbytes: tuple[int, ...]
    partition_devices: tuple[int | None, ...]


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    return -(-value // alignment) * alignment


def plan_layout(storages: Sequence[StorageSpec], *, partition_nbytes: int, alignment: int = TENSOR_ALIGNMENT) -> Layout:
    """Places storages one after another, in the order given, each on a multiple of `alignment` bytes.

    Each device has one open partition; a storage that would push a non-empty partition over `partition_nbytes` opens
    the next one, and a storage larger than that has a partition to itself. No storage is split. Partition sizes are
    padded to whole 4096-byte blocks. Raises ValueError for a limit that is not a positive number.
    """
    if partition_nbytes <= 0:
        raise ValueError(f"partitions of {partition_nbytes} bytes cannot hold anything; ask for a positive size")
    placements: list[Placement] = []
    used: list[int] = []
    devices: list[int | None] = []
    open_partition: dict[int | None, int] = {}
    for storage in storages:
        current = open_partition.get(storage.device)
        offset = 0 if current is None else align_up(used[current], alignment)
        if current is None or (used[current] > 0 and offset + storage.nbytes > partition_nbytes):
            current, offset = len(used), 0
            open_partition[storage.device] = current
            used.append(0)
            devices.append(storage.device)
        placements.append(Placement(current, offset))
        used[current] = offset + storage.nbytes
    return Layout(tuple(placements), tuple(align_up(nbytes, BLOCK_NBYTES) for nbytes in used), tuple(devices))


_NUMBERED = re.compile(r"^(.*?)(?:^|\.)(layers|layer|h|blocks|block)\.(\d+)\.")
_FIRST = re.compile(r"(^|\.)(embed\w*|wte|wpe|tok_embeddings|word_embeddings\w*|project_in)(\.|$)")


def execution_order(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Groups tensor names into layers in the order in which a forward pass needs them.

    Embeddings come first, then numbered blocks by number (an encoder's before a decoder's), then all the rest (final
    norm, head). Names are recognised by the conventions of transformers models; unknown ones end up in "head", which
    is always safe because it is loaded last.
    """
    groups: dict[tuple[int, str, int], list[str]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            stack = f"{match[1]}.{match[2]}".lstrip(".")
            key = (1 if "encoder" in match[1] else 2, stack, int(match[3]))
        elif _FIRST.search(name):
            key = (0, "embedding", 0)
        else:
            key = (3, "head", 0)
        groups.setdefault(key, []).append(name)
    return [(key[1] if key[0] in (0, 3) else f"{key[1]}.{key[2]}", groups[key]) for key in sorted(groups)]


def is_numbered(layer: str) -> bool:
    """Whether a layer of `execution_order` is one of a model's numbered blocks, and neither what comes before them nor after."""
    return layer not in ("embedding", "head")
