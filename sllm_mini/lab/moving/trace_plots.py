"""One move drawn: the time between tokens, and the phases of the move on one clock. Draws and words, never measures. Chapter 07."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sllm_mini.lab.moving.measure import Trace
from sllm_mini.lab.style import INK, MUTED, color_of, darker, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODE_WORDS = {"tokens": "tokens", "kv": "KV cache", "stop_and_copy": "stop and copy"}
_SOURCE, _DESTINATION = "disk", "device"
_PHASES = ("round", "stop", "copy", "hand over", "resume")
_PHASE_WORDS = {"round": "rounds, the source decodes on", "stop": "stop", "copy": "copy", "hand over": "hand over", "resume": "first step there"}
_ROLES = {"round": "wait", "stop": "process", "copy": "dram", "hand over": "runtime", "resume": "device"}


def step_of(traces: Sequence[Trace]) -> float:
    """One decode step in seconds: the median of all steps before the moves. Traces of one model at one context compute the same in
    every step, so one unit serves them all; how far they lie apart from each other is the machine's scatter."""
    return statistics.median(trace.step_seconds for trace in traces)


def plot_intervals(traces: Sequence[Trace]) -> Figure:
    """Milliseconds between each token and the one before it, one panel a trace, on one scale; the ground is grey while the
    destination is being brought near, a line marks the token that came from the new owner."""
    from matplotlib import pyplot

    use_style()
    figure, panels = pyplot.subplots(len(traces), 1, figsize=(7.2, 1.75 * len(traces) + 0.5), sharey=True, squeeze=False, layout="constrained")
    for trace, ax in zip(traces, panels[:, 0], strict=True):
        _intervals(ax, trace, step_of(traces))
    panels[0, 0].set_ylim(0, 1.12e3 * max(later.arrived - earlier.arrived for trace in traces for earlier, later in pairwise(trace.pieces)))
    panels[-1, 0].set_xlabel("new tokens of the request so far")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.supylabel("ms since the token before", fontsize=10)
    return figure


def _intervals(ax: Axes, trace: Trace, step_seconds: float) -> None:
    before = sum(piece.arrived <= trace.started for piece in trace.pieces)
    numbers = range(2, len(trace.pieces) + 1)
    waits = [(later.arrived - earlier.arrived) * 1e3 for earlier, later in pairwise(trace.pieces)]
    there = [piece.epoch == trace.report.epoch for piece in trace.pieces[1:]]
    first = next(number for number, moved in zip(numbers, there, strict=True) if moved)
    ax.axvspan(before + 0.5, first - 0.5, color=color_of("wait"), alpha=0.45, linewidth=0, label="being moved")
    ax.axvline(first, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
    for moved, role, marker, words in ((False, _SOURCE, "o", "from the source"), (True, _DESTINATION, "s", "from the destination")):
        points = [(number, wait) for number, wait, at in zip(numbers, waits, there, strict=True) if at == moved]
        ax.plot(*zip(*points, strict=True), marker, markersize=4, color=color_of(role), markeredgecolor=darker(color_of(role)), label=words)
    ax.axhline(step_seconds * 1e3, color=MUTED, linewidth=1.0, linestyle=":", label="a step before the move")
    left = first > 0.6 * len(trace.pieces)
    ax.annotate(
        f"{trace.gap_seconds / step_seconds:.1f} steps", (first, 0.94), xycoords=("data", "axes fraction"), xytext=(-6 if left else 6, 0),
        textcoords="offset points", ha="right" if left else "left", va="top", fontsize=9.5, color=INK,
    )  # fmt: skip
    ax.set_title(f"{MODE_WORDS[trace.mode]}, {trace.context} tokens of context", fontsize=10)


def plot_phases(traces: Sequence[Trace], ax: Axes | None = None) -> Axes:
    """What happens after the source stops, one row a trace, on one clock: zero is the source's last step of the request.
    Rounds before it, in which the source decodes on, are cut off on the left; `phases_table` lists them."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.72 * len(traces) + 1.5), layout="constrained")
    longest = max(trace.pause_seconds for trace in traces)
    step = step_of(traces) * 1e3
    for row, trace in enumerate(traces):
        zero = trace.report.last_step_at or trace.started
        for phase in trace.report.phases:
            if phase.name not in _PHASES:
                continue
            low, high = max(phase.start - zero, -0.5 * longest), min(phase.end - zero, trace.pause_seconds)
            if high > low:
                color = color_of(_ROLES[phase.name])
                ax.broken_barh([(low * 1e3, (high - low) * 1e3)], (row - 0.32, 0.64), facecolor=color, edgecolor=darker(color), linewidth=0.6)
        ax.broken_barh([((trace.pause_seconds * 1e3) - step, step)], (row + 0.34, 0.1), facecolor=INK)
        ax.annotate(
            f" {seconds_text(trace.pause_seconds)}, {trace.pause_seconds * 1e3 / step:.1f} steps", (trace.pause_seconds * 1e3, row),
            va="center", fontsize=9.5, color=INK,
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=1.2)
    ax.set_yticks(range(len(traces)), [MODE_WORDS[trace.mode] for trace in traces])
    ax.set_ylim(len(traces) - 0.4, -0.5)
    ax.set_xlim(-0.5e3 * longest, 1.45e3 * longest)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("ms since the source's last step; at the end of each row the destination's first token")
    used = {phase.name for trace in traces for phase in trace.report.phases}
    handles = [Patch(facecolor=color_of(_ROLES[n]), edgecolor=darker(color_of(_ROLES[n])), linewidth=0.6, label=_PHASE_WORDS[n]) for n in _PHASES if n in used]
    handles.append(Patch(facecolor=INK, label="one decode step"))
    ax.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, handletextpad=0.4, columnspacing=1.1, fontsize=8.5)
    return ax


def phases_table(traces: Sequence[Trace]) -> Table:
    """Every phase of every move: how long, what was sent, and who decodes meanwhile."""
    cells = []
    for trace in traces:
        for phase in trace.report.phases:
            decodes = "the source" if phase.name in ("begin", "round") else "the destination" if phase.name == "resume" else "nobody"
            sent = nbytes_text(phase.nbytes) if phase.nbytes else ""
            cells.append((MODE_WORDS[trace.mode], phase.name, seconds_text(phase.seconds), str(phase.tokens or ""), sent, decodes))
    return Table(("mode", "phase", "seconds", "tokens", "sent", "who decodes"), tuple(cells), caption="The phases of each move", numeric=frozenset({2, 3, 4}))


def traces_text(traces: Sequence[Trace]) -> str:
    """The step before the moves, then of each move the wait that its reader noticed, and how the source's steps went meanwhile."""
    step, each = step_of(traces), [trace.step_seconds for trace in traces]
    parts = [_trace_text(trace, step) for trace in traces]
    return f"A step before the moves takes {seconds_text(step)} ({seconds_text(min(each))} to {seconds_text(max(each))} in the {len(traces)} requests). " + "; ".join(parts) + "."


def _trace_text(trace: Trace, step: float) -> str:
    waits = [later.arrived - earlier.arrived for earlier, later in pairwise(trace.pieces) if later.arrived > trace.started and later.epoch != trace.report.epoch]
    said = f"{MODE_WORDS[trace.mode]}: {seconds_text(trace.gap_seconds)} between the last token from the source and the first from the destination (x{trace.gap_seconds / step:.1f})"
    if waits:
        said += f", before that {len(waits)} tokens while it moved, after x{statistics.median(waits) / step:.1f} of a step as a rule and x{max(waits) / step:.1f} at most"
    return said


def phases_text(traces: Sequence[Trace]) -> str:
    """Of each move the pause as the workers saw it, from the end of one step to the end of the next."""
    step = step_of(traces)
    return "; ".join(f"{MODE_WORDS[trace.mode]}: {seconds_text(trace.pause_seconds)}, {trace.pause_seconds / step:.1f} steps" for trace in traces) + "."
