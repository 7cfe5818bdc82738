"""sllm_mini: why large language models start slowly, and how to make them start fast.

Importing this package costs milliseconds: every public name below is imported from its module on first use, so
neither torch nor transformers nor cupy is loaded until something needs them.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

__version__ = "0.7.0"

_HOMES = {
    "SllmError": "errors",
    "save_checkpoint": "checkpoint",
    "convert_checkpoint": "checkpoint",
    "export_safetensors": "checkpoint",
    "open_checkpoint": "checkpoint",
    "verify_checkpoint": "checkpoint",
    "WriteOptions": "checkpoint",
    "load_tensors": "loading",
    "load_model": "loading",
    "start_load": "loading",
    "LoadHandle": "loading",
    "ChunkPool": "loading",
    "LoadOptions": "loading",
    "Store": "storage",
    "StoreClient": "storage",
    "Engine": "inference",
    "Session": "inference",
    "migrate": "inference",
    "simulate": "cluster",
    "SimulationResult": "cluster",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
