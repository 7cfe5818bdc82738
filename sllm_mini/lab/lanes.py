"""Where everything of a timeline goes: rows, bars, gaps, and a place for every label. Measures text, draws nothing.

`timeline` draws what this module lays out. Costs one text measurement per label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.lab.account import Account, account
from sllm_mini.lab.labels import Label, place_labels
from sllm_mini.lab.style import color_of, has_color
from sllm_mini.lab.units import seconds_text
from sllm_mini.types import Span

BAR = 0.72  # height of a bar, in rows
LEVEL = 0.34  # height of one level of flags, in rows
FONT = 9.5
_MAX_LEVELS = 9
_PADDING_PX = 4.0
_MIN_LABEL_PX = 0.75  # a bar thinner than this gets no flag: the table lists it


@dataclass(frozen=True, slots=True)
class Bar:
    """Neighbouring spans of one name and colour, in seconds since the first start; `seconds` is their sum.

    `anchor` is the stretch that a label may stand on: all of it, or one of its spans where there are holes between.
    """

    name: str
    start: float
    end: float
    seconds: float
    count: int
    color: str
    spans: tuple[Span, ...]

    @property
    def anchor(self) -> tuple[float, float]:
        if self.seconds >= 0.8 * (self.end - self.start):
            return self.start, self.end
        middle = (self.start + self.end) / 2
        nearest = min(self.spans, key=lambda span: abs((span.start + span.end) / 2 - middle))
        return nearest.start, nearest.end


@dataclass(frozen=True, slots=True)
class Row:
    """One lane: its bars, the time in which no lane was busy, and a heading above it ("" for none)."""

    lane: str
    bars: tuple[Bar, ...]
    gaps: tuple[tuple[float, float], ...]
    recorded: bool
    header: str


def span_color(span: Span) -> str:
    """The colour of a span: its rung's if it climbs one, else its lane's, else the neutral one."""
    if span.warmth is not None:
        return color_of(span.warmth)
    role = span.lane.split()[0] if span.lane.strip() else ""  # "disk 2" is a disk
    return color_of(role) if has_color(role) else color_of("wait")


def rows_of(spans: Sequence[Span], end: float | None, recorded: bool, header: str) -> list[Row]:
    books = account(spans, end=end)
    lanes = list(dict.fromkeys(span.lane for span in sorted(spans, key=lambda item: item.start)))
    rows = []
    for number, lane in enumerate(lanes):
        own = sorted((span for span in spans if span.lane == lane), key=lambda item: (item.start, item.end))
        # Time in which no lane was busy belongs to all of them.
        gaps = [(low - books.start, high - books.start) for low, high in books.gaps]
        rows.append(Row(lane, _bars(own, books), tuple(gaps), recorded, header if number == 0 else ""))
    return rows


def _bars(spans: Sequence[Span], books: Account) -> tuple[Bar, ...]:
    groups: list[list[Span]] = []
    for span in spans:
        if groups and groups[-1][-1].name == span.name and span_color(groups[-1][-1]) == span_color(span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return tuple(
        Bar(
            group[0].name,
            group[0].start - books.start,
            max(span.end for span in group) - books.start,
            sum(span.seconds for span in group),
            len(group),
            span_color(group[0]),
            tuple(Span(s.name, s.start - books.start, s.end - books.start) for s in group),
        )
        for group in groups
    )


def label_of(bar: Bar, separator: str = "  ") -> str:
    times = f" ×{bar.count}" if bar.count > 1 else ""
    return f"{bar.name}{times}{separator}{seconds_text(bar.seconds)}"


def _text_pixels(text: str, dpi: float) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans")
    return max(float(TextPath((0, 0), line, size=FONT, prop=font).get_extents().width) for line in text.split("\n")) * dpi / 72


def place_rows(rows: Sequence[Row], total: float, pixels: float, dpi: float) -> tuple[float, list[list[int]]]:
    """The right end of the axis and the place of every label. The axis is made longer until the last flag fits."""
    widths = [[(_text_pixels(label_of(bar), dpi), _text_pixels(label_of(bar, "\n"), dpi)) for bar in row.bars] for row in rows]
    limit = total * 1.01
    places: list[list[int]] = []
    for _ in range(6):
        per_second = pixels / limit
        places = []
        need = total * 1.01
        for row, row_widths in zip(rows, widths, strict=True):
            labels = [
                Label(bar.anchor[0] * per_second, bar.anchor[1] * per_second, *w)
                for bar, w in zip(row.bars, row_widths, strict=True)
            ]
            places.append(place_labels(labels, padding=_PADDING_PX, max_levels=_MAX_LEVELS, min_flag=_MIN_LABEL_PX))
            flags = [item for item, place in zip(labels, places[-1], strict=True) if place >= 0]
            need = max([need, *((item.middle + item.width + 2 * _PADDING_PX) / per_second for item in flags)])
        if need <= limit * 1.001:
            break
        limit = need
    return limit, places


def stack_rows(rows: Sequence[Row], places: Sequence[Sequence[int]]) -> tuple[list[float], float]:
    """The height of each row's middle, from the bottom, and the height of all."""
    centers: list[float] = []
    y = 0.16
    for row, row_places in reversed(list(zip(rows, places, strict=True))):
        levels = 1 + max([level for level in row_places if level >= 0], default=-1)
        centers.append(y + BAR / 2)
        y += BAR + levels * LEVEL + (0.58 if row.header else 0.0) + 0.2
    return centers[::-1], y
