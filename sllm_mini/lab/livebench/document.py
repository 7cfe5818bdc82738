"""`bench cluster` as one call, and its JSON document: a trace live, and beside it in simulated time. Call from one thread. Chapter 08.

Rows have the keys of `SimulationResult.totals()`, so that one lies beside the other. The simulated row has the figures that this very run
measured: it says what of the run the simulator explains, not what it would have predicted; that is for `calibrate`.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace.file import published_file
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.livebench.agreement import agreement, decisions_of
from sllm_mini.lab.livebench.calibrate import KIND as CALIBRATION
from sllm_mini.lab.livebench.calibrate import STATED, Calibration, Learned, calibrate, learn, percentile
from sllm_mini.lab.livebench.figures import measured_figures, simulated
from sllm_mini.lab.livebench.play import Climb, Played, context_of, play
from sllm_mini.lab.livebench.workload import Options, fitted
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.loading.probe import measure_machine
from sllm_mini.resources import resource
from sllm_mini.types import Warmth

KIND = "sllm-mini bench cluster"
LATE_SECONDS = 0.005
"""Arrivals that come later than this, at the 99th percentile, are no open loop any more."""
_PERCENTS = (50, 90, 99)
Say = Callable[[str], None]


def measure_cluster(
    trace: Iterable[TraceRequest], options: Options, *, most: int | None = None, folder: Path | None = None, log: Path | None = None, on_stage: Say | None = None
) -> dict[str, Any]:
    """Plays the first `most` requests of a trace; returns the document, and writes the event log to `log`. Raises SllmError for a trace that cannot be
    played, a node that does not come up and a log that does not replay, OSError."""
    say = on_stage or (lambda _: None)
    checkpoint = tiny_checkpoint()
    made = fitted(trace, options, context_of(checkpoint), most)
    say("starting the nodes")
    played = play(made.requests, checkpoint, options, folder=folder, on_progress=lambda number: say(f"request {number} of {len(made.requests)}"))
    if log is not None:
        with published_file(log) as file:
            file.writelines(played.log)
    return document(played, made.requests, checkpoint, options) | {"shortened": made.shortened}


def measure_calibration(
    options: Options, calibration: Calibration, *, learned: Path | None = None, folder: Path | None = None, on_stage: Say | None = None
) -> dict[str, Any]:
    """Learns on trace A, or reads what was learned from the file `learned`, where it is, and else saves it there; then predicts and plays trace B.
    Returns the document. Raises as `measure_cluster`, and FormatError for another file."""
    say = on_stage or (lambda _: None)
    checkpoint = tiny_checkpoint()
    if learned is not None and learned.exists():
        known = Learned.read(learned)
    else:
        known = learn(checkpoint, options, calibration, folder=folder, say=say)
        if learned is not None:
            known.save(learned)
    return _facts(CALIBRATION, checkpoint) | calibrate(checkpoint, options, calibration, known, folder=folder, say=say)


def document(played: Played, requests: Sequence[TraceRequest], checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Of a run that was played."""
    figures = measured_figures(played, checkpoint)
    expected, log = simulated(requests, checkpoint, options, figures, played.learned)
    late = percentile(played.lateness, 99)
    return _facts(KIND, checkpoint) | {
        "stated": STATED,
        "method": asdict(options),
        "limits": {},
        "results": [_row("live", played.result) | _token_row(played), _row("simulated", expected)],
        "skipped": [],
        "lateness_seconds": {"p99": late, "max": max(played.lateness), "open_loop": late <= LATE_SECONDS},
        "rungs": _rungs(played.climbs),
        "zygote_nbytes": played.shared_nbytes,
        "figures": to_builtins(figures),
        "replayed_events": played.replayed,
        "agreement": agreement(decisions_of(played.log), decisions_of(log), played.began),
    }  # fmt: skip


def _facts(kind: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "kind": kind, "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": asdict(measure_machine(os.getcwd())), "model": {"name": "tiny", "nbytes": checkpoint.nbytes},
    }  # fmt: skip


def _row(name: str, result: SimulationResult) -> dict[str, Any]:
    more = result.to_dict()
    kept = ("cold_by_warmth", "starts_by_warmth", "loads_by_tier", "gpu_seconds", "mb_seconds", "estimate_errors")
    return {"name": name, "totals": result.totals(), **{key: more[key] for key in kept}}


def _token_row(played: Played) -> dict[str, Any]:
    return {"inter_token_seconds": {"mean": statistics.fmean(played.gaps) if played.gaps else None} | {f"p{percent}": percentile(played.gaps, percent) for percent in _PERCENTS}}


def _rungs(climbs: Sequence[Climb]) -> list[dict[str, Any]]:
    rows = []
    for warmth in Warmth:
        mine = [climb for climb in climbs if climb.warmth == warmth]
        if mine:
            seconds, counted = [climb.seconds for climb in mine], [climb for climb in mine if climb.private_nbytes] or mine
            rows.append(
                {
                    "name": warmth.name, "count": len(mine), "seconds_median": statistics.median(seconds), "seconds_mean": statistics.fmean(seconds), "seconds_max": max(seconds),
                    "private_nbytes_median": statistics.median(climb.private_nbytes for climb in counted), "proportional_nbytes_median": statistics.median(climb.proportional_nbytes for climb in counted),
                }
            )  # fmt: skip
    return rows


def row_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The totals of one of the rows, "live" or "simulated"."""
    return dict(next(row["totals"] for row in found["results"] if row["name"] == name))


def recorded_calibration(name: str = "cluster-calibration") -> dict[str, Any]:
    """What was measured of a calibration on the machine, and on the date, that it names. Raises ResourceError where it is not part of the
    installation."""
    return read_cluster(resource("data/results") / "cpu" / f"{name}.json", CALIBRATION)


def read_cluster(path: str | os.PathLike[str], kind: str = KIND) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, kind)
