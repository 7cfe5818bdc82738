"""Any request is answered with 200 or an error object, never 500 and never a traceback; what is a request is read exactly. Chapter 11."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import World, open_world

from sllm_mini.cluster.api import Deployment
from sllm_mini.control.messages import ModelSpec
from sllm_mini.serving.asking import asks_of, refuse_unsupported
from sllm_mini.serving.chat_protocol import ChatRequest
from sllm_mini.serving.common_protocol import duration
from sllm_mini.serving.errors import ApiError
from sllm_mini.serving.options import Limits, OptionsError, ServeOptions
from sllm_mini.serving.text_protocol import CompletionRequest
from sllm_mini.serving.texts import ModelText

MODEL = ModelText(Deployment(ModelSpec(name="a", nbytes=1), "nowhere"), None, 100, 50)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("protocol"), limits=Limits(output_tokens=40, body_nbytes=1 << 16), pace_seconds=0.0) as opened:
        assert opened.complete().status == opened.complete(model="b.2").status == 200  # both are up
        yield opened


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=12) | st.sampled_from(["a", "5m", "user", "1e999", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]), inner, max_size=3),
    max_leaves=6,
)
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["a", "b.2", "../../etc/passwd", ""]), "stream": st.booleans(), "n": st.integers(0, 9), "temperature": st.floats(-1, 3),
    "top_p": st.floats(0, 1), "seed": st.integers(-5, 1 << 65), "stop": st.sampled_from(["x", ["x", "y"], "", [], ["a"] * 5]), "max_tokens": st.integers(0, 60),
    "keep_alive": st.sampled_from([60, "5m", "later", 1e308]), "echo": st.booleans(), "stream_options": st.just({"include_usage": True}),
    "prompt": st.sampled_from(["Once", [5, 6], [[5], [6, 7]], ["a", "b"], [4000], [-1], [[]], [1.5]]),
    "messages": st.sampled_from([[{"role": "user", "content": "Hi"}], [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]]),
    "tools": st.just([{"type": "function"}]), "logprobs": st.sampled_from([True, 3]), "top_logprobs": st.integers(-1, 21), "repetition_penalty": st.floats(0, 4), "top_k": st.integers(-1, 9),
}  # fmt: skip
"""Mostly what fits, so that many of them get through."""


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    body = {"model": "a", "prompt": "Once", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for name in draw(st.lists(st.sampled_from(sorted(PLAIN)), max_size=4, unique=True)):
        body[name] = draw(PLAIN[name] if draw(st.integers(0, 2)) else ANYTHING)
    for name in draw(st.lists(st.sampled_from(["prompt", "messages", "model", "max_tokens"]), max_size=1)):
        body.pop(name, None)
    return body


@settings(max_examples=150)
@given(bodies(), st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_any_body_is_answered_or_refused_with_an_error_object(world: World, body: dict[str, Any], path: str) -> None:
    reply = world.send("POST", path, body)
    assert reply.status in (200, 400, 404), (body, reply)
    if reply.status != 200:
        assert reply.code
    elif body.get("stream"):
        assert reply.events[-1] == "[DONE]" and not any("error" in each for each in reply.events[:-1]), (body, reply)
    else:
        assert reply.document["choices"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_json"), (b"{", "invalid_json"), (b"\xff\xfe", "invalid_json"), (b"[" * 10_000 + b"]" * 10_000, "invalid_json"), (b'{"model": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_value"), (b"null", "invalid_value"), (b'"a"', "invalid_value"), (b"{}", "invalid_value"),
        (b'{"model": "a", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "invalid_json"), (b'{"model": "a", "prompt": "x", "max_tokens": ' + b"9" * 500 + b"}", "invalid_value"), (b'{"model": "a", "prompt": "x", "temperature": NaN}', "invalid_value"),
        (b'{"model": "a", "prompt": "x", "temperature": 1e999}', "invalid_value"), (b'{"model": "a", "prompt": "x", "temperature": "1"}', "invalid_value"),
        (b'{"model": "a", "prompt": "x", "n": true}', "invalid_value"), (b'{"model": "a", "prompt": "x", "stream": 1}', "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_said_to_be_none(world: World, data: bytes, code: str) -> None:
    reply = world.send("POST", "/v1/completions", data)
    assert (reply.status, reply.code) == (400, code), reply


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"n": 9}, "n"), ({"stop": ["a"] * 5}, "stop"), ({"temperature": -1}, "temperature"), ({"keep_alive": "soon"}, "keep_alive"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"), ({"stream_options": {}}, "stream_options"), ({"prompt": [5000]}, "prompt"),
        ({"prompt": {"secret": 1}}, "prompt"), ({"max_tokens": 41}, "max_tokens"), ({"prompt": ["x"] * 33}, "prompt"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_shows_nothing_of_the_client(world: World, body: dict[str, Any], param: str) -> None:
    reply = world.complete(**body)
    assert (reply.status, reply.code) == (400, "invalid_value")
    assert reply.document["error"]["param"] == param and "secret" not in reply.body.decode()


@pytest.mark.parametrize(
    "field",
    [{"tools": [{}]}, {"tool_choice": "required"}, {"functions": [{}]}, {"response_format": {"type": "json_object"}}, {"logit_bias": {"5": 1}},
     {"frequency_penalty": 0.5}, {"presence_penalty": -1}, {"audio": {}}, {"modalities": ["audio"]}, {"prediction": {}}],
)  # fmt: skip
def test_what_would_change_the_answer_and_is_not_there_is_refused_by_its_name(world: World, field: dict[str, Any]) -> None:
    reply = world.chat(**field)
    assert (reply.status, reply.code, reply.document["error"]["param"]) == (400, "unsupported_value", *field)


def test_values_that_ask_for_nothing_are_taken() -> None:
    request = ChatRequest(
        model="a", messages=[], tools=[], tool_choice="auto", response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False, n=1
    )
    refuse_unsupported(request)
    refuse_unsupported(CompletionRequest(model="a", prompt="x", best_of=2, n=2, suffix=""))
    with pytest.raises(ApiError, match="best_of"):
        refuse_unsupported(CompletionRequest(model="a", prompt="x", best_of=2))
    with pytest.raises(ApiError, match="logprobs with echo"):
        refuse_unsupported(CompletionRequest(model="a", prompt="x", logprobs=0, echo=True))


def test_asks_are_prompts_times_choices_with_seeds_of_their_own() -> None:
    request = CompletionRequest(model="a", prompt="x", n=2, seed=-1, temperature=1e-9, stop="s", max_tokens=5, keep_alive="1m30s")
    asked = asks_of(request, MODEL, [[1, 2], [3]], Limits(), "cmpl-x", lambda: 7)
    assert [(each.request_id, list(each.prompt), each.sampling.seed, each.max_new_tokens) for each in asked.asks] == [
        ("cmpl-x-0", [1, 2], (1 << 64) - 1, 5), ("cmpl-x-1", [1, 2], 0, 5), ("cmpl-x-2", [3], 1, 5), ("cmpl-x-3", [3], 2, 5)
    ]  # fmt: skip
    assert {(each.sampling.temperature, each.stop, each.keep_alive) for each in asked.asks} == {(0.0, ("s",), 90.0)} and asked.prompt_tokens == 3
    assert asked.asks[0].prefix == asked.asks[1].prefix != asked.asks[2].prefix
    drawn = asks_of(CompletionRequest(model="a", prompt="x"), MODEL, [[1]], Limits(), "c", lambda: 7).asks[0]
    assert (drawn.sampling.seed, drawn.sampling.temperature, drawn.max_new_tokens, drawn.keep_alive) == (7, 1.0, 16, None)


@pytest.mark.parametrize(("prompt", "wanted", "given"), [(99, None, 1), (98, 2, 2), (90, None, 10), (80, None, 16), (100, None, None), (99, 2, None), (101, 1, None)])
def test_a_context_is_filled_and_not_overfilled(prompt: int, wanted: int | None, given: int | None) -> None:
    request = CompletionRequest(model="a", prompt="x", max_tokens=wanted)
    if given is None:
        with pytest.raises(ApiError, match="holds 100 tokens") as error:
            asks_of(request, MODEL, [[1] * prompt], Limits(), "c", lambda: 0)
        assert error.value.code == "context_length_exceeded"
    else:
        assert asks_of(request, MODEL, [[1] * prompt], Limits(), "c", lambda: 0).asks[0].max_new_tokens == given


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(5, 5.0), (0, 0.0), (-1, -1.0), (-0.5, -1.0), ("0", 0.0), ("-1", -1.0), ("300ms", 0.3), ("5m", 300.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("-2m", -1.0), (None, None), (" 10 ", 10.0)],
)
def test_a_keep_alive_is_read_as_ollama_reads_it(text: float | str | None, seconds: float | None) -> None:
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "nan", "inf", math.inf, math.nan, "1e999", "5m3", "٣m", "9" * 400 + "h"])
def test_a_keep_alive_that_is_no_time_is_refused(text: float | str) -> None:
    with pytest.raises(ValueError, match="keep_alive"):
        duration(text)


@pytest.mark.parametrize(
    "options",
    [{"host": "0.0.0.0"}, {"host": "example.org"}, {"host": "::"}, {"port": -1}, {"port": 1 << 16}, {"api_keys": ("short",)}, {"api_keys": ("with a space",)}, {"comment_seconds": 0}, {"drain_seconds": math.nan}],
)  # fmt: skip
def test_a_server_that_must_not_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError):
        ServeOptions(**options)
    assert "0123456789" not in repr(ServeOptions(host="0.0.0.0", api_keys=("0123456789",)))
    with pytest.raises(OptionsError):
        Limits(body_nbytes=0)


def test_the_document_of_the_api_has_every_route_and_its_errors(world: World) -> None:
    document = json.loads(world.send("GET", "/openapi.json").body)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health", "/metrics", "/admin/ps", "/admin/models/{name}"} <= set(document["paths"])
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "404", "429", "503"} <= set(chat["responses"])
    assert chat["requestBody"]["content"]["application/json"]["schema"]["required"] == ["model", "messages"] and "$defs" not in json.dumps(document)


def test_nobody_pays_for_the_server_who_does_not_serve() -> None:
    code = "import sys, sllm_mini, sllm_mini.cluster.api, sllm_mini.serving, sllm_mini.cli.main; print({'fastapi', 'starlette', 'uvicorn', 'pydantic', 'openai', 'jinja2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
