"""What is simulated when the simulator is measured, and the bare queue that it is measured against. Chapter 08.

The reference is an M/M/4 queue as SimPy's manual teaches it: a process per customer, a resource of four, nothing else. It has
no models, starts, keep-alive or policies, and keeps one sum. Both draw their arrivals and run times while they are timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from sllm_mini.cluster.simulated import SimulatedCluster, SimulationOptions, even_cluster, make_policies
from sllm_mini.cluster.simulated.driver import PROGRESS_EVERY
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import RainbowCake
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import KeepAlive
from sllm_mini.types import Warmth

NBYTES, START_SECONDS = 10**8, 2.0
"""Of a model's weights, and of its last rung."""
RATE, SERVERS = 3.2, 4
"""Requests a second, of a second each, for four servers: 0.8 of what they can do."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Poisson arrivals, exponential run times of 1 s. `zipf` is the exponent of the models' popularity (0: all alike), `load`
    the share of all devices that requests keep busy; those of one `kind` differ in size alone."""

    kind: str
    name: str
    nodes: int
    models: int
    load: float
    zipf: float
    most_instances: int = 1_000_000
    devices: int = SERVERS
    placement: str = "serverlessllm"
    keep_alive: str = "rainbowcake"
    autoscaler: str = "per-request"
    keep_seconds: float | None = None
    """RainbowCake's alpha is such that it keeps an idle model so long at most; None: as in its code."""
    settle_seconds: float = 0.0
    """So long, at least, it runs before it is measured."""

    @property
    def rate(self) -> float:
        """Requests a second, of one second each."""
        return self.load * self.nodes * self.devices

    def warm_up(self, least: int) -> int:
        """Requests before those that count, in the blocks in which the simulator says how far it is."""
        return -(-max(least, int(self.settle_seconds * self.rate)) // PROGRESS_EVERY) * PROGRESS_EVERY

    def requests(self, count: int, seed: int) -> Iterator[TraceRequest]:
        chance, now = random.Random(seed), 0.0
        names = [spec.name for spec in self.specs()]
        weights = [1 / (rank + 1) ** self.zipf for rank in range(self.models)]
        totals = [0.0]
        for weight in weights:
            totals.append(totals[-1] + weight)
        rate = self.rate
        draw, run, block = chance.expovariate, chance.expovariate, 1 << 12
        while count > 0:
            for name in chance.choices(names, cum_weights=totals[1:], k=min(block, count)):
                now += draw(rate)
                yield TraceRequest(now, name, 0, 0, None, run(1.0))
            count -= block

    def keeping(self) -> KeepAlive | str:
        """What `make_policies` is given."""
        if self.keep_seconds is None or self.keep_alive != "rainbowcake":
            return self.keep_alive
        held = self.keep_seconds * NBYTES / 1e6  # megabyte-seconds against the seconds of the start that they save
        return RainbowCake(alpha=held / (START_SECONDS + held))

    def specs(self) -> list[ModelSpec]:
        """Small models of 100 MB, for which RainbowCake's alpha, calibrated to functions, keeps an idle one for some seconds."""
        return [
            ModelSpec(
                name=f"model-{number:05}", nbytes=NBYTES, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=START_SECONDS, process_nbytes=10**7,
                runtime_nbytes=10**8, max_instances=self.most_instances,
            )
            for number in range(self.models)
        ]  # fmt: skip


def queues(nodes: int) -> Workload:
    """As many M/M/4 queues as nodes, one model of at most four instances each: the reference, so many times over. Eight devices a
    node, so that no queue waits for another's."""
    return Workload("queues", f"{nodes} queues on {nodes} nodes", nodes, nodes, RATE / SERVERS / 2, 0.0, SERVERS, 2 * SERVERS)


def churn(nodes: int) -> Workload:
    """Ten models a node, more than its four devices hold, Zipf 1: many requests find no instance and start one, which takes some
    times as long as their run. So the load is low."""
    return Workload("churn", f"{10 * nodes:,} models on {nodes:,} nodes", nodes, 10 * nodes, 0.1, 1.0)


def steady(nodes: int) -> Workload:
    """As many models, as skewed as Azure's functions are (2019): the most popular 18.6 % have 99.6 % of the requests, so most
    models are cold and most requests warm. An idle one stays for ten minutes at most, and is measured when those that were
    started at first and are not needed have gone."""
    name = f"{10 * nodes:,} models on {nodes:,} nodes, as skewed as Azure's"
    return Workload("steady", name, nodes, 10 * nodes, 0.2, azure_exponent(10 * nodes), keep_seconds=600.0, settle_seconds=100.0)


def azure_exponent(models: int) -> float:
    """Zipf's, with which the most popular 18.6 % of so many models have 99.6 % of the requests, to two digits."""
    popular, low, high = max(1, round(0.186 * models)), 0.0, 8.0
    while high - low > 0.005:
        middle = (low + high) / 2
        weights = [rank**-middle for rank in range(1, models + 1)]
        low, high = (middle, high) if sum(weights[:popular]) < 0.996 * sum(weights) else (low, middle)
    return round(high, 2)


def with_policies(workload: Workload, placement: str, keep_alive: str, autoscaler: str) -> Workload:
    return replace(workload, placement=placement, keep_alive=keep_alive, autoscaler=autoscaler)


@dataclass(frozen=True, slots=True)
class Ran:
    """One run, its warm-up not counted. `seconds` are of the run alone: nodes and models were there before. `requests` arrived
    in that time; `answered` were, some of which came before, and `cold` of them waited for a start."""

    seconds: float
    requests: int
    answered: int
    events: int
    cold: int
    starts: int

    @property
    def cold_fraction(self) -> float:
        """Of those answered; 0 where none was."""
        return self.cold / self.answered if self.answered else 0.0


def run_simulated(workload: Workload, count: int, seed: int, *, warm_up: int = 0) -> Ran:
    """Every event through `Controller.handle`, sums only. Made anew, so that nothing is learned before. The first `warm_up`
    requests (as many as the workload needs, see `Workload.warm_up`) are run and not counted."""
    estimator = Estimator()
    policies = make_policies(workload.placement, workload.keeping(), workload.autoscaler, estimator)
    controller = Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)
    options = SimulationOptions(keep="summary", store_dram_nbytes=64 * 10**9)
    cluster = SimulatedCluster(controller, even_cluster(workload.nodes, devices=workload.devices), workload.specs(), options)
    warm_up = workload.warm_up(warm_up) if warm_up else 0
    marks: list[Ran] = []

    def mark(requests: int) -> None:
        cluster.table.settle()
        marks.append(
            Ran(
                time.perf_counter(), requests, cluster.table.count("answered"), sum(cluster.events.values()), sum(cluster.table.cold[: Warmth.READY]),
                sum(cluster.account.starts),
            )
        )  # fmt: skip

    if not warm_up:
        mark(0)
    cluster.run(workload.requests(warm_up + count, seed), on_progress=lambda number, _: mark(number) if number == warm_up else None)
    mark(warm_up + count)
    begin, end = (astuple(each) for each in marks)
    return Ran(*(later - earlier for earlier, later in zip(begin, end, strict=True)))


def run_simpy(count: int, seed: int) -> Ran:
    """The reference. Raises ModuleNotFoundError where simpy is not installed."""
    import simpy

    chance = random.Random(seed)
    environment = simpy.Environment()
    servers = simpy.Resource(environment, capacity=SERVERS)
    waited = 0.0

    def customer() -> Generator[Any, Any, None]:
        nonlocal waited
        came = environment.now
        with servers.request() as request:
            yield request
            waited += environment.now - came
            yield environment.timeout(chance.expovariate(1.0))

    def source() -> Generator[Any, Any, None]:
        for _ in range(count):
            yield environment.timeout(chance.expovariate(RATE))
            environment.process(customer())

    environment.process(source())
    began = time.perf_counter()
    environment.run()
    return Ran(time.perf_counter() - began, count, count, 0, 0, 0)
