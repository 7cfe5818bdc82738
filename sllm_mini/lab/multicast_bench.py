"""`bench multicast` as one call: plans of `control.multicast` carried out between node processes at a limited rate. Call from one thread.

In each round every plan and number of nodes runs once, in a shuffled order that a seed fixes, and before each one block goes three times over the
idle link of two nodes: the shortest is the block time by which that run is measured, since a noisy machine only adds. A run's seconds are those from the first order until the last node
has the whole model, every block checked against its hash. Nodes are processes of this machine that speak TCP; their links are token buckets on
its loopback, or the kernel's between network namespaces (`cluster.netns`). Where they would need more than 0.6 of its cores the rate is halved. Costs the model's memory once a node. Shown in chapter 10.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sllm_mini.checkpoint import save_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.cluster.block_messages import parts_of
from sllm_mini.cluster.netns import Links
from sllm_mini.control.multicast import (
    Plan,
    binary_tree,
    binomial_pipeline,
    k_way_pipeline,
    serial_chain,
    store_reads,
    summarize,
)
from sllm_mini.errors import ResourceError
from sllm_mini.lab.multicast_node import Fleet, Spread, Spreaded
from sllm_mini.loading.probe import measure_machine

KIND = "sllm-mini bench multicast"
BINOMIAL, STORE = "binomial", "store"
PLANS: Mapping[str, Callable[[int, int], Plan]] = {
    BINOMIAL: binomial_pipeline,
    "2-way": lambda nodes, blocks: k_way_pipeline(nodes, blocks, 2),
    "chain": serial_chain,
    "tree": binary_tree,
    STORE: store_reads,
}
"""Name to (nodes, blocks) to plan. Node 0 has the model; in the 2-way form node 1 has it too."""
_LINKS = {"bucket": "token buckets on loopback", "netns": "network namespaces with tbf"}
_CPU_SHARE = 0.6
_LOWEST = 1e6
_TRIES = 3
_MODEL, _BLOCK = "model", "block"


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `nodes`: how many nodes have the model in the end, the source among them. `bytes_per_second`: of each node's link,
    each way, which is a token bucket ("bucket") or a cable between network namespaces ("netns"). Raises ValueError for what measures nothing."""

    rounds: int = 3
    nodes: tuple[int, ...] = (2, 4, 8)
    blocks: int = 16
    block_nbytes: int = CHUNK_NBYTES
    bytes_per_second: float = 40e6
    seed: int = 0
    links: Literal["bucket", "netns"] = "bucket"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.blocks < 1 or not self.nodes or min(self.nodes) < 2:
            raise ValueError("a spread has at least one round, one block and two nodes")
        if self.block_nbytes < CHUNK_NBYTES or self.block_nbytes % CHUNK_NBYTES:
            raise ValueError(f"blocks of {self.block_nbytes:,} bytes cannot be checked one by one; give a multiple of {CHUNK_NBYTES:,}")
        if not self.bytes_per_second >= _LOWEST:
            raise ValueError(f"a link of {self.bytes_per_second} bytes/s would take minutes; give at least {_LOWEST:,.0f}")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a plan. `block_seconds` is what one block took over the idle link just before, `strayed` how many blocks did not come as planned."""

    seconds: float
    block_seconds: float
    cpu_share: float
    strayed: int


def measure_multicast(options: Options | None = None, *, folder: str | os.PathLike[str] | None = None, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measures every plan; returns the document. Files lie below `folder` (None: the system's place for such) and are removed. Raises ResourceError
    for a node that does not do its part, UnsupportedError where there are no namespaces, OSError."""
    options = options or Options()
    say = on_stage or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="sllm-multicast-", dir=folder) as name:
        return _measure(options, Path(name), say)


def _measure(options: Options, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    say("making a model")
    _make(folder / _MODEL, options.blocks, options.block_nbytes)
    _make(folder / _BLOCK, 1, options.block_nbytes)
    rate, most = options.bytes_per_second, max(options.nodes)
    runner = random.Random(options.seed)
    with ExitStack() as stack:
        while True:
            fleet_stack = stack.enter_context(ExitStack())
            say(f"starting {most} nodes, each with a link of {rate / 1e6:g} MB/s")
            bench = fleet_stack.enter_context(_Bench(folder, options, rate))
            share = bench.run(binomial_pipeline(most, options.blocks)).cpu_share
            if share < _CPU_SHARE or rate / 2 < _LOWEST:
                break
            fleet_stack.close()
            rate /= 2
        plans = {(name, nodes): make(nodes, options.blocks) for name, make in PLANS.items() for nodes in options.nodes if name != "2-way" or nodes >= 4}
        samples: dict[tuple[str, int], list[Sample]] = {key: [] for key in plans}
        for turn in range(options.rounds):
            order = list(plans)
            runner.shuffle(order)
            for key in order:
                say(f"round {turn + 1} of {options.rounds}: {plans[key].name}, {key[1]} nodes")
                samples[key].append(bench.run(plans[key]))
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(measure_machine(folder)),
            "model": {"blocks": options.blocks, "block_nbytes": options.block_nbytes, "nbytes": bench.nbytes, "weights": "random bytes (seed 0)"},
            "method": asdict(options) | {"links": _LINKS[options.links], "transport": "TCP", "bytes_per_second_used": rate, "cpu_share_of_first_run": share},
        }
    return assemble(plans, samples, facts)


class _Bench:
    """A fleet, and the runs on it."""

    def __init__(self, folder: Path, options: Options, rate: float) -> None:
        self.nbytes = options.blocks * options.block_nbytes
        self._folder, self._block_nbytes = folder, options.block_nbytes
        self._runs = 0
        count = max(options.nodes)
        with ExitStack() as stack:
            links = stack.enter_context(Links([str(number) for number in range(count)], rate)) if options.links == "netns" else None
            # Room for both models; whole chunks of memory.
            room = self.nbytes + 4 * options.block_nbytes
            self._fleet = stack.enter_context(Fleet(count, folder, bytes_per_second=rate if links is None else None, dram_nbytes=room, links=links))
            self._stack = stack.pop_all()

    def run(self, plan: Plan) -> Sample:
        """One plan, after one block over the idle link. Raises ResourceError for a node that does not do its part."""
        block_seconds = min(self._spread(store_reads(2, 1), _BLOCK)[0] for _ in range(_TRIES))
        seconds, found = self._spread(plan, _MODEL)
        cpu = sum(done.cpu_seconds for done in found) / seconds / (os.cpu_count() or 1)
        return Sample(seconds, block_seconds, cpu, sum(done.begged + done.fell_back for done in found))

    def _spread(self, plan: Plan, model: str) -> tuple[float, list[Spreaded]]:
        self._fleet.prepare(model, self._folder / model, plan.nodes, plan.sources)
        self._runs += 1
        parts = parts_of(plan, f"run {self._runs}", self._fleet.addresses[: plan.nodes], self._block_nbytes)
        started = time.monotonic()
        for node, part in enumerate(parts):
            self._fleet.give(node, Spread(model, part))
        answers = [self._fleet.answer(node) for node in range(plan.nodes)]
        done = [answer for answer in answers if isinstance(answer, Spreaded)]
        if len(done) < len(answers):
            raise ResourceError(f"plan {plan.name!r} was not carried out: {next(answer for answer in answers if not isinstance(answer, Spreaded))}")
        return max(node.whole_at for node in done[plan.sources :]) - started, done

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _make(path: Path, blocks: int, block_nbytes: int) -> None:
    """A checkpoint of so many blocks, each of them a layer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    save_checkpoint({f"model.layers.{number}.w": torch.randint(0, 256, (block_nbytes,), dtype=torch.uint8, generator=generator) for number in range(blocks)}, path)


def assemble(plans: Mapping[tuple[str, int], Plan], samples: Mapping[tuple[str, int], Sequence[Sample]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document; `facts` are its keys about machine, model and method, passed through. Pure.

    `block_times` are a run's seconds over the block time measured before it; `over_bound` divides them by b + ⌈log₂ n⌉ − 1, which no plan
    from one source can beat; `over_ticks` by the plan's own ticks. `over_link` is the same as `over_bound` with the time that a block takes
    at the link's nominal rate, without a message or a start. `ratio_to_reference` is the seconds over those of everyone reading
    the store in the same round. `ratio_to_limit` is 1 / `over_bound`.
    """
    rate, block_nbytes = facts["method"]["bytes_per_second_used"], facts["model"]["block_nbytes"]
    rows = []
    for (name, nodes), found in samples.items():
        plan = plans[name, nodes]
        figures = summarize(plan)
        bound = plan.blocks + (nodes - 1).bit_length() - 1
        times = [sample.seconds / sample.block_seconds for sample in found]
        values = {
            "seconds": [sample.seconds for sample in found],
            "block_seconds": [sample.block_seconds for sample in found],
            "block_times": times,
            "over_bound": [time / bound for time in times],
            "over_ticks": [time / plan.ticks for time in times],
            "over_link": [sample.seconds * rate / (block_nbytes * bound) for sample in found],
            "ratio_to_reference": [ours.seconds / store.seconds for ours, store in zip(found, samples[STORE, nodes], strict=True)],
            "cpu_share": [sample.cpu_share for sample in found],
        }
        row: dict[str, Any] = {
            "name": f"{plan.name}, {nodes} nodes", "plan": name, "nodes": nodes, "sources": plan.sources, "blocks": plan.blocks, "ticks": plan.ticks, "joint_ticks": figures.joint,
            "bound_block_times": bound, "strayed_blocks": sum(sample.strayed for sample in found), "samples": values["seconds"],
        }  # fmt: skip
        for key, taken in values.items():
            row |= {f"{key}_median": statistics.median(taken), f"{key}_min": min(taken), f"{key}_max": max(taken)}
        row["ratio_to_limit"] = 1 / row["over_bound_median"]
        rows.append(row)
    rows.sort(key=lambda row: (row["nodes"], row["seconds_median"]))
    return {"kind": KIND, **facts, "reference": STORE, "results": rows, "skipped": []}
