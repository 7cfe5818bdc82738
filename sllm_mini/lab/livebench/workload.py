"""What a live cluster is asked when it is measured: a trace cut to what the tiny model takes, its cluster, and the same in simulated time.

All models are the tiny trained one under names of their own, so each is loaded and kept by itself. Two cores cannot be four devices:
steps are paced and the remote store is slow, so that a device that computes and a link that moves bytes mostly sleep, and starts overlap
as they would on machines of their own. Taught in chapter 08.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from msgspec.structs import replace

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.api import Ask
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.simulated import SimulationOptions, even_cluster
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.errors import SllmError

_CHUNK_NBYTES = 2 << 20
"""A store's memory comes in whole ones."""
_MEMORY_RATE = 1e12
"""Nothing is moved on a CPU: an instance serves from the store's memory. A link has to have some rate."""
_GUESS = ModelSpec(name="any", nbytes=0, process_seconds=0.1, ready_seconds=0.1, prefill_seconds_per_token=1e-4, decode_seconds_per_token=0.025)
"""What the controller believes of a model until it has seen one."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to play a trace. `cluster` is a kind and a number of nodes, as `open_cluster` takes them. A node's store has room for `stored`
    models, those that its instances serve from among them; every model that the trace names becomes one of `models`. The trace
    runs `speed` times as fast as it says. `pace_seconds` are slept after each step of an engine, `remote_bytes_per_second` is
    what the remote store gives of one model, or with `per_connection` on one connection. Raises ValueError for what cannot be played."""

    cluster: str = "local:2"
    devices: int = 2
    models: int = 6
    stored: int = 3
    concurrency: int = 4
    placement: str = "serverlessllm"
    keep_alive: str = "fixed-10min"
    autoscaler: str = "per-request"
    speed: float = 1.0
    pace_seconds: float = 0.02
    remote_bytes_per_second: float = 20e6
    seed: int = 0
    engine: str = ""
    per_connection: bool = False

    def __post_init__(self) -> None:
        kind, _, count = self.cluster.partition(":")
        if kind not in ("inprocess", "local") or not (count.isdecimal() and int(count)):
            raise ValueError(f"there is no live cluster {self.cluster!r}; give inprocess or local with a number of nodes, such as local:2")
        if min(self.devices, self.models, self.stored, self.concurrency) < 1:
            raise ValueError("a cluster has at least one device on each node, one model, room for one and one request at a time")
        if not (self.speed > 0 and self.remote_bytes_per_second > 0 and self.pace_seconds >= 0):
            raise ValueError("the speed and the remote store's rate are above 0, and the pace is not below it")

    @property
    def kind(self) -> str:
        return self.cluster.partition(":")[0]

    @property
    def names(self) -> list[str]:
        return [f"model-{number:02}" for number in range(self.models)]

    def nodes(self, remote_bytes_per_second: float | None = None) -> list[NodeSpec]:
        return even_cluster(
            int(self.cluster.partition(":")[2]), devices=self.devices, dram_nbytes=1 << 40, remote_bytes_per_second=remote_bytes_per_second or self.remote_bytes_per_second,
            disk_bytes_per_second=_MEMORY_RATE, dram_bytes_per_second=_MEMORY_RATE,
        )  # fmt: skip

    def specs(self, checkpoint: Checkpoint) -> list[ModelSpec]:
        return [replace(_GUESS, name=name, nbytes=checkpoint.nbytes, concurrency=self.concurrency) for name in self.names]

    def control(self) -> ControlOptions:
        return ControlOptions(placement=self.placement, keep_alive=self.keep_alive, autoscaler=self.autoscaler)

    def live(self, checkpoint: Checkpoint) -> LiveOptions:
        """Nobody is given up because two cores are busy, and nothing is forgotten before it has been read."""
        image_nbytes = -(-checkpoint.nbytes // _CHUNK_NBYTES) * _CHUNK_NBYTES
        node = NodeOptions(
            store_dram_nbytes=self.stored * image_nbytes, eviction="lru", engine=self.engine, pace_seconds=self.pace_seconds, silent_seconds=10.0, stuck_seconds=60.0
        )
        return LiveOptions(node=node, remember_seconds=1e6, join_seconds=60.0)

    def simulation(self, checkpoint: Checkpoint) -> SimulationOptions:
        """The same node: loads from afar take turns, what lies in memory takes none, and instances serve from the store's memory."""
        return SimulationOptions(links="link", store_dram_nbytes=self.stored * checkpoint.nbytes, store_disk_nbytes=0, leases="instance")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Requests as they are played, and how many were made shorter for the model's context."""

    requests: list[TraceRequest] = field(default_factory=list)
    shortened: int = 0


def fitted(trace: Iterable[TraceRequest], options: Options, context: int, most: int | None = None) -> Fitted:
    """The first `most` requests of a trace at its speed, with names of models that there are, and no longer than the context. Raises
    SllmError for a trace of functions, which have no tokens to be played, and for one without requests."""
    known: dict[str, str] = {}
    requests, shortened = [], 0
    for asked in islice(trace, most):
        if not asked.input_tokens + asked.output_tokens:
            raise SllmError(f"{asked.model} is a function: it runs for a time and not for tokens, so no engine can play it; give a trace of models")
        name = known.setdefault(asked.model, options.names[len(known) % options.models])
        outputs = min(max(asked.output_tokens, 1), context // 2)
        inputs = min(max(asked.input_tokens, 1), context - outputs)
        shortened += inputs < asked.input_tokens or outputs < asked.output_tokens
        requests.append(TraceRequest(asked.arrival_seconds / options.speed, name, inputs, outputs))
    if not requests:
        raise SllmError("the trace has no requests; give one that has")
    return Fitted(requests, shortened)


def asks(requests: Iterable[TraceRequest], vocabulary: int, seed: int) -> list[Ask]:
    """Prompts of tokens drawn from `seed`; answers are as long as the trace says."""
    chance = random.Random(seed)
    return [
        Ask(each.model, [chance.randrange(vocabulary) for _ in range(each.input_tokens)], each.output_tokens, stop_at_eos=False, request_id=f"request-{number}")
        for number, each in enumerate(requests)
    ]  # fmt: skip
