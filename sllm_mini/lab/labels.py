"""Where the labels of a timeline go, so that no two touch and no leader line crosses a text.

A label that fits into its bar stays inside, on one line or on two. The others become flags: a leader line rises from
the middle of the bar and the text starts at the line and runs to the right. Flags are placed from right to left, each
one level above every flag its text would reach: so each line passes left of the texts below it and crosses none.

Pure geometry in one unit (pixels, points or seconds: the caller's choice); O(n · levels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INSIDE = -1
TWO_LINES = -2
HIDDEN = -3


@dataclass(frozen=True, slots=True)
class Label:
    """A bar `[start, end)` and the width of the text that names it, on one line and broken into two."""

    start: float
    end: float
    width: float
    two_line_width: float

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


def place_labels(labels: Sequence[Label], *, padding: float, max_levels: int, min_flag: float = 0.0) -> list[int]:
    """For each label INSIDE, TWO_LINES (inside), a flag level from 0 (lowest) up, or HIDDEN.

    Hidden are flags of bars narrower than `min_flag` and those for which all `max_levels` levels are taken; `padding`
    is kept free around every text.
    """
    places = [HIDDEN] * len(labels)
    leftmost = [float("inf")] * max_levels  # per level, where its leftmost leader line stands so far
    for index in sorted(range(len(labels)), key=lambda i: (labels[i].middle, i), reverse=True):
        label = labels[index]
        room = label.end - label.start - 2 * padding
        if label.width <= room:
            places[index] = INSIDE
        elif label.two_line_width <= room:
            places[index] = TWO_LINES
        elif label.end - label.start >= min_flag:
            text_end = label.middle + label.width + padding
            level = 1 + max((k for k in range(max_levels) if leftmost[k] < text_end), default=-1)
            if level < max_levels:
                places[index] = level
                leftmost[level] = label.middle
    return places
