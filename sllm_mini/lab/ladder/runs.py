"""Loads by this package in one process, in several settings, cold or warm: seconds, counters, spans, what was done; and
which rounds a bench of the ladder lost.

Settings are taken in turn, round by round; each run ends with the sum over every byte, so that a mapping is paid for.
Costs one model in memory at a time. Call from one thread. Shown in chapter 02.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.device import get_device
from sllm_mini.errors import IntegrityError
from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.bench.conditions import back_memory, make_cold, make_warm
from sllm_mini.lab.counters import Counters, counted
from sllm_mini.lab.table import Table
from sllm_mini.loading import LoadOptions, LoadReport, start_load
from sllm_mini.types import Span, SpanRecorder

_UNKNOWN = "not counted"
_RUNG = re.compile(r"(?:ladder: )?(?P<name>(?<=ladder: )[^,]+|limits)(?:(?:, cold)?, round (?P<round>\d+))?")


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One load and the sum after it. `load_seconds` ends with the last byte in place; `spans` start at 0, where the load does."""

    setting: str
    nbytes: int
    load_seconds: float
    load: Counters
    use: Counters
    report: LoadReport
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        return self.load.seconds + self.use.seconds


def measure_loads(
    checkpoint: Checkpoint, settings: Mapping[str, LoadOptions], *, device: str = "cpu", warm: bool = False, verify: bool = True, rounds: int = 3
) -> list[LoadRun]:
    """Loads in every setting, `rounds` times. Raises UnsupportedError where files cannot be made cold or warm, IntegrityError
    if two loads give different bytes, and what `load_tensors` raises."""
    files = [checkpoint.path / partition.file for partition in checkpoint.index.partitions]
    runs: list[LoadRun] = []
    sums = set()
    for _ in range(rounds):
        for name, options in settings.items():
            back_memory(checkpoint.nbytes)  # else a virtual machine's host is measured, which has to find the memory first
            (make_warm if warm else make_cold)(files)
            recorder = SpanRecorder()
            gc.collect()
            with counted() as load, start_load(checkpoint, device, verify=verify, options=options, recorder=recorder) as handle:
                tensors = handle.wait()
                get_device(device).synchronize()
            with counted() as use:
                sums.add(sum_tensors(tensors.values()))
            report = handle.report
            spans = tuple(Span(s.name, s.start - report.started, s.end - report.started, s.lane, s.nbytes) for s in recorder.spans)
            runs.append(LoadRun(name, checkpoint.nbytes, report.seconds, load, use, report, spans))
            del tensors, handle
    if len(sums) > 1:
        raise IntegrityError("two loads gave different bytes", path=checkpoint.path)
    return runs


def median_load(runs: Sequence[LoadRun], setting: str | None = None) -> LoadRun:
    """The run (of one setting) whose seconds are the median. Raises ValueError if there is none."""
    own = sorted((run for run in runs if setting in (None, run.setting)), key=lambda run: run.seconds)
    if not own:
        raise ValueError(f"no run of setting {setting!r} was measured")
    return own[len(own) // 2]


def loads_table(runs: Sequence[LoadRun], caption: str) -> Table:
    """Medians: what each setting did with the bytes, seconds until the load returned and of their first use, counters."""
    rows = []
    for name in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == name]
        report = median_load(own).report
        ways = {"mapped": report.mapped_nbytes, "copied from the cache": report.buffered_nbytes, "read around it": report.direct_nbytes}
        did = ", ".join(f"{way} {nbytes / report.nbytes:.0%}" for way, nbytes in ways.items() if nbytes)
        load, use = (statistics.median(getattr(run, part).seconds for run in own) for part in ("load", "use"))
        faults = statistics.median(part.minor_faults + part.major_faults for run in own for part in (run.load,))
        later = statistics.median(run.use.minor_faults + run.use.major_faults for run in own)
        disk = [run.load.disk_nbytes for run in own]
        from_disk = _UNKNOWN if None in disk else f"{statistics.median(float(value or 0) for value in disk) / own[0].nbytes:.2f} x"
        rows.append((name, did, f"{load:.3f}", f"{use:.3f}", f"{load + use:.3f}", f"{faults:,.0f}", f"{later:,.0f}", from_disk))
    return Table(
        headers=("setting", "what it did", "load, s", "use, s", "both, s", "faults", "in use", "from disk"),
        rows=tuple(rows),
        caption=caption,
        note="Medians. Use is the sum over every byte; faults are page faults, of the load and of the use; “x” is times the bytes of the model.",
        numeric=frozenset(range(2, 8)),
    )


def refused_text(document: Mapping[str, Any]) -> str:
    """One line to stand under the ladder of a bench's document: the rounds that its rungs or its limits lost, by reason.
    Of a rung that is lost as a whole the table has no row."""
    reasons: dict[str, list[str]] = {}
    for skipped in document["skipped"]:
        found = _RUNG.fullmatch(skipped["name"])
        if found is not None:  # else another loader, which the table of skipped loaders names
            where = f"in round {found['round']}" if found["round"] else "in every round"
            reasons.setdefault(" ".join(skipped["reason"].split()), []).append(f"{found['name']} {where}")
    if not reasons:
        return "No round of a rung was refused."
    lost = (f"{', '.join(where)} ({reason})" for reason, where in reasons.items())
    return f"Refused, so not in the seconds and factors above: {'; '.join(lost)}."
