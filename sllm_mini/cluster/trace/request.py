"""The words of a trace: a request, the label that says where it all comes from, and the two together.

Taught in chapter 08. A request costs some 100 bytes; a `Trace` costs what its requests cost, which is nothing while they
are read from a file or generated on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import msgspec

MAX_TOKENS = 1_000_000_000
"""More than any context; a larger figure in a file is a mistake."""
KINDS = ("synthetic", "recorded")


class TraceRequest(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """One request: at `arrival_seconds` after the trace begins somebody asks `model` to read and to generate so many tokens.

    Requests with the same `prefix` begin with the same text (a session, a system prompt). `duration_seconds` is set
    where work is measured in time and not in tokens, as in traces of functions: the run alone, without any start.
    Nothing is checked here, so that a simulator can make millions; `checked` does that.
    """

    arrival_seconds: float
    model: str
    input_tokens: int
    output_tokens: int
    prefix: str | None = None
    duration_seconds: float | None = None


class TraceLabel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a trace is: its name, what it was made from, and whether that is `synthetic` or `recorded`.

    `seed` is set where chance had a part. Raises ValueError for an empty or unprintable name or source, another kind, or
    a seed below 0 or beyond 63 bits.
    """

    name: str
    source: str
    kind: Literal["synthetic", "recorded"]
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in ("name", "source"):
            if not is_name(getattr(self, field)):
                raise ValueError(f"the {field} of a trace is {getattr(self, field)!r}; give printable text in one line")
        if self.kind not in KINDS:
            raise ValueError(f"a trace is of kind {self.kind!r}; say {' or '.join(KINDS)}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"a trace has the seed {self.seed}; give a whole number from 0 to 2^63 - 1")


class TraceError(ValueError):
    """A request that no trace may hold; the sentence says which and why."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A label and requests in order of arrival; iterate over it, as often as `requests` may be iterated over.

    `requests` is a sequence, or something that makes a new iterator each time: a file, a generator of this package. As
    safe from several threads as that is; every iterator of this package stands alone.
    """

    label: TraceLabel
    requests: Iterable[TraceRequest]

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)

    def hold(self) -> Trace:
        """The same trace with its requests in memory, checked. Raises TraceError for one that no trace may hold."""
        return replace(self, requests=tuple(checked(self.requests)))


@dataclass(frozen=True, slots=True)
class Again:
    """An iterable that calls `start` for each new iterator; how traces stream and can still be run twice."""

    start: Callable[[], Iterator[TraceRequest]]

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.start()


def is_name(text: object) -> bool:
    """Whether this may name a model, a prefix or a trace: printable, in one line, and something at all."""
    return isinstance(text, str) and text.isprintable() and text.strip() == text != ""


def checked(requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """The same requests, each looked at as it passes. Raises TraceError at the first that no trace may hold.

    Names are printable, numbers finite and not negative, tokens at most MAX_TOKENS, arrivals in order; equal ones are fine.
    """
    before = 0.0
    known: set[str] = set()  # a model's name is looked at once; there are few of them
    for number, request in enumerate(requests, 1):
        if request.model not in known:
            if not is_name(request.model):
                raise TraceError(f"request {number} asks for the model {request.model!r}; name it in printable text without spaces around it")
            known.add(request.model)
        if not 0 <= request.arrival_seconds < inf:
            raise TraceError(f"request {number} arrives at {request.arrival_seconds} s; count seconds from 0, the beginning of the trace")
        if request.arrival_seconds < before:
            raise TraceError(f"request {number} arrives at {request.arrival_seconds} s, after one at {before} s; sort the requests by arrival")
        before = request.arrival_seconds
        if not (0 <= request.input_tokens <= MAX_TOKENS and 0 <= request.output_tokens <= MAX_TOKENS):
            raise TraceError(f"request {number} has {request.input_tokens} input and {request.output_tokens} output tokens; give 0 to {MAX_TOKENS:,} of each")
        if request.prefix is not None and not is_name(request.prefix):
            raise TraceError(f"request {number} has the prefix {request.prefix!r}; name it in printable text, or leave it out")
        if request.duration_seconds is not None and not 0 <= request.duration_seconds < inf:
            raise TraceError(f"request {number} runs for {request.duration_seconds} s; give 0 or more, or leave it out")
        yield request
