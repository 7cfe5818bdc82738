"""What each row should take, simulated with figures of two short plays that are not the chapter's trace. Chapter 11.

A platform of forks and one of fresh interpreters are measured once each; a row is put together of them: its launcher's rungs, its
loader's rate. So most rows are forecasts of a combination that nobody had measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import msgspec

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.simulated import SimulationResult, simulate
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import ModelSpec
from sllm_mini.lab.livebench.figures import Figures, measured_figures
from sllm_mini.lab.livebench.play import Played, play
from sllm_mini.lab.platform.switches import Platform
from sllm_mini.types import Warmth


@dataclass(frozen=True, slots=True)
class Launched:
    """What one play says of a launcher and of its loader: seconds and rates, by how much each request beside another slows a step, what
    a worker keeps for itself at READY, and what a node keeps running for all of them."""

    figures: Figures
    batch_slowdown: float
    worker_nbytes: int
    shared_nbytes: int

    @classmethod
    def of(cls, played: Played, checkpoint: Checkpoint) -> Launched:
        """Raises SllmError for a play that says too little."""
        workers = [climb.private_nbytes for climb in played.climbs if climb.warmth == Warmth.READY]
        steps = [report.decode_seconds / (report.output_tokens - 1) for report in played.reports]
        figures = msgspec.structs.replace(measured_figures(played, checkpoint), decode_seconds_per_token=steps[0])
        slowdown = max(0.0, (fmean(steps[1:]) / steps[0] - 1) / (len(steps) - 2))
        return cls(figures, slowdown, int(median(workers)), max(played.shared_nbytes.values(), default=0))


@dataclass(frozen=True, slots=True)
class Costs:
    """Both of them; `slow` read one range at a time, `fast` as many as it could."""

    slow: Launched
    fast: Launched

    def heavier(self, times: float) -> Costs:
        """The same machine for weights so many times as large: what else a start takes stays as it is."""

        def slower(one: Launched) -> Launched:
            return replace(one, figures=msgspec.structs.replace(one.figures, remote_bytes_per_second=one.figures.remote_bytes_per_second / times))

        return Costs(slower(self.slow), slower(self.fast))

    def launched(self, platform: Platform) -> Launched:
        """Of a row's launcher."""
        return self.slow if platform.launcher == "spawn" else self.fast

    def figures(self, platform: Platform, checkpoint: Checkpoint) -> Figures:
        """Of a row. With overlap the time in which an instance is made ready is hidden behind the load from afar, or the other way round."""
        rungs = self.launched(platform).figures
        rate = (self.slow if platform.ranges else self.fast).figures.remote_bytes_per_second
        if platform.overlap:
            seconds = checkpoint.nbytes / rate
            rate = checkpoint.nbytes / max(seconds - rungs.ready_seconds, 1e-3)
        decoding = self.fast.figures
        return msgspec.structs.replace(
            rungs, remote_bytes_per_second=rate, prefill_seconds_per_token=decoding.prefill_seconds_per_token, decode_seconds_per_token=decoding.decode_seconds_per_token
        )


def practice(platform: Platform) -> list[TraceRequest]:
    """Requests that are not the chapter's: a start on each device, both at once, for one request and for as many as run together."""
    return [TraceRequest(0.0, platform.names[number > 0], 60, 40) for number in range(1 + platform.concurrency)]


def calibrate(checkpoint: Checkpoint, on_row: Callable[[str], None] = lambda _: None) -> Costs:
    """Plays both. Costs half a minute. Raises what `play` raises."""
    found = []
    for platform in (Platform(), Platform(launcher="zygote", ranges=0)):
        on_row(platform.launcher)
        found.append(Launched.of(play(practice(platform), checkpoint, platform), checkpoint))
    return Costs(*found)


def forecast(
    requests: Sequence[TraceRequest], checkpoint: Checkpoint, platform: Platform, costs: Costs, *, specs: Sequence[ModelSpec] | None = None,
    log: Callable[[bytes], object] | None = None, **policies: Any,
) -> SimulationResult:  # fmt: skip
    """The row in simulated time. `policies` replace the platform's own."""
    figures, estimator = costs.figures(platform, checkpoint), Estimator()
    control = platform.control()
    placement = control.placement if isinstance(control.placement, str) else control.placement(estimator)
    given = {"placement": placement, "keep_alive": platform.keep_alive, "autoscaler": platform.autoscaler} | policies
    options = replace(platform.simulation(checkpoint), move_gap_tokens=4, batch_slowdown=costs.fast.batch_slowdown)
    return simulate(
        requests, platform.nodes(figures.remote_bytes_per_second), specs or [figures.spec(spec) for spec in platform.specs(checkpoint)],
        estimator=estimator, options=options, log=log, **given,
    )  # fmt: skip
