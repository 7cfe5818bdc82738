"""The climb from weights that are there to a warm instance, by what was prepared: a sum of parts measured one by one.

Arithmetic on what `measure` and `requests` found; it is not the time of one start, and says so. Shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.style import color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.lab.warmup.measure import rows_of
from sllm_mini.lab.warmup.requests import AFTER_DUMMY, STRAIGHT, FirstRequest, request_medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Climbs = Mapping[str, Mapping[str, float]]
NOTHING, ON_DISK, WARM = "nothing prepared", "prepared on disk", "and a dummy request sent"
COMPILED, KERNEL, MEMORY, REQUEST = "torch.compile", "attention kernel", "memory profile", "first token"
_COLORS = {COMPILED: "cold", KERNEL: "runtime", MEMORY: "dram", REQUEST: "ready"}
_STATES = {COMPILED: ("torch.compile", "cold cache", "warm cache"), KERNEL: ("kernels", "just in time", "ahead of time"), MEMORY: ("memory profile", "measured", "recorded")}


def sum_climbs(documents: Sequence[Mapping[str, Any]], requests: Sequence[FirstRequest]) -> dict[str, dict[str, float]]:
    """Label → part → median seconds that a request would still wait for. Parts that were not measured are left out. The
    dummy request pays the rest of the warm climb before anyone waits, so of it only the request's own first token is left."""
    medians = {(row["part"], row["state"]): row["seconds_median"] for document in documents for part, *_ in _STATES.values() for row in rows_of(document, part)}
    found: dict[str, dict[str, float]] = {NOTHING: {}, ON_DISK: {}, WARM: {}}
    for name, (part, unprepared, prepared) in _STATES.items():
        if (part, unprepared) in medians and (part, prepared) in medians:
            found[NOTHING][name], found[ON_DISK][name] = medians[part, unprepared], medians[part, prepared]
    waits = request_medians(requests)
    found[NOTHING][REQUEST] = found[ON_DISK][REQUEST] = waits[STRAIGHT][1]
    found[WARM][REQUEST] = waits[AFTER_DUMMY][1]
    return found


def plot_climbs(climbs: Climbs, ax: Axes | None = None) -> Axes:
    """A bar for each label, cut into parts. Not safe while another thread draws."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 2.5), layout="constrained")
    longest = max(sum(parts.values()) for parts in climbs.values())
    seen = set[str]()
    for row, parts in enumerate(climbs.values()):
        left = 0.0
        for name, seconds in parts.items():
            color = color_of(_COLORS[name])
            ax.barh(row, seconds, left=left, height=0.6, color=color, edgecolor=darker(color), linewidth=0.5, label=None if name in seen else name)
            if seconds > 0.12 * longest:
                ax.text(left + seconds / 2, row, seconds_text(seconds), ha="center", va="center", fontsize=8.5, color=ink_on(color))
            seen.add(name)
            left += seconds
        ax.annotate(f" {seconds_text(left)}", (left, row), va="center", fontsize=9, fontweight="bold")
    ax.set_yticks(range(len(climbs)), list(climbs))
    ax.set_ylim(len(climbs) - 0.4, -0.6)
    ax.set_xlim(0, 1.15 * longest)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("seconds a request waits once the weights are there (a sum of medians)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, frameon=False)
    return ax


def climbs_text(climbs: Climbs) -> str:
    """What the bars show, in words."""
    totals = {label: sum(parts.values()) for label, parts in climbs.items()}
    largest = max(climbs[NOTHING], key=lambda name: climbs[NOTHING][name])
    return (
        f"{NOTHING.capitalize()} {seconds_text(totals[NOTHING])}, of which {largest} {share_text(climbs[NOTHING][largest] / totals[NOTHING])}; {ON_DISK} {seconds_text(totals[ON_DISK])}; "
        f"{WARM} {seconds_text(totals[WARM])}. A sum of medians of parts measured one by one, not the time of one start."
    )


def climbs_table(climbs: Climbs) -> Table:
    """Every part of every bar, where bars are too short to be read."""
    names = list(climbs[NOTHING])
    rows = [(label, *(seconds_text(parts[name]) if name in parts else "before" for name in names), seconds_text(sum(parts.values()))) for label, parts in climbs.items()]
    headers = ("what was done", *names, "in all")
    return Table(headers, tuple(rows), numeric=frozenset(range(1, len(headers))), note="before: done when nobody waited; its time is in the row above, or that of the dummy request.")
