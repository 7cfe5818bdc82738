"""What a client may take of the server: time for a head and a body, bytes that it reads, requests and tokens a minute. Chapter 11."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import whole_text
from hypothesis import given
from hypothesis import strategies as st
from serving_world import KEY, Reply, World, open_world

from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.serving.buckets import Buckets
from sllm_mini.serving.connections import Connection
from sllm_mini.serving.gate import Gate
from sllm_mini.serving.metrics import Meter
from sllm_mini.serving.options import Limits, OptionsError, ServeOptions
from sllm_mini.serving.server import Server

LIMITS = Limits(head_nbytes=4000, header_seconds=0.3, body_seconds=0.3, stall_seconds=0.4, connections=20)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

LONG = next(seed for seed in range(1000) if len(whole_text(Session("x", "x", (5, 6), 2, 600, SamplingOptions(temperature=1.0, seed=seed)))[0]) == 600)
"""With this seed the double writes so many tokens to that prompt before it comes to an end."""
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("gate"), limits=LIMITS, names=("a",), pace_seconds=0.01) as opened:
        yield opened


@contextmanager
def served(world: World, **options: Any) -> Iterator[World]:
    """Another server of the same cluster."""
    keys = options.get("api_keys", ())
    with Server(world.cluster, replace(ServeOptions(port=0, drain_seconds=1.0), **options)) as server:
        yield replace(world, server=server, headers={"authorization": f"Bearer {keys[0]}"} if keys else {})


def connected(world: World, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(world.address, timeout=30)
    client.sendall(sent)
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    seen = b""
    try:
        while more := client.recv(1 << 16):
            seen += more
    except ConnectionResetError:
        return seen
    return seen


def until(client: socket.socket, words: bytes) -> bytes:
    """What comes, until these have come."""
    seen = b""
    while words not in seen:
        more = client.recv(1 << 16)
        assert more, seen
        seen += more
    return seen


def refused(seen: bytes) -> tuple[int, str]:
    head, _, body = seen.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    reply = Reply(int(lines[0].split()[1]), headers, body)
    assert headers["connection"] == "close"
    return reply.status, reply.code


def posted(**body: Any) -> bytes:
    data = json.dumps({"model": "a", "prompt": [5, 6], **body}).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-", b"\r\n\r\n"])
def test_a_head_that_does_not_come_whole_is_not_waited_for(world: World, sent: bytes) -> None:
    with closing(connected(world, sent)) as client:
        assert rest(client) == b""


def test_nor_one_that_comes_byte_by_byte_nor_a_second_one(world: World) -> None:
    for first, more in ((b"GET /", b"a"), (MODELS, b"\r\n"), (MODELS, b"G")):
        with closing(connected(world, first)) as client:
            if first == MODELS:
                until(client, b'"object":"list"')
            end, ended = time.monotonic() + 20, False
            client.settimeout(0.05)
            while not ended and time.monotonic() < end:
                try:
                    client.sendall(more)
                    more = b"" if more == b"G" else more
                    ended = client.recv(1000) == b""
                except TimeoutError:
                    continue
                except OSError:
                    ended = True
            assert ended


def test_a_connection_may_rest_between_two_requests(world: World) -> None:
    with closing(connected(world)) as client:
        for pause in (2 * LIMITS.header_seconds, 0.0):
            client.sendall(MODELS)
            until(client, b'"object":"list"')
            time.sleep(pause)


def test_a_body_that_does_not_come_is_408(world: World) -> None:
    with closing(connected(world, HEAD + b'content-length: 100\r\n\r\n{"model')) as client:
        assert refused(rest(client)) == (408, "request_timeout")


def test_a_body_that_nobody_asked_for_is_not_waited_for_either(world: World) -> None:
    with closing(connected(world, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n")) as client:
        until(client, b'"object":"list"')
        client.sendall(b"x")
        assert rest(client) == b""


def test_a_head_has_its_size(world: World) -> None:
    with closing(connected(world, b"GET / HTTP/1.1\r\nhost: localhost\r\n")) as client:
        for _ in range(5):
            client.sendall(b"x-a: " + b"a" * 1000 + b"\r\n")
        assert refused(rest(client)) == (431, "request_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: +5\r\n\r\n", HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"GET http:// HTTP/1.1\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http_is_refused_in_the_same_words(world: World, sent: bytes) -> None:
    with closing(connected(world, sent)) as client:
        assert refused(rest(client)) == (400, "invalid_http")


def test_nothing_is_said_into_an_answer_that_goes_on(world: World) -> None:
    with closing(connected(world, posted(stream=True, max_tokens=600, seed=LONG))) as client:
        seen = client.recv(1000)
        client.sendall(b"no http\r\n\r\n")
        seen += rest(client)
    assert seen.count(b"HTTP/1.1") == 1 and b"[DONE]" not in seen
    assert world.cluster.wait(lambda _: not world.cluster.metrics().running, 20)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_takes_nothing_is_cut_off_and_cancelled(world: World, stream: bool) -> None:
    before = world.cluster.metrics().outcomes["cancelled"]
    world.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of those that it accepts
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(world.address)
        client.sendall(posted(stream=stream, n=8, max_tokens=600 if stream else 100, logprobs=5, seed=LONG))
        peer = client.getsockname()
        mine = lambda: [each for each in world.server._uvicorn.server_state.connections if getattr(each, "client", None) == peer]  # noqa: E731
        assert world.cluster.wait(lambda _: bool(mine()), 20)
        assert world.cluster.wait(lambda _: not mine(), 60), "it still has its connection"
    assert world.cluster.wait(lambda _: not world.cluster.metrics().running, 20)
    assert (world.cluster.metrics().outcomes["cancelled"] > before) is stream


class Line:
    """As much of a transport as a connection asks about; `left` is how much a reader has not taken each time somebody looks."""

    def __init__(self, left: list[int]) -> None:
        self.left, self.aborted = left, asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return self.left.pop(0)

    def abort(self) -> None:
        self.aborted.set()


def test_a_slow_reader_is_no_stalled_one() -> None:
    async def look() -> list[int]:
        connection = Connection.__new__(Connection)
        line = Line([100, 80, 79, 79, 0])
        connection.loop, connection.transport, connection._limits, connection._stalled = asyncio.get_running_loop(), line, Limits(stall_seconds=0.001), None  # type: ignore[assignment]
        connection._watch(line.get_write_buffer_size())
        async with asyncio.timeout(20):
            await line.aborted.wait()
        return line.left

    assert asyncio.run(look()) == [0]


def test_no_more_connections_are_held_than_allowed(world: World) -> None:
    with served(world, limits=Limits(connections=3)) as other:
        held = [connected(other) for _ in range(3)]
        with closing(connected(other)) as client:
            assert refused(rest(client)) == (503, "overloaded")
        for one in held:
            one.close()
        assert world.cluster.wait(lambda _: not other.server._uvicorn.server_state.connections, 20)
        assert other.send("GET", "/v1/models").status == 200


# Rates


@given(per_minute=st.integers(1, 100), steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 40), st.integers(0, 40)), max_size=30))
def test_no_more_is_taken_than_minutes_allow(per_minute: int, steps: list[tuple[float, int, int]]) -> None:
    clock, taken = 0.0, 0
    buckets = Buckets(per_minute, lambda: clock)
    for seconds, amount, back in steps:
        clock += seconds
        if amount > per_minute:
            with pytest.raises(ValueError, match="more than"):
                buckets.take("a", amount)
            continue
        wait = buckets.take("a", amount)
        if wait:
            assert wait <= 60.0
            clock += wait * 1.000001
            assert buckets.take("a", amount) == 0.0
        taken += amount
        assert buckets.take("b", per_minute) == 0.0
        buckets.give_back("b", per_minute)
        assert taken <= per_minute * (1 + clock / 60) + 1e-6
        given_back = min(back, taken)
        buckets.give_back("a", given_back)
        taken -= given_back
    buckets.give_back("a", 1 << 40)
    assert buckets.take("a", per_minute) == 0.0 and buckets.take("a", 1) > 0


def asked(gate: Gate, path: str, key: str = KEY, **headers: str) -> tuple[int, dict[str, str]]:
    """Of a gate alone, around an app that answers 200."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    given = {"host": "localhost", "authorization": f"Bearer {key}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {"type": "http", "path": path, "headers": [(name.encode(), value.encode()) for name, value in given.items()]}
    asyncio.run(gate(scope, receive, send))
    return messages[0]["status"], {name.decode(): value.decode() for name, value in messages[0]["headers"]}


def gate_of(world: World, now: Callable[[], float], **options: Any) -> Gate:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return Gate(app, ServeOptions(port=0, **options), Meter(world.cluster), now)


def test_each_key_has_its_requests_a_minute(world: World) -> None:
    clock = 0.0
    gate = gate_of(world, lambda: clock, api_keys=(KEY, "another-key"), limits=Limits(requests_per_minute=3))
    assert [asked(gate, "/v1/models")[0] for _ in range(4)] == [200, 200, 200, 429]
    headers = asked(gate, "/v1/models")[1]
    assert headers["retry-after"] == "20" and headers["x-request-id"].startswith("req_")
    assert asked(gate, "/v1/models", "another-key")[0] == 200
    assert [asked(gate, path)[0] for path in ("/health", "/metrics", "/admin/ps")] == [200] * 3
    clock += 19.9
    assert asked(gate, "/v1/models")[0] == 429
    clock += 0.1
    assert [asked(gate, "/v1/models")[0] for _ in range(2)] == [200, 429]
    assert asked(gate, "/v1/models", "wrong-key")[0] == 401


def test_no_page_of_another_site_manages_models(world: World) -> None:
    gate = gate_of(world, time.monotonic, api_keys=(KEY,))
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert asked(gate, "/admin/ps", sec_fetch_site=site)[0] == status, site
    assert asked(gate, "/v1/models", sec_fetch_site="cross-site")[0] == 200, "who has the key may ask from a page"
    assert world.send("GET", "/admin/ps", sec_fetch_site="same-site").code == "host_not_allowed"


def test_tokens_that_nobody_wrote_are_given_back(world: World) -> None:
    with served(world, limits=Limits(tokens_per_minute=200)) as other:
        state = other.server._state
        state.tokens = Buckets(200, lambda: 0.0)
        first = other.complete(max_tokens=12, seed=4).document
        used = first["usage"]["total_tokens"]
        assert state.tokens.take("", 200 - used) == 0.0 and state.tokens.take("", 1) > 0
        state.tokens = Buckets(200, lambda: 0.0)
        stop = first["choices"][0]["text"][1]
        for stream in (False, True):
            reply = other.complete(max_tokens=180, seed=4, stop=stop, stream=stream)
            assert reply.status == 200, "most of the first were given back"
        state.tokens = Buckets(200, lambda: 0.0)
        assert state.tokens.take("", 100) == 0.0
        reply = other.complete(max_tokens=100)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "tokens_limit_exceeded", "1")
        assert other.complete(max_tokens=98).status == 429 or other.complete(max_tokens=97).status == 200
        reply = other.complete(max_tokens=198)
        assert (reply.status, reply.code) == (400, "tokens_limit_exceeded") and "200" in reply.document["error"]["message"]


def test_what_could_not_be_submitted_costs_no_tokens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise ValueError("no")

    with served(world, limits=Limits(tokens_per_minute=50)) as other:
        with monkeypatch.context() as patched:
            patched.setattr(world.cluster, "submit", fails)
            assert [other.complete(max_tokens=40).code for _ in range(3)] == ["invalid_value"] * 3
        assert other.complete(max_tokens=40).status == 200


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
def test_a_rate_is_a_whole_number(name: str) -> None:
    for value in (-1, 1.5, True):
        with pytest.raises(OptionsError, match=name):
            replace(LIMITS, **{name: value})  # type: ignore[arg-type]


# Its end


def test_who_is_still_served_when_the_server_ends_is_told(world: World) -> None:
    with served(world) as other:
        stream, whole = (connected(other, posted(stream=stream, max_tokens=600, seed=LONG)) for stream in (True, False))
        with closing(stream), closing(whole):
            assert world.cluster.wait(lambda _: world.cluster.metrics().running == 2, 20)
            ending = threading.Thread(target=other.server.close)
            ending.start()
            seen = rest(stream)
            assert refused(rest(whole)) == (503, "shutting_down")
            ending.join()
    events = [each for each in seen.split(b"data: ") if b'{"error"' in each]
    assert len(events) == 1 and b'"shutting_down"' in events[0] and b"[DONE]" not in seen and seen.endswith(b"0\r\n\r\n")
    assert world.cluster.wait(lambda _: not world.cluster.metrics().running, 20)
