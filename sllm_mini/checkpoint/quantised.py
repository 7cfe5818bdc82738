"""torchao's quantised weights at rest: int8 or fp8 values beside their scales, and what else torchao must know of them.

A weight is a composite: its parts are ordinary tensors of the checkpoint, named and described as transformers names
and describes them in safetensors files, so a directory converts without torchao. Building a weight wraps its parts
where they lie: nothing is copied, and no step passes through full precision. Only the classes named here are built;
torchao itself lets only its own classes into a description. Importing this costs nothing; torchao is imported when a
tensor of its is taken apart or put together. Taught in chapter 04.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, torch_dtype
from sllm_mini.checkpoint.index import CompositeEntry
from sllm_mini.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    import torch

_HOME = "torchao.quantization"
KINDS = {f"{_HOME}.{name}": name for name in ("Int8Tensor", "Float8Tensor")}
"""The class tags that may be saved and loaded, and torchao's own short names for them."""
DESCRIPTION = "torchao"
"""The key of a composite's meta under which torchao's JSON text about the tensor stands."""
_MEMBER = re.compile(r"[A-Z][A-Z0-9_]*")
_MARK = "_qdata"
"""How the name of the part that every one of these kinds has ends."""


def lacks_torchao() -> bool:
    """True where torchao is not installed. Imports nothing."""
    return find_spec("torchao") is None


def check_torchao() -> None:
    """Raises UnsupportedError where torchao is not installed. Imports nothing."""
    if lacks_torchao():
        raise UnsupportedError("quantised weights of torchao need torchao; install it with: pip install torchao")


def import_torchao() -> None:
    """Imports what building a weight needs, so that it can be done while bytes are read. Raises UnsupportedError."""
    check_torchao()
    _library()


def _library() -> Any:
    try:
        return importlib.import_module("torchao.prototype.safetensors.safetensors_utils")
    except ImportError as error:
        raise UnsupportedError(f"this torchao cannot describe its tensors ({error}); install torchao 0.18 or newer with: pip install -U torchao") from error


def part_name(name: str, part: str) -> str:
    """The name under which a part of the weight `name` is stored: of "a.weight" and "scale", "a._weight_scale"."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}_{leaf}_{part}"


def take_apart(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The parts of a torchao weight by short name, and its composite's meta."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    text = json.dumps(tensor, cls=_library().TensorSubclassAttributeJSONEncoder)
    return {name: getattr(tensor, name) for name in names}, {DESCRIPTION: text}


def put_together(kind: str, parts: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> torch.Tensor:
    """A torchao weight around its parts. Raises ValueError, KeyError or TypeError if they do not describe one, and
    UnsupportedError if torchao is not there."""
    check_torchao()
    description = json.loads(meta[DESCRIPTION])
    if description["_type"] != KINDS[kind] or set(description["_tensor_data_names"]) != set(parts):
        raise ValueError("its description is of another class or of other parts")
    attributes = {name: _attribute(value) for name, value in description["_data"].items()}
    _check_scales(parts, attributes["block_size"])
    home = importlib.import_module(_HOME)
    return getattr(home, KINDS[kind]).__tensor_unflatten__(dict(parts), attributes, None, None)


def _attribute(value: Any) -> Any:
    for named in _named_values(value):
        kind, data = named["_type"], named.get("_data")
        if isinstance(data, str) and not (data in ITEM_NBYTES if kind == "torch.dtype" else _MEMBER.fullmatch(data)):
            raise ValueError(f"{data[:60]!r} is not a {kind[:60]}")
    if not isinstance(value, dict):
        return value
    return torch_dtype(value["_data"]) if value["_type"] == "torch.dtype" else _library().object_from_dict(value)


def _named_values(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "_type" in value:
            yield value
        for inner in value.values():
            yield from _named_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_values(inner)


def _check_scales(parts: Mapping[str, torch.Tensor], block: list[int]) -> None:
    # torchao asks only when it computes, and then not always.
    shape = tuple(parts["qdata"].shape)
    if len(block) != len(shape) or any(step < 1 or size % step for size, step in zip(shape, block, strict=True)):
        raise ValueError(f"blocks of {block} do not divide its shape {shape}")
    expected = tuple(size // step for size, step in zip(shape, block, strict=True))
    if tuple(parts["scale"].shape) != expected:
        raise ValueError(f"its scales have the shape {tuple(parts['scale'].shape)} instead of {expected}")


def has_flattened(names: Collection[str]) -> bool:
    """True if a file with tensors of these names holds torchao's weights in parts."""
    return any(name.endswith(_MARK) for name in names)


def flattened_composites(metadata: Mapping[str, str], names: Collection[str], path: Any) -> list[CompositeEntry]:
    """The weights that the metadata of safetensors files describes, whose parts are among the tensors `names`.

    Raises FormatError, naming `path`, for a description that does not fit the tensors, and UnsupportedError for a
    class that is not in `KINDS`.
    """
    kinds = {short: kind for kind, short in KINDS.items()}
    found: list[CompositeEntry] = []
    for name, text in metadata.items():
        try:
            described = json.loads(text)
            kind, parts = str(described["_type"]), described["_tensor_data_names"]
            if kind == "Tensor":
                continue
            stored = {str(part): part_name(name, part) for part in parts}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # metadata is anybody's; a weight that lacks its description is found out below
        if kind not in kinds:
            raise UnsupportedError(f"{path}: tensor {name[:200]!r} is a {kind[:60]} of torchao; only {' and '.join(kinds)} can be converted")
        missing = [part for part in stored.values() if part not in names]
        if missing:
            raise FormatError(f"tensor {name[:200]!r} is described as made of {missing[0][:200]!r}, which no file holds", path=path)
        found.append(CompositeEntry(name=name, kind=kinds[kind], parts=stored, meta={DESCRIPTION: text}))
    known = {part for entry in found for part in entry.parts.values()}
    lost = sorted(name for name in names if name.rpartition(".")[2].startswith("_") and name.endswith(_MARK) and name not in known)
    if lost:
        raise FormatError(f"tensor {lost[0][:200]!r} is a part of a quantised weight that the file's metadata does not describe", path=path)
    return sorted(found, key=lambda entry: entry.name)


def flattened_metadata(composites: Collection[CompositeEntry], plain: Collection[str]) -> dict[str, str]:
    """The inverse of `flattened_composites`: the metadata of a safetensors file, {} if no composite is torchao's."""
    ours = {entry.name: str(entry.meta[DESCRIPTION]) for entry in composites if entry.kind in KINDS}
    if not ours:
        return {}
    parts = {part for entry in composites for part in entry.parts.values()}
    others = {name: '{"_type": "Tensor"}' for name in plain if name not in parts}
    return {**ours, **others, "tensor_names": json.dumps([*ours, *others])}
