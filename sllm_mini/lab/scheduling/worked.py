"""Two machines, two models, one collision: the case that ServerlessLLM's paper draws, small enough to follow by hand. Chapter 08.

One GPU each. Both machines have B's checkpoint on disk, only "a" has A's. B runs on "a", as "b" was away when its request came. Now
somebody asks for A. Seconds are those of the specs: nothing is measured, all of it simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sllm_mini.cluster.simulated import SimulationResult, simulate
from sllm_mini.cluster.trace import Trace, TraceLabel, TraceRequest
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec, NodeJoined, NodeSpec
from sllm_mini.control.policy import Placement
from sllm_mini.lab.scheduling.machine import KEEP_ALIVE_SECONDS
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text

GB = 10**9
POLICIES = ("availability", "locality", "shepherd", "serverlessllm")
"""Those of the paper's comparison, in the order in which this chapter has them."""
NAMED = {"availability": "Serverless", "locality": "locality", "shepherd": "Shepherd*", "serverlessllm": "ServerlessLLM"}
"""What the paper calls them."""
DOES = {"availability": "takes what is free", "locality": "waits for the weights", "shepherd": "preempts", "serverlessllm": "migrates"}


def llm(name: str, nbytes: int, *, devices: int = 1, seconds_per_token: float = 0.045, concurrency: int = 1) -> ModelSpec:
    """A model whose prefill takes a tenth of a decode step per token, as ServerlessLLM's notes have it."""
    return ModelSpec(
        name=name, nbytes=nbytes, devices=devices, ready_seconds=0.2, concurrency=concurrency,
        prefill_seconds_per_token=seconds_per_token / 10, decode_seconds_per_token=seconds_per_token,
    )  # fmt: skip


def machine(name: str, *disk: str, devices: int = 1, dram_nbytes: int = 512 * GB) -> NodeSpec:
    """A 10 Gbit/s network, an NVMe drive of 5 GB/s, 20 GB/s from memory to a device."""
    return NodeSpec(
        name=name, devices=devices, dram_nbytes=dram_nbytes, remote_bytes_per_second=1.25e9, disk_bytes_per_second=5e9,
        dram_bytes_per_second=20e9, disk=disk,
    )  # fmt: skip


MODELS = (llm("A", 26 * GB), llm("B", 26 * GB))
NODES = (machine("a", "A", "B"), machine("b", "B"))
TRACE = Trace(TraceLabel("two machines", "made by hand", "synthetic"), (TraceRequest(0.0, "B", 200, 600), TraceRequest(10.0, "A", 200, 200)))
JOINS = 5.0


def two_nodes(placement: str, log: Callable[[bytes], object] | None = None) -> SimulationResult:
    """B's request at second 0, machine "b" back at second 5, A's request at second 10."""
    return _simulated(TRACE, NODES[:1], placement, [(JOINS, NodeJoined(NODES[1]))], log)


def undisturbed() -> SimulationResult:
    """B's request alone."""
    return _simulated(Trace(TRACE.label, tuple(TRACE)[:1]), NODES[:1], "availability")


def _simulated(trace: Trace, nodes: tuple[NodeSpec, ...], placement: str, events: list[tuple[float, NodeJoined]] | None = None, log: Callable[[bytes], object] | None = None) -> SimulationResult:
    return simulate(trace, nodes, MODELS, placement=placement, keep_alive=FixedKeepAlive(KEEP_ALIVE_SECONDS), events=events or (), log=log)


@dataclass(frozen=True, slots=True)
class Delay:
    """What one policy made of the case, in seconds: A's first token after its arrival, and how much later than alone B ended."""

    placement: str
    first_token_seconds: float
    b_later_seconds: float

    @property
    def together_seconds(self) -> float:
        return self.first_token_seconds + self.b_later_seconds


def delays(results: dict[str, SimulationResult]) -> list[Delay]:
    alone = next(iter(undisturbed().requests)).end
    found = []
    for name, result in results.items():
        rows = {row.model: row for row in result.requests}
        found.append(Delay(name, rows["A"].first_token_seconds, rows["B"].end - alone))
    return found


def delays_table(found: list[Delay]) -> Table:
    rows = [
        (NAMED[one.placement], DOES[one.placement], seconds_text(one.first_token_seconds), seconds_text(one.b_later_seconds) if one.b_later_seconds > 1e-9 else "0 s", seconds_text(one.together_seconds))
        for one in found
    ]
    return Table(
        ("policy", "what it does", "A waits for its first token", "B ends later than alone by", "together"), tuple(rows),
        caption="Who pays", numeric=frozenset({2, 3, 4}), emphasis=frozenset({min(range(len(found)), key=lambda at: found[at].together_seconds)}),
    )  # fmt: skip


CLUSTER = (machine("one", "A", "B", devices=2), machine("two", "B", "C", devices=2), machine("three", "C", "D", "A", devices=2))
"""For the chart with a choice of policy: three machines of two GPUs, each with some of four checkpoints."""
CROWD = (*MODELS, llm("C", 13 * GB, seconds_per_token=0.03), llm("D", 52 * GB, devices=2, seconds_per_token=0.06))
BURST = Trace(
    TraceLabel("a small burst", "made by hand", "synthetic"),
    tuple(TraceRequest(at, name, 200, tokens) for at, name, tokens in (
        (0.0, "B", 500), (1.0, "C", 700), (2.0, "C", 300), (8.0, "A", 200), (9.0, "A", 300), (10.0, "D", 150), (12.0, "B", 200), (30.0, "C", 200), (31.0, "A", 200), (33.0, "D", 100),
    )),
)  # fmt: skip


def small_burst(placement: Placement | str) -> SimulationResult:
    """Ten requests for four models on three machines."""
    return simulate(BURST, CLUSTER, CROWD, placement=placement, keep_alive=FixedKeepAlive(KEEP_ALIVE_SECONDS), estimator=Estimator())
