"""Requests and answers of /v1/completions. Fields and their names are OpenAI's. Chapter 11."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sllm_mini.serving.chat_protocol import FinishReason
from sllm_mini.serving.common_protocol import Done, Request, Timing, Usage, Wire
from sllm_mini.serving.logprobs import TextLogprobs

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class CompletionRequest(Request):
    """`suffix`, a `best_of` above `n`, and `logprobs` with `echo` are refused."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    """Whether the answer begins with its prompt."""
    best_of: int | None = None
    suffix: Any = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """The answer tells how likely its tokens were, and so many of the likeliest each time."""


class TextChoice(Wire):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    sllm: Timing | Done | None = None


class TextCompletion(Wire):
    """An answer, and each event of a stream. `usage` is there where it was asked for or the answer is whole."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
