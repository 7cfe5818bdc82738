"""Checkpoints from Hugging Face directories and from live models.

A directory's safetensors files, single or sharded, are streamed: no tensor is ever whole in memory. Weights that exist
only as pickles are refused, because reading them may run code. Taught in chapter 01.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.index import companion_name_problem
from sllm_mini.checkpoint.publish import keep_source
from sllm_mini.checkpoint.quantised import flattened_composites, has_flattened
from sllm_mini.checkpoint.safetensors_file import (
    MAX_HEADER_NBYTES,
    FileBytes,
    SafetensorsEntry,
    open_plain,
    read_header_and_metadata,
)
from sllm_mini.checkpoint.source import Source, SourceTensor
from sllm_mini.checkpoint.writer import WriteOptions, write_checkpoint
from sllm_mini.errors import CheckpointError, FormatError
from sllm_mini.types import ProgressCallback

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLED = "its weights are pickles, which may run code when read; save the model as safetensors first"
_COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_COMPANION_LIMIT = 256 << 20


def save_checkpoint(
    source: torch.nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    options: WriteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Checkpoint:
    """Saves a live module or a mapping of names to tensors, on any device, ties and views kept.

    A transformers model brings its configuration along. Raises UnsupportedError for what cannot be saved,
    CheckpointExistsError and WriteError. The tensors must not change meanwhile. Safe from several threads on different
    targets.
    """
    from sllm_mini.checkpoint.torch_source import torch_source

    write_checkpoint(torch_source(source), path, options or WriteOptions(), progress)
    return open_checkpoint(path)


def convert_checkpoint(
    src: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    options: WriteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Checkpoint:
    """Converts a Hugging Face directory with its configuration and tokenizer files, or one safetensors file alone.

    Also an adapter's directory, as PEFT writes it, and one with int8 or fp8 weights of torchao, which stay as they are.
    Peak memory grows by threads × 8 MiB, whatever the size of the model. Raises CheckpointError or FormatError,
    naming the file, for a source that is missing or broken; CheckpointExistsError and WriteError for the target. Safe
    from several threads on different targets.
    """
    origin = Path(src)
    files = _weight_files(origin)
    keep_source(origin, path)
    with ExitStack() as stack:
        tensors: list[SourceTensor] = []
        storages: list[FileBytes] = []
        opened: dict[Path, tuple[int, os.stat_result]] = {}
        metadata: dict[str, str] = {}
        for file, wanted in files.items():
            fd = open_plain(file)
            stack.callback(os.close, fd)
            opened[file] = fd, os.fstat(fd)
            entries, texts = read_header_and_metadata(file, fd)
            metadata.update(texts)
            _check_shard(file, entries, wanted)
            for entry in entries:
                tensors.append(SourceTensor(entry.name, entry.dtype, entry.shape, _contiguous(entry.shape), len(storages)))
                storages.append(FileBytes(fd, file, entry.offset, entry.nbytes))
        _check_unique(tensors, origin)
        names = {tensor.name for tensor in tensors}
        composites = flattened_composites(metadata, names, origin) if has_flattened(names) else ()
        source = Source(tensors, storages, composites, _companions(origin), confirm=lambda: _check_unchanged(opened))
        write_checkpoint(source, path, options or WriteOptions(), progress)
    return open_checkpoint(path)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _weight_files(origin: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a source and the tensors each must hold (None: whatever it holds)."""
    try:
        if not stat.S_ISDIR(os.stat(origin).st_mode):
            if origin.suffix in _PICKLE_SUFFIXES:
                raise CheckpointError(_PICKLED, path=origin)
            return {origin: None}
        present = os.listdir(origin)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file or directory", path=origin) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"it cannot be opened: {reason}", path=origin) from error
    if _INDEX in present:
        return _sharded(origin)
    if _SINGLE in present:
        return {origin / _SINGLE: None}
    found = sorted(file for file in present if file.endswith(".safetensors"))
    if len(found) == 1:
        return {origin / found[0]: None}
    if found:
        raise CheckpointError(f"it holds {len(found)} safetensors files but no {_INDEX} that says how they belong together", path=origin)
    if any(file.endswith(_PICKLE_SUFFIXES) for file in present):
        raise CheckpointError(_PICKLED, path=origin)
    raise CheckpointError("it holds no safetensors file", path=origin)


def _sharded(origin: Path) -> dict[Path, set[str] | None]:
    index = origin / _INDEX
    with open(open_plain(index), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_HEADER_NBYTES:
            raise FormatError(f"it has {size:,} bytes; at most {MAX_HEADER_NBYTES:,} are read", path=index)
        try:
            raw = file.read()
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error.strerror}", path=index) from error
    try:
        weight_map = json.loads(raw)["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError("it is not a JSON object with a weight_map", path=index) from error
    if not pairs:
        raise FormatError("its weight_map names no tensor", path=index)
    files: dict[Path, set[str]] = {}
    for name, shard in pairs:
        if not isinstance(shard, str) or companion_name_problem(shard) is not None:
            raise FormatError(f"tensor {name[:200]!r} is said to be in {str(shard)[:200]!r}, which is not a file of this directory", path=index)
        files.setdefault(origin / shard, set()).add(name)
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise CheckpointError(f"{_INDEX} names it but it is missing", path=missing[0])
    return {file: files[file] for file in sorted(files)}


def _check_shard(file: Path, entries: list[SafetensorsEntry], wanted: set[str] | None) -> None:
    if wanted is None:
        return
    held = {entry.name for entry in entries}
    if held != wanted:
        lost = sorted(held ^ wanted)[0]
        raise FormatError(f"{_INDEX} and the file disagree about tensor {lost[:200]!r}", path=file)


def _check_unchanged(opened: Mapping[Path, tuple[int, os.stat_result]]) -> None:
    for file, (fd, before) in opened.items():
        now = os.fstat(fd)
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise CheckpointError("it changed while it was being read; convert it again when nothing writes to it", path=file)


def _check_unique(tensors: list[SourceTensor], origin: Path) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"tensor {tensor.name[:200]!r} is in two of its files", path=origin)
        seen.add(tensor.name)


def _companions(origin: Path) -> dict[str, bytes | Path]:
    """The model's own small files: configuration, tokenizer, templates; never weights, never code. A file has none."""
    files: dict[str, bytes | Path] = {}
    for file in sorted(origin.iterdir()) if origin.is_dir() else []:
        small = file.is_file() and file.stat().st_size <= _COMPANION_LIMIT
        wanted = file.suffix in _COMPANION_SUFFIXES or file.name.upper().startswith("LICENSE")
        if small and wanted and not file.name.endswith(".index.json") and companion_name_problem(file.name) is None:
            files[file.name] = file
    return files
