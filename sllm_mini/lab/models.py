"""The checkpoints chapters measure on: the shipped tiny model, and one as large as this machine allows.

Made once, kept in `out/` of the checkout (or the folder named by SLLM_MINI_WORK) and reused by every chapter. The large
one has a published shape and seeded random weights: start-up time depends on shapes and bytes, not on what the
weights say. Shown in chapter 00.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sllm_mini.checkpoint import Checkpoint, WriteOptions, convert_checkpoint, open_checkpoint
from sllm_mini.checkpoint.random_model import make_model
from sllm_mini.checkpoint.shapes import SHAPES
from sllm_mini.device import cuda_available, get_device
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.errors import ResourceError
from sllm_mini.resources import resource

WORK = "SLLM_MINI_WORK"
SIZES = ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-0.5b", "opt-125m")
"""From the largest to the smallest; the first that fits is taken."""
_CPU_LARGEST = "qwen2.5-0.5b"
"""On a processor a larger one would only make the arithmetic of the first token longer."""

_FORMATS_SIZES = ("qwen2.5-0.5b", "opt-125m")
"""For the chapters about files and host memory: the same on every machine, GPU or not."""


def workspace() -> Path:
    """The folder for what chapters make; created if need be."""
    named = os.environ.get(WORK)
    root = Path(named) if named else resource("data/models").parents[1] / "out"
    root.mkdir(parents=True, exist_ok=True)
    return root


def tiny_checkpoint(folder: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The tiny trained model as a checkpoint, converted on first use. Raises what `convert_checkpoint` raises."""
    source = resource("data/models/tiny")
    path = (workspace() if folder is None else Path(folder)) / "tiny"
    made = path / "index.json"
    if _is_made(path) and made.stat().st_mtime >= (source / "model.safetensors").stat().st_mtime:
        return open_checkpoint(path)
    return convert_checkpoint(source, path, options=WriteOptions(overwrite=True))


def fitting_shape(folder: str | os.PathLike[str] | None = None, *, on_gpu: bool | None = None) -> str:
    """The name of the largest shape in `SIZES` for which memory (the GPU's with `on_gpu`, by default where there is one)
    has room, and the disk, unless it was made there already. Raises ResourceError where nothing fits."""
    root = workspace() if folder is None else Path(folder)
    disk = shutil.disk_usage(root).free
    on_gpu = cuda_available() if on_gpu is None else on_gpu
    memory = get_device("cuda").free_nbytes() if on_gpu else available_nbytes()
    for name in SIZES if on_gpu else SIZES[SIZES.index(_CPU_LARGEST) :]:
        nbytes = SHAPES[name].nbytes
        # Twice on disk while it is converted; half as much again in memory for activations and libraries.
        if 1.5 * nbytes < 0.8 * memory and (_is_made(root / name) or 2 * nbytes < 0.8 * disk):
            return name
    raise ResourceError(f"not even {SIZES[-1]} fits: {disk:,} bytes of disk and {memory:,} of memory are free")


def sized_checkpoint(folder: str | os.PathLike[str] | None = None) -> Checkpoint:
    """A checkpoint of `fitting_shape` with random weights (seed 0), made on first use. Raises ResourceError where
    nothing fits, and what `make_model` and `convert_checkpoint` raise."""
    root = workspace() if folder is None else Path(folder)
    name = fitting_shape(root)
    if _is_made(root / name):
        return open_checkpoint(root / name)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
        made = make_model(name, Path(scratch, name))
        return convert_checkpoint(made, root / name)


def formats_checkpoint(folder: str | os.PathLike[str] | None = None, *, largest: str = _FORMATS_SIZES[0]) -> Checkpoint:
    """A model with a published shape and random weights, shared with the other chapters where they use the same one;
    a smaller one than `largest` where memory or disk is short. Raises ResourceError where none fits, and what making one raises."""
    root = workspace() if folder is None else Path(folder)
    disk, memory = shutil.disk_usage(root).free, available_nbytes()
    for name in _FORMATS_SIZES[_FORMATS_SIZES.index(largest) :]:
        nbytes, made = SHAPES[name].nbytes, (root / name / "index.json").exists()
        if 2.5 * nbytes < 0.8 * memory and (2 if made else 3) * nbytes < 0.8 * disk:
            if not made:
                with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                    return convert_checkpoint(make_model(name, Path(scratch, name)), root / name)
            return open_checkpoint(root / name)
    raise ResourceError(f"not even {_FORMATS_SIZES[-1]} fits three times: {disk:,} bytes of disk and {memory:,} of memory are free")


def _is_made(path: Path) -> bool:
    return (path / "index.json").exists()
