"""A worker process that is started again after it crashed, and whose first answers are not believed (chapter 03)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sllm_mini.lab.bench.process import Worker, WorkerError

_IMPORT_SECONDS = 120.0


@dataclass(slots=True)
class Process:
    """A worker, with the loader that `opener` names in it unless that is empty. `job`: what the worker is told about it. Not
    safe from several threads."""

    opener: str
    job: dict[str, Any]
    limit_seconds: float
    worker: Worker | None = None
    known: set[str] = field(default_factory=set)
    """What it was asked before. The first answer of each kind comes with imports and new threads, and is not believed."""

    def start(self) -> Worker:
        """Starts it unless it runs; it imports while the caller does other things."""
        if self.worker is None:
            self.worker = Worker(limit_seconds=self.limit_seconds)
        return self.worker

    def ask(self, kind: str, prepare: Callable[[], object], **question: Any) -> dict[str, Any]:
        """Prepares, asks and gives the answer, the second one to the first question of a kind. Raises WorkerError."""
        try:
            worker = self.start()
            if self.opener and "open" not in self.known:
                worker.ask(at_least_seconds=_IMPORT_SECONDS, do="open", opener=self.opener, **self.job)
                self.known.add("open")
            if kind not in self.known:
                prepare()
                worker.ask(at_least_seconds=_IMPORT_SECONDS, **question)
                self.known.add(kind)
            prepare()
            return worker.ask(**question)
        except WorkerError:
            self.close()
            raise

    def close(self) -> None:
        worker, self.worker = self.worker, None
        self.known.clear()
        if worker is not None:
            worker.close()
