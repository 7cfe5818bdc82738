"""A worker process from the outside: start it, ask it, give up on it (chapter 02)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sllm_mini.cluster.zygote import ForkOptions
from sllm_mini.errors import SllmError
from sllm_mini.lab.children import last_line
from sllm_mini.lab.nursery import Nursery

_ENTRY = "sllm_mini.lab.bench.worker:main"
_TAIL_NBYTES = 2000
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RUNAI_STREAMER_LOG_LEVEL": "ERROR",
}


class WorkerError(SllmError):
    """A loader's process crashed, hung or refused; the sentence says which."""


_NURSERY = Nursery(["torch", "sllm_mini.loading"], [_ENTRY])
"""Each of its processes looks for modules where this one does."""


class Worker:
    """One worker process, which has torch imported from its first moment. Not safe from several threads. Use as a context manager: it
    leaves no process behind. Raises ZygoteError where it cannot be forked."""

    def __init__(self, environment: Mapping[str, str] | None = None, *, limit_seconds: float = 600.0) -> None:
        self._limit = limit_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._socket, theirs = socket.socketpair()
        self._unread = b""
        try:
            with theirs:
                told = os.environ | _QUIET | dict(environment or {})
                self._process = _NURSERY.fork(sys.path, options=ForkOptions(stdout=self._errors, stderr=self._errors, channel=theirs, environment=told))
        except BaseException:
            self._socket.close()
            self._errors.close()
            raise

    def ask(self, *, at_least_seconds: float = 0.0, **question: Any) -> dict[str, Any]:
        """Sends one question and returns its answer. Raises WorkerError for a refusal, and, after ending the process,
        for a crash or no answer within the limit (or `at_least_seconds`, where that is longer)."""
        try:
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(question).encode() + b"\n")
            answer = json.loads(self._line(max(self._limit, at_least_seconds)))
        except (ConnectionError, EOFError):
            raise WorkerError(self._crash()) from None
        if "error" in answer:
            raise WorkerError(" ".join(str(answer["error"]).split())[:500])
        return dict(answer)

    def _line(self, limit_seconds: float) -> bytes:
        end = time.monotonic() + limit_seconds
        while b"\n" not in self._unread:
            try:
                self._socket.settimeout(max(end - time.monotonic(), 1e-3))
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                self.close()
                raise WorkerError(f"it gave no answer within {limit_seconds:g} seconds and was ended") from None
            if not data:
                raise EOFError
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _crash(self) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(size - _TAIL_NBYTES, 0))
        last = last_line(self._errors.read().decode(errors="replace"))
        self.close()
        return f"its process ended with {how}" + (f": {last[:300]}" if last else "")

    def close(self) -> None:
        """Ends the process and whatever it started. Safe to call twice."""
        if self._socket.fileno() < 0:
            return
        self._process.close()
        with suppress(ProcessLookupError):  # what it started outlives a leader that crashed; a group that is gone is no error
            os.killpg(self._process.pid, signal.SIGKILL)
        self._socket.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
