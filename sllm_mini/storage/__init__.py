"""The hierarchy on one machine: shared memory that a store lends to other processes, and what fills and empties it.

`store` is the owner, `server` puts it on a socket, `client` asks it from another process and `attach` is what both hand
out. Importing this package costs nothing. Taught in chapters 03 and 05.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

_HOMES = {
    "Attachment": "attach",
    "Store": "store",
    "StoreClient": "client",
    "StoreServer": "server",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)
