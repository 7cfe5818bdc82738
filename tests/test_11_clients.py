"""The `openai` package is served as by OpenAI: sync, async, streaming, retries, timeouts, errors. Chapter 11."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from openai import (
    APIError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)
from serving_world import KEY, World, open_world

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.device import cuda
from sllm_mini.resources import resource

CHAT: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("clients"), api_keys=(KEY,), comment_seconds=0.02) as opened:
        yield opened


@pytest.fixture
def client(world: World) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{world.server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as opened:
        yield opened


def test_chats_and_texts_whole_and_streamed(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="a", messages=CHAT, max_tokens=20, seed=5)
    assert whole.usage is not None
    text = whole.choices[0].message.content
    chunks = list(client.chat.completions.create(model="a", messages=CHAT, max_completion_tokens=20, seed=5, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text and text
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and chunks[0].choices[0].delta.role == "assistant"
    done = client.completions.create(model="a", prompt="Once upon a time", max_tokens=9, seed=1, n=2)
    streamed = list(client.completions.create(model="a", prompt="Once upon a time", max_tokens=9, seed=1, n=2, stream=True))
    assert ["".join(each.choices[0].text for each in streamed if each.choices[0].index == number) for number in range(2)] == [each.text for each in done.choices]
    assert done.choices[0].text != done.choices[1].text and done.usage is not None and done.usage.completion_tokens > 0
    assert done.choices[0].model_dump()["sllm"]["rung"]


def test_many_at_once_from_one_loop(world: World) -> None:
    async def one(client: AsyncOpenAI, number: int) -> tuple[str, str]:
        whole = await client.completions.create(model="a", prompt=[5, number + 5], max_tokens=15, seed=number)
        parts = [each.choices[0].text async for each in await client.completions.create(model="a", prompt=[5, number + 5], max_tokens=15, seed=number, stream=True)]
        return whole.choices[0].text, "".join(parts)

    async def all_of_them() -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{world.server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(20)))

    found = asyncio.run(all_of_them())
    assert all(whole == streamed and whole for whole, streamed in found) and len(set(found)) == 20


def test_models_are_listed(client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["a", "b.2"] and client.models.retrieve("b.2").object == "model"


def test_errors_are_of_openais_classes_with_a_code(world: World, client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=CHAT)
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and missing.value.request_id
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="nobody", messages=CHAT, stream=True)
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model="a", prompt="word " * 3000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as tools:
        client.chat.completions.create(model="a", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.code == "unsupported_value" and tools.value.param == "tools"
    with pytest.raises(BadRequestError) as none:  # doubles have no hidden states
        client.embeddings.create(model="a", input="x")
    assert none.value.code == "unsupported_model" and none.value.param == "model"
    with pytest.raises(NotFoundError) as absent:
        client.files.list()
    assert absent.value.code == "not_found"
    with OpenAI(base_url=f"{world.server.url}/v1", api_key="wrong-key", max_retries=0) as stranger, pytest.raises(AuthenticationError) as key:
        stranger.models.list()
    assert key.value.code == "invalid_api_key"


def test_a_timeout_of_the_client_cancels_here(world: World, client: OpenAI) -> None:
    client.completions.create(model="a", prompt=[5])
    before = world.cluster.metrics().outcomes["cancelled"]
    with pytest.raises(APITimeoutError):
        client.completions.create(model="a", prompt=[5, 6], max_tokens=1900, seed=3, timeout=0.3)
    assert world.cluster.wait(lambda _: world.cluster.metrics().outcomes["cancelled"] == before + 1, 20)
    stream = client.completions.create(model="a", prompt=[5, 6], max_tokens=1900, seed=3, stream=True)
    next(iter(stream))
    stream.close()
    assert world.cluster.wait(lambda _: world.cluster.metrics().outcomes["cancelled"] == before + 2 and not world.cluster.metrics().running, 20)


def test_a_client_that_was_refused_comes_again_when_told(tmp_path: Path) -> None:
    """No node, and one may wait: the second is refused with a time to come again, and is answered when it does."""
    from sllm_mini.cluster.simulated.run import even_cluster

    with open_world(tmp_path, max_waiting=1) as world, OpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        world.cluster.kill_node("node-0000")
        waiting = client.completions.create(model="a", prompt=[5], stream=True)
        with pytest.raises(InternalServerError) as refused:
            client.completions.create(model="a", prompt=[6])
        assert refused.value.code == "overloaded" and refused.value.response.headers["retry-after"] == "1"
        world.cluster.add_node(even_cluster(2, devices=2, dram_nbytes=512 << 20)[1])
        assert client.with_options(max_retries=5).completions.create(model="a", prompt=[6]).choices[0].text
        assert "".join(each.choices[0].text for each in waiting)


def test_a_stream_that_breaks_is_an_error_and_no_end(tmp_path: Path) -> None:
    with open_world(tmp_path, names=("a",)) as world, OpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        stream = client.completions.create(model="a", prompt=[5], max_tokens=2000, seed=1, stream=True)
        next(iter(stream))
        world.cluster.close()
        with pytest.raises(APIError) as broken:
            list(stream)
        assert broken.value.code == "cannot_start" and "closed" in str(broken.value)


def test_serve_from_the_command_line(tmp_path: Path) -> None:
    """A real model: the first request is held through its cold start; SIGTERM lets the open stream end, then all processes."""
    source = tmp_path / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), source)
    command = [sys.executable, "-m", "sllm_mini.cli.main", "serve", str(source), f"again={source}", "--cluster", "local:1", "--port", "0", "--store-dram", "256MiB", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            announced = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            assert announced["models"] == ["tiny", "again"] and announced["url"].startswith("http://127.0.0.1:")
            with OpenAI(base_url=f"{announced['url']}/v1", api_key="none", max_retries=0, timeout=90) as client:
                whole = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, temperature=0, seed=1)
                assert whole.choices[0].message.content and whole.choices[0].model_dump()["sllm"]["rung"] != "ready"
                greedy = client.completions.create(model="again", prompt="Once upon a time", max_tokens=200, temperature=0, stream=True)
                text = next(iter(greedy)).choices[0].text
                process.send_signal(signal.SIGTERM)
                text += "".join(each.choices[0].text for each in greedy)
                assert len(text) > 50
            assert process.wait(60) == 0
        finally:
            process.kill()
    end = time.monotonic() + 20
    while left := _of_session(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def _of_session(number: int) -> list[int]:
    """Processes of the session that the server began."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdecimal() and os.getsid(int(entry)) == number:
                found.append(int(entry))
        except ProcessLookupError:
            continue
    return found


def test_serve_says_in_a_sentence_what_it_will_not_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLLM_MINI_API_KEY", raising=False)
    open_to_all = run("serve", tmp_path, "--host", "0.0.0.0", "--json")
    assert open_to_all.code == 1 and "no API key is set" in open_to_all.error["message"]
    monkeypatch.setenv("SLLM_MINI_API_KEY", "long-enough")
    no_checkpoint = run("serve", tmp_path, "--host", "0.0.0.0", "--json")
    assert no_checkpoint.code == 1 and str(tmp_path) in no_checkpoint.err and "long-enough" not in no_checkpoint.err
    source = tmp_path / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), source)
    assert "two folders" in run("serve", source, source).err
    assert run("serve", source, "--keep-alive", "soon").code == run("serve", source, "--cluster", "simulated").code == 2
    assert "no placement policy" in run("serve", source, "--placement", "nowhere").err
    monkeypatch.setattr(cuda, "gpu_count", lambda: 1)
    two = run("serve", source, "--cuda", "--devices", 2)
    assert two.code == 1 and "2 GPUs were asked for and this machine has 1" in two.err
    monkeypatch.setattr(cuda, "gpu_count", lambda: 0)
    monkeypatch.setattr(cuda, "why_no_cuda", lambda: "there is no driver")
    for asked in (("serve", source), ("bench", "start"), ("bench", "serve", "--overhead")):
        assert "CUDA cannot be used: there is no driver" in run(*asked, "--cuda").err
