"""A server that many tests share: one cluster of threads, whose engines are doubles (`fake_engine`) that give texts which are known
beforehand, behind real HTTP on a port that is free. And `Http`, a client that reads exactly what came, with no library between."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Cluster, Deployment
from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.resources import resource
from sllm_mini.serving.options import Limits, ServeOptions
from sllm_mini.serving.server import Server

MIB = 1 << 20
KEY = "a-key-for-tests"


@dataclass
class Reply:
    """An answer: its status, its headers in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error object, which it must be, whole."""
        assert self.headers["content-type"] == "application/json" and self.headers["x-request-id"], self
        error = self.document["error"]
        assert set(self.document) == {"error"} and set(error) == {"message", "type", "param", "code"}, self.document
        assert isinstance(error["message"], str) and error["message"] and isinstance(error["code"], str) and isinstance(error["type"], str)
        assert "Traceback" not in error["message"] and "sllm_mini/" not in error["message"]
        return error["code"]

    @property
    def events(self) -> list[Any]:
        """Of a stream: each event's JSON, and "[DONE]"."""
        return [line if line == "[DONE]" else json.loads(line) for line in (each[6:] for each in self.body.decode().split("\n\n") if each.startswith("data: "))]

    @property
    def comments(self) -> list[str]:
        return [each[1:].strip() for each in self.body.decode().split("\n\n") if each.startswith(":")]


@dataclass
class World:
    """A running server, its cluster and its folder."""

    cluster: Cluster
    server: Server
    source: Path
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def send(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """`body` is bytes as they are, or anything as JSON. Names of headers are written with underscores."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            given = {"content-type": "application/json"} if data is not None else {}
            connection.request(method, path, data, {**self.headers, **given, **{name.replace("_", "-"): value for name, value in headers.items()}})
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def complete(self, **body: Any) -> Reply:
        return self.send("POST", "/v1/completions", {"model": "a", "prompt": [5, 6, 7], "max_tokens": 12, **body})

    def chat(self, text: str = "Hello", **body: Any) -> Reply:
        return self.send("POST", "/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": text}], "max_tokens": 12, **body})


@contextmanager
def open_world(
    folder: Path, *, limits: Limits | None = None, api_keys: tuple[str, ...] = (), comment_seconds: float = 0.05, names: tuple[str, ...] = ("a", "b.2"),
    devices: int = 8, pace_seconds: float = 0.002, kind: str = "inprocess:1", engine: str = "fake_engine:make", **live: Any,
) -> Iterator[World]:  # fmt: skip
    """Ends the server and the cluster afterwards."""
    for thread in threading.enumerate():
        if thread.name == "sllm-import":  # of a command that ended before its imports: two threads that import transformers at once find it half made
            thread.join()
    source = folder / "tiny.sllm"
    if not source.exists():
        convert_checkpoint(resource("data/models/tiny"), source)
    node = NodeOptions(store_dram_nbytes=256 * MIB, engine=engine, pace_seconds=pace_seconds, beat_seconds=0.2, silent_seconds=3.0, stuck_seconds=5.0)
    with open_cluster(kind, folder=folder / "cluster", options=LiveOptions(node=node, **live)) as cluster:
        for name in names:
            cluster.deploy(Deployment(ModelSpec(name=name, nbytes=10 * MIB, concurrency=8, max_instances=1), str(source)))
        options = ServeOptions(port=0, api_keys=api_keys, comment_seconds=comment_seconds, drain_seconds=2.0, model_roots=(str(folder),), limits=limits or Limits())
        with Server(cluster, options) as server:
            yield World(cluster, server, source, {"authorization": f"Bearer {api_keys[0]}"} if api_keys else {})
