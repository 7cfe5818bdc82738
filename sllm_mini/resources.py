"""Finds what travels with the package: the tiny model, the survey, the CUDA sources.

In a wheel they lie inside the package (`_data`, `_csrc`); in a checkout they are the repository's own `data/` and
`csrc/`, so there is one copy of each. Costs one `stat`.
"""

from __future__ import annotations

from pathlib import Path

from sllm_mini.errors import ResourceError

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a packaged file or folder, such as "data/models/tiny" or "csrc". Raises ResourceError if absent."""
    for path in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if path.exists():
            return path
    raise ResourceError(f"{name} is not part of this installation; reinstall sllm_mini or run from a checkout of it")
