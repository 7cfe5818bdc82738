"""sllm_mini: why large language models start slowly, and how to make them start fast.

Importing this package costs milliseconds: every public name below is imported from its module on first use, so
neither torch nor transformers nor cupy is loaded until something needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.4.0"

_HOMES = {
    "SllmError": "sllm_mini.errors",
    "save_checkpoint": "sllm_mini.checkpoint",
    "convert_checkpoint": "sllm_mini.checkpoint",
    "export_safetensors": "sllm_mini.checkpoint",
    "open_checkpoint": "sllm_mini.checkpoint",
    "verify_checkpoint": "sllm_mini.checkpoint",
    "WriteOptions": "sllm_mini.checkpoint",
    "load_tensors": "sllm_mini.loading",
    "load_model": "sllm_mini.loading",
    "start_load": "sllm_mini.loading",
    "LoadHandle": "sllm_mini.loading",
    "ChunkPool": "sllm_mini.loading",
    "LoadOptions": "sllm_mini.loading",
    "Store": "sllm_mini.storage",
    "StoreClient": "sllm_mini.storage",
    "Engine": "sllm_mini.inference",
    "Session": "sllm_mini.inference",
    "migrate": "sllm_mini.inference",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sllm_mini' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
