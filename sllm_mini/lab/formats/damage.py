"""Damage done on purpose, to copies: a flipped bit, a cut-off end, and reads that the kernel refuses.

What each format's reader says about it is measured, never assumed. Shown in chapter 01.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sllm_mini.device.cpu import HostMemory
from sllm_mini.lab.formats.files import OURS, SAFETENSORS, TORCH, Format
from sllm_mini.lab.formats.readers import safetensors_load_file, torch_load
from sllm_mini.lab.table import Table
from sllm_mini.loading import load_tensors

_BLOCK = 4096
_LOADERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {TORCH: torch_load, SAFETENSORS: safetensors_load_file, OURS: load_tensors}


def flip_bit(path: str | os.PathLike[str], offset: int, bit: int) -> None:
    """Flips one bit of one byte of a file, in place."""
    with open(path, "r+b", buffering=0) as file:
        old = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([old[0] ^ (1 << bit)]), offset)


def cut_end(path: str | os.PathLike[str], nbytes: int) -> None:
    """Removes the last `nbytes` of a file, as a writer does that never came so far."""
    os.truncate(path, os.stat(path).st_size - nbytes)


def damage_table(formats: Mapping[str, Format], tensor: str, *, element: int = 0) -> Table:
    """Flips the highest exponent bit of one element of one tensor in each file, loads, mends it; then cuts the last
    byte off each file, and loads again. The files are those of `formats`, so give copies; they stay cut."""
    rows = []
    for fmt in formats.values():
        stored = next(found for found in fmt.stored if found.name == tensor)
        right = _LOADERS[fmt.name](fmt.path)[tensor].reshape(-1)[element].clone()
        at = stored.offset + (element + 1) * right.itemsize - 1  # little-endian: the last byte holds sign and exponent
        data = fmt.path / "data-00000.bin" if fmt.path.is_dir() else fmt.path
        flip_bit(data, at, 6)
        rows.append((fmt.name, "one bit flipped", *_outcome(fmt, tensor, element, float(right))))
        flip_bit(data, at, 6)
        cut_end(data, 1)
        rows.append((fmt.name, "last byte missing", *_outcome(fmt, tensor, element, float(right))))
    return Table(("format", "damage", "noticed", "what came of it"), tuple(rows), caption=f"Who notices? Element {element} of {tensor}")


def _outcome(fmt: Format, tensor: str, element: int, right: float) -> tuple[str, str]:
    try:
        value = float(_LOADERS[fmt.name](fmt.path)[tensor].reshape(-1)[element])
    except Exception as error:  # noqa: BLE001 - whatever a library raises is what this table is about
        return "yes", f"{type(error).__name__}: {_first_line(error).replace(f'{fmt.path}{os.sep}', '').replace(str(fmt.path), fmt.path.name)}"
    return ("no", f"loaded; the weight {right:.4g} is now {value:.4g}") if value != right else ("no", "loaded, and no weight is wrong")


def _first_line(error: Exception) -> str:
    line = " ".join(next(iter(str(error).splitlines()), "").split())
    return line if len(line) <= 150 else f"{line[:150]}…"


def direct_table(formats: Mapping[str, Format]) -> Table:
    """Direct reads of each format, as tried on this machine: where a tensor starts, in whole blocks, at the very end."""
    rows = []
    for fmt in formats.values():
        tensor = fmt.stored[0]
        data = fmt.path / "data-00000.bin" if fmt.path.is_dir() else fmt.path
        end = (data.stat().st_size - 1) // _BLOCK * _BLOCK
        block = tensor.offset // _BLOCK * _BLOCK
        attempts = (
            ("the first tensor, where it starts", tensor.offset, 0),
            ("the block in which it starts", block, 0),
            ("that block, to memory 8 bytes off", block, 8),
            ("the last block", end, 0),
        )
        for what, offset, shift in attempts:
            rows.append((fmt.name, what, f"{offset % _BLOCK:,}", try_direct(data, offset, _BLOCK, memory_shift=shift)))
    return Table(
        headers=("format", f"{_BLOCK:,} bytes, read directly", f"offset modulo {_BLOCK:,}", "the kernel's answer"),
        rows=tuple(rows),
        caption="Which direct reads does this file system take?",
        numeric=frozenset({2}),
    )


def try_direct(path: str | os.PathLike[str], offset: int, nbytes: int, *, memory_shift: int = 0) -> str:
    """Reads once around the page cache into memory that starts `memory_shift` bytes after a page boundary; the bytes
    that came, or the error's name and words."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return _named(error)
    memory = HostMemory(nbytes + memory_shift)
    try:
        count = os.preadv(fd, [memory.view[memory_shift:]], offset)
    except OSError as error:
        return _named(error)
    finally:
        os.close(fd)
    return f"{count:,} bytes" if count == nbytes else f"{count:,} bytes: the file ends"


def _named(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror}"
