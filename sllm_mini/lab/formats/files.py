"""One model in three files: torch's pickle, safetensors, and our checkpoint; and where each puts every tensor.

`write_formats` writes what a user would have (`torch.save` of a state dict, `safetensors.torch.save_file`, our converter);
`Format` says what is inside without reading tensor bytes. Costs two files of the model's size and, while they are written,
twice the model in memory. Shown in chapter 01.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.checkpoint.layout import execution_order
from sllm_mini.checkpoint.safetensors_file import read_header
from sllm_mini.lab.models import workspace

if TYPE_CHECKING:
    import torch

TORCH = "torch.save"
SAFETENSORS = "safetensors"
OURS = "sllm_mini"
_FOLDER = "formats"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Bytes of one tensor in a file, `offset` counted from its start (over all data files, where there are several)."""

    name: str
    offset: int
    nbytes: int
    layer: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Format:
    """A model in one format. `path` is what a reader opens, `stored` its distinct tensors in the order of their bytes,
    `layers` the names of its layers in execution order. Ties stand once, under their first name."""

    name: str
    path: Path
    file_nbytes: int
    layers: tuple[str, ...]
    stored: tuple[StoredTensor, ...]

    @property
    def tensor_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def between_nbytes(self) -> int:
        """Bytes between the first tensor and the last that belong to none."""
        return self.stored[-1].end - self.stored[0].offset - self.tensor_nbytes

    @property
    def alignment(self) -> int:
        """The largest power of two, up to 4096, that every tensor's offset is a multiple of."""
        return min(4096, *(tensor.offset & -tensor.offset or 4096 for tensor in self.stored))

    def needed_nbytes(self) -> list[int]:
        """For each layer in execution order: how much of the file, from its start, holds it and all before it."""
        ends = [max((t.end for t in self.stored if t.layer == layer), default=0) for layer in range(len(self.layers))]
        return [max(ends[: layer + 1]) for layer in range(len(ends))]

    def runnable_layers(self, arrived_nbytes: float) -> int:
        """How many layers, counted from the first, can run once the first `arrived_nbytes` of the file are there."""
        return sum(needed <= arrived_nbytes for needed in self.needed_nbytes())

    def arrived_shares(self, arrived_nbytes: float) -> list[float]:
        """For each layer, the share of its bytes among the first `arrived_nbytes` of the file."""
        total, there = [0] * len(self.layers), [0.0] * len(self.layers)
        for tensor in self.stored:
            total[tensor.layer] += tensor.nbytes
            there[tensor.layer] += min(max(arrived_nbytes - tensor.offset, 0), tensor.nbytes)
        return [found / nbytes if nbytes else 1.0 for found, nbytes in zip(there, total, strict=True)]


def write_formats(checkpoint: Checkpoint, folder: str | os.PathLike[str] | None = None) -> dict[str, Format]:
    """Writes the checkpoint's model as the other two formats into a folder of its own and returns all three, by name.

    Files of an earlier call are replaced. Raises what `load_model` raises, OSError for what the disk refuses.
    """
    import torch
    from safetensors.torch import save_file

    target = _folder(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = _module_order(checkpoint)
    torch.save(state, target / "pytorch_model.bin")
    seen: set[int] = set()
    # safetensors holds no ties: of tensors that share memory, the first name is kept, as save_pretrained does.
    once = {name: t for name, t in state.items() if not (t.data_ptr() in seen or seen.add(t.data_ptr()))}  # type: ignore[func-returns-value]
    save_file(once, target / "model.safetensors", metadata={"format": "pt"})
    return {
        TORCH: _read_torch(target / "pytorch_model.bin"),
        SAFETENSORS: _read_safetensors(target / "model.safetensors"),
        OURS: _read_ours(checkpoint),
    }


def remove_formats(folder: str | os.PathLike[str] | None = None) -> int:
    """Removes what `write_formats` wrote and returns how many bytes that gave back."""
    target = _folder(folder)
    files = [file for file in (target / "pytorch_model.bin", target / "model.safetensors") if file.exists()]
    nbytes = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    if target.exists():
        target.rmdir()
    return nbytes


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    return (workspace() if folder is None else Path(folder)) / _FOLDER


def _module_order(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's state dict as a training script would have it: in the order of its modules, one allocation a tensor."""
    from sllm_mini.loading import load_model

    copies: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_model(checkpoint).state_dict().items():
        if tensor.data_ptr() not in copies:
            copies[tensor.data_ptr()] = tensor.clone()  # load_model's are views of one allocation, which torch.save would save whole
        state[name] = copies[tensor.data_ptr()]
    return state


def _format(name: str, path: Path, file_nbytes: int, places: list[tuple[str, int, int]]) -> Format:
    groups = execution_order(place[0] for place in places)
    layer_of = {tensor: number for number, (_, names) in enumerate(groups) for tensor in names}
    stored = sorted((StoredTensor(tensor, offset, nbytes, layer_of[tensor]) for tensor, offset, nbytes in places), key=lambda t: t.offset)
    return Format(name, path, file_nbytes, tuple(layer for layer, _ in groups), tuple(stored))


def _read_torch(path: Path) -> Format:
    import torch

    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    first_names: dict[int, tuple[str, int]] = {}
    for name, tensor in state.items():
        first_names.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor.untyped_storage().nbytes()))
    # Mapped, storages lie in memory as their records lie in the file.
    records = sorted(_zip_records(path))
    storages = sorted(first_names.items())
    places = [(name, offset, nbytes) for offset, (_, (name, nbytes)) in zip(records, storages, strict=True)]
    return _format(TORCH, path, path.stat().st_size, places)


def _zip_records(path: Path) -> Iterator[int]:
    """Where the bytes of each storage start."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if "/data/" in record.filename:
                file.seek(record.header_offset + 26)  # a local header ends with two lengths, a name and padding
                name_nbytes = int.from_bytes(file.read(2), "little")
                extra_nbytes = int.from_bytes(file.read(2), "little")
                yield record.header_offset + 30 + name_nbytes + extra_nbytes


def _read_safetensors(path: Path) -> Format:
    return _format(SAFETENSORS, path, path.stat().st_size, [(entry.name, entry.offset, entry.nbytes) for entry in read_header(path)])


def _read_ours(checkpoint: Checkpoint) -> Format:
    starts = [0]
    for partition in checkpoint.index.partitions:
        starts.append(starts[-1] + partition.file_nbytes)
    seen: set[int] = set()
    places = []
    for tensor in checkpoint.index.tensors:
        if tensor.storage not in seen:
            seen.add(tensor.storage)
            places.append((tensor.name, starts[tensor.partition] + tensor.offset, tensor.nbytes))
    return _format(OURS, checkpoint.path, checkpoint.nbytes + (checkpoint.path / "index.json").stat().st_size, places)
