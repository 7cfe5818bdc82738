"""The experiments of `reads`, drawn: the rate against the bytes under way, and what pages cost a read.

Arithmetic on what was measured. Shown in chapter 02.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllm_mini.lab.bench.words import PROBES
from sllm_mini.lab.ladder.reads import MIB, InFlight, PageRun, median_pages
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text
from sllm_mini.loading.probe import Limits, Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH = 0.9
"""A setting has reached the best when it gets this share of it."""
_MARKS = (("process", "o"), ("dram", "s"), ("disk", "^"), ("device", "D"))


def floor_table(samples: Samples, nbytes: int) -> Table:
    """What each part of a load costs a model of `nbytes` if nothing else cost anything: the best setting of each probe, and
    both kinds of pages."""
    limits = Limits(samples.measurements, samples.skipped)
    found = [(words, best) for name, words in PROBES.items() if (best := limits.best(name)) is not None]
    found += [("fresh memory touched for the first time", m) for m in samples.measurements if m.name == "first_touch"]
    return Table(
        headers=("what", "how", "rate", "for this model", "slowest to fastest"),
        rows=tuple(
            (
                words,
                m.setting,
                rate_text(m.bytes_per_second),
                seconds_text(nbytes / m.bytes_per_second),
                f"{rate_text(m.nbytes / m.seconds_max)} to {rate_text(m.nbytes / m.seconds_min)}",
            )
            for words, m in found
        ),
        caption=f"What {nbytes_text(nbytes)} cost at least",
        note="; ".join(f"not measured: {skipped.name}, {skipped.reason}" for skipped in samples.skipped),
        numeric=frozenset({2, 3, 4}),
    )


def plot_in_flight(points: Sequence[InFlight], ax: Axes | None = None) -> Axes:
    """Bytes per second against the bytes under way, a line for each size of read, a dot for each number of threads."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.5), layout="constrained")
    for (role, marker), chunk in zip(_MARKS, dict.fromkeys(point.chunk_nbytes for point in points), strict=False):
        own = [point for point in points if point.chunk_nbytes == chunk]
        below = [(point.bytes_per_second - min(point.rates)) / 1e9 for point in own]
        above = [(max(point.rates) - point.bytes_per_second) / 1e9 for point in own]
        ax.errorbar(
            [point.nbytes / MIB for point in own], [point.bytes_per_second / 1e9 for point in own], yerr=[below, above], color=color_of(role),
            marker=marker, markersize=6, capsize=2, elinewidth=0.9, label=f"reads of {_size(chunk)}",
        )  # fmt: skip
        for point in own:
            place = point.nbytes / MIB, point.bytes_per_second / 1e9
            ax.annotate(str(point.threads), place, xytext=(4, -11), textcoords="offset points", fontsize=8, color=MUTED)
    best = max(point.bytes_per_second for point in points)
    ax.axhline(best / 1e9, color=INK, linestyle="--", linewidth=1.1, label=f"the best, {rate_text(best)}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("MiB asked for and not yet there (reads at once × their size); the small figure: threads")
    ax.set_ylabel("GB/s")
    ax.set_ylim(0, 1.18 * max(max(point.rates) for point in points) / 1e9)
    ax.legend(loc="lower right")
    return ax


def in_flight_text(points: Sequence[InFlight]) -> str:
    """The finding: what one small read gets, and from how many bytes under way on the best is reached."""
    best = max(point.bytes_per_second for point in points)
    least, most = min(points, key=lambda point: point.nbytes), max(points, key=lambda point: point.bytes_per_second)
    enough = min((point for point in points if point.bytes_per_second >= ENOUGH * best), key=lambda point: point.nbytes)
    return (
        f"One read of {_size(least.chunk_nbytes)} at a time gets {least.bytes_per_second / best:.0%} of the best; the fewest bytes under way that got "
        f"{ENOUGH:.0%} of it are {_size(enough.nbytes)} ({enough.threads} × {_size(enough.chunk_nbytes)}); the best is {rate_text(best)}, with "
        f"{most.threads} × {_size(most.chunk_nbytes)}."
    )


def in_flight_alt_text(points: Sequence[InFlight]) -> str:
    """What `plot_in_flight` shows, in words."""
    listed = ", ".join(f"{point.threads} × {_size(point.chunk_nbytes)} {rate_text(point.bytes_per_second)}" for point in points)
    return f"Lines of bytes per second against bytes under way. Threads × size of a read: {listed}. {in_flight_text(points)}"


def little_table(points: Sequence[InFlight]) -> Table:
    """Little's law checked: reads done per second × seconds one takes = reads under way. All sizes of read but the largest
    (the one there is, if there is one only)."""
    sizes = sorted({point.chunk_nbytes for point in points})
    rows = []
    for point in points:
        if point.chunk_nbytes < sizes[-1] or len(sizes) == 1:
            rate = point.bytes_per_second / point.chunk_nbytes
            law = f"{rate:,.0f}", seconds_text(point.wait_seconds), f"{rate * point.wait_seconds:.2f}"
            rows.append((_size(point.chunk_nbytes), str(point.threads), *law, rate_text(point.bytes_per_second)))
    return Table(
        headers=("a read of", "threads", "reads per second", "one takes", "their product", "bytes per second"),
        rows=tuple(rows),
        caption="Little's law",
        numeric=frozenset(range(6)),
    )


def plot_pages(runs: Sequence[PageRun], ax: Axes | None = None) -> Axes:
    """Seconds per GB for each kind of memory: making pages first, then the reads; a dot for each run."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    medians = median_pages(runs)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.95 + 0.44 * len(medians)), layout="constrained")
    longest = max(_per_gb(run, run.seconds) for run in medians)
    for row, run in enumerate(medians):
        making, reading = _per_gb(run, run.making_seconds), _per_gb(run, run.reading_seconds)
        ax.barh(row, making, height=0.62, color=color_of("device"))
        ax.barh(row, reading, left=making, height=0.62, color=color_of("disk"))
        totals = [_per_gb(other, other.seconds) for other in runs if other.pages == run.pages]
        inside = [total for total in totals if total <= 1.3 * longest]
        ax.plot(inside, [row + 0.38] * len(inside), ".", color=INK, markersize=4)
        ax.text(max(making + reading, 0) + 0.012 * longest, row, f"{making + reading:.2f} s, {run.faults:,} faults", va="center", fontsize=9)
    ax.set_yticks(range(len(medians)), [run.pages.name for run in medians])
    ax.set_ylim(len(medians) - 0.4, -0.6)
    ax.set_xlim(0, 1.45 * longest)
    ax.grid(False, axis="y")
    ax.set_xlabel("seconds per GB, read cold by threads; a dot is one run")
    keys = [Patch(color=color_of("device"), label="making pages, before the reads"), Patch(color=color_of("disk"), label="reading, and what happens beside it")]
    ax.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.3, -0.24), ncols=2)
    return ax


def pages_text(runs: Sequence[PageRun]) -> str:
    """The finding: every kind of memory against the first, and faults."""
    first, *others = median_pages(runs)
    ratios = []
    for run in others:
        own = [one.seconds / other.seconds for one, other in zip(_of(runs, run), _of(runs, first), strict=True)]
        ratios.append(f"{run.pages.name} x{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})")
    faults = ", ".join(f"{one.faults:,}" for one in (first, *others))
    return f"Seconds against {first.pages.name}: {'; '.join(ratios)}. Page faults for {nbytes_text(first.nbytes)}, in this order: {faults}."


def pages_alt_text(runs: Sequence[PageRun]) -> str:
    """What `plot_pages` shows, in words."""
    bars = "; ".join(f"{run.pages.name} {seconds_text(run.seconds)}, of it {seconds_text(run.making_seconds)} making pages first" for run in median_pages(runs))
    return f"Bars of seconds for the same read into five kinds of memory: {bars}. {pages_text(runs)}"


def _of(runs: Sequence[PageRun], like: PageRun) -> list[PageRun]:
    return [run for run in runs if run.pages == like.pages]


def _per_gb(run: PageRun, seconds: float) -> float:
    return seconds * 1e9 / run.nbytes


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"
