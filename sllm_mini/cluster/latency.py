"""How long requests took, as histograms that a scrape takes: constant in size, whatever was served. Pure; chapter 11.

Buckets are Prometheus': each holds what took no longer than its bound. Costs 0.2 us a figure.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from sllm_mini.types import Warmth

BOUNDS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5))
"""Seconds, from a warm token to a cold start of a large model; what took longer is in one bucket more."""


@dataclass(slots=True)
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """By the smallest of `BOUNDS` that it does not pass."""
    seconds: float = 0.0
    """In all."""

    def add(self, *figures: float) -> None:
        """Of those that are not a number, as of what has not come, nothing is counted."""
        counts = self.counts
        for seconds in figures:
            if seconds == seconds:
                counts[bisect_left(BOUNDS, seconds)] += 1
                self.seconds += seconds

    def copy(self) -> Histogram:
        return Histogram(self.counts.copy(), self.seconds)


@dataclass(slots=True)
class Latencies:
    """Of one model's requests that are over. The time to the first token is kept apart by how warm the start was that it waited for (READY:
    none), since a mean over both says nothing."""

    first_token: dict[Warmth, Histogram] = field(default_factory=dict)
    """From arrival, of all that had one. Only the rungs there were."""
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    """From arrival to the end, of those that were answered."""
    queue: Histogram = field(default_factory=Histogram)
    """From arrival to an instance, of all that had one."""
    load: Histogram = field(default_factory=Histogram)
    """Moving weights, of those that waited for that."""

    def copy(self) -> Latencies:
        first = {warmth: each.copy() for warmth, each in self.first_token.items()}
        return Latencies(first, self.between_tokens.copy(), self.whole.copy(), self.queue.copy(), self.load.copy())
