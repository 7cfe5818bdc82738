"""The JSON document of a bench: what was measured, and what it means beside the limits. Pure but for reading files.

Terms: `seconds_*` are a sample's total, the load and the sum over every byte. `load_part_seconds_median` is that total
less the median of the sum alone over bytes already in populated memory (or on the device); `ratio_to_limit` is the
limit's seconds over the load part, so 1 is perfect. `ratio_to_reference_*` compare totals round by round: 1.5 took half as
long again as the reference in the same round. `limit_settings` says which setting of a limit was the fastest by median,
of how many, and how far its rounds lie apart: on a shared disk the best of many flatters the limit.
`load_call_seconds_median` is the call alone, before anything is used.
`kept_nbytes_median` is how much a worker's resident memory had grown since before its first load, after everything was
freed. Shown in chapter 02.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sllm_mini.errors import FormatError
from sllm_mini.lab.bench.entry import State
from sllm_mini.lab.bench.measure import Run, Series
from sllm_mini.lab.bench.ours import MAPPED
from sllm_mini.lab.bench.words import DISK, LINK, MAPPED_FILE
from sllm_mini.loading.probe_samples import Measurement, measurement_row

KIND = "sllm-mini bench load"
_COUNTED = (
    "user_seconds", "system_seconds", "minor_faults", "major_faults", "read_calls", "read_nbytes", "disk_nbytes", "peak_nbytes",
)  # fmt: skip
_NEEDED = {"kind", "machine", "model", "method", "limits", "results", "skipped"}


def assemble(run: Run, *, nbytes: int, device: str, reference: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a run. `facts` are its keys about machine, model, method and packages, passed through."""
    use = statistics.median(run.use_seconds) if run.use_seconds else None
    limits = _limits(run, nbytes, use)
    references = {(series.group, series.state): _totals(series) for series in run.series if series.entry.name == reference}
    rows, kept = [], set()
    for series in run.series:
        key = series.entry.name, series.state
        if key in kept:
            continue  # the reference of a later group serves its ratios only
        kept.add(key)
        name, seconds = limit_of(series.state, device, limits, nbytes)
        rows.append(_row(series, nbytes, use, name, seconds, references.get((series.group, series.state), {})))
    rows.sort(key=lambda row: (row["state"], row["seconds_median"]))
    return {
        "kind": KIND,
        **facts,
        "reference": reference,
        "limits": limits,
        "limit_settings": {name: _setting_row(best, tried) for name, (best, tried) in _best_settings(run).items()},
        "limit_samples": [measurement_row(measured) for measured in run.limits],
        "results": rows,
        "skipped": [asdict(skipped) for skipped in run.skipped],
    }


def limit_of(state: State, device: str, limits: Mapping[str, float], nbytes: int) -> tuple[str | None, float | None]:
    """Which limit holds for a load of `nbytes` in that state, and the seconds it asks; (None, None) if not measured."""
    if device == "cpu":
        names = [DISK] if state == "cold" else [MAPPED_FILE]
    else:
        names = [DISK, LINK] if state == "cold" else [LINK]
    rates = {name: limits[key] for name in names if (key := f"{name}_bytes_per_second") in limits}
    if len(rates) < len(names):
        return None, None
    slowest = min(rates, key=lambda name: rates[name])
    return slowest, nbytes / rates[slowest]


def _limits(run: Run, nbytes: int, use: float | None) -> dict[str, float]:
    """name_bytes_per_second of the best setting by median, and the seconds of the sum alone."""
    found = {f"{name}_bytes_per_second": best.bytes_per_second for name, (best, _) in _best_settings(run).items()}
    if use is not None:
        found["resident_use_seconds_median"] = use
        for series in run.series:
            if series.entry.name == MAPPED:
                part = load_part(statistics.median(_totals(series).values()), use)
                if part is not None:
                    found[f"{MAPPED_FILE}_bytes_per_second"] = nbytes / part
    return found


def _best_settings(run: Run) -> dict[str, tuple[Measurement, int]]:
    """Of each limit the setting with the fastest median, and how many settings there were."""
    by_name: dict[str, list[Measurement]] = {}
    for measured in run.limits:
        by_name.setdefault(measured.name, []).append(measured)
    return {name: (max(found, key=lambda m: m.bytes_per_second), len(found)) for name, found in by_name.items()}


def _setting_row(best: Measurement, tried: int) -> dict[str, Any]:
    return {
        "setting": best.setting,
        "settings_tried": tried,
        "samples": list(best.samples_seconds),
        "bytes_per_second_median": best.bytes_per_second,
        "bytes_per_second_min": best.nbytes / best.seconds_max,
        "bytes_per_second_max": best.nbytes / best.seconds_min,
    }


def load_part(total_seconds: float, use_seconds: float | None) -> float | None:
    """A total less the sum alone; None where nothing is left, so that no ratio is made of noise."""
    part = None if use_seconds is None else total_seconds - use_seconds
    return part if part is not None and part > 0 else None


def ratios(seconds: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """Round by round, one loader's total over the reference's."""
    return [seconds[number] / reference[number] for number in sorted(seconds.keys() & reference.keys())]


def _totals(series: Series) -> dict[int, float]:
    return {number: sample["seconds"] for number, sample in series.samples.items()}


def _row(series: Series, nbytes: int, use: float | None, limit: str | None, limit_seconds: float | None, reference: Mapping[int, float]) -> dict[str, Any]:
    entry, totals = series.entry, _totals(series)
    samples = list(totals.values())
    median = statistics.median(samples)
    part = load_part(median, use)
    against = ratios(totals, reference)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "state": series.state,
        "setting": entry.setting,
        "package": entry.package,
        "group": series.group,
        "nbytes": nbytes,
        "samples": samples,
        "rounds": list(totals),
        "seconds_median": median,
        "seconds_min": min(samples),
        "seconds_max": max(samples),
        "load_call_seconds_median": statistics.median(sample["load_seconds"] for sample in series.samples.values()),
        "load_part_seconds_median": part,
        "bytes_per_second_median": nbytes / median,
        "load_part_bytes_per_second_median": None if part is None else nbytes / part,
        "limit": limit,
        "ratio_to_limit": None if limit_seconds is None or part is None else limit_seconds / part,
        "ratio_to_reference_samples": against,
        "ratio_to_reference_median": statistics.median(against) if against else None,
        "ratio_to_reference_min": min(against, default=None),
        "ratio_to_reference_max": max(against, default=None),
        "kept_nbytes_median": statistics.median(sample["kept_nbytes"] for sample in series.samples.values()),
        **{f"{name}_median": _median(series, name) for name in _COUNTED},
    }


def _median(series: Series, counter: str) -> float | None:
    found = [sample["counters"][counter] for sample in series.samples.values() if sample["counters"].get(counter) is not None]
    return statistics.median(found) if found else None


def read_document(path: str | os.PathLike[str], kind: str = KIND) -> dict[str, Any]:
    """A saved document of a bench. Raises FormatError for a file that is none of that kind, OSError if it cannot be read."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"it is not JSON ({error})", path=path) from error
    missing = sorted(_NEEDED - document.keys()) if isinstance(document, dict) else sorted(_NEEDED)
    if missing or document["kind"] != kind:
        raise FormatError(f"it is not what `{kind} --save` writes" + (f"; it lacks {', '.join(missing)}" if missing else ""), path=path)
    return dict(document)


def save_document(document: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a document as JSON and returns its path."""
    target = Path(path)
    target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def rows_of(document: Mapping[str, Any], state: str, *, kinds: Sequence[str] = ("ours", "ladder", "peer", "limit")) -> list[dict[str, Any]]:
    """The results of one state, fastest first."""
    found = [row for row in document["results"] if row["state"] == state and row["kind"] in kinds]
    return sorted(found, key=lambda row: row["seconds_median"])
