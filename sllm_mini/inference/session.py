"""The state of one request as one object: all that another engine of the same weights needs to go on with it.

Tokens, how they are chosen and how far the reader has come. What follows from the tokens is not in it: the penalty's
history, the state of the detokenizer, the random generator (a function of seed and position) are rebuilt. Keys and
values travel beside it or are computed again. Costs a few bytes a token. Read strictly, nothing is unpickled. Taught
in chapter 07.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from sllm_mini.errors import FormatError
from sllm_mini.inference.sampler import COUNT_LIMIT, SamplingOptions
from sllm_mini.wire.message import Message, decoder

VERSION = 2
"""2: with `logprobs` and `embed`. Bytes of version 1 are read as of a request that asks for neither."""
MAX_LOGPROBS = 20
_MAGIC = b"sllm-session"
_NAME_NCHARS, _TEXT_NCHARS = 200, 1 << 16
_Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_LIMIT)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Name = Annotated[str, msgspec.Meta(max_length=_NAME_NCHARS)]
_Text = Annotated[str, msgspec.Meta(max_length=_TEXT_NCHARS)]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds; the consumer's own time between two tokens is in none of them
    but `first_token_seconds`, which counts from the request to the first token. In a batch every request counts the
    whole step. `queue_seconds` ends where the prefill starts, `load_seconds` is the part of the prefill that waited for
    weights and is not in `prefill_seconds`."""

    tokenize_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_steps: int = 0
    queue_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a decode step, 0 where there was none."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else 0.0


class _Sampling(Message, frozen=True):
    temperature: float
    top_k: _Count
    top_p: float
    seed: Annotated[int, msgspec.Meta(ge=0)]
    repetition_penalty: float


class _Timings(Message, frozen=True):
    tokenize_seconds: _Seconds
    prefill_seconds: _Seconds
    decode_seconds: _Seconds
    first_token_seconds: _Seconds
    decode_steps: _Count
    queue_seconds: _Seconds
    load_seconds: _Seconds


_S = TypeVar("_S", _Sampling, _Timings)


class _State(Message, frozen=True, tag="Session"):
    request_id: _Name
    model: _Name
    token_ids: tuple[_Token, ...]
    prompt_length: _Count
    max_new_tokens: _Count
    sampling: _Sampling
    stop: tuple[_Text, ...]
    stop_at_eos: bool
    emitted_text_nchars: _Count
    held_text: _Text | None
    timings: _Timings
    elapsed_seconds: _Seconds
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    embed: bool = False


def request_problem(
    request_id: str, max_new_tokens: int, sampling: SamplingOptions, stop: Sequence[str], stop_at_eos: bool, logprobs: int | None = None, embed: bool = False,
) -> str | None:  # fmt: skip
    """Why no request can be asked for like this, in one sentence; None if it can. What is asked for must fit into a session's
    bytes, or a request that runs could not move. Thread-safe."""
    if not _is_text(request_id, _NAME_NCHARS):
        return f"request_id is {request_id!r:.60}; it must be a text of 1 to {_NAME_NCHARS} characters, in valid Unicode"
    if type(max_new_tokens) is not int or not 1 <= max_new_tokens <= COUNT_LIMIT:
        return f"max_new_tokens is {max_new_tokens!r:.60}; it must be at least 1, and a whole number of at most {COUNT_LIMIT:,}"
    if not isinstance(sampling, SamplingOptions):
        return f"sampling is {sampling!r:.60}; it must be a SamplingOptions (SamplingOptions() is greedy)"
    for text in stop:
        if text == "":
            return "a stop string is empty; give at least one character, or leave it out"
        if not _is_text(text, _TEXT_NCHARS):
            return f"a stop string is {text!r:.60}; it must be a text of 1 to {_TEXT_NCHARS:,} characters, in valid Unicode, or be left out"
    if not isinstance(stop_at_eos, bool):
        return f"stop_at_eos is {stop_at_eos!r:.60}; it must be True or False"
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MAX_LOGPROBS):
        return f"logprobs is {logprobs!r:.60}; it must be None, or how many of the likeliest tokens to tell of, at most {MAX_LOGPROBS}"
    if not isinstance(embed, bool):
        return f"embed is {embed!r:.60}; it must be True or False"
    if embed and (max_new_tokens != 1 or len(stop) or logprobs is not None):
        return "an embedding is one token without a text; ask for max_new_tokens 1, no stop strings and no logprobs"
    return None


def _is_text(value: object, nchars: int) -> bool:
    try:
        return isinstance(value, str) and 0 < len(value) <= nchars and bool(value.encode())
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class Session:
    """One request between two steps. `token_ids` is the sequence so far, prompt included; a cache that belongs to it
    holds one token fewer. `model` names the weights. `emitted_text_nchars` counts the characters given out,
    `held_text` is what a stop string holds back (None: whoever made this does not know; it is rebuilt). Clocks do not
    travel, so `elapsed_seconds` says how long ago the request came. With `logprobs` each token comes with the logarithm of
    its probability and with so many of the likeliest; with `embed` its only one comes with the prompt's embedding. Raises
    ValueError for what no request can be in.
    """

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    prompt_length: int
    max_new_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    emitted_text_nchars: int = 0
    held_text: str | None = ""
    timings: Timings = field(default_factory=Timings)
    elapsed_seconds: float = 0.0
    logprobs: int | None = None
    embed: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        if self.version != VERSION:
            return f"the session has version {self.version}; this release makes version {VERSION}"
        problem = request_problem(self.request_id, self.max_new_tokens, self.sampling, self.stop, self.stop_at_eos, self.logprobs, self.embed)
        if problem:
            return f"the session is of no request: {problem}"
        if not 1 <= self.prompt_length <= len(self.token_ids):
            return f"the session's prompt has {self.prompt_length} of its {len(self.token_ids)} tokens; it must have at least 1 and at most all of them"
        if self.remaining_tokens < 0:
            return f"the session has {len(self.new_ids)} new tokens of at most {self.max_new_tokens}; the limit must not be passed"
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not math.isfinite(getattr(self.sampling, name)):
                return f"the session's {name} is not a finite number"
        seconds = [self.elapsed_seconds, *(getattr(self.timings, name) for name in _Timings.__struct_fields__)]
        if not all(math.isfinite(value) and value >= 0 for value in seconds):
            return "a time of the session is not a number of seconds"
        return None

    @property
    def remaining_tokens(self) -> int:
        """How many more may come."""
        return self.max_new_tokens - (len(self.token_ids) - self.prompt_length)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return self.token_ids[self.prompt_length :]

    def to_bytes(self) -> bytes:
        """A fixed beginning, the version, then MessagePack: the same bytes for equal sessions. Raises ValueError for
        values that the format has no room for."""
        try:
            state = _State(
                self.request_id, self.model, self.token_ids, self.prompt_length, self.max_new_tokens, _copied(_Sampling, self.sampling), self.stop, self.stop_at_eos,
                self.emitted_text_nchars, self.held_text, _copied(_Timings, self.timings), self.elapsed_seconds, self.logprobs, self.embed,
            )  # fmt: skip
            encoded = _MAGIC + bytes([self.version]) + msgspec.msgpack.encode(state)
            decoder(_State).decode(encoded[len(_MAGIC) + 1 :])  # all else a session checked when it was made
        except (UnicodeEncodeError, OverflowError) as error:
            raise ValueError(f"the session cannot be written ({error}); its texts must be valid Unicode and its numbers below 2^64") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the session cannot be written: {' '.join(str(error).split())[:300]}") from error
        return encoded

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview) -> Session:
        """The session that `to_bytes` wrote. Raises FormatError for any other bytes, and for what are none."""
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise FormatError(f"a session is read from bytes and this is of type {type(raw).__name__}; give what Session.to_bytes wrote")
        raw = bytes(raw)
        head = len(_MAGIC)
        if raw[:head] != _MAGIC or len(raw) <= head:
            raise FormatError("these bytes are not a session; give what Session.to_bytes wrote")
        if not 1 <= raw[head] <= VERSION:
            raise FormatError(f"the session has version {raw[head]}; this release reads versions 1 to {VERSION}")
        try:
            state = decoder(_State).decode(raw[head + 1 :])
            values = {name: getattr(state, name) for name in _State.__struct_fields__}
            values |= {"sampling": SamplingOptions(**msgspec.structs.asdict(state.sampling)), "timings": Timings(**msgspec.structs.asdict(state.timings))}
            return cls(**values)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise FormatError(f"the session cannot be read: {' '.join(str(error).split())[:300]}") from error


def _copied(kind: type[_S], values: object) -> _S:
    """Field by field: `to_bytes` takes 8 us so, and 64 by way of dictionaries, twice before a first token."""
    return kind(*[getattr(values, name) for name in kind.__struct_fields__])
