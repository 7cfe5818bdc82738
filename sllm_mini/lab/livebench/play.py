"""A trace played on a live cluster, open loop: one thread sleeps to each arrival and submits; it never waits for an answer.

How late the arrivals were is part of what comes back: a clock that slips would measure a lighter trace. The remote store is an HTTP
server of this machine behind a token bucket. Costs the trace's time and some seconds for nodes to come up. Taught in chapter 08.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.api import Deployment, RequestReport, Stream
from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.handles import handles_of
from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.launchers import ENTRY, IMPORTS, PREPARE
from sllm_mini.cluster.process_memory import memory_of
from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.cluster.zygote import Zygote
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import NodeSpec
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.lab.livebench.workload import Options, asks
from sllm_mini.lab.nursery import Nursery
from sllm_mini.lab.tiers.origin import Origin
from sllm_mini.types import Tier, Warmth

_NURSERY = Nursery(IMPORTS, [ENTRY, PREPARE])
_LAST_SECONDS = 120.0
"""So long after the last arrival the last answer may take."""


@dataclass(frozen=True, slots=True)
class Climb:
    """A rung that a worker climbed, and what it then held."""

    warmth: Warmth
    tier: Tier
    seconds: float
    private_nbytes: int
    proportional_nbytes: int


@dataclass(frozen=True, slots=True)
class Played:
    """A run. `reports` are of the trace's requests in its order, with times since `began`, when the trace did; `gaps` are the
    seconds between two tokens of one request, `lateness` how late each was submitted. `shared_nbytes` is
    what each node keeps running for all its workers (a zygote's PSS), `learned` what the estimator saved, and `replayed`
    how many events of the log a new controller answered with the same actions."""

    result: SimulationResult
    log: list[bytes]
    reports: list[RequestReport]
    gaps: list[float]
    lateness: list[float]
    climbs: list[Climb]
    shared_nbytes: dict[str, int]
    began: float
    learned: bytes
    replayed: int


def play(
    requests: Sequence[TraceRequest], checkpoint: Checkpoint, options: Options, *, learned: bytes | None = None, folder: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Played:  # fmt: skip
    """Plays the requests on a new cluster, whose files lie below `folder` and are removed. With `learned` the controller's estimator is as it was
    saved and learns no more. `on_progress(submitted)` is called after each. Raises SllmError where a node does not come up or
    a request is not over in time."""
    made: list[Estimator] = []

    def estimator() -> Estimator:
        made.append(frozen(learned) if learned is not None else Estimator())
        return made[-1]

    control, live = replace(options.control(), estimator=estimator), with_shared_zygote(options.live(checkpoint), options.kind)
    with tempfile.TemporaryDirectory(prefix="sllm-livebench-", dir=folder) as name, Origin(Path(checkpoint.path), options.remote_bytes_per_second, per_connection=options.per_connection) as origin:
        watched = _Watched()
        with _ahead(handles_of(options.kind, Path(name), live), options.nodes()) as handles, LiveCluster(watched.around(handles), control, Path(name, "cluster"), live) as cluster:
            address = origin.url.rpartition("/")[0]
            for spec in options.nodes():
                cluster.add_node(spec)
            for model in options.specs(checkpoint):
                cluster.deploy(Deployment(model, f"{address}/{model.name}"))
            began, streams, lateness = _submit(cluster, requests, checkpoint, options, on_progress)
            for stream in streams:
                try:
                    stream.wait(_LAST_SECONDS)
                except TimeoutError as error:
                    raise SllmError(f"{stream.request_id} was not over {_LAST_SECONDS:g} s after the others; give the cluster more devices, or the trace less speed") from error
            result, log = cluster.result(), list(cluster.log())
            if live.node.zygote:  # each machine would have its own
                watched.shared = dict.fromkeys(watched.shared, memory_of(shared_zygote().pid).proportional_nbytes)
            reports = [_since(stream.report, began) for stream in streams]
            arrived = [[piece.arrived for piece in stream] for stream, report in zip(streams, reports, strict=True) if report.outcome == "answered"]
        saved = made[-1].save()
    gaps = [later - earlier for times in arrived for earlier, later in pairwise(times)]
    return Played(result, log, reports, gaps, lateness, watched.climbs, watched.shared, began, saved, replay(log, control.controller()))


def with_shared_zygote(live: LiveOptions, kind: str) -> LiveOptions:
    """The same for nodes that are processes of this machine, whose workers are forked from a zygote that is there already and outlives them."""
    if kind != "local" or live.node.launcher != "zygote" or live.node.engine:
        return live
    return replace(live, node=replace(live.node, zygote=shared_zygote().path))


def shared_zygote() -> Zygote:
    """Started once for all clusters that this process plays on."""
    return _NURSERY.zygote()


@contextmanager
def _ahead(handles: Callable[[NodeSpec, int], NodeHandle], specs: Sequence[NodeSpec]) -> Iterator[Callable[[NodeSpec, int], NodeHandle]]:
    """The same, with the first of each node started now: they join one after another, and need not start so."""
    made = {(spec.name, 1): handles(spec, 1) for spec in specs}
    try:
        yield lambda spec, incarnation: made.pop((spec.name, incarnation), None) or handles(spec, incarnation)
    finally:
        for left in made.values():
            left.kill()


def frozen(learned: bytes) -> Estimator:
    """The estimator that saved this, as it was then for ever."""
    estimator = Estimator(learning=False)
    estimator.restore(learned)
    return estimator


def _submit(
    cluster: LiveCluster, requests: Sequence[TraceRequest], checkpoint: Checkpoint, options: Options, on_progress: Callable[[int], None] | None
) -> tuple[float, list[Stream], list[float]]:
    asked = asks(requests, vocabulary_of(checkpoint), options.seed)
    streams: list[Stream] = []
    lateness = []
    began = cluster.now
    for number, (request, ask) in enumerate(zip(requests, asked, strict=True), 1):
        due = began + request.arrival_seconds
        if (seconds := due - cluster.now) > 0:
            time.sleep(seconds)
        lateness.append(max(0.0, cluster.now - due))
        streams.append(cluster.submit(ask))
        if on_progress is not None:
            on_progress(number)
    return began, streams, lateness


def _since(report: RequestReport, began: float) -> RequestReport:
    times = {name: getattr(report, name) - began for name in ("arrived", "assigned", "first", "ended")}
    return replace(report, **times)


def context_of(checkpoint: Checkpoint) -> int:
    """Tokens that a request may have in all."""
    return int(_config(checkpoint)["max_position_embeddings"])


def vocabulary_of(checkpoint: Checkpoint) -> int:
    return int(_config(checkpoint)["vocab_size"])


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(json.loads(Path(checkpoint.path, "config.json").read_bytes()))


class _Watched:
    """Handles that note what climbs were made of, and what nodes keep running for all their workers, by node."""

    def __init__(self) -> None:
        self.climbs: list[Climb] = []
        self.shared: dict[str, int] = {}

    def around(self, handles: Callable[..., NodeHandle]) -> Callable[..., NodeHandle]:
        return lambda spec, incarnation: _Handle(handles(spec, incarnation), self)

    def note(self, name: str, answer: node.NodeAnswer) -> None:
        if isinstance(answer, node.Figures):
            self.shared[name] = answer.shared_nbytes
        elif isinstance(answer, node.Reached):
            self.climbs += [Climb(rung.warmth, answer.tier, rung.seconds, rung.private_nbytes, rung.proportional_nbytes) for rung in answer.rungs]


class _Handle:
    """A `NodeHandle` whose answers are noted on their way."""

    def __init__(self, inner: NodeHandle, watched: _Watched) -> None:
        self._inner, self._watched = inner, watched
        self.name, self.incarnation = inner.name, inner.incarnation

    def open(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        def noted(answer: node.NodeAnswer, payload: bytes) -> None:
            self._watched.note(self.name, answer)
            on_answer(answer, payload)

        self._inner.open(noted, on_gone)

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None:
        self._inner.give(order, payload)

    def kill(self) -> None:
        self._inner.kill()

    def close(self) -> None:
        self._inner.close()
