"""Behind HTTP, whatever dies and however many come at once: every answer is whole, or a refusal that says when to come again. Chapter 11."""

from __future__ import annotations

import asyncio
import json
import os
import resource as limits_of
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from processes import PATIENCE
from serving_world import MIB, World, open_world

from faults.test_08_cluster_faults import CONTROL, Left, below
from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.resources import resource
from sllm_mini.serving.options import Limits, ServeOptions
from sllm_mini.serving.server import Server

PROMPTS = [[5, 6, number + 1] for number in range(20)]
REVIVED = LiveOptions(
    max_restarts=50, revive=50, revive_seconds=0.1,
    node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.003, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=3.0),
)  # fmt: skip


def body_of(number: int, tokens: int, *, stream: bool) -> dict[str, Any]:
    return {"model": "a", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": tokens, "seed": 3, "stream": stream}


def text_of(content: bytes, *, stream: bool) -> str:
    """Of a whole answer; of a stream all its pieces, which must end in one [DONE] and hold no error."""
    if not stream:
        return str(json.loads(content)["choices"][0]["text"])
    *events, done = [each[6:] for each in content.decode().split("\n\n") if each.startswith("data: ")]
    choices = [json.loads(each)["choices"][0] for each in events]
    assert done == "[DONE]" and [bool(each["finish_reason"]) for each in choices] == [False] * (len(choices) - 1) + [True]
    return "".join(each["text"] for each in choices)


def refusal(status: int, headers: Any, content: bytes) -> str:
    """The code of a refusal that may be asked again."""
    error = json.loads(content)["error"]
    assert status in (429, 503) and int(headers["retry-after"]) > 0 and isinstance(error["code"], str), (status, content)
    return str(error["code"])


def front_storm(folder: Path, seconds: float, chance: Random) -> str:
    """Eight clients ask on and on, half of them streaming, and twice a second a process below this one is killed. What was done, in words."""
    folder.mkdir()
    convert_checkpoint(resource("data/models/tiny"), folder / "tiny")
    others, counts, kills = set(below(os.getpid())), Counter[str](), 0
    with open_cluster("local", folder=folder / "cluster", nodes=even_cluster(3, devices=2), control=CONTROL, options=REVIVED) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=10 * MIB, concurrency=2), str(folder / "tiny")))
        with Server(cluster, ServeOptions(port=0, drain_seconds=5.0)) as server:
            world = World(cluster, server, folder / "tiny")
            texts = [world.send("POST", "/v1/completions", body_of(number, 80, stream=False)).document["choices"][0]["text"] for number in range(len(PROMPTS))]
            end = time.monotonic() + seconds

            def client(which: int) -> None:
                number, stream = which, which % 2 == 0
                while time.monotonic() < end:
                    reply = world.send("POST", "/v1/completions", body_of(number, 80, stream=stream))
                    if reply.status == 200:
                        assert text_of(reply.body, stream=stream) == texts[number % len(texts)], reply.body
                        counts["whole"] += 1
                    else:
                        counts[refusal(reply.status, reply.headers, reply.body)] += 1
                        time.sleep(0.1)
                    number += 1

            with ThreadPoolExecutor(8) as clients:
                asking = [clients.submit(client, which) for which in range(8)]
                while time.monotonic() < end:
                    time.sleep(0.5)
                    victims = [each for each in below(os.getpid()) if each not in others]
                    if victims:
                        try:
                            os.kill(chance.choice(victims), signal.SIGKILL)
                            kills += 1
                        except ProcessLookupError:
                            continue  # it ended by itself in this moment
                for each in asking:
                    each.result()
            assert world.send("GET", "/health").status == 200
        lost = cluster.result().events
    assert counts["whole"] > seconds and kills > seconds / 2 and lost["NodeLost"] + lost["InstanceFailed"] > kills / 4, (counts, kills, lost)
    return f"{dict(counts)}, {kills} kills, {lost['NodeLost']} nodes and {lost['InstanceFailed']} instances lost"


def test_clients_get_whole_answers_while_processes_are_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    print(front_storm(tmp_path_factory.mktemp("door") / "c", 10.0, Random(11)))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_minutes_of_that_leave_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SLLM_SOAK_SECONDS for another time, of which the first half grows the heap to what such a load needs."""
    half = float(os.environ.get("SLLM_SOAK_SECONDS", "600")) / 2
    first = front_storm(tmp_path_factory.mktemp("door") / "c", half, Random(8))
    before = Left.now()
    said = f"{first}; then {front_storm(tmp_path_factory.mktemp('door') / 'c', half, Random(9))}"
    after = Left.now()
    grown = {name: getattr(after, name) / getattr(before, name) - 1 for name in ("resident_nbytes", "blocks", "malloc_nbytes")}
    print(said, grown)
    assert after == before and grown["blocks"] < 0.02 and grown["malloc_nbytes"] < 0.05 and grown["resident_nbytes"] < 0.1


def test_a_thousand_at_once_beside_hundreds_that_never_finish_their_head(tmp_path: Path) -> None:
    soft, hard = limits_of.getrlimit(limits_of.RLIMIT_NOFILE)
    limits_of.setrlimit(limits_of.RLIMIT_NOFILE, (min(8192, hard) if hard != limits_of.RLIM_INFINITY else 8192, hard))
    try:
        # The clients are one thread of this process: on a busy machine it may hold a connection for ten seconds before it sends a head.
        with open_world(tmp_path, limits=Limits(header_seconds=2 * PATIENCE)) as world, ExitStack() as stack:
            texts = [world.complete(**body_of(number, 4, stream=False)).document["choices"][0]["text"] for number in range(len(PROMPTS))]
            descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            for _ in range(500):
                idle = stack.enter_context(socket.create_connection(world.address))
                idle.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: local")

            async def one(client: httpx.AsyncClient, number: int) -> str:
                stream = number % 2 == 0
                reply = await client.post(f"{world.server.url}/v1/completions", json=body_of(number, 4, stream=stream))
                if reply.status_code != 200:
                    return refusal(reply.status_code, reply.headers, reply.content)
                assert text_of(reply.content, stream=stream) == texts[number % len(texts)], number
                return "whole"

            async def everybody() -> Counter[str]:
                async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=1000, max_keepalive_connections=0), trust_env=False) as client:
                    return Counter(await asyncio.gather(*(one(client, number) for number in range(1000))))

            counts = asyncio.run(everybody())
            print(counts)
            assert counts["whole"] >= 100 and counts.total() == 1000 and set(counts) <= {"whole", "queue_full", "overloaded"}, counts
            assert world.complete().status == 200
            stack.close()
            patience = time.monotonic() + PATIENCE
            while len(os.listdir("/proc/self/fd")) > descriptors + 2:
                assert time.monotonic() < patience, "connections that nobody holds are still open"
                time.sleep(0.05)
            assert threading.active_count() <= threads + 40  # the pool for what blocks has 40 at most
    finally:
        limits_of.setrlimit(limits_of.RLIMIT_NOFILE, (soft, hard))
