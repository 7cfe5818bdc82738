"""Snapshot restore as a platform does it (AWS Lambda SnapStart): the start itself is saved, so it is read back instead of run.

Taken once, when the model is deployed; a cold start then reads the snapshot of process, runtime and warmed-up state. As a
policy it is no keep-alive: it changes what a start costs, and goes with any. Pure. Taught in chapter 09.
"""

from __future__ import annotations

from msgspec.structs import replace

from sllm_mini.control.messages import ModelSpec


def from_snapshot(spec: ModelSpec, bytes_per_second: float, fixed_seconds: float = 0.0) -> ModelSpec:
    """The same model, started from a snapshot of its process and runtime: their bytes over `bytes_per_second`, and
    `fixed_seconds` for the restore itself, in place of the seconds of those rungs; what comes after the weights is in the
    snapshot too. Weights are read as ever. Raises ValueError for a bandwidth that is not above 0."""
    if not (bytes_per_second > 0 and fixed_seconds >= 0):
        raise ValueError(f"no snapshot is read at {bytes_per_second} bytes/s in {fixed_seconds} s more; give a bandwidth above 0 and 0 s or more")
    seconds = fixed_seconds + (spec.process_nbytes + spec.runtime_nbytes) / bytes_per_second
    return replace(spec, process_seconds=seconds, runtime_seconds=0.0, ready_seconds=0.0)
