"""Every second accounted for: what a list of spans covers, what it leaves out and what ran side by side.

Pure arithmetic on `Span`s; sorting dominates, O(n log n). Taught in chapter 00.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.types import Span


@dataclass(frozen=True, slots=True)
class Entry:
    """All spans of one name in one lane: how many, how long together, how many bytes they moved."""

    name: str
    lane: str
    count: int
    seconds: float
    nbytes: int

    @property
    def bytes_per_second(self) -> float | None:
        """None where no bytes are known or no time passed."""
        return self.nbytes / self.seconds if self.nbytes and self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Account:
    """What `[start, end)` was spent on, so that the seconds of the entries − overlapped + unaccounted = total."""

    start: float
    end: float
    entries: tuple[Entry, ...]
    gaps: tuple[tuple[float, float], ...]
    overlapped_seconds: float

    @property
    def total_seconds(self) -> float:
        return self.end - self.start

    @property
    def unaccounted_seconds(self) -> float:
        return sum(end - start for start, end in self.gaps)

    @property
    def coverage(self) -> float:
        """The share of the total in which at least one span was running; 1 for an empty stretch."""
        return 1.0 - self.unaccounted_seconds / self.total_seconds if self.total_seconds > 0 else 1.0


def account(spans: Sequence[Span], *, start: float | None = None, end: float | None = None) -> Account:
    """Accounts for `[start, end)`, by default from the first start to the last end.

    Spans are clipped to that stretch and those outside it are left out; entries come in order of first start.
    Raises ValueError where there is nothing to account for or a span ends before it starts.
    """
    for span in spans:
        if not span.end >= span.start:
            raise ValueError(f"span {span.name!r} ends {span.start - span.end:g} s before it starts; record end after start")
    if not spans and (start is None or end is None):
        raise ValueError("no spans were recorded, so there is no time to account for; record at least one span")
    first = min(span.start for span in spans) if start is None else start
    last = max(span.end for span in spans) if end is None else end
    if last < first:
        raise ValueError(f"the stretch to account for ends {first - last:g} s before it starts; swap start and end")

    seconds: dict[tuple[str, str], list[float]] = {}
    gaps: list[tuple[float, float]] = []
    covered_to = first
    covered = busy = 0.0
    for span in sorted(spans, key=lambda item: (item.start, item.end)):
        low, high = max(span.start, first), min(span.end, last)
        if high < low or (high == low and span.seconds > 0):
            continue
        share = (high - low) / span.seconds if span.seconds > 0 else 1.0
        entry = seconds.setdefault((span.name, span.lane), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += high - low
        entry[2] += span.nbytes * share
        busy += high - low
        if low > covered_to:
            gaps.append((covered_to, low))
        covered += max(0.0, high - max(low, covered_to))
        covered_to = max(covered_to, high)
    if covered_to < last:
        gaps.append((covered_to, last))
    entries = tuple(
        Entry(name, lane, int(count), total, round(nbytes)) for (name, lane), (count, total, nbytes) in seconds.items()
    )
    return Account(first, last, entries, tuple(gaps), max(0.0, busy - covered))
