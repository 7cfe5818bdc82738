"""The JSON document of `bench simulate`: requests per second, taken against the reference round by round. Pure but for reading.

`ratio_to_reference_*` is our requests per second over SimPy's in the same round: 0.5 is half as fast. A bare queue has about
five SimPy events a request; `events_per_request` counts what our controller is told. `growth` says how the seconds per event
grow with the nodes: `ratio_to_smallest` against `log_ratio`, what growth by the logarithm would be. `cold_fraction` is of the
requests that were answered in the time that counts. Shown in chapter 08.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.simulating.workload import Ran, Workload

KIND = "sllm-mini bench simulate"
SIMPY = "SimPy, one M/M/4 queue"


def assemble(
    workloads: Sequence[Workload],
    growing: Sequence[Workload],
    samples: Mapping[str, Sequence[Ran]],
    policies: Sequence[Mapping[str, Any]],
    memory: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, str]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The document. `facts` pass through."""
    reference = samples.get(SIMPY)
    rows = [_row(workload.name, workload, samples[workload.name], reference) for workload in workloads]
    if reference is not None:
        rows.append(_row(SIMPY, None, reference, reference))
    return {
        "kind": KIND, **facts, "reference": SIMPY if reference is not None else None, "limits": {}, "results": rows, "growth": _growth(growing, samples),
        "memory": list(memory), "policies": list(policies), "skipped": list(skipped),
    }  # fmt: skip


def _row(name: str, workload: Workload | None, ran: Sequence[Ran], reference: Sequence[Ran] | None) -> dict[str, Any]:
    seconds = [one.seconds for one in ran]
    row: dict[str, Any] = {
        "name": name, "state": "one core", "requests": ran[0].requests, "samples": seconds, "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds), "seconds_max": max(seconds), "requests_per_second_median": ran[0].requests / statistics.median(seconds),
    }  # fmt: skip
    if reference is not None:
        ratios = [(one.requests / one.seconds) / (other.requests / other.seconds) for one, other in zip(ran, reference, strict=True)]
        row |= {"ratio_to_reference_median": statistics.median(ratios), "ratio_to_reference_min": min(ratios), "ratio_to_reference_max": max(ratios)}
    if workload is not None:
        row |= {
            "nodes": workload.nodes, "devices": workload.nodes * workload.devices, "models": workload.models, "placement": workload.placement,
            "keep_alive": workload.keep_alive, "autoscaler": workload.autoscaler,
            "events_per_request": statistics.median(one.events / one.requests for one in ran), "seconds_per_event_median": _per_event(ran),
            "cold_fraction": statistics.median(one.cold_fraction for one in ran),
        }  # fmt: skip
    return row


def _per_event(ran: Sequence[Ran]) -> float:
    return statistics.median(one.seconds / one.events for one in ran)


def _growth(growing: Sequence[Workload], samples: Mapping[str, Sequence[Ran]]) -> list[dict[str, Any]]:
    rows = []
    smallest: dict[str, Workload] = {}
    for workload in growing:
        first = smallest.setdefault(workload.kind, workload)
        ran, base = samples[workload.name], samples[first.name]
        ratios = [(one.seconds / one.events) / (other.seconds / other.events) for one, other in zip(ran, base, strict=True)]
        rows.append(
            {
                "name": workload.name, "nodes": workload.nodes, "models": workload.models, "seconds_per_event_median": _per_event(ran),
                "cold_fraction": statistics.median(one.cold_fraction for one in ran),
                "ratio_to_smallest_median": statistics.median(ratios), "ratio_to_smallest_min": min(ratios), "ratio_to_smallest_max": max(ratios),
                "log_ratio": math.log(workload.nodes) / math.log(first.nodes) if first.nodes > 1 else None,
            }
        )  # fmt: skip
    return rows


def read_simulating(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)
