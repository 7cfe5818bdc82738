"""Processes that serve models on one machine: how they start, what they share, and how they are put away and brought back.

`node` composes a store and the engines that run on its memory, each an `instance`. `zygote` forks a process that has its
libraries imported already, `snapshot` writes a running process to files and brings it back, `process_memory` says what one
more process costs. `trace` is the format of workloads, `simulated` runs one in simulated time, `live` on real nodes, each an
agent of `nodes`; `open_cluster` opens either, and `api` says what both can do. Importing this package costs
nothing. Taught in chapters 05 and 08.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

_HOMES = {
    "Ask": "api",
    "Child": "zygote",
    "Cluster": "api",
    "ControlOptions": "live.options",
    "Deployment": "api",
    "ForkOptions": "zygote",
    "Instance": "instance",
    "LiveOptions": "live.options",
    "Node": "node",
    "NodeError": "instance",
    "NodeOptions": "live.options",
    "ProcessMemory": "process_memory",
    "RefusedError": "api",
    "SimulationResult": "simulated",
    "Zygote": "zygote",
    "ZygoteError": "zygote",
    "fork_from": "zygote",
    "memory_of": "process_memory",
    "open_cluster": "opening",
    "restore_snapshot": "snapshot",
    "save_snapshot": "snapshot",
    "simulate": "simulated",
    "why_no_criu": "snapshot",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)
