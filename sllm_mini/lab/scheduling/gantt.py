"""A Gantt chart of machines: one row per device, a colour per model, a pattern for what it does there. Chapter 08. Draws, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sllm_mini.cluster.simulated import InstanceSpan, SimulationResult
from sllm_mini.lab.style import INK, MUTED, PALETTE, PAPER, color_of, darker, ink_on, use_style
from sllm_mini.lab.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODEL_COLORS = ("process", "device", "disk", "runtime", "remote", "dram")
_START = frozenset({"process", "runtime", "queue", "load", "ready", "cut"})
_HATCH = {"start": "////", "move": "....", "held": "xxxx"}
Row = tuple[str, int]
"""A machine and the number of one of its devices."""


def model_colors(results: Sequence[SimulationResult]) -> dict[str, str]:
    """One colour per model, by name; at most six can be told apart."""
    names = sorted({span.model for result in results for span in result.spans if span.model})
    return {name: PALETTE[_MODEL_COLORS[at % len(_MODEL_COLORS)]] for at, name in enumerate(names)}


def rows_of(results: Sequence[SimulationResult]) -> list[Row]:
    """Every device that something held in one of them, last first."""
    return sorted({(span.node, device) for result in results for span in result.spans for device in span.devices}, reverse=True)


def plot_gantt(
    result: SimulationResult, ax: Axes | None = None, *, title: str = "", colors: Mapping[str, str] | None = None, end: float | None = None, rows: Sequence[Row] | None = None
) -> Axes:
    """Every span of every instance on the devices it held; `rows` also for devices that nothing held. Raises ValueError where no spans were kept."""
    from matplotlib import pyplot

    spans = [span for span in result.spans if span.devices]
    if not spans:
        raise ValueError('there are no spans to draw; simulate with SimulationOptions(keep="everything")')
    colors = model_colors([result]) if colors is None else colors
    rows = rows_of([result]) if rows is None else rows
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.9 + 0.36 * len(rows)), layout="constrained")
    end = end or max(span.end for span in spans)
    arrivals = [(row.arrived, row.model) for row in result.requests]
    for span in spans:
        for device in span.devices:
            _bar(ax, span, rows.index((span.node, device)), colors[span.model] if span.model else color_of("wait"), end)
    for at, name in arrivals:
        ax.annotate("▼", (at, len(rows) - 0.45), ha="center", va="bottom", fontsize=7, color=darker(colors.get(name, MUTED)), annotation_clip=False)
    alone = len({node for node, _ in rows}) == len(rows)
    ax.set_yticks(range(len(rows)), [node if alone else f"{node}, GPU {device}" for node, device in rows])
    ax.set_ylim(-0.5, len(rows) - 0.3)
    ax.set_xlim(0, end)
    ax.set_title(title, pad=10)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    return ax


def _bar(ax: Axes, span: InstanceSpan, row: int, color: str, end: float) -> None:
    kind = "start" if span.what in _START else span.what
    low, wide = row - 0.36, span.end - span.start
    face = {"idle": color_of("wait"), "start": PAPER, "held": PAPER}.get(kind, color)
    ink = {"start": color, "idle": MUTED, "held": MUTED}.get(kind, ink_on(color))
    ax.broken_barh([(span.start, wide)], (low, 0.72), facecolor=face, edgecolor=darker(color) if kind == "run" else ink, hatch=_HATCH.get(kind, ""), linewidth=0.7)
    if kind in ("run", "start") and wide > 0.05 * end:
        text = ax.text(span.start + wide / 2, row, span.model if kind == "run" else f"start {span.model}", ha="center", va="center", fontsize=8.5, color=ink if kind == "run" else INK, clip_on=True)
        if kind == "start":
            text.set_bbox({"boxstyle": "square,pad=0.15", "facecolor": PAPER, "edgecolor": "none"})


def _key(figure: Figure, colors: Mapping[str, str], *, held: bool) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor=darker(color), label=f"{name} runs") for name, color in colors.items()]
    handles += [
        Patch(facecolor=PAPER, edgecolor=MUTED, hatch=_HATCH["start"], label="starts"),
        Patch(facecolor=MUTED, edgecolor=PAPER, hatch=_HATCH["move"], label="takes over a request"),
        Patch(facecolor=color_of("wait"), edgecolor=MUTED, label="idle, kept"),
    ]
    if held:
        handles.append(Patch(facecolor=PAPER, edgecolor=MUTED, hatch=_HATCH["held"], label="held for a request that ended before it moved"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4 if len(handles) > 5 else len(handles), title="▼ a request arrives", alignment="left", title_fontsize=9)


def plot_gantts(results: Mapping[str, SimulationResult]) -> Figure:
    """One chart below the other, by the titles given, on one axis of seconds."""
    from matplotlib import pyplot

    use_style()
    rows = rows_of(list(results.values()))
    figure, axes = pyplot.subplots(len(results), 1, figsize=(7.2, (0.62 + 0.34 * len(rows)) * len(results) + 1.0), sharex=True, squeeze=False, layout="constrained")
    colors = model_colors(list(results.values()))
    end = max(result.seconds if not result.spans else max(row.end for row in result.requests) for result in results.values()) * 1.01
    for ax, (title, result) in zip(axes[:, 0], results.items(), strict=True):
        plot_gantt(result, ax, title=title, colors=colors, end=end, rows=rows)
    axes[-1, 0].set_xlabel("seconds")
    _key(figure, colors, held=any(span.what == "held" for result in results.values() for span in result.spans))
    return figure


def gantt_alt_text(results: Mapping[str, SimulationResult]) -> str:
    """The charts in words: for each, the seconds that each request waited for its first token, how many moved or were stopped, and the end."""
    parts = []
    for title, result in results.items():
        waits = ", ".join(f"{row.model} {seconds_text(row.first_token_seconds)}" for row in sorted(result.requests, key=lambda row: row.arrived))
        parts.append(
            f"{title}: from arrival to the first token {waits}; {result.account.migrations} moved, {result.account.preemptions} stopped; "
            f"the last answer ends at {seconds_text(max(row.end for row in result.requests))}"
        )
    return f"Gantt chart of machines. {'. '.join(parts)}."
