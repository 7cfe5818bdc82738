"""One function alone: cold fraction and wait as queueing theory has them, and the simulator beside. Chapter 09, section 1."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from sllm_mini.cluster.simulated import SimulationOptions, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.oracles import SetupWait, setup_queue
from sllm_mini.lab.keeping.functions import machine
from sllm_mini.lab.table import Table


@dataclass(frozen=True, slots=True)
class SinglePoint:
    """One keep-alive: the exact answer, and each replication's wait and cold fraction."""

    keep_seconds: float
    exact: SetupWait
    waits: tuple[float, ...]
    colds: tuple[float, ...]


def simulate_single(
    keep_seconds: Sequence[float], *, rate: float = 0.5, service_seconds: float = 1.0, setup_seconds: float = 5.0, requests: int = 4000, replications: int = 5
) -> list[SinglePoint]:
    """Poisson arrivals, exponential service, one instance at most: an M/G/1 queue with set-up, through the real controller."""
    spec = ModelSpec(name="f", nbytes=0, devices=0, max_instances=1, process_seconds=setup_seconds)
    traces = []
    for seed in range(replications):
        chance, now, trace = random.Random(f"single:{seed}"), 0.0, []
        for _ in range(requests):
            now += chance.expovariate(rate)
            trace.append(TraceRequest(now, "f", 0, 0, None, chance.expovariate(1 / service_seconds)))
        traces.append(trace)
    points = []
    for keep in keep_seconds:
        options = SimulationOptions(keep="summary")
        runs = [simulate(trace, machine([spec]), [spec], placement="availability", keep_alive=FixedKeepAlive(keep), options=options) for trace in traces]
        exact = setup_queue(rate, service_seconds, setup_seconds, keep)
        points.append(SinglePoint(keep, exact, tuple(run.wait.mean for run in runs), tuple(run.cold_fraction for run in runs)))
    return points


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {2 * stdev(values) / len(values) ** 0.5:.4f}"


def single_table(points: Sequence[SinglePoint]) -> Table:
    """Exact and simulated side by side; ± is two standard errors of the replications."""
    rows = [
        (f"{point.keep_seconds:g} s", f"{point.exact.cold_fraction:.4f}", _spread(point.colds), f"{point.exact.wait_seconds:.3f}", _spread(point.waits))
        for point in points
    ]
    return Table(
        headers=("keep-alive", "cold fraction, exact", "simulated", "mean wait, exact (s)", "simulated (s)"),
        rows=tuple(rows), caption="One function, one instance", numeric=frozenset(range(5)),
        note=f"± is two standard errors of {len(points[0].waits)} replications.",
    )  # fmt: skip
