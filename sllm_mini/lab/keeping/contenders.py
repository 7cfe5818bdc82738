"""The keep-alive policies of chapter 09 by name, each made anew for a run, and what a run of one comes to.

Every run goes through the real `Controller` in simulated time (`cluster.simulated`): 3 000 requests take some tenths of
a second. Outcomes are counts and sums of the simulation, nothing is estimated here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from msgspec.structs import replace

from sllm_mini.cluster.simulated import SimulationOptions, SimulationResult, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import (
    Buffered,
    Clairvoyant,
    FixedKeepAlive,
    Forever,
    GreedyDual,
    HybridHistogram,
    RainbowCake,
    StemCells,
    from_snapshot,
)
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import KeepAlive
from sllm_mini.lab.forecast import autoregression
from sllm_mini.lab.keeping.functions import AMPLE_NBYTES, MB, READ_BYTES_PER_SECOND, machine
from sllm_mini.types import Warmth

REFITTED_SECONDS = 600.0
"""What the refitted alpha lets the median function stay at most: the longest that RainbowCake's code knows."""


@dataclass(frozen=True, slots=True)
class Occasion:
    """What a policy may need to be made: the requests to come (only the clairvoyant looks), the models, the estimator."""

    requests: Sequence[TraceRequest]
    specs: Sequence[ModelSpec]
    estimator: Estimator = field(default_factory=Estimator)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way of keeping warm: its policy, and what it changes of each model (snapshots, instances that are always there)."""

    make: Callable[[Occasion], KeepAlive]
    change: Callable[[ModelSpec], ModelSpec] = lambda spec: spec


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. `start_seconds` is what all requests together waited before their work began; `waste_gb_seconds` what was
    held for no request, by idle instances and in climbs that no request used; `cold` requests by the warmth that their start climbed from."""

    name: str
    requests: int
    cold: Mapping[Warmth, int]
    start_seconds: float
    waste_gb_seconds: float
    starts: int
    result: SimulationResult

    @property
    def cold_fraction(self) -> float:
        """Requests that waited for a start from any rung below READY."""
        return sum(self.cold.values()) / self.requests

    @property
    def mean_start_seconds(self) -> float:
        return self.start_seconds / self.requests

    def cost(self, alpha: float) -> float:
        """RainbowCake's: alpha x seconds of start-up + (1 - alpha) x MB-seconds wasted."""
        return alpha * self.start_seconds + (1 - alpha) * self.waste_gb_seconds * 1000


def fitting_alpha(keep_seconds: float, start_seconds: float, nbytes: float) -> float:
    """The alpha with which RainbowCake's bound beta comes to `keep_seconds` for a layer of these seconds and bytes: it solves
    alpha / (1 - alpha) = keep x MB / start. Raises ValueError for what cannot be."""
    if not (keep_seconds > 0 and start_seconds > 0 and nbytes > 0):
        raise ValueError(f"no alpha makes {start_seconds} s and {nbytes} bytes worth {keep_seconds} s; give numbers above 0")
    weight = keep_seconds * nbytes / MB / start_seconds
    return weight / (1 + weight)


def refitted_alpha(specs: Sequence[ModelSpec], keep_seconds: float = REFITTED_SECONDS) -> float:
    """For the median of these models."""
    return median(fitting_alpha(keep_seconds, spec.nbytes / READ_BYTES_PER_SECOND + spec.ready_seconds, spec.nbytes) for spec in specs)


def next_arrivals(requests: Iterable[TraceRequest]) -> Callable[[str, float], float | None]:
    """When a model's next request comes, at `now` or later: what `Clairvoyant` asks. O(log n) a question."""
    times: dict[str, list[float]] = {}
    for request in requests:
        times.setdefault(request.model, []).append(request.arrival_seconds)

    def ask(model: str, now: float) -> float | None:
        mine = times.get(model, [])
        at = bisect_left(mine, now)
        return mine[at] if at < len(mine) else None

    return ask


CONTENDERS: Mapping[str, Contender] = {
    "scale to zero": Contender(lambda _: FixedKeepAlive(0.0)),
    "fixed 10 min": Contender(lambda _: FixedKeepAlive(600.0)),
    "fixed 20 min": Contender(lambda _: FixedKeepAlive(1200.0)),
    "fixed 10 min, snapshots": Contender(lambda _: FixedKeepAlive(600.0), partial(from_snapshot, bytes_per_second=1e9, fixed_seconds=0.1)),
    "one always ready": Contender(lambda _: FixedKeepAlive(600.0), lambda spec: replace(spec, min_instances=1)),
    "one spare": Contender(lambda _: Buffered(FixedKeepAlive(600.0))),
    "stem cells": Contender(lambda _: StemCells(FixedKeepAlive(600.0))),
    "hybrid histogram": Contender(lambda _: HybridHistogram(autoregression())),
    "LRU": Contender(lambda _: Forever()),
    "FaasCache": Contender(lambda occasion: GreedyDual(occasion.estimator)),
    "RainbowCake": Contender(lambda _: RainbowCake()),
    "RainbowCake refitted": Contender(lambda occasion: RainbowCake(alpha=refitted_alpha(occasion.specs))),
    "clairvoyant": Contender(lambda occasion: Clairvoyant(next_arrivals(occasion.requests), occasion.estimator)),
}
"""Snapshots are read at 1 GB/s after 0.1 s, a choice of ours."""


def fixed(seconds: float) -> Contender:
    """Fixed keep-alive of any length."""
    return Contender(lambda _: FixedKeepAlive(seconds))


def run_contender(
    name: str,
    requests: Sequence[TraceRequest],
    specs: Sequence[ModelSpec],
    *,
    contender: Contender | None = None,
    nbytes: float = AMPLE_NBYTES,
    until: float = 0.0,
    spans: bool = False,
) -> Outcome:
    """One simulation on one machine of `nbytes`; `contender` (else the one of that name) is made anew for it."""
    chosen = CONTENDERS[name] if contender is None else contender
    changed = [chosen.change(spec) for spec in specs]
    occasion = Occasion(requests, changed)
    result = simulate(
        requests, machine(changed, nbytes), changed, placement="availability", keep_alive=chosen.make(occasion), estimator=occasion.estimator,
        options=SimulationOptions(keep="everything" if spans else "requests", until=until),
    )  # fmt: skip
    return outcome_of(name, result)


def outcome_of(name: str, result: SimulationResult) -> Outcome:
    """What chapter 09 compares of a run."""
    cold = {warmth: result.requests.cold[warmth] for warmth in Warmth if warmth < Warmth.READY and result.requests.cold[warmth]}
    waited = result.wait.mean * result.answered if result.answered else 0.0
    return Outcome(name, result.answered, cold, waited, result.account.wasted_mb_seconds / 1000, sum(result.account.starts), result)
