"""The requests of a live cluster as their readers know them: taken, read, cancelled, over, forgotten. Part of `router`; chapter 08."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import nan

from sllm_mini.cluster.api import Listener, RefusedError, RequestReport
from sllm_mini.cluster.journal import Journal, Past
from sllm_mini.cluster.requests import Rows, Tracked
from sllm_mini.cluster.subscription import Subscription
from sllm_mini.cluster.tally import Tally
from sllm_mini.control import messages as m
from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership import EpochRegister, Lines, OwnershipServer, TokenLedger
from sllm_mini.inference.ownership.ledger import MAX_RESTARTS, LedgerPiece
from sllm_mini.inference.session import Session

_LATEST = 0.1
"""What the latest wait weighs in the mean of those before."""


class Readers:
    """What any thread may ask of a `Router`: `check_room`, `open`, `cancel`, `report`, `wait`, `pieces`, `subscribe`, `reason`, `retry_after`. All else is for the
    thread that drives the controller."""

    def __init__(
        self, address: str, *, now: Callable[[], float], opened: float, on_end: Callable[[int], object], journal: Journal | None = None,
        max_waiting: int = 1 << 20, max_restarts: int = MAX_RESTARTS,
    ) -> None:  # fmt: skip
        self._now, self._opened, self._on_end, self._journal, self._max_waiting = now, opened, on_end, journal, max_waiting
        self.register = EpochRegister()
        self.ledger = TokenLedger(self.register, on_end=lambda request_id: on_end(self._numbers[request_id]), journal=journal, max_restarts=max_restarts)
        self.rows, self.tally = Rows(), Tally()
        self.count = 0
        """Numbers given so far; all requests ever taken."""
        self.unassigned = 0
        """Requests that wait to be given to an instance for the first time."""
        self.turned_away = 0
        """Requests that were not taken because so many waited."""
        self._failed = ""
        """Why all requests have failed."""
        self._waited_seconds = 0.0
        self._lock = threading.Lock()
        self._requests: dict[int, Tracked] = {}
        self._numbers: dict[str, int] = {}
        self._over: dict[int, float] = {}
        """Requests that are over, with the time since when, oldest first."""
        self.lines = Lines()
        self._server = OwnershipServer(self.register, self.ledger, address, self.lines)
        self.address = self._server.address

    # Of clients

    def check_room(self) -> None:
        """Raises RefusedError(503) where so many wait that one more would not be taken."""
        with self._lock:
            self._check_room()

    def retry_after(self) -> float:
        """Seconds after which a request that was refused may come again: as long as those that were assigned last had waited, on the
        mean, and a second at least."""
        return max(1.0, self._waited_seconds)

    def open(self, session: Session, model: str, prefix: str) -> m.RequestArrived:
        """Takes a request; what the controller is to be told. Raises ValueError where one of its id is known, RefusedError where too
        many wait, or after `fail_all`."""
        state = session.to_bytes()  # before anything is changed: it raises where the session cannot be said
        with self._lock:  # all of it: whoever fails all requests finds this one whole, or not at all
            if self._failed:
                raise RefusedError.read(self._failed)
            self._check_room()
            if session.request_id in self._numbers:
                raise ValueError(f"request {session.request_id!r} is known already; give each request an id of its own")
            number, at = self.count, self._now()
            self.count += 1
            self.unassigned += 1
            self._numbers[session.request_id] = number
            if self._journal is not None:
                self._journal.opened(number, session.request_id, model, prefix, at, state)
            self.ledger.open(session)
            self._requests[number] = Tracked(number, RequestReport(session.request_id, model, at, input_tokens=session.prompt_length), prefix)
        return m.RequestArrived(number, model, session.prompt_length, prefix)

    def reopen(self, past: Past) -> None:
        """A request as a journal has it; it waits, or is over."""
        opened = past.opened
        session = Session.from_bytes(opened.session)
        pieces = [replace(piece, arrived=piece.arrived + self._opened) for piece in past.pieces]
        request = Tracked(opened.number, RequestReport(opened.request_id, opened.model, opened.at, input_tokens=session.prompt_length), opened.prefix)
        self._numbers[opened.request_id], self._requests[opened.number] = opened.number, request
        self.count = max(self.count, opened.number + 1)
        self.ledger.reopen(session, pieces, past.finish, past.error)
        self.unassigned += 1
        if past.over:
            request.cancelled, request.refused = past.finish == "cancelled", past.error is not None
            self._close_row(request)

    def cancel(self, request_id: str) -> None:
        """Ends it for its reader as far as it came; nothing where it is over."""
        request = self._of(request_id)
        if request is not None and not request.ended.is_set():
            request.cancelled = True
            self._end(request_id, None)

    def report(self, request_id: str) -> RequestReport:
        """Raises ModelError for a request that is unknown or forgotten."""
        request = self._known(request_id)
        report = request.report
        if not request.ended.is_set():
            pieces = self.pieces(request_id)
            report = replace(report, output_tokens=len(pieces), first=pieces[0].arrived - self._opened if pieces else nan)
        return report

    def wait(self, request_id: str, timeout: float | None) -> RequestReport:
        """Its report once it is over. Raises TimeoutError, and ModelError as `report`."""
        request = self._known(request_id)
        if not request.ended.wait(timeout):
            raise TimeoutError(f"request {request_id!r} had not ended after {timeout} seconds; its owner is {self.register.owner(request_id).owner}")
        return request.report

    def subscribe(self, request_id: str, listener: Listener) -> Callable[[], None]:
        """As `api.Stream.subscribe`. Raises ModelError as `report`."""
        request = self._known(request_id)
        subscription = Subscription(partial(self._look, request), listener)
        with self._lock:
            request.listeners += (subscription.look,)
        if not request.ended.is_set():
            self.ledger.listen(request_id, subscription.look)
        subscription.look()

        def unsubscribe() -> None:
            subscription.end()
            self.ledger.unlisten(request_id, subscription.look)
            with self._lock:
                request.listeners = tuple(each for each in request.listeners if each != subscription.look)

        return unsubscribe

    def pieces(self, request_id: str) -> Sequence[LedgerPiece]:
        try:
            return self.ledger.pieces(request_id)
        except ModelError:
            return ()  # forgotten in this moment

    def _of(self, request_id: str) -> Tracked | None:
        with self._lock:
            return self._requests.get(self._numbers.get(request_id, -1))

    def _known(self, request_id: str) -> Tracked:
        request = self._of(request_id)
        if request is None:
            raise ModelError(f"request {request_id!r} is not known; it was never taken, or is over and forgotten")
        return request

    def tokens(self, number: int) -> int:
        """How many its reader has been shown."""
        return len(self.pieces(self._requests[number].report.request_id))

    def number_of(self, request_id: str) -> int | None:
        """None for one that is forgotten."""
        return self._numbers.get(request_id)

    def id_of(self, number: int) -> str:
        return self._requests[number].report.request_id

    def is_open(self, number: int) -> bool:
        """Whether it is known here and not over."""
        request = self._requests.get(number)
        return request is not None and not self._is_over(request)

    def waiting(self) -> Iterator[m.RequestArrived]:
        """All that are not over, as they came."""
        for request in list(self._requests.values()):
            if not self._is_over(request):
                yield m.RequestArrived(request.number, request.report.model, request.report.input_tokens, request.prefix)

    def waiting_since(self) -> Iterator[float]:
        """When each that is not over came."""
        return (each.report.arrived for each in list(self._requests.values()) if not each.ended.is_set())

    @property
    def running(self) -> int:
        """Requests that are not over and not `unassigned`."""
        with self._lock:
            return len(self._requests) - len(self._over) - self.unassigned

    def reason(self, request_id: str) -> str | None:
        """Why it failed or was refused; None where it did not, or is forgotten."""
        try:
            return self.ledger.error(request_id)
        except ModelError:
            return None

    def forget(self, before: float) -> None:
        """What has been over since before that time. A stream that still reads it ends with ModelError."""
        while self._over:
            number, at = next(iter(self._over.items()))
            if at > before:
                return
            name = self._requests[number].report.request_id
            with self._lock:
                del self._over[number], self._requests[number]
            self.ledger.close(name)
            with self._lock:
                del self._numbers[name]

    def fail_all(self, reason: str) -> None:
        """What goes on fails, for that reason, and nothing more is taken."""
        with self._lock:
            self._failed, requests = reason, list(self._requests.values())
        for request in requests:
            if not request.ended.is_set():
                request.refused = True
                self._end(request.report.request_id, reason)
                self._close_row(request)

    def close(self, reason: str) -> None:
        """Likewise; and nobody is answered any more."""
        self.fail_all(reason)
        self._server.close()

    # Parts

    def _end(self, request_id: str, reason: str | None) -> None:
        try:
            if reason is None:
                self.ledger.end(request_id)
            else:
                self.ledger.fail(request_id, reason)
        except ModelError:
            return  # over and forgotten meanwhile

    def _is_over(self, request: Tracked) -> bool:
        name = request.report.request_id
        return request.ended.is_set() or self.ledger.finish(name) is not None or self.ledger.error(name) is not None

    def _close_row(self, request: Tracked) -> None:
        if request.ended.is_set():
            return
        name, now = request.report.request_id, self._now()
        waited = request.report.assigned != request.report.assigned
        pieces = self.pieces(name)
        request.close(pieces, self.ledger.finish(name), self.ledger.error(name), self._opened, now)
        self.rows.add(request)
        self._over[request.number] = now
        with self._lock:
            self.unassigned -= waited
            listeners, request.listeners = request.listeners, ()
        for listener in listeners:
            listener()
            self.ledger.unlisten(name, listener)
        self.tally.add(request.report, pieces)  # last: nobody waits for it

    def _look(self, request: Tracked, start: int) -> tuple[Sequence[LedgerPiece], RequestReport | None]:
        """Its pieces from `start` on, and its report where they are all."""
        ended = request.ended.is_set()
        try:
            pieces = self.ledger.pieces(request.report.request_id, start)
        except ModelError:
            pieces = ()  # over, and forgotten in this moment
        return pieces, request.report if ended else None

    def _check_room(self) -> None:
        if self.unassigned >= self._max_waiting:
            self.turned_away += 1
            raise RefusedError(503, f"{self.unassigned} requests wait, and no more are taken; try again later", self.retry_after())

    def _assigned(self, waited_seconds: float) -> None:
        """One is given to an instance for the first time."""
        with self._lock:
            self.unassigned -= 1
            self._waited_seconds += _LATEST * (waited_seconds - self._waited_seconds)
