"""What came out of a simulation: requests, spans, where time and memory went; tidy, and as one JSON document.

Taught in chapters 08 and 09. Holds what was kept (see `SimulationOptions.keep`); everything else is sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from sllm_mini.cluster.simulated.account import Account, InstanceSpan
from sllm_mini.cluster.simulated.summary import ModelSummary, Spread, as_row, without_nan
from sllm_mini.cluster.simulated.table import RequestTable
from sllm_mini.types import Tier, Warmth


@dataclass(frozen=True, slots=True, eq=False)
class SimulationResult:
    """One run. `requests` are rows in order of their end; `wait`, `first_token` and `latency` are seconds from arrival to the
    first assignment, the first token and the last. `spans` is empty where none were kept. `events` counts what the controller
    was told, by kind. `wall_seconds` is what the run took on this machine; all other seconds are simulated.
    `unanswered` requests were still waiting when nothing happened to them any more."""

    policies: Mapping[str, str]
    requests: RequestTable
    models: list[ModelSummary]
    wait: Spread
    first_token: Spread
    latency: Spread
    spans: list[InstanceSpan]
    account: Account
    events: Mapping[str, int]
    arrived: int
    unanswered: int
    seconds: float
    waiting_seconds: float
    wall_seconds: float
    estimate_errors: Mapping[str, Any]

    @property
    def answered(self) -> int:
        return self.requests.count("answered")

    @property
    def refused(self) -> int:
        return self.requests.count("refused")

    @property
    def cold(self) -> int:
        """Answered requests that waited for a start which began for them (or after them) and climbed from below READY."""
        return sum(self.requests.cold[: Warmth.READY])

    @property
    def cold_fraction(self) -> float:
        return self.cold / self.answered if self.answered else math.nan

    @property
    def mean_in_system(self) -> float:
        """Requests waiting or running, averaged over time."""
        return self.waiting_seconds / self.seconds if self.seconds else math.nan

    @property
    def event_count(self) -> int:
        return sum(self.events.values())

    def totals(self) -> dict[str, Any]:
        """One row of a table that compares policies, always of the same keys: numbers, None for those that no request gave (no
        percentile of nothing). Seconds, GPU-seconds and MB-seconds of host memory as the names say."""
        account = self.account
        held = account.total_gpu_seconds - account.free_gpu_seconds
        row = {
            "arrived": self.arrived, "answered": self.answered, "refused": self.refused, "cancelled": self.requests.count("cancelled"), "unanswered": self.unanswered,
            "cold": self.cold, "cold_fraction": self.cold_fraction,
            **{f"{name}_{key}": value for name, spread in self._spreads() for key, value in as_row(spread).items()},
            "starts": sum(account.starts), "migrations": account.migrations, "preemptions": account.preemptions,
            "gpu_seconds_total": account.total_gpu_seconds, "gpu_seconds_held": held, "gpu_seconds_idle": account.idle_gpu_seconds,
            "gpu_seconds_unused_climbs": account.unused_climb_gpu_seconds, "mb_seconds_idle": account.idle_mb_seconds,
            "mb_seconds_unused_climbs": account.unused_climb_byte_seconds * 1e-6, "in_system_mean": self.mean_in_system, "seconds": self.seconds,
            "events": self.event_count, "events_per_request": self.event_count / self.arrived if self.arrived else math.nan, "wall_seconds": self.wall_seconds,
        }  # fmt: skip
        return without_nan(row)

    def to_dict(self) -> dict[str, Any]:
        """Everything but rows and spans, as JSON has it."""
        account = self.account
        return {
            "policies": dict(self.policies),
            "totals": self.totals(),
            "percentiles_exact": self.latency.exact,
            "cold_by_warmth": {warmth.name.lower(): self.requests.cold[warmth] for warmth in Warmth},
            "starts_by_warmth": {warmth.name.lower(): account.starts[warmth] for warmth in Warmth if account.starts[warmth]},
            "loads_by_tier": {tier.name.lower(): account.loads[tier] for tier in Tier if account.loads[tier]},
            "gpu_seconds": account.gpu_table(),
            "mb_seconds": account.memory_table(),
            "moved_seconds": account.moved_seconds,
            "paused_seconds": account.paused_seconds,
            "lost_seconds": account.lost_seconds,
            "events": dict(sorted(self.events.items())),
            "estimate_errors": to_builtins(dict(self.estimate_errors)),
            "models": [_model_row(model) for model in self.models],
        }

    def _spreads(self) -> tuple[tuple[str, Spread], ...]:
        return ("wait", self.wait), ("first_token", self.first_token), ("latency", self.latency)


def _model_row(model: ModelSummary) -> dict[str, Any]:
    row = {
        "model": model.model, "answered": model.answered, "refused": model.refused, "cold": model.cold,
        "wait_seconds_mean": model.wait_seconds_mean, "latency_seconds_mean": model.latency_seconds_mean,
        **{f"first_token_{name}": value for name, value in as_row(model.first_token_seconds).items()},
    }  # fmt: skip
    return without_nan(row)
