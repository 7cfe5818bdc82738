"""One trace on each platform, live and forecast: time to first token, starts, and what memory was held for it. Chapter 11.

Memory is counted from what processes were seen to hold: a worker's own at READY while it has its device, what a node keeps running for
all its workers (a zygote), and what its store may use, all until the last answer. Costs the trace's time and some seconds a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.errors import SllmError
from sllm_mini.lab.livebench.play import Played, play
from sllm_mini.lab.platform.forecast import Costs, forecast
from sllm_mini.lab.platform.switches import Platform
from sllm_mini.types import Tier, Warmth


@dataclass(frozen=True, slots=True)
class Run:
    """A platform under the trace. `firsts` are seconds to the first token of each request in the trace's order, `end` that to the last
    answer, `loads` by the name of the tier; memory in MB-seconds: of workers, of zygotes and of stores. `runtimes` are the seconds of each
    climb to RUNTIME, where they were measured."""

    firsts: tuple[float, ...]
    starts: int
    migrations: int
    loads: Mapping[str, int]
    end: float
    worker_mb_seconds: float
    standing_mb_seconds: float
    runtimes: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return fmean(self.firsts)

    @property
    def mb_seconds(self) -> float:
        return self.worker_mb_seconds + self.standing_mb_seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One platform, live and as it was forecast."""

    name: str
    platform: Platform
    live: Run
    expected: Run

    @property
    def error(self) -> float:
        """Of the forecast mean, as a share of the live one."""
        return self.expected.mean / self.live.mean - 1


def contest(
    requests: Sequence[TraceRequest], platforms: Mapping[str, Platform], checkpoint: Checkpoint, costs: Costs, on_row: Callable[[str], object] = lambda _: None
) -> list[Row]:
    """Forecasts and plays each. Raises what `play` raises, and SllmError where a request was not answered."""
    rows = []
    for name, platform in platforms.items():
        on_row(name)
        expected = expected_run(requests, checkpoint, platform, costs)
        rows.append(Row(name, platform, live_run(play(requests, checkpoint, platform), checkpoint, platform), expected))
    return rows


def live_run(played: Played, checkpoint: Checkpoint, platform: Platform) -> Run:
    """What was played. Raises SllmError where a request was not answered."""
    lost = [report for report in played.reports if report.outcome != "answered"]
    if lost:
        raise SllmError(f"{lost[0].request_id} was {lost[0].outcome}: {lost[0].reason}; a row has all its requests or says nothing")
    workers = median(climb.private_nbytes for climb in played.climbs if climb.warmth == Warmth.READY)
    firsts = tuple(report.first - report.arrived for report in played.reports)
    end = max(report.ended for report in played.reports)
    found = _run(played.result, firsts, end, workers, sum(played.shared_nbytes.values()), checkpoint, platform)
    return replace(found, runtimes=tuple(climb.seconds for climb in played.climbs if climb.warmth == Warmth.RUNTIME))


def expected_run(requests: Sequence[TraceRequest], checkpoint: Checkpoint, platform: Platform, costs: Costs) -> Run:
    """What is forecast."""
    return simulated_run(forecast(requests, checkpoint, platform, costs), checkpoint, platform, costs)


def simulated_run(result: SimulationResult, checkpoint: Checkpoint, platform: Platform, costs: Costs) -> Run:
    """A simulation with what these processes hold. Raises SllmError where a request was not answered."""
    if result.answered < result.arrived:
        raise SllmError(f"of {result.arrived} simulated requests {result.answered} were answered; a row has all its requests or says nothing")
    launched = costs.launched(platform)
    found = sorted(result.requests, key=lambda row: row.request)
    end = max(row.end for row in found)
    shared = launched.shared_nbytes * len(platform.nodes())
    return _run(result, tuple(row.first_token_seconds for row in found), end, launched.worker_nbytes, shared, checkpoint, platform)


def _run(result: SimulationResult, firsts: tuple[float, ...], end: float, worker_nbytes: float, shared_nbytes: float, checkpoint: Checkpoint, platform: Platform) -> Run:
    account, nodes = result.account, len(platform.nodes())
    held = account.total_gpu_seconds - account.free_gpu_seconds
    stores = platform.live(checkpoint).node.store_dram_nbytes * nodes
    return Run(
        firsts, sum(account.starts), account.migrations, {tier.name.lower(): account.loads[tier] for tier in Tier if account.loads[tier]}, end,
        held * worker_nbytes * 1e-6, (shared_nbytes + stores) * end * 1e-6,
    )  # fmt: skip
