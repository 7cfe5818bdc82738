"""The requests of a live cluster: the controller's numbers, the ledger's ids, who owns each, and what its loss means. Chapter 08.

Tokens go from a worker straight to the ledger, which takes them of the register's present owner only. What the controller is told
follows from these two and from nothing else, and is made when it is told: an event stamped earlier would carry an epoch that a
decision since has passed, and be ignored. Two epochs are kept apart: the register's says who may speak for a request, the
controller's (`decision`) says which decision about it was the last. ServerlessLLM's router keeps the tokens of a request
likewise (OSDI'24); it polls its queue once a second and never tells a failure, and this one is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import nan

from sllm_mini.cluster.api import RequestReport
from sllm_mini.cluster.journal import Journal, Past
from sllm_mini.cluster.requests import ROUTER, Place, Rows, Tracked
from sllm_mini.control import messages as m
from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership import EpochRegister, OwnershipServer, TokenLedger
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch


class Router:
    """See the module. `open`, `cancel`, `report`, `wait` and `pieces` from any thread; all else from the thread that drives the controller.

    `on_end(number)` is called once for each request when it is over for its reader, from any thread: whoever drives the controller
    then asks `over(number)` for the event. Owns register, ledger and the server of both at `address`; not the journal.
    """

    def __init__(self, address: str, *, now: Callable[[], float], opened: float, on_end: Callable[[int], object], journal: Journal | None = None) -> None:
        self._now, self._opened, self._on_end, self._journal = now, opened, on_end, journal
        self.register = EpochRegister()
        self.ledger = TokenLedger(self.register, on_end=lambda request_id: on_end(self._numbers[request_id]), journal=journal)
        self.rows = Rows()
        self.count = 0
        """Numbers given so far; all requests ever taken."""
        self._lock = threading.Lock()
        self._requests: dict[int, Tracked] = {}
        self._numbers: dict[str, int] = {}
        self._over: dict[int, float] = {}
        """Requests that are over, with the time since when, oldest first."""
        self._server = OwnershipServer(self.register, self.ledger, address)
        self.address = self._server.address

    # Of clients

    def open(self, session: Session, model: str, prefix: str) -> m.RequestArrived:
        """Takes a request; what the controller is to be told. Raises ValueError where one of its id is known."""
        with self._lock:
            if session.request_id in self._numbers:
                raise ValueError(f"request {session.request_id!r} is known already; give each request an id of its own")
            number, at = self.count, self._now()
            self.count += 1
            self._numbers[session.request_id] = number
            self._requests[number] = Tracked(number, RequestReport(session.request_id, model, at, input_tokens=session.prompt_length), prefix)
        if self._journal is not None:
            self._journal.opened(number, session.request_id, model, prefix, at, session.to_bytes())
        self.ledger.open(session)
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

    # Of the controller's actions

    def assign(self, number: int, place: Place, decision: int) -> tuple[Session, Epoch] | None:
        """The state from which the instance's worker goes on, and the epoch in which it speaks. None: it is over, which the controller will be told with this decision;
        or the owner is gone, and its loss will be told."""
        request = self._requests[number]
        request.given(place, decision, self._now())
        name, blamed, request.blamed = request.report.request_id, request.blamed, False
        begun = self.ledger.restart(name, place.owner, self.register.owner(name).epoch, blame=blamed)
        if begun is not None:
            request.epoch = begun[1]
        return begun

    def take_back(self, number: int, decision: int) -> tuple[str, Epoch]:
        """Preempted: it waits again. Whose it was, and the epoch in which it spoke there: a target of a move may have claimed it
        just now, and then it is taken from that one. What its reader has been shown stands, and it goes on from there: the
        simulated cluster begins anew (Shepherd), since nobody has read anything."""
        request = self._requests[number]
        request.phase, request.decision, request.target = "queued", decision, None
        request.preemptions += 1
        return self._reclaim(request)

    def moving(self, number: int, target: Place, decision: int) -> Epoch:
        """It is about to move; the epoch in which it speaks where it is."""
        request = self._requests[number]
        request.phase, request.decision, request.target = "migrating", decision, target
        return self.register.owner(request.report.request_id).epoch

    def refuse(self, number: int, reason: str) -> None:
        """The controller gives it up."""
        request = self._requests[number]
        request.refused = True
        self._end(request.report.request_id, f"{reason}: {request.trouble}" if request.trouble else reason)

    # Of what happens

    def over(self, number: int) -> tuple[list[m.AnyEvent], tuple[str, Epoch] | None]:
        """A request has ended for its reader: what the controller is to be told (again, where a decision about it came between), and
        whose worker still runs it, if one does."""
        request = self._requests.get(number)
        if request is None:
            return [], None
        name = request.report.request_id
        self._close_row(request)
        owner, epoch = self.register.owner(name)
        running = (owner, epoch) if owner not in (None, ROUTER) and request.report.outcome != "answered" else None
        if request.refused:
            return [], running
        if request.report.outcome != "answered" or request.phase == "queued":
            return [m.RequestCancelled(number)], running
        return [m.RequestFinished(number, request.report.output_tokens, max(0.0, self._now() - request.assigned), request.decision)], running

    def failed(self, number: int, epoch: int, why: str) -> list[m.AnyEvent]:
        """Its worker could not run it, though it was its owner in that epoch."""
        request = self._requests.get(number)
        if request is None or request.phase != "running" or request.epoch != epoch:
            return []
        request.phase, request.blamed, request.trouble = "queued", True, why
        self._reclaim(request)
        return [m.RequestFailed(number, request.decision)]

    def moved(self, number: int, decision: int, outcome: str, seconds: float) -> list[m.AnyEvent]:
        """The source's word about a move. The register's counts."""
        request = self._requests.get(number)
        if request is None or request.phase != "migrating" or request.decision != decision:
            return []
        target = request.target
        if target is not None and self.register.owner(request.report.request_id).owner == target.owner:
            return [self._arrived(request, target, seconds)]
        if outcome == "ended" and self._is_over(request):
            return []  # it is about to be told
        request.phase, request.target = "running", None
        return [m.MigrationFailed(number, decision)]

    def settle(self, owner: str) -> list[m.AnyEvent]:
        """An owner is gone: nothing that it says counts from now on. Moves to it and from it are decided, by claims (to look would race
        with a hand-over that is on its way), and what was its own waits again. What the controller is to be told before it is
        told of the loss."""
        epochs = self.register.retire(owner)
        events: list[m.AnyEvent] = []
        concerned = [each for each in list(self._requests.values()) if each.phase != "queued" and (each.owner == owner or (each.target is not None and each.target.owner == owner))]
        for request in concerned:
            name, target = request.report.request_id, request.target
            was_its_own = name in epochs and self.register.claim(name, ROUTER, epochs[name]) is not None
            if target is not None and (target.owner == owner) == was_its_own:
                events.append(self._arrived(request, target, self._now() - request.assigned))
            elif target is not None:
                request.phase, request.target = "running", None
                events.append(m.MigrationFailed(request.number, request.decision))
            if request.owner == owner:
                request.phase, request.owner, request.blamed = "queued", ROUTER, was_its_own
                events.append(m.RequestProgressed(request.number, self.tokens(request.number), request.decision))
        return events

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
        """What goes on fails, for that reason."""
        for request in list(self._requests.values()):
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

    def _reclaim(self, request: Tracked) -> tuple[str, Epoch]:
        """For the router, whoever has it."""
        name = request.report.request_id
        while True:
            owner, epoch = self.register.owner(name)
            if self.register.claim(name, ROUTER, epoch) is not None:
                request.owner = ROUTER
                return owner or ROUTER, epoch

    def _arrived(self, request: Tracked, target: Place, seconds: float) -> m.AnyEvent:
        request.phase, request.owner, request.instance, request.target = "running", target.owner, target.instance, None
        request.epoch = self.register.owner(request.report.request_id).epoch
        request.report = replace(request.report, migrations=request.report.migrations + 1)
        return m.MigrationFinished(request.number, seconds, self.tokens(request.number), request.decision)

    def _close_row(self, request: Tracked) -> None:
        if request.ended.is_set():
            return
        name, now = request.report.request_id, self._now()
        request.close(self.pieces(name), self.ledger.finish(name), self.ledger.error(name), self._opened, now)
        self.rows.add(request)
        self._over[request.number] = now
