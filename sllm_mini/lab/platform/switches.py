"""A serverless platform with its techniques as switches: ten models, two nodes with one device each, one bursty trace. Chapter 11.

Each row of the chapter is the row above with one switch more. Nothing is pretended: a switch is an option of the live cluster, and
the same object says what the simulator is to assume.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.live.options import ControlOptions, LauncherKind, LiveOptions
from sllm_mini.cluster.simulated import SimulationOptions
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.cluster.trace.tokens import TokenLengths, TokenProfile
from sllm_mini.cluster.trace.workloads import burst_trace
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement import StartupTimeOptimised
from sllm_mini.control.policy import Placement
from sllm_mini.lab.livebench.workload import Options

TOKENS = TokenProfile(TokenLengths(80, 64, 300), TokenLengths(30, 24, 200))
"""Short ones: two cores compute for two devices."""


@dataclass(frozen=True, slots=True)
class Platform(Options):
    """`Options` with a switch for each technique. `ranges` of a model are asked for at once (0: as many as there are readers), a node's
    disk has room for `on_disk` models; with `migrate` the scheduler may move running requests."""

    devices: int = 1
    models: int = 10
    stored: int = 1
    placement: str = "availability"
    keep_alive: str = "scale-to-zero"
    remote_bytes_per_second: float = 2.5e6
    per_connection: bool = True
    launcher: LauncherKind = "spawn"
    ranges: int = 1
    on_disk: int = 0
    overlap: bool = False
    migrate: bool = False

    def control(self) -> ControlOptions:
        return ControlOptions(placement=self.placement if self.placement != "serverlessllm" else self._soonest, keep_alive=self.keep_alive, autoscaler=self.autoscaler)

    def _soonest(self, estimator: Estimator) -> Placement:
        return StartupTimeOptimised(estimator, migrate=self.migrate)

    def live(self, checkpoint: Checkpoint) -> LiveOptions:
        plain = Options.live(self, checkpoint)  # not super(): a class with slots is made twice
        # A disk holds index, tokenizer and an unfinished copy beside the weights.
        node = replace(plain.node, launcher=self.launcher, remote_ranges=self.ranges, store_disk_nbytes=self.on_disk * 2 * checkpoint.nbytes)
        return replace(plain, node=node, overlap=self.overlap)

    def simulation(self, checkpoint: Checkpoint) -> SimulationOptions:
        return replace(Options.simulation(self, checkpoint), store_disk_nbytes=self.on_disk * checkpoint.nbytes)


SWITCHES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast loader": {"ranges": 0},
        "tiers": {"stored": 3, "on_disk": 10},
        "overlap": {"overlap": True},
        "zygote": {"launcher": "zygote"},
        "scheduler": {"placement": "serverlessllm"},
        "migration": {"migrate": True},
        "keep-alive": {"keep_alive": "hybrid-histogram"},
    }
)
"""What each of them changes of a `Platform` that has none, in the order of the chapters that they are from."""


def platform_with(switches: Iterable[str], base: Platform | None = None) -> Platform:
    """A platform with these, whatever their order. Raises ValueError for one that there is not, and for migration without the scheduler
    that decides it."""
    chosen = set(switches)
    if unknown := chosen - set(SWITCHES):
        raise ValueError(f"there is no switch {sorted(unknown)[0]!r}; choose among {', '.join(SWITCHES)}")
    if "migration" in chosen and "scheduler" not in chosen:
        raise ValueError("it is the scheduler that decides who moves; choose it beside migration")
    return replace(base or Platform(), **{field: value for name in chosen for field, value in SWITCHES[name].items()})


def switched() -> dict[str, Platform]:
    """The rows of the chapter: nothing, then one switch more in each."""
    names = list(SWITCHES)
    return {"nothing": Platform()} | {name: platform_with(names[: number + 1]) for number, name in enumerate(names)}


def stretched(requests: Iterable[TraceRequest], times: float, *, later: float = 0.0) -> list[TraceRequest]:
    """The same requests in so many times the time, from `later` on."""
    return [TraceRequest(later + times * each.arrival_seconds, each.model, each.input_tokens, each.output_tokens) for each in requests]


def bursts(requests: int = 18, seconds: float = 12.0, seed: int = 8) -> list[TraceRequest]:
    """The chapter's trace: Gamma arrivals of CV 4 over ten models of Zipf's popularity."""
    trace = burst_trace(requests=requests, requests_per_second=requests / seconds, cv=4.0, models=Platform().names, exponent=1.5, tokens=TOKENS, seed=seed)
    return list(trace)
