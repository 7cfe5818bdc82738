"""What the driver remembers of models, nodes, instances, requests and loads. Plain data with slots. Taught in chapter 08."""

from __future__ import annotations

from math import floor, nan

from sllm_mini.cluster.simulated.links import Link
from sllm_mini.cluster.simulated.store import SimulatedStore
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth

_TINY = 1e-9


class SimulationError(SllmError):
    """The controller asked for something that cannot be done (a device taken twice, memory that is not there), or a trace
    that cannot be simulated. The sentence says when and what."""


class Model:
    __slots__ = ("decode", "number", "prefill", "spec")

    def __init__(self, spec: ModelSpec, number: int) -> None:
        self.number = number
        self.renew(spec)

    def renew(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.prefill = spec.prefill_seconds_per_token
        self.decode = spec.decode_seconds_per_token


class Node:
    """`owners` is which instance has each device, None for nobody. `bandwidth` of a tier is that of the slowest link on
    the way from it, `links` where loads from it queue."""

    __slots__ = ("bandwidth", "free_devices", "free_nbytes", "free_since", "instances", "joined", "links", "number", "owners", "spec", "store")

    def __init__(self, spec: NodeSpec, number: int, links: dict[Tier, Link[Load]], store: SimulatedStore, now: float) -> None:
        self.spec = spec
        self.number = number
        self.owners: list[int | None] = [None] * spec.devices
        self.free_devices = spec.devices
        self.free_since = now
        self.free_nbytes = spec.dram_nbytes
        self.instances: dict[int, Instance] = {}
        self.links = links
        self.store = store
        self.joined = now
        device = spec.dram_bytes_per_second
        disk = min(spec.disk_bytes_per_second, device)
        self.bandwidth = {Tier.DRAM: device, Tier.DISK: disk, Tier.REMOTE: min(spec.remote_bytes_per_second, disk)}


class Instance:
    """`slot` says what its time is counted as (see `account`), since `since`. `runs` are the requests it computes for;
    `active` counts them and those that are moving here. `spec` is the last model's, `model` None without weights.
    `leased` is what it serves from in the node's store. `drawn` is until when the spans of its climb are drawn. `unused_gpu_seconds` and `unused_byte_seconds` are what its climbs have held since it last ran a request."""

    __slots__ = (
        "active", "alive", "began", "climbed_from", "devices", "drawn", "epoch", "held_nbytes", "id", "leased", "model", "ndevices", "node", "runs", "since", "slot", "spec", "target",
        "unused_byte_seconds", "unused_gpu_seconds", "warmth",
    )  # fmt: skip

    def __init__(self, number: int, node: Node, now: float) -> None:
        self.id = number
        self.node = node
        self.model: Model | None = None
        self.spec: ModelSpec
        self.warmth = Warmth.COLD
        self.target = Warmth.COLD
        self.devices: tuple[int, ...] = ()
        self.ndevices = 0
        self.held_nbytes = 0
        self.leased: str | None = None
        self.epoch = 0
        self.alive = True
        self.active = 0
        self.runs: dict[int, Run] = {}
        self.since = now
        self.slot = 0
        self.began = now
        self.drawn = now
        self.climbed_from = Warmth.COLD
        self.unused_gpu_seconds = 0.0
        self.unused_byte_seconds = 0.0


class Run:
    """A request, and the stretch of work it is in: `work` seconds of which `prefill` come before its next token, `done` by
    `since` and growing at `rate`. `tokens` are those from before the stretch. `version` tells planned ends of it apart."""

    __slots__ = (
        "arrived", "assigned", "decode", "done", "entered", "epoch", "first", "id", "input_tokens", "instance", "migrations", "model", "moved_at", "moving", "output_tokens",
        "pause_seconds", "paused", "preemptions", "prefill", "prefill_per_token", "rate", "rung", "since", "start", "tokens", "version", "work",
    )  # fmt: skip

    def __init__(self, number: int, model: Model, arrived: float, input_tokens: int, output_tokens: int, duration: float | None) -> None:
        self.id = number
        self.model = model
        self.arrived = arrived
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        if duration is None:
            self.prefill_per_token = model.prefill
            self.decode = model.decode
            self.prefill = model.prefill * input_tokens
            self.work = self.prefill + model.decode * output_tokens
        else:  # a function: its time is given, and spread over its tokens if it has any
            self.prefill_per_token = 0.0
            self.decode = duration / output_tokens if output_tokens else 0.0
            self.prefill = 0.0 if output_tokens else duration
            self.work = duration
        self.done = 0.0
        self.tokens = 0
        self.since = 0.0
        self.rate = 1.0
        self.version = 0
        self.epoch = 0
        self.instance: Instance | None = None
        self.moving: Instance | None = None
        self.moved_at = nan
        self.pause_seconds = 0.0
        self.paused = False
        self.start = nan
        self.assigned = nan
        self.entered = nan
        self.first = nan
        self.rung = int(Warmth.READY)  # a Warmth as a plain number: it goes into a row of floats
        self.migrations = 0
        self.preemptions = 0

    def first_token_at(self) -> float:
        """When the first token of this stretch comes, or came: after the prefill and one step."""
        return self.since + (min(self.prefill + self.decode, self.work) - self.done) / self.rate

    def advance(self, now: float) -> None:
        """Counts the work up to now; the stretch goes on."""
        done = self.done + (now - self.since) * self.rate
        if self.first != self.first and done + _TINY >= min(self.prefill + self.decode, self.work):
            self.first = self.first_token_at()
        self.done, self.since = done, now

    def tokens_now(self) -> int:
        """Tokens in all, as of the last `advance`."""
        if not self.decode:
            return self.output_tokens if self.done + _TINY >= self.work else self.tokens
        came = floor((self.done - self.prefill) / self.decode + _TINY)
        return min(self.output_tokens, self.tokens + max(came, 0))

    def resume(self, tokens: int, recomputed: bool) -> None:
        """A new stretch from so many tokens on; `recomputed`: their KV cache is there already."""
        function = not self.output_tokens  # the run of a function cannot be taken up in the middle
        if function:
            self.done = self.done if recomputed else 0.0
            return
        self.tokens = tokens
        self.done = 0.0
        self.prefill = 0.0 if recomputed else self.prefill_per_token * (self.input_tokens + tokens)
        self.work = self.prefill + self.decode * (self.output_tokens - tokens)

    def restart(self) -> None:
        """Nothing of it counts any more (Shepherd's preemption)."""
        self.first = nan
        self.resume(0, recomputed=False)


class Load:
    """One climb of an instance: its process is there at `in_process`, its libraries when the bytes are `asked` for; then they are on
    their way to it, and `parts` shares of them are still missing. `stored`: through
    the node's store, from `tier` of it. `sources` are the nodes that fetch a share, if several do. `queued_seconds` passed
    before any byte moved, `load_seconds` from then until the last."""

    __slots__ = ("asked", "epoch", "in_process", "instance", "load_seconds", "node", "parts", "queued_seconds", "sources", "spec", "stored", "tier")

    def __init__(self, instance: Instance, spec: ModelSpec, tier: Tier, sources: tuple[str, ...], stored: bool, in_process: float, asked: float) -> None:
        self.instance = instance
        self.epoch = instance.epoch
        self.node = instance.node
        self.spec = spec
        self.tier = tier
        self.sources = sources
        self.parts = len(sources) or 1
        self.stored = stored
        self.queued_seconds = 0.0
        self.load_seconds = 0.0
        self.in_process = in_process
        self.asked = asked

    @property
    def wanted(self) -> bool:
        """The instance still climbs for it."""
        return self.instance.alive and self.instance.epoch == self.epoch
