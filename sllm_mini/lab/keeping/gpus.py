"""The same policies for models that fill a GPU: what a cold start and an idle hour cost there. Chapter 09, simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sllm_mini.cluster.simulated import SimulationOptions, even_cluster, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.keepalive import (
    Clairvoyant,
    FixedKeepAlive,
    GreedyDual,
    HybridHistogram,
    RainbowCake,
)
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import Stay
from sllm_mini.control.state import InstanceState
from sllm_mini.lab.forecast import autoregression
from sllm_mini.lab.keeping.contenders import (
    Contender,
    Occasion,
    Outcome,
    fitting_alpha,
    next_arrivals,
    outcome_of,
)
from sllm_mini.lab.keeping.functions import MB
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.types import Warmth

NBYTES = 16_000 * MB
DISK_BYTES_PER_SECOND = 0.8e9
READY_SECONDS = 10.0
KEEP_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class GpuOutcome:
    """An `Outcome` and what it held for no request, idle or in climbs that none used: GPU-hours, and GB-hours of host memory."""

    outcome: Outcome
    gpu_hours: float
    host_gb_hours: float


def large_models(count: int = 16) -> list[ModelSpec]:
    """Models of 16 GB on one GPU each: 20 s of reading and 10 s of warm-up above 8.5 s of process and runtime; choices of ours."""
    return [
        ModelSpec(
            name=f"model-{number:02d}", nbytes=NBYTES, devices=1, runtime="torch", process_nbytes=50 * MB, runtime_nbytes=2000 * MB, process_seconds=0.5,
            runtime_seconds=8.0, ready_seconds=READY_SECONDS, prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.02,
        )
        for number in range(count)
    ]  # fmt: skip


def load_seconds() -> float:
    """Of the layer that is the model: reading and warm-up."""
    return NBYTES / DISK_BYTES_PER_SECOND + READY_SECONDS


class ThenInMemory(FixedKeepAlive):
    """A policy of this chapter's own: READY for `seconds`, then the weights stay in host memory for `dram_seconds`."""

    def __init__(self, seconds: float, dram_seconds: float) -> None:
        super().__init__(seconds, Warmth.DRAM)
        self.dram_seconds = dram_seconds

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        if instance.warmth > Warmth.DRAM:
            return Stay(self.seconds, Warmth.DRAM)
        return Stay(self.dram_seconds if instance.warmth is Warmth.DRAM else 0.0)


GPU_CONTENDERS: Mapping[str, Contender] = {
    "scale to zero": Contender(lambda _: FixedKeepAlive(0.0)),
    "fixed 10 min": Contender(lambda _: FixedKeepAlive(600.0)),
    "fixed 1 min": Contender(lambda _: FixedKeepAlive(60.0)),
    "1 min, then 10 in DRAM": Contender(lambda _: ThenInMemory(60.0, 600.0)),
    "hybrid histogram": Contender(lambda _: HybridHistogram(autoregression())),
    "FaasCache": Contender(lambda occasion: GreedyDual(occasion.estimator)),
    "RainbowCake": Contender(lambda _: RainbowCake()),
    "RainbowCake refitted": Contender(lambda _: RainbowCake(alpha=fitting_alpha(KEEP_SECONDS, load_seconds(), NBYTES))),
    "clairvoyant": Contender(lambda occasion: Clairvoyant(next_arrivals(occasion.requests), occasion.estimator)),
}


def run_gpus(
    requests: Sequence[TraceRequest], models: Sequence[ModelSpec], until: float, *, devices: int, contenders: Mapping[str, Contender] = GPU_CONTENDERS
) -> list[GpuOutcome]:
    """A run of each on one node with so many GPUs, 400 GB of memory and a disk of 0.8 GB/s that all loads share in turn."""
    nodes = even_cluster(
        1, devices=devices, dram_nbytes=400_000 * MB, disk_bytes_per_second=DISK_BYTES_PER_SECOND, remote_bytes_per_second=DISK_BYTES_PER_SECOND,
        disk=[model.name for model in models],
    )  # fmt: skip
    found = []
    for name, contender in contenders.items():
        occasion = Occasion(requests, models)
        result = simulate(
            requests, nodes, models, placement="availability", keep_alive=contender.make(occasion), estimator=occasion.estimator,
            options=SimulationOptions(keep="requests", until=until, links="link"),
        )  # fmt: skip
        account = result.account
        found.append(GpuOutcome(outcome_of(name, result), account.wasted_gpu_seconds / 3600, account.wasted_mb_seconds / 3.6e6))
    return found


def gpus_table(outcomes: Sequence[GpuOutcome], devices: int) -> Table:
    """One row for each, least start-up first."""
    rows = [
        (
            one.outcome.name, share_text(one.outcome.cold_fraction), str(one.outcome.cold.get(Warmth.RUNTIME, 0)), str(one.outcome.cold.get(Warmth.DRAM, 0)),
            seconds_text(one.outcome.mean_start_seconds), seconds_text(one.outcome.result.wait.p99), f"{one.gpu_hours:.1f}", f"{one.host_gb_hours:,.0f}",
        )
        for one in sorted(outcomes, key=lambda one: one.outcome.start_seconds)
    ]  # fmt: skip
    return Table(
        headers=("policy", "cold", "from runtime", "from DRAM", "wait, mean", "wait, 99 %", "GPU-hours wasted", "host GB-hours wasted"),
        rows=tuple(rows), numeric=frozenset(range(1, 8)), caption=f"{outcomes[0].outcome.requests:,} requests of a day, {devices} GPUs, simulated",
        note="Wait: from arrival until work begins, queues for a GPU and for the disk included. Wasted: held by idle instances, and in climbs that no request used.",
    )  # fmt: skip
