"""A session laid out for a reader: each field, its value and its bytes, and the KV cache beside it. Chapter 07."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from sllm_mini.inference.session import Session
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text

_MEANINGS = {
    "request_id": "who it is, at the register and in the ledger",
    "model": "whose weights: a digest of the checkpoint's index",
    "token_ids": "prompt and answer so far; the next position is their number",
    "prompt_length": "where the answer begins",
    "max_new_tokens": "with the two above: how many may still come",
    "sampling": "how tokens are chosen; the random number is a function of seed and position",
    "stop": "strings that end the text",
    "stop_at_eos": "whether the model may end it",
    "logprobs": "of how many of the likeliest tokens the reader is told",
    "embed": "whether the answer is a vector instead of a text",
    "emitted_text_nchars": "stream position: characters the reader has",
    "held_text": "stop buffer: text that may still become a stop string",
    "timings": "what it has cost so far",
    "elapsed_seconds": "how long ago it came; clocks do not travel",
    "version": "what a newer release checks first",
}
_MOST = 44


def session_table(session: Session) -> Table:
    """A row for each field, shortened where it is long; the sum of all bytes as `to_bytes` writes them in the caption."""
    rows = []
    for item in fields(session):
        value = getattr(session, item.name)
        shown = f"{len(value)} ids: {str(list(value))[:24]}…" if item.name == "token_ids" else _short(value)
        rows.append((item.name, shown, _MEANINGS.get(item.name, "")))
    return Table(("field", "value", "what for"), tuple(rows), caption=f"The session: {nbytes_text(len(session.to_bytes()))} as bytes")


def _short(value: Any) -> str:
    plain = {item.name: getattr(value, item.name) for item in fields(value)} if hasattr(value, "__dataclass_fields__") else value
    text = repr(value) if plain is value else ", ".join(f"{name} {number:.3g}" for name, number in plain.items() if number)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def size_table(session: Session, kv_nbytes_per_token: int) -> Table:
    """Bytes of the session, of its tokens alone and of its KV cache."""
    ids, whole = len(msgspec.msgpack.encode(session.token_ids)), len(session.to_bytes())
    cached = len(session.token_ids) - 1
    cache = cached * kv_nbytes_per_token
    rows = (
        ("token ids", nbytes_text(ids), f"{len(session.token_ids)} tokens"),
        ("session, token ids included", nbytes_text(whole), ""),
        ("KV cache", nbytes_text(cache), f"{cached} tokens of {nbytes_text(kv_nbytes_per_token)}"),
        ("KV cache / session", f"x{cache / whole:,.0f}", ""),
    )
    return Table(("what", "bytes", "of"), rows, numeric=frozenset({1}))
