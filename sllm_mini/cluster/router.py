"""The requests of a live cluster: the controller's numbers, the ledger's ids, who owns each, and what its loss means. Chapter 08.

Tokens go from a worker straight to the ledger, which takes them of the register's present owner only. What the controller is told
follows from these two and from nothing else, and is made when it is told: an event stamped earlier would carry an epoch that a
decision since has passed, and be ignored. Two epochs are kept apart: the register's says who may speak for a request, the
controller's (`decision`) says which decision about it was the last. ServerlessLLM's router keeps the tokens of a request
likewise (OSDI'24); it polls its queue once a second and never tells a failure, and this one is told.
"""

from __future__ import annotations

from dataclasses import replace

from sllm_mini.cluster.readers import Readers
from sllm_mini.cluster.requests import ROUTER, Place, Tracked
from sllm_mini.control import messages as m
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch


class Router(Readers):
    """See the module. What is defined here is for the thread that drives the controller, what `Readers` names for any.

    `on_end(number)` is called once for each request when it is over for its reader, from any thread: whoever drives the controller
    then asks `over(number)` for the event. Beyond `max_waiting` requests that have never run none is taken. Owns register, ledger and
    the server of both at `address`; not the journal.
    """

    # Of the controller's actions

    def assign(self, number: int, place: Place, decision: int) -> tuple[Session, Epoch] | None:
        """The state from which the instance's worker goes on, and the epoch in which it speaks. None: it is over, which the controller will be told with this decision;
        or the owner is gone, and its loss will be told."""
        request = self._requests[number]
        if request.report.assigned != request.report.assigned and not request.ended.is_set():
            self._assigned(self._now() - request.report.arrived)
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

    # Parts

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
