"""The climb from weights that are there to a warm instance, by what was prepared: a sum of parts measured one by one.

Nothing prepared, prepared on disk, and all that done before a request came, which takes as long and is waited for by nobody.
Arithmetic on what `measure` and `requests` found; it is not the time of one start, and says so. Shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.style import INK, PAPER, WAIT_HATCH, color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.lab.warmup.measure import rows_of
from sllm_mini.lab.warmup.requests import AFTER_DUMMY, STRAIGHT, FirstRequest, request_medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Climbs = Mapping[str, Mapping[str, float]]
NOTHING, ON_DISK, WARM = "nothing prepared", "prepared on disk", "all done before"
COMPILED, KERNEL, MEMORY, DUMMY, REQUEST = "torch.compile", "attention kernel", "memory profile", "dummy request", "first token"
_COLORS = {COMPILED: "cold", KERNEL: "runtime", MEMORY: "dram", DUMMY: "process", REQUEST: "ready"}
_STATES = {COMPILED: ("torch.compile", "cold cache", "warm cache"), KERNEL: ("kernels", "just in time", "ahead of time"), MEMORY: ("memory profile", "measured", "recorded")}


def sum_climbs(documents: Sequence[Mapping[str, Any]], requests: Sequence[FirstRequest]) -> dict[str, dict[str, float]]:
    """Label → part → median seconds. Parts that were not measured are left out. Of `WARM` every part but the first token came
    before the request, the dummy request among them: it takes that time too, and nobody waits."""
    medians = {(row["part"], row["state"]): row["seconds_median"] for document in documents for part, *_ in _STATES.values() for row in rows_of(document, part)}
    found: dict[str, dict[str, float]] = {NOTHING: {}, ON_DISK: {}, WARM: {}}
    for name, (part, unprepared, prepared) in _STATES.items():
        if (part, unprepared) in medians and (part, prepared) in medians:
            found[NOTHING][name] = medians[part, unprepared]
            found[ON_DISK][name] = found[WARM][name] = medians[part, prepared]
    waits = request_medians(requests)
    found[NOTHING][REQUEST] = found[ON_DISK][REQUEST] = waits[STRAIGHT][1]
    found[WARM][DUMMY], found[WARM][REQUEST] = waits[AFTER_DUMMY]
    return found


def waited_seconds(climbs: Climbs, label: str) -> float:
    """How long a request waits for its first token, of all that the bar of this label shows."""
    return climbs[label][REQUEST] if label == WARM else sum(climbs[label].values())


def plot_climbs(climbs: Climbs, ax: Axes | None = None) -> Axes:
    """A bar for each label, cut into parts, from when the request comes; what came before it is hatched, and left of zero. Not
    safe while another thread draws."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 2.5), layout="constrained")
    longest = max(sum(parts.values()) for parts in climbs.values())
    seen = set[str]()
    for row, (label, parts) in enumerate(climbs.items()):
        left = waited_seconds(climbs, label) - sum(parts.values())
        earliest = left
        for name, seconds in parts.items():
            color = color_of(_COLORS[name])
            hatch = WAIT_HATCH if left < 0 else None
            ax.barh(row, seconds, left=left, height=0.6, color=color, edgecolor=PAPER if hatch else darker(color), linewidth=0.5, hatch=hatch, label=None if name in seen else name)
            if seconds > 0.12 * longest and hatch is None:
                ax.text(left + seconds / 2, row, seconds_text(seconds), ha="center", va="center", fontsize=8.5, color=ink_on(color))
            seen.add(name)
            left += seconds
        before = f", after {seconds_text(-earliest)} that nobody waited for" if earliest < 0 else ""
        ax.annotate(f" {seconds_text(waited_seconds(climbs, label))}{before}", (left, row), va="center", fontsize=9, fontweight="bold")
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(climbs)), list(climbs))
    ax.set_ylim(len(climbs) - 0.4, -0.6)
    ax.set_xlim(-1.05 * (sum(climbs[WARM].values()) - climbs[WARM][REQUEST]), 1.15 * longest)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("seconds since a request came, the weights being there (a sum of medians)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, frameon=False)
    return ax


def climbs_text(climbs: Climbs) -> str:
    """What the bars show, in words."""
    totals = {label: seconds_text(waited_seconds(climbs, label)) for label in climbs}
    largest = max(climbs[NOTHING], key=lambda name: climbs[NOTHING][name])
    share = share_text(climbs[NOTHING][largest] / sum(climbs[NOTHING].values()))
    before = seconds_text(sum(climbs[WARM].values()) - climbs[WARM][REQUEST])
    return (
        f"A request waits {totals[NOTHING]} with {NOTHING}, of which {largest} {share}; {totals[ON_DISK]} {ON_DISK}; and {totals[WARM]} with {WARM}, "
        f"which took {before} that nobody waited for. A sum of medians of parts measured one by one, not the time of one start."
    )


def climbs_table(climbs: Climbs) -> Table:
    """Every part of every bar, where bars are too short to be read; what came before the request is in brackets."""
    rows = []
    for label, parts in climbs.items():
        cells = []
        for name in climbs[WARM]:
            seconds = seconds_text(parts[name]) if name in parts else ""
            cells.append(f"({seconds})" if label == WARM and name != REQUEST else seconds)
        rows.append((label, *cells, seconds_text(waited_seconds(climbs, label))))
    headers = ("what was done", *climbs[WARM], "a request waits")
    return Table(headers, tuple(rows), numeric=frozenset(range(1, len(headers))), note="In brackets: done when nobody waited. The dummy request ran without torch.compile, as all first tokens here did.")
