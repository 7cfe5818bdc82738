"""Percentiles of millions of numbers in some thousand counters, exact ones where all numbers are kept. Taught in chapter 08.

A counter per 1 % step of the logarithm: a percentile from them is at most 0.5 % off. Counts, means and extremes are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

_STEP = math.log(1.01)
_LEAST = 1e-9
"""Seconds below this are taken for none."""
_OFFSET = math.floor(math.log(_LEAST) / _STEP) - 1
BUCKETS = 8192
"""More than there are: the last one stands for 10^26 seconds."""


class Spread(Struct, frozen=True):
    """Seconds: how many, their mean and percentiles; NaN where there are none. `exact` is False for percentiles that may be
    0.5 % off."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    largest: float
    exact: bool


PERCENTS = (50, 90, 95, 99)


class ModelSummary(Struct, frozen=True):
    """One model's requests. `cold` of those answered waited for a start from below READY that began for them;
    `first_token_seconds` from arrival."""

    model: str
    answered: int
    refused: int
    cold: int
    wait_seconds_mean: float
    latency_seconds_mean: float
    first_token_seconds: Spread

    @property
    def cold_fraction(self) -> float:
        return self.cold / self.answered if self.answered else math.nan


@dataclass(slots=True)
class Counters:
    """The streaming form. Memory is bounded by 8 192 counters, however many numbers come."""

    count: int = 0
    total: float = 0.0
    largest: float = -math.inf
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, numbers: Numbers) -> None:
        if not len(numbers):
            return
        self.count += len(numbers)
        self.total += float(numbers.sum())
        self.largest = max(self.largest, float(numbers.max()))
        for bucket, number in zip(*bucket_counts(bucket_of(numbers)), strict=True):
            self.buckets[bucket] = self.buckets.get(bucket, 0) + number

    def spread(self) -> Spread:
        if not self.count:
            return _nothing()
        p50, p90, p95, p99 = self._percentiles()
        return Spread(self.count, self.total / self.count, p50, p90, p95, p99, self.largest, False)

    def _percentiles(self) -> list[float]:
        found, ordered = [], sorted(self.buckets)
        seen, place = 0, -1
        for percent in PERCENTS:
            wanted = percent / 100 * (self.count - 1) + 1  # the rank that exact percentiles lie at
            while seen < wanted and place + 1 < len(ordered):
                place += 1
                seen += self.buckets[ordered[place]]
            found.append(min(middle_of(ordered[place]), self.largest))
        return found


def exact_spread(numbers: Numbers) -> Spread:
    """The same of numbers that are all there."""
    import numpy as np

    if not len(numbers):
        return _nothing()
    p50, p90, p95, p99 = (float(value) for value in np.percentile(numbers, PERCENTS))
    return Spread(len(numbers), float(numbers.mean()), p50, p90, p95, p99, float(numbers.max()), True)


def bucket_of(numbers: Numbers) -> NDArray[np.int64]:
    import numpy as np

    buckets = np.floor(np.log(np.maximum(numbers, _LEAST)) / _STEP).astype(np.int64) - _OFFSET
    buckets[numbers < _LEAST] = 0
    return np.minimum(buckets, BUCKETS - 1)


def middle_of(bucket: int) -> float:
    """The number that stands for a bucket."""
    return 0.0 if bucket == 0 else math.exp((bucket + _OFFSET + 0.5) * _STEP)


def bucket_counts(buckets: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    import numpy as np

    found, numbers = np.unique(buckets, return_counts=True)
    return found.tolist(), numbers.tolist()


def _nothing() -> Spread:
    return Spread(0, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, True)


def as_row(spread: Spread) -> Mapping[str, float]:
    """With units in the keys; NaN where there is nothing."""
    row = {"mean": spread.mean, "p50": spread.p50, "p90": spread.p90, "p95": spread.p95, "p99": spread.p99, "max": spread.largest}
    return {f"seconds_{name}": value for name, value in row.items()}


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys, None (null in JSON) for what there is no figure of."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
