"""What affinity, longest prefix and split fetch are for: one small trial each, in simulated time. Chapter 08."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType

from msgspec.structs import replace

from sllm_mini.cluster.simulated import SimulationOptions, SimulationResult, simulate
from sllm_mini.cluster.trace import Trace, TraceLabel, TraceRequest, burst_trace
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.placement import PrefixOrLeastLoaded, SplitFetch, StartupTimeOptimised
from sllm_mini.control.placement.affinity import node_order
from sllm_mini.control.policy import Placement
from sllm_mini.lab.scheduling.worked import GB, llm, machine
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.types import Tier

_TIER_NAMES = {Tier.REMOTE: "the network", Tier.DISK: "the disk", Tier.DRAM: "memory"}


def sharded(placement: str, seed: int, *, nodes: int = 8, models: int = 24) -> SimulationResult:
    """Machines whose disks are empty at first and keep what was fetched; Poisson arrivals, instances go after 30 idle seconds."""
    names = [f"m{number:02}" for number in range(models)]
    trace = burst_trace(requests=800, requests_per_second=0.4, cv=1, models=names, seed=seed)
    cluster = [machine(f"node-{number}", devices=4) for number in range(nodes)]
    specs = [llm(name, 13 * GB, seconds_per_token=0.03) for name in names]
    return simulate(trace, cluster, specs, placement=placement, keep_alive=FixedKeepAlive(30.0), options=SimulationOptions(keep="requests", store_dram_nbytes=40 * GB))


def sharded_table(placements: Sequence[str], seeds: Sequence[int]) -> Table:
    """Where loads came from, and what a request waited: medians over seeds."""
    rows = []
    for placement in placements:
        results = [sharded(placement, seed) for seed in seeds]
        totals = [sum(result.account.loads) for result in results]
        tiers = [statistics.median(result.account.loads[tier] / total for result, total in zip(results, totals, strict=True)) for tier in _TIER_NAMES]
        p50, p99 = (statistics.median(getattr(result.first_token, key) for result in results) for key in ("p50", "p99"))
        rows.append((placement, *map(share_text, tiers), seconds_text(p50), seconds_text(p99)))
    return Table(
        ("policy", *(f"loads from {name}" for name in _TIER_NAMES.values()), "P50 to the first token", "P99"), tuple(rows),
        caption=f"Eight machines with empty disks, medians of {len(seeds)} seeds", numeric=frozenset({1, 2, 3, 4, 5}),
    )  # fmt: skip


def moved_by_a_loss(models: int = 1000, nodes: int = 8) -> tuple[float, float]:
    """The share of models whose first choice changes when one of the machines is lost: by rendezvous hashing, and by hash modulo machines."""
    names = [f"node-{number}" for number in range(nodes)]
    left = names[1:]
    rendezvous = modulo = 0
    for number in range(models):
        model = f"model-{number}"
        rendezvous += node_order(model, names)[0] != node_order(model, left)[0]
        key = Random(model).getrandbits(32)
        modulo += names[key % nodes] != left[key % len(left)]
    return rendezvous / models, modulo / models


def conversations(count: int = 120, turns: int = 6, seed: int = 3) -> Trace:
    """Conversations with one model: the turns of each begin alike."""
    chance = Random(seed)
    found = []
    for number in range(count):
        at = chance.uniform(0, 120)
        for _ in range(turns):
            found.append(TraceRequest(at, "m", 200, 150, f"talk-{number:02}"))
            at += chance.uniform(5, 15)
    return Trace(TraceLabel("conversations", "made by hand", "synthetic", seed), tuple(sorted(found, key=lambda one: one.arrival_seconds)))


def prefix_share(placement: Placement, trace: Trace) -> tuple[float, int]:
    """The share of later turns that ran on an instance that had read the conversation, and the most turns that one instance answered."""
    requests = list(trace)
    spec = llm("m", 13 * GB, seconds_per_token=0.02, concurrency=16)
    spec = replace(spec, min_instances=4, max_instances=4)
    result = simulate(requests, [machine("one", "m", devices=4)], [spec], placement=placement, keep_alive="forever")
    read: dict[str, set[int]] = {}
    answered: dict[int, int] = {}
    hits = later = 0
    for row in sorted(result.requests, key=lambda row: (row.start, row.request)):
        prefix = requests[row.request].prefix or ""
        known = read.setdefault(prefix, set())
        later += bool(known)
        hits += row.instance in known
        known.add(row.instance)
        answered[row.instance] = answered.get(row.instance, 0) + 1
    return hits / later, max(answered.values())


CHOOSERS: Mapping[str, Callable[[], Placement]] = MappingProxyType(
    {"the instance used last": StartupTimeOptimised, "Algorithm 1": PrefixOrLeastLoaded, "the least loaded": lambda: PrefixOrLeastLoaded(imbalance=-1)}
)


def prefix_table(seeds: Sequence[int]) -> Table:
    """Ways to choose an instance, on the same conversations: medians over seeds."""
    rows = []
    for name, make in CHOOSERS.items():
        shares, most = zip(*(prefix_share(make(), conversations(seed=seed)) for seed in seeds), strict=True)
        rows.append((name, share_text(statistics.median(shares)), str(round(statistics.median(most)))))
    return Table(
        ("the request goes to", "later turns that found their prefix", "turns in the busiest instance"), tuple(rows),
        caption="Conversations over four instances of one model", numeric=frozenset({1, 2}),
    )  # fmt: skip


def split_table(parts: Sequence[int] = (1, 2, 4), nbytes: int = 26 * GB) -> Table:
    """One start from the network, its bytes fetched by so many machines: simulated, beside bytes over bandwidth."""
    rows = []
    for count in parts:
        estimator = Estimator()
        one = Trace(TraceLabel("one request", "made by hand", "synthetic"), (TraceRequest(0.0, "m", 100, 10),))
        cluster = [machine(f"node-{number}") for number in range(4)]
        result = simulate(one, cluster, [llm("m", nbytes)], placement=SplitFetch(estimator, most_parts=count), estimator=estimator)
        row = next(iter(result.requests))
        rows.append((str(count), seconds_text(nbytes / count / cluster[0].remote_bytes_per_second), seconds_text(row.wait_seconds)))
    return Table(("machines that fetch a share", "bytes / machines / bandwidth", "until it is ready"), tuple(rows), caption="26 GB over links of 10 Gbit/s", numeric=frozenset({0, 1, 2}))
