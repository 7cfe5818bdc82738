"""What a start of each function of the FaaS trace costs, and the machine they run on: the world of chapter 09's simulations.

RainbowCake's workload says which runtimes and how functions are called (`cluster.trace.workloads`); seconds and bytes of
their layers are choices of ours, but for a bare container's 2 MB, which its code counts. Importing costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.cluster.trace.workloads import FaasFunction
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.state import held_nbytes
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text
from sllm_mini.types import Warmth

MB = 1_000_000
AMPLE_NBYTES = 64_000 * MB
"""More memory than all functions ever ask for."""
READ_BYTES_PER_SECOND = 5e9


@dataclass(frozen=True, slots=True)
class RuntimeCost:
    """One language: seconds and bytes of its layer."""

    seconds: float
    nbytes: int


PROCESS = RuntimeCost(0.4, 2 * MB)
RUNTIMES = {"nodejs": RuntimeCost(0.3, 50 * MB), "python": RuntimeCost(0.8, 60 * MB), "java": RuntimeCost(1.5, 120 * MB)}


def function_specs(functions: Sequence[FaasFunction], *, shared: bool = True, seed: int = 9) -> list[ModelSpec]:
    """The functions as models without devices: 50 to 300 MB and 0.5 to 4 s of their own, log-uniform, above their runtime's
    layer and a process's. Not `shared`: each function has a runtime that no other uses."""
    specs = []
    for function in functions:
        chance, cost = random.Random(f"{seed}:{function.name}"), RUNTIMES[function.runtime]
        specs.append(
            ModelSpec(
                name=function.name, nbytes=int(50 * 6 ** chance.random()) * MB, devices=0, runtime=function.runtime if shared else function.name,
                process_nbytes=PROCESS.nbytes, runtime_nbytes=cost.nbytes, process_seconds=PROCESS.seconds, runtime_seconds=cost.seconds,
                ready_seconds=0.5 * 8 ** chance.random(),
            )
        )  # fmt: skip
    return specs


def machine(specs: Sequence[ModelSpec], nbytes: float = AMPLE_NBYTES) -> list[NodeSpec]:
    """One node with this much memory for instances; every function's code lies on its disk."""
    return [
        NodeSpec(
            name="node", devices=0, dram_nbytes=int(nbytes), remote_bytes_per_second=READ_BYTES_PER_SECOND, disk_bytes_per_second=READ_BYTES_PER_SECOND,
            dram_bytes_per_second=4 * READ_BYTES_PER_SECOND, disk=tuple(spec.name for spec in specs),
        )
    ]  # fmt: skip


def start_seconds(spec: ModelSpec) -> float:
    """A whole cold start on that machine."""
    return spec.process_seconds + spec.runtime_seconds + spec.nbytes / READ_BYTES_PER_SECOND + spec.ready_seconds


def functions_table(functions: Sequence[FaasFunction], specs: Sequence[ModelSpec]) -> Table:
    """How each is called and what a start of it takes."""
    rows = [
        (
            function.name, seconds_text(function.mean_gap_seconds), f"{function.cv:.2f}", seconds_text(function.mean_run_seconds),
            seconds_text(start_seconds(spec)), nbytes_text(held_nbytes(spec, Warmth.READY)),
        )
        for function, spec in zip(functions, specs, strict=True)
    ]  # fmt: skip
    total = sum(held_nbytes(spec, Warmth.READY) for spec in specs)
    rows.append(("one instance of each", "", "", "", "", nbytes_text(total)))
    return Table(
        headers=("function", "mean gap", "CV of gaps", "mean run", "cold start", "memory"),
        rows=tuple(rows), caption="Twenty functions", numeric=frozenset(range(1, 6)), emphasis=frozenset({len(rows) - 1}),
        note="Gaps, runs, seconds and bytes are drawn at random (seeded) from ranges that the text names.",
    )  # fmt: skip
