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
from math import ceil, inf, log

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

ALPHA = 0.996
"""Seconds of start-up against megabyte-seconds of memory, 249 to 1, as in its code."""
FLOOR_SECONDS = 60.0
_MB = 1_000_000
_READY, _RUNTIME = Warmth.READY, Warmth.RUNTIME
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


@dataclass(slots=True)
class Layer:
    """One layer of those that share it (a model, a runtime, all): their last arrivals, and what a start of it takes and holds."""

    times: deque[float]
    sharers: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By model, the seconds of its start and its bytes; below, their sums."""
    seconds: float = 0.0
    nbytes: int = 0
    beta: float = _BETA_WITHOUT_HISTORY
    due: float = -inf
    """When a model is to be pre-warmed, if that is to come."""

    def mean_gap(self, now: float) -> float | None:
        """(now - oldest) / how many, as RainbowCake's code has it; None before the second arrival."""
        times = self.times
        return (now - times[0]) / len(times) if len(times) > 1 else None

    def expected(self, means: float) -> float:
        """By when the next should have come, so many mean gaps after the last; -inf before the second arrival."""
        times = self.times
        return times[-1] + means * (times[-1] - times[0]) / len(times) if len(times) > 1 else -inf

    def share(self, model: str, figures: tuple[float, int] | None, alpha: float) -> None:
        """It starts in so many seconds and holds so many bytes of this, whatever was said of it before; None: not any more."""
        for sign, (seconds, nbytes) in ((-1, self.sharers.pop(model, (0.0, 0))), (1, figures or (0.0, 0))):
            self.seconds = max(self.seconds + sign * seconds, 0.0)
            self.nbytes += sign * nbytes
        if figures is not None:
            self.sharers[model] = figures
        if count := len(self.sharers):
            self.beta = beta_seconds(self.seconds / count, self.nbytes / count, alpha)


@dataclass(slots=True)
class RainbowCake(Saveable):
    """`p` is the quantile of pre-warming and of staying, `window` how many arrivals are remembered. `prewarm_always`: pre-warms
    even where an idle instance is there by then; `floor_first`: see `layer_ttl` (its code's two quirks).

    Without the first quirk a pre-warm does nothing while an idle instance is there, so one is asked for only where the
    instance will be gone before: by its own time to live, or because it gave way.
    """

    p: float = 0.8
    alpha: float = ALPHA
    window: int = 6
    floor_seconds: float = FLOOR_SECONDS
    prewarm_always: bool = False
    floor_first: bool = False
    _layers: dict[Warmth, dict[str, Layer]] = field(default_factory=lambda: {warmth: {} for warmth in _BELOW}, init=False)
    _runtimes: dict[str, str] = field(default_factory=dict, init=False)
    """Whose layer each model shares."""
    _means: float = field(default=0.0, init=False)
    """The quantile in means."""

    def __post_init__(self) -> None:
        if self.window < 2 or not (0 < self.p < 1 and 0 < self.alpha < 1 and self.floor_seconds >= 0):
            raise ValueError("RainbowCake needs a window of at least 2 arrivals, p and alpha between 0 and 1, and a floor of 0 s or more")
        self._means = quantile_seconds(self.p, 1.0)

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        spec = model.spec
        load = spec.nbytes / cluster.slowest
        before = self._runtimes.get(spec.name, spec.runtime)
        if before != spec.runtime:
            self._leave(_RUNTIME, before, spec.name)
        self._runtimes[spec.name] = spec.runtime
        own, runtime, everybody = self._layers_of(spec)
        own.share(spec.name, (load + spec.ready_seconds, spec.nbytes), self.alpha)
        runtime.share(spec.name, (spec.runtime_seconds, spec.runtime_nbytes), self.alpha)
        everybody.share(spec.name, (spec.process_seconds, spec.process_nbytes), self.alpha)
        return ()

    def on_delete(self, model: ModelState) -> None:
        """Its own layer goes, and its part in the means of the others; arrivals that were theirs too stay."""
        name = model.spec.name
        runtime = self._runtimes.pop(name, model.spec.runtime)
        for warmth, key in ((_READY, name), (_RUNTIME, runtime), (Warmth.PROCESS, "")):
            self._leave(warmth, key, name)

    def _leave(self, warmth: Warmth, key: str, model: str) -> None:
        layer = self._layers[warmth].get(key)
        if layer is not None:
            layer.share(model, None, self.alpha)
            if not layer.sharers:
                del self._layers[warmth][key]

    def _layers_of(self, spec: ModelSpec) -> tuple[Layer, Layer, Layer]:
        """Its own, its runtime's, everybody's; made where nobody has shared them yet."""
        own, runtime, everybody = (self._layers[warmth] for warmth in (_READY, _RUNTIME, Warmth.PROCESS))
        try:
            return own[spec.name], runtime[spec.runtime], everybody[""]
        except KeyError:
            for layers, key in ((own, spec.name), (runtime, spec.runtime), (everybody, "")):
                layers.setdefault(key, Layer(deque(maxlen=self.window)))
            return own[spec.name], runtime[spec.runtime], everybody[""]

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        name = model.spec.name
        own, runtime, everybody = self._layers_of(model.spec)
        own.times.append(now)
        runtime.times.append(now)
        everybody.times.append(now)
        if self.prewarm_always:
            gap = own.mean_gap(now)
            return () if gap is None else (Prewarm(now + self._means * gap, name, _READY, 1 + len(model.open)),)
        if own.due > now:  # this one came sooner, so the next is expected later
            own.due = own.expected(self._means)
            return (Prewarm(own.due, name, _READY),)
        return ()

    def ttl(self, warmth: Warmth, model: str, runtime: str, now: float) -> float:
        """How long a layer stays, by its own arrivals, its own start and its own bytes."""
        layer = self._layers[warmth].get(model if warmth is _READY else runtime if warmth is Warmth.RUNTIME else "")
        gap = layer.mean_gap(now) if layer is not None else None
        if layer is None or gap is None:
            return _FIRST[warmth]
        return layer_ttl(self._means * gap, layer.beta, self.floor_seconds, floor_first=self.floor_first)

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        warmth, name = instance.warmth, instance.model
        if name is None:
            return Stay(self.ttl(warmth, "", instance.runtime or "", now), _BELOW[warmth])
        return self._gone_after(self.ttl(_READY, name, "", now), name, now)

    def _gone_after(self, seconds: float, name: str, now: float) -> Stay:
        """One of this model, with the pre-warm by the quantile where that comes later."""
        own = self._layers[_READY].get(name)
        if own is not None and not self.prewarm_always:
            due = own.expected(self._means)
            if due > now + seconds:
                own.due = due
                return Stay(seconds, _RUNTIME, Prewarm(due, name, _READY))
        return Stay(seconds, _RUNTIME)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        """The one idle longest gives way first, over all layers."""
        return now

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        name = instance.model
        return Stay(0.0, _BELOW[instance.warmth]) if name is None else self._gone_after(0.0, name, now)
