"""Starting a model by every means there is: in a fresh process or a forked one, from files or from a store's memory.

`start_instance` starts one process and gives its climb of the warmth ladder; the process stays until it is closed and can
be asked more. `measure_starts` and `measure_brought` take samples in rounds, in a shuffled order that a seed fixes, so that
a busy minute hits all means; ratios are of one round. Nothing that is started outlives this process.
Call from one thread. Taught in chapter 05.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster import Child, ForkOptions, ProcessMemory, Zygote, memory_of
from sllm_mini.cluster.zygote import RUNTIME
from sllm_mini.errors import ModelError, StoreError
from sllm_mini.lab.anatomy import DEFAULT_PROMPT, ColdStart
from sllm_mini.lab.bench.conditions import make_warm
from sllm_mini.types import Span

How = Literal["copy", "map", "attach"]
HOWS: tuple[How, ...] = ("copy", "map", "attach")

CHILD = "sllm_mini.lab.warm_child"
ENTRY = f"{CHILD}:serve"
PATIENCE_SECONDS = 300.0
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is to do: answer `prompt` with the model at `path` ("": no model, the runtime only). With `store`, the
    address of one, the model's bytes are attached there under `name`; without, they are loaded from `path`."""

    path: str = ""
    store: str = ""
    name: str = ""
    device: str = "cpu"
    prompt: str = DEFAULT_PROMPT

    def __post_init__(self) -> None:
        if self.store and not self.name:
            raise ValueError("a model in a store is asked for by name; say which")


@dataclass(frozen=True, slots=True)
class WarmStart(ColdStart):
    """One start, whatever it began with. `again_seconds` is the time to the first token of a second request, which finds
    everything ready (0 if there was none); `memory` what the process held after that."""

    again_seconds: float = 0.0
    memory: ProcessMemory | None = None


class Instance:
    """A process that was started, until it is closed. `start`: its climb, None for one without a model."""

    def __init__(self, pid: int, channel: socket.socket, end: Callable[[], None], task: Task, spawned: float) -> None:
        """Made by `start_instance`."""
        self.pid, self.task = pid, task
        self._channel, self._end = channel, end
        channel.settimeout(PATIENCE_SECONDS)
        self._lines = channel.makefile("rw", encoding="utf-8")
        answer = self._answer()
        self.ready_seconds = time.monotonic() - spawned
        self.start = _start(answer, task, spawned) if task.path else None

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """One question of `warm_child`'s and its answer. Raises ModelError if it failed or the process is gone."""
        try:
            self._lines.write(json.dumps({"do": do} | question) + "\n")
            self._lines.flush()
        except OSError as error:
            raise ModelError(f"process {self.pid} is gone ({error}); start another one") from error
        return self._answer()

    def bring(self, how: How, checkpoint: Checkpoint, store: str, name: str, *, keep: bool = False) -> dict[str, Any]:
        """Has the process bring a model's tensors, see `warm_child`."""
        return self.ask("bring", how=how, path=str(checkpoint.path), store=store, name=name, keep=keep)

    @property
    def memory(self) -> ProcessMemory:
        return memory_of(self.pid)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise ModelError(f"process {self.pid} did not answer in {PATIENCE_SECONDS:g} seconds; give it a smaller model") from error
        except ConnectionResetError:
            line = ""
        if not line:
            raise ModelError(f"process {self.pid} ended without an answer; its standard error says why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ModelError(f"process {self.pid} failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process and waits for that. Safe to call twice."""
        with suppress(OSError):  # what was still to be written has no reader
            self._lines.close()
        self._channel.close()
        self._end()

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def start_instance(task: Task, *, zygote: Zygote | None = None) -> Instance:
    """A process that does `task`, forked from `zygote` or fresh; returns after its first token. Raises ModelError if it
    fails, ZygoteError if it cannot be forked."""
    ours, theirs = socket.socketpair()
    with theirs:
        spawned = time.monotonic()
        request = asdict(task) | {"spawned": spawned}
        if zygote is not None:
            child: Child = zygote.fork(ENTRY, request, options=ForkOptions(channel=theirs))
            pid, end = child.pid, child.close
        else:
            process = subprocess.Popen([sys.executable, "-m", CHILD, "serve", json.dumps(request)], stdin=theirs.fileno(), start_new_session=True)
            pid, end = process.pid, lambda: _end_process(process)
    try:
        return Instance(pid, ours, end, task, spawned)
    except BaseException:
        ours.close()
        end()
        raise


def _end_process(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(answer: Mapping[str, Any], task: Task, spawned: float) -> WarmStart:
    spans = sorted(msgspec.convert(answer["spans"], list[Span]), key=lambda span: (span.start, span.end))
    return WarmStart(
        spans=tuple(replace(span, start=span.start - spawned, end=span.end - spawned) for span in spans),
        first_token_seconds=answer["first_token"] - spawned, text="", token_ids=tuple(answer["token_ids"]), prompt=task.prompt,
        prompt_tokens=answer["prompt_tokens"], device=task.device, threads=0, nbytes=answer["nbytes"], page_cache_fraction=None, machine={},
    )  # fmt: skip


def runtime_zygote(checkpoint: Checkpoint) -> Zygote:
    """A zygote with all that a process of chapter 05 imports, the module of the checkpoint's model included."""
    kind = json.loads(checkpoint.read_companion("config.json"))["model_type"]
    own = [f"transformers.models.{kind}.modeling_{kind}", f"transformers.models.{kind}.configuration_{kind}"]
    ours = [CHILD, "sllm_mini.storage.client", "sllm_mini.lab.coldstart", "sllm_mini.lab.bench.checksum"]
    return Zygote([*RUNTIME, *own, *ours], [ENTRY])


class StoreProcess:
    """A store in a process of its own, as `sllm-mini store` is one; it ends when it is closed or this process ends."""

    def __init__(self, folder: str | os.PathLike[str], dram_nbytes: int, device_nbytes: Mapping[str, int] | None = None) -> None:
        """`folder` must be there. Raises StoreError if it does not start."""
        from sllm_mini.storage import StoreClient

        self.address = str(Path(folder) / "socket")
        options = {"folder": str(folder), "address": self.address, "dram_nbytes": dram_nbytes, "device_nbytes": dict(device_nbytes or {})}
        command = [sys.executable, "-m", CHILD, "store", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.pid = self._process.pid
        if self._process.stdout is None or self._process.stdout.readline() != b"ready\n":
            self.close()
            raise StoreError(f"the store did not start (exit code {self._process.returncode}); its standard error says why")
        self.client = StoreClient(self.address)

    def close(self) -> None:
        """Ends the store and waits for that. Safe to call twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        _end_process(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def measure_starts(means: Mapping[str, Callable[[], Instance]], *, rounds: int = 3, seed: int = 0) -> dict[str, list[WarmStart]]:
    """Every means once a round, one process at a time: its climb, a second request, its memory. The lists are in the order
    of the rounds. Raises what starting raises, ModelError if two starts gave different tokens, ValueError for an instance
    without a model."""
    order, generator = list(means), random.Random(seed)
    found: dict[str, list[WarmStart]] = {name: [] for name in order}
    for _ in range(rounds):
        for name in generator.sample(order, len(order)):
            with means[name]() as instance:
                if instance.start is None:
                    raise ValueError(f"{name}: a start needs a model; give its task a path")
                found[name].append(replace(instance.start, again_seconds=instance.ask("again")["seconds"], memory=instance.memory))
    if len({start.token_ids for starts in found.values() for start in starts}) > 1:
        raise ModelError("the same prompt got different tokens by different means; verify the checkpoint")
    return found


@dataclass(frozen=True, slots=True)
class Brought:
    """A model's tensors brought into a running process: `seconds` until all are there, `use_seconds` the first pass over
    every byte, `again_seconds` the second."""

    how: How
    name: str
    nbytes: int
    seconds: float
    use_seconds: float
    again_seconds: float

    @property
    def touch_seconds(self) -> float:
        """What the first use took more than the second: the page faults."""
        return max(self.use_seconds - self.again_seconds, 0.0)


def measure_brought(instance: Instance, models: Mapping[str, Checkpoint], store: StoreProcess, *, rounds: int = 5, seed: int = 0) -> list[Brought]:
    """Every model by copy, mapping and attaching, once a round, in one process that runs already; files are in the page
    cache, and the first round is left out (imports, threads, memory that the host had yet to back). Raises ModelError if
    two of them brought different bytes."""
    generator, found = random.Random(seed), []
    sums: dict[str, int] = {}
    work: list[tuple[str, How]] = [(name, how) for name in models for how in HOWS]
    for number in range(rounds + 1):
        for name, how in generator.sample(work, len(work)):
            checkpoint = models[name]
            _make_warm(checkpoint)
            answer = instance.bring(how, checkpoint, store.address, name)
            if sums.setdefault(name, answer["sum"]) != answer["sum"]:
                raise ModelError(f"{name} came with other bytes by {how}; verify the checkpoint")
            if number:
                found.append(Brought(how, name, answer["nbytes"], answer["seconds"], answer["use_seconds"], answer["again_seconds"]))
    return found


@dataclass(frozen=True, slots=True)
class Crowd:
    """`count` processes with one model each. `nbytes` is what all of them hold together, shared pages counted once: their
    proportional sizes and those of whoever shares with them, the zygote and, for "attach", the store."""

    how: How
    count: int
    nbytes: int


def measure_memory(zygote: Zygote, checkpoint: Checkpoint, store: StoreProcess, name: str, *, counts: Sequence[int] = (1, 2, 3)) -> list[Crowd]:
    """What 1, 2, … forked processes hold that all use every byte of one model, by each way to bring it. Costs the model once
    for every process of the largest crowd."""
    found = []
    for how in HOWS:
        crowd: list[Instance] = []
        try:
            for count in range(1, max(counts) + 1):
                crowd.append(start_instance(Task(), zygote=zygote))
                _make_warm(checkpoint)
                crowd[-1].bring(how, checkpoint, store.address, name, keep=True)
                if count in counts:
                    pids = [zygote.pid, *([store.pid] if how == "attach" else []), *(instance.pid for instance in crowd)]
                    found.append(Crowd(how, count, sum(memory_of(pid).proportional_nbytes for pid in pids)))
        finally:
            for instance in crowd:
                instance.close()
    return found


def _make_warm(checkpoint: Checkpoint) -> None:
    make_warm([checkpoint.path / partition.file for partition in checkpoint.index.partitions])
