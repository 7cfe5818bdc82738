"""What is counted of requests as they end, and the figures that a scrape takes. Pure; chapter 08."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import get_args

from sllm_mini.cluster.accounting import Accounting
from sllm_mini.cluster.api import Metrics, Outcome, RequestReport
from sllm_mini.cluster.latency import Histogram, Latencies
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.types import Tier, Warmth

MOST_MODELS = 200
OTHERS = "(others)"
"""Under this name the latencies of all models beyond the first 200 are kept: no model can have it."""


@dataclass(slots=True)
class Tally:
    """Sums over requests that are over. Constant in size."""

    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(get_args(Outcome), 0))
    cold_requests: dict[Warmth, int] = field(default_factory=lambda: dict.fromkeys(Warmth, 0))
    input_tokens: int = 0
    output_tokens: int = 0
    restarts: int = 0
    latencies: dict[str, Latencies] = field(default_factory=dict)

    def add(self, report: RequestReport, pieces: Sequence[LedgerPiece] = ()) -> None:
        """One that is over, and what its reader was given."""
        if report.outcome is None:
            raise ValueError(f"request {report.request_id!r} is not over, and cannot be counted yet")
        self.outcomes[report.outcome] += 1
        if report.outcome == "answered":
            self.cold_requests[report.rung] += 1
        self.input_tokens += report.input_tokens
        self.output_tokens += report.output_tokens
        self.restarts += report.restarts
        self._add_latencies(report, pieces)

    def metrics(self, accounting: Accounting, *, waiting: int, running: int, turned_away: int = 0) -> Metrics:
        account = accounting.account
        return Metrics(
            outcomes=self.outcomes.copy(), turned_away=turned_away, waiting=waiting, running=running, input_tokens=self.input_tokens, output_tokens=self.output_tokens,
            restarts=self.restarts, starts=dict(zip(Warmth, account.starts, strict=True)), cold_requests=self.cold_requests.copy(),
            loads=dict(zip(Tier, account.loads, strict=True)), loaded_nbytes=dict(zip(Tier, accounting.loaded_nbytes, strict=True)),
            migrations=account.migrations, failed_migrations=account.failed_migrations, preemptions=account.preemptions,
            latencies={model: each.copy() for model, each in self.latencies.items()},
        )  # fmt: skip

    def _add_latencies(self, report: RequestReport, pieces: Sequence[LedgerPiece]) -> None:
        model = report.model if report.model in self.latencies or len(self.latencies) < MOST_MODELS else OTHERS
        found = self.latencies.get(model)
        if found is None:
            found = self.latencies[model] = Latencies()
        if report.first == report.first:
            found.first_token.setdefault(report.rung, Histogram()).add(report.first - report.arrived)
        found.queue.add(report.queue_seconds)
        if report.load_seconds:
            found.load.add(report.load_seconds)
        if report.outcome == "answered":
            found.whole.add(report.ended - report.arrived)
        found.between_tokens.add(*(after.arrived - before.arrived for before, after in pairwise(pieces)))
