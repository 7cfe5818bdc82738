"""`bench simulate` as one call: our simulator and a bare SimPy queue take turns. Call from one thread. Shown in chapter 08.

In each round every workload and the reference run once, in a shuffled order that a seed fixes, on one core, after one
untimed run of each. Memory is counted in runs of their own, as counting it slows them down.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sllm_mini.cluster.simulated.policies import AUTOSCALERS, KEEP_ALIVES, PLACEMENTS
from sllm_mini.lab.simulating.document import SIMPY, assemble
from sllm_mini.lab.simulating.workload import (
    Ran,
    Workload,
    churn,
    queues,
    run_simpy,
    run_simulated,
    steady,
    with_policies,
)
from sllm_mini.loading.probe import measure_machine

_GROWING = (8, 64, 512)


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `requests` in each run after at least `warm_up` that are not counted, `nodes` of the smallest and the largest
    cluster. Raises ValueError for what measures nothing."""

    rounds: int = 3
    requests: int = 20_000
    warm_up: int = 16_384
    nodes: tuple[int, int] = (8, 1000)
    growing: tuple[int, ...] = _GROWING
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise ValueError(f"a warm-up of {self.warm_up} requests cannot be; give 0 or more")
        if self.rounds < 1 or self.requests < 100:
            raise ValueError(f"{self.rounds} rounds of {self.requests} requests measure nothing; give at least 1 round and 100 requests")
        if min(self.nodes, default=0) < 1 or min(self.growing, default=1) < 1:
            raise ValueError("a cluster has at least one node")


def measure_simulating(*, options: Options | None = None, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Returns the document (see `document`). Where simpy is not installed the reference is among the skipped."""
    options = options or Options()
    say = on_stage or (lambda _: None)
    small, large = options.nodes
    workloads = [queues(small), steady(small), steady(large), churn(small), churn(large)]
    growing = [make(nodes) for make in (queues, steady, churn) for nodes in options.growing]
    ways: dict[str, Callable[[int], Ran]] = {
        workload.name: partial(run_simulated, workload, options.requests, warm_up=options.warm_up) for workload in {each.name: each for each in (*workloads, *growing)}.values()
    }  # fmt: skip
    skipped = []
    if importlib.util.find_spec("simpy") is None:
        skipped.append({"name": SIMPY, "reason": "simpy is not installed; install the extra dev, or simpy alone, to compare with it"})
    else:
        ways[SIMPY] = partial(run_simpy, options.requests)
    samples = _interleaved(ways, options, say)
    policies = [_policy_row(way, options, say) for way in _every_policy(churn(small))]
    say("memory")
    memory = [{"requests": count, "peak_nbytes": _peak(queues(small), count)} for count in (options.requests, 4 * options.requests)]
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": asdict(measure_machine(os.getcwd())),
        "model": None,
        "method": {**asdict(options), "core_count": 1, "not_timed": "the cluster's making, the warm-up (in blocks of 8,192 requests; 100 s of simulated time where popularity is skewed as Azure's), and one run of each"},
    }
    return assemble(workloads, growing, samples, policies, memory, skipped, facts)


def _interleaved(ways: dict[str, Callable[[int], Ran]], options: Options, say: Callable[[str], None]) -> dict[str, list[Ran]]:
    chance = random.Random(options.seed)
    samples: dict[str, list[Ran]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name in chance.sample(list(ways), len(ways)):
            say(f"round {number} of {options.rounds}: {name}" if number else f"a first run, untimed: {name}")
            gc.collect()
            ran = ways[name](options.seed + number)
            if number:
                samples[name].append(ran)
    return samples


def _every_policy(workload: Workload) -> list[tuple[str, Workload]]:
    """Each policy with the other two as they are."""
    mine = workload.placement, workload.keep_alive, workload.autoscaler
    return [
        *((f"placement {name}", with_policies(workload, name, *mine[1:])) for name in PLACEMENTS),
        *((f"keep-alive {name}", with_policies(workload, mine[0], name, mine[2])) for name in KEEP_ALIVES),
        *((f"autoscaler {name}", with_policies(workload, *mine[:2], name)) for name in AUTOSCALERS),
    ]


def _policy_row(way: tuple[str, Workload], options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    name, workload = way
    say(name)
    ran = run_simulated(workload, max(options.requests // 10, 100), options.seed)
    return {
        "name": name, "requests": ran.requests, "events_per_request": ran.events / ran.requests, "seconds_per_event": ran.seconds / ran.events,
        "cold_fraction": ran.cold_fraction, "starts_per_request": ran.starts / ran.requests,
    }  # fmt: skip


def _peak(workload: Workload, count: int) -> int:
    """The most that Python held at once beyond what it held before."""
    gc.collect()
    tracemalloc.start()
    try:
        run_simulated(workload, count, 0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
