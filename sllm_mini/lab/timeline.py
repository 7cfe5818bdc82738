"""The timeline of chapters 00 to 11: spans of time as bars, and the table that accounts for every second of them.

`plot_timeline` draws and never measures; `timeline_table` says the same in figures and `timeline_alt_text` in words.
Time in which no span ran is drawn hatched and listed as "unaccounted" instead of being left blank. Chapter 00.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sllm_mini.lab.account import account
from sllm_mini.lab.labels import HIDDEN, INSIDE, TWO_LINES
from sllm_mini.lab.lanes import BAR, FONT, LEVEL, Row, label_of, place_rows, rows_of, stack_rows
from sllm_mini.lab.style import INK, MUTED, RECORDED_HATCH, WAIT_HATCH, color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text, share_text
from sllm_mini.types import Span, Warmth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES = 7.2
_ROW_INCHES = 0.5


def plot_timeline(
    spans: Sequence[Span],
    ax: Axes | None = None,
    *,
    title: str = "",
    label: str = "this machine",
    recorded: Sequence[Span] | None = None,
    recorded_label: str = "recorded run",
    end: float | None = None,
) -> Axes:
    """Draws one row per lane, seconds since the first start on the axis, and a second, recorded run below it.

    Neighbouring spans of one name share a label ("decode ×15"). `end` accounts for time after the last span (same
    clock as the spans). Without `ax` a figure of fitting height is made; a given `ax` keeps its size. Raises
    ValueError where there are no spans. Not safe while another thread draws.
    """
    from matplotlib import pyplot

    rows = rows_of(spans, end, False, label if recorded else "")
    if recorded:
        rows += rows_of(recorded, None, True, recorded_label)
    total = max(bar.end for row in rows for bar in row.bars)
    total = max([total, *(high for row in rows for _, high in row.gaps)]) or 1.0

    own_figure = ax is None
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(_WIDTH_INCHES, 2.0), layout="constrained")
    scale, unit = (1e3, "milliseconds") if total < 0.5 else (1.0, "seconds")
    names = [row.lane for row in rows]
    show_names = len(set(names)) > 1
    # Labels need the final width of the axes in pixels: tick labels and title first, then measure.
    ax.set_yticks(range(len(rows)), names if show_names else [""] * len(rows))
    ax.set_xlabel(f"{unit} since the start")
    ax.set_title(title)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    pixels = ax.get_window_extent().width
    limit, places = place_rows(rows, total, pixels, ax.figure.dpi)

    # A gap thinner than half a pixel would still be drawn as a line; the table counts it.
    thin = 0.5 * limit / pixels
    rows = [replace(row, gaps=tuple(gap for gap in row.gaps if gap[1] - gap[0] >= thin)) for row in rows]
    centers, height = stack_rows(rows, places)
    if own_figure:
        margins = 0.85 + (0.28 if title else 0.0)  # axis, its label, the legend
        ax.figure.set_size_inches(_WIDTH_INCHES, height * _ROW_INCHES + margins)  # type: ignore[union-attr]
    hidden = 0
    for row, row_places, center in zip(rows, places, centers, strict=True):
        hidden += _draw_row(ax, row, row_places, center, scale, pixels / limit)
        if row.header:
            top = center + BAR / 2 + LEVEL * (1 + max([k for k in row_places if k >= 0], default=-1)) + 0.08
            ax.text(0, top, row.header, fontsize=FONT, fontweight="bold", va="bottom", color=INK)
    ax.set_ylim(0, height)
    ax.set_xlim(0, limit * scale)
    ax.set_yticks(centers, names if show_names else [""] * len(rows))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", visible=False)
    _legend(ax, rows, hidden)
    return ax


def _draw_row(ax: Axes, row: Row, places: Sequence[int], center: float, scale: float, per_second: float) -> int:
    """Draws the bars, gaps and labels of one row; returns how many labels had to be left to the table."""
    low, top = center - BAR / 2, center + BAR / 2
    if row.gaps:
        ranges = [(start * scale, (end - start) * scale) for start, end in row.gaps]
        ax.broken_barh(ranges, (low, BAR), facecolor="white", edgecolor=MUTED, hatch=WAIT_HATCH, linewidth=0.5)
    for bar, place in zip(row.bars, places, strict=True):
        ranges = [(span.start * scale, span.seconds * scale) for span in bar.spans]
        # An edge as thick as the bar would paint a thin bar over.
        edge = min(0.8, 0.12 * min(span.seconds for span in bar.spans) * per_second)
        ax.broken_barh(ranges, (low, BAR), facecolor=bar.color, edgecolor=darker(bar.color), linewidth=edge)
        if row.recorded:
            dots = ink_on(bar.color)
            ax.broken_barh(ranges, (low, BAR), facecolor="none", edgecolor=dots, hatch=RECORDED_HATCH, linewidth=0, alpha=0.35)
        middle = sum(bar.anchor) / 2 * scale
        if place in (INSIDE, TWO_LINES):
            text = ax.text(
                middle, center, label_of(bar, "  " if place == INSIDE else "\n"),
                ha="center", va="center", fontsize=FONT, color=ink_on(bar.color), linespacing=1.1,
            )  # fmt: skip
            if row.recorded or bar.count > 1:  # keep dots and the edges of the parts away from the text
                text.set_bbox({"boxstyle": "square,pad=0.2", "facecolor": bar.color, "edgecolor": "none"})
        elif place != HIDDEN:
            bottom = top + place * LEVEL
            ax.plot([middle, middle], [top, bottom + LEVEL * 0.9], color=MUTED, linewidth=0.7, solid_capstyle="butt")
            ax.annotate(
                label_of(bar), (middle, bottom + LEVEL / 2), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=FONT, color=INK,
            )  # fmt: skip
    return sum(place == HIDDEN for place in places)


def _legend(ax: Axes, rows: Sequence[Row], hidden: int) -> None:
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    used = {bar.color for row in rows for bar in row.bars}
    names = [rung.name.lower() for rung in Warmth] + ["remote", "disk"]
    handles = [
        Patch(facecolor=color_of(name), edgecolor=darker(color_of(name)), linewidth=0.8, label=name)
        for name in names
        if color_of(name) in used
    ]
    if any(row.gaps for row in rows):
        handles.append(Patch(facecolor="white", edgecolor=MUTED, hatch=WAIT_HATCH, linewidth=0.5, label="unaccounted"))
    if any(row.recorded for row in rows):
        handles.append(Patch(facecolor="white", edgecolor=MUTED, hatch=RECORDED_HATCH, linewidth=0.5, label="recorded"))
    below_label = ax.transAxes + ScaledTranslation(0, -38 / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below_label, ncols=max(1, len(handles)),
        handlelength=1.3, handletextpad=0.5, columnspacing=1.4, borderaxespad=0, alignment="left", title_fontsize=9,
        title=f"{hidden} too short to label here; the table lists them" if hidden else None,
    )  # fmt: skip


def timeline_table(spans: Sequence[Span], *, start: float | None = None, end: float | None = None, caption: str = "") -> Table:
    """Seconds, share of the total and bytes per second by span name; its seconds add up to the total.

    Spans that ran beside others are taken off again in one row ("ran side by side") and time in which none ran is
    added in another ("unaccounted"). Raises ValueError where there are no spans.
    """
    books = account(spans, start=start, end=end)
    total = books.total_seconds or 1.0
    rows: list[tuple[str, ...]] = []
    for entry in books.entries:
        times = f" ×{entry.count}" if entry.count > 1 else ""
        where = "" if entry.lane == "main" else f" ({entry.lane})"
        rate = entry.bytes_per_second
        rows.append((
            entry.name + times + where, f"{entry.seconds:.4f}", share_text(entry.seconds / total),
            nbytes_text(entry.nbytes) if entry.nbytes else "", rate_text(rate) if rate else "",
        ))  # fmt: skip
    if books.overlapped_seconds > 1e-9:
        rows.append(("ran side by side", f"−{books.overlapped_seconds:.4f}", "−" + share_text(books.overlapped_seconds / total), "", ""))
    rows.append(("unaccounted", f"{books.unaccounted_seconds:.4f}", share_text(books.unaccounted_seconds / total), "", ""))
    rows.append(("total", f"{books.total_seconds:.4f}", share_text(1.0), "", ""))
    return Table(
        headers=("what", "seconds", "share", "moved", "at"),
        rows=tuple(rows),
        caption=caption,
        numeric=frozenset({1, 2, 3, 4}),
        emphasis=frozenset({len(rows) - 1}),
    )


def timeline_alt_text(spans: Sequence[Span], *, what: str = "Timeline", most: int = 8) -> str:
    """What `plot_timeline(spans)` shows, in words: the total and the `most` longest entries, with their shares."""
    books = account(spans)
    total = books.total_seconds or 1.0
    longest = sorted(books.entries, key=lambda entry: -entry.seconds)
    parts = [f"{entry.name} {seconds_text(entry.seconds)} ({share_text(entry.seconds / total)})" for entry in longest[:most]]
    if len(longest) > most:
        parts.append(f"{len(longest) - most} more together {seconds_text(sum(entry.seconds for entry in longest[most:]))}")
    if books.unaccounted_seconds > 0:
        parts.append(f"unaccounted {seconds_text(books.unaccounted_seconds)} ({share_text(books.unaccounted_seconds / total)})")
    return f"{what} of {seconds_text(books.total_seconds)}: {', '.join(parts)}."
