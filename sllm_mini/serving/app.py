"""The server as an ASGI application: `make_app`. Imports FastAPI. Chapter 11."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from sllm_mini import __version__
from sllm_mini.cluster.api import Cluster
from sllm_mini.serving import admin, completions, dashboard, embeddings, models
from sllm_mini.serving.errors import ApiError
from sllm_mini.serving.gate import Gate
from sllm_mini.serving.options import ServeOptions
from sllm_mini.serving.state import State, state_of

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def make_app(cluster: Cluster, options: ServeOptions | None = None) -> tuple[Gate, State]:
    """What uvicorn runs, and what is to be closed after it. The cluster stays its owner's. Every answer but those of 200 is an error object."""
    options = options or ServeOptions()
    state = State(cluster, options)
    app = FastAPI(title="sllm_mini", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.sllm = state
    app.include_router(completions.router)
    app.include_router(embeddings.router)
    app.include_router(models.router)
    app.include_router(admin.router)
    app.include_router(dashboard.router)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _bug)
    return Gate(app, options, state.meter), state


async def _refused(http: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    state_of(http).meter.refused(error.code)
    return Response(error.body, error.status, error.headers)


async def _no_route(http: Request, error: Exception) -> Response:
    """What the framework itself refuses: 404 and 405."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 405:
        refused = ApiError(405, "method_not_allowed", "this address does not take that method")
    elif error.status_code == 404:
        refused = ApiError(404, "not_found", "there is nothing at this address; GET /openapi.json tells what there is")
    else:
        refused = ApiError(error.status_code, "invalid_value", str(error.detail))
    state_of(http).meter.refused(refused.code)
    headers = {**refused.headers, **(error.headers or {})}
    if error.status_code == 405:
        headers["allow"] = ", ".join(method for method in _METHODS if _is_taken(http, method))
    return Response(refused.body, refused.status, headers)


def _is_taken(http: Request, method: str) -> bool:
    """Whether any route is for this address and `method`: the framework names those of the first route only."""
    return any(route.matches({**http.scope, "method": method})[0] is Match.FULL for route in http.app.router.routes)


async def _bug(http: Request, error: Exception) -> Response:
    """On to the gate, which knows the request's name; else the framework would answer in its own words."""
    raise error
