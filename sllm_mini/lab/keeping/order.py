"""Does the order that RainbowCake reports hold here? The same contest over several seeds, each with functions of its own. Chapter 09.

Simulated. Every figure is a ratio within one seed, so that a busy seed counts no more than a quiet one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from sllm_mini.cluster.trace import FaasFunction, TraceRequest, faas_functions, faas_trace
from sllm_mini.lab.keeping.contenders import Outcome, run_contender
from sllm_mini.lab.keeping.frontier import fixed_line, start_at_waste
from sllm_mini.lab.keeping.functions import AMPLE_NBYTES, function_specs
from sllm_mini.lab.table import Table

RIVALS = ("fixed 10 min", "hybrid histogram", "FaasCache")
OURS = ("RainbowCake", "RainbowCake refitted")
SCARCE_NBYTES = 1.5e9
SEEDS = (1, 2, 3, 4, 5)
AS_WASTEFUL = "fixed, as wasteful"
_LENGTHS = (5.0, 15.0, 60.0, 180.0, 360.0, 900.0)


def contest(seeds: Sequence[int] = SEEDS, *, hours: float = 4.0, sizes: Sequence[float] = (AMPLE_NBYTES, SCARCE_NBYTES)) -> dict[float, list[dict[str, Outcome]]]:
    """By size of memory, for each seed, a run of each policy over its own twenty functions. With ample memory also, for each of
    RainbowCake's two, the start-up of the fixed keep-alive that wastes as much."""
    runs: dict[float, list[dict[str, Outcome]]] = {size: [] for size in sizes}
    for seed in seeds:
        functions = faas_functions(seed)
        specs, requests, until = function_specs(functions, seed=seed), list(faas_trace(seconds=3600 * hours, functions=functions, seed=seed)), 3600 * hours
        for size in sizes:
            found = {name: run_contender(name, requests, specs, nbytes=size, until=until) for name in (*RIVALS, *OURS)}
            if size == AMPLE_NBYTES:
                line = fixed_line(requests, specs, until, _LENGTHS)
                for name in OURS:
                    usual = start_at_waste(line, found[name].waste_gb_seconds)
                    if usual is not None:
                        found[_as_wasteful(name)] = replace(found[name], name=AS_WASTEFUL, start_seconds=usual)
            runs[size].append(found)
    return runs


def _as_wasteful(name: str) -> str:
    return f"{AS_WASTEFUL} as {name}"


def ratios(runs: Sequence[Mapping[str, Outcome]], name: str, rival: str) -> tuple[list[float], list[float]]:
    """Start-up and waste of one over the rival's, a number for each seed."""
    start = [run[name].start_seconds / run[rival].start_seconds for run in runs]
    waste = [run[name].waste_gb_seconds / run[rival].waste_gb_seconds for run in runs]
    return start, waste


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _verdict(start: Sequence[float], waste: Sequence[float]) -> str:
    """Holds, where each is less at every seed; half, where one of them is; else not."""
    less = [all(value < 1 for value in values) for values in (start, waste)]
    return "holds" if all(less) else "start-up only" if less[0] else "waste only" if less[1] else "not at every seed"


def order_table(runs: Mapping[float, Sequence[Mapping[str, Outcome]]], sizes: Mapping[float, str] | None = None) -> Table:
    """RainbowCake over each rival: median over the seeds, with the least and the largest; below 1 is what the paper reports."""
    named = {AMPLE_NBYTES: "ample", SCARCE_NBYTES: f"{SCARCE_NBYTES / 1e9:g} GB"} if sizes is None else sizes
    rows = []
    for size, seeds in runs.items():
        for name in OURS:
            memory, alpha = named.get(size, f"{size / 1e9:g} GB"), "refitted" if name.endswith("refitted") else "its code's"
            for rival in RIVALS:
                start, waste = ratios(seeds, name, rival)
                rows.append((memory, alpha, rival, _spread(start), _spread(waste), _verdict(start, waste)))
            if all(_as_wasteful(name) in run for run in seeds):
                start, _ = ratios(seeds, name, _as_wasteful(name))
                rows.append((memory, alpha, AS_WASTEFUL, _spread(start), "1 by choice", "start-up only" if max(start) < 1 else "not at every seed"))
    return Table(
        headers=("memory", "α", "over", "start-up, ratio", "waste, ratio", "less of both?"),
        rows=tuple(rows), numeric=frozenset({3, 4}), caption="RainbowCake against what it was compared with",
        note=f"Simulated; median over {len(next(iter(runs.values())))} seeds, [least, largest]. Holds: both below 1 at every seed. As wasteful: read off a line of fixed lengths.",
    )  # fmt: skip


def layers_contest(requests: Sequence[TraceRequest], functions: Sequence[FaasFunction], until: float, policies: Sequence[str] = ("stem cells", "RainbowCake refitted")) -> dict[str, dict[bool, dict[float, Outcome]]]:
    """By policy, with runtimes shared between functions and without, by size of memory: a run of each."""
    specs = {shared: function_specs(functions, shared=shared) for shared in (True, False)}
    return {
        name: {
            shared: {size: run_contender(name, requests, specs[shared], nbytes=size, until=until) for size in (AMPLE_NBYTES, SCARCE_NBYTES)} for shared in specs
        }
        for name in policies
    }


def layers_table(runs: Mapping[str, Mapping[bool, Mapping[float, Outcome]]]) -> Table:
    """A row for each policy and size: start-up and waste with shared runtimes, and over those without."""
    rows = []
    for name, by_sharing in runs.items():
        for size, shared in by_sharing[True].items():
            alone = by_sharing[False][size]
            rows.append((
                name, "ample" if size == AMPLE_NBYTES else f"{size / 1e9:g} GB", f"{shared.start_seconds:,.0f}", f"{alone.start_seconds:,.0f}",
                f"{shared.start_seconds / alone.start_seconds:.2f}", f"{shared.waste_gb_seconds / 3600:.1f}", f"{alone.waste_gb_seconds / 3600:.1f}",
                f"{shared.waste_gb_seconds / alone.waste_gb_seconds:.2f}",
            ))  # fmt: skip
    return Table(
        headers=("policy", "memory", "start-up (s)", "alone", "ratio", "waste (GB-h)", "alone", "ratio"),
        rows=tuple(rows), numeric=frozenset(range(2, 8)), caption="Runtimes shared between functions, or one of its own for each", note="Simulated. Alone: each function has a runtime of its own; the ratio is pooled over alone.",
    )  # fmt: skip
