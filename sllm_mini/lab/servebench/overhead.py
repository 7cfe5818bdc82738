"""What the platform adds to a warm request: the same text by an engine called directly, by the cluster, and over HTTP, in one interleaved run.

Three processes beside the worker's: the server with its cluster (as `sllm-mini serve` is), a client, and an engine of its own that is
called directly, with the worker's threads; each waits while another is asked. A round asks each way for a few answers in a row. The first of a row comes
after a rest, in which caches and processors have gone to others, and is told apart. What is added is the difference to the direct call that is as far in
its row of the same round. Of a stream the first token is when its first text has come; of a request for one token, when its whole answer has.

Measured alone on two cores (AMD EPYC) on 2026-11-24, the tiny model, 25 rounds: the cluster adds 1.0 to 1.4 ms to a request for one token and HTTP 2.4 to
3.0, of the 3 that it may; on two hyperthreads of one core, a day before and with orders by way of the agent, it was 2.6 to 3.1 and 5 to 6. What is left is a
dozen hand-overs of some 100 us each, between threads of four processes. Shown in chapter 11.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.errors import SllmError
from sllm_mini.lab.bench.document import read_document
from sllm_mini.loading.probe import measure_machine

KIND = "sllm-mini bench serve overhead"
WAYS = ("direct", "submit", "http json", "http stream")
TARGET_SECONDS = 0.003
"""What the platform may add to a warm request, at the median."""
_PROMPT = "Once upon a time"
_WARM_UP = 3
Ask = Callable[[str, int], dict[str, Any]]
"""Asks by a way for so many tokens."""


@dataclass(frozen=True, slots=True)
class Options:
    """`rounds` of every way with one token and with `tokens`, `in_a_row` at a time; engines have `threads` each, with `cuda` the first GPU. Raises ValueError."""

    rounds: int = 30
    tokens: int = 32
    in_a_row: int = 4
    threads: int = 1
    cuda: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.threads) < 1 or min(self.tokens, self.in_a_row) < 2:
            raise ValueError("there is at least one round and one thread, and a text has at least two tokens, a row two answers")


def measure_overhead(checkpoint: Checkpoint, options: Options, *, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The document. Raises SllmError where two ways answer differently, or a process ends."""
    say = on_stage or (lambda _: None)
    say("starting a server, a client and an engine")
    with _opened(checkpoint, options) as ask:
        samples = play(ask, options, say)
    return document(samples, options) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": asdict(measure_machine(os.getcwd())),
        "model": {"name": Path(checkpoint.path).name, "nbytes": checkpoint.nbytes},
    }  # fmt: skip


def play(ask: Ask, options: Options, say: Callable[[str], None]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Each way with each length a few times in a row once a round, in an order of its own; row after row. Raises SllmError where one answers otherwise than
    another."""
    entries = [(way, tokens) for tokens in (1, options.tokens) for way in WAYS]
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {entry: [] for entry in entries}
    rng, texts = random.Random(options.seed), dict[int, tuple[str, int]]()
    for number in range(-_WARM_UP, options.rounds):
        if number >= 0:
            say(f"round {number + 1} of {options.rounds}")
        for way, tokens in rng.sample(entries, len(entries)):
            row = [ask(way, tokens) for _ in range(options.in_a_row)]
            for found in row:
                if found["error"]:
                    raise SllmError(f"a request for {tokens} tokens by {way} was not answered: {found['error']}")
                if texts.setdefault(tokens, (found["text"], found["tokens"])) != (found["text"], found["tokens"]):
                    raise SllmError(f"a request for {tokens} tokens by {way} was answered {found['text']!r} and by another way {texts[tokens][0]!r}; what they took cannot be compared")
            if number >= 0:
                samples[way, tokens] += row
    return samples


def document(samples: Mapping[tuple[str, int], list[dict[str, Any]]], options: Options) -> dict[str, Any]:
    """Pure. `results` are of those that follow another of their row, `rested` of the first ones."""
    firsts = {entry: rows[:: options.in_a_row] for entry, rows in samples.items()}
    others = {entry: [each for number, each in enumerate(rows) if number % options.in_a_row] for entry, rows in samples.items()}
    return {
        "kind": KIND, "method": {**asdict(options), "prompt": _PROMPT}, "limits": {"added_seconds": TARGET_SECONDS},
        "results": [_row(way, options.tokens, others) for way in WAYS], "rested": [_row(way, options.tokens, firsts) for way in WAYS], "skipped": [],
    }  # fmt: skip


def _row(way: str, tokens: int, samples: Mapping[tuple[str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """One token by this way and by `direct`, and a text by both. JSON has no first token: of one token it is the whole answer."""
    one, whole = samples[way, 1], samples[way, tokens]
    first = [each["first_seconds"] if each["first_seconds"] is not None else each["seconds"] for each in one]
    added_first = [mine - other["first_seconds"] for mine, other in zip(first, samples["direct", 1], strict=True)]
    added_one = [mine["seconds"] - other["seconds"] for mine, other in zip(one, samples["direct", 1], strict=True)]
    added = [mine["seconds"] - other["seconds"] for mine, other in zip(whole, samples["direct", tokens], strict=True)]
    count = whole[0]["tokens"]
    row = {"name": way, "tokens": count, "samples": [each["seconds"] for each in whole], "first_samples": first}
    parts = {"first": first, "one_token": [each["seconds"] for each in one], "text": row["samples"]}
    parts |= {"added_first": added_first, "added_one_token": added_one, "added_text": added}
    for name, values in parts.items():
        row |= {f"{name}_seconds_median": median(values), f"{name}_seconds_p25": _quartiles(values)[0], f"{name}_seconds_p75": _quartiles(values)[2]}
    each_token = (median(added) - median(added_one)) / (count - 1) if count > 1 else None
    return row | {"added_seconds_median": median(added_one), "added_seconds_per_token": each_token}


def _quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


@contextmanager
def _opened(checkpoint: Checkpoint, options: Options) -> Iterator[Ask]:
    from sllm_mini.cluster.api import Ask as ClusterAsk
    from sllm_mini.cluster.api import Deployment
    from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
    from sllm_mini.cluster.opening import open_cluster
    from sllm_mini.cluster.simulated.run import even_cluster
    from sllm_mini.control.messages import ModelSpec
    from sllm_mini.inference.text import load_tokenizer
    from sllm_mini.serving.options import ServeOptions
    from sllm_mini.serving.server import Server

    prompt: str | list[int] = _PROMPT if load_tokenizer(Path(checkpoint.path)) is not None else [2, 3, 4, 5]
    dram = max(1 << 30, 2 * checkpoint.nbytes)
    node = NodeOptions(store_dram_nbytes=dram, threads=options.threads, cuda=options.cuda, silent_seconds=10.0, stuck_seconds=60.0)
    control = ControlOptions(keep_alive="forever")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sllm-servebench-", ignore_cleanup_errors=True))
        cluster = stack.enter_context(open_cluster("local", folder=Path(folder), nodes=even_cluster(1, devices=1, dram_nbytes=dram), control=control, options=LiveOptions(node=node, join_seconds=60.0)))
        cluster.deploy(Deployment(ModelSpec(name="model", nbytes=checkpoint.nbytes, concurrency=4, max_instances=1), os.fspath(checkpoint.path)))
        server = stack.enter_context(Server(cluster, ServeOptions(port=0)))
        over_http, directly = stack.enter_context(_child("client", server.url)), stack.enter_context(_child("direct", os.fspath(checkpoint.path), str(options.threads), "cuda" if options.cuda else "cpu"))

        def submitted(tokens: int) -> dict[str, Any]:
            began, first, text, count = time.perf_counter(), None, "", 0
            for piece in cluster.submit(ClusterAsk("model", prompt, max_new_tokens=tokens)):
                first = time.perf_counter() - began if first is None else first
                text += piece.text
                count += 1
            return {"first_seconds": first, "seconds": time.perf_counter() - began, "text": text, "tokens": count, "error": ""}

        def ask(way: str, tokens: int) -> dict[str, Any]:
            body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            if way == "direct":
                return directly(body)
            return submitted(tokens) if way == "submit" else over_http({**body, "stream": way == "http stream"})

        yield ask


@contextmanager
def _child(*arguments: str) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Asks it; raises SllmError once it has ended."""
    command = [sys.executable, "-m", "sllm_mini.lab.servebench.child", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        asked, answers = process.stdin, process.stdout
        if asked is None or answers is None:
            raise SllmError("a process of the bench has no pipes")

        def read() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise SllmError(f"the process of the bench that is {arguments[0]} has ended; what it printed says why")
            return dict(json.loads(line))

        def ask(body: dict[str, Any]) -> dict[str, Any]:
            asked.write(json.dumps(body) + "\n")
            asked.flush()
            return read()

        try:
            read()
            yield ask
        finally:
            asked.close()


def read_overhead(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)
