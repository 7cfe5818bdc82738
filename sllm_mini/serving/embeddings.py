"""Route /v1/embeddings: texts as vectors of length 1, so that their product says how alike they are. Chapter 11.

A decoder that was trained to write has no embeddings of its own: these are the mean of its last hidden states, which a model trained to
embed surpasses. A request costs one pass over its prompt, waits and starts its model as any other, and shares passes with others.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from sllm_mini.serving.answers import Written
from sllm_mini.serving.asking import embedding_asks, keep_alive_of
from sllm_mini.serving.common_protocol import Usage, Wire, error_answers
from sllm_mini.serving.completions import answer_whole, encode_text, find_model
from sllm_mini.serving.errors import invalid
from sllm_mini.serving.reading import DirectRoute, body_document, read_body
from sllm_mini.serving.state import state_of
from sllm_mini.serving.text_protocol import TokenId

HOW = "mean of last hidden states"
router = APIRouter(route_class=DirectRoute)


class EmbeddingRequest(Wire):
    """`keep_alive` is this server's own."""

    model: str
    input: str | list[TokenId] | list[str] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers where nothing is said."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """So many numbers from the beginning, of length 1 again."""
    keep_alive: float | str | None = None


class Embedding(Wire):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """A text is the base64 of little-endian float32."""


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Wire):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """See `answers.WholeFormat`. Raises ApiError(400) where there are fewer than `dimensions`."""

    model: str
    base64: bool
    dimensions: int | None

    def whole(self, choices: Sequence[Written], usage: Usage) -> str:
        made = [Embedding(index=index, embedding=self._vector(each.pieces[0].vector or b"")) for index, each in enumerate(choices)]
        tokens = usage.prompt_tokens
        return EmbeddingList(data=made, model=self.model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)).model_dump_json()

    def _vector(self, raw: bytes) -> list[float] | str:
        import numpy as np

        vector = np.frombuffer(raw, "<f4")
        if self.dimensions is not None:
            if self.dimensions > len(vector):
                raise invalid(f"dimensions is {self.dimensions}; the embeddings of {self.model} have {len(vector)}", "dimensions")
            vector = vector[: self.dimensions]
            vector = vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12))
        return base64.b64encode(vector.tobytes()).decode() if self.base64 else [float(value) for value in vector]


def _inputs(given: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    """One, or several."""
    if isinstance(given, str):
        return [given]
    ids = [each for each in given if isinstance(each, int)]
    return [ids] if ids else [each for each in given if not isinstance(each, int)]


@router.post(
    "/v1/embeddings", response_model=EmbeddingList, responses=error_answers(400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503), openapi_extra=body_document(EmbeddingRequest)
)
async def embeddings(http: Request) -> Response:
    """One for each text, in order."""
    state, request = state_of(http), await read_body(http, EmbeddingRequest)
    model = await find_model(state, request.model)
    given = _inputs(request.input)
    if not 0 < len(given) <= state.limits.prompts:
        raise invalid(f"there are {len(given)} inputs; 1 to {state.limits.prompts} are taken", "input")
    if "" in given:
        raise invalid("an input is empty; give at least one character", "input")
    prompts = [await encode_text(state, model, each, special=True) if isinstance(each, str) else each for each in given]
    asked = embedding_asks(model, prompts, keep_alive_of(request.keep_alive), f"embd-{secrets.token_hex(12)}")
    return await answer_whole(http, state, asked, EmbeddingAnswer(model.name, request.encoding_format == "base64", request.dimensions))
