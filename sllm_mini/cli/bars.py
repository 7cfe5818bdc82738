"""A start as bars in a terminal: the text twin of the timeline that chapter 00 draws. Pure; prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from sllm_mini.cli import terminal
from sllm_mini.lab.style import WARMTH_MEANING
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.types import Span, Warmth

MEANING: Mapping[str, str] = {
    "interpreter": "Python itself starts",
    "import torch": "the library that computes",
    "import transformers": "the library that knows the model",
    "import sllm_mini": "our own code",
    "open device": "the device is made ready",
    "tokenizer": "turns text into numbers and back",
    "open checkpoint": "its index is read and checked",
    "start load": "files opened, readers started",
    "bytes": "the weights come from the disk",
    "skeleton": "the model without its weights",
    "wait for bytes": "until the last of them is there",
    "fill": "the weights take their places",
    "hand over": "the model is given to its engine",
    "engine": "ready to take a request",
    "first call": "what is slow only once",
    "first token": "the prompt is read and answered",
}
"""What each step of a cold start does, in a few plain words."""

BESIDE = " ‖"
"""Marks a step that ran beside others."""

_LONGEST_MEANING = max(map(len, MEANING.values())) + len(BESIDE)
_STYLE = {
    Warmth.COLD: "dim",
    Warmth.PROCESS: "blue",
    Warmth.RUNTIME: "magenta",
    Warmth.DRAM: "red",
    Warmth.DEVICE: "yellow",
    Warmth.READY: "green",
}
"""The terminal's own colours, so that they suit its background; the names of the steps say the same without colour."""

_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHORTEST_SECONDS = 5e-5
_SHARE_FROM_WIDTH = 92
"""On a narrower terminal the column of shares gives its place to the bars."""


def bar(start: float, end: float, total: float, width: int) -> str:
    """`[start, end)` on an axis of `total` drawn over `width` columns, to an eighth of a column, never invisible."""
    if total <= 0:
        return ""
    first = min(int(start / total * width), width - 1)
    eighths = max(round((end - start) / total * width * 8), 1)
    eighths = min(eighths, (width - first) * 8)
    return " " * first + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def timeline(spans: Sequence[Span], end: float, width: int) -> Table:
    """The steps that began before `end`, in order, each with its time, its bar on a common axis and what it does."""
    shown = [span for span in spans if span.start < end and span.seconds >= _SHORTEST_SECONDS]
    with_share = width >= _SHARE_FROM_WIDTH
    names = max((len(span.name) for span in shown), default=0)
    # Two columns of padding after each of the others; times and shares are at most seven wide.
    columns = max(width - names - _LONGEST_MEANING - 8 - 8 - (9 if with_share else 0), 10)
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(justify="right", no_wrap=True)
    if with_share:
        made.add_column(justify="right", no_wrap=True)
    made.add_column(no_wrap=True, width=columns)
    made.add_column(style="dim", no_wrap=True)
    for span in shown:
        drawn = Text(bar(span.start, min(span.end, end), end, columns), style=_STYLE[span.warmth or Warmth.COLD])
        meaning = MEANING.get(span.name, "")
        if span.lane != "main":
            meaning += BESIDE
        share = [share_text(span.seconds / end)] if with_share else []
        made.add_row(span.name, seconds_text(span.seconds), *share, drawn, meaning)
    return made


def ladder(spans: Sequence[Span], end: float) -> Table:
    """What each rung of the warmth ladder cost: the seconds of the main lane's steps that climb to it."""
    made = terminal.table("rung", "what is there", "cost to climb to it", numbers=("cost to climb to it",))
    for rung in Warmth:
        cost = sum(min(s.end, end) - s.start for s in spans if s.warmth is rung and s.lane == "main" and s.start < end)
        made.add_row(
            Text(rung.name.lower(), style=_STYLE[rung]), WARMTH_MEANING[rung], seconds_text(cost) if rung else ""
        )
    return made


def beside(seconds: Mapping[str, float], width: int) -> Table:
    """A few durations under one another, drawn to one scale."""
    columns = max(width - 40, 10)
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(justify="right", no_wrap=True)
    made.add_column(no_wrap=True, width=columns)
    longest = max(seconds.values())
    for name, value in seconds.items():
        made.add_row(name, seconds_text(value), bar(0.0, value, longest, columns))
    return made
