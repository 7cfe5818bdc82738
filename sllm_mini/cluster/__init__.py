"""Processes that serve models on one machine: how they start, what they share, and how they are put away and brought back.

`node` composes a store and the engines that run on its memory, each an `instance`. `zygote` forks a process that has its
libraries imported already, `snapshot` writes a running process to files and brings it back, `process_memory` says what one
more process costs. Importing this package costs nothing. Taught in chapter 05.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Child": "zygote",
    "ForkOptions": "zygote",
    "Instance": "instance",
    "Node": "node",
    "NodeError": "instance",
    "ProcessMemory": "process_memory",
    "Zygote": "zygote",
    "ZygoteError": "zygote",
    "fork_from": "zygote",
    "memory_of": "process_memory",
    "restore_snapshot": "snapshot",
    "save_snapshot": "snapshot",
    "why_no_criu": "snapshot",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sllm_mini.cluster' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
