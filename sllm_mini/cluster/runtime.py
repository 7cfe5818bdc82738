"""What a process imports before it can serve a model, whichever model: the rung RUNTIME of the warmth ladder. Explained in chapter 05.

Costs seconds in a fresh process, and nothing in a child of a zygote that has it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
from collections.abc import Sequence

RUNTIME = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.generation.utils",
    "sllm_mini.loading.model",
    "sllm_mini.inference.engine",
)
"""transformers imports its parts on first use, most of them for the first model, so its bare name would leave half of the time
to the first model; a model's own module is worth adding."""


def import_runtime(modules: Sequence[str] = ()) -> None:
    """Imports `RUNTIME` and `modules`, and builds what the libraries build on first use. Raises what an import raises."""
    for name in (*RUNTIME, *modules):
        importlib.import_module(name)
    build_tables()


def build_tables() -> None:
    """Has transformers build its table of renamed weights, a thousand regular expressions, which the first model of a process would
    wait for otherwise (some 50 ms); where that is not public, nothing. A zygote calls it before any fork."""
    mapping = importlib.import_module("transformers.conversion_mapping")
    build = getattr(mapping, "get_checkpoint_conversion_mapping", None)
    if build is not None:
        build("llama")


def has_runtime() -> bool:
    """Whether this process has imported all of `RUNTIME`."""
    return all(name in sys.modules for name in RUNTIME)


def open_device(name: str) -> None:
    """Makes this process's context on a GPU, which the first use would make otherwise; on a CPU nothing. Raises DeviceError."""
    from sllm_mini.device import get_device

    device = get_device(name)
    if not device.is_host:
        import torch

        torch.zeros(1, device=device.name)
        device.synchronize()


def give_back_memory() -> None:
    """Collects garbage and returns the free pages of the C library's heaps to the system (`malloc_trim`, glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
