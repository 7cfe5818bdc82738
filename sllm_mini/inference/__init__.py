"""Bytes become text: the engine that runs a transformers decoder model token by token and streams what it says.

One module per noun: `sampler` chooses a token, `text` turns tokens into text as they come and `stopping` ends it,
`runner` computes logits, `masks` keep texts in one pass apart, `kv` keeps keys and values, `rows` says whose they are,
`scheduler` steps all `requests` together, `session` is the state of one, `movable` lets it leave and come, `engine` ties
them to prompts. `overlap` lets layers run while later ones are still being loaded, `lora` swaps adapters on a resident
model. Three packages let requests move: `migration` takes one to another engine while its text is read, `ownership` says
whose it is and what its reader has, `workers` runs engines in processes.
Importing this package costs nothing; torch and transformers are imported when an engine first needs them. Taught in
chapters 00, 04 and 07.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

_HOMES = {
    "Adapter": "lora",
    "Adapters": "lora",
    "Completion": "requests",
    "Detokenizer": "text",
    "Engine": "engine",
    "EpochRegister": "ownership",
    "Generation": "requests",
    "MigrationServer": "migration",
    "MoveOptions": "migration",
    "OwnershipClient": "ownership",
    "OwnershipServer": "ownership",
    "Piece": "requests",
    "Runner": "runner",
    "SamplingOptions": "sampler",
    "Session": "session",
    "Speeds": "migration",
    "StreamedModel": "overlap",
    "TextDecoder": "text",
    "Timings": "session",
    "TokenFeed": "ownership",
    "TokenLedger": "ownership",
    "WorkerOptions": "workers",
    "Workers": "workers",
    "choose_mode": "migration",
    "load_tokenizer": "text",
    "migrate": "migration",
    "next_runnable_layer": "overlap",
    "should_hand_over": "migration",
    "stream_model": "overlap",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)
