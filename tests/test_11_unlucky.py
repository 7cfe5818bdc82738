"""A server whose surroundings fail it: files that cannot be read, addresses that do not answer, disks that are full, starts that do not come. Chapter 11."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving_world import KEY, MIB, World, open_world

from sllm_mini.cli.serve import _new, read_keys
from sllm_mini.cluster.api import Deployment
from sllm_mini.control.messages import ModelSpec
from sllm_mini.errors import ModelError, RemoteError, SllmError, WriteError
from sllm_mini.inference.context import context_limit
from sllm_mini.serving import chat_template, preload, texts
from sllm_mini.serving.folder import ServerFolder
from sllm_mini.serving.options import Limits
from sllm_mini.serving.relay import Relay

POLICIES = {"placement": "serverlessllm"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("unlucky"), limits=Limits(template_seconds=0.3)) as world:
        yield world


def deployment(name: str, source: str = "/somewhere") -> Deployment:
    return Deployment(ModelSpec(name=name, nbytes=MIB), source)


# --- texts -------------------------------------------------------------------------------------------------------------


def test_a_model_whose_tokenizer_cannot_be_read_is_asked_by_token_ids(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_folder: Path) -> None:
        raise ModelError("tokenizer.json is of another planet; convert it again")

    monkeypatch.setattr(texts, "load_tokenizer", broken)
    world.cluster.deploy(Deployment(ModelSpec(name="mute", nbytes=10 * MIB, max_instances=1), str(world.source)))
    try:
        assert world.complete(model="mute").status == 200
        refused = world.complete(model="mute", prompt="Once")
        assert (refused.status, refused.code) == (400, "unsupported_model") and "another planet" in refused.document["error"]["message"]
    finally:
        world.cluster.delete("mute")


def test_an_address_that_does_not_answer_keeps_nobody_else_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ask for one, which is looked for once and not again at once; meanwhile the others are served."""
    asked, answer = [], threading.Event()

    def dead(source: str, _folder: Path) -> Any:
        asked.append(source)
        answer.wait(20.0)
        raise RemoteError("nobody is there", path=Path("there"))

    monkeypatch.setattr(texts, "open_remote", dead)
    here = world.cluster.models
    lost = deployment("dead", "http://192.0.2.1/dead")
    monkeypatch.setattr(world.cluster, "models", lambda: [*here(), lost])
    replies: list[Any] = []
    clients = [threading.Thread(target=lambda: replies.append(world.complete(model="dead"))) for _ in range(8)]
    for client in clients:
        client.start()
    while not asked:
        time.sleep(0.01)
    begun = time.monotonic()
    assert world.send("GET", "/health").status == 200 and world.send("GET", "/metrics").status == 200 and world.complete(prompt="Once " * 1000, max_tokens=1).status in (200, 400)
    assert time.monotonic() - begun < 10.0 and not replies
    answer.set()
    for client in clients:
        client.join()
    replies.append(world.complete(model="dead"))
    assert {(reply.status, reply.code) for reply in replies} == {(503, "model_unreachable")} and len(replies) == 9 and len(asked) == 1
    assert all("nobody is there" in reply.document["error"]["message"] and reply.headers["retry-after"] == "5" for reply in replies)


def test_a_slow_template_is_not_run_again_while_it_runs_and_is_afterwards(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.chat().status == 200
    model = world.server._state.texts.find("a")
    assert model is not None
    ran: list[int] = []
    enough = threading.Event()

    def render(*_: object, **__: object) -> str:
        ran.append(1)
        while not enough.is_set():  # busy, as a loop in a template is
            pass
        return "Once upon"

    monkeypatch.setattr(model.tokenizer, "apply_chat_template", render)
    try:
        clients, replies = [], list[Any]()
        for _ in range(12):
            clients.append(threading.Thread(target=lambda: replies.append(world.chat())))
            clients[-1].start()
        for client in clients:
            client.join()
        assert all(reply.status == 400 and "did not end in time" in reply.document["error"]["message"] for reply in replies)
        assert len(ran) <= chat_template._AT_ONCE
    finally:
        enough.set()
    deadline = time.monotonic() + 20
    while (reply := world.chat()).status != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reply.status == 200


def test_a_context_is_what_the_engine_takes() -> None:
    assert context_limit({"max_position_embeddings": 2048}) == context_limit({"n_positions": 2048}) == 2048
    assert context_limit({}) is None and context_limit({"max_position_embeddings": "many", "rope_scaling": None}) is None
    long = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert context_limit(long | {"rope_scaling": {"type": "longrope"}}) == context_limit(long | {"rope_parameters": {"rope_type": "longrope"}}) == 4096
    assert context_limit(long | {"rope_parameters": {"full": {"rope_type": "dynamic", "original_max_position_embeddings": 512}}}) == 512
    assert context_limit(long | {"rope_parameters": {"rope_type": "yarn"}}) == 131072


# --- requests ----------------------------------------------------------------------------------------------------------


def test_fields_that_are_null_ask_for_nothing(world: World) -> None:
    plain = world.complete(seed=4).document["choices"][0]["text"]
    found = world.complete(seed=4, stream=None, echo=None, n=None, stop=None).document
    assert found["choices"][0]["text"] == plain
    events = world.complete(seed=4, stream=True, stream_options={"include_usage": None}).events
    assert events[-1] == "[DONE]" and all("usage" not in event or event["usage"] is None for event in events[:-1])


def test_what_follows_a_body_in_chunks_is_not_kept(world: World) -> None:
    body = json.dumps({"model": "a", "prompt": [5, 6, 7], "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    trailers = b"".join(b"x-%d: y\r\n" % number for number in range(10_000))
    with socket.create_connection(world.address, timeout=20) as client:
        for _ in range(2):  # the connection can be used again
            client.sendall(head + b"%x\r\n%s\r\n0\r\n" % (len(body), body) + trailers + b"\r\n")
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
            length = int(next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
            while len(answer.partition(b"\r\n\r\n")[2]) < length:
                answer += client.recv(65536)


class Told:
    """A stream that is delivered by a thread of its own, one piece after another."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def subscribe(self, told: Any) -> Any:
        def deliver() -> None:
            for _ in range(self.pieces):
                told((), None)
            told((), object())

        thread = threading.Thread(target=deliver)
        thread.start()
        return thread.join

    def cancel(self) -> None:
        return


@pytest.mark.parametrize("whole", [False, True])
def test_streams_that_come_while_they_are_read_are_whole(whole: bool) -> None:
    async def read() -> list[int]:
        seen = [0] * 4
        streams: Sequence[Any] = [Told(5000) for _ in seen]
        async with Relay(streams, whole=whole) as relay:
            while relay.open:
                for delivery in await relay.next(20.0):
                    seen[delivery.choice] += 1
                assert relay.waiting == sorted(relay.waiting)
        return seen

    assert asyncio.run(read()) == [5001] * 4


# --- loads and deployments ---------------------------------------------------------------------------------------------


def test_a_load_that_was_in_vain_is_asked_for_again_and_ends_with_its_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "_ASK_SECONDS", 0.2)
    prewarm, asked = world.cluster.prewarm, []

    def second_time(*given: Any) -> None:
        asked.append(given)
        if len(asked) > 1:
            prewarm(*given)

    monkeypatch.setattr(world.cluster, "prewarm", second_time)
    world.complete(prompt="", keep_alive=0)
    assert world.complete(prompt="", keep_alive="5m").document["choices"][0]["sllm"] == {"done_reason": "load"} and len(asked) >= 2
    world.complete(prompt="", keep_alive=0)
    monkeypatch.setattr(world.cluster, "prewarm", lambda *given: asked.append(given))
    reply = world.send("POST", "/v1/completions", {"model": "a", "prompt": ""}, x_sllm_hold="0.5")
    assert (reply.status, reply.code) == (503, "held_too_long") and "0.5 s" in reply.document["error"]["message"]


def test_what_a_server_cannot_do_is_not_said_of_the_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        def deploy(_: object) -> None:
            raise error

        return deploy

    for error, status, code in (
        (WriteError("the disk is full", path=world.source), 507, "out_of_space"), (SllmError("no node is alive; ask again later"), 503, "not_now"),
        (ModelError("it has no layers"), 400, "invalid_value"),
    ):  # fmt: skip
        monkeypatch.setattr(world.cluster, "deploy", raises(error))
        reply = world.send("PUT", "/admin/models/new", {"source": str(world.source)})
        assert (reply.status, reply.code) == (status, code), reply.document


def test_a_file_of_keys_without_one_is_no_way_to_go_without(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n  \n")
    with pytest.raises(SllmError, match="no API key"):
        read_keys(file)
    file.write_text(f"\n{KEY}\n")
    assert read_keys(file) == (KEY,)


# --- what outlives a server --------------------------------------------------------------------------------------------


def kept(path: Path, *names: str) -> None:
    """What a cluster has written there that has deployed these."""
    import msgspec

    (path / "deployments.json").write_bytes(msgspec.json.encode([deployment(name, str(path)) for name in names]))


def test_models_outlive_a_server_that_ends_while_it_deploys_them(tmp_path: Path) -> None:
    def begin(policies: dict[str, str], **given: Any) -> list[str]:
        with ServerFolder(tmp_path) as folder:
            resumed, found = folder.prepare(policies, **given)
            assert not resumed
            return [each.spec.name for each in found]

    kept(tmp_path, "a", "b", "c")
    assert begin(POLICIES) == ["a", "b", "c"]
    kept(tmp_path, "a")  # the new cluster has deployed the first, and its server is killed
    assert sorted(begin(POLICIES)) == ["a", "b", "c"]
    kept(tmp_path, "a", "d")  # and again, with one of the command line
    assert sorted(begin({"placement": "locality"})) == ["a", "b", "c", "d"]
    with ServerFolder(tmp_path) as folder:
        folder.prepare(POLICIES)
        kept(tmp_path, "a", "b")
        folder.announce("http://localhost:1")  # all are there, and what was deleted since is gone
    assert begin(POLICIES) == ["a", "b"]
    assert begin(POLICIES, fresh=True) == []


def test_a_folder_that_moved_may_be_given_anew(tmp_path: Path) -> None:
    import msgspec

    gone = deployment("a", str(tmp_path / "gone"))
    (tmp_path / "deployments.json").write_bytes(msgspec.json.encode([gone]))
    with ServerFolder(tmp_path) as folder:
        with pytest.raises(SllmError, match="not there any more"):
            folder.prepare(POLICIES)
        _, before = folder.prepare(POLICIES, given=["a"])
    assert before == [gone]
    adapted = replace(gone, base="other")
    assert _new([deployment("a", "/new")], [adapted]) == [deployment("a", "/new")]
