"""What is in a trace: its rate, how bursty it is, how long its prompts and answers are, who is asked how often.

Taught in chapter 08. One pass; memory for each model and each different token count, whatever the length of the trace.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from sllm_mini.cluster.trace.request import Trace, TraceLabel

LONG_GAP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and maximum of token counts."""

    mean: float
    median: float
    maximum: int


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """How often one model is asked for: requests, their share of all, the CV of the gaps between them (None for < 3)."""

    requests: int
    share: float
    interarrival_cv: float | None


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """A trace in figures.

    `seconds` are from the first to the last request and `requests_per_second` the gaps over them; both ends being
    requests, there is one gap less than requests. `interarrival_cv` is the standard deviation of the gaps over their
    mean. Figures that need more requests than there are, are None. `models` has the most popular first.
    """

    label: TraceLabel
    requests: int
    seconds: float
    requests_per_second: float | None
    interarrival_cv: float | None
    gaps_over_60_seconds: int
    input_tokens: Spread | None
    output_tokens: Spread | None
    mean_duration_seconds: float | None
    models: dict[str, ModelStatistics]


@dataclass(slots=True)
class _Gaps:
    """Mean and variance of the gaps between instants, by Welford's method."""

    first: float = 0.0
    last: float = 0.0
    instants: int = 0
    squares: float = 0.0
    long: int = 0
    _mean: float = field(default=0.0)

    def add(self, now: float) -> None:
        if self.instants == 0:
            self.first = now
        else:
            gap = now - self.last
            off = gap - self._mean
            self._mean += off / self.instants
            self.squares += off * (gap - self._mean)
            self.long += gap > LONG_GAP_SECONDS
        self.last = now
        self.instants += 1

    @property
    def cv(self) -> float | None:
        gaps = self.instants - 1
        return math.sqrt(self.squares / gaps) / self._mean if gaps >= 2 and self._mean > 0 else None


def describe(trace: Trace) -> TraceStatistics:
    """Runs through a trace once. Raises what reading it raises."""
    all_gaps = _Gaps()
    gaps: dict[str, _Gaps] = {}
    inputs: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    timed, total_duration = 0, 0.0
    for request in trace:
        all_gaps.add(request.arrival_seconds)
        if request.model not in gaps:
            gaps[request.model] = _Gaps()
        gaps[request.model].add(request.arrival_seconds)
        inputs[request.input_tokens] += 1
        outputs[request.output_tokens] += 1
        if request.duration_seconds is not None:
            timed += 1
            total_duration += request.duration_seconds
    requests, seconds = all_gaps.instants, all_gaps.last - all_gaps.first
    popular = sorted(gaps.items(), key=lambda item: (-item[1].instants, item[0]))
    return TraceStatistics(
        trace.label,
        requests,
        seconds,
        (requests - 1) / seconds if seconds > 0 else None,
        all_gaps.cv,
        all_gaps.long,
        _spread(inputs),
        _spread(outputs),
        total_duration / timed if timed else None,
        {name: ModelStatistics(own.instants, own.instants / requests, own.cv) for name, own in popular},
    )


def _spread(counts: Counter[int]) -> Spread | None:
    total = counts.total()
    if total == 0:
        return None
    values = sorted(counts)
    lower = upper = None  # the two in the middle, or the one twice
    seen = 0
    for value in values:
        seen += counts[value]
        if lower is None and 2 * seen >= total:
            lower = value
        if 2 * seen > total:
            upper = value
            break
    middle = ((lower or 0) + (upper or 0)) / 2
    return Spread(sum(value * count for value, count in counts.items()) / total, middle, values[-1])
