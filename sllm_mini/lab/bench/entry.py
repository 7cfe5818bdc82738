"""What one loader in a bench is: its name, the files it reads, and how a worker process gets hold of it.

A loader is a function that a worker imports by name: it takes a `Job`, does everything that comes before a first load
(imports, thread pools), and returns a function without arguments that loads and returns the tensors. Shown in chapter 02.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sllm_mini.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    Load = Callable[[], Iterable[torch.Tensor]]
    Opener = Callable[["Job"], Load]

Kind = Literal["ours", "ladder", "peer", "limit"]
State = Literal["cold", "warm"]
Memory = Literal["backed", "fresh"]
STATES: tuple[State, ...] = ("cold", "warm")
SOURCE = "safetensors"
"""The format that everything is made from: a Hugging Face directory."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a loader is told: the folder or file in its own format, the safetensors files, and where tensors must go."""

    path: Path
    files: tuple[Path, ...]
    device: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """One loader in one setting. `opener` is "module:function"; `environment` is set before it is imported;
    `setting` says in words what differs from the default; `whole_model` where it needs a configuration, not only
    tensors; `cuda_only` says why it cannot load to a CPU, where that is so."""

    name: str
    kind: Kind
    opener: str
    format: str = SOURCE
    package: str = "sllm_mini"
    setting: str = "default"
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    whole_model: bool = False
    cuda_only: str = ""
    states: tuple[State, ...] = STATES


def resolve(name: str) -> Any:
    """The object that "module:attribute" names. Raises UnsupportedError where its package is not installed."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not installed") from error
