"""A request's body as one of our models, read once and strictly, or refused with an error object. Chapter 11."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from sllm_mini.serving.common_protocol import plain_schema
from sllm_mini.serving.errors import ApiError, invalid
from sllm_mini.serving.state import state_of

M = TypeVar("M", bound=BaseModel)


class DirectRoute(APIRoute):
    """Of an endpoint that takes the request alone and gives a response: it is called without the framework looking for what it
    depends on."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


async def read_body(http: Request, kind: type[M], fields: Collection[str] = (), *, empty: bool = False) -> M:
    """`fields` are the names that an error may show beside those of `kind`: no name is shown that only the client knows. With `empty`, no
    body at all is one that asks for nothing. Raises ApiError for what it cannot be."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "the body is to be JSON; send it with content-type: application/json")
    try:
        async with asyncio.timeout(state_of(http).limits.body_seconds):
            body = await http.body()
        return kind.model_validate_json(body or (b"{}" if empty else b""))
    except TimeoutError:
        raise ApiError(408, "request_timeout", "the body did not come in time") from None
    except ClientDisconnect:
        raise invalid("the body ended too early", code="invalid_json") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise invalid(f"the body is no JSON that can be read: {first['msg']:.200}", code="invalid_json") from None
        param = _path(first["loc"], {*kind.model_fields, *fields})
        raise invalid(f"{param or 'the body'}: {first['msg']:.300}", param) from None


def body_document(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Of the body, for the OpenAPI document of a route that calls `read_body`."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": plain_schema(model)}}}}


def _path(where: tuple[int | str, ...], fields: Collection[str]) -> str | None:
    """Where in the request: as far as names are ours."""
    known: list[str] = []
    for part in where:
        if isinstance(part, str) and part not in fields:
            break
        known.append(str(part))
    return ".".join(known) or None
