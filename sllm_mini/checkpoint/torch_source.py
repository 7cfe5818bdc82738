"""Live tensors as a source: modules and state dicts, on any device, ties and views kept.

Tensors whose bytes overlap share one storage in the checkpoint, so a tied weight is saved once and a view stays a view.
Reads at most one slab at a time from a device. Taught in chapter 01.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.composite import flatten_composite, is_plain
from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, dtype_name
from sllm_mini.checkpoint.index import MAX_NAME, CompositeEntry, extent_nbytes
from sllm_mini.checkpoint.layout import execution_order
from sllm_mini.checkpoint.source import Source, SourceTensor
from sllm_mini.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


class _TensorBytes:
    """Bytes `[start, start + nbytes)` of a live storage."""

    def __init__(self, tensor: torch.Tensor, start: int, nbytes: int) -> None:
        import torch

        self.nbytes = nbytes
        self._bytes = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), start, (nbytes,), (1,))

    def read_into(self, offset: int, view: memoryview) -> None:
        import torch

        if len(view):
            torch.frombuffer(view, dtype=torch.uint8).copy_(self._bytes[offset : offset + len(view)])


def torch_source(source: torch.nn.Module | Mapping[str, Any]) -> Source:
    """A module's state dict (with its configuration, if it is a transformers model) or a mapping of tensors.

    Raises UnsupportedError, naming the entry, for what cannot be saved as bytes: a meta tensor, a value that is not a
    tensor, a tensor subclass that was not allowed.
    """
    import torch

    module = source if isinstance(source, torch.nn.Module) else None
    state: Mapping[str, Any] = module.state_dict() if module is not None else source  # type: ignore[assignment]
    plain: dict[str, torch.Tensor] = {}
    composites: list[CompositeEntry] = []
    for name, value in state.items():
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not _is_text(name):
            raise UnsupportedError(f"entry {str(name)[:200]!r} cannot be named so; names are texts of 1 to {MAX_NAME:,} characters")
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"entry {name!r} is a {type(value).__name__}, not a tensor; save only tensors")
        if value.is_meta:
            raise UnsupportedError(f"tensor {name!r} is on the meta device and has no bytes; load the model first")
        if is_plain(value):
            plain[name] = value
            continue
        entry, parts = flatten_composite(name, value)
        composites.append(entry)
        taken = [part for part in parts if part in state]
        if taken:
            raise UnsupportedError(f"entry {taken[0]!r} has the name of a part of the composite {name!r}; rename one of them")
        plain.update(parts)
        unsaved = [part for part, tensor in parts.items() if not is_plain(tensor)]
        if unsaved:
            raise UnsupportedError(f"part {unsaved[0]!r} is itself a composite; only plain parts can be saved")
    tensors, storages = _share(plain)
    return Source(tensors, storages, composites, {} if module is None else _companions(module))


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


@dataclass(frozen=True, slots=True)
class _View:
    name: str
    tensor: torch.Tensor
    start: int
    end: int
    item: int


def _share(plain: dict[str, torch.Tensor]) -> tuple[list[SourceTensor], list[_TensorBytes]]:
    """One storage per group of views whose bytes overlap, from the group's first byte to its last."""
    views: list[_View] = []
    for _, names in execution_order(plain):
        for name in names:
            # A conjugate or negative view is a flag on other bytes; resolved, it is what the reader sees.
            tensor = plain[name].detach().resolve_conj().resolve_neg()
            item = ITEM_NBYTES.get(dtype_name(tensor.dtype))
            if item is None:
                raise UnsupportedError(f"tensor {name!r} has dtype {tensor.dtype}, which the format does not know")
            start = int(tensor.storage_offset()) * item
            end = start + extent_nbytes(tensor.shape, tensor.stride(), item)
            if start < end and end > tensor.untyped_storage().nbytes():
                raise UnsupportedError(f"the memory of tensor {name!r} was freed or shrunk; gather or load its bytes first")
            views.append(_View(name, tensor, start, end, item))
    readers: list[_TensorBytes] = []
    place: dict[int, tuple[int, int]] = {}  # view → (storage, offset in it)
    for group in _overlapping(views):
        # Views of different dtypes stay aligned to each other if the run starts on a multiple of the widest item.
        low = min(views[number].start for number in group)
        low -= low % max(views[number].item for number in group)
        high = max(views[number].end for number in group)
        place.update({number: (len(readers), views[number].start - low) for number in group})
        # Two storages may start at one address and differ in length, as views of one numpy array do.
        widest = max(group, key=lambda number: views[number].tensor.untyped_storage().nbytes())
        readers.append(_TensorBytes(views[widest].tensor, low, high - low))
    tensors = [
        SourceTensor(view.name, dtype_name(view.tensor.dtype), tuple(view.tensor.shape), tuple(view.tensor.stride()), *place[number])
        for number, view in enumerate(views)
    ]
    return tensors, readers


def _overlapping(views: list[_View]) -> list[list[int]]:
    """Numbers of views in groups that share bytes, ordered by the first view of each group."""
    def by_place(number: int) -> tuple[str, int, int]:
        tensor = views[number].tensor
        return str(tensor.device), tensor.untyped_storage().data_ptr(), views[number].start

    empty = [[number] for number, view in enumerate(views) if view.start == view.end]
    groups: list[list[int]] = []
    storage, reach = None, 0
    for number in sorted((number for number, view in enumerate(views) if view.start < view.end), key=by_place):
        *here, start = by_place(number)
        if here == storage and start < reach:
            groups[-1].append(number)
            reach = max(reach, views[number].end)
        else:
            groups.append([number])
            storage, reach = here, views[number].end
    groups += empty
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def _companions(module: torch.nn.Module) -> dict[str, bytes | Path]:
    """The configuration files of a transformers model; nothing for any other module."""
    files: dict[str, bytes | Path] = {}
    for attribute, file in (("config", "config.json"), ("generation_config", "generation_config.json")):
        config = getattr(module, attribute, None)
        if config is not None and hasattr(config, "to_json_string"):
            settings = json.loads(config.to_json_string(use_diff=True))
            if attribute == "config":
                settings["architectures"] = [type(module).__name__]
            files[file] = json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n"
    return files
