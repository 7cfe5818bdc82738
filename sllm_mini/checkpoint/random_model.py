"""Writes Hugging Face directories with a published shape and seeded random weights, for models too large to ship.

The directory is what transformers' `save_pretrained` would write (names, ties left out, shards, headers), plus a
tokenizer of exactly `vocab_size` entries, so every reader of such directories can load it. Weights are normal with the
model's own initial deviation, norms 1, biases 0 (see `random_weights`: the bytes do not depend on the number of threads
nor on how tensors are spread over files).

Writes go past the page cache where the file system can: a new model is as cold as a downloaded one after a reboot, and
fresh cache pages, which cost more than the disk on a machine short of memory, are not touched. Memory grows by 10 MB per
thread and the vocabulary's text, whatever the model. Taught in chapter 01.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.dtypes import SAFETENSORS_CODES, dtype_name, torch_dtype
from sllm_mini.checkpoint.filled_tokenizer import filled_tokenizer
from sllm_mini.checkpoint.publish import publish
from sllm_mini.checkpoint.random_weights import DTYPES, RandomWeights
from sllm_mini.checkpoint.safetensors_file import encode_header
from sllm_mini.checkpoint.shapes import Shape, find_shape
from sllm_mini.device.cpu import HostMemory, cpu_count
from sllm_mini.errors import CheckpointExistsError, ModelError, WriteError
from sllm_mini.types import Progress, ProgressCallback

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CODES = {dtype: code for code, dtype in SAFETENSORS_CODES.items()}
_SLAB_NBYTES = 8 << 20
_BLOCK_NBYTES = 4096  # what direct writes are multiples of
_MAX_THREADS = 16  # two per processor, one drawing while the other writes; beyond, memory would grow for nothing


def make_model(
    name: str | Shape,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_nbytes: int = 5_000_000_000,
    dtype: str | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Writes the published shape `name` (see `SHAPES`; or a shape of your own) with random weights to the directory
    `path`, and returns `path`.

    `dtype` is float16, bfloat16 or float32 (None: the published one), `threads` counts the writers (None: two per
    processor, at most 16); `progress` is called on the calling thread. All or nothing, as `publish` says; with `overwrite` an
    existing directory is exchanged, but only one that holds a model or nothing. Equal arguments give equal bytes on
    every machine for 16-bit types, for float32 with equal numpy versions. Raises ModelError for what it cannot build,
    CheckpointExistsError, WriteError (full disk, no permission), ResourceError without the tiny tokenizer. Safe from
    several threads on different paths.
    """
    shape = find_shape(name) if isinstance(name, str) else name
    dtype = shape.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ModelError(f"weights cannot be {dtype!r}; choose one of {', '.join(DTYPES)}")
    if max_shard_nbytes < 1:
        raise ModelError(f"a file of {max_shard_nbytes} bytes can hold no weights; ask for at least 1")
    if threads is not None and threads < 1:
        raise ModelError(f"{threads} threads cannot write; ask for at least 1")
    target = Path(path)
    _check_target(target, overwrite)
    tokenizer = filled_tokenizer(shape)
    model = _skeleton(shape, dtype)
    files = _plan_files(model, max_shard_nbytes)
    weights = RandomWeights(seed, dtype, _initial_deviation(model.config))
    with publish(target, overwrite=overwrite) as work:
        model.config.save_pretrained(work)
        model.generation_config.save_pretrained(work)
        for file, text in tokenizer.items():
            (work / file).write_text(text, encoding="utf-8")
        (work / "README.md").write_text(_card(shape, seed, dtype), encoding="utf-8")
        _write_weights(work, files, weights, threads or min(2 * cpu_count(), _MAX_THREADS), progress)
        if len(files) > 1:
            (work / "model.safetensors.index.json").write_text(_index(model, files), encoding="utf-8")
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuses, before the slow imports, what `publish` would refuse; and to replace a directory that is not a model."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointExistsError("it exists already; choose another path or ask to overwrite it", path=target)
    try:
        foreign = target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()
    except OSError as error:
        raise WriteError(f"it cannot be looked into: {error.strerror}", path=target) from error
    if foreign:
        raise CheckpointExistsError("it holds something other than a model and is not replaced; choose another path", path=target)


# --- what is to be written ---


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor of a file; `offset` counts bytes from the start of the file."""

    name: str
    count: int
    offset: int
    nbytes: int
    value: float | None
    """The value of every element, or None for random ones."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    header: bytes
    nbytes: int
    weights: list[_Weight]


def _skeleton(shape: Shape, dtype: str) -> PreTrainedModel:
    """The transformers model on the meta device: every name, shape and tie, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shape.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    model.tie_weights()  # transformers 5.0 leaves this to from_pretrained
    model.config.architectures = [type(model).__name__]
    return model


def _plan_files(model: PreTrainedModel, max_shard_nbytes: int) -> list[_File]:
    """The safetensors files in order, laid out as `save_pretrained` does it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # of tied tensors, the first name is the one that is saved
            seen.add(id(tensor))
            tensors[name] = tensor
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_nbytes, filename_pattern="model{suffix}.safetensors")
    return [_plan_file(file, {name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()]


def _plan_file(file: str, tensors: Mapping[str, torch.Tensor]) -> _File:
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # the order of the safetensors library
    fields = {name: (_CODES[dtype_name(tensors[name].dtype)], tuple(tensors[name].shape), tensors[name].nbytes) for name in order}
    header = encode_header(fields, {"format": "pt"})
    offset, weights = len(header), []
    for name in order:
        # In these models a vector is a bias or the gain of a norm.
        value = 0.0 if name.endswith("bias") else 1.0 if tensors[name].ndim == 1 else None
        weights.append(_Weight(name, tensors[name].numel(), offset, tensors[name].nbytes, value))
        offset += tensors[name].nbytes
    return _File(file, header, offset, weights)


def _initial_deviation(config: Any) -> float:
    return getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02


def _index(model: PreTrainedModel, files: list[_File]) -> str:
    nbytes = sum(file.nbytes - len(file.header) for file in files)
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": nbytes},
        "weight_map": {weight.name: file.name for file in files for weight in file.weights},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _card(shape: Shape, seed: int, dtype: str) -> str:
    return (
        f"# {shape.name} with random weights\n\n"
        "This is not a trained model: its text is noise. It has the names, sizes and types of a published one and is made\n"
        "to measure how fast weights load.\n\n"
        f"- Shape: {shape.source} ({shape.parameters:,} parameters); {shape.trust}.\n"
        f"- Weights: {dtype}, normally distributed with the model's initial deviation, norms 1, biases 0; seed {seed}.\n"
        "- Tokenizer: the first 1,024 entries split English text; every other entry shows its own number, such as ⟨5123⟩.\n"
    )


# --- the weights ---


def _write_weights(work: Path, files: list[_File], weights: RandomWeights, threads: int, progress: ProgressCallback | None) -> None:
    """Writes every file, slab by slab. Space is taken first, so a disk that is too small says so at once."""
    total = sum(file.nbytes for file in files)
    done = 0
    local = threading.local()
    stop = threading.Event()

    def write_slab(fd: int, file: _File, at: int) -> int:
        if stop.is_set():
            return 0
        if not hasattr(local, "memory"):
            local.memory = HostMemory(_SLAB_NBYTES)
        nbytes = min(_SLAB_NBYTES, file.nbytes - at)
        _fill_slab(local.memory.view[:nbytes], at, file, weights)
        _write_slab(fd, local.memory.view[: -(-nbytes // _BLOCK_NBYTES) * _BLOCK_NBYTES], at)
        return nbytes

    fds: list[int] = []
    try:
        for file in files:
            fds.append(os.open(work / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.posix_fallocate(fds[-1], 0, file.nbytes)
            _set_direct(fds[-1], True)
        with ThreadPoolExecutor(threads, thread_name_prefix="sllm-make") as pool:
            try:
                places = [(fd, file, at) for fd, file in zip(fds, files, strict=True) for at in range(0, file.nbytes, _SLAB_NBYTES)]
                jobs = [pool.submit(write_slab, *place) for place in places]
                for job in as_completed(jobs):
                    done += job.result()
                    if progress is not None:
                        progress(Progress(done, total))
            finally:
                stop.set()  # on a failure or Ctrl-C, what is queued ends at once
        for fd, file in zip(fds, files, strict=True):
            os.ftruncate(fd, file.nbytes)  # the last block was written whole
    finally:
        for fd in fds:
            os.close(fd)


def _fill_slab(view: memoryview, at: int, file: _File, weights: RandomWeights) -> None:
    """Fills `view` with bytes `[at, at + len(view))` of a file."""
    head = file.header[at : at + len(view)]
    view[: len(head)] = head
    end = at + len(view)
    for weight in file.weights[max(bisect_right(file.weights, at, key=lambda weight: weight.offset) - 1, 0) :]:
        if weight.offset >= end:
            break
        low, high = max(weight.offset, at), min(weight.offset + weight.nbytes, end)
        if low >= high:
            continue
        part = view[low - at : high - at]
        if weight.value is None:
            weights.fill(weight.name, (low - weight.offset) * weight.count // weight.nbytes, part)
        else:
            weights.fill_constant(weight.value, part)


def _set_direct(fd: int, on: bool) -> bool:
    """Switches direct writes on or off: False where the file system has none."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _write_slab(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        try:
            written = os.pwrite(fd, view, at)
        except OSError as error:
            # The file system wants larger blocks than ours, or wrote part of one: the page cache takes any bytes.
            if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(fd, False)
            continue
        view, at = view[written:], at + written
