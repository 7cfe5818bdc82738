"""Bytes become text: the engine that runs a transformers decoder model token by token and streams what it says.

One module per noun: `sampler` chooses a token, `text` turns tokens into text as they come, `runner` computes logits
and keeps the cache, `overlap` lets layers run while later ones are still being loaded, `lora` swaps adapters on a
resident model, `engine` ties them to a request. Importing this package costs nothing; torch and transformers are
imported when an engine first needs them. Taught in chapters 00 and 04.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Adapter": "lora",
    "Adapters": "lora",
    "Completion": "engine",
    "Detokenizer": "text",
    "Engine": "engine",
    "Generation": "engine",
    "Piece": "engine",
    "Runner": "runner",
    "SamplingOptions": "sampler",
    "StreamedModel": "overlap",
    "TextDecoder": "text",
    "Timings": "engine",
    "load_tokenizer": "text",
    "next_runnable_layer": "overlap",
    "stream_model": "overlap",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sllm_mini.inference' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
