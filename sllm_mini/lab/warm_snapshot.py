"""A start from a snapshot, where CRIU works: a warmed-up process saved, ended, brought back and asked at once (chapter 05)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sllm_mini.cluster import restore_snapshot, save_snapshot
from sllm_mini.errors import ModelError
from sllm_mini.lab.warm import CHILD, PATIENCE_SECONDS, Task


@dataclass(frozen=True, slots=True)
class Restored:
    """A process that answered from its snapshot: `save_seconds` to write it, `restore_seconds` until it ran again,
    `first_token_seconds` from the same moment to the first token of a request that waited for it."""

    nbytes: int
    save_seconds: float
    restore_seconds: float
    first_token_seconds: float


def measure_snapshot(task: Task, folder: str | os.PathLike[str]) -> Restored:
    """A process with the task's model, warmed up, saved with CRIU under `folder` and brought back once. Raises what
    `save_snapshot` and `restore_snapshot` raise, ModelError if the process fails or gives another token."""
    if task.store:
        raise ValueError("a process that is attached to a store holds a socket to it and cannot be saved; give it a model of its own")
    out, saved = Path(folder, "answer"), Path(folder, "snapshot")
    command = [sys.executable, "-m", CHILD, "alone", json.dumps(asdict(task) | {"spawned": time.monotonic()}), str(out)]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        before = _await_answer(out, 0, lambda: process.poll() is None)
        began = time.monotonic()
        snapshot = save_snapshot(process.pid, saved)
        save_seconds = time.monotonic() - began
    finally:
        process.kill()
        process.wait()  # its pid must be free for the one that comes back
    began = time.monotonic()
    pid = restore_snapshot(saved)
    watch = os.pidfd_open(pid)
    try:
        restored = time.monotonic()
        signal.pidfd_send_signal(watch, signal.SIGUSR1)
        after = _await_answer(out, 1, lambda: os.path.exists(f"/proc/{pid}"))
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(watch, signal.SIGKILL)
        os.close(watch)
    if before["token_id"] != after["token_id"]:
        raise ModelError("the restored process gave another token than the one that was saved; verify the checkpoint")
    return Restored(snapshot.nbytes, save_seconds, restored - began, after["at"] - began)


def _await_answer(out: Path, number: int, running: Callable[[], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        alive = running()
        with suppress(FileNotFoundError):
            answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            if answer["number"] == number:
                return answer
        if not alive or time.monotonic() > deadline:
            raise ModelError("the process that stands alone gave no answer; start it by hand and read what it says")
        time.sleep(0.001)
