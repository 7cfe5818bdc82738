"""Writes Hugging Face directories with a published shape and seeded random weights, for models too large to ship.

The directory is what transformers' `save_pretrained` would write (names, ties left out, shards, headers), plus a
tokenizer of exactly `vocab_size` entries, so every reader of such directories can load it. Weights are normal with the
model's own initial deviation, norms 1, biases 0 (see `random_weights`: the bytes do not depend on the number of threads
nor on how tensors are spread over files).

Memory grows by 10 MB per thread and the vocabulary's text, whatever the model. Taught in chapter 01.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.dtypes import SAFETENSORS_CODES, dtype_name, torch_dtype
from sllm_mini.checkpoint.filled_tokenizer import filled_tokenizer
from sllm_mini.checkpoint.publish import check_target, publish
from sllm_mini.checkpoint.random_weights import DTYPES, RandomWeights
from sllm_mini.checkpoint.safetensors_file import encode_header
from sllm_mini.checkpoint.shapes import Shape, find_shape
from sllm_mini.checkpoint.source import HeldBytes, StorageReader
from sllm_mini.checkpoint.streams import FilePlan, write_files
from sllm_mini.errors import ModelError
from sllm_mini.types import ProgressCallback

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CODES = {dtype: code for code, dtype in SAFETENSORS_CODES.items()}


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
    check_target(target, overwrite)  # before the slow imports
    tokenizer = filled_tokenizer(shape)
    model = _skeleton(shape, dtype)
    files = _plan_files(model, max_shard_nbytes, RandomWeights(seed, dtype, _initial_deviation(model.config)))
    with publish(target, overwrite=overwrite) as work:
        model.config.save_pretrained(work)
        model.generation_config.save_pretrained(work)
        for file, text in tokenizer.items():
            (work / file).write_text(text, encoding="utf-8")
        (work / "README.md").write_text(_card(shape, seed, dtype), encoding="utf-8")
        write_files(work, files, threads=threads, progress=progress)
        if len(files) > 1:
            (work / "model.safetensors.index.json").write_text(_index(model, files), encoding="utf-8")
    return target


class _WeightBytes:
    """One tensor as a storage: random, or with `value` in every element."""

    def __init__(self, weights: RandomWeights, name: str, nbytes: int, item_nbytes: int, value: float | None) -> None:
        self.nbytes, self.name = nbytes, name
        self._weights, self._item, self._value = weights, item_nbytes, value

    def read_into(self, offset: int, view: memoryview) -> None:
        if self._value is None:
            self._weights.fill(self.name, offset // self._item, view)
        else:
            self._weights.fill_constant(self._value, view)


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


def _plan_files(model: PreTrainedModel, max_shard_nbytes: int, weights: RandomWeights) -> list[FilePlan]:
    """The safetensors files in order, laid out as `save_pretrained` does it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # of tied tensors, the first name is the one that is saved
            seen.add(id(tensor))
            tensors[name] = tensor
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_nbytes, filename_pattern="model{suffix}.safetensors")
    return [_plan_file(file, {name: tensors[name] for name in names}, weights) for file, names in split.filename_to_tensors.items()]


def _plan_file(file: str, tensors: Mapping[str, torch.Tensor], weights: RandomWeights) -> FilePlan:
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # the order of the safetensors library
    fields = {name: (_CODES[dtype_name(tensors[name].dtype)], tuple(tensors[name].shape), tensors[name].nbytes) for name in order}
    header = encode_header(fields, {"format": "pt"})
    storages: list[StorageReader] = [HeldBytes(header), *(_weight_bytes(name, tensors[name], weights) for name in order)]
    starts = [0]
    for storage in storages[:-1]:
        starts.append(starts[-1] + storage.nbytes)
    return FilePlan(file, starts[-1] + storages[-1].nbytes, starts, storages)


def _weight_bytes(name: str, tensor: torch.Tensor, weights: RandomWeights) -> _WeightBytes:
    # In these models a vector is a bias or the gain of a norm.
    value = 0.0 if name.endswith("bias") else 1.0 if tensor.ndim == 1 else None
    return _WeightBytes(weights, name, tensor.nbytes, tensor.itemsize, value)


def _initial_deviation(config: Any) -> float:
    return getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02


def _index(model: PreTrainedModel, files: list[FilePlan]) -> str:
    weights = [(file.name, storage) for file in files for storage in file.storages if isinstance(storage, _WeightBytes)]
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": sum(storage.nbytes for _, storage in weights)},
        "weight_map": {storage.name: file for file, storage in weights},
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
