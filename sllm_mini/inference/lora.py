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

from sllm_mini.checkpoint.dtypes import torch_dtype
from sllm_mini.checkpoint.safetensors_file import FileBytes, open_plain, read_header
from sllm_mini.errors import ModelError
from sllm_mini.inference.adapter_files import (
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterFiles,
    check_pair,
    no_such_layer,
    not_a_pattern,
    open_adapter,
    pairs_of,
)
from sllm_mini.loading.load import load_tensors

if TYPE_CHECKING:
    import torch


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
        files = open_adapter(path)
        tensors = _read(files, str(next(iter(layers.values())).weight.device), verify)
        deltas = _pair(files, tensors, layers)
        self._adapters[name] = Adapter(name, deltas, files.nbytes)
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
        self._hooks = [self.model.get_submodule(layer).register_forward_hook(delta) for layer, delta in chosen.items()]
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
    """What an adapter adds to one layer; its forward hook. It does not know the layer: a model that is dropped is freed at once, in no cycle."""

    __slots__ = ("a", "b", "scaling")

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        self.a, self.b, self.scaling = a, b, scaling

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


def _read(files: AdapterFiles, device: str, verify: bool) -> dict[str, torch.Tensor]:
    if files.checkpoint is not None:
        return load_tensors(files.checkpoint, device, verify=verify)
    return dict(_read_safetensors(files.path / WEIGHTS_FILE, device))


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


def _pair(files: AdapterFiles, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Any]) -> dict[str, _Delta]:
    """Each layer's two matrices, checked against the layer and against what the configuration targets."""
    path, config, found = files.path, files.config, pairs_of(files.matrices, files.path)
    try:
        targets = {name for name in layers if _is_target(config, name)}
    except re.error as error:
        raise not_a_pattern(error, path) from error
    for name in found:
        if name not in layers:
            raise no_such_layer(path, name)
    for name in sorted(targets ^ found.keys()):
        what = "holds weights that its configuration does not target" if name in found else "targets a layer that it holds no weights"
        raise ModelError(f"{path}: the adapter {what} for {name!r}; save it again with PEFT, or load it beside the base it was trained on")
    deltas: dict[str, _Delta] = {}
    for name, pair in found.items():
        rank, alpha = config.rank_and_alpha(name, path)
        check_pair(path, name, {letter: files.matrices[key] for letter, key in pair.items()}, rank, *_features(layers[name]))
        device = layers[name].weight.device
        scaling = alpha / sqrt(rank) if config.use_rslora else alpha / rank
        deltas[name] = _Delta(tensors[pair["A"]].to(device), tensors[pair["B"]].to(device), scaling)
    return deltas


def _is_target(config: AdapterConfig, name: str) -> bool:
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
