"""LoRA adapters on a resident base model: loaded in milliseconds, swapped in microseconds a layer, no weight copied.

An adapter adds `B(A(x)) * scaling` to what some linear layers give (Hu et al., LoRA, 2021). It is applied through
forward hooks, in the same operations as PEFT, so the base's weights are only ever read: with no adapter in use the
model is the base, bit for bit. Swapping adapters is exchanging hooks; many adapters stay resident beside one base,
each at the cost of its own bytes. ServerlessLLM (OSDI'24) loads adapters through its loader too. Taught in chapter 04.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sllm_mini.checkpoint.directory import open_checkpoint
from sllm_mini.checkpoint.dtypes import torch_dtype
from sllm_mini.checkpoint.index import INDEX_FILE
from sllm_mini.checkpoint.safetensors_file import FileBytes, open_plain, read_header
from sllm_mini.errors import FormatError, ModelError
from sllm_mini.loading.load import load_tensors

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_LIMIT = 16 << 20
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class _Config(msgspec.Struct, frozen=True):
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


_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "peft_type", "revision", "task_type", *_Config.__struct_fields__,
}  # fmt: skip
"""Fields that are read above or change nothing once trained: `fan_in_fan_out` is known from the layer itself."""
_HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
"""Values that change nothing, of fields that may; initialisations that are not here change the base's weights as well."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter that is resident: the base's layers it changes, by name, and the bytes it holds."""

    name: str
    layers: Mapping[str, _Delta]
    nbytes: int


class Adapters:
    """The LoRA adapters of one base model. None is in use at first. Its memory is freed with it, or by `unload`.

    The base must not be moved to another device while adapters are loaded. One thread at a time, and none while the
    model runs: a generation under way goes on with the adapter that is in use then, over keys and values of the former.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._adapters: dict[str, Adapter] = {}
        self._hooks: list[Any] = []
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """The name of the adapter in use, None for the base alone."""
        return self._active

    @property
    def resident(self) -> Mapping[str, Adapter]:
        """Every adapter that is loaded, by name."""
        return dict(self._adapters)

    def load(self, name: str, path: str | os.PathLike[str], *, verify: bool = True) -> Adapter:
        """Loads an adapter beside the base, without using it yet.

        `path` is a directory as PEFT's `save_pretrained` writes it, or a checkpoint that `convert_checkpoint` made of
        one; with `verify` the latter's hashes are checked. Weights keep the dtype they are stored in, and the adapter
        computes in it. Raises ModelError for an adapter that is not LoRA, asks for what is not applied here (DoRA,
        saved modules, biases, embeddings) or does not fit the base; CheckpointError and LoadError for files that
        cannot be read; ValueError for a name that is taken. The base and the other adapters are then as before.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; unload it first or choose another name")
        layers = _linear_layers(self.model)
        if not layers:
            raise ModelError(f"{type(self.model).__name__} has no linear layer, so no adapter fits it")
        config, tensors = _read(Path(path), str(next(iter(layers.values())).weight.device), verify)
        deltas = _pair(config, tensors, layers, Path(path))
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._adapters[name] = Adapter(name, deltas, nbytes)
        return self._adapters[name]

    def use(self, name: str | None) -> None:
        """From now on the model computes with that adapter, or, given None, as the base alone.

        Costs a few microseconds per layer that the old and the new one change. Raises ValueError for a name that is
        not loaded; the adapter in use then stays.
        """
        if name is not None:
            self._require(name)
        if name == self._active:
            return
        for hook in self._hooks:
            hook.remove()
        chosen = {} if name is None else self._adapters[name].layers
        self._hooks = [delta.layer.register_forward_hook(delta) for delta in chosen.values()]
        self._active = name

    def unload(self, name: str) -> None:
        """Forgets an adapter and frees its memory; if it is in use, the base alone is used then. ValueError as `use`."""
        self._require(name)
        if name == self._active:
            self.use(None)
        del self._adapters[name]

    def _require(self, name: str) -> None:
        if name not in self._adapters:
            loaded = ", ".join(map(repr, self._adapters)) or "none"
            raise ValueError(f"no adapter named {name!r} is loaded; these are: {loaded}")


class _Delta:
    """What an adapter adds to one layer; its forward hook."""

    __slots__ = ("a", "b", "layer", "scaling")

    def __init__(self, layer: Any, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        self.layer, self.a, self.b, self.scaling = layer, a, b, scaling

    def __call__(self, _layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import linear

        # PEFT's operations in PEFT's order, so that its results are ours to the last bit.
        inner = linear(args[0].to(self.a.dtype), self.a)
        return (output + linear(inner, self.b) * self.scaling).to(output.dtype)


def _linear_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Every module that multiplies by one weight, by name: torch's Linear and GPT-2's Conv1D."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}


def _features(layer: Any) -> tuple[int, int]:
    """How many numbers a layer takes and gives. Of Conv1D's weight they are the rows and the columns."""
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)


def _read(path: Path, device: str, verify: bool) -> tuple[_Config, dict[str, torch.Tensor]]:
    if (path / INDEX_FILE).exists():
        checkpoint = open_checkpoint(path)
        if not any(companion.file == CONFIG_FILE for companion in checkpoint.index.companions):
            raise ModelError(f"{path}: the checkpoint carries no {CONFIG_FILE}, so it is not an adapter; load it with load_model")
        config = _decode(checkpoint.read_companion(CONFIG_FILE), path / CONFIG_FILE)
        return config, load_tensors(checkpoint, device, verify=verify)
    if not (path / CONFIG_FILE).exists():
        raise ModelError(f"{path}: there is no {CONFIG_FILE}; give a directory that PEFT's save_pretrained wrote, or a checkpoint converted from one")
    if not (path / WEIGHTS_FILE).exists():
        raise ModelError(f"{path}: there is no {WEIGHTS_FILE}; pickled weights are not read, so save the adapter as safetensors")
    with open(open_plain(path / CONFIG_FILE), "rb") as file:
        config = _decode(file.read(_CONFIG_LIMIT), path / CONFIG_FILE)
    return config, dict(_read_safetensors(path / WEIGHTS_FILE, device))


def _read_safetensors(path: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a small file, each in memory of its own and read once."""
    import torch

    fd = open_plain(path)
    try:
        for entry in read_header(path, fd):
            content = torch.empty(entry.nbytes, dtype=torch.uint8)
            FileBytes(fd, path, entry.offset, entry.nbytes).read_into(0, content.numpy().data)
            yield entry.name, content.view(torch_dtype(entry.dtype)).view(entry.shape).to(device)
    finally:
        os.close(fd)


def _decode(raw: bytes, path: Path) -> _Config:
    """The configuration, if every field that it sets is one that is applied here or changes nothing."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        kind = str(fields.get("peft_type"))
        if kind != "LORA":
            raise ModelError(f"{path}: the adapter is of the kind {kind[:40]!r}; only 'LORA' is applied here")
        for field, value in fields.items():
            if value and field not in _NEUTRAL and value not in _HARMLESS.get(field, ()):
                raise ModelError(f"{path}: the adapter sets {field} to {str(value)[:60]!r}, which is not applied here; train it without, or merge it into its base")
        config = msgspec.convert(fields, _Config)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"it is not a configuration of a LoRA adapter: {' '.join(str(error).split())[:300]}", path=path) from error
    if config.r < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise FormatError("a rank is smaller than 1", path=path)
    return config


def _pair(config: _Config, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Any], path: Path) -> dict[str, _Delta]:
    """Each layer's two matrices, checked against the layer and against what the configuration targets."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if key.endswith(".base_layer.weight"):
            raise ModelError(f"{path}: the adapter carries a weight of its base, {key[:200]!r}; save it again with save_embedding_layers=False")
        if match is None:
            raise ModelError(f"{path}: tensor {key[:200]!r} is not the A or B of a linear layer; only those are applied here")
        found.setdefault(match[1], {})[match[2]] = tensor
    try:
        targets = {name for name in layers if _is_target(config, name)}
        ranks = {name: (_by_pattern(config.rank_pattern, name, config.r), _by_pattern(config.alpha_pattern, name, config.lora_alpha)) for name in found}
    except re.error as error:
        raise FormatError(f"one of its patterns is not a regular expression: {error}", path=path / CONFIG_FILE) from error
    for name in found:
        if name not in layers:
            raise ModelError(f"{path}: the adapter changes {name[:200]!r}, which is not a linear layer of this base model; load it beside the base it was trained on")
    for name in sorted(targets ^ found.keys()):
        what = "holds weights that its configuration does not target" if name in found else "targets a layer that it holds no weights"
        raise ModelError(f"{path}: the adapter {what} for {name!r}; save it again with PEFT, or load it beside the base it was trained on")
    deltas: dict[str, _Delta] = {}
    for name, pair in found.items():
        rank, alpha = ranks[name]
        inputs, outputs = _features(layers[name])
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            held = tuple(pair[letter].shape) if letter in pair else None
            if held != shape or not pair[letter].is_floating_point():
                what = "is missing" if held is None else f"has shape {held} and dtype {pair[letter].dtype}"
                raise ModelError(f"{path}: {letter} of layer {name!r} {what}; this base and rank {rank} need floating-point numbers of shape {shape}")
        device = layers[name].weight.device
        scaling = alpha / sqrt(rank) if config.use_rslora else alpha / rank
        deltas[name] = _Delta(layers[name], pair["A"].to(device), pair["B"].to(device), scaling)
    if not deltas:
        raise ModelError(f"{path}: the adapter holds no weights")
    return deltas


def _is_target(config: _Config, name: str) -> bool:
    """Whether PEFT would change that layer: by full name or suffix, or by one regular expression for all."""
    if config.exclude_modules and _named_by(config.exclude_modules, name):
        return False
    if not _named_by(config.target_modules, name):
        return False
    chosen = config.layers_to_transform
    if isinstance(config.target_modules, str) or name in config.target_modules or chosen is None or chosen == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    lists = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns if pattern] or [r".*?\.[^.]*\.(\d+)\."]
    number = next((match[1] for match in (re.match(pattern, name) for pattern in lists) if match), None)
    return number is not None and int(number) in ([chosen] if isinstance(chosen, int) else chosen)


def _named_by(names: list[str] | str, layer: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)


