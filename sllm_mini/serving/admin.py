"""Routes /admin/*: what runs, and how models are deployed, changed, loaded, put away and deleted while the server runs. Chapter 11.

Whoever may ask for a text may do this too: the key is the same. What takes its time is done in a few threads of its own; a client that
goes away does not undo it. A body is always of type application/json, which no page of another site can send unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel

from sllm_mini.cluster.api import Deployment, RefusedError
from sllm_mini.errors import (
    CheckpointError,
    InUseError,
    LoadError,
    ModelError,
    RemoteError,
    SllmError,
    StoreError,
    UnsupportedError,
    WriteError,
)
from sllm_mini.serving.common_protocol import duration, error_answers
from sllm_mini.serving.deployments import (
    Deleted,
    DeployRequest,
    LoadRequest,
    ModelStatus,
    PinRequest,
    RequestStatus,
    Status,
    UnloadRequest,
    check_room,
    deployment_of,
    request_status,
    status_of,
)
from sllm_mini.serving.errors import ApiError, invalid, of_submit, unknown_model
from sllm_mini.serving.options import MODEL_NAME
from sllm_mini.serving.preload import preload
from sllm_mini.serving.reading import body_document, read_body
from sllm_mini.serving.relay import until_gone
from sllm_mini.serving.state import State, state_of
from sllm_mini.types import Warmth

T = TypeVar("T")
Name = Annotated[str, Path(description="Of a model.", json_schema_extra={"pattern": f"^{MODEL_NAME}$"})]

router = APIRouter(prefix="/admin")
_READ, _ABOUT_ONE = (401, 403, 405, 429, 500, 503), (401, 403, 404, 405, 429, 500, 503)
_WRITE = (400, *_ABOUT_ONE, 408, 409, 413, 415)


@router.get("/ps", response_model=Status, responses=error_answers(*_READ))
async def ps(http: Request) -> Response:
    """Models, instances and nodes, as they are now. Wakes nothing."""
    state = state_of(http)
    return _json(await _asked(state.aside, partial(status_of, state.cluster)))


@router.put("/models/{name}", response_model=ModelStatus, openapi_extra=body_document(DeployRequest), responses={201: {"model": ModelStatus, "description": "It is new."}, **error_answers(*_WRITE, 507)})
async def deploy(http: Request, name: Name) -> Response:
    """Deploys a model, or changes how it is deployed; answers when every node knows it."""
    state, request = state_of(http), await read_body(http, DeployRequest)
    known = _known(state)
    await _change(state, name, lambda: deployment_of(name, request, known, state.options))
    return await _model(state, name, 200 if name in known else 201)


@router.delete("/models/{name}", status_code=202, response_model=Deleted, responses=error_answers(*_ABOUT_ONE, 409))
async def delete(http: Request, name: Name) -> Response:
    """Takes no more requests for it; those that it has are run to their end. Refused while adapters of it are deployed."""
    state = state_of(http)
    _deployed(state, name)
    await _asked(state.managed, lambda: state.cluster.delete(name))
    return _json(Deleted(id=name), 202)


@router.post("/models/{name}/load", response_model=ModelStatus, openapi_extra=body_document(LoadRequest, required=False), responses=error_answers(*_WRITE))
async def load(http: Request, name: Name) -> Response:
    """Warms an instance of it; answers when it is that warm."""
    state, request = state_of(http), await read_body(http, LoadRequest, empty=True)
    _deployed(state, name)
    seconds = _seconds(request.keep_alive)
    if seconds == 0:
        raise invalid("keep_alive is 0, by which it would end at once; give a time, or ask for its unload", "keep_alive")
    if await until_gone(http.receive, preload(state, name, seconds, Warmth[request.warmth.upper()])) is None:
        return Response(status_code=499)  # nobody reads it
    return await _model(state, name)


@router.post("/models/{name}/unload", response_model=ModelStatus, openapi_extra=body_document(UnloadRequest, required=False), responses=error_answers(*_WRITE))
async def unload(http: Request, name: Name) -> Response:
    """Ends its idle instances but for those that are pinned; what stores hold stays there."""
    state, _ = state_of(http), await read_body(http, UnloadRequest, empty=True)
    _deployed(state, name)
    await _asked(state.managed, lambda: state.cluster.unload(name))
    return await _model(state, name)


@router.post("/models/{name}/pin", response_model=ModelStatus, openapi_extra=body_document(PinRequest, required=False), responses=error_answers(*_WRITE, 507))
async def pin(http: Request, name: Name) -> Response:
    """So many of its instances always stay, and its weights in a tier of each node's store; 0 and "none" take that back."""
    state, request = state_of(http), await read_body(http, PinRequest, empty=True)
    _deployed(state, name)
    least = 1 if request.min_instances is None and request.tier is None else request.min_instances
    wanted = DeployRequest(min_instances=least, tier=request.tier)
    await _change(state, name, lambda: deployment_of(name, wanted, _known(state), state.options))
    return await _model(state, name)


@router.get("/requests/{request_id}", response_model=RequestStatus, responses=error_answers(*_ABOUT_ONE))
async def request(http: Request, request_id: str) -> Response:
    """How far a request has come, by the `request_id` of its `sllm` object. Forgotten some time after its end."""
    try:
        return _json(request_status(state_of(http).cluster.stream(request_id).report))
    except ModelError:
        raise ApiError(404, "request_not_found", f"there is no request {request_id!a:.80}; it was never taken, or is over and forgotten", param="request_id") from None


async def _change(state: State, name: str, make: Callable[[], Deployment]) -> None:
    if name in state.changing:
        raise ApiError(409, "in_use", f"{name} is being deployed or changed by another request; ask again when that is done", param="name", retry_after=1.0)

    def work() -> None:
        deployment = make()
        check_room(deployment, state.cluster.nodes())
        state.cluster.deploy(deployment)

    state.changing.add(name)
    try:
        await _asked(state.managed, work)
    finally:
        state.changing.discard(name)


async def _asked(where: Callable[[Callable[[], T]], Any], work: Callable[[], T]) -> T:
    """What the cluster answers. Raises ApiError for what it refuses."""
    try:
        return await where(work)
    except StoreError as error:
        raise ApiError(409, "in_use", str(error), retry_after=5.0) from error
    except InUseError as error:
        raise ApiError(409, "in_use", str(error)) from error
    except WriteError as error:
        raise ApiError(507, "out_of_space", str(error)) from error
    except (CheckpointError, LoadError, RemoteError, ModelError, UnsupportedError) as error:
        raise invalid(str(error), "source") from error
    except (ApiError, RefusedError, ValueError) as error:
        raise of_submit(error) from error
    except SllmError as error:
        raise ApiError(503, "not_now", str(error), retry_after=5.0) from error


def _known(state: State) -> dict[str, Deployment]:
    return {each.spec.name: each for each in state.cluster.models()}


def _deployed(state: State, name: str) -> None:
    if name not in _known(state):
        raise unknown_model(name)


async def _model(state: State, name: str, status: int = 200) -> Response:
    found = next((each for each in (await _asked(state.aside, partial(status_of, state.cluster))).models if each.name == name), None)
    if found is None:  # deleted meanwhile
        raise unknown_model(name)
    return _json(found, status)


def _seconds(keep_alive: float | str | None) -> float | None:
    try:
        return duration(keep_alive)
    except ValueError as error:
        raise invalid(str(error), "keep_alive") from None


def _json(document: BaseModel, status: int = 200) -> Response:
    return Response(document.model_dump_json(), status, media_type="application/json")
