"""All policies on one trace: seconds of start-up against memory wasted, beside the line of every fixed keep-alive. Chapter 09.

Draws and says what `contenders` simulated; `draw_length` alone simulates, one run for the slider's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING

from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.messages import ModelSpec
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.keeping.contenders import Outcome, fixed, run_contender
from sllm_mini.lab.style import INK, MUTED, color_of, darker, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.lab.widgets import Slider
from sllm_mini.types import Warmth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS = (5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 900.0, 1800.0, 3600.0)
"""Seconds of the fixed keep-alives that make the line."""
_NAMED = (5.0, 60.0, 240.0, 3600.0)
"""Those that the drawing names."""
_MARKS = {
    "fixed": ("o", "process"), "one": ("s", "remote"), "stem": ("s", "disk"), "hybrid": ("D", "runtime"), "LRU": ("v", "dram"), "FaasCache": ("^", "dram"),
    "RainbowCake": ("*", "device"), "clairvoyant": ("P", "cold"), "scale": ("X", "process"),
}  # fmt: skip
_AT = {
    "scale to zero": (8, -3, "left"), "fixed 10 min": (-9, -7, "right"), "RainbowCake": (6, -15, "left"), "one spare": (9, 0, "left"), "one always ready": (-8, -10, "right"), "stem cells": (-8, -11, "right"), "FaasCache": (10, 3, "left"),
    "LRU": (10, -9, "left"), "hybrid histogram": (8, 3, "left"), "fixed 10 min, snapshots": (-8, -6, "right"), "RainbowCake refitted": (-8, -12, "right"),
    "clairvoyant": (-8, -11, "right"),
}  # fmt: skip


def fixed_line(requests: Sequence[TraceRequest], specs: Sequence[ModelSpec], until: float, lengths: Sequence[float] = LENGTHS) -> list[tuple[float, Outcome]]:
    """A run for each length of a fixed keep-alive."""
    return [(length, run_contender(f"fixed {length:g} s", requests, specs, contender=fixed(length), until=until)) for length in lengths]


def start_at_waste(line: Sequence[tuple[float, Outcome]], waste_gb_seconds: float) -> float | None:
    """Seconds of start-up that the fixed keep-alive of this waste would have, read off the line (straight in logarithms between two
    of its points); None beyond its ends."""
    points = sorted((one.waste_gb_seconds, one.start_seconds) for _, one in line if one.waste_gb_seconds > 0 and one.start_seconds > 0)
    for (low, before), (high, after) in pairwise(points):
        if low <= waste_gb_seconds <= high:
            share = (log(waste_gb_seconds) - log(low)) / (log(high) - log(low)) if high > low else 0.0
            return exp(log(before) + share * (log(after) - log(before)))
    return None


def plot_frontier(outcomes: Sequence[Outcome], line: Sequence[tuple[float, Outcome]]) -> Figure:
    """Memory wasted to the right, start-up upward, both logarithmic but at 0: nearer to the lower left corner is better.
    Raises ValueError without outcomes. Not safe while another thread draws."""
    from matplotlib import pyplot

    if not outcomes:
        raise ValueError("there is nothing to draw; give at least one outcome")
    use_style()
    figure, ax = pyplot.subplots(figsize=(7.4, 4.7), layout="constrained")
    _draw_line(ax, line)
    for one in outcomes:
        marker, role = next(mark for start, mark in _MARKS.items() if one.name.startswith(start))
        color, size = color_of(role), 150 if marker == "*" else 62
        ax.scatter(_hours(one), one.mean_start_seconds, marker=marker, s=size, color=color, edgecolor=darker(color), linewidth=0.9, zorder=3)
        right, up, side = _AT.get(one.name, (8, 4, "left"))
        if _hours(one) < 1 and side == "right":  # there is no room to the left of it
            right, side = -right, "left"
        ax.annotate(one.name, (_hours(one), one.mean_start_seconds), xytext=(right, up), textcoords="offset points", ha=side, fontsize=9, color=INK, zorder=4)
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    ax.set_yscale("log")
    ax.set_xlim(-0.15, 500)
    ax.set_xticks([0, 1, 3, 10, 30, 100, 300], ["0", "1", "3", "10", "30", "100", "300"])
    ax.minorticks_off()
    ticks = [0.03, 0.1, 0.3, 1, 3]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("memory held for no request (GB-hours)")
    ax.set_ylabel("start-up a request waited for, mean (s)")
    return figure


def _hours(one: Outcome) -> float:
    return one.waste_gb_seconds / 3600


def _draw_line(ax: Axes, line: Sequence[tuple[float, Outcome]]) -> None:
    ax.plot([_hours(one) for _, one in line], [one.mean_start_seconds for _, one in line], color=MUTED, linewidth=1.4, marker=".", zorder=1)
    for length, one in line:
        if length not in _NAMED:
            continue
        ax.annotate(
            f"{length:g} s" if length < 60 else f"{length / 60:g} min", (_hours(one), one.mean_start_seconds), xytext=(5, 5) if length < 3600 else (-9, -6),
            textcoords="offset points", ha="left" if length < 3600 else "right", fontsize=8, color=MUTED, zorder=2,
        )  # fmt: skip


def frontier_text(outcomes: Sequence[Outcome], line: Sequence[tuple[float, Outcome]]) -> str:
    """Which of them lie below the line of fixed keep-alives, by how much, and which above."""
    below: list[str] = []
    above: list[str] = []
    for one in outcomes:
        usual = start_at_waste(line, one.waste_gb_seconds)
        if (one.name.startswith("fixed") and one.name[-1] != "s") or usual is None:
            continue
        (below if one.start_seconds < usual else above).append(f"{one.name} {one.start_seconds / usual - 1:+.0%}".replace("-", "−"))
    said = "Start-up against a fixed keep-alive that wastes as much memory"
    return f"{said}: less with {', '.join(below) or 'none'}; more with {', '.join(above) or 'none'}."


def frontier_alt_text(outcomes: Sequence[Outcome], line: Sequence[tuple[float, Outcome]]) -> str:
    """What `plot_frontier` shows, in words."""
    points = ", ".join(f"{one.name} {seconds_text(one.mean_start_seconds)} at {_hours(one):.1f} GB-hours" for one in outcomes)
    return f"Mean start-up against memory held for no request. {points}. {frontier_text(outcomes, line)}"


def frontier_table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each, least start-up first."""
    rows = [
        (
            one.name, share_text(one.cold_fraction), *(str(one.cold.get(warmth, 0)) for warmth in (Warmth.COLD, Warmth.PROCESS, Warmth.RUNTIME)),
            f"{one.start_seconds:,.0f}", f"{_hours(one):.1f}", str(one.starts),
        )
        for one in sorted(outcomes, key=lambda one: one.start_seconds)
    ]  # fmt: skip
    return Table(
        headers=("policy", "cold", "from cold", "from process", "from runtime", "start-up, all (s)", "wasted (GB-hours)", "starts"),
        rows=tuple(rows), numeric=frozenset(range(1, 8)), caption=f"{outcomes[0].requests:,} requests, simulated",
        note="Cold: requests that waited for a start which began for them; a start from runtime or process climbs only the rungs above. Starts: pre-warmings too. Wasted: held by idle instances, and in climbs that no request used.",
    )  # fmt: skip


def length_controls() -> Mapping[str, Slider]:
    """The slider of `draw_length`."""
    return {"minutes": Slider("keep-alive", 10.0, 0.1, 240.0, unit="min", log=True)}


def draw_length(requests: Sequence[TraceRequest], specs: Sequence[ModelSpec], line: Sequence[tuple[float, Outcome]], until: float) -> Callable[..., Described]:
    """For `explore`: a fixed keep-alive of so many minutes, run anew and marked on the lines of cold fraction and of waste."""

    def draw(minutes: float) -> Described:
        one = run_contender("fixed", requests, specs, contender=fixed(60 * minutes), until=until)
        said = f"Kept for {minutes:.3g} min: {share_text(one.cold_fraction)} of the requests start cold, {_hours(one):.1f} GB-hours are held for nobody."
        alt = f"Two lines over the length of a fixed keep-alive: cold fraction falls, memory wasted rises. {said}"
        return describe(plot_lengths(line, minutes, one), alt, caption=said)

    return draw


def plot_lengths(line: Sequence[tuple[float, Outcome]], minutes: float, one: Outcome) -> Figure:
    """Cold fraction and waste over the length of a fixed keep-alive, and one run marked on both."""
    from matplotlib import pyplot

    use_style()
    figure, axes = pyplot.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
    lengths = [length / 60 for length, _ in line]
    for ax, title, of in ((axes[0], "cold starts (% of requests)", lambda run: 100 * run.cold_fraction), (axes[1], "held for no request (GB-hours)", _hours)):
        ax.plot(lengths, [of(run) for _, run in line], color=MUTED, marker=".")
        ax.scatter([minutes], [of(one)], s=90, color=color_of("dram"), edgecolor=darker(color_of("dram")), zorder=3)
        ax.set_xscale("log")
        ax.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel("kept after each request (minutes)")
        ax.set_title(title, fontsize=10)
    return figure
