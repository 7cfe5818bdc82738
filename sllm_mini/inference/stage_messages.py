"""What an engine and the stages of its model say to each other: one pass, and the hidden states that came of it. Chapter 10.

Hidden states are payloads, `[tokens, hidden]` in the model's dtype. A pass has at most `PASS_TOKENS` tokens, which bounds both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sllm_mini.wire import Message

PASS_TOKENS = 2048
CACHES = 8
"""Caches that one connection may have: one serves, and the trial of a new engine takes two more."""
_Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
_Ids = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=PASS_TOKENS)]
_Rows = Annotated[tuple[_Count, ...], Meta(max_length=1024)]


class Open(Message, frozen=True):
    """The first message: an engine of these weights wants this stage. Answered by `Opened` or `Failed`."""

    model: Annotated[str, Meta(max_length=256)]


class Opened(Message, frozen=True):
    """This stage runs layers `start` to `stop` − 1."""

    start: _Count
    stop: _Count


class Pass(Message, frozen=True):
    """`Runner.extend`, `decode` or `prefill` on this stage's layers, with the hidden states of the stage before as payload. `names` are the
    texts in the cache's rows, in order, of `lengths` tokens each: the stage arranges its own rows so. Answered by `Passed` or `Failed`."""

    cache: Annotated[int, Meta(ge=0, lt=CACHES)]
    names: _Rows
    lengths: _Rows
    kind: Literal["extend", "decode", "prefill"]
    row: _Count
    token_ids: Annotated[tuple[_Ids, ...], Meta(max_length=1024)]


class Passed(Message, frozen=True):
    """The hidden states are the payload."""


class Failed(Message, frozen=True):
    """Not done, and nothing has changed."""

    reason: Annotated[str, Meta(max_length=2000)]


Order = Open | Pass
Answer = Opened | Passed | Failed
