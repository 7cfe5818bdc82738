"""Recompute or copy: which way of moving a request is faster on this machine and this link. Explained in chapter 07.

Moving the tokens costs some bytes and one pass of the model over them; moving the KV cache costs the cache's bytes. So the
choice is between the destination's arithmetic and the link: a link faster than `break_even_bytes_per_second` copies sooner
than the destination recomputes (the trade of ServerlessLLM, OSDI'24, which recomputes, and of Llumnix, OSDI'24, which copies).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from sllm_mini.inference.migration.messages import Mode


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured of a destination and of the link to it. Raises ValueError for what is not a positive number."""

    recompute_tokens_per_second: float
    link_bytes_per_second: float
    kv_nbytes_per_token: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be measured, and more than 0")


def recompute_seconds(n_tokens: int, speeds: Speeds) -> float:
    """How long the destination computes over `n_tokens`; the tokens' own bytes are nothing beside it."""
    return n_tokens / speeds.recompute_tokens_per_second


def copy_seconds(n_tokens: int, speeds: Speeds) -> float:
    """How long the KV cache of `n_tokens` is on the link."""
    return n_tokens * speeds.kv_nbytes_per_token / speeds.link_bytes_per_second


def break_even_bytes_per_second(speeds: Speeds) -> float:
    """The link at which both take equally long: what the destination recomputes in a second, in bytes of KV cache."""
    return speeds.recompute_tokens_per_second * speeds.kv_nbytes_per_token


def choose_mode(n_tokens: int, speeds: Speeds) -> Literal["tokens", "kv"]:
    """The faster way to move a request of `n_tokens`; of equals the tokens, which burden the link less. Pure.

    Raises ValueError for a negative number of tokens.
    """
    if n_tokens < 0:
        raise ValueError(f"{n_tokens} tokens cannot be moved")
    return "kv" if copy_seconds(n_tokens, speeds) < recompute_seconds(n_tokens, speeds) else "tokens"


def resolve_mode(mode: Mode | Literal["auto"], speeds: Speeds | None, count_tokens: Callable[[], int]) -> Mode:
    """The mode that was named, or for "auto" the faster one by `speeds` for as many tokens as `count_tokens` says.

    Raises ValueError for a mode that there is not, and for "auto" without speeds.
    """
    if mode == "auto":
        if speeds is None:
            raise ValueError("mode 'auto' chooses by speeds; measure them (`sllm-mini bench migrate` does) and give them, or name a mode")
        return choose_mode(count_tokens(), speeds)
    if mode not in get_args(Mode):
        raise ValueError(f"there is no mode {mode!r:.60}; a request moves by one of {', '.join(get_args(Mode))} or auto")
    return mode
