"""`simulate`: one trace, one cluster, three policies, one result. Taught in chapter 08.

    result = simulate(trace, even_cluster(8, devices=4), models, placement="serverlessllm", keep_alive="rainbowcake")
    print(result.totals())
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sllm_mini.cluster.simulated.checks import MisfitWarning, deployments, listed, misfits, passing, scheduled
from sllm_mini.cluster.simulated.driver import SimulatedCluster
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.parts import SimulationError
from sllm_mini.cluster.simulated.policies import make_policies
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import AnyEvent, ModelSpec, NodeSpec, SpecError
from sllm_mini.control.policy import Autoscaler, KeepAlive, Placement
from sllm_mini.control.replay import Recorder


def even_cluster(
    nodes: int,
    *,
    devices: int = 4,
    dram_nbytes: int = 512 * 10**9,
    remote_bytes_per_second: float = 1.25e9,
    disk_bytes_per_second: float = 5e9,
    dram_bytes_per_second: float = 20e9,
    disk: Iterable[str] = (),
) -> list[NodeSpec]:
    """So many equal machines, node-0000 and on; `disk` names models whose checkpoints lie on each. The rates are those of a
    10 Gbit/s network, one NVMe drive and PCIe 4, as data sheets have them. Raises SpecError for figures that cannot be."""
    if type(nodes) is not int or nodes < 1:
        raise SpecError(f"a cluster of {nodes!r} nodes cannot be; give a whole number of 1 or more")
    if isinstance(disk, str):
        raise SpecError(f"the nodes have on their disks {disk!r}; give a list of names of models")
    held = tuple(disk)
    return [
        NodeSpec(
            name=f"node-{number:04}", devices=devices, dram_nbytes=dram_nbytes, remote_bytes_per_second=remote_bytes_per_second,
            disk_bytes_per_second=disk_bytes_per_second, dram_bytes_per_second=dram_bytes_per_second, disk=held,
        )
        for number in range(nodes)
    ]  # fmt: skip


def simulate(
    trace: Iterable[TraceRequest],
    nodes: Iterable[NodeSpec],
    models: Iterable[ModelSpec],
    *,
    placement: Placement | str = "serverlessllm",
    keep_alive: KeepAlive | str = "fixed-10min",
    autoscaler: Autoscaler | str = "per-request",
    estimator: Estimator | None = None,
    options: SimulationOptions | None = None,
    events: Iterable[tuple[float, AnyEvent]] = (),
    log: Callable[[bytes], object] | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> SimulationResult:
    """Runs the trace through a `Controller` with these policies (names, or new objects) in simulated time.

    `events` happen beside it: nodes lost and joined, models deployed and deleted, requests cancelled, instances failed.
    `log` is given each line of an event log for `replay`. `on_progress(requests, seconds)` is called now and then. A
    placement that estimates must be made with the same `estimator`. The same arguments give the same result. Warns
    (MisfitWarning) of models that fit no node. Raises SimulationError for a trace that is out of order, for arguments of
    another kind or with a name twice, and for a controller that asks for what is not there.
    """
    began = time.perf_counter()
    nodes, models, events = listed(nodes, NodeSpec, "node"), listed(models, ModelSpec, "model"), scheduled(events)
    if not isinstance(options, SimulationOptions | None):
        raise SimulationError(f"the options are {options!r:.60}; give SimulationOptions")
    for sentence in misfits(*deployments(nodes, models, events)):
        warnings.warn(sentence, MisfitWarning, stacklevel=2)
    if estimator is None:
        estimator = Estimator()
    policies = make_policies(placement, keep_alive, autoscaler, estimator)
    controller = Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)
    cluster = SimulatedCluster(controller if log is None else Recorder(controller, log), nodes, models, options)
    cluster.run(passing(trace), events, on_progress)
    return result_of(cluster, policies.names, estimator.errors(), time.perf_counter() - began)


def result_of(cluster: SimulatedCluster, policies: Mapping[str, str], errors: Mapping[str, Any], wall_seconds: float) -> SimulationResult:
    """The result of a cluster that has run."""
    table = cluster.table
    spreads = table.spreads()
    return SimulationResult(
        policies=policies, requests=table, models=table.by_model(), wait=spreads["wait"], first_token=spreads["first_token"], latency=spreads["latency"],
        spans=cluster.spans or [], account=cluster.account, events=cluster.events, arrived=cluster.arrived, unanswered=cluster.arrived - len(table),
        seconds=cluster.now, waiting_seconds=cluster.waiting_seconds, wall_seconds=wall_seconds, estimate_errors=errors,
    )  # fmt: skip
