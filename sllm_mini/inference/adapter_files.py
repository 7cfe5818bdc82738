"""What a LoRA adapter's files say: how it computes, which layers it changes, what names it; and whether it fits a base, before either is loaded.

Reads a directory as PEFT's `save_pretrained` writes it, or a checkpoint that `convert_checkpoint` made of one. Imports no torch and reads no
weights but to name them: so a server and a node's agent can refuse what does not fit. `lora` computes with it. Taught in chapter 04.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.index import INDEX_FILE, Index
from sllm_mini.checkpoint.safetensors_file import open_plain, read_header
from sllm_mini.errors import FormatError, ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_LIMIT = 16 << 20
_READ_NBYTES = 1 << 20
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_NUMBERED = re.compile(r"[^.]+\.\d+\..+")
"""A layer of a list of layers, from the list's own name on: what stands before that differs between a model and its checkpoint."""


class AdapterConfig(msgspec.Struct, frozen=True):
    """What PEFT's `LoraConfig` says about how an adapter computes."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def rank_and_alpha(self, layer: str, path: Path) -> tuple[int, float]:
        """Of one layer. Raises FormatError for a pattern that is none."""
        try:
            return _by_pattern(self.rank_pattern, layer, self.r), _by_pattern(self.alpha_pattern, layer, self.lora_alpha)
        except re.error as error:
            raise not_a_pattern(error, path) from error


_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "peft_type", "revision", "task_type", *AdapterConfig.__struct_fields__,
}  # fmt: skip
"""Fields that are read above or change nothing once trained: `fan_in_fan_out` is known from the layer itself."""
_HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
"""Values that change nothing, of fields that may; initialisations that are not here change the base's weights as well."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One tensor of an adapter."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that was opened: `matrices` by the tensors' names. `checkpoint` is None where it lies as PEFT wrote it."""

    path: Path
    config: AdapterConfig
    matrices: Mapping[str, Matrix]
    checkpoint: Checkpoint | None

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def digest(self) -> str:
        """A name for the adapter, 16 hexadecimal characters: equal wherever the same files lie. Reads them, some 10 GB/s; of a checkpoint only
        its index."""
        if self.checkpoint is not None:
            return self.checkpoint.digest
        hashed = xxhash.xxh3_64()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with open(open_plain(self.path / name), "rb", buffering=0) as file:
                while data := file.read(_READ_NBYTES):
                    hashed.update(data)
        return hashed.hexdigest()


def open_adapter(path: str | os.PathLike[str]) -> AdapterFiles:
    """Raises ModelError for an adapter that is not LoRA or asks for what is not applied here (DoRA, saved modules, biases),
    CheckpointError for files that cannot be read."""
    folder = Path(path)
    if (folder / INDEX_FILE).exists():
        checkpoint = open_checkpoint(folder)
        if not any(companion.file == CONFIG_FILE for companion in checkpoint.index.companions):
            raise ModelError(f"{folder}: the checkpoint carries no {CONFIG_FILE}, so it is not an adapter; load it with load_model")
        config = _decode(checkpoint.read_companion(CONFIG_FILE), folder / CONFIG_FILE)
        return AdapterFiles(folder, config, {each.name: Matrix(each.dtype, each.shape, each.nbytes) for each in checkpoint.index.tensors}, checkpoint)
    if not (folder / CONFIG_FILE).exists():
        raise ModelError(f"{folder}: there is no {CONFIG_FILE}; give a directory that PEFT's save_pretrained wrote, or a checkpoint converted from one")
    if not (folder / WEIGHTS_FILE).exists():
        raise ModelError(f"{folder}: there is no {WEIGHTS_FILE}; pickled weights are not read, so save the adapter as safetensors")
    with open(open_plain(folder / CONFIG_FILE), "rb") as file:
        config = _decode(file.read(_CONFIG_LIMIT), folder / CONFIG_FILE)
    return AdapterFiles(folder, config, {each.name: Matrix(each.dtype, each.shape, each.nbytes) for each in read_header(folder / WEIGHTS_FILE)}, None)


def adapted_digest(base: str, adapter: str) -> str:
    """Names the weights of a base with an adapter applied, by the digests of both: nothing of one is taken for the other's."""
    return f"{base}+{adapter}"


def pairs_of(names: Iterable[str], path: Path) -> dict[str, dict[str, str]]:
    """For each layer that an adapter changes the names of its two tensors, by letter. Raises ModelError for a tensor that is neither, and for
    no tensor."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _KEY.fullmatch(name)
        if name.endswith(".base_layer.weight"):
            raise ModelError(f"{path}: the adapter carries a weight of its base, {name[:200]!r}; save it again with save_embedding_layers=False")
        if match is None:
            raise ModelError(f"{path}: tensor {name[:200]!r} is not the A or B of a linear layer; only those are applied here")
        found.setdefault(match[1], {})[match[2]] = name
    if not found:
        raise ModelError(f"{path}: the adapter holds no weights")
    return found


def check_pair(path: Path, layer: str, pair: Mapping[str, Matrix], rank: int, inputs: int, outputs: int) -> None:
    """Raises ModelError where an adapter's two matrices do not go from so many numbers over its rank to so many."""
    for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        held = pair.get(letter)
        if held is None or held.shape != shape or "float" not in held.dtype:
            what = "is missing" if held is None else f"has shape {held.shape} and dtype {held.dtype}"
            raise ModelError(f"{path}: {letter} of layer {layer!r} {what}; this base and rank {rank} need floating-point numbers of shape {shape}")


def check_fits(files: AdapterFiles, base: Index) -> None:
    """Raises ModelError for an adapter that does not fit the base whose index that is: a layer that it has not, or of another shape. Of layers
    outside the model's lists of layers, and of quantised weights, only a start knows more (`Adapters.load`)."""
    shapes = _weights(base)
    for layer, names in pairs_of(files.matrices, files.path).items():
        rank, _ = files.config.rank_and_alpha(layer, files.path)
        pair = {letter: files.matrices[name] for letter, name in names.items()}
        numbered = _NUMBERED.search(layer)
        if numbered is None:
            continue
        known = shapes.get(numbered[0])
        if known is None:
            raise no_such_layer(files.path, layer)
        if None in known or any(_turned(pair, rank, shape) for shape in known if shape is not None):
            continue
        outputs, inputs = next(shape for shape in known if shape is not None)
        check_pair(files.path, layer, pair, rank, inputs, outputs)


def no_such_layer(path: Path, layer: str) -> ModelError:
    return ModelError(f"{path}: the adapter changes {layer[:200]!r}, which is not a linear layer of this base model; load it beside the base it was trained on")


def not_a_pattern(error: re.error, path: Path) -> FormatError:
    return FormatError(f"one of its patterns is not a regular expression: {error}", path=path / CONFIG_FILE)


def _weights(base: Index) -> dict[str, list[tuple[int, int] | None]]:
    """The shapes of the base's matrices by their numbered names, None for one that is put together from parts."""
    found: dict[str, list[tuple[int, int] | None]] = {}
    shapes: list[tuple[str, tuple[int, ...] | None]] = [*((each.name, each.shape) for each in base.tensors), *((each.name, None) for each in base.composites)]
    for name, shape in shapes:
        numbered = _NUMBERED.search(name.removesuffix(".weight"))
        if numbered is not None and name.endswith(".weight") and (shape is None or len(shape) == 2):
            found.setdefault(numbered[0], []).append(None if shape is None else (shape[0], shape[1]))
    return found


def _turned(pair: Mapping[str, Matrix], rank: int, shape: tuple[int, int]) -> bool:
    """Whether it fits a weight that GPT-2's Conv1D has: rows are what it takes, columns what it gives."""
    return all(letter in pair and pair[letter].shape == wanted and "float" in pair[letter].dtype for letter, wanted in (("A", (rank, shape[0])), ("B", (shape[1], rank))))


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)


def _decode(raw: bytes, path: Path) -> AdapterConfig:
    """The configuration, if every field that it sets is one that is applied here or changes nothing."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        kind = str(fields.get("peft_type"))
        if kind != "LORA":
            raise ModelError(f"{path}: the adapter is of the kind {kind[:40]!r}; only 'LORA' is applied here")
        for field, value in fields.items():
            if value and field not in _NEUTRAL and value not in _HARMLESS.get(field, ()):
                raise ModelError(f"{path}: the adapter sets {field} to {str(value)[:60]!r}, which is not applied here; train it without, or merge it into its base")
        config = msgspec.convert(fields, AdapterConfig)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"it is not a configuration of a LoRA adapter: {' '.join(str(error).split())[:300]}", path=path) from error
    if config.r < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise FormatError("a rank is smaller than 1", path=path)
    return config
