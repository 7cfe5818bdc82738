"""Routes /v1/models, /v1/models/{name}, /health and /metrics: what is deployed, whether anybody would answer, and how it goes. None wakes a
model. Chapter 11."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sllm_mini.cluster.api import Deployment
from sllm_mini.errors import SllmError
from sllm_mini.serving.common_protocol import Wire, error_answers
from sllm_mini.serving.embeddings import HOW
from sllm_mini.serving.errors import ApiError, unknown_model
from sllm_mini.serving.state import State, state_of

router = APIRouter()


class Model(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    """When this server began."""
    owned_by: str = "sllm-mini"
    parent: str | None
    """The model that it is an adapter of."""
    nbytes: int
    """Of its weights, with those that it shares with its parent."""
    embeddings: str | None
    """How /v1/embeddings makes them; null where it does not."""


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Wire):
    status: Literal["ok"] = "ok"
    nodes_alive: int


@router.get("/v1/models", response_model=ModelList, responses=error_answers(401, 403, 405, 500))
async def list_models(http: Request) -> Response:
    """All that are deployed."""
    state = state_of(http)
    found = ModelList(data=[_model(each, state) for each in state.cluster.models()])
    return Response(found.model_dump_json(), media_type="application/json")


@router.get("/v1/models/{name:path}", response_model=Model, responses=error_answers(401, 403, 404, 405, 500))
async def one_model(http: Request, name: str) -> Response:
    """One of them. A name may hold a slash."""
    state = state_of(http)
    for each in state.cluster.models():
        if each.spec.name == name:
            return Response(_model(each, state).model_dump_json(), media_type="application/json")
    raise unknown_model(name)


@router.get("/health", response_model=Health, responses=error_answers(403, 405, 503))
async def health(http: Request) -> Response:
    """200 while a node lives."""
    state = state_of(http)
    try:
        alive = sum(node.alive for node in await state.aside(state.cluster.nodes))
    except SllmError as error:
        raise ApiError(503, "cannot_start", str(error), retry_after=5.0) from error
    if not alive:
        raise ApiError(503, "cannot_start", "no node is alive", retry_after=5.0)
    return Response(Health(nodes_alive=alive).model_dump_json(), media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse, responses=error_answers(401, 403, 405, 500, 503))
async def metrics(http: Request) -> Response:
    """In Prometheus' text format."""
    state = state_of(http)
    try:
        return Response(await state.aside(state.meter.text), media_type=CONTENT_TYPE_LATEST)
    except SllmError as error:
        raise ApiError(503, "shutting_down", str(error), retry_after=5.0) from error


def _model(deployment: Deployment, state: State) -> Model:
    return Model(id=deployment.spec.name, created=state.created, parent=deployment.base or None, nbytes=deployment.spec.nbytes, embeddings=HOW if state.cluster.embeds else None)
