"""`bench start` as one call: seconds from "not running" to the first token, from each rung of the ladder, beside `transformers serve` from cold.

Every row is a start that a client sees over HTTP, with the same prompt, greedy. A process that does not run yet is started and asked for its
model once it says at /health that it is up: until then it imports, which both pay and which stands apart (`imports_seconds`). Of ours the
runtime that workers are forked from is up then, too, and prepares the model (`inference.templates`), perhaps before it is asked for: that is no import,
so what a fork of a runtime takes for it is measured beside each such start and counted as if all of it came after (`prepared_seconds`). The other
rows ask a server that runs, whose model is in its node's memory: "runtime" has no process for it, and a fork of the zygote, which has prepared the
model, attaches to the bytes; "dram", "device" and "ready" have an instance that is as warm as that.
Rows take turns in shuffled rounds. Shown in chapter 11.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.cluster import ForkOptions, Zygote
from sllm_mini.cluster.nodes.launchers import IMPORTS
from sllm_mini.device import get_device
from sllm_mini.device.cpu import cpu_count
from sllm_mini.errors import SllmError
from sllm_mini.inference.templates import prepare
from sllm_mini.lab.bench.conditions import make_cold, make_warm
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.servebench.sender import Sender
from sllm_mini.loading.probe import measure_limits, measure_machine
from sllm_mini.serving.client import AdminClient

KIND = "sllm-mini bench start"
PEER = "transformers serve"
PROCESSES = ("process, disk", "process, memory")
"""Starts of `sllm-mini serve` itself; the checkpoint's files are on disk alone, or in the page cache."""
RUNGS = ("runtime", "dram", "device", "ready")
WARM_RATIO, REST_RATIO = 20.0, 2.0
"""How much sooner a start should be: from memory with a warm runtime, in all; and from a cold process, on what is not imports."""
_PROMPT = "Once upon a time"
_SECONDS = 120.0
_LOOK_SECONDS = 0.005
_TIMED = "sllm_mini.lab.startbench:timed_prepare"
Start = Callable[[str], dict[str, Any]]
"""Starts by a row; gives `seconds`, `imports_seconds`, `prepared_seconds` (of the seconds none), `text` and `timing`."""


@dataclass(frozen=True, slots=True)
class Options:
    """`rounds` of each row, with `tokens` a text; engines compute with `threads`, as many as there are CPUs where None, with `cuda` on the first GPU. Raises ValueError."""

    rounds: int = 5
    tokens: int = 8
    threads: int | None = None
    peer: bool = True
    cuda: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.tokens) < 1 or (self.threads is not None and self.threads < 1):
            raise ValueError("there is at least one round, one token and one thread")


def measure_start(model: str | os.PathLike[str], options: Options, *, folder: Path | None = None, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The document. `model` is a Hugging Face directory; converted for us before anything is timed. Raises SllmError where a server does not
    start or rows of ours answer differently."""
    say = on_stage or (lambda _: None)
    source, threads = Path(model).resolve(), options.threads or cpu_count()
    skipped = why_no_peer() if options.peer else "it was not asked for"
    with tempfile.TemporaryDirectory(prefix="sllm-startbench-", dir=folder, ignore_cleanup_errors=True) as made:
        say("converting the checkpoint")
        checkpoint = convert_checkpoint(source, Path(made) / "model.sllm")
        say("measuring the disk and memory")
        limits = measure_limits(made, device=get_device("cuda") if options.cuda else None, quick=True).bytes_per_second()
        with ExitStack() as stack:
            say("starting a server")
            warm = stack.enter_context(_ours(checkpoint, threads, cuda=options.cuda))
            runtime = stack.enter_context(Zygote(IMPORTS, [_TIMED]))
            names = (*PROCESSES, *RUNGS, *(() if skipped else (PEER,)))
            samples = play(starts_of(checkpoint, source, warm, runtime, threads, options), names, options, say)
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": asdict(measure_machine(made)),
            "model": {"name": source.name, "nbytes": checkpoint.nbytes, "dtypes": sorted({each.dtype for each in checkpoint.index.tensors})},
        }  # fmt: skip
    return facts | document(samples, options, threads, limits, checkpoint.nbytes, skipped)


def why_no_peer() -> str:
    """Why `transformers serve` cannot be started here; "" where it can."""
    missing = [name for name in ("accelerate", "fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{PEER} needs {', '.join(missing)}; run make peers"
    return "" if (Path(sys.executable).parent / "transformers").exists() else f"there is no command transformers beside {Path(sys.executable).name}"


def play(start: Start, names: tuple[str, ...], options: Options, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Each row once a round, in an order of its own. Raises SllmError where one of ours answers otherwise than another."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rng, text = random.Random(options.seed), None
    for number in range(options.rounds):
        for name in rng.sample(names, len(names)):
            say(f"round {number + 1} of {options.rounds}: {name}")
            found = start(name)
            if name != PEER:
                text = found["text"] if text is None else text
                if found["text"] != text:
                    raise SllmError(f"the start from {name} was answered {found['text']!r} and another {text!r}; what they took cannot be compared")
            samples[name].append(found)
    return samples


def document(
    samples: Mapping[str, list[dict[str, Any]]], options: Options, threads: int, limits: Mapping[str, float], nbytes: int, skipped: str,
) -> dict[str, Any]:  # fmt: skip
    """Pure. Ratios are of seconds in the same round, the peer's over ours; over 1 ours was sooner."""
    disk = max(limits.get("disk_direct_read", 0.0), limits.get("disk_buffered_read", 0.0))
    brought = limits.get("host_to_device_copy" if options.cuda else "memory_copy")
    floors: dict[str, float | None] = dict.fromkeys(samples, nbytes / brought if brought else None)
    if options.cuda:
        floors |= {"device": None, "ready": None}  # the weights are where they are used
    floors["process, disk"] = nbytes / disk if disk else None
    peer, ours = samples.get(PEER), samples[PROCESSES[0]]
    rows = []
    for name, found in samples.items():
        row: dict[str, Any] = {"name": name, "floor_seconds": floors[name], "same_text": found[0]["text"] == ours[0]["text"], "timing": found[-1]["timing"]}
        rests = [_rest(each) for each in found]
        parts = {f"{part}_": [each[f"{part}_seconds"] for each in found] for part in ("imports", "prepared")}
        for part, values in {"": [each["seconds"] for each in found], **parts, "rest_": rests}.items():
            row |= {f"{part}samples": values, f"{part}seconds_median": statistics.median(values), f"{part}seconds_min": min(values), f"{part}seconds_max": max(values)}
        if peer is not None and name != PEER:
            others = [_rest(each) for each in peer]
            ratios = {"ratio_to_peer": [a["seconds"] / b["seconds"] for a, b in zip(peer, found, strict=True)], "ratio_without_imports": [a / b for a, b in zip(others, rests, strict=True)]}
            for part, values in ratios.items():
                row |= {f"{part}_median": statistics.median(values), f"{part}_min": min(values), f"{part}_max": max(values)}
        rows.append(row)
    return {
        "kind": KIND, "method": {**asdict(options), "threads": threads, "prompt": _PROMPT}, "limits": {**limits, "ratio_to_peer": WARM_RATIO, "ratio_without_imports": REST_RATIO},
        "results": rows, "skipped": [{"name": PEER, "reason": skipped}] if skipped else [],
    }  # fmt: skip


def _rest(sample: Mapping[str, Any]) -> float:
    """What is not imports."""
    return float(sample["seconds"] - sample["imports_seconds"] + sample["prepared_seconds"])


def read_start(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)


def starts_of(checkpoint: Checkpoint, source: Path, warm: str, runtime: Zygote, threads: int, options: Options) -> Start:
    """`warm` is the address of our server that runs, `runtime` what forks can prepare the model in."""
    files = [path for path in Path(checkpoint.path).rglob("*") if path.is_file()]
    plain = [path for path in source.iterdir() if path.suffix == ".safetensors"]

    def start(name: str) -> dict[str, Any]:
        if name in RUNGS:
            with AdminClient(warm) as admin:
                _wait_at(admin, name)
            return _asked(warm, "model", options.tokens, time.perf_counter(), 0.0)
        if name == PEER:
            make_warm(plain)
            opened, asks_for = _peer(threads, cuda=options.cuda), os.fspath(source)
        else:
            (make_cold if name == "process, disk" else make_warm)(files)
            opened, asks_for = _ours(checkpoint, threads, cuda=options.cuda), "model"
        began = time.perf_counter()
        with opened as url:
            found = _asked(url, asks_for, options.tokens, began, time.perf_counter() - began)
        return found if name == PEER else found | {"prepared_seconds": _prepared_seconds(runtime, checkpoint)}

    return start


def _prepared_seconds(runtime: Zygote, checkpoint: Checkpoint) -> float:
    """What a runtime that has not met the model yet takes to prepare it, by its own clock."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = runtime.fork(_TIMED, os.fspath(checkpoint.path), options=ForkOptions(channel=theirs))
        with child, ours.makefile() as said:
            if not (seconds := said.readline()):
                raise SllmError(f"{checkpoint.path} could not be prepared (status {child.wait(_SECONDS)})")
            return float(seconds)


def timed_prepare(path: str, *, channel: socket.socket) -> None:
    """In a fork of the runtime: says how many seconds it took."""
    began = time.perf_counter()
    prepare(path)
    channel.sendall(f"{time.perf_counter() - began}\n".encode())


def _wait_at(admin: AdminClient, rung: str) -> None:
    """Leaves the model in its node's memory, and an instance that is as warm as `rung`."""
    admin.unload("model")
    end = time.perf_counter() + _SECONDS
    while admin.ps()["instances"]:
        if time.perf_counter() > end:
            raise SllmError("an instance that should end goes on")
        time.sleep(_LOOK_SECONDS)
    if rung != "runtime":
        admin.load("model", warmth=rung)


def _asked(url: str, model: str, tokens: int, began: float, imports: float) -> dict[str, Any]:
    sender = Sender(url)
    try:
        asked = time.perf_counter()
        found = sender.send({"model": model, "prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True})
    finally:
        sender.close()
    if found.first_seconds is None:
        raise SllmError(f"the server at {url} was asked for {tokens} tokens and gave none ({found.error or found.status})")
    return {"seconds": asked - began + found.first_seconds, "imports_seconds": imports, "prepared_seconds": 0.0, "text": found.text, "timing": found.timing}


@contextmanager
def _ours(checkpoint: Checkpoint, threads: int, *, cuda: bool) -> Iterator[str]:
    port, memory = _free_port(), max(1 << 30, 2 * checkpoint.nbytes)
    command = [sys.executable, "-m", "sllm_mini.cli.main", "serve", f"model={checkpoint.path}", "--port", str(port), "--cluster", "local:1", "--threads", str(threads)]
    with _process([*command, "--store-dram", str(memory), "--keep-alive", "-1", "--json", *(["--cuda", "--devices", "1"] if cuda else [])], port) as url:
        yield url


@contextmanager
def _peer(threads: int, *, cuda: bool) -> Iterator[str]:
    port = _free_port()
    command = [os.fspath(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cuda" if cuda else "cpu"]
    with _process(command, port, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads)) as url:
        yield url


@contextmanager
def _process(command: list[str], port: int, **environment: str) -> Iterator[str]:
    """Its address, once it says at /health that it is up. Ended with all that it started. Raises SllmError where it ends before."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **environment}, start_new_session=True) as process:
        try:
            end = time.perf_counter() + _SECONDS
            while not _healthy(port):
                if process.poll() is not None or time.perf_counter() > end:
                    said.seek(0)
                    raise SllmError(f"{command[-1] if process.poll() is None else Path(command[0]).name} did not start; it said: {said.read().decode(errors='replace')[-600:].strip()}")
                time.sleep(_LOOK_SECONDS)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
