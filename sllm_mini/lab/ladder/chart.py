"""The pipeline's timeline, drawn twice on one axis: what each thread did, and what happened to each chunk.

For spans as `load_tensors(…, recorder=…)` records them or `model` predicts them. A span knows its thread, not its
chunk, so chunks are numbered in the order in which their reads began; the pages that a thread of its own makes, and
copies, are given to them in order. Measures nothing. Shown in chapter 02.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.units import rate_text, seconds_text
from sllm_mini.types import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {"pages": "device", "map": "remote", "read": "disk", "hash": "process", "copy": "dram"}
"""Each stage and the role whose colour it has, in the order of a chunk's way."""
_MEANINGS = {
    "pages": "its memory is made ready",
    "map": "mapped from the page cache",
    "read": "it is read",
    "hash": "its hashes are checked",
    "copy": "its copy to the device is waited for",
}


def chunk_rows(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of each chunk, chunks in the order in which their reads (or mappings) began."""
    rows: list[list[Span]] = []
    pages: list[Span] = []
    copies: list[Span] = []
    by_lane: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        by_lane.setdefault(span.lane, []).append(span)
    for own in by_lane.values():
        reads = any(span.name in ("read", "map") for span in own)
        waiting: list[Span] = []
        current: list[Span] = []
        for span in own:
            if not reads:
                (copies if span.name == "copy" else pages).append(span)
            elif span.name == "pages":
                waiting.append(span)  # made by the reader itself, for its next chunk
            elif span.name in ("read", "map"):
                current = [*waiting, span]
                rows.append(current)
                waiting = []
            else:
                current.append(span)
    rows.sort(key=lambda row: next(span.start for span in row if span.name in ("read", "map")))
    without = (row for row in rows if row[0].name == "read")
    for row, span in zip(without, sorted(pages, key=lambda span: span.start), strict=False):
        row.insert(0, span)
    for row, span in zip(sorted(rows, key=lambda row: row[-1].end), sorted(copies, key=lambda span: span.start), strict=False):
        row.append(span)
    return rows


def plot_pipeline(spans: Sequence[Span], *, title: str = "", mark_seconds: float | None = None, mark: str = "") -> Figure:
    """Threads above, chunks × stages below, seconds on the axis; a line at `mark_seconds`. Raises ValueError without spans."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    if not spans:
        raise ValueError("there is nothing to draw; record a load with a SpanRecorder")
    use_style()
    lanes = _lanes(spans)
    rows = chunk_rows(spans)
    top, bottom = 0.3 + 0.2 * len(lanes), 3.1
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.2, top + bottom + 0.9), height_ratios=(top, bottom), sharex=True, layout="constrained")
    longest = max(span.end for span in spans)
    scale, unit = (1e3, "milliseconds") if longest < 0.9 else (1.0, "seconds")
    for number, lane in enumerate(lanes):
        _bars(above, number, 0.78, [span for span in spans if span.lane == lane], scale)
    above.set_yticks(range(len(lanes)), [_lane_name(lane) for lane in lanes], fontsize=8.5)
    above.set_ylim(len(lanes) - 0.4, -0.6)
    above.set_title(title)
    for number, row in enumerate(rows):
        _bars(below, number, 0.9, row, scale)
    below.set_ylim(len(rows) - 0.4, -0.6)
    below.set_ylabel("chunk, in the order of the reads")
    below.set_xlabel(f"{unit} since the load began")
    for ax in (above, below):
        ax.grid(False, axis="y")
        if mark_seconds is not None:
            ax.axvline(mark_seconds * scale, color=INK, linestyle="--", linewidth=1.2)
    if mark_seconds is not None:
        beside = {"xytext": (-3, -4), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "top"}
        below.annotate(mark, (mark_seconds * scale, 0), fontsize=8.5, color=MUTED, **beside)
    below.set_xlim(0, 1.02 * max(longest, mark_seconds or 0) * scale)
    used = [name for name in STAGES if any(span.name == name for span in spans)]
    keys = [Patch(facecolor=color_of(STAGES[name]), label=f"{name}: {_MEANINGS[name]}") for name in used]
    figure.legend(handles=keys, loc="outside lower left", ncols=2)
    return figure


def _bars(ax: Axes, row: float, height: float, spans: Iterable[Span], scale: float) -> None:
    for name, role in STAGES.items():
        ranges = [(span.start * scale, span.seconds * scale) for span in spans if span.name == name]
        if ranges:
            ax.broken_barh(ranges, (row - height / 2, height), facecolor=color_of(role), edgecolor="white", linewidth=0.3)


def _lanes(spans: Sequence[Span]) -> list[str]:
    order = {"pages": 0, "read": 1, "copy": 2}
    return sorted({span.lane for span in spans}, key=lambda lane: (order.get(_lane_name(lane).split()[0], 3), lane))


def _lane_name(lane: str) -> str:
    return lane.removeprefix("sllm-").replace("-", " ")


def busy_seconds(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans ran."""
    return sum(end - start for start, end in _merged(spans))


def _merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged


def beside_share(spans: Sequence[Span], name: str, other: str = "read") -> float:
    """The share of the seconds of `name` in which a span of `other` ran too; 0 where there are none."""
    own, beside = [span for span in spans if span.name == name], _merged(span for span in spans if span.name == other)
    total = sum(span.seconds for span in own)
    shared = sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in own for start, end in beside)
    return shared / total if total else 0.0


def pipeline_text(spans: Sequence[Span]) -> str:
    """The finding: how much of the load a read was under way, and how much of the other work ran beside one."""
    end = max(span.end for span in spans)
    reads = [span for span in spans if span.name == "read"]
    if not reads:
        return f"Nothing was read in {seconds_text(end)}: every chunk was mapped."
    nbytes = sum(span.nbytes for span in reads)
    at_once = sum(span.seconds for span in reads) / end
    text = f"Of {seconds_text(end)} a read was under way for {busy_seconds(reads) / end:.0%}, on average {at_once:.1f} at once ({rate_text(nbytes / end)})."
    for name, words in (("pages", "making memory ready"), ("hash", "checking hashes"), ("copy", "waiting for copies")):
        own = [span for span in spans if span.name == name]
        if own:
            seconds = seconds_text(sum(span.seconds for span in own))
            text += f" {words.capitalize()} took {seconds} of threads' time, {beside_share(spans, name):.0%} of it beside a read."
    return text


def pipeline_alt_text(spans: Sequence[Span], *, what: str = "A recorded load") -> str:
    """What `plot_pipeline` shows, in words."""
    shape = f"{len(chunk_rows(spans))} chunks on {len(_lanes(spans))} threads, a diagonal of bars, each chunk's stages one after another"
    return f"{what}: {shape}. {pipeline_text(spans)}"
