"""`sllm-mini inspect`: what a checkpoint holds, read from its index alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption, binary_text
from sllm_mini.lab.units import nbytes_text

if TYPE_CHECKING:
    from sllm_mini.checkpoint.index import Index


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor, in the order in which it is needed.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds, without loading it.

    Partitions, layers in execution order, dtypes, companion files; only the index is read.
    """
    from sllm_mini.checkpoint import open_checkpoint

    index = open_checkpoint(checkpoint).index
    if json:
        terminal.emit_json(_document(checkpoint, index, tensors))
        return
    console = terminal.stdout_console()
    console.print(_summary(checkpoint, index))
    console.print()
    console.print(_partitions(index))
    console.print()
    console.print(layers_table(index))
    if index.composites:
        console.print()
        console.print(_composites(index))
    if tensors:
        console.print()
        console.print(_tensors(index))


def _layer_nbytes(index: Index) -> list[int]:
    """Bytes each layer adds to what the layers before it have brought: a storage that is shared counts once."""
    added = [0] * len(index.layers)
    seen: dict[tuple[int, int], int] = {}
    for tensor in index.tensors:
        storage = (tensor.partition, tensor.storage)
        known = seen.get(storage, 0)
        added[tensor.layer] += max(tensor.nbytes - known, 0)
        seen[storage] = max(known, tensor.nbytes)
    return added


def _shared(index: Index) -> list[list[str]]:
    """Names of the tensors that look into one storage, for each storage that has several."""
    groups: dict[int, list[str]] = {}
    for tensor in index.tensors:
        groups.setdefault(tensor.storage, []).append(tensor.name)
    return [names for names in groups.values() if len(names) > 1]


def _dtypes(index: Index) -> dict[str, int]:
    return dict(Counter(tensor.dtype for tensor in index.tensors).most_common())


def _document(checkpoint: Path, index: Index, tensors: bool) -> dict[str, Any]:
    from sllm_mini.checkpoint.index import VERSION

    counts = Counter(tensor.layer for tensor in index.tensors)
    document: dict[str, Any] = {
        "path": str(checkpoint),
        "version": VERSION,
        "nbytes": index.total_nbytes,
        "block_nbytes": index.block_nbytes,
        "chunk_nbytes": index.chunk_nbytes,
        "leaf_nbytes": index.leaf_nbytes,
        "tensor_count": len(index.tensors),
        "dtypes": _dtypes(index),
        "shared": _shared(index),
        "partitions": [
            {"file": p.file, "nbytes": p.nbytes, "codec": p.codec, "device": p.device} for p in index.partitions
        ],
        "layers": [
            {"name": name, "tensors": counts[number], "nbytes": nbytes}
            for number, (name, nbytes) in enumerate(zip(index.layers, _layer_nbytes(index), strict=True))
        ],
        "composites": [{"name": c.name, "kind": c.kind, "parts": c.parts} for c in index.composites],
        "companions": [{"file": c.file, "nbytes": c.nbytes} for c in index.companions],
    }
    if tensors:
        document["tensors"] = [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "stride": list(t.stride),
                "partition": t.partition,
                "offset": t.offset,
                "nbytes": t.nbytes,
                "layer": index.layers[t.layer],
            }
            for t in index.tensors
        ]
    return document


def _summary(checkpoint: Path, index: Index) -> Table:
    from sllm_mini.checkpoint.index import VERSION

    kinds = ", ".join(f"{dtype} × {number:,}" for dtype, number in _dtypes(index).items())
    rows = {
        "checkpoint": f"{checkpoint} (format v{VERSION})",
        "size": f"{nbytes_text(index.total_nbytes)} ({index.total_nbytes:,} bytes)",
        "tensors": f"{len(index.tensors):,} ({kinds})" if kinds else "none",
        "hashed in": f"leaves of {binary_text(index.leaf_nbytes)}, chunks of {binary_text(index.chunk_nbytes)}",
        "companions": ", ".join(entry.file for entry in index.companions) or "none",
    }
    for names in _shared(index):
        rows["stored once"] = (
            rows["stored once"] + "\n" + " = ".join(names) if "stored once" in rows else " = ".join(names)
        )
    return terminal.facts(rows)


def _partitions(index: Index) -> Table:
    made = terminal.table("partition", "size", "device", "codec", numbers=("size",))
    for entry in index.partitions:
        made.add_row(
            entry.file, nbytes_text(entry.nbytes), "any" if entry.device is None else str(entry.device), entry.codec
        )
    return made


@dataclass(slots=True)
class _Run:
    """Consecutive layers that look alike: the same name but for its number, the same tensors, the same bytes."""

    first: str
    last: str
    layers: int
    tensors: int
    nbytes: int


def _runs(index: Index) -> list[_Run]:
    counts = Counter(tensor.layer for tensor in index.tensors)
    runs: list[_Run] = []
    for number, (name, nbytes) in enumerate(zip(index.layers, _layer_nbytes(index), strict=True)):
        last = runs[-1] if runs else None
        alike = last is not None and (last.first.rpartition(".")[0], last.tensors, last.nbytes) == (
            name.rpartition(".")[0],
            counts[number],
            nbytes,
        )
        if last is not None and alike and "." in name:
            last.last, last.layers = name, last.layers + 1
        else:
            runs.append(_Run(name, name, 1, counts[number], nbytes))
    return runs


def layers_table(index: Index) -> Table:
    made = terminal.table("layers, in the order in which they run", "tensors", "size", numbers=("tensors", "size"))
    for run in _runs(index):
        if run.layers == 1:
            made.add_row(run.first, str(run.tensors), nbytes_text(run.nbytes))
        else:
            made.add_row(
                f"{run.first} … {run.last.rpartition('.')[2]}",
                f"{run.layers} × {run.tensors}",
                f"{run.layers} × {nbytes_text(run.nbytes)}",
            )
    return made


def _composites(index: Index) -> Table:
    made = terminal.table("composite", "kind", "parts")
    for entry in index.composites:
        made.add_row(entry.name, entry.kind, ", ".join(f"{part}={tensor}" for part, tensor in entry.parts.items()))
    return made


def _tensors(index: Index) -> Table:
    made = terminal.table(
        "tensor", "dtype", "shape", "partition", "offset", "size", numbers=("partition", "offset", "size")
    )
    for entry in index.tensors:
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        made.add_row(
            entry.name, entry.dtype, shape, str(entry.partition), f"{entry.offset:,}", nbytes_text(entry.nbytes)
        )
    return made
