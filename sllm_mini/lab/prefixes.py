"""Two questions to the simulated cache of `caching`: what keeping a prefix of every model costs, and what the load makes of the policies.

Every figure is simulated; the policies are the store's own. Costs a second or so of arithmetic. Shown in chapter 03.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm_mini.eviction import GDSF, POLICIES, keep_prefix
from sllm_mini.lab.caching import (
    GRANULE_NBYTES,
    CatalogueModel,
    HitRatios,
    bound_ratios,
    che_ratios,
    request_stream,
    simulate_cache,
    zipf_catalogue,
)
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.units import nbytes_text
from sllm_mini.lab.widgets import Slider

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREFIXES = (GRANULE_NBYTES, 250_000_000, 500_000_000, 1_000_000_000, 2_000_000_000, 4_000_000_000, 8_000_000_000)
_WARM_UP_SHARE = 0.2
_METRICS = (("requests", "requests served whole", "process"), ("nbytes", "bytes found", "disk"), ("seconds", "loading seconds saved", "dram"))


@dataclass(frozen=True, slots=True)
class PrefixPoint:
    """What a cache reached that keeps `prefix_nbytes` of each model before it keeps more of any. `prefixes_share` is what
    all prefixes together would take of it; above 1 they do not all fit."""

    prefix_nbytes: int
    prefixes_share: float
    ratios: HitRatios


def prefix_points(catalogue: Sequence[CatalogueModel], stream: Sequence[CatalogueModel], cache_nbytes: int, *, prefixes: Sequence[int] = _PREFIXES) -> list[PrefixPoint]:
    """Simulates greedy-dual with prefixes of each size (bytes) on one stream, the first fifth of it as a warm-up."""
    warm_up = int(_WARM_UP_SHARE * len(stream))
    found = []
    for prefix in prefixes:
        together = sum(min(model.nbytes, max(prefix, GRANULE_NBYTES)) for model in catalogue)
        found.append(PrefixPoint(prefix, together / cache_nbytes, simulate_cache(stream, cache_nbytes, keep_prefix(GDSF, prefix), warm_up=warm_up)))
    return found


def plot_prefixes(points: Sequence[PrefixPoint], whole: HitRatios, ax: Axes | None = None) -> Axes:
    """The three ratios against what all prefixes together take of the cache; dashed, the same policy evicting whole models."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    shares = [point.prefixes_share for point in points]
    for (metric, words, role), marker in zip(_METRICS, "o^s", strict=True):
        ax.plot(shares, [100 * getattr(point.ratios, metric) for point in points], marker=marker, markersize=5, color=color_of(role), label=words)
        ax.axhline(100 * getattr(whole, metric), color=color_of(role), linestyle="--", linewidth=1.1)
    ax.axvline(1, color=INK, linewidth=1)
    ax.text(0.95, 1, "all prefixes fit", ha="right", fontsize=9, color=INK)
    ax.text(1.05, 1, "not all of them do", fontsize=9, color=INK)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("all prefixes together, as a share of the cache (dashed: whole models evicted, no prefixes)")
    ax.set_ylabel("hit ratio, %")
    ax.set_ylim(0, None)
    ax.legend(loc="center left")
    return ax


def prefixes_text(points: Sequence[PrefixPoint], whole: HitRatios) -> str:
    """The finding: the smallest prefix beside whole models, and the worst of all."""
    small, worst = points[0], min(points, key=lambda point: point.ratios.seconds)
    return (
        f"Loading seconds saved: {whole.seconds:.0%} evicting whole models; {small.ratios.seconds:.0%} with a prefix of {nbytes_text(small.prefix_nbytes)} kept "
        f"({small.prefixes_share:.0%} of the cache for all of them); {worst.ratios.seconds:.0%} at worst, with {nbytes_text(worst.prefix_nbytes)} each, "
        f"{worst.prefixes_share:.0%} of the cache. Requests served whole: {whole.requests:.0%}, {small.ratios.requests:.0%} and {worst.ratios.requests:.0%}."
    )


def prefixes_alt_text(points: Sequence[PrefixPoint], whole: HitRatios) -> str:
    """What `plot_prefixes` shows, in words."""
    listed = ", ".join(f"{point.prefixes_share:.0%}: {point.ratios.seconds:.0%}" for point in points)
    return f"Lines of three hit ratios against the share of the cache that all prefixes take. Loading seconds saved, by that share: {listed}. {prefixes_text(points, whole)}"


def cache_controls() -> dict[str, Slider]:
    """The controls of `draw_cache`, at a load that makes the policies differ."""
    return {
        "cache": Slider("cache, of all models", 20, 5, 80, step=5, unit="%"),
        "exponent": Slider("Zipf exponent", 0.9, 0.0, 1.6, step=0.1),
        "spread": Slider("largest to smallest", 30, 1, 100, step=1, unit="x"),
    }


def draw_cache(cache: float, exponent: float, spread: float, *, models: int = 50, requests: int = 2000) -> Described:
    """Each policy's three ratios for one load, beside Che's approximation of LRU and the bound, as a described figure.
    `cache` is in per cent of all models' bytes; the largest model is `spread` times the smallest, 1 GB."""
    from matplotlib import pyplot

    catalogue = zipf_catalogue(models, exponent=exponent, largest_nbytes=int(spread * 10**9), seed=1)
    stream = request_stream(catalogue, requests, seed=2)
    size = int(cache / 100 * sum(model.nbytes for model in catalogue))
    found = {name: simulate_cache(stream, size, policy, warm_up=int(_WARM_UP_SHARE * requests)) for name, policy in POLICIES.items()}
    che, bound = che_ratios(catalogue, size), bound_ratios(catalogue, size)
    use_style()
    figure, panels = pyplot.subplots(1, 3, figsize=(7.2, 2.9), sharey=True, layout="constrained")
    for ax, (metric, words, _) in zip(panels, _METRICS, strict=True):
        heights = [100 * getattr(ratios, metric) for ratios in found.values()]
        bars = ax.bar(range(len(found)), heights, color=color_of("dram"))
        ax.bar_label(bars, fmt="%.0f", fontsize=9, label_type="center")
        ax.plot([-0.45, 0.45], [100 * getattr(che, metric)] * 2, color=INK, linestyle="--", linewidth=1.4, label="lru by Che's approximation")
        ax.axhline(100 * getattr(bound, metric), color=MUTED, linestyle=":", linewidth=1.4, label="bound: no policy passes it")
        ax.set_xticks(range(len(found)), list(found))
        ax.set_title(words, fontsize=9.5)
        ax.grid(False, axis="x")
    panels[0].set_ylabel("hit ratio, %")
    panels[0].set_ylim(0, 108)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    best = {words: max(found, key=lambda name: getattr(found[name], metric)) for metric, words, _ in _METRICS}
    said = "; ".join(f"{words}: {name}" for words, name in best.items())
    listed = ", ".join(f"{name} {ratios.requests:.0%}, {ratios.nbytes:.0%}, {ratios.seconds:.0%}" for name, ratios in found.items())
    caption = f"{models} models, {requests:,} requests, simulated; {nbytes_text(size)} of cache. The best by {said}."
    return describe(figure, f"Bars of the hit ratios of each policy by requests, bytes and seconds: {listed}. {caption}", caption=caption)
