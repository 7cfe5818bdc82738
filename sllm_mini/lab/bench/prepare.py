"""The files that loaders read, made from one Hugging Face directory: each loader gets its own format (chapter 02).

Writers run in a process of their own, so that one that fails leaves a sentence and nothing else. What was made is
stamped with the size and time of what it was made from, and taken again where the stamp still fits. Costs one file of
the model's size per format; torch's and tensorizer's writers hold the model in memory once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.bench.entry import SOURCE

if TYPE_CHECKING:
    import torch

_STAMP = ".made-from.json"

Write = Callable[[str, Path, Sequence[Path], Path], None]
"""(format, source folder, its safetensors files, target path)"""


class Files:
    """The formats of one model under one folder, made when asked for. Not safe from several threads."""

    def __init__(self, source: Path, files: Sequence[Path], folder: Path, write: Write) -> None:
        self.source, self.files, self.folder = source, tuple(files), folder
        self._write = write
        self._made: list[Path] = []

    def path(self, format: str) -> Path:
        """Where that format lies, whether it was made yet or not."""
        return self.source if format == SOURCE else self.folder / format / "model"

    def make(self, format: str) -> None:
        """Makes the format's files unless they are there and fit. Raises what its writer raises; nothing is left then."""
        if format == SOURCE:
            return
        home, stamp = self.folder / format, self._stamp()
        if _read(home / _STAMP) == stamp:
            return
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        self._made.append(home)
        try:
            self._write(format, self.source, self.files, home / "model")
        except BaseException:
            self.remove(format)
            raise
        (home / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")

    def remove(self, format: str) -> None:
        """Deletes a format that this object made; what was there before stays."""
        home = self.folder / format
        if home in self._made:
            shutil.rmtree(home, ignore_errors=True)
            self._made.remove(home)

    def close(self) -> None:
        """Deletes all that this object made."""
        for home in list(self._made):
            self.remove(home.name)
        with suppress(OSError):  # it is not there, or holds what was there before
            self.folder.rmdir()

    def read_by(self, format: str) -> list[Path]:
        """Every file of a format, for its loaders to be cold or warm."""
        path = self.path(format)
        return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]

    def _stamp(self) -> list[Any]:
        return [[path.name, (found := path.stat()).st_size, found.st_mtime_ns] for path in self.files]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_format(format: str, source: Path, files: Sequence[Path], target: Path) -> None:
    """Writes one format. Raises ValueError for one nobody knows, and whatever its package raises."""
    if format not in _WRITERS:
        raise ValueError(f"there is no format {format!r}; there are {', '.join(_WRITERS)}")
    _WRITERS[format](source, files, target)


def write_from_text(format: str, source: str, files: Sequence[str], target: str) -> None:
    """`write_format` for a worker, which is told everything as text."""
    write_format(format, Path(source), [Path(file) for file in files], Path(target))


def _write_sllm(source: Path, files: Sequence[Path], target: Path) -> None:
    from sllm_mini.checkpoint import convert_checkpoint

    # A directory brings its configuration along; a single file alone has none.
    alone = len(files) == 1 and not (source / "config.json").exists()
    convert_checkpoint(files[0] if alone else source, target)


def _write_torch(source: Path, files: Sequence[Path], target: Path) -> None:
    import torch

    torch.save(_state(files), target)


def _write_tensorizer(source: Path, files: Sequence[Path], target: Path) -> None:
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(target))
    try:
        serializer.write_state_dict(_state(files))
    finally:
        serializer.close()


def _write_store(source: Path, files: Sequence[Path], target: Path) -> None:
    from sllm_store.torch import save_dict

    # It saves whole storages, so each tensor needs one of its own.
    save_dict({name: tensor.clone() for name, tensor in _state(files).items()}, str(target))


def _state(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}


_WRITERS: dict[str, Callable[[Path, Sequence[Path], Path], None]] = {
    "sllm": _write_sllm,
    "torch": _write_torch,
    "tensorizer": _write_tensorizer,
    "serverless-llm-store": _write_store,
}


def flush(paths: Sequence[Path]) -> None:
    """Waits until files are on the disk, so that writing them back is not measured with somebody's load."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
