"""A worker process from the outside: start it, ask it, give up on it (chapter 02)."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from sllm_mini.errors import SllmError
from sllm_mini.lab.children import last_line, signal_group

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


class Worker:
    """One worker process. Not safe from several threads. Use as a context manager: it leaves no process behind."""

    def __init__(self, environment: Mapping[str, str] | None = None, *, limit_seconds: float = 600.0) -> None:
        self._limit = limit_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sllm_mini.lab.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | _QUIET | dict(environment or {}),
            start_new_session=True,  # so that what it starts can be ended with it
        )
        asking, answers = self._process.stdin, self._process.stdout
        if asking is None or answers is None:
            raise WorkerError("its process has no pipes")
        self._asking, self._answers = asking, answers
        self._unread = b""

    def ask(self, *, at_least_seconds: float = 0.0, **question: Any) -> dict[str, Any]:
        """Sends one question and returns its answer. Raises WorkerError for a refusal, and, after ending the process,
        for a crash or no answer within the limit (or `at_least_seconds`, where that is longer)."""
        try:
            self._asking.write(json.dumps(question).encode() + b"\n")
            self._asking.flush()
            answer = json.loads(self._line(max(self._limit, at_least_seconds)))
        except (BrokenPipeError, EOFError):
            raise WorkerError(self._crash()) from None
        if "error" in answer:
            raise WorkerError(" ".join(str(answer["error"]).split())[:500])
        return dict(answer)

    def _line(self, limit_seconds: float) -> bytes:
        end = time.monotonic() + limit_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(end - time.monotonic(), 0)):
                    self.close()
                    raise WorkerError(f"it gave no answer within {limit_seconds:g} seconds and was ended")
                data = os.read(self._answers.fileno(), 1 << 16)
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
        """Ends the process and whatever it started."""
        signal_group(self._process, signal.SIGKILL)
        self._process.wait()
        for stream in (self._asking, self._answers, self._errors):
            try:
                stream.close()
            except BrokenPipeError:
                continue  # a question that nobody read

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
