"""RainbowCake (ASPLOS'24): an idle instance sheds its layers one by one, and lower layers serve more than one function.

User (the model: READY), Lang (its runtime: RUNTIME) and Bare (a process: PROCESS) each stay as long as their own arrivals
ask: User those of the model, Lang those of all models of that runtime, Bare all there are; that pooling is what it calls
sharing-aware. A layer stays for the p-quantile of a Poisson process with that mean gap, t(p) = -ln(1 - p) x mean, but no
longer than the beta beyond which keeping it costs more than starting it again. Two quirks of its public code are options,
off here. alpha weighs seconds of start against megabyte-seconds held, so it is bound to its units: for models of many
gigabytes give one that fits. Pure; constant time. Taught in chapter 09.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

ALPHA = 0.996
"""Seconds of start-up against megabyte-seconds of memory, 249 to 1, as in its code."""
FLOOR_SECONDS = 60.0
_MB = 1_000_000
_FIRST = {Warmth.READY: 300.0, Warmth.RUNTIME: 180.0, Warmth.PROCESS: 120.0}
_BELOW = {Warmth.READY: Warmth.RUNTIME, Warmth.RUNTIME: Warmth.PROCESS, Warmth.PROCESS: Warmth.COLD}
_BETA_WITHOUT_HISTORY = 600.0


def quantile_seconds(p: float, mean_gap_seconds: float) -> float:
    """By when the next arrival of a Poisson process has come with probability `p`: -ln(1 - p) x mean; 1.609 means for 0.8."""
    if not (0 <= p < 1 and mean_gap_seconds >= 0):
        raise ValueError(f"a quantile of {p} over gaps of {mean_gap_seconds} s is nowhere; give one from 0 up to 1, and gaps of 0 s or more")
    return -log(1 - p) * mean_gap_seconds


def beta_seconds(start_seconds: float, held_nbytes: float, alpha: float = ALPHA) -> float:
    """How long a layer may be kept before its memory costs more than its start: ceil(alpha x seconds / ((1 - alpha) x MB)).
    Without memory there is no bound."""
    if not (0 < alpha < 1 and start_seconds >= 0 and held_nbytes >= 0):
        raise ValueError(f"{start_seconds} s and {held_nbytes} bytes weighed {alpha} to {1 - alpha} bound nothing; give an alpha between 0 and 1, and no less than 0")
    return float(ceil(alpha * start_seconds / ((1 - alpha) * held_nbytes / _MB))) if held_nbytes else float("inf")


def layer_ttl(alive_seconds: float, beta: float, floor_seconds: float = FLOOR_SECONDS, *, floor_first: bool = False) -> float:
    """How long a layer stays: `alive_seconds`, at least the floor, at most `beta`. With `floor_first` what is below the floor
    stays that long whatever `beta` says, as in RainbowCake's code."""
    if floor_first and alive_seconds < floor_seconds:
        return floor_seconds
    return min(max(alive_seconds, floor_seconds), beta)


class Arrivals:
    """The last arrivals of one level. Its mean gap is (now - oldest) / how many, as its code has it."""

    __slots__ = ("_times",)

    def __init__(self, length: int) -> None:
        self._times: deque[float] = deque(maxlen=length)

    def add(self, now: float) -> None:
        self._times.append(now)

    def mean_gap(self, now: float) -> float | None:
        """None before the second arrival."""
        return (now - self._times[0]) / len(self._times) if len(self._times) > 1 else None


class _Layer:
    """The mean start and the mean bytes of one layer, over the models that share it."""

    __slots__ = ("count", "nbytes", "seconds")

    def __init__(self) -> None:
        self.count, self.seconds, self.nbytes = 0, 0.0, 0.0

    def add(self, seconds: float, nbytes: int) -> None:
        self.count += 1
        self.seconds += (seconds - self.seconds) / self.count
        self.nbytes += (nbytes - self.nbytes) / self.count


@dataclass(slots=True)
class RainbowCake:
    """`p` is the quantile of pre-warming and of staying, `window` how many arrivals are remembered. `prewarm_always`: pre-warms
    even where an idle instance is there by then; `floor_first`: see `layer_ttl` (its code's two quirks)."""

    p: float = 0.8
    alpha: float = ALPHA
    window: int = 6
    floor_seconds: float = FLOOR_SECONDS
    prewarm_always: bool = False
    floor_first: bool = False
    _arrivals: dict[tuple[Warmth, str], Arrivals] = field(default_factory=dict, init=False)
    _layers: dict[tuple[Warmth, str], _Layer] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.window < 2 or not (0 < self.p < 1 and 0 < self.alpha < 1 and self.floor_seconds >= 0):
            raise ValueError("RainbowCake needs a window of at least 2 arrivals, p and alpha between 0 and 1, and a floor of 0 s or more")

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        spec = model.spec
        slowest = min((min(node.spec.remote_bytes_per_second, node.spec.disk_bytes_per_second) for node in cluster.nodes.values()), default=None)
        load = spec.nbytes / slowest if slowest else 0.0
        seconds = {Warmth.READY: load + spec.ready_seconds, Warmth.RUNTIME: spec.runtime_seconds, Warmth.PROCESS: spec.process_seconds}
        nbytes = {Warmth.READY: spec.nbytes, Warmth.RUNTIME: spec.runtime_nbytes, Warmth.PROCESS: spec.process_nbytes}
        for warmth in _BELOW:
            self._layers.setdefault(_key(warmth, spec.name, spec.runtime), _Layer()).add(seconds[warmth], nbytes[warmth])
        return ()

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        spec = model.spec
        for layer in _BELOW:
            key = _key(layer, spec.name, spec.runtime)
            arrivals = self._arrivals.get(key)
            if arrivals is None:
                arrivals = self._arrivals[key] = Arrivals(self.window)
            arrivals.add(now)
        gap = self._arrivals[Warmth.READY, spec.name].mean_gap(now)
        if gap is None:
            return ()
        idle = len(model.open) if self.prewarm_always else 0
        return [Prewarm(now + quantile_seconds(self.p, gap), spec.name, Warmth.READY, 1 + idle)]

    def ttl(self, warmth: Warmth, model: str, runtime: str, now: float) -> float:
        """How long a layer stays, by its own arrivals, its own start and its own bytes."""
        key = _key(warmth, model, runtime)
        arrivals, layer = self._arrivals.get(key), self._layers.get(key)
        gap = arrivals.mean_gap(now) if arrivals is not None else None
        if gap is None:
            return _FIRST[warmth]
        beta = beta_seconds(layer.seconds, layer.nbytes, self.alpha) if layer is not None else _BETA_WITHOUT_HISTORY
        return layer_ttl(quantile_seconds(self.p, gap), beta, self.floor_seconds, floor_first=self.floor_first)

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        warmth = Warmth.READY if instance.warmth >= Warmth.DRAM else instance.warmth
        return Stay(self.ttl(warmth, instance.model or "", instance.runtime or "", now), _BELOW[warmth])

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        """The one idle longest gives way first, over all layers."""
        return now

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0, _BELOW[Warmth.READY if instance.warmth >= Warmth.DRAM else instance.warmth])


def _key(warmth: Warmth, model: str, runtime: str) -> tuple[Warmth, str]:
    """A layer and who shares it: one model, all of a runtime, or all there are."""
    return warmth, model if warmth is Warmth.READY else runtime if warmth is Warmth.RUNTIME else ""
