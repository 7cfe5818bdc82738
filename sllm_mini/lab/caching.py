"""What a cache of models is worth: each eviction policy's hit ratios under independent requests, and what theory says of them.

The simulation asks `eviction.choose_victims` itself, so what it shows is what the store does. Two answers need no
simulation: Che's approximation of LRU, and a bound that no policy passes. A `HitRatios` holds three shares of one
stream: of the requests that found all of their model, of the bytes found, of the seconds of loading saved. Shown in
chapter 03. Costs no memory beyond the catalogue; time is O(misses × models that fit).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sllm_mini.eviction import POLICIES, Policy, Resident, choose_victims, next_clock
from sllm_mini.lab.style import INK, color_of, use_style
from sllm_mini.lab.units import nbytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRANULE_NBYTES = 16 << 20
"""Sizes of synthetic models are multiples of it, and tails go in it."""
_STYLES = (("process", "o"), ("disk", "^"), ("dram", "s"), ("device", "D"), ("runtime", "v"), ("remote", "P"))
_PANELS = (("requests", "requests that found\ntheir whole model"), ("nbytes", "bytes found"), ("seconds", "loading seconds\nsaved"))


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model that is asked for with probability `share`, has `nbytes` and takes `cost_seconds` to load."""

    name: str
    share: float
    nbytes: int
    cost_seconds: float


@dataclass(frozen=True, slots=True)
class HitRatios:
    """Shares of one stream, 0 to 1: requests served whole, bytes found, seconds of loading saved."""

    requests: float
    nbytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class CachePoint:
    """What one policy reached with a cache of `cache_nbytes`."""

    policy: str
    cache_nbytes: int
    ratios: HitRatios


def zipf_catalogue(
    models: int,
    *,
    exponent: float = 0.9,
    smallest_nbytes: int = 10**9,
    largest_nbytes: int = 30 * 10**9,
    bytes_per_second: Sequence[float] = (3e9, 5e8),
    start_seconds: float = 0.2,
    seed: int = 0,
) -> list[CatalogueModel]:
    """A synthetic catalogue: the i-th most popular model is asked for in proportion to i^-exponent.

    Sizes are log-uniform between the two, independent of popularity; loading takes `start_seconds` and then runs at one
    of `bytes_per_second`, chosen at random (a disk and a network, say). Raises ValueError for sizes or a number that
    cannot be.
    """
    if models < 1 or not 0 < smallest_nbytes <= largest_nbytes:
        raise ValueError(f"no {models} models of {smallest_nbytes} to {largest_nbytes} bytes; give at least one, the smallest size first")
    chance = random.Random(seed)
    weights = [rank**-exponent for rank in range(1, models + 1)]
    total = math.fsum(weights)
    catalogue = []
    for number, weight in enumerate(weights):
        nbytes = smallest_nbytes * (largest_nbytes / smallest_nbytes) ** chance.random()
        nbytes = max(1, round(nbytes / GRANULE_NBYTES)) * GRANULE_NBYTES
        cost = start_seconds + nbytes / chance.choice(bytes_per_second)
        catalogue.append(CatalogueModel(f"model-{number:04d}", weight / total, nbytes, cost))
    return catalogue


def request_stream(catalogue: Sequence[CatalogueModel], requests: int, *, seed: int = 0) -> list[CatalogueModel]:
    """Independent draws by `share`: the independent reference model."""
    return random.Random(seed).choices(catalogue, weights=[model.share for model in catalogue], k=requests)


def simulate_cache(
    stream: Sequence[CatalogueModel],
    cache_nbytes: int,
    policy: Policy,
    *,
    warm_up: int = 0,
    remember_uses: bool = True,
    granule_nbytes: int = GRANULE_NBYTES,
) -> HitRatios:
    """Plays a stream through one cache that begins empty; the first `warm_up` requests are played and not counted.

    A model larger than the cache is streamed past it. With `remember_uses` a count of uses outlives its model's
    eviction, as in a store that knows its models; without, it begins anew, as in FaasCache. Raises ValueError where
    no request is left to count.
    """
    if not 0 <= warm_up < len(stream):
        raise ValueError(f"a stream of {len(stream)} requests has none left after a warm-up of {warm_up}; play more of them")
    residents: dict[str, Resident] = {}
    uses: dict[str, int] = {}
    used_nbytes, clock = 0, 0.0
    found = _Tally()
    for now, model in enumerate(stream):
        old = residents.pop(model.name, None)
        there = old.nbytes if old else 0
        if now >= warm_up:
            found.add(model, there)
        if model.nbytes > cache_nbytes:
            continue
        needed = used_nbytes - there + model.nbytes - cache_nbytes
        if needed > 0:  # the model itself is not among the residents now: what is being loaded is leased
            victims = choose_victims(list(residents.values()), needed, policy, granule_nbytes)
            clock = next_clock(clock, victims)
            for victim in victims:
                used_nbytes -= victim.nbytes
                cut = residents.pop(victim.name)
                if left := cut.nbytes - victim.nbytes:
                    cost = cut.cost_seconds * left / cut.nbytes
                    residents[cut.name] = replace(cut, nbytes=left, evictable_nbytes=left, cost_seconds=cost)
        before = uses.get(model.name, 0) if remember_uses else old.uses if old else 0
        uses[model.name] = before + 1
        residents[model.name] = Resident(model.name, model.nbytes, model.nbytes, now, before + 1, model.cost_seconds, clock)
        used_nbytes += model.nbytes - there
    return found.ratios()


@dataclass(slots=True)
class _Tally:
    """Sums over the counted part of a stream."""

    requests: int = 0
    whole: int = 0
    nbytes: int = 0
    found_nbytes: int = 0
    seconds: float = 0.0
    saved_seconds: float = 0.0

    def add(self, model: CatalogueModel, there_nbytes: int) -> None:
        self.requests += 1
        self.whole += there_nbytes == model.nbytes
        self.nbytes += model.nbytes
        self.found_nbytes += there_nbytes
        self.seconds += model.cost_seconds
        self.saved_seconds += model.cost_seconds * there_nbytes / model.nbytes

    def ratios(self) -> HitRatios:
        return HitRatios(self.whole / self.requests, self.found_nbytes / self.nbytes, self.saved_seconds / self.seconds)


def characteristic_requests(catalogue: Sequence[CatalogueModel], cache_nbytes: int) -> float:
    """Che's characteristic time T, in requests: how long LRU keeps a model that nobody asks for again.

    Solves Σ nbytes_i (1 − exp(−share_i T)) = cache by bisection over the models that fit at all (Che, Tung and Wang,
    2002); infinite where all of them fit together.
    """
    fitting = [model for model in catalogue if model.nbytes <= cache_nbytes]
    if sum(model.nbytes for model in fitting) <= cache_nbytes:
        return math.inf

    def filled(requests: float) -> float:
        return math.fsum(-model.nbytes * math.expm1(-model.share * requests) for model in fitting)

    low, high = 0.0, 1.0
    while filled(high) < cache_nbytes:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < cache_nbytes else (low, middle)
    return high


def che_ratios(catalogue: Sequence[CatalogueModel], cache_nbytes: int) -> HitRatios:
    """LRU's hit ratios by Che's approximation: a model is there with probability 1 − exp(−share T).

    Good to 2–3 % for many models that are small against the cache.
    """
    time = characteristic_requests(catalogue, cache_nbytes)
    return _ratios(catalogue, [-math.expm1(-model.share * time) if model.nbytes <= cache_nbytes else 0.0 for model in catalogue])


def bound_ratios(catalogue: Sequence[CatalogueModel], cache_nbytes: int) -> HitRatios:
    """What no policy passes under independent requests, each ratio by a filling of its own.

    The fractional knapsack: models by what their bytes save per request, the densest first, the last one cut. A policy
    that cannot see the future has some filling at each request, and no filling is worth more.
    """
    filled = [
        _ratios(catalogue, _fill(catalogue, cache_nbytes, worth))
        for worth in (lambda m: m.share / m.nbytes, lambda m: m.share, lambda m: m.share * m.cost_seconds / m.nbytes)
    ]
    return HitRatios(filled[0].requests, filled[1].nbytes, filled[2].seconds)


def _fill(catalogue: Sequence[CatalogueModel], cache_nbytes: int, worth: Callable[[CatalogueModel], float]) -> list[float]:
    """The part of each model that a cache holds when the bytes of highest worth come first."""
    part = [0.0] * len(catalogue)
    free = cache_nbytes
    for number in sorted(range(len(catalogue)), key=lambda number: worth(catalogue[number]), reverse=True):
        part[number] = min(1.0, free / catalogue[number].nbytes)
        free = max(0, free - catalogue[number].nbytes)
    return part


def _ratios(catalogue: Sequence[CatalogueModel], part: Sequence[float]) -> HitRatios:
    """Expected ratios if this part of each model is there."""

    def mean(value: Callable[[CatalogueModel], float]) -> float:
        worth = [model.share * value(model) for model in catalogue]
        return math.fsum(map(float.__mul__, worth, part)) / math.fsum(worth)

    return HitRatios(mean(lambda _: 1.0), mean(lambda m: float(m.nbytes)), mean(lambda m: m.cost_seconds))


def hit_curves(
    stream: Sequence[CatalogueModel], sizes: Iterable[int], *, policies: Mapping[str, Policy] = POLICIES, warm_up: int = 0
) -> list[CachePoint]:
    """Simulates every policy on the same stream at every cache size (bytes)."""
    return [
        CachePoint(name, size, simulate_cache(stream, size, policy, warm_up=warm_up)) for size in sizes for name, policy in policies.items()
    ]


def plot_hit_ratios(points: Sequence[CachePoint], catalogue: Sequence[CatalogueModel]) -> Figure:
    """Each ratio against the cache's size, a line per policy, dots for LRU over Che's dashed line; the bound is dotted.

    Raises ValueError without points.
    """
    from matplotlib import pyplot

    if not points:
        raise ValueError("there is nothing to draw; simulate at least one cache with hit_curves")
    use_style()
    total = sum(model.nbytes for model in catalogue)
    sizes = sorted({point.cache_nbytes for point in points})
    steps = [round(sizes[0] + (sizes[-1] - sizes[0]) * step / 40) for step in range(41)] if len(sizes) > 1 else sizes
    theory = [(che_ratios(catalogue, size), bound_ratios(catalogue, size)) for size in steps]
    figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(7.6, 3.7), sharex=True, sharey=True, layout="constrained")
    for ax, (metric, title) in zip(panels, _PANELS, strict=True):
        for number, name in enumerate(dict.fromkeys(point.policy for point in points)):
            role, marker = _STYLES[number % len(_STYLES)]
            own = sorted((point for point in points if point.policy == name), key=lambda point: point.cache_nbytes)
            heights = [100 * getattr(point.ratios, metric) for point in own]
            thick = max(0.8, 2.4 - 0.5 * number)  # where two lines run together, the earlier shows on both sides of the later
            line = {"linestyle": "none"} if name == "lru" else {"linewidth": thick}  # theory draws lru's line
            x = [point.cache_nbytes / 1e9 for point in own]
            ax.plot(x, heights, color=color_of(role), marker=marker, markersize=2 + 2 * thick, label=name, **line)
        for style, which, label in (("--", 0, "lru by Che's approximation"), (":", 1, "bound: no policy passes it")):
            heights = [100 * getattr(pair[which], metric) for pair in theory]
            ax.plot([size / 1e9 for size in steps], heights, color=INK, linestyle=style, linewidth=1.2, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, 1.04 * sizes[-1] / 1e9)
        ax.set_ylim(0, 100)
    panels[0].set_ylabel("hit ratio, %")
    panels[1].set_xlabel(f"cache, GB (all {len(catalogue)} models: {nbytes_text(total)})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def hit_ratio_text(points: Sequence[CachePoint], catalogue: Sequence[CatalogueModel]) -> str:
    """The finding at the middle size: the best policy by each ratio beside LRU, Che's error and the bound."""
    sizes = sorted({point.cache_nbytes for point in points})
    size = sizes[len(sizes) // 2]
    here = {point.policy: point.ratios for point in points if point.cache_nbytes == size}
    bound, che = bound_ratios(catalogue, size), che_ratios(catalogue, size)
    said = []
    for metric, words in (("requests", "requests served whole"), ("nbytes", "bytes found"), ("seconds", "loading seconds saved")):
        best = max(here, key=lambda name: getattr(here[name], metric))
        beside = f" (lru {getattr(here['lru'], metric):.1%})" if "lru" in here and best != "lru" else ""
        said.append(f"{words}: {best} {getattr(here[best], metric):.1%}{beside}, the bound {getattr(bound, metric):.1%}")
    close = f" Che's approximation of lru's requests is {che.requests / here['lru'].requests - 1:+.1%} off." if "lru" in here and here["lru"].requests else ""
    return f"With {nbytes_text(size)} of cache, best of {', '.join(here)}: {'; '.join(said)}.{close}"


def hit_ratio_alt_text(points: Sequence[CachePoint], catalogue: Sequence[CatalogueModel]) -> str:
    """What `plot_hit_ratios` shows, in words."""
    sizes = sorted({point.cache_nbytes for point in points})
    rows = []
    for name in dict.fromkeys(point.policy for point in points):
        own = sorted((point for point in points if point.policy == name), key=lambda point: point.cache_nbytes)
        rows.append(f"{name} {own[0].ratios.seconds:.0%} to {own[-1].ratios.seconds:.0%}")
    return (
        f"Three panels of lines that rise with the size of the cache, {nbytes_text(sizes[0])} to {nbytes_text(sizes[-1])}: hit ratios by request, by byte "
        f"and by loading seconds, for each policy, with Che's approximation of lru dashed and the bound dotted. Loading seconds saved, smallest to "
        f"largest cache: {', '.join(rows)}. {hit_ratio_text(points, catalogue)}"
    )
