"""The two traces of functions that Azure published: counts per minute (2019) and single invocations (2021).

Taught in chapter 09. Neither file is in order of arrival, so each is read whole before its first request: a day of 2019
costs 8 bytes for each minute in which a function ran at all, 2021 some 200 bytes for each invocation while it is sorted.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from sllm_mini.cluster.trace.lines import Lines, header_of, open_lines
from sllm_mini.cluster.trace.request import TraceRequest, is_name
from sllm_mini.errors import FormatError

MINUTES = 1440
YEAR_2019 = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(map(str, range(1, MINUTES + 1)))
YEAR_2021 = "app,func,end_timestamp,duration"
_PERCENTS = (0, 1, 25, 50, 75, 99, 100)
DURATIONS_2019 = "HashOwner,HashApp,HashFunction,Average,Count,Minimum,Maximum," + ",".join(f"percentile_Average_{p}" for p in _PERCENTS)
_QUANTILES = tuple(percent / 100 for percent in _PERCENTS)
_MILLISECOND = 1e-3

Function = tuple[str, str, str]
"""Owner, application and function, which together name one."""


def counts_2019(path: Path, durations: Path | None, seed: int) -> Iterator[TraceRequest]:
    """One day of the trace of 2019. Column m counts the invocations between m − 1 and m minutes after the day begins.

    The rule within a minute: each invocation gets an instant of its own, uniform over the minute, to the microsecond. A
    duration is drawn between the published percentiles of that function (straight lines between them, of means over 30 s
    and without the cold start); a function that is not in that file has none. Both draws depend on `seed` and the minute
    alone. Raises FormatError.
    """
    known = {} if durations is None else _percentiles(durations)
    names: list[str] = []
    percentiles: list[tuple[float, ...] | None] = []
    ran: list[array[int]] = [array("I") for _ in range(MINUTES)]  # pairs: which function, how often
    with open_lines(path) as lines:
        _expect(lines, YEAR_2019)
        for owner, app, function, _, *counts in lines.rows(4 + MINUTES):
            names.append(_name(lines, app, function))
            percentiles.append(known.get((owner, app, function)))
            for minute, text in enumerate(counts):
                if text != "0" and (count := lines.count(text, str(minute + 1))):
                    ran[minute].extend((len(names) - 1, count))
    for minute, pairs in enumerate(ran):
        chance = random.Random(f"{seed}:{minute}")
        instants = [(chance.random(), number) for number, count in zip(pairs[::2], pairs[1::2], strict=True) for _ in range(count)]
        for instant, number in sorted(instants):
            marks = percentiles[number]
            duration = None if marks is None else _between(marks, chance.random())
            yield TraceRequest(round(60 * (minute + instant), 6), names[number], 0, 0, None, duration)


def invocations_2021(path: Path) -> Iterator[TraceRequest]:
    """The trace of 2021, by the instant at which each invocation began, from the first one. Raises FormatError."""
    begins, ran, which = array("d"), array("d"), array("I")
    numbers: dict[tuple[str, str], int] = {}
    names: list[str] = []
    with open_lines(path) as lines:
        _expect(lines, YEAR_2021)
        for app, function, end, duration in lines.rows(4):
            if (app, function) not in numbers:
                numbers[app, function] = len(names)
                names.append(_name(lines, app, function))
            seconds = lines.number_of(duration, "duration")
            begins.append(lines.number_of(end, "end_timestamp") - seconds)
            ran.append(seconds)
            which.append(numbers[app, function])
    first = min(begins, default=0.0)
    for at in sorted(range(len(begins)), key=begins.__getitem__):
        yield TraceRequest(round(begins[at] - first, 6), names[which[at]], 0, 0, None, ran[at])


def _percentiles(path: Path) -> dict[Function, tuple[float, ...]]:
    """The percentiles of each function's run, in seconds. Raises FormatError."""
    found: dict[Function, tuple[float, ...]] = {}
    with open_lines(path) as lines:
        _expect(lines, DURATIONS_2019)
        for owner, app, function, _average, _count, _least, _most, *cells in lines.rows(7 + len(_PERCENTS)):
            marks = tuple(lines.number_of(cell, f"percentile_Average_{percent}") * _MILLISECOND for cell, percent in zip(cells, _PERCENTS, strict=True))
            if any(b < a for a, b in pairwise(marks)):
                raise lines.wrong("the percentiles fall where they should rise; mend or remove the line")
            found[owner, app, function] = marks
    return found


def _between(marks: tuple[float, ...], part: float) -> float:
    """The value at the quantile `part`, below 1, on straight lines between the marks."""
    at = bisect_right(_QUANTILES, part) - 1
    share = (part - _QUANTILES[at]) / (_QUANTILES[at + 1] - _QUANTILES[at])
    return round(marks[at] + share * (marks[at + 1] - marks[at]), 6)


def _expect(lines: Lines, header: str) -> None:
    if header_of(lines) != header:
        raise FormatError(f"line 1: it does not begin with {header[:60]}… as published; name that file", path=lines.path)


def _name(lines: Lines, app: str, function: str) -> str:
    name = f"{app}/{function}"
    if not (is_name(app) and is_name(function)):
        raise lines.wrong(f"the function is named {name[:40]!r}; name application and function in printable text")
    return name
