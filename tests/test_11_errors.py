"""Refusals are error objects with codes that are texts; keys, hosts and sizes are checked before anything is read. Chapter 11."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_world import KEY, World, open_world

from sllm_mini.cluster.api import RefusedError, RequestReport
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.serving.errors import ApiError, of_report, of_submit, unknown_model
from sllm_mini.serving.options import Limits, OptionsError, ServeOptions
from sllm_mini.serving.server import Server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("errors"), limits=Limits(body_nbytes=2000, open_requests=4)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RefusedError(404, "no model"), 404, "model_not_found"), (RefusedError(429, "too many", 3.2), 429, "queue_full"), (RefusedError(503, "so many wait", 2.0), 503, "overloaded"),
        (RefusedError(500, "failed"), 500, "request_failed"), (ValueError("no"), 400, "invalid_value"), (ModelError("empty"), 400, "invalid_value"), (SllmError("it ended"), 503, "shutting_down"),
    ],
)  # fmt: skip
def test_what_submit_raises_has_its_status_and_code(error: Exception, status: int, code: str) -> None:
    made = of_submit(error)
    assert (made.status, made.code) == (status, code)
    document = json.loads(made.body)["error"]
    assert set(document) == {"message", "type", "param", "code"} and document["code"] == code


def test_a_bug_is_raised_on() -> None:
    with pytest.raises(ZeroDivisionError):
        of_submit(ZeroDivisionError())


@pytest.mark.parametrize(("reason", "status", "code"), [("429: too many", 429, "queue_full"), ("503: cannot", 503, "cannot_start"), ("500: failed", 500, "request_failed"), ("418: tea", 500, "request_failed"), ("odd", 500, "request_failed")])
def test_what_is_refused_later_likewise(reason: str, status: int, code: str) -> None:
    made = of_report(RequestReport("r", "a", 0.0, outcome="refused", reason=reason))
    assert (made.status, made.code) == (status, code)
    assert of_report(RequestReport("r", "a", 0.0, outcome="cancelled")).code == "request_failed"


def test_when_to_come_again_is_whole_seconds_and_not_too_many() -> None:
    seconds = [ApiError(503, "c", "m", retry_after=each).headers.get("retry-after") for each in (0.1, 1.2, 1e9, None)]
    assert seconds == ["1", "2", "120", None]


def test_a_name_is_shown_escaped_and_cut() -> None:
    message = unknown_model("\n\x1b[31m" + "é" * 500).message
    assert message.isprintable() and message.isascii() and len(message) < 200


def test_addresses_and_methods_that_are_not_there(world: World) -> None:
    assert world.send("GET", "/nothing").code == "not_found"
    reply = world.send("DELETE", "/v1/models")
    assert (reply.status, reply.code, reply.headers["allow"]) == (405, "method_not_allowed", "GET")
    assert world.complete(model="nobody").code == "model_not_found"
    assert world.send("GET", "/v1/models/nobody").code == "model_not_found"
    assert world.send("GET", "/v1/models/..%2F..%2Fetc%2Fpasswd").code == "model_not_found"
    reply = world.send("POST", "/v1/completions", b"{}", content_type="text/plain")
    assert (reply.status, reply.code) == (415, "unsupported_media_type")


def test_a_body_that_is_too_large_is_not_read(world: World) -> None:
    reply = world.complete(prompt="x" * 3000)
    assert (reply.status, reply.code) == (413, "request_too_large")
    connection = http.client.HTTPConnection(*world.address, timeout=30)
    chunks = iter([b'{"model": "a", "prompt": "'] + [b"x" * 500] * 10)
    connection.request("POST", "/v1/completions", chunks, {"content-type": "application/json"}, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_without_a_key_only_this_machine_is_served(world: World) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[2001:db8::1]:80", "10.0.0.1"):
        reply = world.send("GET", "/v1/models", host=host)
        assert (reply.status, reply.code) == (403, "host_not_allowed"), host
    for host in ("localhost", "localhost:1234", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
        assert world.send("GET", "/v1/models", host=host).status == 200, host
    assert world.send("GET", "/v1/models", sec_fetch_site="cross-site").code == "host_not_allowed"


def test_a_request_has_a_name(world: World) -> None:
    assert world.send("GET", "/v1/models", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    drawn = world.send("GET", "/v1/models", x_request_id="a b<script>").headers["x-request-id"]
    assert drawn.startswith("req_") and drawn != world.send("GET", "/nothing").headers["x-request-id"]


def test_a_bug_is_answered_without_its_traceback(world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a secret of the server")

    monkeypatch.setattr(world.cluster, "models", broken)
    reply = world.complete(prompt="a secret of the client")
    assert (reply.status, reply.code) == (500, "internal_error") and b"secret" not in reply.body
    assert reply.headers["x-request-id"] in reply.document["error"]["message"] and reply.headers["x-request-id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text and "secret of the client" not in caplog.text


def test_a_key_opens_all_but_health(tmp_path: Path) -> None:
    with open_world(tmp_path, api_keys=("another-key", KEY)) as world:
        assert world.send("GET", "/v1/models").status == 200
        assert world.send("GET", "/v1/models", host="elsewhere.example").status == 200
        for given in ("", "Bearer", "Bearer wrong-key", f"Basic {KEY}", f"Bearer {KEY}x"):
            reply = world.send("GET", "/v1/models", authorization=given)
            assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer"), given
        assert world.send("GET", "/openapi.json", authorization="").status == 401
        assert world.send("GET", "/health", authorization="").document == {"status": "ok", "nodes_alive": 1}
        world.cluster.kill_node("node-0000")
        reply = world.send("GET", "/health")
        assert (reply.status, reply.code) == (503, "cannot_start")


def test_no_more_requests_are_open_than_allowed(world: World) -> None:
    held = []
    for _ in range(4):
        one = socket.create_connection(world.address)
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        held.append(one)
    assert world.cluster.wait(lambda _: world.server.gate.open_requests == 4, 20)
    reply = world.send("GET", "/v1/models")
    assert (reply.status, reply.code) == (503, "overloaded") and reply.headers["retry-after"] == "1"
    assert world.send("GET", "/health").status == 200
    for one in held:
        one.close()
    assert world.cluster.wait(lambda _: world.server.gate.open_requests == 0, 20)
    assert world.send("GET", "/v1/models").status == 200


def test_a_port_that_is_taken_is_said_to_be(world: World) -> None:
    with pytest.raises(OptionsError, match="cannot be listened on"):
        Server(world.cluster, ServeOptions(port=world.address[1]))
