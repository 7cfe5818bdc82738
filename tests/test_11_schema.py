"""The server keeps what its own OpenAPI document promises: requests made from it, right ones and wrong ones, are answered with statuses,
types and bodies that stand in it, never with a bug, and what it does not allow is refused. Chapter 11."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from serving_world import World, open_world

from sllm_mini.serving.options import Limits

_OPERATIONS = [
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}", "GET /admin/ps",
    "GET /admin/requests/{request_id}", "POST /admin/models/{name}/load", "POST /admin/models/{name}/pin", "POST /admin/models/{name}/unload", "PUT /admin/models/{name}", "DELETE /admin/models/{name}",
]  # fmt: skip
_UNFAIR = ("positive_data_acceptance", "not_a_server_error", "use_after_free", "ensure_resource_availability")
"""Not asked for: limits, and fields that OpenAI has and we refuse, are not in the document; 503 and 507 are, and 500 is looked for apart; a
deleted model stays until its requests are over."""
_REFUSED = ("tools", "tool_choice", "functions", "function_call", "response_format", "modalities", "audio", "prediction", "frequency_penalty", "presence_penalty", "logit_bias", "suffix", "best_of", "top_logprobs")
_MOST = {"max_tokens": 16, "max_completion_tokens": 16, "n": 2}
_SERVED, _MANAGED = "served", "managed"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("schema"), limits=Limits(hold_seconds=2.0), pace_seconds=0.0, names=(_SERVED, _MANAGED)) as opened:
        yield opened


@pytest.fixture(scope="module")
def operations(world: World) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{world.server.url}/openapi.json")
    found: list[Any] = [each.ok() for each in schema.get_all_operations()]  # type: ignore[union-attr]
    return {each.label: each for each in found}


def _eased(value: Any) -> Any:
    """1.0 is a whole number to JSON schema and none to us."""
    if isinstance(value, dict):
        return {name: _eased(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_eased(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _deeper(body: dict[str, Any]) -> dict[str, Any]:
    """A right request to /v1 without what is refused whatever else it asks, and small enough to be waited for; about half ask for a stream."""
    body = {name: each for name, each in _eased(body).items() if name not in _REFUSED}
    body["stream"] = len(body) % 2 == 1
    if not body["stream"]:
        body.pop("stream_options", None)
    for message in body.get("messages", ()):
        message.pop("tool_calls", None)
        message["content"] = message.get("content") or "Hello"
    return {name: min(each, most) if type(each) is int and (most := _MOST.get(name)) else each for name, each in body.items()}


def _check(operation: Any, examples: int) -> None:
    """Asks `operation` for right and, where a request can be one, for wrong things. A text where a model's name stands becomes one that is
    deployed, so that the request goes on from there."""
    unfair = [each for name in _UNFAIR for each in CHECKS.get_by_names([name])]

    def check(case: Any, right: bool) -> None:
        if isinstance(case.body, dict) and operation.path.startswith("/v1/"):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = _SERVED
            if right:
                case.body = _deeper(case.body)
        if operation.path.startswith("/admin/models/") and operation.method != "delete" and right:
            case.path_parameters["name"] = _MANAGED
        answer = case.call_and_validate(excluded_checks=unfair, timeout=60)
        assert answer.status_code != 500, answer.text

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if operation.method != "get" else (GenerationMode.POSITIVE,):
        example = given(case=operation.as_strategy(generation_mode=mode), right=st.just(mode is GenerationMode.POSITIVE))
        settings(max_examples=examples, suppress_health_check=list(HealthCheck))(example(check))()


def test_the_document_has_these_operations(operations: dict[str, Any]) -> None:
    """And no other: each of them is asked below."""
    assert sorted(operations) == sorted(_OPERATIONS)


@pytest.mark.parametrize("label", _OPERATIONS)
def test_answers_are_as_the_document_has_them(operations: dict[str, Any], label: str) -> None:
    _check(operations[label], 5)


@pytest.mark.slow
@pytest.mark.parametrize("label", _OPERATIONS)
def test_answers_are_as_the_document_has_them_long(operations: dict[str, Any], label: str) -> None:
    _check(operations[label], 30)


def test_a_method_that_is_not_there_names_all_that_are(world: World, operations: dict[str, Any]) -> None:
    """Also where several routes share a path."""
    for label in operations:
        path = label.partition(" ")[2]
        reply = world.send("PATCH", path.replace("{name}", _SERVED).replace("{request_id}", "r"))
        assert reply.code == "method_not_allowed" and reply.status == 405
        assert set(reply.headers["allow"].split(", ")) == {other.partition(" ")[0] for other in operations if other.partition(" ")[2] == path}
