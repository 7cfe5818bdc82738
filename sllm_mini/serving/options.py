"""How the server behaves, and what one request may ask for: frozen figures that check themselves. Chapter 11."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field, fields
from typing import Literal

from sllm_mini.errors import SllmError

MODEL_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
"""What a model may be called over HTTP: a store takes no other names, and none of these means anything in a path or an address."""


class OptionsError(SllmError):
    """The server cannot be as it was asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken. A request's head has at most `head_nbytes` and `header_seconds` to come, its body `body_nbytes` and `body_seconds`;
    `connections` and `open_requests` are held at once. A key may send `requests_per_minute` under /v1, for `tokens_per_minute`, those it
    may be answered with included; 0 is any number. One request is at most
    `prompts` prompts and `choices` answers to each, `prompts` answers in all, of `output_tokens` tokens. A first token that has not come
    after `hold_seconds` is given up; a reader that takes nothing for `stall_seconds` is cancelled; a chat template has
    `template_seconds`. A message that spells a token that means an end or a role is refused unless `special_in_content` is
    "allow", since the tokenizer would read it as that token. Raises OptionsError."""

    head_nbytes: int = 64 << 10
    header_seconds: float = 10.0
    body_nbytes: int = 4 << 20
    body_seconds: float = 30.0
    connections: int = 2_000
    open_requests: int = 1_000
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    prompts: int = 32
    choices: int = 8
    output_tokens: int = 4_096
    hold_seconds: float = 600.0
    stall_seconds: float = 30.0
    template_seconds: float = 2.0
    special_in_content: Literal["refuse", "allow"] = "refuse"

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.endswith("_seconds"):
                _positive(each.name, value)
            elif each.name != "special_in_content" and (type(value) is not int or value < (least := 0 if each.name.endswith("_per_minute") else 1)):
                raise OptionsError(f"{each.name} is {value!r}; give a whole number of {least} or more")
        if self.special_in_content not in ("refuse", "allow"):
            raise OptionsError(f"special_in_content is {self.special_in_content!r}; give 'refuse' or 'allow'")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The server. Models may be deployed over HTTP from folders below `model_roots`, and with `allow_remote` from addresses. It listens on `host` and `port` (0: one that is free). Whoever gives one of `api_keys` is served; without any, everybody who
    reaches it is, so it listens on this machine only, and takes no request that came under another machine's name. While a
    stream waits for its first token it says so every `comment_seconds`. Told to end, it gives open requests `drain_seconds`.
    Raises OptionsError."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    comment_seconds: float = 1.0
    drain_seconds: float = 30.0
    model_roots: tuple[str, ...] = ()
    allow_remote: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port < 1 << 16:
            raise OptionsError(f"port is {self.port!r}; give a whole number from 0 (one that is free) to 65535")
        _positive("comment_seconds", self.comment_seconds)
        _positive("drain_seconds", self.drain_seconds)
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise OptionsError("an API key has fewer than 8 characters, or some that a header cannot carry; give at least 8 printable ASCII ones without spaces")
        if not self.api_keys and not is_loopback(self.host):
            raise OptionsError(f"{self.host} can be reached from other machines, and no API key is set; set SLLM_MINI_API_KEY, or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. A name counts only where it is `localhost`: others may lead anywhere."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionsError(f"{name} is {value!r}; give seconds, more than 0")
