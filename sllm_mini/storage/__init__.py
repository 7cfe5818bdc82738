"""The hierarchy on one machine: shared memory that a store lends to other processes, and what fills and empties it.

`store` is the owner, `server` puts it on a socket, `client` asks it from another process and `attach` is what both hand
out. Importing this package costs nothing. Taught in chapters 03 and 05.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Attachment": "attach",
    "Store": "store",
    "StoreClient": "client",
    "StoreServer": "server",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sllm_mini.storage' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
