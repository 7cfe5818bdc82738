"""The simulator against Erlang's formula: the same queue, played many times, with a confidence interval. Chapter 08."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from sllm_mini.cluster.simulated import SimulationOptions, even_cluster, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.oracles import erlang_c
from sllm_mini.lab.table import Table

T_99 = {4: 4.604, 9: 3.250, 19: 2.861}
"""Student's t, two-sided 99 %, by degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Against:
    """One load: what the formula says of the mean wait, and the means of independent replications, in seconds."""

    load: float
    expected: float
    found: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.found)

    @property
    def half_width(self) -> float:
        """Of the 99 % confidence interval."""
        return T_99[len(self.found) - 1] * statistics.stdev(self.found) / len(self.found) ** 0.5

    @property
    def inside(self) -> bool:
        return abs(self.mean - self.expected) <= self.half_width


def against_erlang(loads: Sequence[float], *, servers: int = 4, requests: int = 10_000, replications: int = 10) -> list[Against]:
    """One machine with so many devices, one model with an instance on each, Poisson arrivals, runs of one second on average.

    Every request goes through the controller. `replications` is 5, 10 or 20. Costs some 30 us a request.
    """
    model = ModelSpec(name="m", nbytes=0, min_instances=servers, max_instances=servers)
    found = []
    for load in loads:
        means = tuple(
            simulate(_poisson(load * servers, requests, f"{load}:{seed}"), even_cluster(1, devices=servers), [model], keep_alive="forever", options=SimulationOptions(keep="summary")).wait.mean
            for seed in range(replications)
        )
        found.append(Against(load, erlang_c(servers, load * servers, 1.0).wait_seconds, means))
    return found


def erlang_table(found: Sequence[Against]) -> Table:
    rows = [
        (f"{one.load:.0%}", f"{one.expected:.4f}", f"{one.mean:.4f}", f"± {one.half_width:.4f}", "yes" if one.inside else "no")
        for one in found
    ]
    return Table(
        ("load", "Erlang-C, s", "simulated, s", "99 % interval", "formula inside"), tuple(rows),
        caption=f"The mean wait in a queue, {len(found[0].found)} replications each", numeric=frozenset({0, 1, 2, 3}),
    )  # fmt: skip


def _poisson(rate: float, count: int, seed: str) -> Iterator[TraceRequest]:
    chance, now = Random(seed), 0.0
    for _ in range(count):
        now += chance.expovariate(rate)
        yield TraceRequest(now, "m", 0, 0, None, chance.expovariate(1.0))
