"""Launchers whose workers are processes: forked by a zygote, or fresh interpreters. Explained in chapters 05 and 08.

A fork has all imports from its first instruction, so the rung RUNTIME costs it nothing and the zygote's memory (some 300 MB) is
paid once a machine; a fresh interpreter stands at PROCESS with a tenth of that, and pays seconds for RUNTIME itself. A worker
ends when its agent closes it or dies.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import socketpair

from sllm_mini.cluster.nodes.workers import ProcessWorker
from sllm_mini.cluster.process_memory import memory_of
from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.cluster.zygote import Child, ForkOptions, Zygote, ZygoteError, ZygoteGoneError, fork_from, prepare_in
from sllm_mini.errors import UnsupportedError, WireError
from sllm_mini.inference.templates import MOST
from sllm_mini.inference.workers.process import Process, start_process
from sllm_mini.wire import WireTimeout

log = logging.getLogger("sllm_mini.cluster")
IMPORTS = (*RUNTIME, "sllm_mini.cluster.runtime:build_tables")
"""What a zygote has that workers are forked from."""
ENTRY = "sllm_mini.cluster.nodes.climbing:serve"
PREPARE = "sllm_mini.inference.templates:prepare"
"""What such a zygote runs itself."""
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from sllm_mini.cluster.nodes.climbing import main; main()"
_PREPARE_SECONDS = 30.0
_STATUS_SECONDS = 0.5


class _Workers:
    """The workers of a launcher, for its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: set[ProcessWorker] = set()
        self._closed = False

    def check_open(self) -> None:
        with self._lock:
            if self._closed:
                raise WireError("this launcher was closed; make another")

    def add(self, worker: ProcessWorker) -> ProcessWorker:
        with self._lock:
            self._workers = {known for known in self._workers if not known.gone}
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.close()
        raise WireError(f"worker {worker.name} was closed with its launcher")

    def close(self) -> None:
        with self._lock:
            workers, self._workers, self._closed = self._workers, set(), True
        for worker in workers:
            worker.close()


class SpawnLauncher:
    """See `Launcher`. Each worker is a fresh interpreter, in which no torch is imported until RUNTIME. `engine` names what makes
    engines in place of the store's models (`climbing.find_engine`). A worker may take `patience` seconds to answer."""

    def __init__(self, *, engine: str = "", environment: Mapping[str, str] | None = None, patience: float = 30.0) -> None:
        self._engine, self._environment, self._patience = engine, environment, patience
        self._workers = _Workers()

    def launch(self, name: str, on_death: Callable[[str], None], *, measure: bool = True) -> ProcessWorker:
        self._workers.check_open()
        begun = time.monotonic()
        search = json.dumps([os.path.abspath(place) for place in sys.path])
        ours, process = start_process(["-c", _PROGRAM, name, self._engine, search], self._environment)
        return self._workers.add(ProcessWorker(name, ours, process, on_death, begun=begun, seconds=self._patience, measure=measure))

    def prepare(self, source: str) -> None:
        """There is nothing that a fresh process could take it from."""

    def shared_nbytes(self) -> int:
        return 0

    def close(self) -> None:
        self._workers.close()


@dataclass(slots=True, eq=False)
class _Home:
    """A zygote that workers come from: this launcher's own, or one that others own where `zygote` is None. Of this launcher one thread
    asks it at a time: while it prepares it forks nothing, and that is not being stuck."""

    path: str
    zygote: Zygote | None = None
    children: int = 0
    retired: bool = False
    gone: bool = False
    turn: threading.Lock = field(default_factory=threading.Lock)


class ZygoteLauncher:
    """See `Launcher`. Workers are forks of a zygote: of the one that listens at `path`, else of one that is started now and has
    imported what a model needs, and `modules` (with `engine`, that and `modules` alone).

    A zygote that does not fork within `fork_seconds` is left to those workers that it has, and another is started for the next.
    Raises ZygoteError if none can be.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        engine: str = "",
        modules: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        fork_seconds: float = 2.0,
        patience: float = 30.0,
    ) -> None:
        self._engine, self._environment, self._fork_seconds, self._patience = engine, environment, fork_seconds, patience
        self._imports = [*([engine.partition(":")[0]] if engine else IMPORTS), *modules]
        self._workers = _Workers()
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._sources: dict[str, None] = {}
        """What zygotes are to prepare, in the order in which they were asked to."""
        self._retired: list[_Home] = []
        self._home: _Home | None = _Home(os.fspath(path)) if path is not None else self._start()

    def launch(self, name: str, on_death: Callable[[str], None], *, measure: bool = True) -> ProcessWorker:
        self._workers.check_open()
        begun = time.monotonic()
        ours, theirs = socketpair()
        try:
            with theirs:
                options = ForkOptions(channel=theirs, environment=self._environment, patience=self._fork_seconds)
                process = self._fork(name, options)
        except BaseException:
            ours.close()
            raise
        return self._workers.add(ProcessWorker(name, ours, process, on_death, begun=begun, seconds=self._patience, measure=measure))

    def prepare(self, source: str) -> None:
        """Also in zygotes that are started later."""
        with self._lock:
            self._sources.pop(source, None)
            self._sources[source] = None
            for oldest in [*self._sources][:-MOST]:
                del self._sources[oldest]
            home = self._home
        if home is not None and not self._engine:
            self._prepare_in(home, source)

    def shared_nbytes(self) -> int:
        with self._lock:
            zygotes = [home.zygote for home in (self._home, *self._retired) if home is not None]
        total = 0
        for zygote in zygotes:
            with suppress(UnsupportedError):  # it has died; the next launch starts another
                total += 0 if zygote is None else memory_of(zygote.pid).proportional_nbytes
        return total

    def close(self) -> None:
        self._workers.close()
        with self._lock:
            homes, self._home, self._retired = [*self._retired, *([self._home] if self._home else [])], None, []
        for home in homes:
            _end(home)

    def _start(self) -> _Home:
        zygote = Zygote(self._imports, [ENTRY, *([] if self._engine else [PREPARE])], environment=self._environment, patience=self._fork_seconds)
        return _Home(zygote.path, zygote)

    def _prepare_in(self, home: _Home, source: str) -> None:
        """The zygote has what that makes, or each start makes it itself, in this one and in those to come."""
        if home.gone:
            return
        try:
            with _asking(home):
                why_not = prepare_in(home.path, PREPARE, source, patience=_PREPARE_SECONDS)
                home.gone = bool(why_not)  # the next launch starts another
        except ZygoteError as error:
            why_not = str(error)
        if why_not:
            log.info("%s is made anew at each start: %s", source, why_not)
            with self._lock:
                self._sources.pop(source, None)

    def _prepare_all(self, home: _Home) -> None:
        with self._lock:
            sources = [*self._sources]
        for source in sources:
            self._prepare_in(home, source)

    def _fork(self, name: str, options: ForkOptions) -> Process:
        home = self._present()
        try:
            child = self._child(home, name, options)
        except ZygoteGoneError:
            home = self._present(instead_of=home)
            child = self._child(home, name, options)
        with self._lock:
            home.children += 1
        return ForkedProcess(child, lambda: self._left(home))

    def _child(self, home: _Home, name: str, options: ForkOptions) -> Child:
        with _asking(home):
            return fork_from(home.path, ENTRY, name=name, engine=self._engine, options=options)

    def _present(self, instead_of: _Home | None = None) -> _Home:
        """The zygote to fork from; a new one where there is none, or only one that does not answer."""
        with self._starting:  # one thread starts it, and the others wait for that
            with self._lock:
                home = self._home
            if home is not None and home is not instead_of:
                return home
            self._workers.check_open()
            found = self._start()
            with self._lock:
                self._home = found
                if home is not None:
                    home.retired = True
                    self._retired.append(home)
            if home is not None:
                self._end_if_left(home)
            if self._sources and not self._engine:
                threading.Thread(target=self._prepare_all, args=(found,), name="sllm-prepare", daemon=True).start()
            return found

    def _left(self, home: _Home) -> None:
        with self._lock:
            home.children -= 1
        self._end_if_left(home)

    def _end_if_left(self, home: _Home) -> None:
        with self._lock:
            if not home.retired or home.children or home not in self._retired:
                return
            self._retired.remove(home)
        _end(home)


@contextmanager
def _asking(home: _Home) -> Iterator[None]:
    """One question to a zygote. Who waited for one that has turned out to be gone waits no more. Raises ZygoteGoneError."""
    with home.turn:
        if home.gone:
            raise ZygoteGoneError("the zygote that was to fork it is given up; start a new one")
        try:
            yield
        except ZygoteGoneError:
            home.gone = True
            raise


def _end(home: _Home) -> None:
    if home.zygote is not None:
        if home.retired:
            home.zygote.kill()  # it hangs: it would not hear that it should end
        home.zygote.close()


class ForkedProcess:
    """A zygote's child as a `Process`: ended and waited for also where the zygote hangs."""

    def __init__(self, child: Child, on_end: Callable[[], None] = lambda: None) -> None:
        self.pid = child.pid
        self._child, self._on_end = child, on_end

    def kill(self) -> None:
        with suppress(ZygoteError):  # it has ended
            self._child.kill()

    def wait(self) -> int | None:
        self._child.gone()
        status = None
        with suppress(WireTimeout, ZygoteError):  # the zygote hangs, or has ended too
            status = self._child.wait(_STATUS_SECONDS)
        self._child.close()
        self._on_end()
        return status
