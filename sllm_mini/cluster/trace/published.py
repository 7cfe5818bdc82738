"""Traces that others published, read exactly as they published them: two of LLM inference, two of functions.

Taught in chapters 08 and 09. `import_trace` tells them apart by their first line. Nothing of them travels with sllm_mini.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sllm_mini.cluster.trace import azure_functions
from sllm_mini.cluster.trace.azure_functions import YEAR_2019, YEAR_2021
from sllm_mini.cluster.trace.file import open_trace
from sllm_mini.cluster.trace.lines import Lines, header_of, open_lines
from sllm_mini.cluster.trace.request import Again, Trace, TraceLabel, TraceRequest, is_name
from sllm_mini.errors import FormatError

AZURE_LLM = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURSTGPT_SESSIONS = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"

_SOURCES = {
    AZURE_LLM: "Azure LLM inference trace 2023",
    BURSTGPT: "BurstGPT",
    BURSTGPT_SESSIONS: "BurstGPT with sessions",
    YEAR_2019: "Azure Functions trace 2019",
    YEAR_2021: "Azure Functions invocation trace 2021",
}
_STAMP = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}) ([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])\.([0-9]{7})", re.ASCII)
_TICKS = 10_000_000
"""Azure's clock ticks in a second."""


def import_trace(
    path: str | os.PathLike[str],
    *,
    model: str = "model",
    failures: bool = False,
    durations: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Trace:
    """Opens a trace in the format of sllm_mini or in a published one, plain or .gz, told apart by the first line.

    - *Azure LLM inference 2023* asks for one model, named `model` here; seconds from the first request. Streams.
    - *BurstGPT*, with or without sessions: seconds from the first request, a session becomes the `prefix`; requests that
      failed (no response tokens) are left out unless `failures`. Streams.
    - *Azure Functions 2019*, one day's counts: see `azure_functions.counts_2019`. `durations` names the file of the same
      day that says how long functions ran. `seed` chooses the instants within each minute.
    - *Azure Functions 2021*: a function arrives when it began (end − duration); seconds from the first. See `azure_functions`.

    Functions are models named application/function that have a duration and no tokens. Raises FormatError for another
    file now, and for a wrong line when it is reached; ValueError for an option that cannot be.
    """
    target = Path(path)
    if not is_name(model):
        raise ValueError(f"the model is named {model!r}; name it in printable text")
    with open_lines(target) as lines:
        header = header_of(lines)
    if header not in _SOURCES:
        if header.startswith(("# sllm-mini trace", '{"format":"sllm-mini trace"')):
            return open_trace(target)
        raise FormatError(
            f"line 1: it begins with {header[:60]!r} and as none of the traces known here ({'; '.join(_SOURCES.values())}); name one of them", path=target
        )
    if durations is not None and header != YEAR_2019:
        raise ValueError(f"{target} is no Azure Functions trace of 2019, which alone has a file of durations; leave durations out")
    label = TraceLabel(_name_of(target), _SOURCES[header] + _said_of(header, failures), "recorded", seed if header == YEAR_2019 else None)
    if header == AZURE_LLM:
        return Trace(label, Again(partial(_azure_llm, target, model)))
    if header == YEAR_2019:
        return Trace(label, Again(partial(azure_functions.counts_2019, target, None if durations is None else Path(durations), seed)))
    if header == YEAR_2021:
        return Trace(label, Again(partial(azure_functions.invocations_2021, target)))
    return Trace(label, Again(partial(_burstgpt, target, header == BURSTGPT_SESSIONS, failures)))


def _name_of(path: Path) -> str:
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    return name if is_name(name) else "imported"


def _said_of(header: str, failures: bool) -> str:
    if header == YEAR_2019:
        return ", instants within each minute drawn at random"
    return ", failed requests left out" if header in (BURSTGPT, BURSTGPT_SESSIONS) and not failures else ""


def _azure_llm(path: Path, model: str) -> Iterator[TraceRequest]:
    with open_lines(path) as lines:
        header_of(lines)
        days: dict[str, int] = {}
        first = before = None
        for stamp, inputs, outputs in lines.rows(3):
            ticks = _ticks(lines, stamp, days)
            first = ticks if first is None else first
            if before is not None and ticks < before:
                raise lines.wrong(f"TIMESTAMP {stamp} is before that of the line above; sort the file by TIMESTAMP")
            before = ticks
            yield TraceRequest((ticks - first) / _TICKS, model, lines.count(inputs, "ContextTokens"), lines.count(outputs, "GeneratedTokens"))


def _ticks(lines: Lines, stamp: str, days: dict[str, int]) -> int:
    """The instant in ticks of Azure's clock; dates are looked up in `days`, so that most cost no parsing."""
    from datetime import date

    found = _STAMP.fullmatch(stamp)
    if found is None:
        raise lines.wrong(f"TIMESTAMP is {stamp[:40]!r}; write it as 2023-11-16 18:17:03.9799600")
    day, hours, minutes, seconds, fraction = found.groups()
    if day not in days:
        try:
            days[day] = date.fromisoformat(day).toordinal()
        except ValueError as error:
            raise lines.wrong(f"TIMESTAMP has the date {day}, which no calendar has; mend or remove the line") from error
    return (((days[day] * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)) * _TICKS + int(fraction)


def _burstgpt(path: Path, sessions: bool, failures: bool) -> Iterator[TraceRequest]:
    with open_lines(path) as lines:
        header_of(lines)
        first = before = None
        models: dict[str, str] = {}
        for row in lines.rows(8 if sessions else 6):
            prefix = row[1] if sessions else ""
            model, inputs, outputs = row[-5:-2]
            if not is_name(model) or not (prefix == "" or is_name(prefix)):
                raise lines.wrong(f"Model is {model[:40]!r} and Session ID {prefix[:40]!r}; name the model, and both in printable text")
            second = lines.number_of(row[0], "Timestamp")
            first = second if first is None else first
            if before is not None and second < before:
                raise lines.wrong(f"Timestamp {row[0]} is before that of the line above; sort the file by Timestamp")
            before = second
            request = TraceRequest(
                round(second - first, 6),
                models.setdefault(model, model),
                lines.count(inputs, "Request tokens"),
                lines.count(outputs, "Response tokens"),
                prefix or None,
            )
            if request.output_tokens or failures:
                yield request
