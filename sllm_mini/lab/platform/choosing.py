"""Which switches to buy under a budget of memory: every choice forecast, and one checked against the best. Exercise of chapter 11."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.lab.platform.contest import Run, expected_run
from sllm_mini.lab.platform.forecast import Costs
from sllm_mini.lab.platform.switches import SWITCHES, platform_with, stretched

Choice = frozenset[str]


def choices() -> list[Choice]:
    """Every set of switches that can be: migration needs the scheduler."""
    found = (frozenset(names) for size in range(len(SWITCHES) + 1) for names in combinations(SWITCHES, size))
    return [each for each in found if "migration" not in each or "scheduler" in each]


def forecast_choices(requests: Sequence[TraceRequest], checkpoint: Checkpoint, costs: Costs, among: Iterable[Choice] | None = None) -> dict[Choice, Run]:
    """Costs some milliseconds a choice."""
    return {each: expected_run(requests, checkpoint, platform_with(each), costs) for each in (choices() if among is None else among)}


def without_each(requests: Sequence[TraceRequest], checkpoint: Checkpoint, costs: Costs, times: float = 1.0) -> dict[str, float]:
    """Mean seconds to the first token with all switches, and without each (without the scheduler there is no migration either), for
    weights that are so many times as large and a trace that is as much slower."""
    whole = frozenset(SWITCHES)
    left = {"all of them": whole} | {name: whole - {name} - ({"migration"} if name == "scheduler" else set()) for name in SWITCHES}
    runs = forecast_choices(stretched(requests, times), checkpoint, costs.heavier(times), left.values())
    return {name: runs[each].mean for name, each in left.items()}


def a_budget(runs: Mapping[Choice, Run]) -> float:
    """MB-seconds that the cheapest of the quickest choices needs, and a hundredth more."""
    best = min(run.mean for run in runs.values())
    return 1.01 * min(run.mb_seconds for run in runs.values() if run.mean <= 1.02 * best)


def check_choice(chosen: Iterable[str], budget_mb_seconds: float, runs: Mapping[Choice, Run]) -> str:
    """What is to be said of a choice: whether it is within the budget, and how near to the best that is. Raises ValueError for a set that
    cannot be."""
    names = frozenset(chosen)
    platform_with(names)
    mine, said = runs[names], ", ".join(sorted(names)) or "nothing"
    if mine.mb_seconds > budget_mb_seconds:
        return f"{said}: {mine.mb_seconds:,.0f} MB-seconds are more than {budget_mb_seconds:,.0f}; choose otherwise (a slow start holds memory too)"
    best = min(run.mean for run in runs.values() if run.mb_seconds <= budget_mb_seconds)
    if mine.mean <= 1.02 * best:
        return f"{said}: right. No choice within {budget_mb_seconds:,.0f} MB-seconds is better than this one's {mine.mean:.2f} s by more than 2 %"
    return f"{said}: {mine.mb_seconds:,.0f} MB-seconds are within {budget_mb_seconds:,.0f}, and {mine.mean:.2f} s is {mine.mean / best:.1f} times what the best choice takes"
