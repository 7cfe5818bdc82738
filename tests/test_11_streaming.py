"""A stream says the same as the body would, signs of life while a start goes on, and ends its work when nobody reads. Chapter 11."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import World, open_world

from sllm_mini.cluster.api import Ask
from sllm_mini.serving.chat_protocol import ChatChunk
from sllm_mini.serving.relay import Relay, until_gone
from sllm_mini.serving.sse import EventStream, comment
from sllm_mini.serving.text_protocol import TextCompletion


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("streaming")) as opened:
        yield opened


def joined(events: list[Any], chat: bool) -> dict[int, tuple[str, str]]:
    """Of each choice its text and why it ended."""
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    for each in events:
        for choice in each["choices"]:
            number = choice["index"]
            assert number not in finishes, "a chunk after the last"
            texts[number] = texts.get(number, "") + ((choice["delta"].get("content") or "") if chat else choice["text"])
            if choice["finish_reason"]:
                finishes[number] = choice["finish_reason"]
    return {number: (texts[number], finishes[number]) for number in texts}


@settings(max_examples=25)
@given(
    chat=st.booleans(), n=st.integers(1, 3), seed=st.integers(0, 1 << 40), tokens=st.integers(1, 30), usage=st.booleans(),
    prompt=st.lists(st.lists(st.integers(5, 200), min_size=1, max_size=5), min_size=1, max_size=2), echo=st.booleans(),
)  # fmt: skip
def test_a_stream_joined_is_the_body_of_the_same_seed(world: World, chat: bool, n: int, seed: int, tokens: int, usage: bool, prompt: list[list[int]], echo: bool) -> None:
    body: dict[str, Any] = {"n": n, "seed": seed, "max_tokens": tokens}
    ask = world.chat if chat else world.complete
    if not chat:
        body |= {"prompt": prompt, "echo": echo}
    whole = ask(**body).document
    reply = ask(**body, stream=True, stream_options={"include_usage": usage})
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.headers["cache-control"] == "no-cache"
    *events, done = reply.events
    assert done == "[DONE]"
    for each in events:
        (ChatChunk if chat else TextCompletion).model_validate(each)
    assert joined(events, chat) == {
        each["index"]: (each["message"]["content"] if chat else each["text"], each["finish_reason"]) for each in whole["choices"]
    }
    if usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"] and all(each["usage"] is None for each in events)
    else:
        assert not any("usage" in each for each in events)
    assert len({each["id"] for each in events}) == 1
    if chat:
        opened = [each["choices"][0]["index"] for each in events if "role" in each["choices"][0]["delta"]]
        assert sorted(opened) == list(range(n))
    assert sum("sllm" in each["choices"][0] for each in events) == len(whole["choices"])


def test_a_stream_says_that_it_waits_while_a_start_goes_on(tmp_path: Path) -> None:
    with open_world(tmp_path, comment_seconds=0.02) as world:
        world.cluster.kill_node("node-0000")
        with closing(socket.create_connection(world.address, timeout=30)) as client:
            body = json.dumps({"model": "a", "prompt": [5, 6], "stream": True, "max_tokens": 5}).encode()
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            seen = b""
            while seen.count(b": waiting for an instance of a") < 3:
                seen += client.recv(4096)
            assert b" 200 OK" in seen and b": queued" in seen and b"data:" not in seen
            from sllm_mini.cluster.simulated.run import even_cluster

            world.cluster.add_node(even_cluster(2, devices=2, dram_nbytes=512 << 20)[1])
            while more := client.recv(4096):
                seen += more
        assert seen.index(b": waiting") < seen.index(b"data:") and b"[DONE]" in seen
        assert b'"rung":"' in seen


def test_a_comment_is_one_line() -> None:
    assert comment("a\ndata: x\r\n\u2028b") == b": a data: x   b\n\n"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_whoever_goes_is_cancelled(world: World, stream: bool, half: bool) -> None:
    """A side that is closed for writing counts as gone, too."""
    world.complete()
    before = world.cluster.metrics().outcomes["cancelled"]
    body = json.dumps({"model": "a", "prompt": [9, 9], "stream": stream, "max_tokens": 1500, "seed": 3}).encode()
    client = socket.create_connection(world.address, timeout=30)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    if stream:
        client.recv(1000)
    assert world.cluster.wait(lambda _: world.cluster.metrics().running == 1, 20)
    if half:
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    assert world.cluster.wait(lambda _: world.cluster.metrics().outcomes["cancelled"] == before + 1 and not world.cluster.metrics().running, 20)
    assert world.cluster.wait(lambda _: not any(each.requests for node in world.cluster.nodes() for each in node.instances), 20), "an instance still runs it"
    client.close()


def test_one_of_several_that_cannot_be_submitted_takes_the_others_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, count = world.cluster.submit, 0

    def third_fails(ask: Ask) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise ValueError("the third")
        return submit(ask)

    monkeypatch.setattr(world.cluster, "submit", third_fails)
    reply = world.complete(n=4, max_tokens=1000)
    assert (reply.status, reply.code) == (400, "invalid_value")
    assert world.cluster.wait(lambda _: not world.cluster.metrics().running and not world.cluster.metrics().waiting, 20)


def test_what_fails_after_the_headers_is_an_event_without_an_end(tmp_path: Path) -> None:
    with open_world(tmp_path, names=("a",)) as world:
        world.complete()
        with closing(socket.create_connection(world.address, timeout=30)) as client:
            body = json.dumps({"model": "a", "prompt": [5], "stream": True, "max_tokens": 2000, "seed": 1}).encode()
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            seen = client.recv(2000)
            world.cluster.close()
            while more := client.recv(1 << 16):
                seen += more
        assert b'data: {"error": {"message"' in seen and b"[DONE]" not in seen
        assert world.complete().status == 503


def test_a_relay_wakes_once_for_what_comes_together_and_at_the_end_alone_if_told(world: World) -> None:
    async def read(whole: bool) -> tuple[int, list[int]]:
        streams = [world.cluster.submit(Ask("a", [5, number + 6], 40, stop_at_eos=False)) for number in range(2)]
        wakes, positions = 0, []
        async with Relay(streams, whole=whole) as relay:
            while relay.open:
                await asyncio.sleep(0.05)  # a slow reader
                come = await relay.next(20.0)
                assert come
                wakes += 1
                positions += [piece.position for number, pieces, _ in come for piece in pieces if number == 0]
        return wakes, positions

    for whole in (False, True):
        wakes, positions = asyncio.run(read(whole))
        assert positions == list(range(2, 42)) and wakes < (3 if whole else 30)


def test_a_relay_that_is_left_cancels_what_goes_on(world: World) -> None:
    async def leave() -> list[str | None]:
        streams = [world.cluster.submit(Ask("a", [5, 6], 1, stop_at_eos=False)), world.cluster.submit(Ask("a", [5, 7], 1500, stop_at_eos=False))]
        streams[0].wait(20)
        async with Relay(streams) as relay:
            while not relay.open or len(relay.waiting):
                await relay.next(20.0)
        return [stream.wait(20).outcome for stream in streams]

    assert asyncio.run(leave()) == ["answered", "cancelled"]


def test_a_reader_that_is_cancelled_as_something_comes_is_cancelled(world: World) -> None:
    async def read() -> bool:
        stream = world.cluster.submit(Ask("a", [5, 6], 1500, stop_at_eos=False))
        async with Relay([stream]) as relay:
            reading = asyncio.ensure_future(relay.next(20.0))
            await asyncio.sleep(0)
            relay._wake()
            reading.cancel()
            return (await asyncio.gather(reading, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    assert asyncio.run(read())


def test_a_reader_that_takes_nothing_is_given_up_and_no_frame_is_asked_for_meanwhile() -> None:
    made, closed = [], []

    async def frames() -> AsyncIterator[bytes]:
        try:
            for number in range(100):
                made.append(number)
                yield b"x"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if len(made) == 3:
            await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    begun = time.monotonic()
    asyncio.run(EventStream(frames(), 0.2, {})({"type": "http"}, receive, send))  # type: ignore[arg-type]
    assert made == [0, 1, 2] and closed == [True] and time.monotonic() - begun < 20


def test_work_ends_with_its_client_and_its_error_is_told() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fails() -> None:
        raise ZeroDivisionError

    messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def never() -> Any:
        await asyncio.sleep(60)

    assert asyncio.run(until_gone(receive, work())) is None and cancelled == [True]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(until_gone(never, fails()))
