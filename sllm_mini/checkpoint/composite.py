"""Tensors that are more than bytes under a shape: quantised, sparse and wrapper-subclass tensors.

A composite is saved as plain parts under a class tag. Reading makes one again only if its tag is on the allow-list
(torch's own kinds below, and classes that the program itself named with `allow_composite`): nothing in a file can name
code to run. torchao's int8 and fp8 weights are on the list (`quantised` knows them). Taught in chapter 01.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint import quantised
from sllm_mini.checkpoint.index import CompositeEntry, is_json_meta
from sllm_mini.errors import FormatError, SllmError, UnsupportedError

if TYPE_CHECKING:
    import torch

_SPARSE = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_PER_TENSOR = "torch.per_tensor_affine"
_PER_CHANNEL = "torch.per_channel_affine"
_wrappers: dict[str, type] = {}


def allow_composite(cls: type) -> type:
    """Allows a wrapper subclass with `__tensor_flatten__` and `__tensor_unflatten__` (torch's protocol for traceable
    subclasses, as torchao uses it) to be saved and loaded. Usable as a decorator; not safe from several threads."""
    for method in ("__tensor_flatten__", "__tensor_unflatten__"):
        if not hasattr(cls, method):
            raise TypeError(f"{cls.__qualname__} has no {method}; a composite must flatten to plain tensors and back")
    _wrappers[_tag(cls)] = cls
    return cls


def _tag(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_plain(tensor: torch.Tensor) -> bool:
    """True for a tensor that is one strided view of one storage."""
    import torch

    plain_class = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain_class and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def flatten_composite(name: str, tensor: torch.Tensor) -> tuple[CompositeEntry, dict[str, torch.Tensor]]:
    """The entry of a composite tensor and its parts by full name. Raises UnsupportedError for a kind not allowed."""
    kind, parts, meta = _take_apart(name, tensor)
    bad = [key for key, value in meta.items() if not is_json_meta(value)]
    if bad:
        raise UnsupportedError(f"tensor {name!r} carries {bad[0]!r}, which is not a number, a text or a list of them")
    stored_as = quantised.part_name if kind in quantised.KINDS else "{}#{}".format
    names = {part: stored_as(name, part) for part in parts}
    entry = CompositeEntry(name=name, kind=kind, parts=names, meta=meta)
    return entry, {names[part]: value for part, value in parts.items()}


def _take_apart(name: str, tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    import torch

    what = f"{type(tensor).__qualname__} of {tensor.dtype} ({tensor.layout})"
    if tensor.is_nested:
        raise UnsupportedError(f"tensor {name!r} is a nested {what}, which cannot be saved; save its parts one by one")
    shape = list(tensor.shape)
    if _tag(type(tensor)) in quantised.KINDS:
        return _tag(type(tensor)), *quantised.take_apart(tensor)
    if _tag(type(tensor)) in _wrappers:
        attributes, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        meta = {"shape": shape, "stride": list(tensor.stride()), **{f"context.{key}": value for key, value in dict(context or {}).items()}}
        return _tag(type(tensor)), {key: getattr(tensor, key) for key in attributes}, meta
    if tensor.is_quantized and tensor.qscheme() == torch.per_tensor_affine:
        meta = {"dtype": _plain_name(tensor), "scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        return _PER_TENSOR, {"values": tensor.int_repr()}, meta
    if tensor.is_quantized and tensor.qscheme() == torch.per_channel_affine:
        parts = {"values": tensor.int_repr(), "scales": tensor.q_per_channel_scales(), "zero_points": tensor.q_per_channel_zero_points()}
        return _PER_CHANNEL, parts, {"dtype": _plain_name(tensor), "axis": tensor.q_per_channel_axis()}
    kind = str(tensor.layout)
    if kind in _SPARSE and not tensor.is_quantized:
        coo = kind == "torch.sparse_coo"
        parts = {part: getattr(tensor, f"_{part}" if coo else part)() for part in _SPARSE[kind]}
        return kind, parts, {"shape": shape, "coalesced": tensor.is_coalesced()} if coo else {"shape": shape}
    raise UnsupportedError(f"tensor {name!r} is a {what}, which cannot be saved; name its class with allow_composite first")


def _plain_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_composite_kind(entry: CompositeEntry, path: Path) -> None:
    """Raises FormatError, naming the checkpoint at `path`, if this program may not build that kind of composite, and
    UnsupportedError if a library that it needs is missing."""
    if entry.kind in quantised.KINDS:
        quantised.check_torchao()
    elif entry.kind not in _wrappers and entry.kind not in _SPARSE and entry.kind not in (_PER_TENSOR, _PER_CHANNEL):
        raise FormatError(f"composite {entry.name!r} is a {entry.kind!r}, which is not on the allow-list; allow its class with allow_composite", path=path)


def restore_composite(entry: CompositeEntry, parts: Mapping[str, torch.Tensor], path: Path) -> torch.Tensor:
    """Builds the tensor that `flatten_composite` took apart, from its parts by short name, sharing their memory
    where torch can. Raises FormatError, naming the checkpoint at `path`, if the entry does not describe one."""
    check_composite_kind(entry, path)
    try:
        return _put_together(entry.kind, parts, dict(entry.meta))
    except SllmError:
        raise
    except Exception as error:  # torch and wrapper classes raise whatever they like at parts that do not fit
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"composite {entry.name!r} cannot be built from its parts: {reason}", path=path) from error


def _put_together(kind: str, parts: Mapping[str, torch.Tensor], meta: dict[str, Any]) -> torch.Tensor:
    import torch

    if kind in quantised.KINDS:
        return quantised.put_together(kind, parts, meta)
    if kind in _wrappers:
        context = {key.removeprefix("context."): value for key, value in meta.items() if key.startswith("context.")}
        return _wrappers[kind].__tensor_unflatten__(dict(parts), context, tuple(meta["shape"]), tuple(meta["stride"]))  # type: ignore[attr-defined]
    if kind == "torch.sparse_coo":
        return torch.sparse_coo_tensor(parts["indices"], parts["values"], meta["shape"], is_coalesced=meta["coalesced"], check_invariants=True)
    if kind in _SPARSE:
        compressed, plain, values = (parts[part] for part in _SPARSE[kind])
        layout = getattr(torch, kind.removeprefix("torch."))
        return torch.sparse_compressed_tensor(compressed, plain, values, meta["shape"], layout=layout, check_invariants=True)
    if meta["dtype"] not in ("qint8", "quint8", "qint32"):
        raise ValueError(f"{meta['dtype']!r} is not a quantised dtype")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces the end of these dtypes; files that hold them stay
        if kind == _PER_TENSOR:
            made = torch._make_per_tensor_quantized_tensor(parts["values"], meta["scale"], meta["zero_point"])
        else:
            if len(parts["scales"]) != dict(enumerate(parts["values"].shape)).get(meta["axis"]):  # torch asks this only at use
                raise ValueError("its axis and the number of its scales do not fit its values")
            made = torch._make_per_channel_quantized_tensor(parts["values"], parts["scales"], parts["zero_points"], meta["axis"])
    if _plain_name(made) != meta["dtype"]:
        raise ValueError(f"its values make a {_plain_name(made)}, not a {meta['dtype']}")
    return made
