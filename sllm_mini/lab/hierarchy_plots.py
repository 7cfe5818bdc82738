"""The hierarchy drawn and said: loads by tier beside their limits, what DRAM holds of a model, a tail that streams in.

Arithmetic on what `hierarchy` and `livecache` measured; nothing here measures. Shown in chapter 03.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.lab.hierarchy import PartialLoad, TierRun, median_partial, median_seconds
from sllm_mini.lab.livecache import StreamRun
from sllm_mini.lab.style import INK, MUTED, WAIT_HATCH, color_of, darker, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text, share_text
from sllm_mini.storage.arrivals import image_places
from sllm_mini.types import Tier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sllm_mini.storage import Store

_SLOWEST = {
    Tier.REMOTE: "the server, over the loopback address",
    Tier.DISK: "the disk, read around the page cache",
    Tier.DRAM: "nothing has to move",
    Tier.DEVICE: "nothing has to move",
}
_NETWORK_GBIT = (1, 10, 100)
_BITS = 8


def prediction_table(limits: Mapping[Tier, float], nbytes: int, *, on_gpu: bool = False) -> Table:
    """The least that a model of `nbytes` can take from each tier, by the limits that were measured; and from servers behind
    networks of common rates, which is arithmetic."""
    rows = [(f"remote, {gbit} Gbit/s network", "that network, at its nominal rate", rate_text(gbit * 1e9 / _BITS), seconds_text(nbytes * _BITS / (gbit * 1e9))) for gbit in _NETWORK_GBIT]
    for tier, seconds in limits.items():
        if tier is Tier.DEVICE and not on_gpu:
            continue
        slowest = "the link to the GPU" if on_gpu and tier is Tier.DRAM else _SLOWEST[tier]
        rows.append((tier.name.lower(), slowest, rate_text(nbytes / seconds) if seconds else "", seconds_text(seconds)))
    return Table(
        headers=("from", "the slowest part of the way", "rate", "at least"),
        rows=tuple(rows),
        caption=f"What {nbytes_text(nbytes)} take at least",
        numeric=frozenset({2, 3}),
    )


def tier_shares(runs: Sequence[TierRun], tier: Tier) -> list[float]:
    """How close each run from a tier came to the least that was possible in its round; 1 is at the limit."""
    return [run.floor_seconds / run.seconds for run in runs if run.tier is tier]


def plot_tiers(runs: Sequence[TierRun], ax: Axes | None = None) -> Axes:
    """A bar for each tier, its median run: the load, then the first use of every byte; a dot for each run, a line for the limit.
    Raises ValueError without runs."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    tiers = _tiers(runs)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 1.0 + 0.62 * len(tiers)), layout="constrained")
    middle = {tier: sorted(_of(runs, tier), key=lambda run: run.seconds)[len(_of(runs, tier)) // 2] for tier in tiers}
    longest = max(run.seconds for run in middle.values())
    for row, (tier, run) in enumerate(middle.items()):
        floor = median_seconds(runs, tier, "floor_seconds")
        ax.barh(row, run.load_seconds, height=0.56, color=color_of(tier))
        ax.barh(row, run.use_seconds, left=run.load_seconds, height=0.56, color=color_of("ready"), edgecolor=darker(color_of("ready")), linewidth=0.6)
        ax.plot([floor, floor], [row - 0.4, row + 0.4], color=INK, linewidth=1.6)
        samples = [other.seconds for other in _of(runs, tier)]
        ax.plot(samples, [row + 0.4] * len(samples), ".", color=MUTED, markersize=5)
        words = f"{seconds_text(run.seconds)}, {share_text(statistics.median(tier_shares(runs, tier)))} of the limit"
        ax.text(max(run.seconds, floor) + 0.015 * longest, row, words, va="center", fontsize=9)
    ax.set_yticks(range(len(tiers)), [f"from {_name(tier)}" for tier in tiers])
    ax.set_ylim(len(tiers) - 0.4, -0.6)
    ax.set_xlim(0, max(1.5 * longest, 1.03 * max(run.seconds for run in runs)))
    ax.grid(False, axis="y")
    ax.set_xlabel(f"seconds until {nbytes_text(runs[0].nbytes)} have been loaded and used")
    keys = [
        *(Patch(color=color_of(tier), label=f"load from {_name(tier)}") for tier in tiers),
        Patch(facecolor=color_of("ready"), edgecolor=darker(color_of("ready")), label="first use of every byte"),
        Line2D([], [], color=INK, label="the limit of this way"),
        Line2D([], [], color=MUTED, marker=".", linestyle="none", label="one run"),
    ]
    ax.figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return ax


def tiers_text(runs: Sequence[TierRun]) -> str:
    """The finding: what each tier saves against the one below it, round by round, and which came closest to its limit."""
    tiers = _tiers(runs)
    steps = []
    for low, high in pairwise(tiers):
        factors = [one.seconds / other.seconds for one, other in zip(_of(runs, low), _of(runs, high), strict=True)]
        steps.append(f"{_name(high)} instead of {_name(low)}: x{statistics.median(factors):.1f} ({min(factors):.1f} to {max(factors):.1f})")
    closest = max(tiers, key=lambda tier: statistics.median(tier_shares(runs, tier)))
    return f"{'; '.join(steps)}. The closest to its limit is the load from {_name(closest)}, {share_text(statistics.median(tier_shares(runs, closest)))} of it."


def tiers_alt_text(runs: Sequence[TierRun]) -> str:
    """What `plot_tiers` shows, in words."""
    said = [
        f"from {_name(tier)} {seconds_text(median_seconds(runs, tier))} (load {seconds_text(median_seconds(runs, tier, 'load_seconds'))}, first use "
        f"{seconds_text(median_seconds(runs, tier, 'use_seconds'))}; limit {seconds_text(median_seconds(runs, tier, 'floor_seconds'))})"
        for tier in _tiers(runs)
    ]
    return f"Bars of seconds by the tier that a load starts from: {', '.join(said)}. {tiers_text(runs)}"


def tiers_table(runs: Sequence[TierRun], predicted: Mapping[Tier, float]) -> Table:
    """Each tier's load beside what was predicted for it, with the least and the most of its rounds."""
    rows = []
    for tier in _tiers(runs):
        load = median_seconds(runs, tier, "load_seconds")
        samples = [run.load_seconds for run in _of(runs, tier)]
        guess = predicted[tier]
        rows.append((
            _name(tier), seconds_text(guess), seconds_text(load), f"{seconds_text(min(samples))} to {seconds_text(max(samples))}",
            f"x{load / guess:.2f}" if guess else "", seconds_text(median_seconds(runs, tier, "use_seconds")), seconds_text(median_seconds(runs, tier, "again_seconds")),
        ))  # fmt: skip
    return Table(
        headers=("from", "predicted", "load", "its rounds", "against it", "first use", "second use"),
        rows=tuple(rows),
        caption="Predicted before, measured after",
        note="Predicted: bytes over the limit that was measured first. Use: the sum over every byte, right after the load and once more.",
        numeric=frozenset(range(1, 7)),
    )


def places_table(store: Store) -> Table:
    """A store's account of its places beside the system's, and what it counted since it began."""
    figures = store.stats()
    rows = []
    for place in figures.places:
        kernel = "not told" if place.kernel_nbytes is None else f"{place.kernel_nbytes:,}"
        rows.append((place.place, f"{place.budget_nbytes:,}", f"{place.used_nbytes:,}", kernel, f"{figures.evicted_nbytes.get(place.place, 0):,}"))
    moved = ", ".join(f"{way} {nbytes_text(nbytes)}" for way, nbytes in figures.moved_nbytes.items()) or "nothing"
    return Table(
        headers=("place", "budget, bytes", "used", "the system's count", "evicted so far"),
        rows=tuple(rows),
        caption="The store's account",
        note=f"Moved so far: {moved}. The system's count is of blocks: of the memory files in DRAM, of the cache's files on the disk.",
        numeric=frozenset(range(1, 5)),
    )


def plot_residency(checkpoint: Checkpoint, chunk_nbytes: int, states: Mapping[str, int], ax: Axes | None = None) -> Axes:
    """The image of a model: its layers on top, below them for each state (words → resident bytes) the chunks that are there
    and, hatched, those that are not."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 1.3 + 0.5 * len(states)), layout="constrained")
    total = checkpoint.nbytes
    bounds = _layer_bounds(checkpoint)
    for number, (name, (start, end)) in enumerate(bounds.items()):
        color = color_of("runtime" if number % 2 else "process")
        ax.barh(0, (end - start) / 1e6, left=start / 1e6, height=0.7, color=color)
        if end - start > 0.08 * total:
            ax.text((start + end) / 2e6, 0, name, color="white", ha="center", va="center", fontsize=9)
    for row, resident in enumerate(states.values(), start=1):
        chunks = [(start / 1e6, min(chunk_nbytes, total - start) / 1e6) for start in range(0, total, chunk_nbytes)]
        there = [chunk for chunk in chunks if chunk[0] * 1e6 < resident]
        edge = darker(color_of("dram"))
        ax.broken_barh(there, (row - 0.35, 0.7), facecolor=color_of("dram"), edgecolor=edge, linewidth=0.4)
        ax.broken_barh(chunks[len(there) :], (row - 0.35, 0.7), facecolor="white", edgecolor=MUTED, linewidth=0.4, hatch=WAIT_HATCH)
    ax.set_yticks(range(len(states) + 1), ["layers", *states])
    ax.set_ylim(len(states) + 0.5, -0.5)
    ax.set_xlim(0, total / 1e6)
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"offset in the model, MB; chunks of {nbytes_text(chunk_nbytes)}")
    keys = [Patch(facecolor=color_of("dram"), label="in DRAM"), Patch(facecolor="white", edgecolor=MUTED, hatch=WAIT_HATCH, label="given back")]
    ax.figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return ax


def residency_text(checkpoint: Checkpoint, states: Mapping[str, int]) -> str:
    """The finding: how many of the layers, from the first, each state holds whole."""
    bounds = _layer_bounds(checkpoint)
    said = [
        f"{name}: {nbytes_text(resident)}, {sum(end <= resident for _, end in bounds.values())} of {len(bounds)} layers whole" for name, resident in states.items()
    ]
    return "; ".join(said) + "."


def plot_arrival(loads: Sequence[PartialLoad], ax: Axes | None = None) -> Axes:
    """Layers that are ready against seconds since they were asked for, a staircase for each median load."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.3), layout="constrained")
    for load, role in zip(median_partial(loads), ("disk", "dram"), strict=False):
        seconds = [0.0, *(moment for _, moment in load.ready)]
        label = f"DRAM held {_held(load)}, {nbytes_text(load.moved_nbytes)} moved"
        ax.step([moment * 1e3 for moment in seconds], range(len(seconds)), where="post", color=color_of(role), label=label, linewidth=2.2)
        ax.plot(load.seconds * 1e3, len(load.ready), "o", color=color_of(role), markersize=6)
    ax.set_xlabel("milliseconds since the model was asked for")
    ax.set_ylabel("layers ready, from the first")
    ax.set_ylim(0, None)
    ax.set_xlim(0, None)
    ax.legend(loc="lower right")
    return ax


def _held(load: PartialLoad) -> str:
    return nbytes_text(load.found_nbytes) if load.found_nbytes else "nothing"


def arrival_text(loads: Sequence[PartialLoad]) -> str:
    """The finding: the first layer and the last of a cold load beside those of a half resident one."""
    words = "With {} of it in DRAM the first layer is ready after {}, the last after {}, and {} are moved."
    said = (words.format(_held(load), seconds_text(load.ready[0][1]), seconds_text(load.seconds), nbytes_text(load.moved_nbytes)) for load in median_partial(loads))
    return " ".join(said)


def arrival_alt_text(loads: Sequence[PartialLoad]) -> str:
    """What `plot_arrival` shows, in words."""
    return f"Staircases of layers ready against time, from {len(median_partial(loads)[0].ready)} layers each. {arrival_text(loads)}"


def plot_streams(predicted: Sequence[StreamRun], measured: Sequence[StreamRun]) -> Figure:
    """Requests that found their whole model, and seconds until all had theirs: the simulation's hatched bar beside the store's."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    use_style()
    figure, panels = pyplot.subplots(1, 2, figsize=(7.2, 3.1), layout="constrained")
    names = [run.policy for run in measured]
    found = ([100 * run.ratios.requests for run in runs] for runs in (predicted, measured))
    spent = ([run.seconds for run in runs] for runs in (predicted, measured))
    for ax, (guessed, got), unit, digits in zip(panels, (found, spent), ("requests that found\ntheir whole model, %", "seconds until every\nrequest had its model"), (0, 1), strict=True):
        for offset, heights, look in ((-0.2, guessed, {"facecolor": "white", "hatch": WAIT_HATCH}), (0.2, got, {"facecolor": color_of("dram")})):
            bars = ax.bar([place + offset for place in range(len(names))], heights, width=0.38, edgecolor=darker(color_of("dram")), linewidth=0.8, **look)
            ax.bar_label(bars, fmt=f"%.{digits}f", fontsize=8.5, padding=2)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel(unit)
        ax.set_ylim(0, 1.18 * max(*guessed, *got))
        ax.grid(False, axis="x")
    edge = darker(color_of("dram"))
    keys = [Patch(facecolor="white", edgecolor=edge, hatch=WAIT_HATCH, label="simulated"), Patch(facecolor=color_of("dram"), edgecolor=edge, label="measured on the store")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


def streams_text(predicted: Sequence[StreamRun], measured: Sequence[StreamRun], requests: int) -> str:
    """The finding: whose hits were foretold to the request, and how far off the seconds are."""
    pairs = list(zip(predicted, measured, strict=True))
    off = {guess.policy: round(requests * (got.ratios.requests - guess.ratios.requests)) for guess, got in pairs}
    exact = [name for name, by in off.items() if by == 0]
    others = [f"{name} by {by:+d}" for name, by in off.items() if by]
    hits = f"Hits as foretold to the request: {', '.join(exact) or 'none'}" + (f"; off: {', '.join(others)}" if others else "")
    seconds = ", ".join(f"{guess.policy} x{got.seconds / guess.seconds:.2f}" for guess, got in pairs)
    best = min(measured, key=lambda run: run.seconds)
    return f"{hits} of {requests} requests. Measured seconds against simulated: {seconds}. The shortest wait in all was with {best.policy}, {seconds_text(best.seconds)}."


def streams_alt_text(predicted: Sequence[StreamRun], measured: Sequence[StreamRun], requests: int) -> str:
    """What `plot_streams` shows, in words."""
    said = [f"{got.policy} {guess.ratios.requests:.0%} simulated, {got.ratios.requests:.0%} measured" for guess, got in zip(predicted, measured, strict=True)]
    return f"Pairs of bars, simulated and measured, for each policy; requests that found their whole model: {', '.join(said)}. {streams_text(predicted, measured, requests)}"


def _tiers(runs: Sequence[TierRun]) -> list[Tier]:
    if not runs:
        raise ValueError("there is nothing to draw; measure at least one round with measure_tiers")
    return sorted({run.tier for run in runs})


def _of(runs: Sequence[TierRun], tier: Tier) -> list[TierRun]:
    return [run for run in runs if run.tier is tier]


def _name(tier: Tier) -> str:
    return "DRAM" if tier is Tier.DRAM else f"the {'remote' if tier is Tier.REMOTE else tier.name.lower()}"


def _layer_bounds(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Where the bytes lie in the image of a model that each layer has to itself, in order; those that it shares with an
    earlier one (tied tensors) are the earlier one's."""
    bounds: dict[str, tuple[int, int]] = {}
    covered = 0
    for tensor, offset in sorted(image_places(checkpoint.index), key=lambda place: place[1]):
        end = offset + tensor.nbytes
        if end > covered:
            name = checkpoint.index.layers[tensor.layer]
            bounds[name] = bounds.get(name, (offset, end))[0], end
            covered = end
    return bounds
