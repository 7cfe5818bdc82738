"""Packages that cost nothing to import: each public name is imported from its module when somebody first asks for it.

    __getattr__ = lazy_names(__name__, {"Store": "store", "StoreClient": "client"})
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The module-level `__getattr__` (PEP 562) of `package`. `homes` names for each public name the module below the package
    that defines it. What was found once is an ordinary attribute from then on. Safe from several threads."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
