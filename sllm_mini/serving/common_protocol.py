"""What requests and answers of both endpoints share: usage, timing, how long a model is kept, when to stop. Chapter 11.

Requests are read strictly (a number is no text, NaN no number); a field that is not known is ignored, as OpenAI's own server does
with what its clients add.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d{1,12}(?:\.\d{1,12})?)(ms|s|m|h)"
_MOST_STOPS, _LONGEST_STOP = 4, 256


class Wire(BaseModel):
    """What all of them are: strict, and deaf to what they do not know."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True, protected_namespaces=())


class StreamOptions(Wire):
    include_usage: bool | None = None
    """Ends the stream with a chunk that has `usage` and no choice."""


StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class Request(Wire):
    """What both endpoints read. `keep_alive`, `top_k` and `repetition_penalty` are this server's own."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_MOST_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    keep_alive: float | str | None = None
    """For how long the model stays when idle from now on: seconds, "5m", "1h30m", 0 (not at all), -1 (for good), as Ollama has it."""
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        return cls(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens)


class Timing(Wire):
    """Where the time of one choice went: a field of ours, `sllm`, of each choice. `rung` is how warm the start was that it waited for, `tier`
    where that read the weights; seconds that there were none of are null."""

    request_id: str
    rung: str
    tier: str | None
    queue_seconds: float | None
    load_seconds: float
    prefill_seconds: float | None
    decode_seconds: float | None
    migrations: int
    restarts: int


class Done(Wire):
    """`sllm` of an answer to an empty prompt: what became of the model instead ("load" or "unload")."""

    done_reason: str


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Wire):
    """What is answered instead, with any status but 200."""

    error: ErrorBody


def duration(value: float | str | None) -> float | None:
    """Seconds of a `keep_alive`: a number, or a text as Go writes durations ("300ms", "5m", "1h30m", "-1"). Below 0 is for good.
    Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
            if re.fullmatch(f"(?:{_PART})+", rest, re.ASCII) is None:
                raise ValueError(f"keep_alive is {value!a:.40}; give seconds, or a text such as '5m', '1h30m', '0' or '-1'") from None
            seconds = sign * math.fsum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, rest, re.ASCII))
    else:
        seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"keep_alive is {value!a:.40}; give a time that can be counted, or -1 to keep the model for good")
    return -1.0 if seconds < 0 else seconds


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document of a route: it may answer with these, each an error object."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def plain_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Its JSON schema with each definition where it is used, since a reference would point at the whole document's root."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(each) for each in part]
        if not isinstance(part, dict):
            return part
        reference = part.get("$ref")
        return resolved(definitions[reference.rpartition("/")[2]]) if isinstance(reference, str) else {name: resolved(each) for name, each in part.items()}

    return {name: resolved(part) for name, part in schema.items()}
