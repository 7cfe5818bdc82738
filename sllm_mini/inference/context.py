"""How long a model's context is, from its configuration alone: for the engine, and for a server that has not loaded it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change past the original context, so that older keys would no longer fit."""


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Positions that a text may have, of a `config.json` or what a configuration object writes as one; None where they have no end (ALiBi)."""
    limits = [next((config[name] for name in _NAMES if config.get(name)), None)]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Models with two kinds of layers have one set of parameters for each.
    for parameters in (rope, *(item for item in rope.values() if isinstance(item, dict))) if isinstance(rope, dict) else ():
        if parameters.get("rope_type", parameters.get("type")) in _LENGTH_DEPENDENT_ROPE:
            limits += [parameters.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")]
    return min((limit for limit in limits if type(limit) is int and limit > 0), default=None)
