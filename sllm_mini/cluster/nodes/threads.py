"""Workers that are threads of their agent: the same rungs and the same service, in one process. Explained in chapter 08.

PROCESS and RUNTIME are this process, so they cost what it has not imported yet, and a rung's memory is by how much this process
has grown. A thread cannot be killed: one that should die is cut off, so that nothing it says is heard, and ends at its next
step; what it holds is free then.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sllm_mini.cluster.nodes.climbing import Climber, MakeEngine, find_engine
from sllm_mini.cluster.nodes.worker_messages import ClimbRung, Rung
from sllm_mini.cluster.process_memory import memory_of
from sllm_mini.errors import ModelError, SllmError, WireError
from sllm_mini.inference.migration.messages import Mode, Report
from sllm_mini.inference.session import Session
from sllm_mini.types import Warmth

if TYPE_CHECKING:
    from sllm_mini.storage import Store


class ThreadWorker:
    """A worker in this process. See `WorkerHandle`; made by `ThreadLauncher`."""

    def __init__(self, name: str, store: Store | None, make: MakeEngine | None, on_death: Callable[[str], None]) -> None:
        self.name, self.pid, self.address = name, os.getpid(), ""
        self._on_death = on_death
        self._lock = threading.Lock()
        self._gone = threading.Event()
        self._ending: threading.Thread | None = None
        self._watch: threading.Thread | None = None
        self._climber = Climber(name, on_error=lambda error: self._die(f"its engine cannot be stepped any more: {error}"), store=store, make=make)
        self._before = memory_of(self.pid)
        self.launched = Rung(Warmth.PROCESS, 0.0, 0, 0)

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def climb(self, order: ClimbRung) -> Rung:
        with self._asked():
            seconds = self._climber.climb(order)
            self.address = self._climber.service.address if order.warmth == Warmth.READY else ""
        if not order.measure:
            return Rung(order.warmth, seconds, 0, 0)
        memory, before = memory_of(self.pid), self._before
        private, proportional = memory.private_nbytes - before.private_nbytes, memory.proportional_nbytes - before.proportional_nbytes
        return Rung(order.warmth, seconds, max(private, 0), max(proportional, 0))

    def whole(self, timeout: float | None = None) -> None:
        with self._asked():
            self._climber.whole(timeout)

    def stage(self, start: int, stop: int, address: str, key: bytes = b"") -> str:
        with self._asked():
            return self._climber.stage(start, stop, address, key)

    def fall(self, warmth: Warmth) -> None:
        with self._asked():
            self._climber.fall(warmth)

    def run(self, session: bytes, epoch: int) -> None:
        with self._asked():
            self._climber.service.run(Session.from_bytes(session), epoch)

    def move(self, request_id: str, address: str, *, mode: Mode = "tokens", target_gap_tokens: int = 4) -> Report:
        with self._asked():
            return self._climber.service.move(request_id, address, mode=mode, target_gap_tokens=target_gap_tokens)

    def drop(self, request_id: str, epoch: int) -> None:
        with self._asked():
            self._climber.service.drop(request_id, epoch)

    def stuck_seconds(self, seconds: float) -> float:
        with self._asked():
            return self._climber.stuck_seconds()

    def watch(self, silent_seconds: float, stuck_seconds: float = math.inf) -> None:
        self._watch = threading.Thread(target=self._look, args=(min(silent_seconds, stuck_seconds) / 4, stuck_seconds), name=f"sllm-watch-{self.name}", daemon=True)
        self._watch.start()

    def kill(self) -> None:
        self._die("it was killed")

    def close(self) -> None:
        with self._lock:
            self._gone.set()
            ending = self._ending
        for thread in (ending, self._watch):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        self._climber.close()

    def _die(self, why: str) -> None:
        """At once for whoever hears it; what it holds is given back by a thread of its own."""
        with self._lock:
            if self._gone.is_set():
                return
            self._gone.set()
            self._climber.cut()
            self._ending = threading.Thread(target=self._end, args=(why,), name=f"sllm-end-{self.name}", daemon=True)
            self._ending.start()

    def _end(self, why: str) -> None:
        self._on_death(why)
        self._climber.close()

    def _look(self, seconds: float, stuck_seconds: float) -> None:
        while not self._gone.wait(seconds):
            stuck = self._climber.stuck_seconds()
            if stuck >= stuck_seconds:
                self._die(f"its engine had not ended a step for {stuck:.1f} s")

    @contextmanager
    def _asked(self) -> Iterator[None]:
        if self.gone:
            raise WireError(f"worker {self.name} is gone; its requests begin again elsewhere")
        try:
            yield
        except SllmError:
            raise
        except Exception as error:
            raise ModelError(str(error) or type(error).__name__) from error


class ThreadLauncher:
    """See `Launcher`. Workers attach from `store`, which is the caller's; `engine` as for `SpawnLauncher`. Raises ModelError if
    there is no such function."""

    def __init__(self, store: Store | None = None, *, engine: str = "") -> None:
        self._store, self._make = store, find_engine(engine)
        self._lock = threading.Lock()
        self._workers: set[ThreadWorker] = set()
        self._closed = False

    def launch(self, name: str, on_death: Callable[[str], None], *, measure: bool = True) -> ThreadWorker:
        with self._lock:
            if self._closed:
                raise WireError(f"worker {name} cannot start: this launcher was closed; make another")
            worker = ThreadWorker(name, self._store, self._make, on_death)
            self._workers = {known for known in self._workers if not known.gone} | {worker}
            return worker

    def prepare(self, source: str) -> None:
        """Threads share what they import; skeletons and tokenizers are each worker's own."""

    def shared_nbytes(self) -> int:
        return 0

    def close(self) -> None:
        with self._lock:
            workers, self._workers, self._closed = self._workers, set(), True
        for worker in workers:
            worker.close()
