"""A machine whose disk is slower than its data sheet says, and a controller that finds out. Chapter 08.

The simulated machine has the true rate; the controller is told the data sheet's (`Misled`). Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from msgspec.structs import replace

from sllm_mini.cluster.simulated import SimulatedCluster, SimulationOptions
from sllm_mini.cluster.trace import burst_trace
from sllm_mini.control.autoscale import PerRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import AnyAction, AnyEvent, InstanceReached, NodeJoined
from sllm_mini.control.placement import StartupTimeOptimised
from sllm_mini.control.state import NodeState
from sllm_mini.lab.scheduling.worked import GB, llm, machine
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import rate_text, seconds_text, share_text
from sllm_mini.types import Tier

DATA_SHEET = 5e9
TRUE = {"new": 5e9, "worn": 1.5e9}
"""Bytes a second of the two machines' disks."""


class DataSheet(Estimator):
    """One that never learns a bandwidth: it believes the specs."""

    def bandwidth(self, node: NodeState, tier: Tier) -> float:
        return Estimator().bandwidth(node, tier)


@dataclass(frozen=True, slots=True)
class Start:
    """One start: where, what the controller expected of it, and what it took, queue included, in seconds."""

    node: str
    predicted: float
    took: float


class Misled:
    """A controller between events that hold false specs and a driver that does not know; it writes down each start."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.starts: list[Start] = []

    def handle(self, event: AnyEvent, now: float) -> list[AnyAction]:
        if isinstance(event, NodeJoined):
            event = NodeJoined(replace(event.node, disk_bytes_per_second=DATA_SHEET))
        elif isinstance(event, InstanceReached):
            instance = self.controller.cluster.instances[event.instance]
            self.starts.append(Start(instance.node, instance.predicted_seconds, event.seconds))
        return self.controller.handle(event, now)


@dataclass(frozen=True, slots=True)
class Learnt:
    """One run: its starts in order, P50 and P99 of the time to the first token, the bandwidth believed in the end by node, and the table of
    errors that the estimator kept."""

    starts: tuple[Start, ...]
    p50: float
    p99: float
    believed: dict[str, float]
    errors: Table


def learn(estimator: Estimator, *, requests_per_second: float = 0.1, requests: int = 300, seed: int = 5) -> Learnt:
    """Two machines with four GPUs each, nothing kept alive; the disk of one gives 1.5 GB/s where its data sheet says 5. No load is quite like
    another (a spread of 5 %)."""
    names = [f"m{number}" for number in range(12)]
    controller = Controller(StartupTimeOptimised(estimator), FixedKeepAlive(0.0), PerRequest(), estimator)
    misled = Misled(controller)
    nodes = [replace(machine(name, *names, devices=4), disk_bytes_per_second=rate) for name, rate in TRUE.items()]
    cluster = SimulatedCluster(misled, nodes, [llm(name, 13 * GB, seconds_per_token=0.03) for name in names], SimulationOptions(keep="requests", jitter=0.05, seed=seed))
    cluster.run(burst_trace(requests=requests, requests_per_second=requests_per_second, cv=1, models=names, seed=seed))
    states = controller.cluster.nodes
    spread = cluster.table.spreads()["first_token"]
    return Learnt(tuple(misled.starts), spread.p50, spread.p99, {name: estimator.bandwidth(states[name], Tier.DISK) for name in TRUE}, errors_table(estimator))


def errors_table(estimator: Estimator) -> Table:
    """What an estimator predicted against what came, by kind."""
    rows = [(what, str(one.count), seconds_text(one.mean_seconds), share_text(one.mean_share), seconds_text(one.worst_seconds)) for what, one in estimator.errors().items()]
    return Table(("what", "times", "mean error", "as a share of what came", "largest"), tuple(rows), caption="Predicted against observed, all of the run", numeric=frozenset({1, 2, 3, 4}))


def error_share(starts: Sequence[Start]) -> float:
    """The mean absolute error as a share of what came; 0 of none."""
    return sum(abs(one.predicted - one.took) / one.took for one in starts) / len(starts) if starts else 0.0


def worth(loads: Sequence[float], seeds: Sequence[int]) -> Table:
    """What learning is worth: P99 to the first token of the run that believes the data sheet over that of the run that learns, by load."""
    rows = []
    for load in loads:
        ratios = []
        for seed in seeds:
            learns = learn(Estimator(), requests_per_second=load, seed=seed)
            ratios.append(learn(DataSheet(), requests_per_second=load, seed=seed).p99 / learns.p99)
        rows.append((f"{load:g}", f"x{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"))
    return Table(
        ("requests/s", "P99, data sheet over learnt", f"in {len(seeds)} seeds"), tuple(rows), caption="What knowing the disk is worth", numeric=frozenset({0, 1, 2})
    )


def learning_table(runs: dict[str, Learnt]) -> Table:
    rows = []
    for name, run in runs.items():
        worn = [one for one in run.starts if one.node == "worn"]
        rows.append((
            name, rate_text(run.believed["worn"]), share_text(error_share(worn[:1])), share_text(error_share(worn[1:])),
            f"{len(worn)} of {len(run.starts)}", seconds_text(run.p50), seconds_text(run.p99),
        ))  # fmt: skip
    return Table(
        ("the controller", "believes of the worn disk", "error of its first start", "of those after it", "starts there", "P50 to the first token", "P99"), tuple(rows),
        caption=f"A disk of {rate_text(TRUE['worn'])}, sold as {rate_text(DATA_SHEET)}", numeric=frozenset({1, 2, 3, 4, 5, 6}),
    )  # fmt: skip
