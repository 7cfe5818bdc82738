"""The thread that decides: takes what happened out of a queue, tells the controller, carries its actions out. Chapter 08."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from heapq import heappop, heappush
from typing import TypeVar

from sllm_mini.cluster.accounting import Accountant
from sllm_mini.cluster.live.carry import Carry
from sllm_mini.cluster.live.members import Members
from sllm_mini.control import messages as m
from sllm_mini.control.controller import Controller
from sllm_mini.control.replay import Record, Recorder
from sllm_mini.errors import SllmError

_R = TypeVar("_R")
Happened = Callable[[], Iterable[m.AnyEvent]]
"""Called on the deciding thread, where the event is made: earlier, it would carry what a decision since has changed."""


class Loop:
    """`carry` and `members` are used on its thread alone. `beat()` is called between two events and says in how many seconds it wants
    to be called again. An error on the thread ends it: `on_broken` is told, and who asks for anything is.

    `post`, `call` and `do` from any thread but its own.
    """

    def __init__(
        self, controller: Controller, write: Callable[[bytes], object], accountant: Accountant, now: Callable[[], float], beat: Callable[[], float],
        on_broken: Callable[[BaseException], object],
    ) -> None:  # fmt: skip
        self.controller = controller
        self.accountant = accountant
        self.counts: dict[str, int] = {}
        """How many events of each kind the controller was told."""
        self.carry: Carry
        self.members: Members
        self._write, self._now, self._beat, self._on_broken = write, now, beat, on_broken
        self._recorder = Recorder(controller, write)
        self._posted: queue.SimpleQueue[Happened | None] = queue.SimpleQueue()
        self._timers: list[tuple[float, int]] = []
        self._lock = threading.Lock()
        self._waiters: list[threading.Event] = []
        self._asked: set[Future[object]] = set()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sllm-cluster", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, happened: Happened) -> None:
        self._posted.put(happened)

    def call(self, function: Callable[[], _R]) -> _R:
        """What it returns, or raises (an SllmError), on the thread that decides."""
        found: list[_R] = []

        def happened() -> list[m.AnyEvent]:
            found.append(function())
            return []

        self.do(happened)
        return found[0]

    def do(self, happened: Happened) -> None:
        """Returns when the controller has been told. Raises what `happened` raises."""
        done: Future[object] = Future()

        def asked() -> Iterable[m.AnyEvent]:
            try:
                events = list(happened())
            except SllmError as error:
                done.set_exception(error)
                return []
            self.members.settled.append(done)  # type: ignore[arg-type]
            return events

        with self._lock:
            self.check()
            self._asked.add(done)
        self.post(asked)
        try:
            done.result()
        finally:
            with self._lock:
                self._asked.discard(done)

    def check(self) -> None:
        """Raises SllmError once the thread has ended."""
        if self._broken is not None:
            raise SllmError(f"the cluster has ended: {self._broken}") from self._broken

    def watch(self, changed: threading.Event) -> None:
        """It is set whenever something has happened, until `unwatch`."""
        with self._lock:
            self._waiters = [*self._waiters, changed]

    def unwatch(self, changed: threading.Event) -> None:
        with self._lock:
            self._waiters = [each for each in self._waiters if each is not changed]

    def set_timer(self, timer: int, at: float) -> None:
        heappush(self._timers, (at, timer))

    def renew(self, controller: Controller) -> None:
        """Another one decides from now on; on the thread."""
        self.controller, self._recorder = controller, Recorder(controller, self._write)

    def tell(self, first: m.AnyEvent) -> None:
        """The event, and what follows from it at once; on the thread, or before it starts."""
        events = [first]
        for event in events:
            name = type(event).__name__
            self.counts[name] = self.counts.get(name, 0) + 1
            now = self._now()
            actions = self._recorder.handle(event, now)
            for action in actions:
                events += self.carry.do(action)
            self.accountant.tell(Record(now, event, tuple(actions)))  # after: nobody waits for it

    def stop(self) -> None:
        """Returns when the thread has done all that was posted before, and ended."""
        self._posted.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                seconds = min(self._fire(), self._beat())
                try:
                    happened = self._posted.get(timeout=max(seconds, 0.0))
                except queue.Empty:
                    continue
                if happened is None:
                    return self._end(SllmError("it was closed"))
                for event in happened():
                    self.tell(event)
                self._told()
        except BaseException as error:  # noqa: BLE001 - it is raised to whoever asks for anything
            self._end(error)
            self._on_broken(error)

    def _fire(self) -> float:
        """Tells of all timers that are due; seconds until the next one is."""
        while self._timers and self._timers[0][0] <= self._now():
            self.tell(m.TimerFired(heappop(self._timers)[1]))
            self._told()
        return self._timers[0][0] - self._now() if self._timers else 3600.0

    def _told(self) -> None:
        """The controller knows: who asked may go on, and who waits may look."""
        settled, self.members.settled = self.members.settled, []
        for done in settled:
            done.set_result(None)
        for waiter in self._waiters:
            waiter.set()

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            asked = [*self._asked]
        for done in asked:
            if not done.done():
                done.set_exception(SllmError(f"the cluster has ended: {error}"))
