"""Bytes become text: the engine that runs a transformers decoder model token by token and streams what it says.

One module per noun: `sampler` chooses a token, `text` turns tokens into text as they come and `stopping` ends it,
`runner` computes logits, `kv` keeps keys and values, `scheduler` steps all `requests` together, `session` is the state
of one, `movable` lets it leave and come, `engine` ties them to prompts. `overlap` lets layers run while later ones are
still being loaded, `lora` swaps adapters on a resident model. `migration` moves a request to another engine while its
text is read, `ownership` says whose it is, `ledger` what its reader has, `workers` runs engines in processes.
Importing this package costs nothing; torch and transformers are imported when an engine first needs them. Taught in
chapters 00, 04 and 07.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Adapter": "lora",
    "Adapters": "lora",
    "Completion": "requests",
    "Detokenizer": "text",
    "Engine": "engine",
    "EpochRegister": "ownership",
    "Generation": "requests",
    "MigrationServer": "migration_target",
    "MoveOptions": "migration_source",
    "OwnershipClient": "ownership_server",
    "OwnershipServer": "ownership_server",
    "Piece": "requests",
    "Runner": "runner",
    "SamplingOptions": "sampler",
    "Session": "session",
    "Speeds": "migration_choice",
    "StreamedModel": "overlap",
    "TextDecoder": "text",
    "Timings": "session",
    "TokenFeed": "feed",
    "TokenLedger": "ledger",
    "WorkerOptions": "workers",
    "Workers": "workers",
    "choose_mode": "migration_choice",
    "load_tokenizer": "text",
    "migrate": "migration",
    "next_runnable_layer": "overlap",
    "should_hand_over": "migration",
    "stream_model": "overlap",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sllm_mini.inference' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
