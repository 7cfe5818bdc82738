"""What a placement policy keeps whatever comes: counted over random traces, with the cases that break the rest. Chapter 08.

`PROMISES` is the table of the chapter; `tests/test_08_promises.py` proves or breaks every cell of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from sllm_mini.cluster.simulated import SimulatedCluster, SimulationOptions
from sllm_mini.cluster.trace import TraceRequest, burst_trace
from sllm_mini.control.controller import Controller
from sllm_mini.control.messages import AnyAction, AnyEvent, Assign, MigrationFinished, ModelSpec, NodeSpec, Preempt
from sllm_mini.control.placement import POLICIES
from sllm_mini.control.placement.fit import fit
from sllm_mini.lab.scheduling.machine import make_controller
from sllm_mini.lab.scheduling.worked import GB, llm, machine
from sllm_mini.lab.table import Table

PROPERTIES: Mapping[str, str] = MappingProxyType(
    {
        "work conservation": "no model waits for an instance that some machine has room for",
        "no starvation": "a request does not wait the longer, the more requests for another model come after it",
        "arrival order": "the requests of a model are first run in the order in which they came",
        "bounded moves": "no request is moved more than twice",
        "no lost work": "no request is stopped and begun again",
    }
)
MOST_MOVES = 2
PROMISES: Mapping[str, tuple[bool, bool, bool, bool, bool]] = MappingProxyType(
    {
        "random": (True, False, True, True, True),
        "availability": (True, False, True, True, True),
        "locality": (False, False, True, True, True),
        "shepherd": (True, True, True, True, False),
        "serverlessllm": (True, False, True, True, True),
        "affinity": (True, False, True, True, True),
        "deepserve": (True, False, True, True, True),
        "hydraserve": (True, False, True, True, True),
    }
)
"""Policy → whether it keeps each of `PROPERTIES`, in their order."""


@dataclass(slots=True)
class Kept:
    """How often each property but starvation was broken in a run, and how many requests were answered of those that came."""

    idle_while_wanted: int = 0
    out_of_order: int = 0
    most_moves: int = 0
    preemptions: int = 0
    answered: int = 0
    arrived: int = 0

    def broken(self) -> dict[str, int]:
        return {
            "work conservation": self.idle_while_wanted, "arrival order": self.out_of_order,
            "bounded moves": max(0, self.most_moves - MOST_MOVES), "no lost work": self.preemptions,
        }  # fmt: skip


class Watched:
    """A controller that is looked at after each event. Costs a look at every machine for each model that waits."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.kept = controller, Kept()
        self._moves: dict[int, int] = {}
        self._first: dict[str, int] = {}
        self._seen: set[int] = set()

    def handle(self, event: AnyEvent, now: float) -> list[AnyAction]:
        actions = self.controller.handle(event, now)
        cluster, kept = self.controller.cluster, self.kept
        if isinstance(event, MigrationFinished):
            self._moves[event.request] = self._moves.get(event.request, 0) + 1
            kept.most_moves = max(kept.most_moves, self._moves[event.request])
        for action in actions:
            if isinstance(action, Preempt):
                kept.preemptions += 1
            elif isinstance(action, Assign) and action.request not in self._seen:
                self._seen.add(action.request)
                request = cluster.requests[action.request]
                kept.out_of_order += request.order < self._first.get(request.model, -1)
                self._first[request.model] = max(request.order, self._first.get(request.model, -1))
        for model in cluster.models.values():
            wanted = -(-(model.running + len(model.queue)) // model.spec.concurrency)
            if model.queue and model.ready + len(model.starting) < min(wanted, model.spec.max_instances):
                estimator = self.controller.estimator
                kept.idle_while_wanted += any(fit(model, node, cluster, estimator, now) is not None for node in cluster.nodes.values())  # type: ignore[arg-type]
        return actions


def watched(placement: str, trace: Iterable[TraceRequest], nodes: Sequence[NodeSpec], models: Sequence[ModelSpec]) -> Kept:
    """One run under watch."""
    machine_ = Watched(make_controller(placement))
    cluster = SimulatedCluster(machine_, nodes, models, SimulationOptions(keep="requests", store_dram_nbytes=60 * GB))
    cluster.run(trace)
    machine_.kept.arrived, machine_.kept.answered = cluster.arrived, cluster.table.count("answered")
    return machine_.kept


def random_case(seed: int, requests: int = 60) -> tuple[list[TraceRequest], list[NodeSpec], list[ModelSpec]]:
    """A burst, two to four machines and up to six models of any size, drawn from the seed."""
    chance = Random(seed)
    sizes = [chance.choice((1, 1, 1, 2)) for _ in range(chance.randint(2, 6))]
    models = [llm(f"m{number}", size * 13 * GB, devices=size, concurrency=chance.choice((1, 1, 2))) for number, size in enumerate(sizes)]
    nodes = [
        machine(f"node-{number}", *(model.name for model in models if chance.random() < 0.6), devices=chance.choice((2, 2, 4)))
        for number in range(chance.randint(2, 4))
    ]
    trace = burst_trace(requests=requests, requests_per_second=chance.choice((0.2, 0.5, 1.0)), cv=chance.choice((1, 4)), models=[model.name for model in models], seed=seed)
    return list(trace), nodes, models


def flooded_wait(placement: str, others: int) -> float:
    """One machine, one device, both models on its disk: B's requests come twice as fast as they are served, and after the second of
    them one for A. Seconds until A's is first run, while so many of B's come."""
    seconds = {"A": 2.0, "B": 2.0}
    trace = sorted([TraceRequest(float(number), "B", 0, 0, None, seconds["B"]) for number in range(others)] + [TraceRequest(1.5, "A", 0, 0, None, seconds["A"])], key=lambda one: one.arrival_seconds)
    cluster = SimulatedCluster(make_controller(placement), [machine("one", "A", "B")], [llm("A", 5 * GB), llm("B", 5 * GB)], SimulationOptions(keep="requests"))
    cluster.run(trace)
    return next(row.wait_seconds for row in cluster.table if row.model == "A")


def counted(seeds: Sequence[int], placements: Iterable[str] = tuple(POLICIES)) -> dict[str, dict[str, int]]:
    """Policy → how many times each property was broken over the random cases, and ("no starvation") the seconds by which
    A's wait grew as four times as many came after it."""
    found = {}
    for placement in placements:
        broken = dict.fromkeys(PROPERTIES, 0)
        for seed in seeds:
            for name, times in watched(placement, *random_case(seed)).broken().items():
                broken[name] += times
        broken["no starvation"] = round(flooded_wait(placement, 80) - flooded_wait(placement, 20))
        found[placement] = broken
    return found


def promises_table(found: Mapping[str, Mapping[str, int]]) -> Table:
    """`PROMISES`, with what was counted beside each cell that is broken."""
    rows = []
    for placement, cells in PROMISES.items():
        counts = found[placement]
        rows.append((placement, *(_cell(name, kept, counts[name]) for name, kept in zip(PROPERTIES, cells, strict=True))))
    return Table(("policy", *PROPERTIES), tuple(rows), caption="What a policy promises", note="; ".join(f"{name}: {words}" for name, words in PROPERTIES.items()) + ".")


def _cell(name: str, kept: bool, count: int) -> str:
    if kept:
        return "yes" if not count else f"BROKEN ({count})"
    return f"no (+{count} s)" if name == "no starvation" else f"no ({count} times)"
