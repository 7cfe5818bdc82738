"""A trace played over HTTP, open loop: each request goes out when it is due, on a thread and a connection of its own, whatever became of the
others. How late they were is part of the document. Prompts are random tokens, answers streams as long as the trace says or until the model
ends them. Shown in chapter 11."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.errors import SllmError
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.livebench.calibrate import percentile
from sllm_mini.lab.livebench.document import LATE_SECONDS
from sllm_mini.lab.livebench.workload import Options as Dealing
from sllm_mini.lab.livebench.workload import fitted
from sllm_mini.lab.servebench.sender import Sender, Sent
from sllm_mini.loading.probe import measure_machine

KIND = "sllm-mini bench serve"
_PERCENTS = (50, 90, 99)
_TOKENS = range(5, 45)
"""Prompts are made of these: every vocabulary has them."""
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a trace is played: its first `requests`, `speed` times as fast, none longer than `context` tokens in all. Raises ValueError."""

    speed: float = 1.0
    requests: int | None = None
    context: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.speed > 0 or self.context < 2:
            raise ValueError("the speed is above 0, and a request has a token of a prompt and one of an answer")


@dataclass(frozen=True, slots=True)
class Heard:
    """What became of a request: `sent` is None where the server did not answer at all, `late_seconds` how long after its time it went."""

    model: str
    late_seconds: float
    sent: Sent | None


def measure_served(trace: Iterable[TraceRequest], url: str, options: Options, *, key: str = "", on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Plays a trace on a server, its models dealt out to those that are deployed there; returns the document. Raises SllmError for a server without
    models, or a trace that cannot be played, OSError for a server that is not there."""
    say = on_stage or (lambda _: None)
    names = models_of(url, key)
    made = fitted(trace, Dealing(models=len(names), speed=options.speed), options.context, options.requests)
    heard = play(made.requests, names, url, options.seed, key=key, on_progress=lambda number: say(f"request {number} of {len(made.requests)}"))
    return document(heard, options) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": asdict(measure_machine(os.getcwd())),
        "model": {"names": names}, "shortened": made.shortened,
    }  # fmt: skip


def models_of(url: str, key: str = "") -> list[str]:
    """What is deployed on a server. Raises SllmError where that is nothing, OSError."""
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=30)) as connection:
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        found = answer.read()
    names = [each["id"] for each in json.loads(found)["data"]] if answer.status == 200 else []
    if not names:
        raise SllmError(f"the server at {url} has no models for us (status {answer.status}); deploy one, or give its key")
    return names


def play(
    requests: Sequence[TraceRequest], names: Sequence[str], url: str, seed: int, *, key: str = "", on_progress: Callable[[int], None] | None = None
) -> list[Heard]:  # fmt: skip
    """Returns when all have been answered, in the trace's order. Models of the requests are `Dealing.names`, each for one of `names`."""
    known = dict(zip(Dealing(models=len(names)).names, names, strict=True))
    chance = random.Random(seed)
    bodies = [
        {"model": known[each.model], "prompt": chance.choices(_TOKENS, k=each.input_tokens), "max_tokens": each.output_tokens, "temperature": 1, "seed": seed + number, "stream": True}
        for number, each in enumerate(requests)
    ]  # fmt: skip
    began = time.monotonic()

    def ask(body: dict[str, Any], due: float) -> Heard:
        late = time.monotonic() - due
        with closing(Sender(url, key)) as sender:
            try:
                return Heard(str(body["model"]), late, sender.send(body))
            except (OSError, http.client.HTTPException):
                return Heard(str(body["model"]), late, None)

    with ThreadPoolExecutor(len(requests), thread_name_prefix="sllm-client") as pool:
        asked = []
        for number, (each, body) in enumerate(zip(requests, bodies, strict=True), 1):
            due = began + each.arrival_seconds
            if (seconds := due - time.monotonic()) > 0:
                time.sleep(seconds)
            asked.append(pool.submit(ask, body, due))
            if on_progress is not None:
                on_progress(number)
        return [each.result() for each in asked]


def document(heard: Sequence[Heard], options: Options) -> dict[str, Any]:
    """Pure. A row for all that were answered, and one for each rung that they waited for."""
    answered = [each.sent for each in heard if each.sent is not None and each.sent.status == 200 and not each.sent.error]
    rungs = sorted({_rung(each) for each in answered})
    late = percentile([each.late_seconds for each in heard], 99)
    return {
        "kind": KIND, "method": asdict(options), "limits": {}, "skipped": [], "requests": len(heard), "refused": sum(each.sent is not None and each.sent.status in (429, 503) for each in heard),
        "results": [_row("all", answered), *(_row(rung, [each for each in answered if _rung(each) == rung]) for rung in rungs)],
        "statuses": dict(Counter("no answer" if each.sent is None else str(each.sent.status) for each in heard)),
        "errors": dict(Counter(each.sent.error for each in heard if each.sent is not None and each.sent.error)),
        "lateness_seconds": {"p99": late, "max": max(each.late_seconds for each in heard), "open_loop": late <= LATE_SECONDS},
    }  # fmt: skip


def _rung(sent: Sent) -> str:
    return str((sent.timing or {}).get("rung", "unknown"))


def _row(name: str, answered: Sequence[Sent]) -> dict[str, Any]:
    figures = {
        "first_token": [each.first_seconds for each in answered if each.first_seconds is not None],
        "inter_token": [gap for each in answered for gap in each.gaps],
        "latency": [each.seconds for each in answered],
    }
    made = {f"{figure}_seconds_p{percent}": percentile(values, percent) if values else None for figure, values in figures.items() for percent in _PERCENTS}
    return {"name": name, "answered": len(answered), "tokens": sum(each.tokens for each in answered), **made}


@contextmanager
def served(directories: Sequence[str], cluster: str) -> Iterator[str]:
    """`sllm-mini serve` with these models, as a process of its own; its address. It ends with the block. Raises SllmError where it does not begin."""
    command = [sys.executable, "-m", "sllm_mini.cli.main", "serve", *directories, "--cluster", cluster, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise SllmError("the server has no output to be read")
        giving_up = threading.Timer(_START_SECONDS, process.kill)
        giving_up.start()
        try:
            lines: list[str] = []
            while not lines or lines[-1].rstrip() != "}":  # where its document ends
                lines.append(process.stdout.readline())
                if not lines[-1]:
                    raise SllmError("the server did not begin; what it printed says why")
            giving_up.cancel()
            yield str(json.loads("".join(lines))["url"])
        finally:
            giving_up.cancel()
            process.terminate()


def read_served(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)
