"""A request as the router knows it, and the row that is left of it: plain data. Part of `router`; chapter 08."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Literal, NamedTuple

from sllm_mini.cluster.api import Outcome, RequestReport
from sllm_mini.cluster.simulated.table import ANSWERED, CANCELLED, REFUSED, pack_row
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.ownership.messages import Finish
from sllm_mini.types import Epoch, Tier, Warmth

ROUTER = "router"
"""Who owns a request that waits: nobody can claim it from there but the router."""
_NOBODY = Epoch(0)
_OUTCOMES = {"answered": ANSWERED, "cancelled": CANCELLED, "refused": REFUSED, "failed": REFUSED}


class Place(NamedTuple):
    """An instance as a request comes to it: its name at the register, and what the start was that brought it to READY."""

    instance: int
    owner: str
    began: float
    climbed_from: Warmth
    tier: Tier | None
    load_seconds: float


@dataclass(slots=True)
class Tracked:
    """A request that was taken. `report` is made anew whenever something changes."""

    number: int
    report: RequestReport
    prefix: str
    phase: Literal["queued", "running", "migrating"] = "queued"
    decision: int = 0
    owner: str = ROUTER
    target: Place | None = None
    """Where it moves to."""
    epoch: Epoch = _NOBODY
    """The register's, when it was last given to an owner from here."""
    assigned: float = nan
    """When it was given out last."""
    instance: int = -1
    preemptions: int = 0
    blamed: bool = False
    """It was lost with its owner, so it may be what that died of."""
    trouble: str = ""
    """Why a worker would not run it, last."""
    cancelled: bool = False
    refused: bool = False
    """The controller has given it up, and is told no more of it."""
    listeners: tuple[Callable[[], object], ...] = ()
    """Called when it has ended."""
    ended: threading.Event = field(default_factory=threading.Event)

    def given(self, place: Place, decision: int, now: float) -> None:
        """The controller gives it to an instance."""
        report = self.report
        if self.assigned == self.assigned:
            self.report = replace(report, restarts=report.restarts + 1)
        elif place.began >= report.arrived:
            self.report = replace(report, assigned=now, rung=place.climbed_from, tier=place.tier, load_seconds=place.load_seconds)
        else:
            self.report = replace(report, assigned=now)
        self.phase, self.decision, self.assigned, self.owner, self.instance = "running", decision, now, place.owner, place.instance

    def close(self, pieces: Sequence[LedgerPiece], finish: Finish | None, error: str | None, opened: float, now: float) -> None:
        """It is over: its report is whole. `opened` is when time began, on the monotonic clock."""
        outcome: Outcome = "refused" if self.refused else "failed"
        if finish is not None:
            outcome = "cancelled" if self.cancelled and finish == "cancelled" else "answered"
        ended = pieces[-1].arrived - opened if pieces and outcome == "answered" else now
        first = pieces[0].arrived - opened if pieces else nan
        self.report = replace(self.report, output_tokens=len(pieces), first=first, ended=ended, outcome=outcome, reason=error or "", finish=finish)
        self.ended.set()


class Rows:
    """What is left of requests that are over: 104 bytes each, as a `RequestTable` takes them."""

    def __init__(self) -> None:
        self.packed = bytearray()
        self.models: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, request: Tracked) -> None:
        report = request.report
        if report.model not in self._places:
            self._places[report.model] = len(self.models)
            self.models.append(report.model)
        self.packed += pack_row(
            request.number, self._places[report.model], report.arrived, report.assigned, report.first, report.ended, report.input_tokens, report.output_tokens,
            report.rung, report.migrations, request.preemptions, request.instance, _OUTCOMES[report.outcome or "failed"],
        )  # fmt: skip
