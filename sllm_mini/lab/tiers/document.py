"""The JSON document of `bench tiers`: what was measured, and how near it comes to what can be. Pure.

A sample of a row has parts in seconds, and `seconds`, what the row is about. What is held against a limit is, of a load
whose call returns when every byte is in place and right, that call (`load`); of a file that is only mapped, the total
less the sum over bytes that lie in memory already (`rest`); of the whole way, everything (`seconds`). `ratio_to_limit` is
the limit's seconds over that, so 1 is perfect. `ratio_to_target` is the seconds over the target of an attachment, so at
most 1 meets it. `seconds_per_gb` is given for page faults. Shown in chapter 03.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sllm_mini.lab.bench.document import load_part
from sllm_mini.lab.bench.ours import MAPPED
from sllm_mini.lab.bench.words import LIMIT_LABELS, MAPPED_FILE
from sllm_mini.loading.probe_samples import Measurement, Skipped, measurement_row

KIND = "sllm-mini bench tiers"
LOOPBACK, USE = "loopback_ranges", "resident_use"
LABELS: Mapping[str, str] = {LOOPBACK: "ranges from the same server", **LIMIT_LABELS, USE: "using every byte"}
"""What the limits are called at the head of a row."""

Kind = Literal["load", "attach", "pages", "part", "limit"]
Compared = Literal["", "load", "rest", "seconds"]


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured under one name. `state` says where the bytes were ("remote", "cold" on the disk, "warm" in the page
    cache, "dram", "device"); `limits` are those it is held against, the slowest counting; `compared`: see the module."""

    name: str
    state: str
    limits: tuple[str, ...] = ()
    compared: Compared = ""
    kind: Kind = "load"
    setting: str = "default"
    target_seconds: float | None = None
    model: str = ""
    nbytes: int = 0


@dataclass(slots=True)
class Run:
    """What was measured: of each row its samples by round, and, round by round, the limits and the sum alone."""

    samples: dict[Row, dict[int, dict[str, float]]] = field(default_factory=dict)
    limits: list[Measurement] = field(default_factory=list)
    use_seconds: list[float] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def assemble(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a run. `facts` are its keys about machine, model and method, passed through."""
    use = statistics.median(run.use_seconds) if run.use_seconds else None
    best: dict[str, Measurement] = {}
    for measured in run.limits:
        if measured.name not in best or measured.bytes_per_second > best[measured.name].bytes_per_second:
            best[measured.name] = measured
    rates = {name: measured.bytes_per_second for name, measured in best.items()}
    for row, samples in run.samples.items():
        part = load_part(_median(samples, "seconds"), use) if row.name == MAPPED else None
        if part is not None:
            rates[MAPPED_FILE] = row.nbytes / part
    limits = {f"{name}_bytes_per_second": rate for name, rate in rates.items()}
    return {
        "kind": KIND,
        **facts,
        "limits": limits if use is None else {**limits, f"{USE}_seconds_median": use},
        "limit_settings": {name: measured.setting for name, measured in best.items()},
        "limit_samples": [measurement_row(measured) for measured in run.limits],
        "results": [_result(row, samples, rates, use) for row, samples in run.samples.items()],
        "skipped": [asdict(skipped) for skipped in dict.fromkeys(run.skipped)],
    }


def limit_seconds(row: Row, rates: Mapping[str, float], use_seconds: float | None) -> tuple[str | None, float | None]:
    """The limit that holds for a row and the seconds it asks; (None, None) if it has none or one was not measured."""
    asks = {name: use_seconds if name == USE else row.nbytes / rates[name] if name in rates else None for name in row.limits}
    known = {name: seconds for name, seconds in asks.items() if seconds is not None}
    if not known or len(known) < len(asks):
        return None, None
    slowest = max(known, key=lambda name: known[name])
    return slowest, known[slowest]


def _result(row: Row, samples: Mapping[int, Mapping[str, float]], rates: Mapping[str, float], use: float | None) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in samples.values()]
    median = statistics.median(seconds)
    limit, asked = limit_seconds(row, rates, use)
    compared = load_part(median, use) if row.compared == "rest" else _median(samples, row.compared) if row.compared else None
    parts = [name for name in next(iter(samples.values())) if name != "seconds"]
    return {
        "name": row.name,
        "kind": row.kind,
        "state": row.state,
        "setting": row.setting,
        "model": row.model,
        "nbytes": row.nbytes,
        "samples": seconds,
        "rounds": list(samples),
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "parts": {f"{name}_seconds_median": _median(samples, name) for name in parts},
        "part_samples": {name: [sample[name] for sample in samples.values()] for name in parts},
        "compared_seconds_median": compared,
        "compared_bytes_per_second_median": None if not compared else row.nbytes / compared,
        "limit": limit,
        "ratio_to_limit": None if asked is None or not compared else asked / compared,
        "target_seconds": row.target_seconds,
        "ratio_to_target": None if row.target_seconds is None else median / row.target_seconds,
        "seconds_per_gb_median": median / row.nbytes * 1e9 if row.kind == "pages" and row.nbytes else None,
    }


def _median(samples: Mapping[int, Mapping[str, float]], name: str) -> float:
    return statistics.median(sample[name] for sample in samples.values())


def rows_of(document: Mapping[str, Any], *kinds: Kind) -> list[dict[str, Any]]:
    """The results of these kinds, in the order in which they were measured."""
    return [row for row in document["results"] if row["kind"] in kinds]
