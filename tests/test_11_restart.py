"""What is deployed outlives the server, however that ends; one server at a time has it. Chapter 11."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from fake_engine import whole_text

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cli.serve import _new
from sllm_mini.cluster.api import Ask, Cluster, Deployment, RefusedError
from sllm_mini.cluster.journal import read_journal
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource
from sllm_mini.serving import folder as server_folder
from sllm_mini.serving.client import AdminClient
from sllm_mini.serving.deployments import status_of
from sllm_mini.serving.folder import ServerFolder
from sllm_mini.types import Tier

MIB = 1 << 20
SECONDS = 30.0
OPTIONS = LiveOptions(
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=5.0)
)
POLICIES = {"placement": "locality"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restart") / "tiny.sllm"
    convert_checkpoint(resource("data/models/tiny"), folder)
    return folder


@contextmanager
def opened(folder: Path, resume: Any = False) -> Iterator[Cluster]:
    with open_cluster("inprocess:1", folder=folder, options=OPTIONS, resume=resume) as cluster:
        yield cluster


def ask(cluster: Cluster, number: int, tokens: int) -> Any:
    return cluster.submit(Ask("a", [5, 6, number + 1], tokens, stop_at_eos=False, request_id=f"r-{number}"))


def ids(stream: Any) -> tuple[int, ...]:
    return tuple(piece.token_id for piece in stream)


def whole(number: int, tokens: int) -> tuple[int, ...]:
    return whole_text(Session("x", "x", (5, 6, number + 1), 3, tokens, stop_at_eos=False))[0]


def test_a_cluster_that_was_closed_is_resumed(tmp_path: Path, tiny: Path) -> None:
    wanted = Deployment(ModelSpec(name="a", nbytes=10 * MIB, concurrency=1, min_instances=1, max_instances=2), str(tiny), Tier.DRAM, 9.0)
    with opened(tmp_path) as cluster:
        cluster.deploy(wanted)
        assert ids(ask(cluster, 0, 20)) == whole(0, 20)
        cut = [ask(cluster, number, 3000) for number in (1, 2, 3)]  # the last one waits
        assert cluster.wait(lambda _: all(stream.report.output_tokens > 3 for stream in cut[:2]), SECONDS)
        at = cluster.now
    with opened(tmp_path, resume=True) as cluster:
        assert cluster.models() == [wanted] and cluster.now > at - 5.0  # it goes on from the last event that was logged
        assert ids(cluster.stream("r-0")) == whole(0, 20)
        for stream in cut:
            with pytest.raises(RefusedError, match="closed before the text ended"):
                list(cluster.stream(stream.request_id))
        assert cluster.metrics().waiting == cluster.metrics().running == 0
        assert ids(ask(cluster, 9, 20)) == whole(9, 20)
        assert cluster.wait(lambda _: any(node.instances for node in cluster.nodes()), SECONDS), "one is pinned"
        assert replay(cluster.log(), ControlOptions().controller())
    with opened(tmp_path, resume=True) as cluster:
        assert cluster.models() == [wanted] and ids(cluster.stream("r-9")) == whole(9, 20)


def test_requests_of_one_that_was_killed_are_cancelled_where_nobody_reads_them(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "left").mkdir()
    with opened(tmp_path / "first") as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=10 * MIB, concurrency=1, max_instances=1), str(tiny)))
        streams = [ask(cluster, number, 3000) for number in range(3)]
        assert cluster.wait(lambda _: streams[0].report.output_tokens > 3, SECONDS)
        for name in ("controller.bin", "deployments.json", "events.jsonl", "ledger.bin"):  # as a kill now would leave them
            (tmp_path / "left" / name).write_bytes((tmp_path / "first" / name).read_bytes())
        starts = cluster.metrics().starts
    with opened(tmp_path / "left", resume="models") as cluster:
        reports = [cluster.stream(stream.request_id).wait(SECONDS) for stream in streams]
        assert [report.outcome for report in reports] == ["cancelled"] * 3 and reports[0].output_tokens > 3
        assert [each.spec.name for each in cluster.models()] == ["a"]
        assert cluster.metrics().waiting == cluster.metrics().running == 0 and cluster.metrics().starts == starts, "nobody asked for a start"
        assert ids(ask(cluster, 9, 20)) == whole(9, 20)
        assert replay(cluster.log(), ControlOptions().controller())
    assert all(past.over for past in read_journal(tmp_path / "left" / "ledger.bin"))


def test_one_server_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with ServerFolder(tmp_path / "s") as first:
        with pytest.raises(SllmError, match=f"^{tmp_path}/s is the state of a server that runs; end that one, or give another folder$"):
            ServerFolder(tmp_path / "s")
        first.announce("http://here:1")
        with pytest.raises(SllmError, match=rf"that runs at http://here:1 \(process {os.getpid()}\); end that one"):
            ServerFolder(tmp_path / "s")
    ServerFolder(tmp_path / "s").close()
    assert not (tmp_path / "s" / "server.json").exists() and (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(SllmError, match="another folder"):
        ServerFolder(tmp_path / "file")


def test_what_was_deployed_comes_back_under_other_policies_too(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Deployment(ModelSpec(name="a", nbytes=10 * MIB), str(tiny))
    with ServerFolder(tmp_path) as folder:
        assert folder.prepare(POLICIES) == (False, [])
        with opened(tmp_path) as cluster:
            cluster.deploy(wanted)
    (tmp_path / "arbiter-of-one-that-was-killed").touch()
    with ServerFolder(tmp_path) as folder:
        assert not list(tmp_path.glob("arbiter-*")) and folder.prepare(POLICIES) == (True, [wanted])
        assert folder.prepare({"placement": "random"}) == (False, [wanted])
        with opened(tmp_path) as cluster:  # the old log is no more in its way
            cluster.deploy(wanted)
        folder.announce("http://localhost:1")
        assert folder.prepare({"placement": "random"}) == (True, [wanted])
        monkeypatch.setattr(server_folder, "LOG_NBYTES", 10)
        assert folder.prepare({"placement": "random"}) == (False, [wanted]), "nobody reads a long log again"
        (tmp_path / "events.jsonl").touch()  # as of one that was killed before it had saved anything
        assert folder.prepare({"placement": "random"}) == (False, [wanted]) and not (tmp_path / "events.jsonl").exists()


def test_what_is_not_there_any_more_is_said_and_can_be_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "deployments.json"
    with ServerFolder(tmp_path) as folder:
        path.write_text('[{"spec": {"name": "m", "nbytes": 1}, "source": "/nowhere/m"}, {"spec": {"name": "n", "nbytes": 1}, "source": "http://nowhere/n"}]')
        with pytest.raises(SllmError, match=r"/nowhere/m, from which m was deployed, .* --fresh"):
            folder.prepare(POLICIES)
        path.write_text("[{")
        with pytest.raises(SllmError, match=r"deployments.json.* --fresh"):
            folder.prepare(POLICIES)
        assert folder.prepare(POLICIES, fresh=True) == (False, []) and not path.exists()


# The command


@contextmanager
def serving(*given: object, cluster: str = "inprocess:1") -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server of its own; in one process it needs no torch as long as nobody asks for a text."""
    command = [sys.executable, "-m", "sllm_mini.cli.main", "serve", *map(str, given), "--cluster", cluster, "--port", "0", "--store-dram", "256MiB", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = "".join(iter(process.stdout.readline, "}\n"))
            assert said, process.stderr.read()
            yield process, json.loads(said + "}")
        finally:
            process.kill()


def asking(url: str, body: bytes, length: int) -> socket.socket:
    """A client that has sent a request, or a part of it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = socket.create_connection((host, int(port)), timeout=SECONDS)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (length, body))
    return client


def settled(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How they were deployed; where their bytes are is another matter."""
    return [{name: value for name, value in model.items() if name not in ("cached", "state", "instances")} for model in models]


def test_a_server_that_is_ended_at_once_leaves_all_that_was_deployed(tmp_path: Path, tiny: Path, run: Run) -> None:
    state, source = tmp_path / "state", str(tiny)
    with serving(source, "--state", state, "--drain", "500") as (process, announced):
        client = AdminClient(announced["url"])
        client.deploy("b", source=source, max_instances=3, keep_alive="7m", tier="dram")
        client.deploy("tiny", concurrency=7)
        shown = client.ps()["models"]
        refused = run("serve", source, "--state", state, "--port", "0", "--json")
        assert refused.code == 1 and announced["url"] in refused.error["message"] and str(announced["pid"]) in refused.error["message"]
        with closing(asking(announced["url"], b"{", 100)):
            until_open(client)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)  # what is open may go on
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == -signal.SIGTERM
    with ServerFolder(state) as folder:
        resumed, before = folder.prepare({"placement": "serverlessllm", "keep_alive": "10m", "autoscaler": "per-request"})
        assert resumed and [each.spec.name for each in before] == ["tiny", "b"]
        with opened(state, resume="models") as cluster:
            assert settled([each.model_dump() for each in status_of(cluster).models]) == settled(shown)


def until_open(client: AdminClient) -> None:
    """Until the server has a request beside the one that asks."""
    end = time.monotonic() + SECONDS
    while "sllm_open_requests 2.0" not in read(f"{client.url}/metrics"):
        assert time.monotonic() < end


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return str(answer.read().decode())


def test_the_command_line_adds_what_is_not_known(tmp_path: Path) -> None:
    def deployment(name: str, source: str, **figures: Any) -> Deployment:
        return Deployment(ModelSpec(name=name, **{"nbytes": 1, **figures}), source)

    before = [deployment("a", "/a", concurrency=9), deployment("b", "/b", concurrency=9)]
    given = [deployment("a", "/a"), deployment("b", "/elsewhere/b", nbytes=2), deployment("c", "/c")]
    assert _new(given, before) == [deployment("b", "/elsewhere/b", nbytes=2, concurrency=9), given[2]]


@pytest.mark.slow
def test_a_server_comes_back_as_it_was_after_a_kill_and_after_its_end(tmp_path: Path, tiny: Path) -> None:
    state, source = tmp_path / "state", str(tiny)
    body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 1000, "stream": True}).encode()
    with serving(source, "--state", state, cluster="local:1") as (process, announced):
        client = AdminClient(announced["url"])
        client.deploy("b", source=source, min_instances=1)
        shown = client.ps()["models"]
        with closing(asking(announced["url"], body, len(body))) as reader:
            seen = b""
            while b"data:" not in seen:
                seen += reader.recv(1 << 16)
            process.kill()
            process.wait(SECONDS)
    with serving(source, "--state", state, cluster="local:1") as (process, announced):
        assert announced["models"] == ["tiny", "b"]
        client = AdminClient(announced["url"])
        assert settled(client.ps()["models"]) == settled(shown)
        assert "sllm_running_requests 0.0" in read(f"{client.url}/metrics") and "sllm_waiting_requests 0.0" in read(f"{client.url}/metrics")
        with closing(asking(announced["url"], body, len(body))) as reader:
            while not reader.recv(1 << 16).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                continue
        client.delete("tiny")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0 and not (state / "server.json").exists()
    with serving("--state", state, cluster="local:1") as (process, announced):
        assert announced["models"] == ["b"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_there_must_be_something_to_serve(run: Run) -> None:
    ended = run("serve")
    assert ended.code == 2 and "nothing to serve" in ended.err
