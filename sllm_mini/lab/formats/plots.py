"""What readers cost, drawn and tabled: seconds of load and use, and the counters that explain them.

Arithmetic on `ReaderRun`s; measures nothing. Shown in chapter 01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllm_mini.lab.formats.runs import ReaderRun, median_runs
from sllm_mini.lab.style import INK, color_of, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATES = ((False, "from the disk"), (True, "from the page cache"))
_UNKNOWN = "not counted"
_ROOM = 1.26
"""The axis ends at so many times the longest median, which leaves room for its figure."""


def seconds_parts(run: ReaderRun) -> dict[str, float]:
    """Until the load returned, and then until every byte was summed."""
    return {"until the load returns": run.load.seconds, "first use of every byte": run.use.seconds}


def processor_parts(run: ReaderRun) -> dict[str, float]:
    """The same seconds by what they went on: the process's user time, the kernel's time for it, neither. Exact to a clock
    tick or so, which short runs show."""
    user, system = run.total("user_seconds") or 0.0, run.total("system_seconds") or 0.0
    return {"in the process": user, "in the kernel (copies, page faults)": system, "neither (waiting)": max(run.seconds - user - system, 0.0)}


_ROLES = {
    "until the load returns": "dram",
    "first use of every byte": "ready",
    "in the process": "runtime",
    "in the kernel (copies, page faults)": "device",
    "neither (waiting)": "wait",
}


def plot_readers(runs: Sequence[ReaderRun], *, by_processor: bool = False) -> Figure:
    """Two panels, cold and warm, one bar per reader: the median run, cut into parts; a dot for each run's total, an arrow
    for one beyond the axis."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    use_style()
    states = [(warm, label) for warm, label in _STATES if any(run.warm == warm for run in runs)]
    names = list(dict.fromkeys(run.reader.name for run in runs))
    fig, panels = pyplot.subplots(1, len(states), figsize=(7.2, 1.15 + 0.36 * len(names)), sharey=True, sharex=True, layout="constrained", squeeze=False)
    # By the medians: one run that met a busy moment must not shrink all the others; it is drawn at the edge instead.
    longest = max(run.seconds for warm, _ in states for run in median_runs(runs, warm=warm))
    parts_of = processor_parts if by_processor else seconds_parts
    for ax, (warm, label) in zip(panels[0], states, strict=True):
        for row, run in enumerate(median_runs(runs, warm=warm)):
            left = 0.0
            for name, seconds in parts_of(run).items():
                _bar(ax, row, left, seconds, name, longest)
                left += seconds
            totals = [other.seconds for other in runs if other.warm == warm and other.reader.name == run.reader.name]
            if not by_processor:
                edge = _ROOM * longest
                ax.plot([t for t in totals if t < edge], [row + 0.38] * sum(t < edge for t in totals), ".", color=INK, markersize=3.5)
                ax.plot([0.985 * edge] * sum(t >= edge for t in totals), [row + 0.38] * sum(t >= edge for t in totals), ">", color=INK, markersize=4)
            ax.text(left + 0.02 * longest, row, seconds_text(run.seconds), va="center", fontsize=8.5, fontweight="bold")
        ax.set_title(label)
        ax.set_xlabel("seconds")
        ax.set_xlim(0, _ROOM * longest)
        ax.grid(False, axis="y")
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    keys = [Patch(facecolor=color_of(_ROLES[name]), edgecolor="white", hatch=_hatch(name), label=name) for name in parts_of(next(iter(runs)))]
    fig.legend(handles=keys, loc="outside lower left", ncols=len(keys))
    return fig


def readers_alt_text(runs: Sequence[ReaderRun], *, by_processor: bool = False) -> str:
    """What `plot_readers` shows, in words."""
    parts_of = processor_parts if by_processor else seconds_parts
    texts = []
    for warm, label in _STATES:
        for run in median_runs(runs, warm=warm):
            parts = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in parts_of(run).items())
            texts.append(f"{run.reader.name} {label}: {seconds_text(run.seconds)} ({parts})")
    return f"Seconds of each reader, cold and warm. {'; '.join(texts)}."


def deferred_text(runs: Sequence[ReaderRun]) -> str:
    """Which readers leave most of their cost to the first use, as one sentence."""
    cold = median_runs(runs, warm=False)
    late = [run for run in cold if run.use.seconds > run.load.seconds]
    if not late:
        return "From the disk, every reader had done most of its work when it returned."
    shares = ", ".join(f"{run.reader.name} {run.use.seconds / run.seconds:.0%}" for run in late)
    return f"From the disk, so much of the wait came after the load had returned: {shares}."


def processor_text(runs: Sequence[ReaderRun]) -> str:
    """Who worked, over all median runs of a state, as one sentence."""
    texts = []
    for warm, label in _STATES:
        found = median_runs(runs, warm=warm)
        total = sum(run.seconds for run in found)
        sums = {name: sum(processor_parts(run)[name] for run in found) for name in processor_parts(found[0])}
        texts.append(f"{label} {', '.join(f'{name} {seconds / total:.0%}' for name, seconds in sums.items())}")
    return f"Of the seconds of all readers together: {'; '.join(texts)}."


def spread_text(runs: Sequence[ReaderRun]) -> str:
    """How far runs of one reader lay apart: what a ratio of two readers must exceed to be a finding."""
    widest = []
    for warm, label in _STATES:
        groups: dict[str, list[float]] = {}
        for run in runs:
            if run.warm == warm:
                groups.setdefault(run.reader.name, []).append(run.seconds)
        widest.append(f"{label} up to x{max(max(group) / min(group) for group in groups.values()):.1f}")
    return f"Runs of one and the same reader lay apart: {', '.join(widest)}. A ratio within that is no finding; the counters are."


def counters_table(runs: Sequence[ReaderRun], *, warm: bool) -> Table:
    """The counters of each reader's median run, load and use together, per byte of the model where that says more."""
    return Table(
        headers=("reader", "seconds", "read calls", "copied by the kernel", "from the disk", "page faults", "that waited for the disk", "memory"),
        rows=tuple(
            (
                run.reader.name,
                f"{run.seconds:.3f}",
                _count(run.total("read_calls")),
                _times(run.copies_per_byte),
                _times(_per_byte(run, "disk_nbytes")),
                _count((run.total("minor_faults") or 0) + (run.total("major_faults") or 0)),
                _count(run.total("major_faults")),
                _times(_per_byte(run, "peak_nbytes")),
            )
            for run in median_runs(runs, warm=warm)
        ),
        caption=f"Load and first use, {dict(_STATES)[warm]}; the median run of each reader",
        note="“x” is times the bytes of the model. Memory is the growth of what is resident, pages shared with the page cache included.",
        numeric=frozenset(range(1, 8)),
    )


def steps_table(runs: Sequence[ReaderRun], steps: Sequence[tuple[str, str, str]]) -> Table:
    """One change a row: `(what changed, reader before, reader after)`, and what that did to calls, copies, faults, seconds."""
    by_state = {warm: {run.reader.name: run for run in median_runs(runs, warm=warm)} for warm, _ in _STATES}
    rows = []
    for change, before, after in steps:
        if not {before, after} <= set(by_state[False]):
            continue  # a reader that this file system refuses
        cold = [by_state[False][name] for name in (before, after)]
        warm = [by_state[True][name] for name in (before, after)]
        faults = [_count((run.total("minor_faults") or 0) + (run.total("major_faults") or 0)) for run in cold]
        rows.append(
            (
                change,
                f"{before} → {after}",
                " → ".join(_count(run.total("read_calls")) for run in cold),
                " → ".join(_times(run.copies_per_byte) for run in cold),
                " → ".join(faults),
                f"x{cold[1].seconds / cold[0].seconds:.2f}",
                f"x{warm[1].seconds / warm[0].seconds:.2f}",
            )
        )
    return Table(
        headers=("one change", "readers", "read calls", "copied", "page faults", "seconds, disk", "seconds, cache"),
        rows=tuple(rows),
        caption="One change at a time: counters from the disk, seconds as a ratio (below 1 is faster)",
        note=spread_text(runs),
        numeric=frozenset({2, 3, 4, 5, 6}),
    )


def _bar(ax: Axes, row: int, left: float, seconds: float, name: str, longest: float) -> None:
    color = color_of(_ROLES[name])
    ax.barh(row, seconds, left=left, height=0.6, color=color, edgecolor="white", linewidth=0.6, hatch=_hatch(name))
    if seconds > 0.2 * longest:
        ax.text(left + seconds / 2, row, seconds_text(seconds), ha="center", va="center", fontsize=8, color=ink_on(color))


def _hatch(name: str) -> str | None:
    return "////" if name in ("first use of every byte", "neither (waiting)") else None


def _per_byte(run: ReaderRun, name: str) -> float | None:
    value = run.total(name)
    return None if value is None else value / run.nbytes


def _times(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f} x"


def _count(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.0f}"
