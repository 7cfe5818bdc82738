"""What a bench of the server says: figures of pairs, answers that must agree, and a client that reads what came."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from serving_world import World, open_world

from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.errors import FormatError, SllmError
from sllm_mini.lab.bench.document import save_document
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.lab.servebench.overhead import KIND, WAYS, Options, document, measure_overhead, read_overhead
from sllm_mini.lab.servebench.overhead import play as play_rounds
from sllm_mini.lab.servebench.replay import Options as ReplayOptions
from sllm_mini.lab.servebench.replay import document as replay_document
from sllm_mini.lab.servebench.replay import measure_served, play, read_served
from sllm_mini.lab.servebench.sender import Sender
from sllm_mini.types import Warmth


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("servebench")) as made:
        yield made


def scripted(way: str, tokens: int) -> dict[str, Any]:
    """An engine takes 10 ms for a first token and 5 for each other one; the platform 1, 2 or 3 more for each request, and 1 for each token."""
    more = WAYS.index(way)
    seconds = 0.010 + 0.005 * (tokens - 1) + 0.001 * more + (0.001 * (tokens - 1) if more else 0.0)
    return {"first_seconds": None if way == "http json" else 0.010 + 0.001 * more, "seconds": seconds, "text": "a" * tokens, "tokens": tokens, "error": ""}


def test_what_is_added_is_the_difference_to_the_direct_call_of_the_same_round() -> None:
    options, asked = Options(rounds=4, tokens=6, in_a_row=3), list[tuple[str, int]]()

    def ask(way: str, tokens: int) -> dict[str, Any]:
        asked.append((way, tokens))
        rested = len(asked) % 3 == 1
        slow = 0.1 * ((len(asked) - 1) // 24 % 2) + 0.002 * WAYS.index(way) * rested  # every other round for all, and what comes after a rest
        found = scripted(way, tokens)
        return {**found, "seconds": found["seconds"] + slow, "first_seconds": found["first_seconds"] and found["first_seconds"] + slow}

    samples = play_rounds(ask, options, lambda _: None)
    assert asked[::3] == asked[1::3] == asked[2::3]
    rounds = [asked[start : start + 24 : 3] for start in range(0, len(asked), 24)]
    assert len(rounds) == 3 + 4 and all(sorted(each) == sorted(rounds[0]) for each in rounds) and any(each != rounds[0] for each in rounds)
    made = document(samples, options)
    rows = {row["name"]: row for row in made["results"]}
    assert tuple(rows) == WAYS == tuple(row["name"] for row in made["rested"])
    assert [row["added_seconds_median"] for row in made["rested"]] == pytest.approx([0.0, 0.003, 0.006, 0.009], abs=1e-9)
    for number, way in enumerate(WAYS):
        row = rows[way]
        assert [row["added_first_seconds_median"], row["added_seconds_median"]] == pytest.approx([0.001 * number] * 2, abs=1e-9)
        assert row["added_text_seconds_median"] == pytest.approx((0.001 * number + 0.005) if number else 0.0, abs=1e-9)
        assert row["added_seconds_per_token"] == pytest.approx(0.001 if number else 0.0, abs=1e-9)
        assert len(row["samples"]) == len(row["first_samples"]) == 4 * 2 and row["tokens"] == 6


def test_ways_that_answer_otherwise_are_not_compared() -> None:
    def other(way: str, tokens: int) -> dict[str, Any]:
        return {**scripted(way, tokens), "text": way}

    def refused(way: str, tokens: int) -> dict[str, Any]:
        return {**scripted(way, tokens), "error": "overloaded"}

    with pytest.raises(SllmError, match="cannot be compared"):
        play_rounds(other, Options(rounds=1), lambda _: None)
    with pytest.raises(SllmError, match="not answered: overloaded"):
        play_rounds(refused, Options(rounds=1), lambda _: None)
    for wrong in ({"rounds": 0}, {"tokens": 1}, {"threads": 0}, {"in_a_row": 1}):
        with pytest.raises(ValueError):
            Options(**wrong)


def test_a_document_is_read_again_and_another_one_is_not(tmp_path: Path) -> None:
    options = Options(rounds=1)
    made = document(play_rounds(scripted, options, lambda _: None), options) | {"machine": {}, "model": {}}
    save_document(made, tmp_path / "a.json")
    assert read_overhead(tmp_path / "a.json") == made and made["kind"] == KIND
    save_document({**made, "kind": "other"}, tmp_path / "b.json")
    with pytest.raises(FormatError):
        read_overhead(tmp_path / "b.json")


def test_the_sender_reads_whole_answers_streams_and_refusals_on_one_connection(world: World) -> None:
    body = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 12, "seed": 3}
    with closing(Sender(world.server.url)) as sender:
        whole, stream = sender.send(body), sender.send({**body, "stream": True})
        refused = sender.send({**body, "model": "nobody"})
    assert (whole.status, whole.error, whole.tokens) == (200, "", 12) and whole.first_seconds is None
    assert (stream.text, stream.tokens, stream.error) == (whole.text, whole.tokens, "") and whole.text
    assert stream.first_seconds is not None and stream.first_seconds + sum(stream.gaps) <= stream.seconds
    assert whole.timing is not None and stream.timing is not None and whole.timing.keys() == stream.timing.keys()
    assert (refused.status, refused.error, refused.text) == (404, "model_not_found", "")
    with pytest.raises(SllmError, match="no address"):
        Sender("ftp://nowhere")


def test_the_command_wants_to_be_told_what_to_measure(run: Run) -> None:
    for wrong in ((), ("burst", "some.sllm", "--server", "http://127.0.0.1:1"), ("--overhead", "one.sllm", "another.sllm")):
        assert run("bench", "serve", *wrong).code == 2


def test_a_trace_is_played_over_http_open_loop(world: World, tmp_path: Path) -> None:
    trace = [TraceRequest(0.02 * number, f"service-{number % 3}", 4, 3 + number % 2) for number in range(12)]
    found = measure_served(trace, world.server.url, ReplayOptions(speed=2.0, requests=11))
    everything, *rungs = found["results"]
    assert found["statuses"] == {"200": 11} and not found["errors"] and not found["refused"] and found["shortened"] == 0
    assert (everything["name"], everything["answered"], everything["tokens"]) == ("all", 11, sum(each.output_tokens for each in trace[:11]))
    assert sum(row["answered"] for row in rungs) == 11 and {row["name"] for row in rungs} <= {warmth.name.lower() for warmth in Warmth}
    assert 0 < everything["first_token_seconds_p50"] <= everything["latency_seconds_p50"] <= everything["latency_seconds_p99"]
    assert found["model"]["names"] == ["a", "b.2"] and found["lateness_seconds"]["p99"] <= found["lateness_seconds"]["max"]
    save_document(found, tmp_path / "served.json")
    assert read_served(tmp_path / "served.json") == json.loads(json.dumps(found))


def test_no_request_waits_for_another_and_what_is_not_answered_is_counted() -> None:
    """The server takes the first connection and says nothing; the second, which is due at once, it answers, and then it is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def answer() -> None:
            first, second = listening.accept()[0], listening.accept()[0]
            with first, second:
                second.recv(1 << 16)
                body = b'{"error": {"code": "overloaded"}}'
                second.sendall(b"HTTP/1.1 503 No\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

        answering = threading.Thread(target=answer)
        answering.start()
        heard = play([TraceRequest(0.0, "model-00", 1, 1)] * 2, ["a"], f"http://127.0.0.1:{listening.getsockname()[1]}", 0)
        answering.join()
    found = replay_document(heard, ReplayOptions())
    assert found["statuses"] == {"no answer": 1, "503": 1} and found["errors"] == {"overloaded": 1} and found["refused"] == 1
    assert found["results"] == [found["results"][0]] and found["results"][0]["answered"] == 0 and found["results"][0]["first_token_seconds_p50"] is None


@pytest.mark.slow
def test_a_warm_model_is_measured_by_all_ways() -> None:
    found = measure_overhead(tiny_checkpoint(), Options(rounds=2, tokens=4))
    assert [row["name"] for row in found["results"]] == list(WAYS) and {row["tokens"] for row in found["results"]} == {4}
    assert found["results"][0]["added_seconds_median"] == 0.0 and all(row["text_seconds_median"] > row["first_seconds_median"] > 0 for row in found["results"])


@pytest.mark.slow
def test_a_trace_is_played_on_a_server_of_its_own(run: Run, tmp_path: Path) -> None:
    found = run("bench", "serve", "burst", "--requests", 4, "--speed", 50, "--cluster", "local:1", "--json", "--save", tmp_path / "a.json")
    assert found.code == 0 and found.document["statuses"] == {"200": 4} and found.document["model"]["names"] == ["tiny"]
    assert found.document["results"][0]["answered"] == 4 and read_served(tmp_path / "a.json") == found.document
