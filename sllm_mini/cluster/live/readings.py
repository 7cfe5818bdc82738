"""What a live cluster says of itself, read on the thread that decides: its nodes, counters, and what came of all requests. Chapter 08."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sllm_mini.cluster.api import Metrics, NodeReport
from sllm_mini.cluster.live.loop import Loop
from sllm_mini.cluster.live.reviving import Reviver
from sllm_mini.cluster.reports import node_reports
from sllm_mini.cluster.router import Router
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.cluster.simulated.table import RequestTable


def reports_of(loop: Loop, returning: Mapping[str, float]) -> list[NodeReport]:
    private = {id: placed.rungs[-1].private_nbytes for id, placed in loop.carry.placed.items() if placed.rungs}
    members = loop.members
    return node_reports(loop.controller.cluster, members.joined, members.reasons, private, members.stores, returning)


def metrics_of(loop: Loop, router: Router, reviver: Reviver) -> Metrics:
    """Constant in cost."""
    found = router.tally.metrics(loop.accountant.found, waiting=router.unassigned, running=router.running, turned_away=router.turned_away)
    return replace(found, revivals=reviver.returned, failed_revivals=reviver.failed)


def result_of(loop: Loop, router: Router, policies: Mapping[str, str], now: float) -> SimulationResult:
    """Costs some microseconds for each request there ever was, and reads no log."""
    estimator = loop.controller.estimator
    table = RequestTable(router.rows.models, keep=True)
    table.buffer += router.rows.packed
    table.settle()
    spreads, accounting, waiting = table.spreads(), loop.accountant.settled(now), list(router.waiting_since())
    return SimulationResult(
        policies=policies, requests=table, models=table.by_model(), wait=spreads["wait"], first_token=spreads["first_token"],
        latency=spreads["latency"], spans=accounting.spans, account=accounting.account, events=dict(loop.counts),
        arrived=len(table) + len(waiting), unanswered=len(waiting), seconds=now,
        waiting_seconds=sum(row.latency_seconds for row in table) + sum(now - at for at in waiting), wall_seconds=now,
        estimate_errors={} if estimator is None else estimator.errors(),
    )  # fmt: skip
