"""Requests and answers of /v1/chat/completions. Fields and their names are OpenAI's. Chapter 11."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sllm_mini.serving.common_protocol import Done, Request, Timing, Usage, Wire
from sllm_mini.serving.logprobs import ChatLogprobs

FinishReason = Literal["stop", "length"]


class Part(Wire):
    """A part of a message; only those of type "text" are taken."""

    type: str
    text: str | None = None


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    """Templates do not know OpenAI's "developer": it is "system" to them."""
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None


class ChatRequest(Request):
    """Fields from `tools` to `prediction` are refused where they ask for anything."""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    logprobs: bool | None = None
    """Whether the answer tells how likely its tokens were, and of `top_logprobs` of the likeliest each time."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Answer(Wire):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Wire):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    sllm: Timing | Done


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Wire):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    sllm: Timing | Done | None = None


class ChatChunk(Wire):
    """One event of a stream. `usage` is there where it was asked for: null but in the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
