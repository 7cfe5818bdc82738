"""Bytes against layers: when each layer's bytes came, when it waited and when it computed, loaded first and overlapped.

Draws and never measures. Which bytes belong to a layer follows from their order: bytes are counted as they arrive, and
a layer's are those between the sums of the layers before it and with it. Shown in chapter 04.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from sllm_mini.inference.overlap import COMPUTE_LANE, WAIT_LANE
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.overlap.start import Start
from sllm_mini.lab.style import INK, MUTED, WAIT_HATCH, color_of, darker, use_style
from sllm_mini.lab.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ARRIVALS = ("copy", "hash", "map", "read")
"""The last stage of a chunk is the first of these that a load has spans of."""
_TITLES = {"serial": "Load, then run", "overlapped": "Run while loading"}
_BYTES_ROW, _COMPUTE_ROW = (0.08, 0.36), (0.46, 0.46)
_MOST_TICKS = 9


def arrival_seconds(start: Start) -> list[tuple[float, float]]:
    """Of each layer, when its bytes began to arrive and when the last of them was there, in seconds since the start."""
    stages = ([span for span in start.spans if span.name == stage and span.nbytes] for stage in _ARRIVALS)
    ordered = sorted(next((spans for spans in stages if spans), []), key=lambda span: span.end)
    ends = [span.end - start.begin for span in ordered]
    arrived = list(accumulate(span.nbytes for span in ordered))
    found: list[tuple[float, float]] = []
    before = 0
    for layer in start.layers:
        after = before + layer.nbytes
        if ends:
            low, high = (min(bisect_left(arrived, nbytes), len(ends) - 1) for nbytes in (before + 1, max(after, before + 1)))
            found.append((ordered[low].start - start.begin, ends[high]))
        else:
            found.append((0.0, 0.0))
        before = after
    return found


def plot_overlap(start: Start, ax: Axes | None = None, *, end: float | None = None, legend: bool = True) -> Axes:
    """Draws one start: a row per layer, the first on top, bytes above and waiting and computing below; a line at the first token.

    `end` makes the time axis as long as that of another picture. Not safe while another thread draws.
    """
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.0, 0.8 + 0.17 * len(start.layers)), layout="constrained")
    names = [layer.name for layer in start.layers]
    scale, unit = (1e3, "milliseconds") if (end or start.seconds) < 0.5 else (1.0, "seconds")
    for row, (low, high) in enumerate(arrival_seconds(start)):
        _bar(ax, low * scale, high * scale, row, _BYTES_ROW, "disk")
    for span in start.spans:
        if span.lane in (WAIT_LANE, COMPUTE_LANE):
            low, high = ((time - start.begin) * scale for time in (span.start, span.end))
            _bar(ax, low, high, names.index(span.name), _COMPUTE_ROW, span.lane)
    ax.axvline(start.seconds * scale, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.annotate(f"first token {seconds_text(start.seconds)} ", (start.seconds * scale, 0.25), ha="right", va="center", fontsize=9.5, color=INK)
    every = max(1, -(-len(names) // _MOST_TICKS))
    ticks = [row for row, name in enumerate(names) if row in (0, len(names) - 1) or (row % every == 0 and row < len(names) - every / 2)]
    ax.set_yticks([row + 0.5 for row in ticks], [names[row].removeprefix("model.").removeprefix("decoder.") for row in ticks])
    ax.set_ylim(len(names), 0)
    ax.set_xlim(0, max(end or 0.0, start.seconds) * scale * 1.02)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(_TITLES.get(start.mode, start.mode))
    ax.set_xlabel(f"{unit} since the load was asked for")
    if legend:
        _legend(ax)
    return ax


def _bar(ax: Axes, low: float, high: float, row: int, place: tuple[float, float], role: str) -> None:
    waiting = role == WAIT_LANE
    color = color_of(role)
    ax.broken_barh(
        [(low, high - low)], (row + place[0], place[1]), facecolor="white" if waiting else color, edgecolor=MUTED if waiting else darker(color),
        hatch=WAIT_HATCH if waiting else None, linewidth=0.4,
    )  # fmt: skip


def _legend(ax: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color_of("disk"), edgecolor=darker(color_of("disk")), linewidth=0.4, label="its bytes arrive"),
        Patch(facecolor="white", edgecolor=MUTED, hatch=WAIT_HATCH, linewidth=0.4, label="waits for them"),
        Patch(facecolor=color_of("compute"), edgecolor=darker(color_of("compute")), linewidth=0.4, label="computes"),
    ]
    ax.legend(handles=handles, loc="lower left", handlelength=1.3, handletextpad=0.5)


def described_overlap(starts: Sequence[Start], *, title: str = "") -> Described:
    """Starts one above the other on one time axis, with alt text. Raises ValueError without starts."""
    from matplotlib import pyplot

    if not starts:
        raise ValueError("there is no start to draw; record one with `record_start`")
    use_style()
    height = 0.9 + 0.16 * len(starts[0].layers)
    figure, axes = pyplot.subplots(len(starts), 1, figsize=(7.0, height * len(starts)), sharex=True, squeeze=False, layout="constrained")
    end = max(start.seconds for start in starts)
    for number, (start, ax) in enumerate(zip(starts, axes[:, 0], strict=True)):
        plot_overlap(start, ax, end=end, legend=number == len(starts) - 1)
        if number < len(starts) - 1:
            ax.set_xlabel("")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return describe(figure, overlap_alt_text(starts, title=title))


def overlap_alt_text(starts: Sequence[Start], *, title: str = "") -> str:
    """What the picture shows, in words: of each start the first token, the last byte, and how long layers waited and computed."""
    parts = []
    for start in starts:
        last = max((high for _, high in arrival_seconds(start)), default=0.0)
        parts.append(
            f"{_TITLES.get(start.mode, start.mode)}: the last of the bytes of {len(start.layers)} layers is there after {seconds_text(last)}, "
            f"the first token after {seconds_text(start.seconds)}; layers wait {seconds_text(start.lane_seconds(WAIT_LANE))} and compute {seconds_text(start.lane_seconds(COMPUTE_LANE))} in all."
        )
    return " ".join([f"{title}." if title else "", *parts]).strip()
